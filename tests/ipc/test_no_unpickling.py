"""Nothing in the package unpickles: what crosses a process or a disk is safetensors, msgpack or plain bytes.

Tested on the syntax tree, so that comments and docstrings may name what is forbidden.
"""

from __future__ import annotations

import ast

from support import ROOT

PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_COLLECTIVES = {  # torch.distributed, which pickles what these take
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
ALLOWED_NAMES = {"UnpicklingError"}
"""Raised by torch.load(weights_only=True) for damaged files; catching it unpickles nothing."""


def violations(source: str) -> list[str]:
    """Every place in a source that pickles or unpickles, or might."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            modules = {alias.name.partition(".")[0] for alias in node.names}
            names = sorted(modules & (PICKLING_MODULES - {"pickle"}))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLING_MODULES:
            names = [f"from {node.module} import {a.name}" for a in node.names if a.name not in ALLOWED_NAMES]
        elif isinstance(node, ast.Attribute):
            of_pickle = isinstance(node.value, ast.Name) and node.value.id == "pickle"
            if of_pickle and node.attr not in ALLOWED_NAMES or node.attr in PICKLING_COLLECTIVES:
                names = [ast.unparse(node)]
        elif isinstance(node, ast.Name) and node.id in PICKLING_COLLECTIVES:
            names = [node.id]
        elif isinstance(node, ast.Call):
            said = [option for option in node.keywords if option.arg in ("weights_only", "allow_pickle")]
            options = {option.arg: ast.unparse(option.value) for option in said}
            default = "False" if ast.unparse(node.func) == "torch.load" else "True"
            loads_weights_only = options.get("weights_only", default) == "True"
            if not loads_weights_only or options.get("allow_pickle", "False") != "False":
                names = [ast.unparse(node)]
        found += [f"line {getattr(node, 'lineno', 0)}: {name}" for name in names]
    return found


def test_the_package_unpickles_nothing() -> None:
    package = ROOT / "aurora_lit"
    found = [
        f"{path.relative_to(ROOT)} {violation}"
        for path in sorted(package.rglob("*.py"))
        for violation in violations(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_the_test_sees_every_form() -> None:
    for source, is_clean in (
        ("import pickle\nx = pickle.loads(b'')", False),
        ("import pickle\ntry: f()\nexcept pickle.UnpicklingError: pass", True),
        ("from pickle import loads", False),
        ("from pickle import UnpicklingError", True),
        ("import cloudpickle", False),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=flag)", False),
        ("torch.load(path, map_location='cpu', weights_only=True)", True),
        ("fabric.load(path, weights_only=False)", False),
        ("safetensors.torch.load(data)", True),
        ("numpy.load(path, allow_pickle=True)", False),
        ("dist.broadcast_object_list(x, src=0)", False),
        ("from torch.distributed import broadcast_object_list\nbroadcast_object_list(x)", False),
        ("dist.broadcast(x, src=0)", True),
        ('"""Never pickle.loads(x)."""', True),
    ):
        assert (violations(source) == []) == is_clean, source
