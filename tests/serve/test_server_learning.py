"""A real server beside a learner that runs, stalls, dies or never starts, and drafts published while it serves."""

import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from click.testing import CliRunner
from support.fake_drafts import publish_draft
from support.fake_engine import FAKE_SHAPE, FakeEngine, FakeOptions
from support.fake_server import MODEL, FakeServer

from aurora_lit.cli import status as live_status
from aurora_lit.cli.main import main
from aurora_lit.config import load_config, logs_folder
from aurora_lit.drafts.centroid_file import CENTROIDS_NAME, write_centroids
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.ipc.run_folder import live_folders
from aurora_lit.modules.domains.centroids import Centroids
from aurora_lit.serve import engine_process, learner_child
from aurora_lit.serve.server import check_learning, settings_for_learner
from aurora_lit.serve.worker.parts import WorkerParts


def answer(server, **options):
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 12, **options}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20, headers=KEY)
    assert response.status_code == 200
    return response.json()


def versions_of(server):
    return answer(server)["metrics"]["speculative_decoding"]["draft_versions"]


def learner_is(state):
    return lambda now: now["learner"]["state"] == state


def test_without_learning_no_learner_is_started_and_opting_out_is_counted():
    with FakeServer() as server:
        now = server.status()
        assert now["learner"]["state"] == "absent"
        answer(server, store=False)
        answer(server)
        server.wait_until(lambda now: now["traces"]["opted_out"] == 1, 5)


def test_a_killed_learner_is_restarted_while_serving_continues_and_commands_see_it():
    with FakeServer(server={"api_key": "secret"}, learner="lives", options={"round_s": 0.002}) as server:
        report = until(lambda: ask(server), learner_is("running"))
        os.kill(report["learner"]["pid"], signal.SIGKILL)
        for _ in range(20):
            assert answer(server)["choices"][0]["text"] == "abc" * 4
        after = until(lambda: ask(server), lambda now: now["learner"]["restarts"] == 1)
        after = until(lambda: ask(server), learner_is("running"))
        assert after["learner"]["pid"] != report["learner"]["pid"]
        assert after["worker"]["pid"] == report["worker"]["pid"]
        assert httpx.get(f"{server.url}/health").status_code == 200
        metrics = httpx.get(f"{server.url}/metrics", headers=KEY).text
        assert 'aurora_learner_restarts_total{engine="0",model_name="tiny"} 1.0' in metrics

        folder = next(each for each in live_folders() if live_status.read(each)["worker"]["pid"] in server.family)
        written = load_config(folder / "config.yaml", [])
        assert written.server.api_key is None
        assert written.draft.checkpoint.startswith("/")
        assert live_status.read(folder)["learner"]["pid"] == after["learner"]["pid"]
        with pytest.raises(AuroraError, match="401 .*; add 'server.api_key=.*oc.env:"):
            live_status.ask(server.url, None)
        shown = CliRunner().invoke(main, ["status", "--run-folder", str(folder)]).stdout
        assert "fake-000001" in shown
        assert "running: pretending" in shown

        server.family.append(after["learner"]["pid"])
        assert server.end()[0] == 0
        assert server.left_behind() == [], "the learner ends with its server"
    assert folder not in live_folders()


@pytest.mark.process
def test_a_stalled_learner_is_reported_and_ends_with_a_server_that_is_killed():
    with FakeServer(learner="stalls") as server:
        server.wait_until(learner_is("stalled"), 20)
        assert answer(server)["choices"][0]["text"] == "abc" * 4
        server.family.append(server.status()["learner"]["pid"])
        os.kill(server.process.pid, signal.SIGKILL)
        assert server.left_behind() == []


@pytest.mark.process
@pytest.mark.parametrize(
    ("behaviour", "state", "cause"), [("dies", "dead", "exit code 3"), ("absent", "absent", "exit code 1")]
)
def test_a_learner_that_fails_is_reported_and_serving_continues(behaviour, state, cause):
    with FakeServer(learner=behaviour) as server:
        server.wait_until(lambda now: now["learner"]["restarts"] >= 1 and now["learner"]["error"] == cause, 20)
        server.wait_until(learner_is(state), 10)
        assert answer(server)["choices"][0]["text"] == "abc" * 4
        assert httpx.get(f"{server.url}/ready").status_code == 200


@pytest.mark.parametrize(
    ("trained_later_s", "is_default", "is_told"), [(60, False, True), (-60, False, False), (60, True, False)]
)
def test_a_draft_that_is_trained_after_the_current_version_is_not_passed_over_in_silence(
    trained_later_s, is_default, is_told, tmp_path, caplog, monkeypatch
):
    """The default one is as new as the package that was installed last."""
    store, folder = publish_draft(tmp_path), tmp_path / "retrained"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.touch()
    trained_s = store.folder.stat().st_mtime + trained_later_s
    os.utime(weights, (trained_s, trained_s))
    config = load_config(None, [f"draft.checkpoint={folder}", f"checkpoint.dir={tmp_path}"])
    if is_default:
        monkeypatch.setattr(engine_process, "load_config", lambda *_: config)
    parts = WorkerParts(engine=FakeEngine(FakeOptions()), load_draft=lambda folder: None)
    engine_process._live_draft(config, parts)
    told = f"draft.checkpoint={folder} is newer than the current version in {store.folder}"
    assert (told in caplog.text) == is_told


