"""Kinds of templated API traffic, as prompt files: the same instructions every time, around varied contents.

    python -m benchmarks.templated_prompts --out FOLDER --requests 400

Writes mails.jsonl (a customer's mail, to be turned into JSON with given keys), alerts.jsonl (an alert and its log, to
be explained, with next steps), and a customer-service bot's two kinds of chats, billing.jsonl and support.jsonl. All
ask for what the default target, a small one, can do. A program that calls a model sends such requests by the thousand,
and the answers share their form, not their contents: what a memory of earlier answers can use. Names, products,
amounts, dates and problems are drawn by a generator with a seed; a seed always gives the same files. The contents come
from a few dozen sentence patterns, so they repeat more than real mails.

Leaves out the answers, and real prompts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path

# -- support mails -----------------------------------------------------------------------------------------------------

_MAIL_INSTRUCTIONS = """\
Extract the customer's name, the order number, the product, the order date, the problem and the requested action from \
this mail. Answer as JSON with the keys "customer_name", "order_number", "product", "order_date", "problem" and \
"requested_action".

{mail}"""

_FIRST_NAMES = (
    "Maria Tom Aisha Daniel Chloe Rajesh Ingrid Oliver Fatima Lucas Hannah Mateo Yuki Samuel Elena Peter Grace Ahmed "
    "Sofia Liam Noor Viktor Amelia Jonas Priya Marcus Leila Henry Anna Diego Ruth Kenji Clara Omar Julia Patrick"
)
_LAST_NAMES = (
    "Novak Becker Rahman Okafor Lindqvist Moreau Sharma Castillo Whitfield Tanaka Kowalski Fernandes Brandt Hughes "
    "Petrov Nakamura Sullivan Haddad Jensen Romano Fischer Delgado Campbell Weber Ivanova Mensah Larsen Price Ortiz"
)
_PRODUCTS = {
    "Aero 300 hair dryer": "nozzle cord filter",
    "Brewmaster coffee grinder": "hopper burr switch",
    "CloudRest memory foam pillow": "zip cover seam",
    "Delta Pro trail running shoes": "sole lace eyelet",
    "EchoBeam bluetooth speaker": "strap battery grille",
    "Fjord 40 litre backpack": "buckle zip strap",
    "GlowDesk LED lamp": "dimmer hinge base",
    "HydroPeak steel water bottle": "lid seal handle",
    "Ivory linen bed set": "seam button fabric",
    "JetClean robot vacuum": "brush sensor charger",
    "Kestrel gaming mouse": "wheel cable button",
    "Lumen smart thermostat": "display bracket sensor",
    "Mistral tower fan": "remote motor stand",
    "Nordic oak side table": "leg top screw",
    "OptiView 27 inch monitor": "panel stand port",
    "PureLeaf herb garden kit": "pump tray lamp",
    "QuickSear cast iron pan": "handle coating rim",
    "Rover kids bicycle": "brake pedal chain",
    "SilentType mechanical keyboard": "spacebar cable key",
    "TerraGrip yoga mat": "surface edge bag",
    "UltraSlim laptop sleeve": "zip lining flap",
    "VentoMax air purifier": "filter fan display",
    "WalkAbout baby stroller": "wheel canopy brake",
    "ZenKettle electric kettle": "lid spout base",
}
"""Names, and the parts that break."""
_CITIES = "Leeds Hamburg Porto Tucson Uppsala Lyon Cork Krakow Denver Utrecht Graz Halifax Bristol Turin Aarhus Tampa"
_PEOPLE = ("my wife", "my husband", "my son", "my daughter", "a neighbour", "my mother", "a colleague", "my flatmate")
_OPENINGS = ("Hello,", "Hi there,", "Dear support team,", "Good morning,", "To whom it may concern,", "Hey,")
_CLOSINGS = ("Best regards,", "Thanks,", "Kind regards,", "Many thanks in advance,", "Regards,", "Sincerely,")
_ORDERED = (
    "I ordered the {product} on {ordered}, order number {order}.",
    "On {ordered} I bought the {product} in your shop. The order number is {order}.",
    "This is about my order {order} from {ordered}: one {product}.",
    "My order {order} ({product}, placed on {ordered}) is giving me trouble.",
    "{ordered}, order {order}: that is when {person} chose the {product} with me.",
    "You will find the {product} under order {order}, which I placed on {ordered}.",
)
_PROBLEMS: tuple[tuple[str, ...], ...] = (
    (
        "It was supposed to arrive within {days} days, but the tracking page has said 'in transit' since {weekday}.",
        "The parcel has not reached me in {city}, although the carrier claims to have left it with {person}.",
        "The delivery date has been moved {few} times by now, from {weekday} to {weekday2} and on.",
        "For {days} days it has been waiting in a depot near {city}, and nobody there answers the phone.",
    ),
    (
        "When {person} opened the box, the {part} had a crack, and something rattles near the {part2}.",
        "It arrived damaged: the box was soaked and the {part} has {few} deep scratches.",
        "The {part} is bent and the {part2} does not fit any more. The courier must have dropped it on {weekday}.",
        "There is a dent as long as a finger on the {part}, and the {part2} came off in {person2}'s hands.",
    ),
    (
        "It worked for {days} days, and since {weekday} the {part} does nothing, whatever {person} tries.",
        "After about {days} minutes the {part} gets hot and the {part2} clicks, every single time.",
        "The {part} broke off after {days} days of normal use. I expected better for {amount}.",
        "Since we moved it to {city}, the {part} makes a noise like a coin in a tin, and the {part2} is loose.",
    ),
    (
        "Unfortunately the box held a model with another {part}, and {person} says the {part2} is for export only.",
        "The parcel contained the {other} instead, which neither {person} nor I ordered.",
        "I received {few} pieces although I ordered and paid for only one; the invoice from {weekday} says so too.",
        "The {part} is in the wrong colour, and in place of the {part2} there was one for the {other}.",
    ),
    (
        "My credit card was charged {amount} on {weekday} and {amount} again on {weekday2}.",
        "The invoice says {amount}, but {person} saw it for {amount2} on your page that day.",
        "I used a voucher for {amount2}, yet the full {amount} was taken from my account.",
        "You refunded {amount2} for the {part}, although we had agreed on {amount}.",
    ),
    (
        "Before {person} unpacks it: does the warranty cover the {part}, and for how many years?",
        "The manual says nothing about cleaning the {part}. Is water allowed, or only a cloth for the {part2}?",
        "Can I buy a second {part} separately, and what does shipping to {city} cost?",
        "Does the {part} of the {other} fit as well? {weekday} we could pick it up in {city}.",
    ),
    (
        "I no longer need it, because {person} gave me the same one on {weekday}. It has not been shipped yet.",
        "I chose the wrong {part} by mistake {few} hours ago, and your page offers no way to change it.",
        "Our plans have changed, and we are moving to {city} before {weekday}.",
        "I have found out that {person} ordered the {other} for us {few} days earlier.",
    ),
)
_REQUESTS: tuple[tuple[str, ...], ...] = (
    ("Please find out where it is, or send me a new one.", "Please refund the {amount} if it is lost."),
    ("I would like a replacement before {weekday2}.", "Please tell me how I get my {amount} back."),
    ("Can you exchange the {part} under warranty?", "I want my money back, {amount} in total."),
    ("Please send the right article and a label for the return.", "Please take it back and refund {amount}."),
    ("Please correct this and refund the difference.", "I expect the money on my account within {days} days."),
    ("A short answer to {person} is enough.", "There is no hurry, I am just asking before I decide."),
    ("Please cancel the order and confirm it in writing.", "Kindly stop the shipment and refund {amount}."),
)
_URGENCIES = (
    "",
    "",
    "It was meant as a present for {person2}, so this is urgent.",
    "I need an answer before {weekday}.",
    "Take your time, I am away in {city} until {weekday2} anyway.",
    "This is my {few_th} mail about it, and I am losing patience.",
)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _mail(rng: random.Random) -> str:
    product, other = rng.sample(sorted(_PRODUCTS), 2)
    problem = rng.randrange(len(_PROBLEMS))
    ordered = date(2026, 1, 5) + timedelta(days=rng.randrange(300))
    amount = rng.choice(("${}.{:02}", "{}.{:02} euros", "£{}.{:02}"))
    fields: dict[str, object] = {
        "product": product,
        "other": other,
        "order": rng.choice(("SO-{}", "#{}", "A{}", "{}-EU")).format(rng.randrange(100_000, 999_999)),
        "ordered": rng.choice((f"{ordered:%B} {ordered.day}", f"{ordered:%Y-%m-%d}", f"{ordered.day} {ordered:%B %Y}")),
        "days": rng.randrange(4, 30),
        "few": rng.choice(("two", "three", "four")),
        "few_th": rng.choice(("second", "third", "fourth")),
        "amount": amount.format(rng.randrange(120, 480), rng.choice((0, 49, 90, 95, 99))),
        "amount2": amount.format(rng.randrange(12, 110), rng.choice((0, 49, 90, 95, 99))),
        "city": rng.choice(_CITIES.split()),
        **_distinct(rng, "part", _PRODUCTS[product].split()),
        **_distinct(rng, "person", _PEOPLE),
        **_distinct(rng, "weekday", _WEEKDAYS),
    }
    sentences = [rng.choice(part) for part in (_ORDERED, _PROBLEMS[problem], _REQUESTS[problem], _URGENCIES)]
    body = " ".join(sentence.format(**fields) for sentence in sentences if sentence)
    name = f"{rng.choice(_FIRST_NAMES.split())} {rng.choice(_LAST_NAMES.split())}"
    mail = f"{rng.choice(_OPENINGS)}\n\n{body}\n\n{rng.choice(_CLOSINGS)}\n{name}"
    return _MAIL_INSTRUCTIONS.format(mail=mail)


def _distinct(rng: random.Random, name: str, values: Sequence[str]) -> dict[str, str]:
    first, second = rng.sample(values, 2)
    return {name: first, f"{name}2": second}


# -- alerts ------------------------------------------------------------------------------------------------------------

_ALERT_INSTRUCTIONS = """\
You are the on-call assistant. An alert was raised:

