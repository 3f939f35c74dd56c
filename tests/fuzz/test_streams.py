"""Texts and calls are the same however they arrive; ring and slots are right in whichever order things happen."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.fake_engine import tiny_tokenizer
from support.read_calls import read_calls
from support.ring_payloads import LAYOUT, number_of, payload_of
from support.tiny_models import VOCAB, make_engine, random_draft, run

from aurora_lit.ipc.messages import Delta
from aurora_lit.ipc.ring import RingReader, RingWriter
from aurora_lit.kernels import native
from aurora_lit.models.interface import Target
from aurora_lit.request import Client, Request, SamplingParams, Source
from aurora_lit.serve.http.answer_stream import AnswerOptions, AnswerStream
from aurora_lit.serve.http.detokenizer import TokenDecoder
from aurora_lit.tool_calls.formats import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, PLAIN, ToolFormat
from aurora_lit.tool_calls.parser import ToolCallReader

T = TypeVar("T")
CUTS = st.lists(st.integers(1, 7), max_size=12)


def split(whole: Sequence[T], sizes: Sequence[int]) -> list[Sequence[T]]:
    """Parts of these sizes, as far as they go; then what is left."""
    ends = [0, *itertools.accumulate(sizes)]
    return [part for a, b in zip(ends, [*ends[1:], None], strict=True) if (part := whole[a:b])]


TOKENIZER = tiny_tokenizer()
DECODER = TokenDecoder(TOKENIZER)
IDS = [*TOKENIZER.encode("ab hello\r\n \t\n\t.🌍é"), *range(128, 256, 17), *TOKENIZER.all_special_ids]


def test_answers_in_any_parts(fuzz: Any) -> None:
    def check(
        ids: list[int],
        sizes: list[int],
        stop: list[str],
        numbers: tuple[int, int],
        flags: tuple[bool, bool, bool],
        end: str,
    ) -> None:
        min_tokens, min_indent = numbers
        by_token, keeps, skips = flags
        params = SamplingParams(
            max_tokens=99,
            stop=tuple(stop),
            min_tokens=min_tokens,
            include_stop_str_in_output=keeps,
            skip_special_tokens=skips,
        )
        request = Request(request_id="r", prompt_ids=(5,), params=params)

        def answer(parts: list[Sequence[int]]) -> tuple[str, int, str | None, str]:
            stream = AnswerStream(TOKENIZER, [request], AnswerOptions(by_token=by_token, min_indent=min_indent))
            text, num_tokens, reason, stopped_by = "", 0, None, ""
            for part in parts:
                last = part is parts[-1]
                for delta in stream.add(
                    [Delta(index=0, token_ids=tuple(part), finish_reason=end if last else None)]
                ).deltas:
                    assert delta.token_texts is None or "".join(delta.token_texts) == delta.text
                    text, num_tokens = text + delta.text, num_tokens + len(delta.token_ids)
                    reason, stopped_by = delta.finish_reason, delta.stop_string
            return text, num_tokens, reason, stopped_by

        found = answer(split(ids, sizes))
        assert found == answer([[token_id] for token_id in ids])
        if end == "length" and not (found[3] or min_indent):
            shown = [token_id for token_id in ids if not (skips and DECODER.is_special(token_id))]
            assert found[0] == b"".join(map(DECODER.to_bytes, shown)).decode(errors="ignore")

    words = st.lists(st.sampled_from(["h", "he", "ll", "lo\r", "\n", "\n\n", " \t", "🌍", "aé", "x" * 40]), max_size=3)
    fuzz(
        check,
        st.lists(st.sampled_from(IDS), min_size=1, max_size=30),
        CUTS,
        words,
        st.tuples(st.integers(0, 5), st.integers(0, 2)),
        st.tuples(st.booleans(), st.booleans(), st.booleans()),
        st.sampled_from(["stop", "length"]),
        examples=150,
    )


FORMATS = (HERMES, MISTRAL, MISTRAL_NAMED, LLAMA3, PLAIN)
CALL = json.dumps({"name": "f", "arguments": {"a": '}"{\\', "b": [{"c": None}]}})
MARKS = {mark for each in FORMATS for mark in (each.marker, each.name_end, each.id_begin, *each.fillers) if mark}
FRAGMENTS = st.one_of(
    st.sampled_from([*sorted(MARKS), CALL, '{"name": "g", "parameters": "{}"}', '{"arguments": {}, "name": "f"}']),
    st.sampled_from([*'{}[],:" \n\\`fg', "```json\n", '"name"', '"arguments"', "null", "text", "\ud800", '"\\ud800"']),
    st.text(max_size=3),
)


def test_calls_in_any_parts(fuzz: Any) -> None:
    def check(format_: ToolFormat, fragments: list[str], sizes: list[int], only_one: bool, calls: str) -> None:
        how: Any = {"names": {"f", "g"}, "only_one": only_one, "only_calls": calls == "only"}
        how["reads_bare"] = format_.bare_calls and calls == "bare"
        text = "".join(fragments)
        whole = read_calls(ToolCallReader(format_, **how), [text])
        assert read_calls(ToolCallReader(format_, **how), split(text, sizes)) == whole
        assert read_calls(ToolCallReader(format_, **how), list(text)) == whole
        assert whole[1] or calls == "only" or whole[0].strip() == text.strip(), "nothing is lost where there is no call"

    texts, calls = st.lists(FRAGMENTS, max_size=12), st.sampled_from(["only", "bare", "marked"])
    fuzz(check, st.sampled_from(FORMATS), texts, CUTS, st.booleans(), calls, examples=150)


class RingMachine(RuleBasedStateMachine):
    """One writer and one reader, which end and begin again; until a byte is damaged every record is accounted for."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self._path = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "ring"
        self._writer = RingWriter.create(self._path, 1 << 11, layout=LAYOUT)
        self._reader = RingReader.open(self._path, layout=LAYOUT)
        self._last, self._damaged = -1, False

    @rule(count=st.integers(1, 12))
    def push(self, count: int) -> None:
        for _ in range(count):
            assert self._writer.push(payload_of(self._writer.counters.pushed))

    @rule(count=st.integers(1, 6))
    def pop(self, count: int) -> None:
        for _ in range(count):
            queued = self._reader.counters.queued_records
            payload = self._reader.pop()
            assert self._damaged or (payload is None) == (queued == 0)
            if payload is None:
                return
            number = number_of(payload)
            assert number > self._last
            assert self._damaged or number == self._reader.counters.pushed - queued
            self._last = number

    @rule(share=st.floats(0, 1))
    def pass_over(self, share: float) -> None:
        self._reader.pass_over(share)

    @rule()
    def begin_again(self) -> None:
        self._writer.close()
        self._reader.close()
        self._reader = RingReader.open(self._path, layout=LAYOUT)
        self._writer = RingWriter.open(self._path, layout=LAYOUT)

    @rule(place=st.integers(0, (1 << 11) - 1), byte=st.integers(0, 255))
    def damage(self, place: int, byte: int) -> None:
        self._damaged = True
        self._writer._data[place] = byte

    @invariant()
    def all_are_accounted_for(self) -> None:
        counters = self._writer.counters
        assert counters.queued_bytes <= counters.capacity_bytes
        if not self._damaged:
            assert counters.torn == 0
            assert counters.popped + counters.overwritten + counters.queued_records == counters.pushed

    def teardown(self) -> None:
        self._writer.close()
        self._reader.close()
        self._stack.close()