def test_published_drafts_are_served_reported_and_rolled_back_by_the_command_line(tmp_path):
    store = publish_draft(tmp_path)
    with FakeServer(checkpoints=tmp_path) as server:
        assert server.status()["draft"] == {
            "version": "draft-000001",
            "gain": None,
            "swaps": 0,
            "refusals": 0,
            "refused": None,
            "rollbacks": 0,
            "rolled_back": None,
            "alarms": 0,
            "alarm": None,
        }
        assert versions_of(server) == ["draft-000001"]
        publish_draft(tmp_path)
        server.wait_until(lambda now: now["draft"]["version"] == "draft-000002", 10)
        assert versions_of(server) == ["draft-000002"]
        bad = store.folder / "draft-000003"
        bad.mkdir()
        (bad / "config.json").write_text("{}")
        store.promote(bad.name)
        server.wait_until(lambda now: now["draft"]["refused"] is not None, 10)
        now = server.status()["draft"]
        assert now["refused"]["version"] == bad.name
        assert "architectures is None" in now["refused"]["reason"]
        assert (now["version"], now["swaps"], now["refusals"]) == ("draft-000002", 1, 1)
        assert CliRunner().invoke(main, ["drafts", "rollback", "0", f"checkpoint.dir={tmp_path}"]).exit_code == 0
        server.wait_until(lambda now: now["draft"]["version"] == "fake-000001", 10)
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'aurora_draft_version{engine="0",model_name="tiny"} 0.0' in metrics
        assert 'aurora_draft_swaps_total{engine="0",model_name="tiny"} 2.0' in metrics


def publish_domains(folder, version, *, name):
    centroids = Centroids(
        names=(name,),
        centroid_DE=torch.ones(1, 24),
        mean_E=torch.zeros(24),
        variance_E=torch.ones(24),
        common=0.0,
        novelty_threshold=0.7,
    )
    write_centroids(folder / "live" / CENTROIDS_NAME, centroids, version=version, target=FAKE_SHAPE)


def test_published_domains_are_served_counted_and_shown(tmp_path):
    publish_domains(tmp_path, 1, name="auto-1")
    with FakeServer(checkpoints=tmp_path) as server:
        assert server.status()["domains"] == {"version": 1, "refused": None, "served": {}}

        def domains(**options):
            return answer(server, **options)["metrics"]["speculative_decoding"]["domains"]

        assert domains() == ["auto-1"]
        assert domains(metadata={"aurora_domain": "code"}) == ["code"]
        publish_domains(tmp_path, 2, name="auto-2")
        server.wait_until(lambda now: now["domains"]["version"] == 2, 10)
        assert domains() == ["auto-2"]
        (tmp_path / "live" / CENTROIDS_NAME).write_bytes(b"torn")
        server.wait_until(lambda now: now["domains"]["refused"] is not None, 10)
        assert domains() == ["auto-2"]
        server.wait_until(lambda now: sum(each["requests"] for each in now["domains"]["served"].values()) == 4, 5)
        served = server.status()["domains"]["served"]
        assert {name: each["generated_tokens"] for name, each in served.items()} == {
            "auto-1": 12,
            "code": 12,
            "auto-2": 24,
        }
        assert served["code"]["mean_accepted_length"] == 3.0
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'aurora_domain_generated_tokens_total{domain="auto-2",engine="0",model_name="tiny"} 24.0' in metrics
        shown = " ".join(CliRunner().invoke(main, ["status", "--url", server.url]).stdout.split())
        assert "auto-2 50 % (accepted length 3.00)" in shown


KEY = {"Authorization": "Bearer secret"}


def ask(server):
    return live_status.ask(server.url, "secret")


def until(reading, condition, timeout_s=20):
    began = time.monotonic()
    while not condition(value := reading()):
        assert time.monotonic() - began < timeout_s, value
        time.sleep(0.02)
    return value


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A learner of the server's that runs a shell command and is started again twice: `child(command, after_s)`."""
    made = []

    def make(command, *, after_s=(0.01, 0.01), program="sh"):
        monkeypatch.setattr(learner_child, "RESTART_AFTER_S", after_s)
        page = LearnerStatusPage.create(tmp_path / "page")
        made.append(learner_child.LearnerChild([program, "-c", command], page))
        made[0].page = page
        return made[0]

    yield make
    made[0].end()


LATER = "not started again for 60 minutes:"


def run_to_its_end(learner):
    """Until it has left, or is started hourly only."""
    learner.start()
    ends = time.monotonic() + 20
    while learner._thread.is_alive() and not learner.page.read().error.startswith("not started"):
        assert time.monotonic() < ends
        time.sleep(0.01)
    return learner.page.read()


