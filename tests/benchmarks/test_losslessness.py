"""The cached reference of the benchmark of losslessness belongs to one model."""

from __future__ import annotations

from pathlib import Path

from support.tiny_models import save_model

from aurora_lit.config import load_config
from benchmarks.losslessness import _transformers_reference


def test_the_reference_of_another_model_is_not_taken(tmp_path: Path) -> None:
    """Two sizes of a model share a tokenizer, so their prompts are the same ids."""
    prompts, cache = [[1, 2, 3], [4, 5]], tmp_path / "reference.json"

    def reference(name: str, path: Path = cache) -> list[list[int]]:
        config = load_config(None, [f"target.source={tmp_path / name}", "target.precision=fp32"])
        return _transformers_reference(config, prompts, frozenset({0}), 8, path)

    for seed, name in enumerate(("one", "other")):
        save_model("llama", tmp_path / name, seed=seed)
    first = reference("one")
    assert reference("other") == reference("other", tmp_path / "own.json") != first
    kept = cache.read_text()
    assert reference("one") == first
    assert cache.read_text() == kept
