"""Swapping drafts under running requests on tiny models: answers stay, bad drafts are rolled back or refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fake_drafts import SMALL_SHAPE
from support.tiny_models import VOCAB, make_engine, random_draft, request, run, save_model, trained_draft

from aurora_lit.drafts.checkpoint import load_draft, write_draft
from aurora_lit.drafts.hot_reload import HotReloader
from aurora_lit.drafts.live_watch import REQUEST_ROUNDS, LiveWatch, TrafficKind
from aurora_lit.drafts.store import DraftStore
from aurora_lit.drafts.versions import version_name
from aurora_lit.errors import CheckpointError
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft
from aurora_lit.request import Output, Request, Source
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.round_plan import Proposal
from aurora_lit.serve.speculation.sources.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.sources.runtime_draft import prepare_draft
from aurora_lit.serve.worker import swap_gain
from aurora_lit.serve.worker.live_draft import LiveDraft
from aurora_lit.serve.worker.swap_gain import SwapGain

NEW = 40
CAPACITY = 128


@dataclass(frozen=True, kw_only=True)
class ServingCase:
    """A target, a draft trained for it, and requests with their plain answers."""

    target: Target
    good: Eagle3Draft
    """Trained on the answers to `requests`, so that many of its proposals are accepted."""
    requests: list[Request]
    plain: dict[str, list[int]]
    """The answers of plain decoding, by request id."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> ServingCase:
    target = load_target(save_model("llama", tmp_path_factory.mktemp("llama"), seed=3), precision="fp32")
    torch.manual_seed(0)
    requests = []
    for number in range(32):
        prompt = torch.randint(7, VOCAB, (3 + number % 11,)).tolist()
        sampled = {"temperature": 0.9, "seed": number} if number % 4 == 3 else {}
        requests.append(request(f"r{number}", prompt, max_tokens=NEW, **sampled))
    plain = run(make_engine(target, max_batch_size=32), requests)
    texts = [[*each.prompt_ids, *plain[each.request_id].token_ids] for each in requests]
    width = max(map(len, texts))
    good = trained_draft(target, torch.tensor([(text + [0] * width)[:width] for text in texts]), steps=120)
    return ServingCase(
        target=target, good=good, requests=requests, plain={key: answer.token_ids for key, answer in plain.items()}
    )


@dataclass(kw_only=True)
class ServingLoop:
    """The loop of serve/worker/loop.py without its process."""

    engine: Engine
    live: LiveDraft
    answers: dict[str, list[int]] = field(default_factory=dict)
    accepted: dict[str, list[int]] = field(default_factory=dict)
    """Accepted tokens of each drafted round, by the version that proposed."""

    def round(self) -> None:
        self.live.before_round()
        outputs = self.engine.round()
        self.live.after_round(outputs, [TrafficKind()] * len(outputs))
        for output in outputs:
            self.answers.setdefault(output.request_id, []).extend(output.token_ids)
            if output.num_proposed:
                self.accepted.setdefault(self.engine.draft_version, []).append(output.num_accepted)

    def serve(self, requests: list[Request], *, until: Callable[[], bool] = lambda: False) -> None:
        """Submit and run to the end, or until something is so."""
        for each in requests:
            self.engine.submit(each)
        while self.engine.has_work and not until():
            self.round()

    def length(self, version: str, last: int) -> float:
        """Accepted length over the last drafted rounds of a version."""
        rounds = self.accepted[version][-last:]
        return 1 + sum(rounds) / len(rounds)


@pytest.fixture
def store(tmp_path: Path) -> DraftStore:
    return DraftStore(tmp_path / "live", keep=20)


@pytest.fixture
def server(case: ServingCase, store: DraftStore) -> Iterator[ServingLoop]:
    def load(folder: Path | None) -> Any:
        draft = copy.deepcopy(case.good) if folder is None else load_draft(folder, case.target)
        return prepare_draft(draft, case.target, capacity=CAPACITY)

    engine = make_engine(
        case.target, copy.deepcopy(case.good), max_batch_size=32, max_draft_tokens=3, draft_version="good"
    )
    live = LiveDraft(engine, HotReloader(store, load))
    live.start(on_change=lambda: None)
    yield ServingLoop(engine=engine, live=live)
    live.close()


def wait(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.005)


