"""Records what the simulator replays, from an engine in this process.

Answers: the target answers every prompt without proposals; before each of its tokens the draft is asked for every shape
that a policy could choose. Rounds: the same engine answers prompts with speculation, twenty rounds as the planner
chooses, then twenty whose proposals are drawn at random, and so on, so that both have the same machine. What is
drawn measures what shapes cost inside real rounds; the planner's own rounds then show whether that predicts them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aurora_lit.bench.policy.recording import SETTINGS_NAME, RecordedAnswer, Recording, TimedRound, TimedRounds
from aurora_lit.bench.prompts import BenchPrompt, load_prompts, params_for
from aurora_lit.bench.reporting import is_as_begun, progress_bar, report_console
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import ConfigError
from aurora_lit.kernels.draft_steps import Drafted
from aurora_lit.kernels.products import ColumnDraws
from aurora_lit.request import Request
from aurora_lit.serve.speculation.copy_planner import CopyPlan
from aurora_lit.serve.speculation.costs import DraftShape
from aurora_lit.serve.speculation.drafter import DraftInputs
from aurora_lit.serve.speculation.planner import NO_DRAFT, DraftDecision, SpeculationLimits
from aurora_lit.serve.worker.build import build_engine

_TURN_ROUNDS = 20
"""Rounds after which planner and drawing take turns."""

_CLOSED_SHARE = 3
"""One timed request of so many is sent by a client that has just got an answer."""
_LONGER = 3
"""Answers of the others are so many times longer: rounds in which all clients decode and none reads a prompt are rare
otherwise."""


def shapes_of(limits: SpeculationLimits) -> list[DraftShape]:
    """Every shape that a round may draft, NO_DRAFT first."""
    chains = [DraftShape(levels) for levels in range(1, limits.draft_tokens + 1)]
    return [NO_DRAFT, *chains] + [
        DraftShape(levels, nodes)
        for nodes in limits.tree_sizes
        for levels in range(2, min(limits.draft_tokens, nodes) + 1)
    ]


def run(
    config: AuroraConfig,
    *,
    prompts: Sequence[Path],
    limit: int,
    max_tokens: int,
    temperature: float,
    out: Path,
    clients: Sequence[int],
    timed: int,
) -> None:
    """Record the answers, and the rounds of each number of clients; what `out` holds already is left as it is.

    Raises ConfigError if `out` was recorded with other settings.
    """
    if max(clients, default=0) > config.engine.max_batch_size:
        raise ConfigError(
            f"engine.max_batch_size={config.engine.max_batch_size} is below --clients {max(clients)}; raise it"
        )
    # Chains are recorded as they are drafted, and so simulated.
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, sibling_tokens=0))
    settings = {name: asdict(getattr(config, name)) for name in ("target", "draft", "engine", "memory")}
    settings["engine"].pop("max_batch_size")  # may be raised for more clients
    asked_for = {"limit": limit, "max_tokens": max_tokens, "temperature": temperature, "timed": timed}
    how = {"settings": settings, "prompts": [str(path) for path in prompts], **asked_for}
    engine: Any
    engine, tokenizer = build_engine(config)
    if engine._drafter is None or not engine._drafter.supports_trees:
        raise ConfigError(
            "shapes of drafts need a draft with native steps; see draft.checkpoint and `aurora-lit doctor`"
        )
    start_or_resume(out, how)
    room = config.engine.max_seq_len - max_tokens
    asked = load_prompts(prompts, limit=limit, tokenizer=tokenizer, max_prompt_tokens=room)
    initial = {name: getattr(engine.costs, name).all_initial for name in ("target", "chain", "tree")}
    if not (out / "answers.safetensors").is_file():
        record_answers(engine, asked, temperature=temperature, max_tokens=max_tokens).save(out)
    for number in clients:
        rounds = TimedRounds(batch_size=number, initial=initial, position_s=engine.costs.prefill_position_s)
        if not (out / f"rounds-{number}.json").is_file():
            time_rounds(engine, asked[: timed * number], rounds, temperature=temperature, max_tokens=max_tokens)
            rounds.save(out)


def start_or_resume(out: Path, how: dict[str, Any]) -> None:
    """Create `out`, or check that what it holds was recorded in the same way, since only that is one recording."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS_NAME
    is_unknown = any(out.iterdir()) and not path.exists()
    if is_unknown or not is_as_begun(path, how):
        raise ConfigError(f"--out {out}: was recorded with other settings or prompts; name another folder")


