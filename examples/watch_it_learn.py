"""Send requests of one kind and watch the draft learn from them: python examples/watch_it_learn.py [URL] [SECONDS].

With its default share of the processor the learner needs minutes. It is faster with more:
aurora-lit serve learn.compute_share=0.5
"""

import sys
import time

import httpx

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 600.0
THINGS = ["orders", "users", "invoices", "products", "flights", "books", "payments", "teams", "rooms", "songs"]


def ask(number: int) -> None:
    """Send one of a hundred similar requests, and wait for its answer."""
    first, second = THINGS[number % 10], THINGS[number // 10 % 10]
    text = f"Write an SQL query that counts the {first} of each month and joins them with the table {second}."
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 96, "temperature": 0}
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).raise_for_status()


began, asked = time.monotonic(), 0
while time.monotonic() < began + seconds:
    before = httpx.get(f"{url}/v1/aurora/status").json()["speculation"]
    for number in range(asked, asked + 10):
        ask(number)
    asked += 10
    status = httpx.get(f"{url}/v1/aurora/status").json()
    now, learner = status["speculation"], status["learner"]
    accepted, rounds = now["accepted"] - before["accepted"], max(1, now["drafts"] - before["drafts"])
    print(
        f"{asked:5} requests  {1 + accepted / rounds:.2f} tokens a round  draft {now['draft_version']}  "
        f"learner {learner['state']}: {learner['steps']} steps, {learner['gate']['published']} published",
        flush=True,
    )
