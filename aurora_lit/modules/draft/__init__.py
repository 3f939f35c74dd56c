"""The draft network: EAGLE-3's one-layer head.

May import: nothing of the package. Start with eagle3.py. The files, each importing only those above it:

    logit_transform.py  what a target's head does beside its weight: a bias, a soft cap
    eagle3.py           EAGLE-3's one-layer head, with a value head beside it
"""
