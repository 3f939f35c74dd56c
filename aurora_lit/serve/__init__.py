"""Serving: HTTP process, engine worker, and further processes that share the target. Never imports learning.

May import: its sub-packages and all above. Start with server.py. The files, each importing only those above it:

    ranks.py          the life of those processes, and the watch over all that the engine needs
    learner_child.py  the server's own learner: started, kept up, ended
    api.py            our one LitAPI and one LitSpec: all routes, authorisation, the worker's setup
    server.py         the server's processes, started and ended in order
"""
