"""The script for `fabric run`: learning from recorded traces in several processes or on several devices.

    fabric run --devices 2 --accelerator cpu --strategy ddp aurora_lit/replay.py -- --config configs/replay.yaml

In one process it is `aurora-lit replay`, whose options it takes; the command is in cli/replay.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's own folder first on the path; there `import kernels` in other packages would find ours.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]

    from aurora_lit.cli.options import AuroraGroup
    from aurora_lit.cli.replay import replay

    group = AuroraGroup(commands={"replay": replay})
    group(["replay", *sys.argv[1:]], prog_name="replay.py")
