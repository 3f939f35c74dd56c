"""An engine of the shape of vLLM's, without vLLM: its two model runners, and a scheduler that tests direct.

Tokens are known beforehand: request r has token `token(r, p)` at position p, and the states of a row are its token and
position, so that a trace can be compared with what it must contain.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from aurora_lit.vllm.deployment import Deployment

HIDDEN = 4
WRONG = 500
"""Added to a proposal that is not accepted."""


def made_deployment(run_folder: Path, folder: Path, *, ring_bytes: int = 1 << 16) -> Deployment:
    """A deployment whose file lies in `run_folder`, and drafts in `folder`."""
    made = Deployment(
        run_folder=run_folder,
        starting_draft=folder / "first",
        versions=folder / "versions",
        ring_bytes=ring_bytes,
    )
    made.write()
    return made


def token(request_id: str, position: int) -> int:
    """The token of a request at a position."""
    return (7 * position + 13 * sum(map(ord, request_id))) % 97


def params(**changes: Any) -> SimpleNamespace:
    """A request's sampling parameters."""
    fields: dict[str, Any] = {
        "extra_args": None,
        "ignore_eos": False,
        "stop_token_ids": [],
        "all_stop_token_ids": set(),
        "max_tokens": 10_000,
        "temperature": 0.0,
        "structured_outputs": None,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
    }
    return SimpleNamespace(**{**fields, **changes})


@dataclass(kw_only=True)
class Rows:
    """What one request computes in a step."""

    request_id: str
    position: int
    count: int
    """Rows, proposals included."""
    drafted: int = 0
    accepted: int = 0
    unfinished: bool = False
    """A chunk of a prompt that is not the last."""

    @property
    def token_ids(self) -> list[int]:
        """Its input tokens; proposals that are not accepted are wrong."""
        first_wrong = self.count - self.drafted + self.accepted
        return [
            token(self.request_id, self.position + i) + (WRONG if i >= first_wrong else 0) for i in range(self.count)
        ]


@dataclass(kw_only=True)
class MadeStep:
    """One step of the scheduler."""

    rows: Sequence[Rows]
    new: Sequence[tuple[str, int, SimpleNamespace]] = ()
    """Requests that begin: id, length of the prompt, parameters."""
    resumed: Sequence[str] = ()
    finished: Sequence[str] = ()


class V1State(NamedTuple):
    """As V1's ExecuteModelState, without what is not read."""

    scheduler_output: Any
    spec_decode_common_attn_metadata: Any
    hidden_states: torch.Tensor
    aux_hidden_states: list[torch.Tensor] | None


class V2State(NamedTuple):
    """As V2's ExecuteModelState, without what is not read."""

    input_batch: Any
    hidden_states: torch.Tensor
    aux_hidden_states: list[torch.Tensor] | None
    num_spec_tokens_to_schedule: int


def scheduler_output(step: MadeStep) -> SimpleNamespace:
    """As vLLM's SchedulerOutput."""
    starts = {rows.request_id: rows.position for rows in step.rows}
    cached = [rows.request_id for rows in step.rows if rows.request_id not in {each[0] for each in step.new}]
    new = [
        SimpleNamespace(
            req_id=request_id,
            prompt_token_ids=[token(request_id, p) for p in range(length)],
            sampling_params=parameters,
            num_computed_tokens=starts[request_id],
            lora_request=None,
            mm_features=[],
            prompt_embeds=None,
        )
        for request_id, length, parameters in step.new
    ]
    return SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=cached, num_computed_tokens=[starts[each] for each in cached], resumed_req_ids=set(step.resumed)
        ),
        num_scheduled_tokens={rows.request_id: rows.count for rows in step.rows},
        total_num_scheduled_tokens=sum(rows.count for rows in step.rows),
        scheduled_spec_decode_tokens={
            rows.request_id: rows.token_ids[-rows.drafted :] for rows in step.rows if rows.drafted
        },
        finished_req_ids=set(step.finished),
        step=step,
    )