def _requests(
    prompts: Sequence[BenchPrompt], *, salt: str, temperature: float, max_tokens: int, **more: Any
) -> list[Request]:
    """With noise that is the same in every run. `salt`: nothing is reused from requests of another one."""
    params = dataclasses.replace(params_for(temperature, max_tokens=max_tokens), **more)
    how = {"params": params, "cache_salt": salt}
    return [
        Request(request_id=str(i), prompt_ids=prompt.token_ids, noise_key=i, **how)  # type: ignore[arg-type]
        for i, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def record_answers(engine: Any, prompts: Sequence[BenchPrompt], *, temperature: float, max_tokens: int) -> Recording:
    """Answer the prompts token by token, and ask the draft for every shape before each of them."""
    limits = engine.planner.limits
    rows: dict[str, list[dict[str, torch.Tensor]]] = {}
    tokens: dict[str, list[int]] = {}
    requests = _requests(prompts, salt="answers", temperature=temperature, max_tokens=max_tokens, speculate=False)
    for request in requests:
        engine.submit(request)
    console = report_console()
    with progress_bar(console) as progress:
        task = progress.add_task("answers", total=len(requests))
        while engine.has_work:
            decoding = list(engine._decoding)
            if decoding:
                for sequence, row in zip(decoding, _proposals(engine, decoding, limits), strict=True):
                    rows.setdefault(sequence.request.request_id, []).append(row)
            for output in engine.round():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                progress.advance(task, output.finish_reason is not None)
    answers: list[RecordedAnswer] = []
    flat: list[dict[str, torch.Tensor]] = []
    for request, prompt in zip(requests, prompts, strict=True):
        answers.append(
            RecordedAnswer(
                domain=prompt.domain,
                prompt_ids=list(prompt.token_ids),
                token_ids=tokens[request.request_id],
                first=len(flat),
                noise_key=request.noise_key,
            )
        )
        flat += rows[request.request_id]
    return Recording(
        answers=answers,
        temperature=temperature,
        max_tokens=max_tokens,
        tree_sizes=list(limits.tree_sizes),
        draft_tokens=limits.draft_tokens,
        copied_tokens=limits.copied_tokens,
        **{name: torch.stack([row[name] for row in flat]) for name in flat[0]},
    )


def _proposals(engine: Any, sequences: list[Any], limits: SpeculationLimits) -> list[dict[str, torch.Tensor]]:
    """What the draft would propose for each sequence, in every shape."""
    drafter = engine._drafter
    slots = [sequence.slot for sequence in sequences]
    inputs = DraftInputs(slots=slots, lengths=[sequence.length for sequence in sequences])
    noise = ColumnDraws(
        temperatures=[sequence.temperature for sequence in sequences],
        keys=[sequence.noise_key for sequence in sequences],
        positions=[sequence.length - sequence.prompt_length for sequence in sequences],
    )

    def again(propose: Any, **shape: int) -> Drafted:
        for sequence in sequences:  # each call must have a position to compute
            drafter.keep_prefix(sequence.slot, sequence.length - 1)
        return propose(inputs, noise=noise, **shape)  # type: ignore[no-any-return]

    chain = again(drafter.propose, num_steps=limits.draft_tokens)
    B, G, J, K = len(slots), len(limits.tree_sizes), limits.draft_tokens, max(limits.tree_sizes, default=1)
    tree_BGJK = torch.full((B, G, J, K), -1, dtype=torch.int32)
    parent_BGJK = torch.zeros(B, G, J, K, dtype=torch.int8)
    outcome_BGJ = torch.zeros(B, G, J)
    for g, nodes in enumerate(limits.tree_sizes):
        for j in range(J):
            tree = again(drafter.propose_tree, num_steps=j + 1, num_nodes=nodes)
            count = len(tree.tokens[0])
            tree_BGJK[:, g, j, :count], parent_BGJK[:, g, j, :count] = (
                tree.token_BK.int(),
                tree.parent_BK.to(torch.int8),
            )
        outcome_BGJ[:, g] = tree.outcome_JB.T
    hidden = drafter.features_SLF.shape[-1] // 3
    return [
        {
            "chain_NJ": chain.token_BK[b].int(),
            "chain_outcome_NJ": chain.outcome_JB[:, b].clone(),
            "tree_NGJK": tree_BGJK[b],
            "parent_NGJK": parent_BGJK[b],
            "tree_outcome_NGJ": outcome_BGJ[b],
            "hidden_NH": drafter.features_SLF[sequence.slot, sequence.length - 2, -hidden:].half(),
        }
        for b, sequence in enumerate(sequences)
    ]


class _Turns:
    """Makes an engine's rounds follow its planner and a random choice in turn, and records them."""

    def __init__(self, engine: Any, found: TimedRounds) -> None:
        self.engine, self.found = engine, found
        self.turn, self.count = 0, 0
        self.drafted = 0, NO_DRAFT, 0
        """Of this round: sequences, shape, positions of the prefill."""
        self.total_s = self.prompt_s = 0.0
        self._rng = random.Random(0)
        self._floor, self._shapes = engine.floor, shapes_of(engine.planner.limits)
        planner, copies = engine.planner, engine.proposer._copy_planner
        self._originals = [
            (target, name, getattr(target, name))
            for target, name in (
                (planner, "decide"),
                (planner, "min_gains"),
                (planner, "pays_for_catching_up"),
                (planner, "observe_draft"),
                (copies, "choose"),
                (engine, "_account"),
            )
        ]
        drawn = (
            lambda *_args, **_how: DraftDecision(self._rng.choice(self._shapes)),
            lambda *_args, **_how: None,
            lambda *_args, **_how: True,
        )
        for (target, name, original), choice in zip(self._originals[:3], drawn, strict=True):
            setattr(target, name, self._in_turn(original, choice))
        copies.choose = self._in_turn(copies.choose, self._draw_copies)
        planner.observe_draft, engine._account = self._observe_draft, self._account

    def restore(self) -> None:
        """The engine as it was."""
        for target, name, original in self._originals:
            setattr(target, name, original)
        self.engine.floor = self._floor

    def _in_turn(self, original: Any, choice: Any) -> Any:
        return lambda *args, **how: (choice if self.turn % 2 else original)(*args, **how)

    def _draw_copies(self, survivals: Sequence[Sequence[float]], *_args: Any, **_how: Any) -> CopyPlan:
        return CopyPlan([self._rng.choice((0, 0, self._rng.randint(0, len(each)))) for each in survivals], 1.0)

    def _observe_draft(self, num_drafting: int, shape: DraftShape, seconds: float, *, uncached: int = 0) -> None:
        self.drafted = num_drafting, shape, uncached
        self._originals[3][2](num_drafting, shape, seconds, uncached=uncached)

    def _account(self, plan: Any, outputs: Any, seconds: float) -> None:
        """Record a round, and decide who chooses the next one."""
        proposer, rows = self.engine.proposer, plan.decoding
        self.total_s += seconds
        self.prompt_s += seconds if plan.prompts else 0.0
        if not plan.prompts and len(rows) == self.found.batch_size:
            self.found.rounds.append(
                TimedRound(
                    columns=plan.num_decoding_columns,
                    drafting=self.drafted[0],
                    shape=self.drafted[1],
                    uncached=self.drafted[2],
                    draft_s=proposer.draft_seconds,
                    proposing_s=proposer.seconds,
                    seconds=seconds,
                    tokens=sum(len(output.token_ids) for output in outputs),
                    turn=self.turn,
                )
            )
        self._originals[5][2](plan, outputs, seconds)
        self.drafted = 0, NO_DRAFT, 0
        self.count += 1
        if self.count % _TURN_ROUNDS == 0:
            self.turn += 1
            self.engine.floor = None if self.turn % 2 else self._floor


@torch.no_grad()
def time_rounds(
    engine: Any, prompts: Sequence[BenchPrompt], found: TimedRounds, *, temperature: float, max_tokens: int
) -> None:
    """Answer a share of the prompts by as many clients as `found` is for, each of which sends its next request at once;
    then the others by batches that begin and end together.
    """
    how: dict[str, Any] = {"salt": str(found.batch_size), "temperature": temperature}
    requests = _requests(prompts, max_tokens=max_tokens, **how)
    longer = _requests(prompts, max_tokens=_LONGER * max_tokens, ignore_eos=True, **how)
    turns, few = _Turns(engine, found), len(requests) - len(requests) // _CLOSED_SHARE
    while len(requests) > few:
        while engine.num_running + engine.num_waiting < found.batch_size and len(requests) > few:
            engine.submit(requests.pop(0))
        engine.round()
    found.prompt_share = turns.prompt_s / turns.total_s if turns.total_s else 0.0
    longer = longer[len(longer) - few :]
    while longer or engine.has_work:
        if not engine.has_work:
            for request in longer[: found.batch_size]:
                engine.submit(request)
            del longer[: found.batch_size]
        engine.round()
    turns.restore()
