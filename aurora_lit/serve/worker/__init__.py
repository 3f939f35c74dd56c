"""The engine's process: its loop, the calls it answers, the draft it serves and swaps.

May import: serve/engine/ and above, ipc/, drafts/. Start with loop.py. The files, each importing only those above it:

    trace_sinks.py    where traces go: the ring, and the disk behind a thread
    exploration.py    how much rounds explore: as the learner asks, or as configured
    thread_budget.py  how many threads rounds have: not those cores that the learner computes on
    hot_reload.py     what CURRENT names, loaded and checked beside serving, or refused
    rollback.py       the trial of a new draft on live traffic: does it accept less than the one before?
    live_draft.py     which draft serves: swaps between rounds, trials, going back
    call_tracker.py   which engine request belongs to which client call
    build.py          configuration → engine, traces, drafts: all that an engine worker needs; wiring only
    round_times.py    how long rounds took lately, those that swap apart from the others
    loop.py           the engine worker's loop, a LitLoop
"""
