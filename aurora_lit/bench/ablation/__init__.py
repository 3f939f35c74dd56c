"""Several learners on one recorded stream: what each part of learning is worth.

May import: bench/ and above. Start with run.py. The files, each importing only those above it:

    arms.py     the learners of an ablation, and what each leaves out
    tallies.py  accepted length, acceptance, speed-up and their intervals, from counts of rounds
    plot.py     the picture of an ablation
    result.py   what one arm was worth with one seed: record and file
    report.py   what the arms come to: JSON, tables
    run.py      several learners on one recorded stream
"""
