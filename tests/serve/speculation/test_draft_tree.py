"""Rounds that propose trees: each node is what a plain pass over its path gives, bit for bit; output and traces too."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, Answer, make_engine, random_draft, request, run, save_model, trained_draft

from aurora_lit.kernels import native
from aurora_lit.models.slots import KVSlots, keys_by_position
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.request import Request
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.serve.speculation.draft_tree import slot_capacity
from aurora_lit.traces.record import SOURCE_DRAFT, Trace, check

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")

PRECISIONS = ("fp32", "bf16", "int4")
LENGTHS = (1, 2, 17, 30, 41)
NEW = 24


@dataclass(frozen=True, kw_only=True)
class World:
    targets: dict[str, Target]
    drafts: dict[str, Draft]
    prompts: list[list[int]]

    def engine(self, kind: str = "trained", *, precision: str = "bf16", nodes: int = 15, **changes: Any) -> Engine:
        draft = None if kind == "none" else copy.deepcopy(self.drafts[kind])
        return make_engine(self.targets[precision], draft, tree_tokens=nodes, **changes)

    def requests(self, **params: Any) -> list[Request]:
        return [request(str(i), p, **{"max_tokens": NEW, **params}) for i, p in enumerate(self.prompts)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    targets = {precision: Target.load(folder, precision=precision) for precision in PRECISIONS}
    gen = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (length,), generator=gen).tolist() for length in LENGTHS]
    plain = run(make_engine(targets["fp32"]), [request(str(i), p, max_tokens=NEW) for i, p in enumerate(prompts)])
    width = max(LENGTHS) + NEW
    learnt = [(p + plain[str(i)].token_ids + [0] * width)[:width] for i, p in enumerate(prompts)]
    drafts = {
        "random": random_draft(targets["fp32"]),
        "trained": trained_draft(targets["fp32"], torch.tensor(learnt), steps=40),
    }
    return World(targets=targets, drafts=drafts, prompts=prompts)


def tokens(given: dict[str, Answer]) -> list[list[int]]:
    return [given[name].token_ids for name in sorted(given)]


# -- passes --------------------------------------------------------------------------------------------------------


def path_of(parents: list[int], column: int) -> list[int]:
    path = [column]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@pytest.mark.parametrize("columns", [2, 5, 16, 23])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_node_is_a_plain_pass_over_its_path_bit_for_bit(world: World, precision: str, columns: int) -> None:
    target, rng = world.targets[precision], random.Random(columns)
    ids_BL = torch.randint(VOCAB, (2, 80), generator=torch.Generator().manual_seed(columns))
    starts, slots_B = [37, 44], torch.tensor([2, 0])
    parents = [[-1, *(rng.randrange(max(0, c - 6), c) for c in range(1, columns))] for _ in starts]

    def prefilled(num_slots: int) -> Any:
        slots = target.make_slots(num_slots=num_slots, capacity=80)
        for slot, (ids_L, start) in zip(slots_B.tolist(), zip(ids_BL, starts, strict=True), strict=True):
            target.forward(ids_L[None, :start], slots=slots, slots_B=torch.tensor([slot]), starts_B=torch.tensor([0]))
        return slots

    slots, starts_B = prefilled(3), torch.tensor(starts)
    tree_BT = torch.stack([ids_L[start : start + columns] for ids_L, start in zip(ids_BL, starts, strict=True)])
    aux, last = target.forward(
        tree_BT, slots=slots, slots_B=slots_B, starts_B=starts_B, parents_BT=torch.tensor(parents)
    )
    plain = prefilled(3)
    for b, start in enumerate(starts):
        one = {"slots_B": slots_B[b : b + 1], "starts_B": starts_B[b : b + 1]}
        for column in range(columns):
            path = path_of(parents[b], column)
            aux_1, last_1 = target.forward(tree_BT[b : b + 1, path], slots=plain, **one)
            assert torch.equal(aux_1[0, -1], aux[b, column])
            assert torch.equal(last_1[0, -1], last[b, column])
        # The deepest path is kept; what the slot then holds is what the plain pass wrote there.
        path = max((path_of(parents[b], c) for c in range(columns)), key=len)
        target.forward(tree_BT[b : b + 1, path], slots=plain, **one)
        target.keep_path(
            slots=slots,
            slots_M=slots_B[b].repeat(len(path)),
            from_M=start + torch.tensor(path),
            to_M=start + torch.arange(len(path)),
        )
        end, slot = start + len(path), int(slots_B[b])
        for mine, other in zip(slots.keys_SGCDP, plain.keys_SGCDP, strict=True):
            assert torch.equal(*(keys_by_position(keys)[slot, ..., :end] for keys in (mine, other)))
        for mine, other in zip(slots.values_SGLD, plain.values_SGLD, strict=True):
            assert torch.equal(mine[slot, :, :end], other[slot, :, :end])


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_different_widths_give_the_bits_of_rows_that_are_all_as_wide(
    world: World, precision: str, branching: bool
) -> None:
    target, widths, T = world.targets[precision], [3, 1, 17, 2], 17
    gen = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(0, VOCAB, (len(widths), T), generator=gen)
    parents_BT = torch.tensor([[-1, *(random.Random(b).randrange(t) for t in range(1, T))] for b in range(len(widths))])
    branches = {"parents_BT": parents_BT} if branching else {}
    slots_B, starts_B = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 0, 1, 9])

    def prepared() -> KVSlots:
        slots = target.make_slots(num_slots=4, capacity=40)
        read = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(6))
        target(read, slots=slots, slots_B=slots_B, starts_B=torch.zeros(4, dtype=torch.int64))
        return slots

    wide, ragged = prepared(), prepared()
    wanted = target(ids_BT, slots=wide, slots_B=slots_B, starts_B=starts_B, **branches)
    ids_N = torch.cat([row[:width] for row, width in zip(ids_BT, widths, strict=True)])
    found = target.forward_ragged(ids_N, widths=widths, slots=ragged, slots_B=slots_B, starts_B=starts_B, **branches)
    for of_all, of_some in zip(wanted, found, strict=True):
        assert torch.equal(torch.cat([row[:width] for row, width in zip(of_all, widths, strict=True)]), of_some)
    for keys, other in zip(wide.keys_SGCDP, ragged.keys_SGCDP, strict=True):
        for slot, start, width in zip(slots_B.tolist(), starts_B.tolist(), widths, strict=True):
            one, two = (keys_by_position(k[slot][None])[..., : start + width] for k in (keys, other))
            assert torch.equal(one, two)


def test_other_layers_do_not_branch(world: World) -> None:
    target = world.targets["fp32"]
    decoder, target._decoder = target._decoder, None
    try:
        assert not target.can_branch
        engine = world.engine(precision="fp32")
        assert engine.policy.tree_sizes == ()
        assert {o.num_proposed for a in run(engine, world.requests()).values() for o in a.rounds} == {4}
    finally:
        target._decoder = decoder


# -- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("kind", "k", "nodes", "batch"),
    [
        ("random", 4, 15, 8),
        ("random", 2, 3, 1),
        ("trained", 4, 15, 8),
        ("trained", 4, 7, 1),
        ("trained", 3, 31, 3),
        ("trained", 8, 15, 2),
        ("trained", 1, 15, 8),
        ("trained", 0, 15, 8),
    ],
)
def test_output_is_that_of_plain_decoding(
    world: World, kind: str, k: int, nodes: int, batch: int, adaptive: bool
) -> None:
    """bf16: only equal bits give equal tokens there. Greedy and seeded rows, at any batch."""
    asked = world.requests()
    asked += [request(f"s{i}", p, max_tokens=NEW, temperature=0.8, seed=i) for i, p in enumerate(world.prompts)]
    wanted = run(make_engine(world.targets["bf16"]), asked)
    engine = world.engine(kind, nodes=nodes, max_draft_tokens=k, max_batch_size=batch, adaptive=adaptive)
    given = run(engine, asked, arrivals=[0, 1, 2, 0, 5, 3, 9, 2, 1, 0])
    assert tokens(given) == tokens(wanted)
    assert engine.stats.accepted == sum(engine.stats.accepted_by_position)
    rounds = [output for answer in given.values() for output in answer.rounds]
    assert all(len(o.token_ids) == o.num_accepted + 1 for o in rounds if o.finish_reason is None)
    if not adaptive:
        assert max(o.num_proposed for o in rounds) == (nodes if k > 1 else k)
        assert all(o.chain_accepted <= min(o.num_accepted, o.chain_proposed) <= k for o in rounds)
        if (kind, k) == ("trained", 4):
            assert sum(o.num_accepted for o in rounds) > sum(o.chain_accepted for o in rounds)


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "temperature": 0.9, "seed": 5},
        {"logit_bias": {7: 3.0}},
        {"logprobs": 3},
        {"temperature": 0.7, "seed": 1, "top_p": 0.8, "logprobs": 1},
    ],
)
def test_options_hold_on_every_path(world: World, params: dict[str, Any]) -> None:
    asked = world.requests(**params)
    wanted = run(make_engine(world.targets["bf16"]), asked)
    given = run(world.engine(), asked)
    assert tokens(given) == tokens(wanted)
    for name in given:
        assert given[name].logprobs == wanted[name].logprobs
    widest = max(o.num_proposed for a in given.values() for o in a.rounds)
    assert widest == (4 if any("penalty" in name for name in params) else 15)


def test_a_freely_sampled_row_makes_its_round_a_chain(world: World) -> None:
    greedy, sampled = world.requests()[3:]
    free = request("free", sampled.prompt_ids, max_tokens=6, temperature=1.0)
    given = run(world.engine(prefill_chunk_tokens=128), [greedy, free])
    numbers = [output.num_proposed for output in given[greedy.request_id].rounds]
    together = len(given["free"].rounds)
    assert set(numbers[:together]) == {4}
    assert set(numbers[together:]) == {15}
    assert given[greedy.request_id].token_ids == tokens(run(make_engine(world.targets["bf16"]), [greedy]))[0]


def test_copied_proposals_and_trees_share_a_round(world: World) -> None:
    prompts = [[7, 8, 9, 10, 11] * 4, world.prompts[3]]
    asked = [request(str(i), p, max_tokens=NEW) for i, p in enumerate(prompts)]
    asked.append(request("plain", world.prompts[2], max_tokens=NEW, speculate=False))
    given = run(world.engine(lookup_tokens=15, prefill_chunk_tokens=64), asked)
    assert tokens(given) == tokens(run(make_engine(world.targets["bf16"]), asked))
    assert any(o.looked_up and o.num_proposed for o in given["0"].rounds)
    assert {o.num_proposed for o in given["1"].rounds if not o.looked_up} == {15}


@pytest.mark.parametrize("limits", [{"max_seq_len": 44}, {"max_seq_len": 43, "max_batch_size": 1}])
def test_ends_inside_a_path(world: World, limits: dict[str, Any]) -> None:
    wanted = tokens(run(make_engine(world.targets["bf16"], **limits), world.requests()))
    assert tokens(run(world.engine(**limits), world.requests())) == wanted
    for new in (1, 2, 3):
        short = tokens(run(world.engine(), world.requests(max_tokens=new)))
        assert short == [(w + [-1])[:new] for w in wanted[:4]] + [short[4]]
    whole = tokens(run(make_engine(world.targets["bf16"]), world.requests()))[2]
    end = next(t for i, t in enumerate(whole) if i > 2 and t not in whole[:i])
    cut = run(world.engine(), [world.requests(stop_token_ids=(end,))[2]])["2"]
    assert (cut.token_ids, cut.finish_reason) == (whole[: whole.index(end) + 1], "stop")


def test_a_swap_in_the_middle(world: World) -> None:
    engine = world.engine("random")
    given = {r.request_id: Answer() for r in world.requests()}
    for asked in world.requests():
        engine.submit(asked)
    number = 0
    while engine.has_work:
        if number in (3, 7, 9):
            kind = "trained" if number != 7 else "random"
            engine.swap_draft(copy.deepcopy(world.drafts[kind]), version=str(number), recompute=number == 9)
        for output in engine.round():
            given[output.request_id].add(output)
        number += 1
    assert tokens(given) == tokens(run(make_engine(world.targets["bf16"]), world.requests()))


def test_room_behind_a_request_for_what_is_drafted() -> None:
    assert slot_capacity(max_seq_len=100, max_draft_tokens=4, tree_tokens=0) == 105
    assert slot_capacity(max_seq_len=100, max_draft_tokens=2, tree_tokens=31) == 132
    assert slot_capacity(max_seq_len=100, max_draft_tokens=8, tree_tokens=3) == 133


# -- traces --------------------------------------------------------------------------------------------------------


def test_traces_tell_the_chain_of_first_choices_and_the_states_of_the_path_taken(world: World) -> None:
    target = world.targets["bf16"]
    traces: list[Trace] = []
    recorder = TraceRecorder(lambda trace: traces.append(trace.copy()), hidden_size=target.hidden_size)
    given = run(world.engine(observer=recorder), world.requests())
    assert len(traces) == len(given)
    further = 0
    for trace in traces:
        check(trace)
        answer = given[trace.request_id]
        ids = [*world.prompts[int(trace.request_id)], *answer.token_ids][:-1]
        assert trace.token_ids_T.tolist() == ids
        aux, last = target.forward(
            torch.tensor([ids]),
            slots=target.make_slots(num_slots=1, capacity=96),
            slots_B=torch.tensor([0]),
            starts_B=torch.tensor([0]),
        )
        assert torch.equal(trace.aux_T3H, aux[0].bfloat16())
        assert torch.equal(trace.last_TH, last[0].bfloat16())
        start = 0
        for r, output in enumerate(answer.rounds):
            root, accepted = int(trace.round_root_R[r]), int(trace.num_accepted_R[r])
            proposed = int(trace.num_proposed_R[r])
            assert accepted == output.chain_accepted
            further += output.num_accepted - accepted
            rejected = trace.rejected_last_NH[start : start + int(trace.num_rejected_R[r])]
            start += len(rejected)
            if not len(rejected):
                continue
            assert trace.source_R[r] == SOURCE_DRAFT
            path = [*ids[: root + 1], *trace.proposal_RK[r, :proposed].tolist()]
            _, on_path = target.forward(
                torch.tensor([path]),
                slots=target.make_slots(num_slots=1, capacity=96),
                slots_B=torch.tensor([0]),
                starts_B=torch.tensor([0]),
            )
            assert torch.equal(rejected, on_path[0, root + accepted + 1 : root + proposed].bfloat16())
    assert further, "the test needs trees that accept more than their first chain"
