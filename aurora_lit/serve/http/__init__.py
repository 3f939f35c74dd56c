"""The HTTP process: routes, request bodies, responses, errors, metrics and status.

It has no model and no engine: it checks and tokenizes a request, sends it to the engine worker as a call, makes text of
the updates of that call, and OpenAI's responses of the text.

May import: models/tokenizer.py, tool_calls/, ipc/. Start with routes.py. The files, each importing only those above it:

    detokenizer.py    token ids → text as they arrive: whole characters only, cut before stop strings
    answer_stream.py  a call's deltas → text, each choice cut where a stop string is completed
    metrics.py        the metrics of GET /metrics
    body.py           what all request bodies share
    structured_fields.py  their fields for structured outputs
    tool_fields.py    their fields for tools, calls and results
    message_fields.py  their fields for a conversation: messages, and how the prompt is rendered
    prediction.py     the field for a predicted answer, and how much of it was right
    llama_cpp_fields.py  the fields of llama.cpp's server
    fim_prompt.py     the prompt of a hole in a file: its parts in their order, and what is cut
    schema.py         request bodies: every field and its range; no field is silently ignored
    fim_schema.py     the bodies of the routes that fill holes only
    structure_check.py  whether a grammar can be used with the tokenizer
    tool_use.py       what tools mean for a request's prompt, grammar and answer
    tokenize.py       checked body → Call: chat template, tokens, limits
    stream_events.py  chunks → server-sent events, filled up to a fixed size; the clock that sends them
    choices.py        what deltas with text make of a choice: log-probabilities, tool calls, counts
    responses.py      OpenAI's responses: of a chat and of a text completion, whole and in chunks
    infill_response.py  llama.cpp's response to POST /infill
    request_ids.py    x-request-id: a request's name in its response and in the log
    errors.py         every error as OpenAI's error body
    connection.py     how large a request's head may be, and how long head, body and reader may take
    bodies.py         how large a body may be, and how many lists and objects it may have
    channel.py        the sockets to the engine worker, as LitServe's transport and request queue
    worker_client.py  a call in the HTTP process: sent, awaited, cancelled
    routes.py         the four routes that generate
    token_routes.py   POST /tokenize and /detokenize
    savings.py        the time that speculation has saved, today and in all
    status.py         the status pages as JSON
    history.py        what the live page shows of the past
    live_page.py      the live page: its files (static/), and what it shows as server-sent events
    spec.py           our LitSpec: registers all routes, answers the GET routes
"""
