"""State of running sequences: tokens, slots, n-gram index, text, and what an observer is told.

May import: modules/sampling/, traces/. Start with sequence.py. The files, each importing only those above it:

    detokenizer.py     token ids → text as they come: whole characters, stop strings
    ngram_index.py     proposals copied from earlier in the request
    sequence.py        what the engine keeps of a running request; its counters
    observer.py        what is told to whoever watches the rounds
    slot_allocator.py  which slots are free, what each still holds of a prompt
"""
