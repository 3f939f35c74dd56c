"""What is proposed in a round, and how many tokens: the draft and n-gram lookup as proposers, and the planners.

The proposer asks the planners, which compare measured costs with predicted acceptance, and then runs the draft or looks
n-grams up. Verification is not here (serve/sequences/round_plan.py).

May import: serve/sequences/ and above. Start with proposer.py, then planner.py. The files, each importing only those
above it:

    costs.py            what forward passes cost here, by batch size and query length
    planner.py          how many tokens the draft proposes, as a chain or a tree; what trees gain over chains
    floor.py            turns speculation off for a while where it took longer than plain decoding
    kept_costs.py       keeps measured costs in the cache, by machine, code and configuration
    ngram_planner.py    how many tokens n-gram lookup proposes, by how often such tokens were accepted
    runtime_draft.py    a draft prepared for this machine: weights packed, native calls set up, outputs checked
    drafter.py          drafting for a batch: the draft's KV cache, chains and trees of proposals
    calibration.py      measures forward passes and draft steps before the first request
    proposer.py         makes a round's proposals: n-gram lookup, the draft, or none
"""
