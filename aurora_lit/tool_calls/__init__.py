"""Tool calls as text: how a model writes them, which the grammar guarantees, and how they are read again.

A model knows tools by its chat template. Four formats are known: Hermes' (Qwen and many others), Mistral's, Llama 3's,
and plain JSON for models whose template has no tools. Answers are text until they reach the HTTP process; the engine
does not know of tools.

May import: errors.py, request.py, grammars/. Start with formats.py. The files, each importing only those above it:

    formats.py  the four formats, told by the chat template; tools in the prompt of a model whose template has none
    grammar.py  the grammar of an answer that must call tools, or whose calls must be valid
    parser.py   an answer's text, as it arrives → content and calls
"""
