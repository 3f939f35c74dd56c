"""A tiny tokenizer and an engine without a model, which repeats its prompt.

    engine = FakeEngine(FakeOptions(tokens_per_round=3))
    engine.submit(Request(request_id="a", prompt_ids=(5, 6), params=SamplingParams(max_tokens=5)))
    engine.round()                # 5 6 5; the next round gives 6 5 and finish_reason "length"

Special tokens in a prompt cause faults: <|crash|> (the engine raises), <|error|> (an Output with an error),
<|refuse|> (submit raises ValueError), <|toolong|> (submit raises RequestError). With <|client|> the output is the
request's client. <|end|> is the end of text. Marks of fill in the middle are not repeated.

Functions import what is heavy, so that a server's main process has no torch, as in production.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineCounters
from aurora_lit.request import Output, Request, Source, TokenLogprob
from aurora_lit.serve.worker.parts import WorkerParts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from aurora_lit.modules.domains.centroids import DomainAssigner

SPECIALS = (
    *("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|crash|>", "<|error|>", "<|refuse|>", "<|toolong|>"),
    "<|client|>",
)
FIM_MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>", "<|fim_pad|>")
_MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ t", "Ġt he")
_TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('forbidden content') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(marks: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, a few merges, the special tokens above. marks: more added tokens, not special ones."""
    from transformers import PreTrainedTokenizerFast

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in _MERGES)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge.split()) for merge in _MERGES]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=_TEMPLATE)


FAKE_SHAPE = SimpleNamespace(vocab_size=11, hidden_size=8, aux_layer_ids=(1, 2, 3))
"""Shape of the target that published domains must be of."""


@dataclass(frozen=True, kw_only=True)
class FakeOptions:
    """How the fake behaves; plain data, so that it can be sent to a worker process."""

    tokens_per_round: int = 3
    round_s: float = 0.0
    """How long a round takes."""
    max_batch_size: int = 8
    max_seq_len: int = 512
    build_s: float = 0.0
    """How long building the worker takes."""
    hang_timeout_s: float = 120.0
    """After this time in one iteration of its loop a worker counts as hanging."""
    worker_grace_s: float = 1.0
    """How long the server outlives a dead worker."""
    build_error: str = ""
    """Building the worker raises this."""
    fills_holes: bool = False
    """Its tokenizer has the marks of fill in the middle."""


@dataclass(kw_only=True)
class _Running:
    request: Request
    script: Iterator[int]
    num_done: int = 0


