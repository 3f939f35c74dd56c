"""A server under faults, beside mixed clients: what must hold whatever happens, and what must be found nowhere.

python -m benchmarks.soak --minutes 10 --seed 0      faults; --minutes 100 for sixty of them
python -m benchmarks.soak.hostile                    seven streams beside one attack after another
python -m benchmarks.soak.poisoning                  one hostile client of eight beside what the others learn
python -m benchmarks.soak.canary                     what `store: false` leaves, and where

server.py    a server that is started again when it ends, in mounts of its own
clients.py   eight clients, and the answers that they must get
attacks.py   requests meant to harm, sent by a process of their own
faults.py    what is done to the server, in an order drawn by a seed
canary.py    a text that must not be found: where it is looked for, as text and as token ids
watch.py     readings of a server while it runs, and the invariants
__main__.py  the run
hostile.py   gaps of streams beside attacks
poisoning.py tokens a round of seven clients beside a hostile eighth
"""
