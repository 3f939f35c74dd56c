"""The engine: one round after another over a fixed number of slots.

May import: serve/speculation/ and above. Start with engine.py. The files, each importing only those above it:

    trace_recorder.py  rounds become traces: hidden states by slot, notes, segments
    target_runner.py   target passes over slots, and keeping what they computed
    prefill.py         reading prompts, a chunk a round; beginnings that are held are copied
    engine.py          Engine.round, the central step
"""