def test_requests_in_flight_across_ten_swaps_are_answered_as_by_plain_decoding(
    case: ServingCase, store: DraftStore, server: ServingLoop
) -> None:
    """Of drafts that differ in weights, vocabulary, width and the shape of their cache."""
    for each in case.requests:
        server.engine.submit(each)
    shapes: list[dict[str, Any]] = [
        {},
        {"draft_vocab_size": 30},
        {"intermediate_size": 48},
        {"num_attention_heads": 4, "num_key_value_heads": 2},
    ]
    while "good" not in server.accepted:
        server.round()
    seen = []
    for number in range(10):
        name = store.publish(random_draft(case.target, seed=number, **shapes[number % 4]), record={})
        wait(lambda: server.live._reloader._ready)
        server.round()
        seen.append(server.engine.draft_version)
        assert seen[-1] == name
        drafter = server.engine._drafter
        assert drafter is not None
        assert drafter._cache.keys_SGCQPE[0].shape[1] == drafter.draft.config.num_key_value_heads
        assert server.engine.num_running == 32, "all are still in flight"
    server.serve([])
    assert server.answers == case.plain
    assert server.live.num_swaps == 10
    assert set(server.accepted) == {"good", *seen}, "every version proposed"


def test_responses_tell_which_versions_proposed(case: ServingCase, store: DraftStore, server: ServingLoop) -> None:
    server.engine.submit(case.requests[0])
    server.round()
    server.round()
    store.publish(copy.deepcopy(case.good), record={})
    wait(lambda: server.live._reloader._ready)
    versions: tuple[str, ...] = ()
    while server.engine.has_work:
        server.live.before_round()
        for output in server.engine.round():
            versions = output.draft_versions
    assert versions == ("good", "draft-000001")


def test_what_a_swap_brought_is_told_once_so_many_requests_have_ended(
    case: ServingCase,
    store: DraftStore,
    server: ServingLoop,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(swap_gain, "_REQUESTS", 32)
    monkeypatch.setattr(server.live, "gain", SwapGain())
    caplog.set_level(logging.INFO, logger="aurora_lit.serve")
    server.serve(case.requests)
    before = server.length("good", last=10_000)
    store.publish(random_draft(case.target), record={})
    wait(lambda: server.live._reloader._ready)
    monkeypatch.setattr(server.live, "_watch", LiveWatch())  # or it would be rolled back
    server.serve(case.requests[:31])
    assert not caplog.messages
    server.serve(case.requests[31:])
    after = server.length("draft-000001", last=10_000)
    (line,) = caplog.messages
    assert line == server.live.gain.line
    assert line.endswith("tokens a round (32 requests before the swap, 32 after)")
    told = [float(word) for word in line.split() if re.fullmatch(r"\d\.\d\d", word)]
    assert told == pytest.approx([before, after], abs=0.1), "but for rounds without proposals, the last of a request"
    assert after < before


def test_a_zeroed_head_published_by_force_is_rolled_back_and_no_answer_changes(
    case: ServingCase, store: DraftStore, server: ServingLoop
) -> None:
    greedy = [each for each in case.requests if each.params.temperature == 0]

    def traffic(name: str) -> list[Request]:
        return [dataclasses.replace(each, request_id=f"{each.request_id} {name}") for each in greedy]

    first = store.publish(copy.deepcopy(case.good), record={})
    wait(lambda: server.live._reloader._ready)
    server.serve(traffic("before"))
    before = server.length(first, last=10_000)
    assert before > 1.8

    broken = copy.deepcopy(case.good)
    with torch.no_grad():
        broken.lm_head.weight.zero_()
    bad = store.publish(broken, record={"by": "force"})
    wait(lambda: server.live._reloader._ready)
    server.serve(traffic("during"), until=lambda: server.live.num_rollbacks > 0)
    assert server.live.num_rollbacks == 1, "within one round of traffic"
    assert len(server.accepted[bad]) <= 32 * REQUEST_ROUNDS, "by their first rounds"
    assert server.length(bad, last=10_000) < 1.1, "a draft that knows nothing: 1, but for lucky hits"
    wait(lambda: server.live._reloader._ready)
    server.serve([])
    assert server.engine.draft_version == store.current() == first
    assert store.versions()[1].retired == server.live.rolled_back.reason
    assert "fewer of its tokens were right than of the version before" in store.versions()[1].retired

    rounds_before = len(server.accepted[first])
    server.serve(traffic("after"))
    after = server.length(first, last=len(server.accepted[first]) - rounds_before)
    assert abs(after - before) < 0.1
    for name, tokens in server.answers.items():
        assert tokens == case.plain[name.split()[0]], name
    assert server.live.num_swaps == 3


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "manifest.json").unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def configure(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()


POISONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (lambda folder: edit(folder, lambda t: t["fc.weight"][0].fill_(torch.nan)), "fc.weight holds NaN"),
    "wrong shape": (
        lambda folder: edit(folder, lambda t: t.update({"norm.weight": torch.ones(3)})),
        "norm.weight has shape",
    ),
    "truncated": (cut, "does not match manifest.json: truncated"),
    "other layers": (
        lambda folder: configure(folder, eagle_aux_hidden_state_layer_ids=[1, 2, 3]),
        "layer_ids is .1, 2, 3.",
    ),
    "other vocabulary": (lambda folder: configure(folder, vocab_size=VOCAB + 1), f"vocab_size is {VOCAB + 1}"),
    "no files": (lambda folder: [path.unlink() for path in folder.iterdir()], "config.json cannot be read"),
    "overflow": (
        lambda folder: edit(folder, lambda t: t["lm_head.weight"].fill_(3e38)),
        "computes logits that are NaN or inf",
    ),
}


