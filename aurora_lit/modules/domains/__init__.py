"""Kinds of traffic: clusters of prompts, shifts between them, and the learning rate that follows.

May import: traces/, modules/losses/batch.py. Start with detector.py. The files, each importing only those above it:

    clusters.py     online k-means with novelty and a cap
    shifts.py       Page–Hinkley on the mix of domains and on acceptance in each
    detector.py     which domain a request belongs to, and when traffic shifts
    lr_schedule.py  the domain-aware learning rate, and what else its heat asks for
    controller.py   how learning answers to domains: heat, rate, exploration, replay
"""
