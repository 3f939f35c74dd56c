"""Our server beside transformers, vLLM and llama.cpp: the same model, prompts and HTTP client, interleaved.

python -m benchmarks.peers --prompts chat.jsonl code.jsonl summarize.jsonl --out peers

__main__.py              the arguments and the loop: pairs of servers, measured one after the other
engines.py               one record an engine: its command and its best documented settings
environments.py          how an engine comes to this machine, in an environment of its own
gguf_files.py            our weights as llama.cpp reads them
transformers_server.py   an HTTP front for transformers' generate
servers.py               a server that runs while it is measured, and no longer
client.py                concurrent streamed requests, and what a client sees of them
report.py                ratios with quartiles: a table and JSON
"""
