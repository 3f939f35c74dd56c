"""The learner beside a server: loop, optimiser step, gate, processor budget, its process.

May import: learn/data/ and above. Start with loop.py. The files, each importing only those above it:

    budget.py         how much of the processors learning may take: a bucket of seconds
    gate.py           challenger against champion on requests kept out of training
    naming.py         domains in words: what is typical of their prompts
    step_metrics.py   what steps show, averaged for the loggers
    state_file.py     a learner's state on disk, whole or not at all
    learner.py        Learner.update, the only optimiser step online; what it goes on from
    data_parallel.py  several processes that learn together: one leads, the others take its steps
    domain_drafts.py  the best draft of each domain, kept on disk; learning goes on from it when that is back
    loop.py           OnlineLoop.tick: drain, follow versions, step, trial, save, report
    build.py          configuration and run folder → loop; wiring only
    process.py        a learner's process: priority, heartbeat, signals, the server's end
"""
