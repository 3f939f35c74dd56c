"""What `aurora-lit bench` measures on prompts of your own: speed, acceptance, learning.

May import: everything above.

Start with throughput.py. The files, each importing only files above it:

    reporting.py        what reports have in common: medians with quartiles, console, progress bar, JSON
    plots.py            the plots
    prompts.py          answers prompts with an engine in this process, and records every round
    reference.py        transformers' generate(), to compare with
    throughput.py       tokens per second with and without a draft
    acceptance.py       accepted length and acceptance rate by position and domain
    server_process.py   a server in a process of its own
    online.py           compares servers: a draft that learns, one that does not, and none
    stream_plan.py      a stream of changing traffic: read from YAML and planned
    stream.py           records a stream: answers its prompts once and keeps the traces
    shifts.py           delay and false alarms of the domain detector on a recorded stream
"""
