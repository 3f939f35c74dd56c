"""Export the current draft for vLLM and SGLang: python examples/export_draft.py OUT [OPTION ...].

More arguments go to `aurora-lit export`, for example `--version 7` or `checkpoint.dir=elsewhere`.
"""

import json
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

out, *options = sys.argv[1:]
subprocess.run([sys.executable, "-m", "aurora_lit", "export", "--out", out, *options], check=True)

config = json.loads((Path(out) / "config.json").read_text())
print(config["architectures"][0], "reads the target's layers", config["eagle_aux_hidden_state_layer_ids"])
with safe_open(Path(out) / "model.safetensors", "pt") as weights:
    for name in weights.keys():  # noqa: SIM118 (not a dictionary)
        print(f"{name:45} {weights.get_slice(name).get_shape()}")
speculation = {"method": "eagle3", "model": out, "num_speculative_tokens": 3}
print(f"vllm serve TARGET --speculative-config '{json.dumps(speculation)}'")
