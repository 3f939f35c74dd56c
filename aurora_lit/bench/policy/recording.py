"""What the simulator replays, and its files: answers with what the draft could have proposed, timed rounds, settings.

Left out: making it (bench/policy/record.py) and replaying it (bench/policy/simulator.py).

Shapes: N positions of all answers, one after the other; G tree sizes; J levels; K nodes of the largest tree; H hidden.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from aurora_lit.errors import AuroraError
from aurora_lit.serve.speculation.costs import DraftShape
from aurora_lit.serve.speculation.planner import SpeculationLimits

_ANSWERS, _ROUNDS, SETTINGS_NAME = "answers.safetensors", "rounds-{}.json", "settings.json"


@dataclass(frozen=True, kw_only=True)
class RecordedAnswer:
    """One request. Proposals change no answer, so that this one is right for every policy."""

    domain: str
    prompt_ids: list[int]
    token_ids: list[int]
    first: int
    """Which of the N positions is the one before its first token."""
    noise_key: int


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The answers of a target at one temperature, and what the draft could have proposed at each of their positions."""

    answers: list[RecordedAnswer]
    temperature: float
    max_tokens: int
    tree_sizes: list[int]
    draft_tokens: int
    """Longest chain, and most levels of a tree."""
    copied_tokens: int
    chain_NJ: torch.Tensor
    """int32. The chain of most levels; shorter ones are its beginnings."""
    chain_outcome_NJ: torch.Tensor
    """fp32. `Drafted.outcome_JB`."""
    tree_NGJK: torch.Tensor
    """int32, padded by −1. The trees of one level, of two, …"""
    parent_NGJK: torch.Tensor
    """int8."""
    tree_outcome_NGJ: torch.Tensor
    """fp32. `Drafted.outcome_JB` of the deepest tree."""
    hidden_NH: torch.Tensor
    """fp16. The target's uppermost auxiliary hidden state at the last position that it has computed."""

    @property
    def limits(self) -> SpeculationLimits:
        """What the recorded engine allowed."""
        return SpeculationLimits(
            draft_tokens=self.draft_tokens, copied_tokens=self.copied_tokens, tree_sizes=tuple(self.tree_sizes)
        )

    def save(self, folder: Path) -> None:
        """Write it to a folder."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        meta = {name: value for name, value in vars(self).items() if name not in tensors}
        meta["answers"] = [asdict(answer) for answer in self.answers]
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / _ANSWERS, metadata={"recording": json.dumps(meta)})

    @staticmethod
    def load(folder: Path) -> Recording:
        """Read it. Raises AuroraError."""
        path = _existing(folder / _ANSWERS, "answers")
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["recording"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — no mapping
        meta["answers"] = [RecordedAnswer(**answer) for answer in meta["answers"]]
        return Recording(**meta, **tensors)

    def drafted(self, position: int, shape: DraftShape) -> tuple[list[int], list[int] | None]:
        """What the draft proposes in this shape: tokens, and parents of a tree."""
        if not shape.nodes:
            return self.chain_NJ[position, : shape.levels].tolist(), None
        at = position, self.tree_sizes.index(shape.nodes), shape.levels - 1
        tokens = [token for token in self.tree_NGJK[at].tolist() if token >= 0]
        return tokens, self.parent_NGJK[at].tolist()[: len(tokens)]


@dataclass(kw_only=True)
class TimedRound:
    """A round without prompt tokens."""

    columns: int
    """Of all sequences."""
    drafting: int
    """Sequences that the draft proposed for."""
    shape: tuple[int, int]
    """Levels and nodes (`DraftShape`)."""
    uncached: int
    """Positions of the prefill of the draft's cache."""
    draft_s: float
    proposing_s: float
    """Drafting included."""
    seconds: float
    """All of it."""
    tokens: int
    turn: int
    """Even: the planner chose; odd: what it proposed was drawn at random, so that every shape is measured."""

    @property
    def drawn(self) -> bool:
        """True: at random."""
        return self.turn % 2 == 1

    @property
    def checks(self) -> bool:
        """True: costs are not fitted to it, so that it shows how well they predict."""
        return self.turn % 4 == 0


@dataclass(kw_only=True)
class TimedRounds:
    """Rounds of a running engine with so many sequences, and the costs that its calibration had measured before."""

    batch_size: int
    rounds: list[TimedRound] = field(default_factory=list)
    initial: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)
    """`CostTable.all_initial` of the tables target, chain and tree."""
    position_s: float = 0.0
    """`Costs.prefill_position_s`."""
    prompt_share: float = 0.0
    """Share of the engine's time in rounds that read prompts, where nothing is proposed: with clients each of which
    sends its next request at once. Only known if there were more requests than clients."""

    def save(self, folder: Path) -> None:
        """Write it to the recording's folder."""
        (folder / _ROUNDS.format(self.batch_size)).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(folder: Path, batch_size: int) -> TimedRounds:
        """Read it. Raises AuroraError."""
        path = _existing(folder / _ROUNDS.format(batch_size), f"rounds of {batch_size}")
        data = json.loads(path.read_text(encoding="utf-8"))
        data["rounds"] = [TimedRound(**each) for each in data["rounds"]]
        return TimedRounds(**data)


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise AuroraError(f"{path} does not exist: no {what} were recorded; run `aurora-lit bench policy record` first")
    return path
