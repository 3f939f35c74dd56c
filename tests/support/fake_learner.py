"""A learner's process without learning: python fake_learner.py RUN_FOLDER PARENT_PID BEHAVIOUR.

Behaviours: "lives" (writes heartbeats until SIGTERM, then leaves regularly), "stalls" (attaches, and its heartbeat
stops), "dies" (attaches and ends with exit code 3), "absent" (ends with exit code 1 before it attaches).
"""

import os
import signal
import sys
import time
from pathlib import Path

from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.ipc.process_lifetime import die_with_parent


def main(run_folder: str, parent: str, behaviour: str) -> None:
    die_with_parent(int(parent))
    if behaviour == "absent":
        sys.exit(1)
    page = LearnerStatusPage.open(Path(run_folder) / LEARNER_STATUS_NAME, writable=True)
    page.write(pid=os.getpid(), started_ns=time.monotonic_ns(), activity="pretending", error="")
    page.beat()
    if behaviour == "dies":
        time.sleep(0.2)
        sys.exit(3)
    if behaviour == "stalls":
        page.write(heartbeat_ns=time.monotonic_ns() - int(60e9))
        signal.pause()
    signal.signal(signal.SIGTERM, lambda *_: leave(page))
    while True:
        page.write(steps=page.read().steps + 1)
        page.beat()
        time.sleep(0.05)


def leave(page: LearnerStatusPage) -> None:
    page.write(pid=0)
    sys.exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
