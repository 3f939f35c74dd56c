"""The engine: it runs one round after another over a fixed number of slots.

A round admits waiting requests, plans what is proposed and which prompt chunks are computed beside it, runs one pass of
the target over all of that, judges the proposals and commits. The engine knows token ids only; text and HTTP are
elsewhere.

May import: serve/speculation/ and above. Start with engine.py. The first two files hold the records that
serve/speculation/ shares, and import only what stands above it. The files, each importing only those above it:

    sequence.py        RunningSequence
    round_plan.py      RoundPlan: the rows of a round, what is proposed, and which proposals are accepted
    prefix_cache.py    copies prefixes from slots, and keeps those whose slots other requests take
    slot_allocator.py  how large slots are, which are free, and where a prefix of a prompt already is
    thread_budget.py   how many threads rounds use, while the learner or other processes compute
    trace_recorder.py  records rounds as traces: hidden states by slot, notes of the rounds, segments
    token_choice.py    the target's own token at every column of a round
    target_runner.py   forward passes of the target over the slots, and storing what they computed
    commit.py          a round's new tokens become part of their sequences
    waiting_queue.py   requests without a slot; those with a grammar wait until it is compiled
    prefill.py         computes prompts, a chunk per round; prefixes that are elsewhere are copied
    engine.py          Engine.round, the central step
"""
