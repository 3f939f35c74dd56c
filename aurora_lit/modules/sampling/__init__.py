"""From logits to tokens: distributions, proposals, verification, draft trees. The exact law of the output lives here.

May import: request.py. Start with verification.py. The files, each importing only those above it:

    distribution.py  logits → the distribution a request asked for (bias, penalties, temperature, top-p ...)
    tree.py          draft trees as columns: paths, depths, the path that is accepted
    verification.py  proposals, verification, draws, log-probabilities
"""
