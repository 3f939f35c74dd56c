"""The online learner: a process beside a server that trains the draft on served traffic and publishes better versions.

It reads traces from the server's ring, takes optimiser steps within a budget of processor time, and publishes a draft
when the gate finds it better than the served one on requests that were not learned from.

May import: learn/data/ and above. Start with loop.py. The files, each importing only those above it:

    budget.py              how much processor time learning may use, by how busy the server is
    environment.py         what the loop is connected to: traces, drafts, status pages, the clock
    scores.py              the expected accepted length of a draft on requests that wait
    step_metrics.py        metrics of optimiser steps, averaged for the loggers
    learner.py             Learner.update, the only optimiser step of online learning; its state
    trial.py               Trial, live and in a replay: waiting requests, evidence, decision, consequence
    intake.py              what becomes of a trace: left out, or waits for a trial and is then trained on
    data_parallel.py       several processes that take each step together
    centroid_publisher.py  publishes the domains by which the engine assigns requests
    loop.py                OnlineLoop.tick: read traces, follow versions, step, trial, save, report
    build.py               builds a loop from a configuration and a run folder
    process.py             a learner's process: priority, heartbeat, signals, exit with the server
"""
