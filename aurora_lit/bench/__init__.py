"""What `aurora-lit bench` runs on prompts of your own.

May import: everything above. Start with throughput.py. The files, each importing only those above it:

    prompts.py          runs prompts through an engine and notes every round
    plot_throughput.py  the picture of a throughput benchmark
    reference.py        transformers' own generate, to compare with
    throughput.py       tokens a second: plain against the draft, interleaved
    acceptance.py       accepted length and acceptance by position and domain
    plot_online.py      the picture of an online benchmark
    stream_plan.py      a stream of changing traffic: read, checked, planned
    stream.py           a stream answered once by the target, kept as traces
    shifts.py           how soon the detector notices a stream's phases, and how often it is wrong
    online.py           real servers: a draft that learns against one that does not
"""
