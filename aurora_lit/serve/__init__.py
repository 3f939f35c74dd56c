"""Serving: the processes of a server, from start to shutdown. Never imports learning.

The sub-packages hold what these processes run: the HTTP process (http/), the engine worker (worker/), and the engine
itself (engine/, speculation/).

May import: its sub-packages and all above. Start with server.py. The files, each importing only those above it:

    ranks.py           what the further ranks of a sharded target run, and the watch over the engine's processes
    learner_child.py   the server's own learner: started, restarted after faults, ended
    backend.py         what a server runs on: functions for each process, which import what they need when called
    engine_process.py  what an engine process runs, from its start on
    api.py             our LitServer and LitAPI: the HTTP process, and the API key
    server.py          the server's processes, started, watched and ended in order
"""
