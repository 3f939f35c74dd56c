"""The benchmark that measures on one recorded stream what the memory, the learner and each part of it contribute.

May import: everything above.

Start with run.py. The files, each importing only files above it:

    arms.py         what can be compared, and the settings that each changes
    phases.py       which requests a seed takes, in which order its phases come, whether they are long enough
    statistics.py   accepted length, acceptance rate, modelled speed-up and intervals, from histograms
    result.py       the result of one arm with one seed, and its file
    tables.py       the report as tables
    report.py       all results together: JSON, tables, plot
    run.py          runs the arms
"""
