"""How processes meet: the trace ring, status pages, messages between the HTTP process and the engine worker.

May import: errors.py, request.py, settings.py. Start with ring.py. The files, each importing only those above it:

    process_lifetime.py  children die with their parent; a death wakes an event loop
    page.py              one mmap'ed page that holds one record: one writer, many readers
    engine_status.py     the engine worker's page: counters, gauges, heartbeat
    rank_status.py       the page of each further process that holds a part of the target
    learner_status.py    the learner's page, and whether it lives
    run_folder.py        the private folder of one running server, gone with it
    ring.py              traces from the engine to the learner, in shared memory: never waits, never lies
    messages.py          what the HTTP process and the engine worker say to each other
    channel.py           the way of those messages to the HTTP process
"""