def states(step: MadeStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [Q], positions [Q] and last states [Q, H] of a step; state 0 is the token, state 1 the position."""
    tokens = [each for rows in step.rows for each in rows.token_ids]
    positions = [rows.position + i for rows in step.rows for i in range(rows.count)]
    token_Q, position_Q = torch.tensor(tokens, dtype=torch.int32), torch.tensor(positions)
    last_QH = torch.zeros(len(tokens), HIDDEN)
    if tokens:
        last_QH[:, 0], last_QH[:, 1] = token_Q.float(), position_Q.float()
    return token_Q, position_Q, last_QH.bfloat16()


def overwrite(*tensors: torch.Tensor) -> None:
    """Put numbers into tensors that no test expects."""
    for tensor in tensors:
        tensor.fill_(7)


class MadeRunner:
    """What both runners share: `run` takes one step as vLLM's worker does.

    After sampling, what the step computed is overwritten, as with CUDA graphs in memory that target and draft share.
    """

    device = "cpu"

    def __init__(self) -> None:
        self.execute_model_state: Any = None
        self.target, self.draft = nn.Module(), nn.Module()
        self.outputs: list[Any] = []

    def run(self, step: MadeStep) -> Any:
        """One step; its output, which no hook may change."""
        output = self.execute_model(scheduler_output(step), None)
        return self.sample_tokens(None) if output is None else output

    def get_model(self) -> nn.Module:
        """The target."""
        return self.target

    def get_draft_model(self) -> nn.Module:
        """The draft."""
        return self.draft

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Compute the rows."""
        if not scheduler_output.step.rows:
            return "nothing to compute"
        self._compute(scheduler_output)
        return None

    def _compute(self, scheduler_output: Any) -> None:
        raise NotImplementedError

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and propose."""
        raise NotImplementedError


class MadeV1Runner(MadeRunner):
    """As vllm/v1/worker/gpu_model_runner.py."""

    def __init__(self, *, fits: bool = True, uses_mrope: bool = False) -> None:
        super().__init__()
        self.fits, self.uses_mrope = fits, uses_mrope

    def _compute(self, scheduler_output: Any) -> None:
        step, token_Q, position_Q, last_QH = (scheduler_output.step, *states(scheduler_output.step))
        starts = np.cumsum([0, *(rows.count for rows in step.rows)])
        self.input_batch = SimpleNamespace(
            num_reqs=len(step.rows), req_ids=[rows.request_id for rows in step.rows] + ["left over"]
        )
        self.query_start_loc = SimpleNamespace(np=starts)
        self.discard_request_mask = SimpleNamespace(np=np.array([rows.unfinished for rows in step.rows]))
        self.input_ids = SimpleNamespace(gpu=torch.cat([token_Q, torch.full((5,), -9, dtype=torch.int32)]))
        self.positions = torch.cat([position_Q, torch.full((5,), -9)])
        if self.uses_mrope:
            self.mrope_positions = SimpleNamespace(gpu=self.positions.repeat(3, 1))
        self.execute_model_state = V1State(scheduler_output, object(), last_QH, [last_QH, last_QH + 1, last_QH + 2])

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        return self.fits

    def _get_positions(self, num_tokens: int) -> torch.Tensor:
        return self.mrope_positions.gpu[:, :num_tokens] if self.uses_mrope else self.positions[:num_tokens]

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        rows = self._step.rows
        widest = 1 + max(each.drafted for each in rows)
        sampled_BK = torch.full((len(rows), widest), -1)
        for index, each in enumerate(rows):
            sampled_BK[index, : each.accepted + 1] = 1
        return SimpleNamespace(sampled_token_ids=sampled_BK)

    def sample_tokens(self, grammar_output: Any) -> Any:
        state = self.execute_model_state
        self._step = state.scheduler_output.step
        self.execute_model_state = None
        self._sample(None, None)
        overwrite(self.input_ids.gpu, self.positions, state.hidden_states, *state.aux_hidden_states)
        return "output"


class MadeV2Runner(MadeRunner):
    """As vllm/v1/worker/gpu/model_runner.py."""

    def __init__(self) -> None:
        super().__init__()
        self.pcp_manager = self.adaptive_verification = None

    def _compute(self, scheduler_output: Any) -> None:
        step, token_Q, position_Q, last_QH = (scheduler_output.step, *states(scheduler_output.step))
        counts = [rows.count for rows in step.rows]
        padding = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
        batch = SimpleNamespace(
            req_ids=[rows.request_id for rows in step.rows],
            num_reqs=len(step.rows),
            query_start_loc_np=np.cumsum([0, *counts]),
            num_scheduled_tokens=np.array(counts),
            num_draft_tokens_per_req=np.array([rows.drafted for rows in step.rows]),
            input_ids=torch.cat([token_Q, torch.zeros(3, dtype=torch.int32)]),
            positions=torch.cat([position_Q, torch.zeros(3, dtype=torch.int64)]),
            step=step,
        )
        last_QH = torch.cat([last_QH, padding])  # as for a CUDA graph
        self.execute_model_state = V2State(batch, last_QH, [last_QH, last_QH + 1, last_QH + 2], 3)

    def sample(self, hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
        rows = input_batch.step.rows
        num_sampled_B = torch.tensor([0 if each.unfinished else each.accepted + 1 for each in rows])
        return object(), num_sampled_B, torch.tensor([each.drafted - each.accepted for each in rows])

    def sample_tokens(self, grammar_output: Any) -> Any:
        state, batch = self.execute_model_state, self.execute_model_state.input_batch
        self.execute_model_state = None
        _, num_sampled_B, _ = self.sample(None, batch, grammar_output)
        overwrite(batch.input_ids, batch.positions, state.hidden_states, *state.aux_hidden_states, num_sampled_B)
        return "output"


@dataclass(kw_only=True)
class _Running:
    request_id: str
    prompt: int
    end: int
    position: int
    """Where its next rows begin."""
    length: int
    """Tokens known: the prompt, and what was sampled."""
    generates: bool = False
    """False while it reads its prompt or, after a preemption, what it had."""


@dataclass(kw_only=True)
class Traffic:
    """Random steps of several requests: chunks, prefix hits, proposals, preemptions, and ends."""

    requests: dict[str, tuple[int, int]]
    """Lengths of prompt and answer."""
    seed: int = 0
    preempt_share: float = 0.05
    num_proposals: int = 3
    parameters: dict[str, Any] = field(default_factory=dict)

    def steps(self) -> list[MadeStep]:
        """All steps, the last of which only says which requests have ended."""
        draw = random.Random(self.seed)
        waiting, running, steps = list(self.requests.items()), [], []
        finished: list[str] = []
        preempted: list[_Running] = []
        while waiting or running or preempted:
            rows, new, resumed = [], [], []
            if preempted and draw.random() < 0.5:
                back = preempted.pop()
                running.append(back)
                resumed.append(back.request_id)
            if waiting and draw.random() < 0.5:
                request_id, (prompt, answer) = waiting.pop()
                cached = 16 * draw.randrange(1 + (prompt - 1) // 16)
                running.append(
                    _Running(request_id=request_id, prompt=prompt, end=prompt + answer, position=cached, length=prompt)
                )
                new.append((request_id, prompt, params(max_tokens=answer, **self.parameters)))
            ended = []
            for each in running:
                pending = each.length - each.position
                if not each.generates:
                    count = min(pending, draw.randrange(1, 20))
                    made = Rows(
                        request_id=each.request_id, position=each.position, count=count, unfinished=count < pending
                    )
                else:
                    drafted = draw.randrange(self.num_proposals + 1)
                    accepted = draw.randrange(drafted + 1)
                    made = Rows(
                        request_id=each.request_id,
                        position=each.position,
                        count=1 + drafted,
                        drafted=drafted,
                        accepted=accepted,
                    )
                rows.append(made)
                each.generates = not made.unfinished
                each.position += made.count - made.drafted + made.accepted
                each.length += 0 if made.unfinished else made.accepted + 1
                if each.length >= each.end:
                    ended.append(each)
            steps.append(MadeStep(rows=rows, new=new, resumed=resumed, finished=finished))
            finished = [each.request_id for each in ended]
            running = [each for each in running if each not in ended]
            if running and draw.random() < self.preempt_share:
                victim = running.pop(draw.randrange(len(running)))
                victim.position, victim.generates = 0, False
                preempted.append(victim)
        steps.append(MadeStep(rows=[], finished=finished))
        return steps
