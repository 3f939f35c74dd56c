"""A learner beside an unpatched vLLM: traces out of its engine, published drafts into it.

vLLM is imported only inside functions that run in its processes. Nothing here does anything unless the variable
AURORA_LIT_VLLM names a run folder; `aurora-lit vllm` (cli/vllm.py) starts vLLM so. What vLLM does is changed nowhere:
three methods of one object are wrapped (hooks.py), after its version was checked (runners.py). docs/vllm.md
says how to use it.

May import: traces/, ipc/, drafts/, errors.py, request.py, settings.py, torch and the standard library; and vLLM, inside
functions. Start with hooks.py. The files, each importing only those above it:

    deployment.py       what vLLM's processes must know, in the run folder; the environment variable
    capture.py          steps of the engine to traces
    runners.py          reads what vLLM's two model runners hold, after checking that they are as it knows them
    device_transfer.py  a step's rows to the CPU: copied at once, sent on a stream of their own
    hooks.py            the wraps around a runner's methods
    reload.py           other weights into the running draft
    live_status.py      counters on the status page, and trials of new drafts
    worker.py           the methods that vLLM's workers get
    follower.py         validates published drafts, and has all ranks swap them in
    middleware.py       consent and labels of requests; starts the follower
"""
