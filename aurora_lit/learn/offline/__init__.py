"""Learning from recorded traces, and scoring drafts on them without running the target's layers.

Used by `aurora-lit replay` and by the benchmarks that compare settings of learning.

May import: learn/online/ and above. Start with loop.py. The files, each importing only those above it:

    ngram_paths.py  how many tokens a server would have copied along a recorded answer
    scoring.py      accepted length of a draft on recorded traces, with and without copies
    on_policy.py    the rounds that another draft would have had along a recorded answer
    loop.py         OfflineLoop.process_block: score a block of traces, learn from it, hold a trial
"""
