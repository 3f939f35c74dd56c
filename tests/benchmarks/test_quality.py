"""The benchmark of quality: what it computes in chunks and windows, and that fp32 equals its reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.tiny_models import reference_model, save_model

from aurora_lit.errors import AuroraError
from aurora_lit.models.loading import load_target
from benchmarks.quality import make_reference, reader_of_target, score, table_of, windows_of


def test_windows_are_equally_many_of_each_text() -> None:
    texts = ["a" * 20, "b" * 30]
    ids_WT, of_W = windows_of(texts, lambda text: list(text.encode()), tokens=24, window=6)
    assert [bytes(row.tolist()) for row in ids_WT] == [b"a" * 6] * 2 + [b"b" * 6] * 2
    assert of_W.tolist() == [0, 0, 1, 1]
    with pytest.raises(AuroraError, match="text 1 has 20 of 24 tokens"):
        windows_of(texts, lambda text: list(text.encode()), tokens=48, window=6)


@pytest.mark.parametrize("as_prompt", [False, True])
def test_scores_are_those_of_whole_distributions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_prompt: bool
) -> None:
    monkeypatch.setattr("benchmarks.quality._CHUNK", 3)
    folder = save_model("llama", tmp_path / "model")
    model = reference_model(folder)
    ids_WT = torch.randint(0, model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    make_reference(folder, ids_WT, tmp_path / "reference.safetensors")
    with torch.no_grad():
        exact = model(ids_WT).logits[:, :-1].log_softmax(-1)
    losses_W = -exact.gather(2, ids_WT[:, 1:, None]).sum((1, 2)).double()

    target = load_target(folder, precision="fp32")
    same = score(reader_of_target(target, window=9, as_prompt=as_prompt), tmp_path / "reference.safetensors")
    torch.testing.assert_close(same.exact_losses_W, losses_W, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same.losses_W, losses_W, rtol=1e-4, atol=1e-4)
    assert float(same.divergences_W.abs().max()) < 1e-5
    assert same.same_W.tolist() == [8.0] * 3

    other = torch.randn(3, 9, exact.shape[-1], generator=torch.Generator().manual_seed(1))
    windows = iter(other)

    def read(ids_T: torch.Tensor):  # type: ignore[no-untyped-def]
        logits_TV = next(windows)
        return lambda chunk: logits_TV[chunk]

    found = score(read, tmp_path / "reference.safetensors")
    logp = other[:, :-1].log_softmax(-1)
    torch.testing.assert_close(
        found.losses_W, -logp.gather(2, ids_WT[:, 1:, None]).sum((1, 2)).double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        found.divergences_W, (exact.exp() * (exact - logp)).sum((1, 2)).double(), rtol=1e-4, atol=1e-4
    )
    assert found.same_W.tolist() == (exact.argmax(-1) == logp.argmax(-1)).sum(1).double().tolist()

    rows = table_of({"other": found}, [Path("a.txt"), Path("b.txt")], torch.tensor([0, 0, 1]), predicted=8)
    of_reference, of_other = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:])
    assert float(of_reference[2]) == pytest.approx(math.exp(float(losses_W[:2].mean()) / 8), rel=1e-4)
    ratio = math.exp(float((found.losses_W - found.exact_losses_W).mean()) / 8)
    assert float(of_other[4]) == pytest.approx(ratio, rel=1e-3)
