"""How processes meet: the trace ring, status pages, messages between the HTTP process and the engine worker.

The ring and the status pages are memory-mapped files that store a digest of their record's layout, so that another
version's are refused. When the ring is full, a new trace overwrites the oldest ones; only a trace larger than the ring
is dropped. Calls and their updates are msgpack, decoded by type. Nothing is unpickled, and nothing here computes.

May import: errors.py, request.py, settings.py. Start with ring.py. The files, each importing only those above it:

    process_lifetime.py  a module's command; children end with their parent; an end wakes an event loop; signals
    page.py              a memory-mapped page that holds one record: one writer, many readers
    engine_status.py     the pages of the engine worker and of further ranks: counters, gauges, heartbeat
    learner_status.py    the learner's page, and whether it runs
    run_folder.py        the private folder of one running server
    ring.py              traces from the engine to the learner in shared memory; the writer never waits
    messages.py          calls, their updates, and the engine worker's end of the socket that carries them
"""
