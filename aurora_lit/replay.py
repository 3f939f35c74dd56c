"""The script for `fabric run`: learns from recorded traces in several processes or on several devices.

    fabric run --devices 2 --accelerator cpu --strategy ddp aurora_lit/replay.py -- --config configs/replay.yaml

It takes the options of `aurora-lit replay` (cli/replay.py), which does the same in one process.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's folder first on sys.path, where another package's `import kernels` would find ours.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]

    from aurora_lit.cli.main import main

    main(["replay", *sys.argv[1:]], prog_name="replay.py")
