"""The commands.

May import: everything above. Start with main.py. The files, each importing only those above it:

    status.py     what a running server and its learner say of themselves
    drafts.py     versions with their scores; going back to one, forcing one
    generate.py   one answer in the terminal, tokens coloured by where they came from
    footprint.py  what memory a deployment needs, from its model's measures alone; the smallest set of GPUs
    checks.py     what doctor looks at, a function a line
    doctor.py     can this machine serve, and what is to be done if not: the report
    options.py    what all commands share: settings, one-line errors
    live.py       commands beside a running server: learn, status, drafts, export
    replay.py     the learner over recorded traces: the command, and the script for several processes
    main.py       the command line; no work of its own
"""
