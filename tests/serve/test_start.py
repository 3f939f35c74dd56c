"""How a server starts: the engine first, each process with what it needs, the learner once requests are answered."""

from __future__ import annotations

import errno
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import child_environment

from aurora_lit.bench.servers import free_port
from aurora_lit.config import load_config
from aurora_lit.errors import AuroraError, ConfigError, SourceError
from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.models.tokenizer import is_kept
from aurora_lit.serve import backend, server

HEAVY = ("torch", "transformers", "lightning", "scipy", "numpy")


def run(code: str, *arguments: str) -> str:
    """What a new interpreter prints; it must end with exit code 0."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=child_environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A tiny target with a tokenizer."""
    from support.fake_engine import tiny_tokenizer

    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_engine_is_started_before_anything_heavy_is_imported() -> None:
    code = f"""
import json, sys
from aurora_lit.cli.main import main
import aurora_lit.serve.server as server
from aurora_lit.serve.backend import Backend

def start(*_):
    print(json.dumps(sorted({{"litserve", "fastapi", "uvicorn", *{HEAVY!r}}} & set(sys.modules))))
    raise SystemExit(0)

server.start_engine_processes = start
server.real_backend = lambda: Backend(prepare=lambda config: None, build_worker=None, load_tokenizer=None)
main(["serve", "server.port={free_port()}"])
"""
    assert json.loads(run(code)) == []


def test_the_main_and_http_processes_contain_no_torch(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is a fork of the other. Imports and builds all of both, and prepares a request as the HTTP process does."""
    monkeypatch.setattr(backend, "START_METHOD", "fork")
    monkeypatch.setenv("AURORA_LIT_CACHE", str(tmp_path / "cache"))
    overrides = [f"target.source={model}"]
    backend.prepare(load_config(None, overrides))
    code = f"""
import json, pathlib, socket, sys
from aurora_lit.cli.main import main
from aurora_lit.config import load_config
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.serve import backend, server
from aurora_lit.serve.http.schema import ChatRequest
from aurora_lit.serve.http.tokenize import Limits, prepare_chat

folder = pathlib.Path(sys.argv[1])
config = load_config(None, sys.argv[2:])
real = backend.real_backend()
real.prepare(config)
status = EngineStatusPage.create(folder / STATUS_NAME)
LearnerStatusPage.create(folder / LEARNER_STATUS_NAME)
litserver = server._build(config, real, folder, [], socket.socketpair()[0], status)
litserver.app.openapi()
body = ChatRequest.model_validate({{"messages": [{{"role": "user", "content": "hello"}}]}})
limits = Limits(max_seq_len=512, vocab_size=300, longest_token=16)
call = prepare_chat(body, call_id="c", tokenizer=real.load_tokenizer(config), limits=limits).call
assert call.requests[0].prompt_ids
print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))
"""
    assert json.loads(run(code, str(tmp_path), *overrides)) == []


def test_the_engine_worker_contains_no_web_framework_and_nothing_of_sharding() -> None:
    code = """
import json, sys
import aurora_lit.serve.engine_process, aurora_lit.serve.worker.build, aurora_lit.serve.worker.loop
import aurora_lit.serve.worker.live_draft
unused = {"litserve", "fastapi", "uvicorn", "lightning", "aurora_lit.distributed"}
print(json.dumps(sorted(unused & set(sys.modules))))
"""
    assert json.loads(run(code)) == []


def test_what_is_missing_is_fetched_in_a_process_of_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "START_METHOD", "fork")
    monkeypatch.setenv("AURORA_LIT_CACHE", str(tmp_path))
    overrides = [f"target.source={model}"]
    assert not is_kept(model, cache_dir=tmp_path)
    backend.prepare(load_config(None, overrides))
    assert is_kept(model, cache_dir=tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        backend.prepare(load_config(None, [f"target.source={tmp_path / 'nothing'}"]))

    def die(*_: object) -> None:
        raise SystemExit(7)

    monkeypatch.setattr(backend, "_prepare_in_child", die)
    with pytest.raises(AuroraError, match="exit code 7"):
        backend.prepare(load_config(None, [f"target.source={tmp_path / 'nothing'}"]))


class Learner:
    """Records when it is started."""

    def __init__(self) -> None:
        self.started = threading.Event()

    def start(self) -> None:
        self.started.set()


@pytest.fixture
def ready_route() -> Iterator[Any]:
    """A server whose /ready answers with the status in `.code`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(httpd.code)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.code = 503  # type: ignore[attr-defined]
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def announcing(ready_route: Any, tmp_path: Path) -> Any:
    """What announces a server that is ready: `begin(settings)` runs it in a thread; its page, learner and route."""
    parts = SimpleNamespace(page=EngineStatusPage.create(tmp_path / "status"), learner=Learner(), route=ready_route)

    def begin(*settings: str) -> threading.Thread:
        config = load_config(None, [f"server.port={ready_route.server_address[1]}", *settings])
        arguments: Any = (config, parts.page, parts.learner)
        thread = threading.Thread(target=server._announce_when_ready, args=arguments, daemon=True)
        thread.start()
        return thread

    parts.begin = begin
    return parts


