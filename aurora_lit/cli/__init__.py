"""The command line: options, and the commands that have no other home.

May import: everything else in the package except replay.py and __main__.py. Imports of models happen inside commands.

Start with main.py. The files, each importing only files above it:

    options.py      what all commands share: settings, file options, errors on one line
    status.py       `status`: what a running server and its learner are doing
    drafts.py       `drafts`: published versions with their scores; rolling back and promoting
    generate.py     `generate`: one answer in the terminal, with accepted tokens and the target's own coloured
    footprint.py    how much memory a deployment needs, computed from its model's configuration
    checks.py       the checks of `doctor`, one function for each line of the report
    doctor.py       `doctor`: whether this machine can serve, what to do if not, and the memory table
    vllm.py         `vllm`: vLLM's server with a learner beside it
    replay.py       `replay`: learning from recorded traces, and the report
    bench.py        the options of `bench ...`
    main.py         the options of all other commands
"""
