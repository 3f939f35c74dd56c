"""The wraps around one runner's methods: the only place where vLLM's behaviour could be changed, and it is not.

Three methods of the runner object (not of its class) are wrapped. Each wrap calls the original with what it was given
and returns what that returned; what we do before and after is guarded. An exception of ours is counted and logged;
after a few, capture is off until the next start.

    hooks = RunnerHooks(runner, reader, capture, status.observe, status.write, status.failed)
    hooks.install()
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from aurora_lit.vllm.capture import Capture, RoundOutcome, Step
from aurora_lit.vllm.device_transfer import PendingStep, copy_step, own_rows
from aurora_lit.vllm.runners import Batch, KnownRunner, new_requests, resumed_requests

MAX_ERRORS = 3
"""After this many exceptions capture is turned off."""
_MAX_PENDING = 4
"""Steps whose copies may be outstanding; the oldest is waited for beyond that."""
_log = logging.getLogger("vllm.aurora_lit")


class RunnerHooks:
    """Capture at one runner; see the file's example."""

    def __init__(
        self,
        runner: Any,
        reader: KnownRunner,
        capture: Capture,
        observe: Callable[[Step, Sequence[RoundOutcome]], None],
        requests_ended: Callable[[], None],
        failed: Callable[..., None],
    ) -> None:
        """observe: receives each step with its rounds, a step late where copies are asynchronous.

        requests_ended: called when some have ended; after the last of them no step comes.

        failed: receives what went wrong here, in words, and with `is_off` whether no more is seen from now on.
        """
        self._runner, self._reader, self._capture, self._observe = runner, reader, capture, observe
        on_gpu = torch.device(runner.device).type == "cuda"
        self._stream: Any = torch.cuda.Stream() if on_gpu else None  # type: ignore[no-untyped-call]
        self._requests_ended, self._failed = requests_ended, failed
        self._queue: deque[PendingStep | set[str]] = deque()
        """Steps, and the ids of requests that have ended after them."""
        self._num_sampled: Any = None
        self.version = 0
        """Number of the draft that proposes now (drafts/versions.py)."""
        self.is_on = True
        self.num_errors = 0

    def install(self) -> None:
        """Wrap the runner's methods."""
        runner, sample_name = self._runner, self._reader.sample_method
        execute_model, sample = runner.execute_model, getattr(runner, sample_name)
        sample_tokens = runner.sample_tokens

        def execute_model_and_note(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if self.is_on and not kwargs.get("dummy_run"):
                with self._guard():
                    self._before_step(scheduler_output)
            return execute_model(scheduler_output, *args, **kwargs)

        def sample_and_note(*args: Any, **kwargs: Any) -> Any:
            result = sample(*args, **kwargs)
            if self.is_on:
                with self._guard():
                    self._num_sampled = self._reader.read_num_sampled(result)
            return result

        def sample_tokens_and_note(*args: Any, **kwargs: Any) -> Any:
            batch = None
            if self.is_on:
                with self._guard():
                    batch = self._before_sampling()
            result = sample_tokens(*args, **kwargs)
            if self.is_on and batch is not None:
                with self._guard():
                    self._after_step(batch)
            return result

        runner.execute_model, runner.sample_tokens = execute_model_and_note, sample_tokens_and_note
        setattr(runner, sample_name, sample_and_note)

    def _before_step(self, scheduler_output: Any) -> None:
        if scheduler_output.finished_req_ids:
            self._queue.append(set(scheduler_output.finished_req_ids))
        # An empty step is the last before vLLM idles: what is not looked at now would wait for the next request.
        self._drain(waits=scheduler_output.total_num_scheduled_tokens == 0)
        for info, position in new_requests(scheduler_output):
            self._capture.begin(info, position=position)
        for request_id, position in resumed_requests(scheduler_output):
            self._capture.resume(request_id, position=position)

    def _before_sampling(self) -> Batch | None:
        """The rows that this step computed, in tensors of our own: proposing may overwrite the runner's."""
        batch = self._reader.read_batch(self._runner)
        return None if batch is None else own_rows(batch, self._capture.wanted_rows)

    def _after_step(self, batch: Batch) -> None:
        num_sampled_B, self._num_sampled = self._num_sampled, None
        if num_sampled_B is None:
            return
        self._queue.append(copy_step(batch, num_sampled_B=num_sampled_B, version=self.version, stream=self._stream))
        self._drain()

    def _drain(self, *, waits: bool = False) -> None:
        """Hand on what has been copied, in order. waits: for all copies."""
        while self._queue:
            entry = self._queue[0]
            if isinstance(entry, PendingStep):
                if not entry.is_ready:
                    if not waits and len(self._queue) <= 2 * _MAX_PENDING:
                        return
                    entry.wait()
                step = entry.step()
                self._queue.popleft()
                self._observe(step, self._capture.add(step))
            else:
                self._queue.popleft()
                self._capture.finish(entry)
                self._requests_ended()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """No exception of ours reaches the engine."""
        try:
            yield
        except Exception as error:
            self.num_errors += 1
            self._queue.clear()
            self._capture.forget()  # the ends of some may have been in the queue
            self.is_on = self.num_errors < MAX_ERRORS
            off = "" if self.is_on else "; no more traces are made until the next start"
            message = f"making traces failed ({self.num_errors} of {MAX_ERRORS} times{off})"
            _log.exception("aurora-lit: %s; serving is unaffected", message)
            with contextlib.suppress(Exception):
                self._failed(f"{message}: {type(error).__name__}: {error}", is_off=not self.is_on)
