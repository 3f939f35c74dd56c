"""Kinds of traffic: clusters of prompts, shifts between them, and the learning rate that follows them.

A domain is described by its label, which a client gave, or by a number ("auto-3").

May import: traces/, modules/losses/batch.py. Start with detector.py. The files, each importing only those above it:

    centroids.py    a prompt's embedding, clusters at one moment, and DomainAssigner, which assigns while serving
    clusters.py     online k-means over embeddings, with a maximum number of clusters
    shifts.py       tests on the mix of domains and on the acceptance rate of each
    detector.py     which domain a request belongs to, and when traffic shifts
    lr_schedule.py  the domain-aware learning rate, which depends on heat
    controller.py   how learning responds to domains: heat, learning rate
"""
