"""Traces: the record of one segment of a served request, from which a draft learns, and its storage on disk.

The engine and pretraining make traces; the ring (ipc/) and the log here carry them to learning.

May import: errors.py.

Start with record.py. The files, each importing only files above it:

    record.py   the Trace dataclass, its bytes and its validation
    log.py      a folder of traces on disk: writing, size limit, reading
"""
