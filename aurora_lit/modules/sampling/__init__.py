"""From logits to tokens: distributions, the target's own choice, trees of proposals.

The exactness of speculative decoding rests on this folder. Every token of an output is the target's own choice at its
place: the argmax, or the argmax of its log-probabilities plus noise that depends on the request's key, the place and
the token alone. A proposal is accepted if it equals that choice (serve/engine/round_plan.py), so whatever the draft
proposes, the output is that of plain decoding. Everything here is a pure function.

May import: request.py, kernels/. Start with choice.py. The files, each importing only those above it:

    distribution.py  logits → the distribution a request asked for (bias, penalties, temperature, top-p …)
    noise.py         random numbers without state: the Gumbel noise of a key, an output index and a token
    choice.py        the target's own token, greedy or drawn
    tree.py          trees of proposals as columns: paths, depths, the accepted path
"""