{alert}

Explain the likely cause and list the next steps for the engineer on call."""

_SERVICES = (
    "checkout-api inventory-sync payment-gateway search-index auth-service image-resizer mail-relay report-builder "
    "session-store billing-worker recommendation-api notification-hub order-router audit-log media-transcoder"
)
_REGIONS = ("eu-west", "eu-north", "us-east", "us-west", "ap-south", "sa-east")
_DEPENDENCIES = (
    "postgres-primary postgres-replica redis-cache kafka-broker rabbitmq object-storage ldap-directory vault"
)
_FAULTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "HTTP 5xx rate of {service} is {percent}% (threshold 2%)",
        (
            "ERROR connection to {dependency} timed out after {ms} ms",
            "WARN pool exhausted: {count} of {count} connections in use",
            "ERROR request {request} failed: upstream unavailable",
            "WARN retry {few} of 3 for {dependency}",
            "INFO circuit breaker for {dependency} opened",
        ),
    ),
    (
        "Memory of {service} at {high}% on {host} (threshold 85%)",
        (
            "WARN garbage collection paused for {ms} ms",
            "WARN heap usage {high}% after full collection",
            "ERROR out of memory while handling request {request}",
            "INFO process {many} killed by the kernel, restarting",
            "WARN cache holds {many} entries, eviction is disabled",
        ),
    ),
    (
        "Disk on {host} is {high}% full (threshold 90%)",
        (
            "ERROR no space left on device while writing /var/log/{service}.log",
            "WARN log rotation failed {few} times in a row",
            "ERROR could not create a temporary file for request {request}",
            "INFO {count} files in the upload folder are older than 30 days",
            "WARN write to {dependency} delayed by {ms} ms",
        ),
    ),
    (
        "Queue of {service} holds {many} messages (threshold 500)",
        (
            "WARN consumer lag on {dependency} grew to {many} messages",
            "ERROR message {request} rejected: schema version {few} is unknown",
            "INFO worker {few} restarted after an unhandled exception",
            "WARN processing of a message took {ms} ms",
            "ERROR dead letter queue is full",
        ),
    ),
    (
        "Certificate check of {service} failed on {host}",
        (
            "ERROR TLS handshake with {dependency} failed: certificate has expired",
            "WARN {count} clients were refused in the last minute",
            "ERROR renewal failed with status {percent}: challenge not reachable",
            "INFO falling back to the certificate of yesterday",
            "ERROR request {request} failed: certificate verify failed",
        ),
    ),
    (
        "95th percentile latency of {service} is {ms} ms (threshold 800 ms)",
        (
            "WARN slow query on {dependency}: {ms} ms, sequential scan of {many} rows",
            "INFO deployment of version 4.{few}.{percent} finished",
            "WARN thread pool saturated, {count} tasks are waiting",
            "ERROR request {request} exceeded its deadline of {ms} ms",
            "WARN replica of {dependency} is {percent} seconds behind",
        ),
    ),
)


def _alert(rng: random.Random) -> str:
    service, region = rng.choice(_SERVICES.split()), rng.choice(_REGIONS)
    host = f"{region}-{rng.choice(('app', 'node', 'web'))}{rng.randrange(1, 40):02}"
    dependency = rng.choice(_DEPENDENCIES.split())
    title, lines = rng.choice(_FAULTS)
    at = datetime(2026, 2, 1) + timedelta(seconds=rng.randrange(300 * 86_400))

    def fill(text: str) -> str:
        return text.format(
            service=service,
            host=host,
            dependency=dependency,
            percent=rng.randrange(3, 99),
            ms=rng.randrange(850, 30_000, 10),
            high=rng.randrange(91, 100),
            count=rng.randrange(20, 400),
            many=rng.randrange(520, 9_000),
            few=rng.randrange(2, 9),
            request=f"{rng.randrange(1 << 32):08x}",
        )

    shown = [f"Alert: {fill(title)}", f"Raised: {at:%Y-%m-%d %H:%M:%S} UTC, region {region}", "", "Log:"]
    for line in rng.sample(lines, rng.randrange(3, len(lines) + 1)):
        level, text = line.split(" ", 1)
        shown.append(f"{at:%H:%M:%S} {host} {service} {level} {fill(text)}")
        at += timedelta(seconds=rng.randrange(1, 40))
    return _ALERT_INSTRUCTIONS.format(alert="\n".join(shown))


# -- a customer-service bot --------------------------------------------------------------------------------------------

_BOT_INSTRUCTIONS = """\
You are the assistant of Halden Net, which sells internet, phone and TV. Greet the customer by name, answer the \
question in three numbered steps, and end with "Is there anything else I can do for you?". Refer to the plan by its \
name, and to bills by their month.

