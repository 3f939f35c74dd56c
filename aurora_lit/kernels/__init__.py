"""Native code for the CPU (C++ in csrc/) and the modules that call it; without a compiler torch does the same.

May import: nothing of the package. Start with native.py. The files, each importing only those above it:

    group_quantization.py  weights of four and eight bits: quantised, and laid out as groups.hpp reads them
    row_quantization.py    weights of eight bits with a scale an output: for drafts, and to bound a head's outputs
    huge_pages.py          tensors on huge pages: weights, keys and values
    native.py              builds, loads and calls the CPU kernels: skinny.cpp and the headers beside it
    packed_linear.py       linear layers over packed weights, swapped in for a model's own
    decoder.py             whole decoder layers in one native call
    draft_steps.py         a draft's proposals, chains and trees, a native call a level
    lk_loss.py             the LK loss and its gradient in one pass; learning only
"""
