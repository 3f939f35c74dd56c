"""What `aurora-lit bench` measures on prompts of your own: speed and acceptance.

May import: everything above.

Start with throughput.py. The files, each importing only files above it:

    reporting.py    what reports have in common: medians with quartiles, console, progress bar, JSON
    prompts.py      answers prompts with an engine in this process, and records every round
    reference.py    transformers' generate(), to compare with
    throughput.py   tokens per second with and without a draft
    acceptance.py   accepted length and acceptance rate by position and domain
"""
