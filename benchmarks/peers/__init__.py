"""Our server against transformers, vLLM and llama.cpp: same model, prompts and HTTP client, one after the other.

python -m benchmarks.peers --prompts chat.jsonl code.jsonl summarize.jsonl --out peers

environments.py          installs an engine, in an environment of its own
engines.py               one record for each engine: its command and its best documented settings
client.py                concurrent streamed requests, and what a client observes
report.py                ratios with quartiles: a table and JSON
transformers_server.py   an HTTP server around transformers' generate
__main__.py              the arguments and the loop: pairs of servers, measured one after the other
"""
