"""`aurora-lit vllm`: starts vLLM's server with what makes its drafts learn, and a learner beside it.

Owns the run folder, in which vLLM's processes and the learner meet. vLLM may also be started by hand: with --attach the
command prints what to start it with, and keeps the learner beside it. Leaves out what happens inside vLLM (vllm/) and
what a learner does (learn/online/).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import yaml
from prometheus_client import CollectorRegistry, start_http_server

from aurora_lit.config import AuroraConfig, draft_folder, load_config, to_yaml, versions_folder
from aurora_lit.drafts.checkpoint import read_config
from aurora_lit.drafts.export import loadable
from aurora_lit.drafts.versions import PublishedVersions
from aurora_lit.errors import CheckpointError, ConfigError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage, WorkerState
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.ipc.process_lifetime import die_with_parent, handle_ending, module_command
from aurora_lit.ipc.run_folder import CONFIG_NAME, run_folder
from aurora_lit.models.source import find_target, unreadable_weights, with_fixed_target
from aurora_lit.serve.http.metrics import LearnerCollector
from aurora_lit.serve.http.status import ring_counters
from aurora_lit.serve.learner_child import LearnerChild, learner_command
from aurora_lit.serve.server import check_learning, settings_for_learner
from aurora_lit.vllm.deployment import VARIABLE, Deployment

WORKER_EXTENSION = "aurora_lit.vllm.worker.WorkerExtension"
MIDDLEWARE = "aurora_lit.vllm.middleware.Middleware"
PROPOSED_TOKENS = 3
_MODULE = "vllm.entrypoints.openai.api_server"
_SPECULATION_ARGUMENTS = {
    "--spec-method": "method",
    "--spec-model": "model",
    "--spec-tokens": "num_speculative_tokens",
}
"""vLLM's arguments for single fields of its speculative config; it refuses a field that is given twice."""
_SEVERAL_SERVERS = ("--api-server-count", "-asc", "--data-parallel-multi-port-external-lb", "-dpm")
_NO_MIDDLEWARE = ("--grpc", "--grpc-port")
_NO_SERVER = "--headless"
"""Arguments that only `vllm serve` acts on (vllm/entrypoints/cli/serve.py): what is started here would ignore them. The
second ones start a server that loads no middleware, the last one engines for the server of another machine."""
_STARTING_NAME = "starting"
_LOOK_EVERY_S = 0.5


def settings(model: str, draft: Path, overrides: Sequence[str]) -> AuroraConfig:
    """The learner's settings. Raises ConfigError."""
    if model.startswith("-"):
        raise ConfigError(f"{model} stands where MODEL should; name MODEL before vLLM's own arguments")
    base = load_config(None, [])
    ours = [
        f"target.source={model}",
        *([] if model == base.target.source else ["target.sha256=null"]),
        "target.precision=bf16",
        f"draft.checkpoint={draft}",
    ]
    return load_config(None, [*ours, *overrides])


