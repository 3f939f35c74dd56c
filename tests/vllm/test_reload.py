"""Weights of a published draft reach the running draft through vLLM's loaders, and never change the target."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aurora_lit.drafts.checkpoint import WEIGHTS_NAME
from aurora_lit.errors import AuroraError
from aurora_lit.vllm.reload import check_weights_are_own, load_into


class MadeModel(nn.Module):
    """A target, or a draft: an embedding, a layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(3, 2)
        self.fc = nn.Linear(2, 2, bias=False)
        self.lm_head = nn.Linear(2, 3, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """As vllm/model_executor/models/llama_eagle3.py: a draft of the whole vocabulary has no parameter for a map."""
        for stored, tensor in weights:
            if "t2d" in stored:
                continue
            name = stored.replace("d2t", "draft_id_to_target_id")
            if name not in dict(self.named_parameters()):
                raise ValueError(f"There is no module or parameter named {name!r} in MadeModel")
            self.get_parameter(name).weight_loader(tensor)  # type: ignore[attr-defined]


@dataclass
class Info:
    """As vLLM's LayerReloadingInfo."""

    kernel_tensors: dict[str, nn.Parameter] = field(default_factory=dict)
    load_numel: int = 0
    load_numel_total: int | None = None
    loaded_weights: list[tuple[str, Tensor]] = field(default_factory=list)


class MadeReload:
    """As vllm.model_executor.model_loader.reload: a layer is computed anew when all its weights are there."""

    def __init__(self) -> None:
        self.infos: dict[nn.Module, Info] = {}
        self.failing: list[str] = []
        """The layers at which loads fail, one a load."""

    def get_layerwise_info(self, layer: nn.Module) -> Info:
        """Of a layer."""
        return self.infos.setdefault(layer, Info())

    def initialize_layerwise_reload(self, model: nn.Module) -> None:
        """Set the tensors of all layers aside."""
        for path, layer in model.named_modules():
            info = self.get_layerwise_info(layer)
            info.kernel_tensors = dict(layer.named_parameters(recurse=False))
            info.load_numel_total = sum(each.numel() for each in info.kernel_tensors.values())
            for name, parameter in info.kernel_tensors.items():
                on_meta: Any = nn.Parameter(parameter.to("meta"))
                on_meta.weight_loader = self._loader(layer, path, name)
                layer.register_parameter(name, on_meta)

    def finalize_layerwise_reload(self, model: nn.Module, config: Any) -> None:
        """Give layers of which nothing was loaded their tensors back; what others had is forgotten."""
        for layer in model.modules():
            info = self.get_layerwise_info(layer)
            if info.load_numel_total is not None and info.load_numel == 0:
                self._place(layer)
            self.infos[layer] = Info()

    def _loader(self, layer: nn.Module, path: str, name: str) -> Callable[[Tensor], None]:
        def load(tensor: Tensor) -> None:
            info = self.get_layerwise_info(layer)
            info.loaded_weights.append((name, tensor))
            info.load_numel += tensor.numel()
            if info.load_numel == info.load_numel_total:
                if self.failing[:1] == [path]:
                    self.failing.pop(0)
                    raise RuntimeError(f"no memory for {path}")
                for loaded, weight in info.loaded_weights:
                    info.kernel_tensors[loaded].copy_(weight)
                self._place(layer)
                self.infos[layer] = Info()

        return load

    def _place(self, layer: nn.Module) -> None:
        for name, parameter in self.get_layerwise_info(layer).kernel_tensors.items():
            layer.register_parameter(name, parameter)


@pytest.fixture
def made_reload(monkeypatch: pytest.MonkeyPatch) -> MadeReload:
    """In place of vLLM's modules."""
    made = MadeReload()
    config, reload, layerwise = (ModuleType(name) for name in ("config", "reload", "layerwise"))
    config.__dict__["set_current_vllm_config"] = lambda _: contextlib.nullcontext()
    reload.__dict__.update(
        initialize_layerwise_reload=made.initialize_layerwise_reload,
        finalize_layerwise_reload=made.finalize_layerwise_reload,
    )
    layerwise.__dict__["get_layerwise_info"] = made.get_layerwise_info
    for name, module in {
        "vllm": ModuleType("vllm"),
        "vllm.config": config,
        "vllm.model_executor": ModuleType("model_executor"),
        "vllm.model_executor.model_loader": ModuleType("model_loader"),
        "vllm.model_executor.model_loader.reload": reload,
        "vllm.model_executor.model_loader.reload.layerwise": layerwise,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def runner_of(target: nn.Module, draft: nn.Module) -> Any:
    return SimpleNamespace(
        get_model=lambda: target,
        get_draft_model=lambda: draft,
        device="cpu",
        vllm_config=SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=None)),
    )