@pytest.mark.parametrize("name", POISONS)
def test_a_poisoned_draft_is_refused_and_the_last_good_one_continues_to_serve(
    name: str, case: ServingCase, store: DraftStore, server: ServingLoop
) -> None:
    good = store.publish(copy.deepcopy(case.good), record={})
    wait(lambda: server.live._reloader._ready)
    server.serve(case.requests[:8], until=lambda: server.engine.num_waiting == 0)
    spoil, reason = POISONS[name]
    folder = store.folder / version_name(2)
    folder.mkdir()
    write_draft(case.good, folder)
    spoil(folder)
    store.promote(folder.name)
    wait(lambda: server.live.num_refused)
    server.serve([])
    assert server.engine.draft_version == good
    assert server.live.refused.version == folder.name
    assert reason.replace(".1", "(1").replace("3.", "3)") in server.live.refused.reason
    events = [(event["event"], event.get("reason")) for event in store.history()]
    assert events.count(("refused", server.live.refused.reason)) == 1
    assert server.answers == {each.request_id: case.plain[each.request_id] for each in case.requests[:8]}


def test_a_draft_that_computes_nan_cannot_be_prepared(case: ServingCase) -> None:
    draft = copy.deepcopy(case.good)
    with torch.no_grad():
        draft.value_head.weight.fill_(3e38)
    with pytest.raises(CheckpointError, match="computes values that are NaN or infinite"):
        prepare_draft(draft, case.target, capacity=CAPACITY)


@pytest.mark.parametrize("recompute", [False, True])
def test_with_recompute_the_new_draft_proposes_as_if_it_had_always_served(case: ServingCase, recompute: bool) -> None:
    engine = make_engine(case.target, random_draft(case.target), max_batch_size=32, max_draft_tokens=3)
    for each in case.requests:
        engine.submit(each)
    for _ in range(6):
        engine.round()
    drafter = engine._drafter
    assert drafter is not None
    fresh = Drafter(copy.deepcopy(case.good), case.target, tokens_SL=engine._tokens_SL, capacity=drafter._capacity)
    fresh.features_SLF.copy_(drafter.features_SLF)
    drafter.swap(copy.deepcopy(case.good), recompute=recompute)
    rows = engine._decoding
    proposed = [
        each.propose(
            DraftInputs(slots=[row.slot for row in rows], lengths=[row.length for row in rows]),
            num_steps=3,
        ).tokens
        for each in (drafter, fresh)
    ]
    assert (proposed[0] == proposed[1]) == recompute


def test_a_swap_resets_the_estimates_by_which_the_old_draft_was_given_up(case: ServingCase) -> None:
    engine = make_engine(case.target, random_draft(case.target), max_batch_size=32, max_draft_tokens=3, adaptive=True)
    engine.submit(case.requests[0])
    engine.round()
    (sequence,) = engine._decoding
    for _ in range(200):
        engine.proposer.draft.observe(
            sequence, Proposal(tokens=[1], source=Source.DRAFT, num_drafted=1), path=[0], finished=False
        )
    rates = engine.proposer.draft.rates
    assert rates.rate_of(sequence) < 0.1
    engine.swap_draft(copy.deepcopy(case.good), version="draft-000001")
    assert rates.mean_rate(sampled=False) == rates.rate_of(sequence) == 0.5


class RecordingEngine:
    draft_version = "good"

    def __init__(self) -> None:
        self.swaps: list[tuple[Any, str, bool]] = []

    def swap_draft(self, draft: Any, *, version: str, recompute: bool = False) -> None:
        self.draft_version = version
        self.swaps.append((draft, version, recompute))


