"""What `aurora-lit bench` measures on prompts of your own, or on a repository: speed and acceptance.

May import: everything above.

Start with throughput.py. The files, each importing only files above it:

    reporting.py    what reports have in common: medians with quartiles, console, progress bar, JSON
    prompts.py      answers prompts with an engine in this process, and records every round
    reference.py    transformers' generate(), to compare with
    throughput.py   tokens per second with and without a draft
    acceptance.py   accepted length and acceptance rate by position and domain
    load.py         requests to a server over HTTP, and what each came to
    servers.py      servers that are started, watched and ended
    repository_traffic.py   requests out of a git repository's history
    repository.py   what memory and learner bring on a repository
"""
