"""What one served request teaches, as a record, and those records on disk.

May import: errors.py. Start with record.py. The files, each importing only those above it:

    record.py  what one segment of a request teaches: the record, its bytes, its checks
    log.py     traces on disk, for a draft to learn from
"""
