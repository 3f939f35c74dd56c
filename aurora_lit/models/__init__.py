"""The target: where its files come from, its layers, its key-value cache, and how several processes share it.

May import: kernels/, modules/draft/, distributed.py. Start with target.py. The files, each importing only those above it:

    package_index.py   a file out of wheels of the package index, whole or in parts: fetched, checked
    wheel.py           a GGUF file from there, converted once
    source.py          target.source → a local folder: folder, hub, or wheel
    slots.py           the key-value cache: a slot a request, and attention over it
    attention.py       that attention as transformers' attention interface calls it
    fused_layers.py    a model's own layers as that one call, where they are of the plain Llama form
    layers.py          where a model's decoder layers are, and which three of them a draft reads
    target.py          any causal language model, read at three layers
    shard_reader.py    which part of a weight is whose, and reading just that part from the files
    partition.py       a model cut for one rank: by heads and columns, or by FSDP2; the vocabulary spread
    sharded_target.py  a target in several processes behind the interface of one
"""
