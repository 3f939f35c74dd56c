"""What is proposed in a round, and how much: planner, costs, n-gram lookup, draft.

May import: serve/sequences/ and above. Start with planner.py. The files, each importing only those above it:

    costs.py            what passes cost here, by rows and width
    tree_acceptance.py  what trees save of a chain's misses
    planner.py          how many tokens to propose: measured costs against predicted acceptance
    ngram_planner.py    how many tokens to copy: how often copies were right against costs
    runtime_draft.py    a draft made ready to run here: packed, tried
    drafter.py          drafting for a batch: the draft's cache, and the chain of proposals
    draft_tree.py       drafting a tree
    calibration.py      what target passes and draft steps cost here
    proposer.py         who proposes in a round: lookup, the draft, or nobody
"""
