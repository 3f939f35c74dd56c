"""From traces to training batches.

A reservoir remembers past traffic, and batches mix live and remembered traces. Which traces are kept out of training,
and when to take a step, is decided in learn/online/.

May import: traces/, modules/, models/. Start with online_batcher.py. The files, each importing only those above it:

    collate.py         pad traces together, live and replayed ones; group sequences of similar length
    log_batches.py     batches from a trace log, for pretraining
    target_head.py     the target without its layers: embedding and head
    trace_parts.py     what of a trace is trained on, and parts of traces
    reservoir.py       a bounded random sample of past traffic, by domain
    online_batcher.py  chooses the traces of a batch: live traffic mixed with replay
    training_state.py  the state of a training as safetensors bytes, and as a file
"""
