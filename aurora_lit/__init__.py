"""aurora_lit: an OpenAI-style server with lossless speculative decoding."""
