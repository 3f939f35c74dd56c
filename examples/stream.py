"""Stream an answer with the `openai` client: python examples/stream.py [URL]."""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Write a haiku about rain."}],
    max_tokens=64,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    else:  # the last chunk has no choices; it says what the answer cost
        decoding = chunk.model_extra["metrics"]["speculative_decoding"]
        print(f"\n{chunk.usage.completion_tokens} tokens, {decoding['mean_acceptance_length']:.2f} a round")
