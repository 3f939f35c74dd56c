"""Draft checkpoints on disk: the EAGLE-3 layout, published versions, export, a first draft.

May import: modules/draft/, models/, kernels/. Start with checkpoint.py. The files, each importing only those above it:

    checkpoint.py  draft checkpoints in EAGLE-3's layout: written whole, checked when read
    versions.py    the versions of a deployment: published, current, taken back, pruned; whole after any crash
    initial.py     a draft's beginning: vocabulary from counts, weights from the target's last layer
    export.py      a draft as vLLM and SGLang load it
"""