class FakeEngine:
    """An EngineInterface; the tokens of a request are those of its prompt, repeated, its domain the first one."""

    def __init__(self, options: FakeOptions | None = None) -> None:
        self._options = options or FakeOptions()
        self._tokenizer = tokenizer = tiny_tokenizer(FIM_MARKS if self._options.fills_holes else ())
        self._marks = {tokenizer.convert_tokens_to_ids(mark) for mark in FIM_MARKS if self._options.fills_holes}
        self._special = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
        self.eos_token_ids = frozenset({self._special["<|end|>"]})
        self.vocab_size = len(tokenizer)
        self.max_seq_len = self._options.max_seq_len
        self.counters = EngineCounters()
        self.memory = self.prefix_cache = None
        self.draft_version = "fake-000001"
        self.assigner: DomainAssigner | None = None
        self._running: dict[str, _Running] = {}
        self._waiting: dict[str, Request] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def submit(self, request: Request) -> None:
        if self._special["<|refuse|>"] in request.prompt_ids:
            raise ValueError("the fake refuses")
        if self._special["<|toolong|>"] in request.prompt_ids or len(request.prompt_ids) + 1 > self.max_seq_len:
            raise RequestError("prompt too long", param="prompt", code="context_length_exceeded")
        self._waiting[request.request_id] = request

    def cancel(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)

    def swap_draft(self, draft: object, *, version: str, recompute: bool = False) -> None:
        self.draft_version = version

    def round(self) -> list[Output]:
        while self._waiting and len(self._running) < self._options.max_batch_size:
            request_id, request = next(iter(self._waiting.items()))
            del self._waiting[request_id]
            says_client = self._special["<|client|>"] in request.prompt_ids
            script = self._tokenizer.encode(request.client.name or "nobody") if says_client else request.prompt_ids
            script = [token_id for token_id in script if token_id not in self._marks] or [self._special["<|end|>"]]
            asked = request.params.structured_outputs
            begins = self._tokenizer.encode((asked and asked.begins_with) or "")
            self._running[request_id] = _Running(
                request=request, script=itertools.chain(begins, itertools.cycle(script))
            )
            self.counters.prompt_tokens += len(request.prompt_ids)
        if self._running:
            time.sleep(self._options.round_s)
            self.counters.rounds += 1
        return [self._step(running) for running in list(self._running.values())]

    def _step(self, running: _Running) -> Output:
        request, params = running.request, running.request.params
        if self._special["<|crash|>"] in request.prompt_ids and running.num_done:
            raise RuntimeError("the fake engine crashed")
        if self._special["<|error|>"] in request.prompt_ids:
            del self._running[request.request_id]
            return Output(request_id=request.request_id, token_ids=(), finish_reason="error", error="as asked")
        first, ids, finish_reason = running.num_done == 0, list[int](), None
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)
        while len(ids) < self._options.tokens_per_round and finish_reason is None:
            ids.append(next(running.script))
            if ids[-1] in stops:
                finish_reason = "stop"
            elif running.num_done + len(ids) >= params.max_tokens:
                finish_reason = "length"
        running.num_done += len(ids)
        proposed = self._options.tokens_per_round - 1 if params.speculate else 0
        accepted = min(len(ids) - 1, proposed)
        accepted_from = (Source.DRAFT,) * accepted
        self.counters.count(generated=len(ids), proposed=proposed, accepted_from=accepted_from)
        if finish_reason is not None:
            del self._running[request.request_id]
        prompt_logprobs = None
        if first and params.prompt_logprobs is not None:
            rest = (self._logprob(token_id, params.prompt_logprobs) for token_id in request.prompt_ids[1:])
            prompt_logprobs = (None, *rest)
        return Output(
            request_id=request.request_id,
            token_ids=tuple(ids),
            finish_reason=finish_reason,
            is_first=first,
            draft_versions=(self.draft_version,) if proposed else (),
            logprobs=None if params.logprobs is None else tuple(self._logprob(i, params.logprobs) for i in ids),
            prompt_logprobs=prompt_logprobs,
            num_proposed=proposed,
            num_accepted=accepted,
            accepted_from=accepted_from,
            domain=request.domain or ("" if self.assigner is None else self.assigner.names[0]),
        )

    def _logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        top = tuple(((token_id + rank) % self.vocab_size, -0.5 - rank) for rank in range(num_top))
        return TokenLogprob(token_id=token_id, logprob=-0.5, top=top)


def prepare_nothing(config: object) -> None:
    """Backend.prepare without a model."""


def load_tiny_tokenizer(config: object, *, options: FakeOptions) -> PreTrainedTokenizerFast:
    """Backend.load_tokenizer."""
    return tiny_tokenizer(FIM_MARKS if options.fills_holes else ())


def build_fake_worker(config: object, run_folder: object, *, options: FakeOptions) -> WorkerParts:
    """Backend.build_worker, with `options` bound by functools.partial."""
    from aurora_lit.serve.worker import loop

    loop.HANG_TIMEOUT_S = options.hang_timeout_s
    time.sleep(options.build_s)
    if options.build_error:
        raise RuntimeError(options.build_error)
    return WorkerParts(engine=FakeEngine(options), load_draft=load_fake_draft, load_domains=load_fake_domains)


def load_fake_draft(folder: Path | None) -> object:
    """WorkerParts.load_draft: the draft is its folder; one without a valid config.json is refused."""
    from aurora_lit.drafts.checkpoint import read_config

    if folder is not None:
        read_config(folder)
    return folder


def load_fake_domains(path: Path) -> DomainAssigner:
    """WorkerParts.load_domains."""
    from aurora_lit.drafts.centroid_file import read_centroids
    from aurora_lit.modules.domains.centroids import DomainAssigner

    centroids, version = read_centroids(path, FAKE_SHAPE)
    return DomainAssigner(centroids, version=version)
