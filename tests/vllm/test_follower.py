"""Published drafts are validated outside the engine, swapped in on all ranks, and taken back when they are worse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.fake_drafts import SMALL_SHAPE
from support.made_vllm import made_deployment
from support.spoiled_drafts import SPOILED, Spoiled

from aurora_lit.drafts.checkpoint import save_draft
from aurora_lit.drafts.live_watch import TrafficKind
from aurora_lit.drafts.store import DraftStore
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft
from aurora_lit.vllm import follower
from aurora_lit.vllm.capture import Capture, RequestInfo, RoundOutcome
from aurora_lit.vllm.deployment import Deployment
from aurora_lit.vllm.follower import DraftFollower, follow
from aurora_lit.vllm.live_status import LiveStatus

SHAPE = Eagle3Config(**SMALL_SHAPE)
START_RPC, SWAP_RPC, NOTE_RPC = "aurora_lit_start", "aurora_lit_swap", "aurora_lit_note"


class MadeRanks:
    """An engine's client and workers: what they were told, and errors that they answer with."""

    def __init__(self, *, engine: int | None = None) -> None:
        """engine: the one that is reached; None: all, with vLLM's own load balancer."""
        parallel = SimpleNamespace(
            local_engines_only=engine is not None, data_parallel_index=engine or 0, data_parallel_size_local=1
        )
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.errors: dict[str, str] = {}
        """By version or method, what rank 1 answers."""
        self.seconds = 0.0
        """That rank 1 takes for a swap; an earlier pipeline stage, such as rank 0, loads nothing."""
        self.on_swap: Callable[..., None] = lambda version, *, trusted: None
        self.sleeping = [False]
        """Of each data-parallel engine."""
        self.asked = 0
        """How often `is_sleeping` was called."""

    async def collective_rpc(self, method: str, timeout: float | None, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        """As vLLM's AsyncLLM."""
        self.calls.append((method, args))
        if method == SWAP_RPC:
            self.on_swap(args[1], trusted=args[2])
        key = args[1] if method == SWAP_RPC else method
        return [{"error": None, "seconds": 0.0}, {"error": self.errors.get(key), "seconds": self.seconds}]

    async def is_sleeping(self) -> bool:
        """As vLLM's AsyncLLM: `call_utility_consensus_async` of vllm/v1/engine/core_client.py."""
        self.asked += 1
        if len(set(self.sleeping)) > 1:
            raise RuntimeError(f"Engines returned different is_sleeping results: {self.sleeping}")
        return self.sleeping[0]

    @property
    def swaps(self) -> list[tuple[str, bool]]:
        """Version of each swap, and whether it was trusted."""
        return [(args[1], args[2]) for method, args in self.calls if method == SWAP_RPC]

    @property
    def refused(self) -> dict[str, Any] | None:
        """The last refusal that was noted."""
        return next((args[0] for method, args in reversed(self.calls) if method == NOTE_RPC), None)


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    """A deployment with a starting draft and no version."""
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    save_draft(Eagle3Draft(SHAPE), tmp_path / "first")
    made = made_deployment(tmp_path / "run", tmp_path)
    EngineStatusPage.create(made.run_folder / STATUS_NAME)
    return made


def store_of(deployment: Deployment) -> DraftStore:
    return DraftStore(deployment.versions)


def run_with(deployment: Deployment, ranks: MadeRanks, scenario: Callable[[], Awaitable[None]]) -> None:
    """A follower, while `scenario` runs."""

    async def both() -> None:
        task = asyncio.create_task(DraftFollower(deployment, ranks).run())
        try:
            await asyncio.wait_for(scenario(), 20)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(both())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def publish_another(store: DraftStore, ranks: MadeRanks, *, swaps: int) -> None:
    """After the first swap; returns after so many in all."""
    await until(lambda: len(ranks.swaps) == 1)
    store.publish(Eagle3Draft(SHAPE), record={})
    await until(lambda: len(ranks.swaps) == swaps)


def test_a_published_version_reaches_all_ranks_and_the_first_one_is_the_current(deployment: Deployment) -> None:
    ranks, store = MadeRanks(), store_of(deployment)
    store.publish(Eagle3Draft(SHAPE), record={})

    run_with(deployment, ranks, lambda: publish_another(store, ranks, swaps=2))
    assert ranks.calls[0] == (START_RPC, (str(deployment.run_folder),))
    assert ranks.swaps == [("draft-000001", False), ("draft-000002", False)]


def test_the_time_that_is_told_is_that_of_the_slowest_rank(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    ranks, store = MadeRanks(), store_of(deployment)
    ranks.seconds = 0.25
    store.publish(Eagle3Draft(SHAPE), record={})

    async def scenario() -> None:
        await until(lambda: "draft draft-000001 is served (swapped in 250 ms)" in caplog.text)

    run_with(deployment, ranks, scenario)


def test_while_vllm_sleeps_no_draft_is_swapped_and_then_the_newest(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM has released the weights' memory, and does not refuse the call (vllm/v1/engine/core.py)."""
    monkeypatch.setattr(follower, "LOOK_EVERY_S", 0.01)
    ranks, store = MadeRanks(), store_of(deployment)
    ranks.sleeping = [True, True]
    store.publish(Eagle3Draft(SHAPE), record={})

    async def until_asked_again() -> None:
        asked = ranks.asked
        await until(lambda: ranks.asked >= asked + 2)

    async def scenario() -> None:
        await until_asked_again()
        assert ranks.swaps == []  # not the first one either
        ranks.sleeping = [True, False]  # they wake up one after the other
        await until_asked_again()
        assert ranks.swaps == []
        ranks.sleeping = [False, False]
        await until(lambda: len(ranks.swaps) == 1)
        ranks.sleeping = [True, True]
        for _ in range(2):
            name = store.publish(Eagle3Draft(SHAPE), record={})
            await until(lambda: any(each["version"] == name for each in store.history() if each["event"] == "served"))  # noqa: B023
            await until_asked_again()
        assert len(ranks.swaps) == 1
        ranks.sleeping = [False, False]
        await until(lambda: len(ranks.swaps) == 2)

    run_with(deployment, ranks, scenario)
    assert [version for version, _ in ranks.swaps] == ["draft-000001", "draft-000003"]


@pytest.mark.parametrize("spoiled", SPOILED, ids=lambda each: each.name)
def test_a_draft_that_would_end_the_engine_never_reaches_it(deployment: Deployment, spoiled: Spoiled) -> None:
    ranks, store = MadeRanks(), store_of(deployment)
    name = store.publish(Eagle3Draft(SHAPE), record={})
    (store.folder / "CURRENT").unlink()
    spoiled.spoil(store.folder / name)

    async def scenario() -> None:
        await until(lambda: len(ranks.calls) == 1)
        (store.folder / "CURRENT").write_text(name + "\n")
        await until(lambda: ranks.refused is not None)

    run_with(deployment, ranks, scenario)
    assert ranks.swaps == []
    assert ranks.refused is not None
    assert spoiled.reason in ranks.refused["refused_reason"]
    assert ranks.refused["refused_version"] == name


def test_a_version_that_one_rank_cannot_load_is_taken_back_on_all(deployment: Deployment) -> None:
    ranks, store = MadeRanks(), store_of(deployment)
    ranks.errors["draft-000002"] = "out of memory"
    store.publish(Eagle3Draft(SHAPE), record={})

    run_with(deployment, ranks, lambda: publish_another(store, ranks, swaps=3))
    assert ranks.swaps[1:] == [("draft-000002", False), ("draft-000001", True)]
    last_good = [Path(args[3]).name for method, args in ranks.calls if method == SWAP_RPC]
    assert last_good == ["first", "draft-000001", "draft-000001"]
    assert "out of memory" in (store.versions()[1].retired or "")


def test_a_version_that_another_data_parallel_engine_has_not_loaded_is_taken_back(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM returns what the first engine answers; the others show on their pages what they serve."""
    monkeypatch.setattr(follower, "_STALE_S", 60.0)
    ranks, store = MadeRanks(), store_of(deployment)
    ended, left_behind = (EngineStatusPage.create(deployment.status_path(engine)) for engine in (2, 1))
    ended.write(draft_version="of another start")
    left_behind.write(draft_version="draft-000001")
    left_behind.beat()
    store.publish(Eagle3Draft(SHAPE), record={})

    run_with(deployment, ranks, lambda: publish_another(store, ranks, swaps=3))
    assert ranks.swaps == [("draft-000001", False), ("draft-000002", False), ("draft-000001", True)]
    assert "the engine of status-1 still serves draft-000001" in (store.versions()[1].retired or "")


def test_an_engine_that_has_never_followed_retires_no_version(deployment: Deployment) -> None:
    """Its recorder could not start, or it is what a server that was killed has left behind."""
    ranks, store = MadeRanks(), store_of(deployment)
    stranger = EngineStatusPage.create(deployment.status_path(1))
    stranger.write(draft_version="of another start")
    store.publish(Eagle3Draft(SHAPE), record={})

    async def scenario() -> None:
        for number in (1, 2, 3):
            await until(lambda: len(ranks.swaps) == number)  # noqa: B023
            stranger.beat()
            store.publish(Eagle3Draft(SHAPE), record={})
        await until(lambda: len(ranks.swaps) == 4)

    run_with(deployment, ranks, scenario)
    assert [version for version, _ in ranks.swaps] == [f"draft-{number:06d}" for number in (1, 2, 3, 4)]


def test_a_starting_draft_that_cannot_be_loaded_again_is_told(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    ranks, store = MadeRanks(), store_of(deployment)
    ranks.errors["first"] = "out of memory"
    store.publish(Eagle3Draft(SHAPE), record={})

    async def scenario() -> None:
        await until(lambda: len(ranks.swaps) == 1)
        store.roll_back(bad="draft-000001", reason="by hand")
        await until(lambda: "draft first could not be loaded: out of memory" in caplog.text)

    run_with(deployment, ranks, scenario)


def test_a_version_that_accepts_less_is_rolled_back(deployment: Deployment) -> None:
    """The worker judges (LiveStatus), the page tells the follower, which retires the version."""
    ranks, store = MadeRanks(), store_of(deployment)
    page = EngineStatusPage.open(deployment.run_folder / STATUS_NAME, writable=True)
    capture = Capture(lambda _: None, bytes_per_token=1, limit_bytes=1, segment_tokens=8, overlap_tokens=1)
    step: Any = type("MadeStep", (), {"num_sampled": [1]})()
    status = LiveStatus(page, capture)
    ranks.on_swap = status.swapped

    def rounds(number: int, *, accepted: int, version: int) -> None:
        """In requests of eight rounds."""
        for index in range(number):
            request_id = f"{version}-{index // 8}"
            if index % 8 == 0:
                info = RequestInfo(
                    request_id=request_id, prompt_tokens=1, max_tokens=None, stop_ids=frozenset(), temperature=0.0
                )
                capture.begin(info, position=0)
            outcome = RoundOutcome(
                request_id=request_id,
                traffic=TrafficKind(),
                proposed=3,
                accepted=accepted,
                version=version,
            )
            status.observe(step, [outcome])
            if index % 8 == 7:
                capture.finish([request_id])

    async def scenario() -> None:
        rounds(160, accepted=2, version=0)
        store.publish(Eagle3Draft(SHAPE), record={})
        await until(lambda: len(ranks.swaps) == 1)
        rounds(160, accepted=0, version=1)
        await until(lambda: len(ranks.swaps) == 2)

    run_with(deployment, ranks, scenario)
    assert ranks.swaps[1] == ("first", True)
    assert store.current() is None
    assert "than of the version before" in (store.versions()[0].retired or "")


def test_a_verdict_of_the_engine_before_does_not_retire_a_version_that_was_promoted_since(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "LOOK_EVERY_S", 0.01)
    ranks, store = MadeRanks(), store_of(deployment)
    name = store.publish(Eagle3Draft(SHAPE), record={})
    page = EngineStatusPage.open(deployment.run_folder / STATUS_NAME, writable=True)
    page.write(rollbacks=1, rolled_back_version=name, rolled_back_reason="an older trial")
    later = Eagle3Draft(SHAPE)

    async def scenario() -> None:
        await until(lambda: len(ranks.swaps) == 1)
        await asyncio.sleep(0.1)
        assert store.current() == name
        store.publish(later, record={})
        await until(lambda: len(ranks.swaps) == 2)

    run_with(deployment, ranks, scenario)
    assert [version for version, _ in ranks.swaps] == [name, "draft-000002"]
    assert store.versions()[0].retired is None


def test_an_unknown_vllm_is_one_line_and_nothing_else(deployment: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    ranks = MadeRanks()
    ranks.errors[START_RPC] = "vLLM 9.9 is not known (known: 0.32)"
    store_of(deployment).publish(Eagle3Draft(SHAPE), record={})
    asyncio.run(follow(deployment, ranks))
    assert [method for method, _ in ranks.calls] == [START_RPC]
    (record,) = caplog.records
    assert "no traces are made and no drafts are swapped: vLLM 9.9 is not known" in record.message


def test_of_several_api_servers_one_follows_and_the_others_say_so_once(
    deployment: Deployment, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second vLLM started with the same run folder would be silent otherwise, and keep its draft for ever."""
    monkeypatch.setattr(follower, "_RETRY_S", 0.01)
    ranks, other = MadeRanks(), MadeRanks()

    async def scenario() -> None:
        await until(lambda: len(ranks.calls) == 1)
        second = asyncio.create_task(DraftFollower(deployment, other).run())
        await asyncio.sleep(0.2)
        assert other.calls == []
        second.cancel()

    run_with(deployment, ranks, scenario)
    (told,) = [record.message for record in caplog.records if "another API server" in record.message]
    assert "its own `aurora-lit vllm --attach`, with a checkpoint.run of its own" in told


def test_with_an_external_load_balancer_each_server_follows_with_its_own_engine(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm/v1/engine/core_client.py: DPAsyncMPClient reaches one engine, the other one's server another."""
    monkeypatch.setattr(follower, "_STALE_S", 60.0)
    store, servers = store_of(deployment), [MadeRanks(engine=0), MadeRanks(engine=1)]
    EngineStatusPage.create(deployment.status_path(1))
    for number, server in enumerate(servers):
        page = EngineStatusPage.open(deployment.status_path(number), writable=True)
        page.write(draft_version="first")
        page.beat()
        server.on_swap = lambda version, *, trusted, page=page: page.write(draft_version=version)
    store.publish(Eagle3Draft(SHAPE), record={})
    servers[1].sleeping = [True]  # so that its engine follows later

    async def scenario() -> None:
        second = asyncio.create_task(DraftFollower(deployment, servers[1]).run())
        await publish_another(store, servers[0], swaps=2)
        servers[1].sleeping = [False]
        await until(lambda: len(servers[1].swaps) == 2)
        second.cancel()

    run_with(deployment, servers[0], scenario)
    assert servers[0].swaps == servers[1].swaps == [("draft-000001", False), ("draft-000002", False)]
    assert [each.retired for each in store.versions()] == [None, None]


def test_an_error_of_the_follower_never_reaches_the_server(
    deployment: Deployment, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: Any) -> Any:
        raise ValueError("injected")

    for engine in (MadeRanks(), object()):  # the latter as of a vLLM whose client is another one
        monkeypatch.setattr(MadeRanks, "collective_rpc", broken)
        caplog.clear()
        asyncio.run(follow(deployment, engine))  # type: ignore[arg-type]
        assert "aurora-lit is off; serving is unaffected" in caplog.text
