"""From traces to batches: the target's head, labelled traces, what is admitted, remembered and drawn.

May import: traces/, modules/, models/. Start with feed.py. The files, each importing only those above it:

    batches.py         batches from a trace log
    admission.py       which traces may teach: not those whose answer loops
    reservoir.py       what is remembered of past traffic, by domain, within bytes; in memory only
    target_head.py     the target without its layers: embedding and head
    vocabulary.py      the draft's vocabulary follows what traffic uses
    labelled_trace.py  traces → an online batch: cropped, read by the head, padded, with their rounds
    feed.py            which traces a batch takes: live ones first, mixed with remembered ones
"""