@pytest.mark.parametrize(("code", "num_runs"), [(0, 1), (7, 3)])
def test_a_learner_that_exits_cleanly_is_not_restarted_and_one_that_fails_is_restarted_a_few_times(
    code, num_runs, child, tmp_path, caplog
):
    found = run_to_its_end(child(f"echo x >> {tmp_path / 'log'}; exit {code}"))
    assert (tmp_path / "log").read_text() == "x\n" * num_runs
    assert found.restarts == (num_runs if code else 0), "the next one is counted too"
    assert found.error == (f"{LATER} exit code {code}" if code else "")
    assert f"exit code {code}" in caplog.text, "that it left is told too"


def test_a_learner_that_was_given_up_is_started_again_later(child, tmp_path, monkeypatch):
    monkeypatch.setattr(learner_child, "RARELY_S", 0.01)
    learner = child(f"echo x >> {tmp_path / 'log'}; exit 7")
    learner.start()
    ends = time.monotonic() + 10
    while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text()) < 2 * 6:
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_without_memory_the_learner_ends_before_the_server(child, tmp_path):
    told = tmp_path / "told"
    learner = child(f"sleep 0.2; cat /proc/self/oom_score_adj > {told}")
    run_to_its_end(learner)
    assert told.read_text() == "500\n"


@pytest.mark.parametrize(
    ("command", "error", "told"),
    [
        ("kill -9 $$", "", "killed by signal 9"),
        ("kill -9 $$", "the state could not be saved", "killed by signal 9; the state could not be saved"),
        ("exit 1", "the draft is damaged", "the draft is damaged"),
    ],
)
def test_the_end_of_learners_is_told_with_what_each_had_told_itself(command, error, told, child, monkeypatch):
    learner = child(command)
    run_once = learner._run_once
    # Each learner clears the error when it attaches, and one that the kernel kills cannot write its own.
    monkeypatch.setattr(learner, "_run_once", lambda: (learner.page.write(error=error), run_once())[1])
    found = run_to_its_end(learner)
    assert (found.restarts, found.error) == (3, f"{LATER} {told}"), "once"


def test_the_cause_of_the_last_end_is_told_though_that_learner_had_not_attached(child, tmp_path):
    """Such a learner, whose settings are wrong, say, has not cleared what is told of the one before."""
    has_run = tmp_path / "has run"
    found = run_to_its_end(child(f"if [ -e '{has_run}' ]; then exit 3; fi; touch '{has_run}'; kill -9 $$"))
    assert (found.restarts, found.error) == (3, f"{LATER} exit code 3")


def test_faults_of_a_learner_that_had_run_for_long_do_not_add_up(child, monkeypatch):
    monkeypatch.setattr(learner_child, "_SETTLED_S", 0.0)
    learner = child("exit 7")
    learner.start()
    until(lambda: learner.page.read().restarts, lambda restarts: restarts > 4)


def test_a_learner_that_ignores_sigterm_is_killed(child, tmp_path, monkeypatch):
    monkeypatch.setattr(learner_child, "_GRACE_S", 0.2)
    pid = tmp_path / "pid"
    learner = child(f"trap '' TERM; echo $$ > {pid}; for i in $(seq 600); do sleep 0.1; done")
    learner.start()
    until(lambda: pid.exists() and pid.read_text(), bool)
    learner.end()
    assert not psutil.pid_exists(int(pid.read_text()))


def test_a_learner_whose_program_is_missing_does_not_stop_serving(child):
    run_to_its_end(child("", after_s=(), program="/no/such/program"))


def test_a_learner_needs_a_draft_that_is_used():
    for overrides, remedy in [
        (["draft.checkpoint=null"], "learn.from_scratch=true"),
        (["engine.speculate=false"], "engine.speculate=true"),
    ]:
        check_learning(load_config(None, [*overrides, "learn.enabled=false"]))
        with pytest.raises(ConfigError, match=remedy):
            check_learning(load_config(None, [*overrides, "learn.enabled=true"]))
    check_learning(load_config(None, ["draft.checkpoint=null", "learn.from_scratch=true", "learn.enabled=true"]))


def test_a_learner_needs_a_folder_for_its_drafts(tmp_path):
    (tmp_path / "file").touch()
    check_learning(load_config(None, [f"checkpoint.dir={tmp_path / 'new' / 'folder'}", "learn.enabled=true"]))
    for path in (tmp_path / "file", tmp_path / "file" / "in it"):
        check_learning(load_config(None, [f"checkpoint.dir={path}", "learn.enabled=false"]))
        with pytest.raises(ConfigError, match=r"checkpoint\.dir=.*file is no folder"):
            check_learning(load_config(None, [f"checkpoint.dir={path}", "learn.enabled=true"]))


def test_settings_for_a_learner_hold_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    config = load_config(None, ["target.source=model", "server.api_key=secret"])
    for_learner = settings_for_learner(config)
    assert for_learner.target.source == str(tmp_path / "model")
    assert for_learner.checkpoint.dir == str(tmp_path / "checkpoints")
    assert logs_folder(for_learner) == tmp_path / "logs"
    assert Path(for_learner.draft.checkpoint).is_absolute()
    assert for_learner.server.api_key is None