Customer: {name}, plan {plan}, customer number {number}
Question: {question}"""

_PLANS = "Fibre 100,Fibre 500,Fibre Gigabit,Cable Basic,Cable Plus,Mobile 10,Mobile Unlimited,Home Bundle,TV Family"
_DEVICES = "router,modem,TV box,mesh repeater,phone,tablet,laptop,smart TV,game console,fibre terminal"
_LIGHTS = "red,orange,blinking red,blinking green,off,solid white,blinking blue"
_MONTHS = "January,February,March,April,May,June,July,August,September,October,November,December"
_BILLING = (
    "My bill for {month} is {amount}, but the one for {month2} was {amount2}. Why is it higher?",
    "I was charged {amount} twice in {month}. How do I get one of the payments back?",
    "Can I pay my bill for {month} in {few} parts? {amount} is too much at once.",
    "There is a fee of {amount2} for {service} on my bill that I never ordered. Please remove it.",
    "I moved from {city} to {city2} in {month} and still pay for the old address. What should I do?",
    "Please explain the item '{service}' on the bill for {month}.",
    "I cancelled {service} in {month}, and {month2} still shows {amount2} for it.",
    "My bank sent back your debit of {amount} on {weekday}. Will my line be blocked, and how can I pay now?",
    "What does it cost to change from my plan to {plan2} before {month2} ends?",
    "I need a copy of the bills from {month} to {month2} for my tax return. Where do I find them?",
    "A discount of {amount2} was promised when I signed in {city}. It is missing from the bill for {month}.",
    "How do I change the bank account for my bills? {person} will pay from {month2} on.",
    "You owe me {amount2} for the outage in {month}. When will it be on a bill?",
    "I got a reminder for {amount}, though I paid on {weekday}. Which of us is wrong?",
)
_SUPPORT = (
    "The light on my {device} is {light} since {weekday}. What does it mean?",
    "My {device} loses its connection every {few} minutes, mostly in the evening.",
    "I get only {speed} Mbit/s on my {device}, although my plan should be faster.",
    "The {device} does not find the wireless network any more, but the {device2} does.",
    "After the update on {weekday} the {device} starts again and again.",
    "How do I set up the new {device}? The old one was a {device2}.",
    "I have forgotten the password of my {device}. How do I reset it without losing my settings?",
    "There is no signal in my house in {city} since {weekday}. Is there an outage?",
    "Video calls on my {device} freeze as soon as {person} uses the {device2}.",
    "My {device} says error {code} when I want to watch TV.",
    "How do I open port {port} on my {device} for the {device2}?",
    "The {device} gets very hot and the light is {light}. Is that dangerous?",
    "Can I put the {device} in the cellar, {few} rooms away from the {device2}?",
    "Pages load slowly on the {device}, but the speed test says {speed} Mbit/s.",
)
_SERVICES_SOLD = "device protection,the sports channels,the second phone number,cloud storage,the security package"


def _chat(rng: random.Random, questions: Sequence[str]) -> str:
    fields = {
        "few": rng.choice(("two", "three", "four", "five")),
        "amount": f"${rng.randrange(40, 180)}.{rng.choice((0, 49, 90, 99)):02}",
        "amount2": f"${rng.randrange(4, 40)}.{rng.choice((0, 49, 90, 99)):02}",
        "service": rng.choice(_SERVICES_SOLD.split(",")),
        "light": rng.choice(_LIGHTS.split(",")),
        "speed": str(rng.randrange(2, 95)),
        "code": f"{rng.choice('EFHT')}{rng.randrange(10, 999):03}",
        "port": str(rng.randrange(1024, 60_000)),
        **_distinct(rng, "city", _CITIES.split()),
        **_distinct(rng, "device", _DEVICES.split(",")),
        **_distinct(rng, "month", _MONTHS.split(",")),
        **_distinct(rng, "person", _PEOPLE),
        **_distinct(rng, "plan", _PLANS.split(",")),
        **_distinct(rng, "weekday", _WEEKDAYS),
    }
    return _BOT_INSTRUCTIONS.format(
        name=f"{rng.choice(_FIRST_NAMES.split())} {rng.choice(_LAST_NAMES.split())}",
        plan=fields["plan"],
        number=rng.randrange(1_000_000, 9_999_999),
        question=rng.choice(questions).format(**fields),
    )


# -- files -------------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[random.Random], str]] = {
    "mails": _mail,
    "alerts": _alert,
    "billing": partial(_chat, questions=_BILLING),
    "support": partial(_chat, questions=_SUPPORT),
}
"""What makes one prompt, by kind of traffic."""


def make_prompts(kind: str, requests: int, *, seed: int = 0) -> list[str]:
    """The first `requests` prompts of a kind in `KINDS`; a longer list begins with the shorter one."""
    rng = random.Random(f"{kind} {seed}")
    return [KINDS[kind](rng) for _ in range(requests)]


def write_prompts(folder: Path, requests: int, *, seed: int = 0) -> list[Path]:
    """Write a prompt file for each kind; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in KINDS:
        lines = [
            json.dumps(
                {
                    "id": f"{kind}-{seed}-{number:04}",
                    "domain": kind,
                    "source": "benchmarks/templated_prompts.py",
                    "license": "Apache-2.0",
                    "messages": [{"role": "user", "content": prompt}],
                }
            )
            for number, prompt in enumerate(make_prompts(kind, requests, seed=seed))
        ]
        paths.append(folder / f"{kind}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def main() -> None:
    """Write the files and name them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the prompt files")
    parser.add_argument("--requests", type=int, default=400, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in write_prompts(arguments.out, arguments.requests, seed=arguments.seed):
        print(path)


if __name__ == "__main__":
    main()
