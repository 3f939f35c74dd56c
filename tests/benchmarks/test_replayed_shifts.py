"""Embedded prompts are kept, and used again only if they are the same mean."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_lit.errors import AuroraError
from benchmarks import shifts


def embed(cache: Path) -> dict[str, torch.Tensor]:
    return shifts.embed([], cache=cache, limit=2, max_tokens=9, overrides=[])


def test_prompts_are_embedded_once_and_those_of_another_mean_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, computed = tmp_path / "embedded.safetensors", list[int]()

    def forward(ids_BT: torch.Tensor) -> tuple[torch.Tensor, None]:
        computed.append(int(ids_BT[0, 0]))
        return ids_BT[..., None].expand(-1, -1, 6).float(), None

    prompts = [SimpleNamespace(domain="chat", token_ids=[number] * 5) for number in (1, 2)]
    monkeypatch.setattr(shifts, "_SAVE_EVERY_PROMPTS", 1)
    monkeypatch.setattr(shifts, "load_prompts", lambda *_, **__: prompts)
    monkeypatch.setattr(shifts, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(shifts, "load_target", lambda _: SimpleNamespace(forward_uncached=forward))
    threads = torch.get_num_threads()
    try:
        for number in range(1, 5):
            kinds = embed(cache)
            assert computed == [1, 2, *range(11, 10 + number)]
            torch.testing.assert_close(kinds.pop("chat")[:, 0], torch.tensor([1.0, 2.0]), rtol=0.01, atol=0)
            assert len(kinds) == number - 1
            prompts.append(SimpleNamespace(domain=f"another kind {number}", token_ids=[10 + number] * 5))
        save_file(load_file(cache), cache)  # as before caches said which mean they hold
        with pytest.raises(AuroraError, match=r"--cache .*embedded\.safetensors.* delete it"):
            embed(cache)
    finally:
        torch.set_num_threads(threads)
