"""The parts of pretraining: what is read and answered, where a draft begins, and the resumable loop that trains it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.fake_engine import tiny_tokenizer
from support.tiny_models import (
    VOCAB,
    draft_module,
    make_engine,
    random_draft,
    reference_model,
    request,
    run,
    save_model,
)

from aurora_lit.drafts.initial import choose_vocabulary, count_tokens, initial_draft
from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.generate_answers import Question, answer
from aurora_lit.learn.pretrain.label_text import encode_prompt, read_batch, read_prompts, text_pieces
from aurora_lit.learn.pretrain.trainer import FitOptions, Fitter
from aurora_lit.models.target import Target
from aurora_lit.traces.log import TraceLogWriter, read_index
from aurora_lit.traces.record import Trace


def check_trace(target: Target, trace: Trace) -> None:
    with torch.no_grad():
        aux, last = target.read(trace.token_ids_T.long()[None])
        logits = target.logits(last[0])
    rounding = {"atol": 1e-4, "rtol": 2**-8}  # traces are bf16
    torch.testing.assert_close(trace.aux_T3H.float(), aux[0], **rounding)
    torch.testing.assert_close(trace.last_TH.float(), last[0], **rounding)
    torch.testing.assert_close(trace.lse_T, logits.logsumexp(-1), atol=0.05, rtol=0)


def test_reading_records_what_the_target_says_without_the_padding(target: Target) -> None:
    gen = torch.Generator().manual_seed(0)
    pieces = [torch.randint(0, VOCAB, (n,), generator=gen).tolist() for n in (20, 33, 16)]
    traces = read_batch(target, pieces, domain="text")
    for trace, piece in zip(traces, pieces, strict=True):
        assert trace.token_ids_T.tolist() == piece
        assert (trace.domain, trace.answer_start) == ("text", len(piece))
        check_trace(target, trace)


def test_answering_records_what_the_target_said_and_saw(target: Target) -> None:
    gen = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, VOCAB, (n,), generator=gen).tolist()) for n in (3, 17, 1, 30, 58, 9)]
    questions = [
        Question(domain=f"d{i}", prompt_ids=prompt, temperature=0.8 if i == 1 else 0.0)
        for i, prompt in enumerate(prompts)
    ]
    options = {"eos_token_ids": frozenset({7}), "max_answer_tokens": 12, "max_batch_size": 3, "max_seq_len": 64}
    traces = {trace.domain: trace for trace in answer(target, questions, **options)}
    assert traces.keys() == {"d0", "d1", "d2", "d3", "d5"}, "d4 leaves no room for an answer"
    engine = make_engine(target, eos_token_ids=frozenset({7}))
    for i, prompt in enumerate(prompts):
        if i == 4:
            continue
        trace = traces[f"d{i}"]
        assert trace.answer_start == len(prompt)
        assert tuple(trace.token_ids_T[: len(prompt)].tolist()) == prompt
        check_trace(target, trace)
        if i != 1:
            greedy = run(engine, [request("a", prompt, max_tokens=12)])["a"].token_ids
            assert trace.token_ids_T[len(prompt) :].tolist() == greedy[:-1]


@pytest.fixture
def log(target: Target, tmp_path: Path) -> Path:
    """Greedy answers of the target, which a draft can learn."""
    gen = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(0, VOCAB, (3,), generator=gen).tolist()) for _ in range(60)]
    questions = [Question(domain="chat", prompt_ids=prompt, temperature=0.0) for prompt in prompts]
    writer = TraceLogWriter(tmp_path / "traces", kind="answer")
    for trace in answer(target, questions, eos_token_ids=frozenset(), max_answer_tokens=20):
        writer.append(trace)
    writer.flush()
    return tmp_path / "traces"


def fitter(target: Target, folder: Path) -> Fitter:
    options = FitOptions(total_positions=40_000, batch_positions=512, max_length=64, learning_rate=4e-3)
    module = draft_module(target, random_draft(target), num_steps=2)
    module.warmup_steps = 5
    return Fitter(module, folder, options)


def accepted_length(report: dict[str, dict[str, object]]) -> float:
    return float(report["chat"]["expected_accepted_length"])  # type: ignore[arg-type]


def test_the_rate_falls_with_positions_however_many_of_a_batch_count(target: Target, log: Path, tmp_path: Path) -> None:
    shards = read_index(log)
    learning = fitter(target, tmp_path / "fit")
    peak, module = learning.options.learning_rate, learning.module
    learning.fit(log, shards, until_positions=4_000)
    seen = learning.positions_seen / learning.options.batch_positions
    assert learning.schedules[0].get_last_lr()[0] == pytest.approx(peak * module.rate_factor(int(seen)), rel=1e-6)
    assert learning.schedules[0].last_epoch > 1.2 * seen, "prompts are not learnt from, so steps run ahead"


def test_a_few_steps_learn_and_a_rebuilt_fitter_goes_on_where_the_last_one_was(
    target: Target, log: Path, tmp_path: Path
) -> None:
    shards = read_index(log)
    first = fitter(target, tmp_path / "fit")
    untrained = first.validate(log, shards)
    first.fit(log, shards, until_positions=6_000)
    trained = first.validate(log, shards)
    assert accepted_length(trained) > accepted_length(untrained) + 0.1
    assert 6_000 <= first.positions_seen < 6_600

    again = fitter(target, tmp_path / "fit")
    assert (again.positions_seen, again.epoch) == (first.positions_seen, first.epoch)
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name
    assert again.validate(log, shards) == trained

    # Not stopped, or stopped and rebuilt: the same draft in the end.
    first.fit(log, shards, until_positions=8_000)
    (tmp_path / "fit" / "training.ckpt").unlink()
    again.fit(log, shards, until_positions=8_000)
    assert again.positions_seen == first.positions_seen
    for name, tensor in first.module.state_dict().items():
        torch.testing.assert_close(tensor, again.module.state_dict()[name])
    again.fit(log, shards, until_positions=8_000)
    assert again.positions_seen == first.positions_seen, "nothing is left to do"


def test_nothing_to_learn_from_is_said_and_not_waited_for(target: Target, tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="holds no sequence to learn from"):
        fitter(target, tmp_path).fit(tmp_path, [], until_positions=10)


def test_a_draft_starts_from_the_targets_last_layer(target: Target, folder: Path) -> None:
    ids = torch.tensor([1, 4, 30, 60])
    draft = initial_draft(target, ids)
    layer, size = target.model.base_model.layers[-1], target.hidden_size
    assert draft.draft_token_ids.tolist() == ids.tolist()
    assert torch.equal(draft.lm_head.weight, target.head_rows(ids))
    assert torch.equal(draft.norm.weight, target.model.base_model.norm.weight)
    assert torch.equal(draft.midlayer.hidden_norm.weight, layer.input_layernorm.weight)
    assert torch.equal(draft.midlayer.post_attention_layernorm.weight, layer.post_attention_layernorm.weight)
    assert draft.config.aux_layer_ids == target.aux_layer_ids
    assert (draft.config.intermediate_size, draft.config.head_dim) == (96, 32)
    plain = reference_model(folder).model.layers[-1]
    for own, name in ((draft.midlayer.mlp, "gate_proj"), (draft.midlayer.mlp, "down_proj")):
        assert torch.equal(getattr(own, name).weight, getattr(plain.mlp, name).weight)
    assert torch.equal(draft.midlayer.self_attn.o_proj.weight, plain.self_attn.o_proj.weight)
    values = plain.self_attn.v_proj.weight.repeat(2, 1)  # two heads share one of the target's
    assert torch.equal(draft.midlayer.self_attn.v_proj.weight[:, size:], values)
    highest = draft.fc.weight[:, 2 * size :] - torch.eye(size)
    assert max(draft.fc.weight[:, : 2 * size].abs().max(), highest.abs().max()) < 0.1


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral", "gpt2"])
def test_a_draft_can_start_on_any_family(family: str, tmp_path: Path) -> None:
    target = Target.load(save_model(family, tmp_path), precision="fp32")
    draft = initial_draft(target, torch.arange(40), intermediate_size=None)
    given = run(make_engine(target, draft, max_draft_tokens=2), [request("a", (1, 2, 3), max_tokens=4)])
    assert given["a"].token_ids == run(make_engine(target), [request("a", (1, 2, 3), max_tokens=4)])["a"].token_ids


def test_the_vocabulary_holds_the_most_frequent_tokens() -> None:
    counts = count_tokens([torch.tensor([5, 5, 5, 2], dtype=torch.int32), torch.tensor([2, 9, 1])], 12)
    assert counts.tolist() == [0, 1, 2, 0, 0, 3, 0, 0, 0, 1, 0, 0]
    assert choose_vocabulary(counts, 3).tolist() == [1, 2, 5]
    assert choose_vocabulary(counts, 3, always=[11]).tolist() == [2, 5, 11]


# -- prompts and text ----------------------------------------------------------------------------------------------


def test_prompts_and_text_are_read(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    lines = tmp_path / "chat.jsonl"
    lines.write_text(
        '{"domain": "code", "messages": [{"role": "user", "content": "hello"}, {"role": "user", "content": "b"}]}\n'
        '\n{"messages": [{"role": "user", "content": "c"}]}\n'
    )
    plain = tmp_path / "plain.txt"
    plain.write_text("one\n\ntwo\n")
    assert [(p.domain, p.messages) for path in (lines, plain) for p in read_prompts(path)] == [
        ("code", ("hello", "b")),
        ("chat", ("c",)),
        ("plain", ("one",)),
        ("plain", ("two",)),
    ]
    assert tokenizer.decode(encode_prompt(tokenizer, read_prompts(lines)[0])) == "<|user|>hello<|assistant|>"
    text = tmp_path / "text.txt"
    text.write_bytes(b"the world " * 30 + b"\xff")
    pieces = list(text_pieces(text, tokenizer, piece_tokens=20))
    assert {len(piece) for piece in pieces[:-1]} == {20}
    assert 16 <= len(pieces[-1]) <= 20
    assert tokenizer.decode([i for piece in pieces for i in piece]).startswith("the world the world ")


@pytest.mark.parametrize("line", ["{", "[]", '{"messages": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}'])
def test_a_line_that_is_no_prompt_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "c"}]}\n' + line + "\n")
    with pytest.raises(AuroraError, match=r"p.jsonl:2: "):
        read_prompts(path)
