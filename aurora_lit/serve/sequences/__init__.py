"""State of the sequences that the engine runs: tokens, slots, and the records an observer gets.

A sequence is a request that holds a slot. The files here keep state and answer questions about it; nothing here runs a
model or decides how many tokens to propose.

May import: kernels/, modules/sampling/, traces/, settings.py, request.py. Start with sequence.py. The files,
each importing only those above it:

    memory_scope.py    what of the traffic memory a request may read and write
    sequence.py        RunningSequence, the engine's counters
    round_plan.py      RoundPlan: the rows of a round, what is proposed, and which proposals are accepted
    observer.py        RoundObserver: what the engine reports about its rounds, for recording traces
    slot_allocator.py  which slots are free, and which prefix of a prompt each slot already holds
"""
