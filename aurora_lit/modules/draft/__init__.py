"""The draft network, as training and serving share it.

May import: nothing of the package. Start with eagle3.py. The files, each importing only those above it:

    logit_transform.py  from products of a target's LM head to logits: a bias, a soft cap
    eagle3.py           EAGLE-3's one-layer network, plus a value head
"""
