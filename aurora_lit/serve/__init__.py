"""Serving: the processes of a server, from start to shutdown. Never imports learning.

The sub-packages hold what these processes run: the HTTP process (http/), the engine worker (worker/), and the engine
itself (engine/, speculation/, sequences/).

May import: its sub-packages and all above. Start with server.py. The files, each importing only those above it:

    ranks.py          what the further ranks of a sharded target run, and the watch over the engine's processes
    learner_child.py  the server's own learner: started, restarted after faults, ended
    api.py            our LitAPI: the worker's setup, and the API key
    server.py         the server's processes, started, watched and ended in order
"""