def start(
    config: AuroraConfig,
    vllm_arguments: Sequence[str],
    *,
    learner_gpus: str,
    learner_metrics_port: int | None,
    attach: bool,
) -> int:
    """Run until vLLM ends, or with `attach` until it is ended. Returns vLLM's exit code. Raises AuroraError."""
    if not attach and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed in this environment; install it, or start it from another one with --attach"
        )
    check_learning(config)
    target = find_target(config)  # downloads what is new, before the revision is fixed for vLLM and every learner
    if config.learn.enabled and (reason := unreadable_weights(target)) is not None:
        raise ConfigError(
            f"{config.target.source} {reason}, so that no draft can learn; name the unquantised model as MODEL and "
            "give this one to vLLM alone (--model FOLDER), or turn learning off (--set learn.enabled=false)"
        )
    with run_folder() as folder:
        status = EngineStatusPage.create(folder / STATUS_NAME)
        learner_page = LearnerStatusPage.create(folder / LEARNER_STATUS_NAME)
        fixed = with_fixed_target(config)
        (folder / CONFIG_NAME).write_text(to_yaml(settings_for_learner(fixed)), encoding="utf-8")
        deployment = _deployment(config, folder)
        deployment.write()
        command = vllm_command(config, deployment, vllm_arguments)
        environment = {VARIABLE: str(folder)}
        if command[1] == "-P":  # what vLLM starts by `python -m`, to inspect models, does not inherit that
            environment["PYTHONSAFEPATH"] = "1"
        if learner_metrics_port is not None:
            given = _with_file(vllm_arguments)
            host = _value_of("--host", given) or "127.0.0.1"
            model = _value_of("--served-model-name", given) or config.target.source
            _serve_metrics(folder, learner_page, host=host, port=learner_metrics_port, model=model)
        ending = threading.Event()
        process = None
        if attach:
            assignments = [f"{name}={shlex.quote(text)}" for name, text in environment.items()]
            print(f"start vLLM with\n\n  {' '.join(assignments)} {shlex.join(command)}\n", flush=True)
        else:
            parent = os.getpid()
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                preexec_fn=lambda: die_with_parent(parent, by=signal.SIGTERM),
            )

        def end(number: int, frame: FrameType | None) -> None:
            ending.set()
            if process is not None:
                process.terminate()

        handle_ending(end)
        if config.learn.enabled:
            _learn_beside(process, status, learner_page, learner_command(folder), ending, gpus=learner_gpus)
        elif process is not None:
            process.wait()
        else:
            ending.wait()
        return 0 if process is None else _exit_code(process.wait(), ending)


def _in_safetensors(folder: Path) -> Path:
    """The target in a form that vLLM reads."""
    from aurora_lit.models.gguf_model import in_safetensors  # it imports torch

    return in_safetensors(folder)


def vllm_command(config: AuroraConfig, deployment: Deployment, vllm_arguments: Sequence[str]) -> list[str]:
    """The command that starts vLLM's server; an argument that is given, in vLLM's --config file too, is not added.

    Of a speculative config whose fields are given one by one (--speculative-config.FIELD, --spec-FIELD), the others are
    added. Raises ConfigError.
    """
    speculation = {
        "method": "eagle3",
        "model": str(loadable(deployment.starting_draft, deployment.versions / _STARTING_NAME)),
        "num_speculative_tokens": PROPOSED_TOKENS,
    }
    ours = {
        "--model": str(_in_safetensors(find_target(config))),
        "--served-model-name": config.target.source,
        "--worker-extension-cls": WORKER_EXTENSION,
    }
    vllm_arguments = [re.sub(r"^-sc(?=[.=]|$)", "--speculative-config", argument) for argument in vllm_arguments]
    arguments = _with_file(vllm_arguments)
    names = [argument.partition("=")[0].partition(".") for argument in arguments]
    given = {name.replace("_", "-") for name, _, _ in names}
    fields = {field for name, _, field in names if field and name.replace("_", "-") == "--speculative-config"}
    fields_of_own = {field for name, field in _SPECULATION_ARGUMENTS.items() if name in given}
    if "--worker-extension-cls" in given:
        raise ConfigError(f"--worker-extension-cls is needed for {WORKER_EXTENSION}; leave it out")
    _check_is_acted_on(arguments, given)
    added = [word for name, value in ours.items() if name not in given for word in (name, value)]
    method = (
        _value_of("--speculative-config.method", arguments)
        or _value_of("--spec-method", arguments)
        or speculation["method"]
    )
    if method == speculation["method"] and _value_of("--speculative-config", arguments) is None:
        missing = {field: speculation[field] for field in sorted(speculation.keys() - fields - fields_of_own)}
        if fields:
            added += [word for field in missing for word in (f"--speculative-config.{field}", str(missing[field]))]
        elif missing:
            added += ["--speculative-config", json.dumps(missing)]
    return [*module_command(_MODULE), *added, "--middleware", MIDDLEWARE, *vllm_arguments]


