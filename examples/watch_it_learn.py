"""Send requests of one kind and watch the draft learn from them.

With its default share of the processor the learner needs minutes. It is faster with more:
aurora-lit serve learn.compute_share=0.5
On more than two cores it can use that share only with learn.threads=2 or more.
"""

import argparse
import time

import httpx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
parser.add_argument("--seconds", type=float, default=600)
options = parser.parse_args()
client = httpx.Client(base_url=options.url, timeout=120, trust_env="//127." not in options.url)  # no proxy for loopback
THINGS = ["orders", "users", "invoices", "products", "flights", "books", "payments", "teams", "rooms", "songs"]

before = client.get("/v1/aurora/status").json()["speculation"]
began, asked = time.monotonic(), 0
while time.monotonic() < began + options.seconds:
    for _ in range(10):  # of a hundred similar requests
        first, second = THINGS[asked % 10], THINGS[asked // 10 % 10]
        text = f"Write an SQL query that counts the {first} of each month and joins them with the table {second}."
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 96, "temperature": 0}
        client.post("/v1/chat/completions", json=body).raise_for_status()
        asked += 1
    status = client.get("/v1/aurora/status").json()
    now, learner = status["speculation"], status["learner"]
    accepted, rounds = now["accepted"] - before["accepted"], max(1, now["drafts"] - before["drafts"])
    print(
        f"{asked:5} requests  {1 + accepted / rounds:.2f} tokens a round  draft {now['draft_version']}  "
        f"learner {learner['state']}: {learner['steps']} steps, {learner['gate']['published']} published",
        flush=True,
    )
    before = now
