"""The HTTP process: routes, request bodies, answers, errors, metrics, status.

May import: serve/sequences/detokenizer.py, ipc/. Start with routes.py. The files, each importing only those above it:

    metrics.py        what GET /metrics shows
    schema.py         request bodies: every field, its range, nothing silently dropped
    client_names.py   who a client is, as traces say it: a hash
    tokenize.py       checked body → Call: chat template, tokens, limits
    logprobs.py       log-probabilities in OpenAI's two shapes
    responses.py      deltas → OpenAI's answers
    errors.py         every error as OpenAI's error body
    worker_client.py  a call seen from the HTTP process: send, wait, cancel
    routes.py         the two POST routes
    status.py         the shared pages as JSON
"""
