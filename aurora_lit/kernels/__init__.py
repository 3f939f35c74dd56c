"""Native code for the CPU (C++ in csrc/) and the modules that call it; without a compiler, callers use torch instead.

The shared library is compiled on first use and kept in `$AURORA_LIT_CACHE/kernels` (default
`~/.cache/aurora-lit/kernels`).

May import: request.py. Start with native.py. The files, each importing only those above it:

    weight_format.py   the formats in which a packed linear layer stores its weight
    quantization.py    weights quantised to integers and scales, and back
    huge_pages.py      tensors on huge pages: weights, keys and values
    build.py           compiles the kernels and caches the shared library
    native.py          loads the kernels, says what they can do here, and calls attention
    matmul.py        packs weights, and multiplies by packed ones
    sampler.py         sampling: tokens from stored logits, Gumbel noise
    suffix_index.py    copies: what followed a sequence's last tokens before, in itself or in a memory of others
    copy_rates.py      how often copies were accepted, by what is known about them
    packed_linear.py   linear layers with packed weights, which replace a model's own
    decoder.py         all decoder layers of a forward pass in one native call
    target_pass.py     a round's pass of the target in one native call: embeddings, layers, its own tokens
    draft_steps.py     a draft's proposals, chains and what stands beside them, in one native call
    lk_loss.py         the LK loss and its gradient in one pass; for learning only
"""
