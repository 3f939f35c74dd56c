"""Structured outputs: the grammar that a client asked for, and the tokens that it allows at each place of an output.

Grammars are those of the library llguidance: JSON schemas, regular expressions, lists of choices, and context-free
grammars in its Lark dialect or in GBNF.

May import: errors.py, request.py. Start with matcher.py. The files, each importing only those above it:

    endless.py     where a schema requires itself without end, so that no answer can follow it
    definition.py  what a client asked for, as a grammar for llguidance; errors, with the place in the schema
    matcher.py     an output's place in its grammar: allowed tokens, forced tokens; compiled beside the engine's rounds
"""
