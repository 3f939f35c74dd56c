"""The engine worker's process: its loop, the calls it answers, the draft it serves and swaps.

serve/engine_process.py starts this process and runs `EngineLoop` in it. The loop owns the engine; everything else here
serves the loop between two rounds, or runs beside it in a thread.

May import: serve/engine/ and above, ipc/, drafts/, and centroids.py in modules/domains/.
Start with loop.py. The files, each importing only those above it:

    parts.py            the engine's interface, and the parts that a worker consists of
    trace_sinks.py      destinations of traces: the ring, and a recording on disk
    domain_watch.py     loads the domains that the learner has published, or refuses them
    swap_gain.py        tokens a round before and after the last swap
    live_draft.py       the draft that serves: swaps between rounds, trials, rollbacks
    call_tracker.py     maps engine requests to client calls, and outputs to deltas
    outbox.py           messages to the HTTP process; a round never waits for it to read them
    load_models.py      what a configuration names: target, tokenizer, draft
    build.py            configuration → engine and the worker's parts
    domain_counts.py    tokens generated and accepted, by domain
    status_report.py    counters, round times and draft events, written to the status page
    loop.py             the loop itself
"""
