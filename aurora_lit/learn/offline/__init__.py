"""Learning from recorded traces, and scoring drafts along them.

May import: learn/online/ and above. Start with replay.py. The files, each importing only those above it:

    scoring.py    accepted length of a draft on recorded traces, root to root as rounds go
    on_policy.py  the rounds that another draft would have had along a recorded answer
    replay.py     Replay.take: score a block of traces, learn from it, hold a trial
"""
