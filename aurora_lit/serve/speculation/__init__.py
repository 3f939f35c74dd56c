"""What is proposed in a round, and how many tokens: copies, the draft, and the planners.

Copies come from earlier in the request and from the traffic memory. The proposer has them found, asks the planners,
which compare measured costs with predicted acceptance, runs the draft where it promises more, and merges both.
Verification is not here (serve/engine/round_plan.py).

May import: the records of serve/engine/ (sequence.py, round_plan.py) and what stands above them. Start with
proposer.py, then planner.py. The files, each importing only those above it:

    costs.py              what forward passes cost here, by batch size and query length
    draft_reliability.py  how often the draft's first choices are accepted, by the share that it gives them
    planner.py            how many tokens the draft proposes; what tokens of a weighed chain cost and promise
    floor.py              turns speculation off for a while where it took longer than plain decoding
    kept_costs.py         keeps measured costs in the cache, by machine, code and configuration
    copy_planner.py       how many tokens are copied, by what that costs and promises
    grammar_rows.py       rows of outputs with a grammar: what it allows and what it forces
    candidate_tree.py     one tree a sequence, from copies and the draft's proposals
    copies_in_python.py   looks copies up where there are no kernels
    traffic_memory.py     what earlier requests were answered, by who may read it; looks copies up
    copy_finder.py        the copies that a round may propose: whose are looked up, how probable they must be
    runtime_draft.py      a draft prepared for this machine: weights packed, native calls set up, outputs checked
    drafter.py            drafting for a batch: the draft's KV cache, and chains of proposals
    calibration.py        measures forward passes and draft steps before the first request; keeps what it found
    proposer.py           makes a round's proposals: copies, the draft's, both in one tree, or none
"""
