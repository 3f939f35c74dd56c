"""The benchmark that compares learners on one recorded stream, to measure what each part of learning contributes.

May import: everything above.

Start with run.py. The files, each importing only files above it:

    arms.py         the learners that can be compared, and the settings that each changes
    statistics.py   accepted length, acceptance rates, modelled speed-up and intervals, from histograms
    result.py       the result of one arm with one seed, and its file
    report.py       all results together: JSON, tables, plot
    run.py          runs the arms
"""
