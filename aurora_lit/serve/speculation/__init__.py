"""What is proposed in a round: every source's candidates, weighed by what their columns cost, or nothing.

Sources give candidates and how probable they are (sources/). A candidate is proposed if it promises more tokens than
its time brings otherwise (weigh.py). Whether speculation has paid at all decides floor.py, by clocks alone.
Verification is not here (serve/engine/round_plan.py).

May import: the records of serve/engine/ (sequence.py, round_plan.py) and what stands above them. Start with propose.py,
then weigh.py. The files, each importing only those above it; sources/ stands after the first two:

    costs.py        what forward passes and draft steps take here, by batch size and query length
    weigh.py        which candidates are worth their columns; one tree from copies and the draft's proposals
    floor.py        turns speculation off for a while where it took longer than plain decoding
    calibration.py  times forward passes and draft steps before the first request
    propose.py      makes a round's proposals: asks the sources, weighs what they have, merges it
"""
