"""The benchmark that asks whether a learned shape policy could gain anything: a simulator of what rounds propose.

May import: everything above.

Start with run.py. The files, each importing only files above it:

    recording.py    what is replayed: answers with what could have been proposed, timed rounds; and their files
    record.py       records both from an engine in this process
    world.py        what rounds take, fitted to the timed ones
    simulator.py    replays the answers with any policy; the planner's own code is one
    choices.py      what a round could propose, and the best of it for given promises: oracles, fixed shapes, a bandit
    predictor.py    how many tokens each shape promises, learned from what a policy could observe
    run.py          all policies in all settings: JSON and a table
"""
