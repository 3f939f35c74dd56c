"""How the draft is trained.

data/ makes batches of traces, online/ learns beside a server, offline/ from recorded traces, pretrain/ makes a first
draft. Each sub-folder lists its files; training_precision.py says in which numbers all of them compute.
"""