def _check_is_acted_on(arguments: Sequence[str], given: set[str]) -> None:
    """Raise ConfigError for an argument that would be ignored in silence. given: the names of the arguments."""
    for name in (*_SEVERAL_SERVERS, *_NO_MIDDLEWARE, _NO_SERVER):
        if name not in given or _value_of(name, arguments) in ("1", "False"):  # as without it
            continue
        if name in _NO_MIDDLEWARE:
            raise ConfigError(f"{name} starts a server in which no drafts can be swapped; leave it out")
        if name == _NO_SERVER:
            raise ConfigError(
                f"{name} starts engines for the server of another machine, and `aurora-lit vllm` starts a server; run "
                'it on that machine only, and see "Several machines" in docs/vllm.md'
            )
        raise ConfigError(
            f"{name} is for `vllm serve`, and {_MODULE}, which is started here, ignores it; leave it out, or add it to "
            "the command that --attach prints, with `vllm serve` in place of the words from Python's path to "
            f"{_MODULE}; keep the variables before them"
        )


def _deployment(config: AuroraConfig, folder: Path) -> Deployment:
    draft = draft_folder(config)
    assert draft is not None
    read_config(draft)  # a draft that cannot be read is an error now, not inside vLLM
    deployment = Deployment(
        run_folder=folder,
        starting_draft=draft.resolve(),
        versions=versions_folder(config).resolve(),
        ring_bytes=config.trace.capacity_mb << 20,
    )
    if (current := _readable_current(PublishedVersions(deployment.versions))) is not None:
        deployment.check_shape(current)
    return deployment


def _readable_current(published: PublishedVersions) -> Path | None:
    """The folder of the current version; None if there is none, or it is damaged, which vLLM's log will say."""
    try:
        if (version := published.current()) is None:
            return None
        read_config(published.folder / version)
    except CheckpointError:
        return None
    return published.folder / version


def _serve_metrics(folder: Path, page: LearnerStatusPage, *, host: str, port: int, model: str) -> None:
    """Answer /metrics in a thread of this process, which outlives learners that fail."""
    registry = CollectorRegistry()
    labels = {"model_name": model, "engine": "0"}
    registry.register(LearnerCollector(page, lambda: ring_counters(folder), labels))
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"--learner-metrics-port {port} cannot be opened on {host}: {error.strerror}; take another port"
        ) from error


def _learn_beside(
    process: subprocess.Popen[bytes] | None,
    status: EngineStatusPage,
    learner_page: LearnerStatusPage,
    command: Sequence[str],
    ending: threading.Event,
    *,
    gpus: str,
) -> None:
    """A learner for each life of the engine; returns when vLLM has ended or this process shall.

    The learner sees only its own GPUs: vLLM takes nearly all memory of those that it uses.
    """
    learner, learned_from = None, 0
    while not ending.wait(_LOOK_EVERY_S) and (process is None or process.poll() is None):
        now = status.read()
        if now.state is WorkerState.READY and now.worker_pid != learned_from:
            if learner is not None:
                learner.end()
            learned_from = now.worker_pid
            learner = LearnerChild(command, learner_page, environment={"CUDA_VISIBLE_DEVICES": gpus})
            learner.start()
    if learner is not None:
        learner.end()


def _with_file(arguments: Sequence[str]) -> list[str]:
    """vLLM's arguments, after those of its --config file as `--name=value`: of several the last counts.

    Raises ConfigError.
    """
    if any(argument.startswith("--config=") for argument in arguments):
        raise ConfigError("vLLM does not read the file of --config=FILE; write --config FILE")
    path = _value_of("--config", arguments)
    if path is None or not Path(path).exists():  # it may be where vLLM is started by hand; else vLLM says so
        return list(arguments)
    try:
        settings_of_file = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read ({error}); name a YAML file of vLLM's arguments") from error
    if not isinstance(settings_of_file, dict):
        raise ConfigError(f"--config {path} has no arguments; name a YAML file of vLLM's arguments, `name: value`")
    first = {name: value[0] if isinstance(value, list) and value else value for name, value in settings_of_file.items()}
    return [*(f"--{name}={value}" for name, value in first.items()), *arguments]


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """The value of a vLLM argument, written `--name value` or `--name=value`; None: it is not given."""
    value = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        given, has_value, own = argument.partition("=")
        if given.replace("_", "-") == name:  # vLLM takes either; of several the last counts
            value = own if has_value else following
    return value


def _exit_code(code: int, ending: threading.Event) -> int:
    return 0 if ending.is_set() else code if code >= 0 else 128 - code
