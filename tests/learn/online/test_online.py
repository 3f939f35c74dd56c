"""The learner: it improves a draft on traffic, publishes through the gate, follows rollbacks, survives being killed."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.learner_harness import Server, World
from support.live_traces import a_steering, online_module, serve, some_requests
from support.tiny_models import random_draft

from aurora_lit.config import load_config
from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import STATUS_NAME, StatusBlock
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.learn.data.labelled_trace import online_batch, read_lesson
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.budget import Budget, Load
from aurora_lit.learn.online.gate import HeldOut, judge
from aurora_lit.learn.online.learner import PATIENCE_TRIALS, STARTING_VERSION, Learner
from aurora_lit.learn.online.process import niceness
from aurora_lit.models.target import Target
from aurora_lit.modules.domains.detector import DomainDetector
from aurora_lit.modules.domains.lr_schedule import DomainSignal, SignalRange
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.traces.record import Trace, to_bytes


@pytest.fixture(scope="module")
def traffic(target: Target) -> list[Trace]:
    """Few prompts asked often: what a draft of a random target can learn. Some rounds explore, some requests draw."""
    asked = [*some_requests(10), *some_requests(4, seed=1, temperature=0.5)]
    requests = [replace(r, request_id=f"{n}-{r.request_id}") for n in range(4) for r in asked]
    draft = random_draft(target)
    return serve(target, draft, requests, explore_share=0.5, explore_temperature=1.0, explore_seed=1)


def accepted_length(target: Target, draft: Draft) -> float:
    """Tokens a round that the engine itself gets with a draft on known greedy prompts."""
    traces = serve(target, draft, some_requests(10))
    accepted = torch.cat([trace.num_accepted_R for trace in traces])
    return 1 + float(accepted.float().mean())


@pytest.fixture(scope="module")
def learned(target: Target, traffic: list[Trace], tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Draft]:
    """A world that has published twice, and the second draft."""
    world = World(target, tmp_path_factory.mktemp("world"), publish_every_steps=40)
    world.ring.records.extend(traffic * 12)  # as if it were asked again and again
    world.tick_until(lambda: world.loop.published >= 2)
    return world, world.served_draft("draft-000002")


def test_a_draft_gets_better_on_traffic_and_is_published_through_the_gate(
    target: Target, traffic: list[Trace], learned: tuple[World, Draft]
) -> None:
    world, draft = learned
    name = "draft-000002"
    before, after = accepted_length(target, world.starting), accepted_length(target, draft)
    assert after > before + 0.3, (before, after)
    record = world.store.versions()[1].record
    assert record["score"] > record["champion_score"]
    page = world.page.read()
    assert (page.records, page.skipped, page.published) == (12 * len(traffic) - len(world.ring.records), 0, 2)
    assert page.version == name
    assert page.steps == world.learner.steps >= 80
    assert world.loop.records > 0
    remembered = {trace.request_id for _ in range(300) if (trace := world.loop.feed.reservoir.sample())}
    held_out = {request.request_id for request in world.loop.held_out}
    assert len(remembered) > 20
    assert not remembered & held_out


def test_the_gate_holds_back_a_draft_that_got_worse(
    target: Target, traffic: list[Trace], learned: tuple[World, Draft], tmp_path: Path
) -> None:
    world = World(target, tmp_path, draft=learned[1])
    world.ring.records.extend(traffic * 8)
    with torch.no_grad():
        world.learner.draft.lm_head.weight.zero_()  # and it does not learn
    for group in (g for optimizer in world.learner.optimizers for g in optimizer.param_groups):
        group["lr"] = group["initial_lr"] = 0.0
    for schedule in world.learner.schedules:
        schedule.base_lrs = [0.0]
    world.tick_until(lambda: world.loop.refused_by_gate >= 1)
    assert world.store.current() is None
    assert world.loop.published == 0
    assert world.page.read().gate_refused == 1


def test_after_a_rollback_the_learner_goes_on_from_what_is_served_now(learned: tuple[World, Draft]) -> None:
    world, _ = learned
    first, second = (version.name for version in world.store.versions())
    world.loop._follow_versions()
    assert world.learner.version == second
    world.store.roll_back(bad=second, reason="test")
    world.loop._follow_versions()
    assert world.learner.version == first
    served = world.served_draft(first).state_dict()
    assert all(torch.equal(tensor, served[name]) for name, tensor in world.learner.draft.state_dict().items())
    assert not any(optimizer.state for optimizer in world.learner.optimizers)

    # Somebody else's newer draft is a champion to beat, not a place to go on from.
    forced = world.served_draft(first)
    with torch.no_grad():
        forced.lm_head.weight.zero_()
    world.store.publish(forced, record={})
    mine = copy.deepcopy(world.learner.draft.state_dict())
    world.loop._follow_versions()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in world.learner.draft.state_dict().items())
    assert not world.loop._champion.draft.lm_head.weight.any()


def test_poisoned_traces_are_counted_and_teach_nothing(target: Target, traffic: list[Trace], tmp_path: Path) -> None:
    world = World(target, tmp_path)
    huge = replace(traffic[0], request_id="a", aux_T3H=torch.full_like(traffic[0].aux_T3H, 3e38))
    other = traffic[1]
    foreign = replace(
        other,
        aux_T3H=torch.cat([other.aux_T3H] * 2, -1),
        last_TH=torch.cat([other.last_TH] * 2, -1),
        rejected_last_NH=torch.cat([other.rejected_last_NH] * 2, -1),
    )
    bad = [b"", b"no trace", to_bytes(traffic[0])[:-7], to_bytes(traffic[0]).replace(b"aux", b"axu", 1)]
    world.ring.records.extend([*bad, foreign, huge])
    before = copy.deepcopy(world.learner.draft.state_dict())
    for _ in range(12):
        world.loop.tick()
    assert world.loop.skipped + world.learner.poisoned >= len(bad) + 2
    assert world.page.read().skipped >= len(bad) + 2
    assert world.learner.steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in world.learner.draft.state_dict().items())
    world.ring.records.extend(t for t in traffic if not HeldOut.takes(t.request_id))
    world.tick_until(lambda: world.learner.steps >= 3)


def test_a_batch_that_is_not_finite_leaves_the_learner_as_it_was(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    ends, module = TargetHead(target), online_module(target, random_draft(target))
    learner = Learner(module, a_steering(), tmp_path / "s", ends=ends, version="start")
    lesson = read_lesson(traffic[0], ends)
    aux_T3H = lesson.trace.aux_T3H.clone()
    aux_T3H[4, 0] = float("nan")
    before = copy.deepcopy(learner.draft.state_dict())
    poison = replace(lesson, trace=replace(lesson.trace, aux_T3H=aux_T3H))
    assert learner.update(online_batch([poison], [], oldest_fresh=0)) is None
    assert (learner.poisoned, learner.steps) == (1, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.draft.state_dict().items())
    assert learner.update(online_batch([lesson], [], oldest_fresh=0)) is not None
    assert any(not torch.equal(tensor, before[name]) for name, tensor in learner.draft.state_dict().items())


def test_what_is_tried_is_the_running_average_of_the_weights(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    ends, start = TargetHead(target), random_draft(target)
    batch = online_batch([read_lesson(trace, ends) for trace in traffic[:6]], [], oldest_fresh=0)
    learner = Learner(
        online_module(target, copy.deepcopy(start)),
        a_steering(),
        tmp_path / "s",
        ends=ends,
        version="start",
        ema_decay=0.8,
    )

    def averaged() -> dict[str, torch.Tensor]:
        with learner.averaged() as module:
            assert module.draft is learner.draft
            return copy.deepcopy(module.draft.state_dict())

    expected = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    for _ in range(4):
        learner.update(batch)
        for name, tensor in learner.draft.state_dict().items():
            if tensor.is_floating_point():
                expected[name].mul_(0.8).add_(tensor, alpha=0.2)
    for name, tensor in averaged().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    with learner.averaged():
        pass
    assert not torch.equal(learner.draft.lm_head.weight, expected["lm_head.weight"]), "learning has its own weights"
    learner.restart_from(start, version="start")
    assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in averaged().items())


def test_a_resumed_learner_goes_on_as_if_it_had_not_stopped(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    ends = TargetHead(target)
    batch = online_batch([read_lesson(trace, ends) for trace in traffic[:6]], [], oldest_fresh=0)

    def a_learner(seed: int) -> Learner:
        steering = a_steering(detector=DomainDetector(max_domains=4, novelty=0.7), min_lr_factor=0.1)
        module = online_module(target, random_draft(target, seed=seed))
        return Learner(module, steering, tmp_path / "state", ends=ends, version="start", ema_decay=0.9)

    first = a_learner(0)
    assert not first.resume(), "there is nothing yet"
    for trace in traffic[:6]:
        first.steering.place(trace)
    for _ in range(3):
        first.update(batch)
    first.version = "draft-000004"
    first.save()
    again = a_learner(5)
    assert again.resume()
    assert (again.version, again.steps, again.positions) == ("draft-000004", 3, first.positions)
    assert again.steering.describe() == first.steering.describe()
    assert 0 < again.steering.heat == first.steering.heat < 0.9
    for learner in (first, again):
        learner.update(batch)
    with first.averaged(), again.averaged():
        averages = [copy.deepcopy(learner.draft.state_dict()) for learner in (first, again)]
    for mine, its in [(first.draft.state_dict(), again.draft.state_dict()), averages]:
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, its[name], msg=name)

    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(whole[: len(whole) // 2])
    assert not a_learner(5).resume(), "a file cut short is no state"
    (tmp_path / "state").write_bytes(whole)
    other = online_module(target, random_draft(target, intermediate_size=96))
    assert not Learner(other, a_steering(), tmp_path / "state", ends=ends, version="start").resume()


@pytest.mark.parametrize(
    ("load", "activity", "records"),
    [
        (Load.SPARE, "resting: its share is used up", 5),
        (Load.FULL, "yielding to requests", 0),
        (Load.QUEUEING, "yielding to requests", 0),
    ],
)
def test_the_loop_rests_while_its_share_is_used_up_and_reads_on_where_that_is_in_nobodys_way(
    target: Target, traffic: list[Trace], tmp_path: Path, load: Load, activity: str, records: int
) -> None:
    world = World(target, tmp_path)
    spent = 0.0
    world.loop._budget = Budget(share=0.001, full_load_share=0.001, minimum_share=0.0, cpu_s=lambda: spent)
    spent, world.load = 100.0, load
    world.ring.records.extend(traffic[:5])
    for _ in range(3):
        world.loop.tick()
    assert (world.learner.steps, world.loop.records, len(world.naps)) == (0, records, 3)
    assert world.page.read().activity == activity
    assert max(world.naps) <= 0.2


def test_a_learner_that_is_refused_again_and_again_goes_back_to_the_served_draft_at_half_the_rate(
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(target, tmp_path, publish_every_steps=2)
    passed = [False]
    monkeypatch.setattr(
        "aurora_lit.learn.online.gate.judge",
        lambda newest, by_domain: replace(judge(newest, by_domain), passed=passed[0]),
    )
    start = copy.deepcopy(world.learner.draft.state_dict())
    world.ring.records.extend(traffic * 4)

    def as_at_the_start() -> bool:
        return all(torch.equal(tensor, start[name]) for name, tensor in world.learner.draft.state_dict().items())

    world.tick_until(lambda: world.loop.refused_by_gate == PATIENCE_TRIALS - 1)
    assert not as_at_the_start()
    assert world.learner.schedules[0].backoff == 1
    world.tick_until(lambda: world.loop.refused_by_gate == PATIENCE_TRIALS)
    assert as_at_the_start()
    assert [schedule.backoff for schedule in world.learner.schedules] == [0.5, 0.5]
    passed[0] = True
    world.tick_until(lambda: world.loop.published == 1)
    assert [schedule.backoff for schedule in world.learner.schedules] == [1, 1]
    assert not as_at_the_start(), "one that passes is gone on from"


def test_the_page_says_which_cores_learning_takes_while_it_takes_them(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    world = World(target, tmp_path, threads=3)
    seen: list[int] = []
    world.outside.sleep = lambda _: seen.append(world.page.peek("busy_threads"))
    world.loop.tick()  # nothing to do
    learn = world.learner.update

    def update(batch: Any) -> Any:
        seen.append(world.page.peek("busy_threads"))
        return learn(batch)

    world.learner.update = update  # type: ignore[method-assign]
    world.ring.records.extend(traffic[:10])
    world.loop.tick()
    assert seen == [0, 3]
    assert world.page.peek("busy_threads") == 0


def test_a_full_disk_is_said_and_learning_goes_on(
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(target, tmp_path, publish_every_steps=2, save_every_s=0.1)
    (tmp_path / "learner.tmp").mkdir()  # nothing can be written there

    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.store, "publish", full)
    monkeypatch.setattr(
        "aurora_lit.learn.online.gate.judge", lambda newest, by_domain: replace(judge(newest, by_domain), passed=True)
    )
    world.ring.records.extend(traffic * 4)
    errors = set()

    def said_both() -> bool:
        errors.add(world.page.read().error[:24])
        return len(errors) == 3

    world.tick_until(said_both)
    assert errors == {"", "a draft could not be pub", "the learner's state coul"}
    steps = world.learner.steps
    world.tick_until(lambda: world.learner.steps > steps)
    assert (world.loop.published, world.learner.version) == (0, STARTING_VERSION)


def test_domains_set_the_rate_the_replay_and_the_losss_weights_and_are_shown(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    signals = SignalRange(
        cold=DomainSignal(explore_share=0.0, explore_temperature=1.0, entropy_weight=0.0, replay_share=0.5),
        hot=DomainSignal(explore_share=0.2, explore_temperature=2.0, entropy_weight=0.1, replay_share=0.25),
    )
    detector = DomainDetector(max_domains=4, novelty=0.7)
    steering = a_steering(detector=detector, signals=signals, warmup_steps=0, min_lr_factor=0.5, decay_tokens=600.0)
    world = World(target, tmp_path, steering=steering, publish_every_s=3600.0)
    module = world.learner.module.module

    def learn(traces: Sequence[Trace]) -> tuple[float, float, float, float]:
        """The rate that is set, and what the last batch was made with."""
        world.ring.records.extend(traces)
        steps = world.learner.steps
        world.tick_until(lambda: world.learner.steps == steps + 1)
        (rate,) = {group["lr"] for optimizer in world.learner.optimizers for group in optimizer.param_groups}
        return rate, world.loop.feed.replay_share, module.online.entropy_weight, module.online.replay_weight

    chat = [trace for trace in traffic if trace.domain == "chat"]
    first = learn(chat[:8])
    assert first[1:] == pytest.approx((0.25, 0.1, 1 / 3)), "all is new"
    for n in range(1, 6):
        last = learn(chat[8 * n : 8 * n + 8])
    assert last == pytest.approx((0.5 * 4e-3, 0.5, 0.0, 1.0), abs=0.08)
    page = world.page.read()
    assert page.domains.startswith("chat 100% (heat 0.0")
    assert page.rate_factor == pytest.approx(0.5, abs=0.03)
    assert page.explore_share == pytest.approx(0.0, abs=0.01)

    code = [replace(trace, domain="code", request_id=f"code{n}") for n, trace in enumerate(chat[:12])]
    rates = [learn(code[4 * n : 4 * n + 4])[0] for n in range(3)]
    assert max(rates) > 1.1 * last[0], "the new domain is learned faster"
    page = world.page.read()
    assert "code" in page.domains
    assert page.explore_share > 0.01
    assert set(world.loop.feed.reservoir.domains) == {"chat", "code"}


# -- the process ---------------------------------------------------------------------------------------------------


def test_the_nice_value_gives_the_share_beside_busy_processors() -> None:
    for share, threads, cpus in ((0.04, 1, 2), (0.04, 1, 8), (0.01, 1, 2), (0.1, 2, 4)):
        weight = 1.25 ** -niceness(share=share, threads=threads, cpus=cpus)
        assert threads / cpus * weight / (1 + weight) == pytest.approx(share, rel=0.12), "steps are 25 %"
    assert niceness(share=0.9, threads=1, cpus=64) == 1, "always behind serving"
    assert niceness(share=0.001, threads=1, cpus=1) == 19


@pytest.fixture
def server(folder: Path, target: Target, tmp_path: Path) -> Server:
    return Server(tmp_path, folder, random_draft(target))


def test_a_killed_learner_resumes_and_publishes_and_leaves_with_its_server(
    server: Server, traffic: list[Trace]
) -> None:
    for trace in traffic:
        assert server.ring.push(to_bytes(trace))
    learner = server.start_learner()
    server.wait(learner, lambda: server.page.read().steps >= 6 and (server.store.folder / "learner.ckpt").exists())
    assert server.page.read().state == "running"
    assert os.sched_getscheduler(learner.pid) == os.SCHED_BATCH
    assert os.getpriority(os.PRIO_PROCESS, learner.pid) == 1
    autogroup = Path(f"/proc/{learner.pid}/autogroup")
    assert not autogroup.exists() or autogroup.read_text().endswith("nice 1\n"), "its session too"
    learner.kill()
    learner.communicate()
    killed = server.page.read()
    assert killed.state == "dead"
    saved = torch.load(server.store.folder / "learner.ckpt", weights_only=True)["steps"]
    assert 1 <= saved <= killed.steps

    learner = server.start_learner()
    server.wait(learner, lambda: server.page.read().pid == learner.pid and server.page.read().activity != "loading")
    assert server.page.read().steps >= saved, "what was saved is not learned again"
    assert (server.run_folder / "reservoir").is_dir()
    assert server.page.read().records == killed.records, "what was read is not read again"
    for trace in traffic * 2:
        assert server.ring.push(to_bytes(trace))
    server.wait(learner, lambda: server.page.read().published > killed.published)
    assert (server.store.current() or "").startswith("draft-")
    assert server.page.read().state == "running"
    assert list((server.folder / "logs").rglob("metrics.csv"))
    for left in server.run_folder.iterdir():
        if left.is_file():
            left.unlink()
    (server.run_folder / "reservoir").rename(server.folder / "gone")
    server.run_folder.rmdir()
    output, _ = learner.communicate(timeout=60)
    assert learner.returncode == 0, output[-3000:]
    assert server.page.read().state == "absent"


def test_a_learner_that_is_asked_to_leave_does_so_in_order(server: Server) -> None:
    learner = server.start_learner()
    server.wait(learner, lambda: server.page.read().activity == "waiting for traces")
    learner.send_signal(signal.SIGTERM)
    output, _ = learner.communicate(timeout=60)
    assert learner.returncode == 0, output[-3000:]
    assert server.page.read().state == "absent"
    assert (server.store.folder / "learner.ckpt").exists()


def test_learning_from_scratch_publishes_an_untrained_draft_of_the_same_shape(server: Server, target: Target) -> None:
    from aurora_lit.learn.online.build import build_loop

    config = load_config(None, [*server.overrides, "learn.from_scratch=true"])
    status = StatusBlock.open(server.run_folder / STATUS_NAME)
    with build_loop(config, server.run_folder, server.run_folder / RING_NAME, server.page, status) as loop:
        assert server.store.current() == loop.learner.version == "draft-000001"
        draft = load_draft(server.store.folder / "draft-000001", target)
    configured = load_draft(server.folder / "start", target)
    shapes = {name: tensor.shape for name, tensor in configured.state_dict().items()}
    assert {name: tensor.shape for name, tensor in draft.state_dict().items()} == shapes
    assert torch.equal(draft.draft_token_ids, configured.draft_token_ids)
    assert not torch.allclose(draft.lm_head.weight, configured.lm_head.weight, atol=0.01)


def test_without_a_draft_or_a_server_it_is_said_what_to_do(server: Server, tmp_path: Path) -> None:
    from aurora_lit.learn.online.build import build_loop

    config = load_config(None, [*server.overrides, "draft.checkpoint=null"])
    status = StatusBlock.open(server.run_folder / STATUS_NAME)
    with (
        pytest.raises(AuroraError, match="learn.from_scratch=true"),
        build_loop(config, server.run_folder, server.run_folder / RING_NAME, server.page, status),
    ):
        pass
    with (
        pytest.raises(AuroraError, match="is the server running"),
        build_loop(config, tmp_path, tmp_path / RING_NAME, server.page, status),
    ):
        pass