def test_ring(fuzz: Any) -> None:
    fuzz.machine(RingMachine, examples=40)


ROOTS = [[(7 * root + 3 * at) % VOCAB for at in range(70)] for root in range(2)]
"""Beginnings of prompts, longer than a block of the store."""


@pytest.mark.skipif(native.library() is None, reason="torch's sums depend on how many positions are computed together")
def test_slots_and_kept_prefixes(fuzz: Any, target: Target) -> None:
    plain, draft = make_engine(target, max_seq_len=112, prefix_cache_mb=0), random_draft(target)
    alone = dict[tuple[int, ...], list[int]]()

    class SlotMachine(RuleBasedStateMachine):
        """Requests with common beginnings come, are cancelled and end. Their answers are those of an engine without any
        caches, and nothing comes from a request of another salt or client, or from one that is not stored."""

        def __init__(self) -> None:
            super().__init__()
            how: Any = {"max_batch_size": 2, "memory_scope": "client", "copied_tokens": 8, "max_seq_len": 112}
            self._engine = make_engine(target, draft, **how)
            self._requests, self._answers = dict[str, Request](), dict[str, list[int]]()
            self._running = set[str]()

        @rule(
            prompt=st.tuples(
                st.sampled_from(ROOTS), st.integers(0, 70), st.lists(st.integers(0, 3), min_size=1, max_size=20)
            ),
            salt=st.sampled_from(["", "s"]),
            client=st.sampled_from(["", "ann", "bob"]),
            store=st.booleans(),
        )
        def submit(self, prompt: tuple[list[int], int, list[int]], salt: str, client: str, store: bool) -> None:
            name = f"r{len(self._requests)}"
            root, length, own = prompt
            how: Any = {"client": Client(client), "cache_salt": salt, "store": store}
            self._requests[name] = request = asked(name, (*root[:length], *own), **how)
            self._answers[name] = []
            self._running.add(name)
            self._engine.submit(request)

        @rule(count=st.integers(1, 8))
        def compute(self, count: int) -> None:
            for output in (output for _ in range(count) for output in self._engine.round()):
                name, request = output.request_id, self._requests[output.request_id]
                readable = [
                    (*other.prompt_ids, *self._answers[other.request_id])
                    for other in self._requests.values()
                    if other is not request and other.store and request.client.name and scope(other) == scope(request)
                ]
                common = [len(os.path.commonprefix([request.prompt_ids, each])) for each in readable]
                assert output.num_cached_tokens <= max(common, default=0)
                assert readable or Source.MEMORY not in output.accepted_from
                self._answers[name] += output.token_ids
                if output.finish_reason is not None:
                    self._running.remove(name)
                    assert self._answers[name] == answer_alone(request.prompt_ids)

        @precondition(lambda self: self._running)
        @rule(data=st.data())
        def cancel(self, data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(sorted(self._running)))
            self._engine.cancel(name)
            self._running.remove(name)

        def teardown(self) -> None:
            while self._running:
                self.compute(8)

    def answer_alone(prompt: tuple[int, ...]) -> list[int]:
        if prompt not in alone:
            alone[prompt] = run(plain, [asked("r", prompt)])["r"].token_ids
        return alone[prompt]

    fuzz.machine(SlotMachine, examples=4, steps=20)


def asked(name: str, prompt: tuple[int, ...], **how: Any) -> Request:
    return Request(request_id=name, prompt_ids=prompt, params=SamplingParams(max_tokens=6, temperature=0.0), **how)


def scope(request: Request) -> tuple[str, str]:
    return request.client.name, request.cache_salt