def test_the_learner_is_started_once_the_server_answers_and_not_before(
    announcing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    thread = announcing.begin("server.page=off")
    time.sleep(0.1)
    assert not announcing.learner.started.is_set(), "the engine still loads"
    announcing.page.write(state=WorkerState.READY)
    time.sleep(0.1)
    assert not announcing.learner.started.is_set(), "the engine is ready, but nobody answers requests yet"
    assert capsys.readouterr().out == ""
    announcing.route.code = 200
    thread.join(5)
    assert announcing.learner.started.is_set()
    said = capsys.readouterr().out
    assert "aurora-lit serves" in said
    assert "watch it" not in said


def test_a_server_of_all_addresses_is_ready_where_the_machine_has_no_ipv6_for_itself(
    announcing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    announcing.page.write(state=WorkerState.READY)
    announcing.route.code = 200
    announcing.begin("server.host=::").join(5)
    assert announcing.learner.started.is_set()
    assert "http://[::]:" in capsys.readouterr().out


def test_the_learner_is_started_even_if_nobody_can_be_told_the_url(
    announcing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(server, "print", refuse, raising=False)
    announcing.page.write(state=WorkerState.READY)
    announcing.route.code = 200
    announcing.begin().join(5)
    assert announcing.learner.started.is_set()


def test_no_learner_is_started_if_the_engine_cannot_be_built(announcing: Any) -> None:
    announcing.page.write(state=WorkerState.FAILED)
    thread = announcing.begin()
    thread.join(5)
    assert not thread.is_alive()
    assert not announcing.learner.started.is_set()


def test_as_many_connections_as_the_user_may_open_are_allowed() -> None:
    code = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)))
from aurora_lit.serve import server
server._allow_open_files()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
assert 64 < soft == hard
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
server._OPEN_FILES = 100
server._allow_open_files()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard), "never fewer than there were"
"""
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True)


def test_no_process_of_a_server_leaves_its_memory_in_a_core_file() -> None:
    code = """
import resource, subprocess
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
from aurora_lit.ipc.process_lifetime import forbid_core_dumps
from aurora_lit.serve import server
def stop(*_):
    print(resource.getrlimit(resource.RLIMIT_CORE)[0])
    raise SystemExit(0)
server.check_address = stop
from aurora_lit.settings import AuroraConfig
server.serve(AuroraConfig(), backend=object())
"""
    assert run(code) == "0\n"


def test_a_machine_without_ipv6_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(family: int) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(server.socket, "socket", refuse)
    with pytest.raises(ConfigError, match=r"server.port=8000 on :: cannot be used .*not supported.*server.host"):
        server.check_address("::", 8000)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [(["server.host=0.0.0.0"], True), (["server.host=0.0.0.0", "server.api_key=k"], False), ([], False)],
)
def test_a_server_that_is_open_to_everyone_says_so(
    settings: list[str], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare(_: object) -> None:
        raise SourceError("no model")

    unstarted: Any = SimpleNamespace(prepare=prepare)
    with pytest.raises(SourceError):
        server.serve(load_config(None, [f"server.port={free_port()}", *settings]), backend=unstarted)
    assert ("set server.api_key" in caplog.text) is warns


@pytest.mark.parametrize("was_ready", [True, False])
def test_an_engine_that_fails_as_soon_as_it_was_ready_ends_the_server(
    was_ready: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the watch has seen it ready. One that could not be built is the main thread's to tell."""
    status = EngineStatusPage.create(tmp_path / "status")
    status.write(state=WorkerState.FAILED, started_ns=1 if was_ready else 0, error="injected")
    watch = SimpleNamespace(poll=lambda: "the engine worker died", kill=lambda: None)
    signals: list[int] = []
    monkeypatch.setattr(server, "RankWatch", lambda *_: watch)
    monkeypatch.setattr(server, "WORKER_GRACE_S", 0.0)
    monkeypatch.setattr(server.os, "kill", lambda _, number: signals.append(number))
    processes: Any = SimpleNamespace(inference_workers=[], http_processes=[])
    server._end_when_a_child_ends(processes, status, tmp_path, threading.Event())
    assert signals == ([signal.SIGTERM] if was_ready else [])