def published(folder: Path, value: float) -> Path:
    """A draft of which every weight has this value, with an embedding, as drafts of other origin have it."""
    folder.mkdir()
    weights = {name: torch.full_like(each, value) for name, each in MadeModel().state_dict().items()}
    save_file(weights, folder / WEIGHTS_NAME)
    return folder


def values(model: nn.Module) -> dict[str, set[float]]:
    return {name: set(each.flatten().tolist()) for name, each in model.state_dict().items()}


@pytest.mark.usefixtures("made_reload")
def test_a_draft_is_loaded_without_its_embedding_which_may_be_the_targets(tmp_path: Path) -> None:
    target, draft = MadeModel(), MadeModel()
    draft.embed_tokens = target.embed_tokens
    before = values(target)
    runner = runner_of(target, draft)
    check_weights_are_own(runner)
    load_into(runner, published(tmp_path / "draft", 5.0), last_good=tmp_path)
    assert values(draft)["fc.weight"] == values(draft)["lm_head.weight"] == {5.0}
    assert values(target) == before


@pytest.mark.usefixtures("made_reload")
def test_maps_of_a_whole_vocabulary_are_not_handed_to_vllm(tmp_path: Path) -> None:
    """Versions of before have them."""
    draft, folder = MadeModel(), published(tmp_path / "draft", 5.0)
    maps = {"d2t": torch.zeros(3, dtype=torch.int64), "t2d": torch.ones(3, dtype=torch.bool)}
    save_file(load_file(folder / WEIGHTS_NAME) | maps, folder / WEIGHTS_NAME)
    load_into(runner_of(MadeModel(), draft), folder, last_good=folder)
    assert values(draft)["fc.weight"] == {5.0}


def test_a_head_that_is_the_targets_is_refused_though_it_is_the_embedding_too() -> None:
    target, draft = MadeModel(), MadeModel()
    draft.embed_tokens, draft.lm_head = target.embed_tokens, target.lm_head
    with pytest.raises(AuroraError, match=r"^lm_head\.weight of the draft is the target's own"):
        check_weights_are_own(runner_of(target, draft))
    target.lm_head.weight = target.embed_tokens.weight
    with pytest.raises(AuroraError, match=r"^lm_head\.weight of the draft is the target's own"):
        check_weights_are_own(runner_of(target, draft))


def test_weights_that_were_packed_away_are_not_taken_for_shared_ones() -> None:
    target, draft = MadeModel(), MadeModel()
    for model in (target, draft):  # as vLLM's CPU build leaves them
        model.fc.weight = nn.Parameter(torch.empty(0))
    check_weights_are_own(runner_of(target, draft))


def test_after_a_load_that_fails_half_way_the_draft_is_the_one_before(made_reload: MadeReload, tmp_path: Path) -> None:
    good, new, draft = published(tmp_path / "good", 1.0), published(tmp_path / "new", 5.0), MadeModel()
    runner = runner_of(MadeModel(), draft)
    for layer in ("fc", "lm_head"):
        made_reload.failing = [layer]
        with pytest.raises(RuntimeError, match=f"no memory for {layer}"):
            load_into(runner, new, last_good=good)
        assert values(draft)["fc.weight"] == values(draft)["lm_head.weight"] == {1.0}
    load_into(runner, new, last_good=good)
    assert values(draft)["fc.weight"] == values(draft)["lm_head.weight"] == {5.0}


def test_if_the_draft_before_cannot_be_loaded_either_every_layer_has_weights_and_the_error_says_it(
    made_reload: MadeReload, tmp_path: Path
) -> None:
    good, new, draft = published(tmp_path / "good", 1.0), published(tmp_path / "new", 5.0), MadeModel()
    runner = runner_of(MadeModel(), draft)
    load_into(runner, good, last_good=good)
    made_reload.failing = ["lm_head", "fc"]
    said = r"no memory for lm_head; good could not be loaded again either \(RuntimeError: no memory for fc\)"
    with pytest.raises(AuroraError, match=said):
        load_into(runner, new, last_good=good)
    assert not any(weight.is_meta for weight in draft.parameters())
    load_into(runner, good, last_good=good)
    assert values(draft)["fc.weight"] == values(draft)["lm_head.weight"] == {1.0}
