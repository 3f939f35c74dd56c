"""Train the draft on recorded traces, without a server: python examples/replay_traces.py TRACES OUT [OPTION ...].

A server records them with `aurora-lit serve trace.record=TRACES`. More arguments go to `aurora-lit replay`. This runs
in one process; in two: `fabric run --devices 2 --accelerator cpu --strategy ddp aurora_lit/replay.py -- ...`.
"""

import json
import subprocess
import sys
from pathlib import Path

traces, out, *options = sys.argv[1:]
config = Path(__file__).parents[1] / "configs" / "replay.yaml"
command = [sys.executable, "-m", "aurora_lit", "replay", "--config", str(config), "--traces", traces, "--out", out]
subprocess.run([*command, *options], check=True)

report = json.loads((Path(out) / "replay.json").read_text())
print(f"{report['traces']} traces, {report['steps']} optimiser steps, {report['published']} drafts passed the gate")
for arm in ("static", "learning"):
    print(f"{arm:8} draft: {report['all'][arm]['accepted_length']:.3f} tokens a round")