def judged(
    store: DraftStore,
    *,
    plain_rounds: int = 0,
    before: Mapping[str, Any] | None = None,
    rounds: int = 400,
    clients: int = 1,
    **of_output: Any,
) -> LiveDraft:
    """After `rounds` that accepted 3 tokens, and plain ones, a new draft, and as many that accepted none.

    clients: whose requests come in turn; for all but the first the new draft accepts as many as the one before.
    """
    engine = RecordingEngine()
    live = LiveDraft(engine, HotReloader(store, lambda folder: folder and folder.name))
    live.start(on_change=lambda: None)
    output = Output(request_id="", token_ids=(1,), num_proposed=3, num_accepted=3)
    for number in range(rounds):
        good = dataclasses.replace(output, request_id=f"before {number // 32}", **(before or {}))
        live.after_round([good], [TrafficKind(client=str(number // 32 % clients))])
    for _ in range(plain_rounds):
        live.after_round([Output(request_id="plain", token_ids=(1,))], [TrafficKind()])
    draft = Eagle3Draft(Eagle3Config(**SMALL_SHAPE))
    store.publish(draft, record={})
    wait(lambda: live._reloader._ready)
    live.before_round()
    for number in range(rounds):
        client = number // 32 % clients
        changes: dict[str, Any] = {**(before or {})} if client else {"num_accepted": 0, **of_output}
        bad = dataclasses.replace(output, request_id=f"after {number // 32}", **changes)
        live.after_round([bad], [TrafficKind(client=str(client))])
    if live.num_rollbacks:
        wait(lambda: live._reloader._ready)
        live.before_round()
    live.close()
    assert engine.swaps[0] == ("draft-000001", "draft-000001", False)
    assert engine.swaps[1:] == [(None, "good", True)] * live.num_rollbacks, "nothing of the bad one's cache is kept"
    return live


def test_weighed_rounds_are_judged_by_their_first_choice_proposed_or_not(store: DraftStore) -> None:
    """A draft that is less sure proposes less, which is no fault of it."""
    right = {"tested_choices": (1, 1)}
    unsure = {"num_proposed": 0, "num_accepted": 0, "token_ids": (7,)}
    assert judged(store, before=right, **unsure, **right).num_rollbacks == 0


def test_a_draft_whose_unproposed_first_choices_are_wrong_is_rolled_back(store: DraftStore) -> None:
    nothing = {"num_proposed": 0, "num_accepted": 0, "token_ids": (7,)}
    assert judged(store, before={"tested_choices": (1, 1)}, **nothing, tested_choices=(1, 0)).num_rollbacks == 1


def test_a_draft_that_is_wrong_a_little_more_often_where_it_is_weighed_is_rolled_back(store: DraftStore) -> None:
    """Two of three choices were right, now half of them are; as much is proposed."""
    worse = {"num_proposed": 3, "num_accepted": 1, "token_ids": (7, 7)}
    live = judged(store, before={"tested_choices": (3, 2)}, **worse, tested_choices=(2, 1), rounds=1000)
    assert live.num_rollbacks == 1


@pytest.mark.parametrize(("of_output", "rollbacks"), [({}, 1), ({"only_copied": True}, 0)])
def test_only_proposals_of_the_draft_count_in_a_trial(
    of_output: dict[str, Any], rollbacks: int, store: DraftStore
) -> None:
    assert judged(store, **of_output).num_rollbacks == rollbacks


@pytest.mark.parametrize(
    ("num_tokens", "more", "rollbacks"),
    [
        (1, {"num_accepted": 1}, 0),
        (2, {"num_accepted": 1}, 1),  # the target's own token follows, so it has rejected a proposal
        (0, {"num_accepted": 0}, 0),
        (2, {"num_proposed": 9, "num_accepted": 2, "first_choices": (3, 2)}, 0),  # of a tree
        (2, {"num_proposed": 9, "num_accepted": 2, "first_choices": (3, 1)}, 1),
    ],
)
def test_proposals_that_the_end_of_a_request_cut_off_do_not_count_against_a_draft(
    num_tokens: int, more: dict[str, Any], rollbacks: int, store: DraftStore
) -> None:
    of_output = {"token_ids": (1,) * num_tokens, "finish_reason": "length", **more}
    assert judged(store, **of_output).num_rollbacks == rollbacks


def test_plain_rounds_do_not_take_the_place_of_what_the_draft_before_has_shown(store: DraftStore) -> None:
    assert judged(store, plain_rounds=4096).num_rollbacks == 1


def test_a_draft_that_is_worse_for_one_of_two_clients_serves_on_with_an_alarm(store: DraftStore) -> None:
    live = judged(store, rounds=1200, clients=2)
    assert (live.num_rollbacks, live.num_alarms) == (0, 1), "once for a version"
    assert live.alarm is not None
    assert live.alarm.version == "draft-000001"
    assert "fewer of its tokens were right" in live.alarm.reason
