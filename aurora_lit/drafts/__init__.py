"""Draft checkpoints on disk: one checkpoint, the published versions of a deployment, export to other servers.

The learner publishes versions, the server loads the current one, the command line lists them and moves between them.
Beside the versions lie the domains that the learner has found.

May import: modules/draft/, centroids.py in modules/domains/, models/, kernels/, and the files of
the package's top up to distributed.py.

Start with checkpoint.py. The files, each importing only files above it:

    public_forms.py   EAGLE-3 checkpoints as SGLang, SpecForge and speculators write them
    checkpoint.py     one checkpoint in EAGLE-3's layout: written atomically, validated when read
    centroid_file.py  the learner's domains, by which the engine assigns requests
    versions.py       the published versions, read: current, all, the one before another
    store.py          the published versions, changed (DraftStore): publish, prune, roll back, promote
    hot_reload.py     loads and checks the version that CURRENT names, or refuses it
    evidence.py       how much speaks for a draft, or against it, after each request
    live_watch.py     the trial of a new draft on live traffic
    initial.py        an untrained draft: vocabulary from token counts, weights from the target's last layer
    export.py         a draft in the form that vLLM and SGLang load
"""
