"""From logits to tokens: distributions, proposals, verification, draft trees.

The exactness of speculative decoding is decided in this folder: whatever the draft proposes, a request's output has
the distribution of plain decoding. For unseeded requests the ratio test (vLLM: rejection sampling) ensures it.
Everything here is a pure function on tensors.

May import: request.py, kernels/. Start with verification.py. The files, each importing only those above it:

    distribution.py  logits → the distribution a request asked for (bias, penalties, temperature, top-p …)
    noise.py         random numbers without state: Gumbel noise, seeded uniform numbers
    choice.py        the target's own token, greedy or drawn
    tree.py          draft trees as columns: paths, depths, the accepted path
    proposals.py     what the draft proposes in a round, and its log-probability
    verification.py  which proposals are accepted, and which token follows them
"""
