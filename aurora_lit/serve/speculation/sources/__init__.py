"""The sources of proposals: what a grammar forces, what is copied, and what the draft proposes.

Each source's `candidates` gives tokens as trees and how probable each is; its `observe` is told what became of them.
Which of them are proposed, by what their columns cost, is decided in serve/speculation/weigh.py and for the draft's in
its native steps. N-grams of the request itself and the traffic memory are searched by one native look-up, so ngram.py
asks for both, and memory.py says who may read what.

May import: costs.py and weigh.py of serve/speculation/, the records of serve/engine/, and what stands above them.
Start with draft.py. The files, each importing only those above it:

    grammar.py        rows of outputs with a grammar: what it allows and what it forces
    kept_answers.py   the answers that are kept on disk, and read again after a restart
    memory.py         what earlier requests were answered, by who may read it
    ngram.py          what followed the last tokens before, in the request itself and in the memory
    runtime_draft.py  a draft prepared for this machine: weights packed, native calls set up, outputs checked
    drafter.py        drafting for a batch: the draft's KV cache, and chains of proposals
    draft_rates.py    how often what the draft proposes is accepted
    draft.py          what the draft proposes in a round, and the reading of prompts that it takes
"""
