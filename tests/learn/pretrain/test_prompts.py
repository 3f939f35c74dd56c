"""Prompt files and text files are read; a malformed line is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.prompts import encode_prompt, read_prompts
from aurora_lit.learn.pretrain.record_text import text_pieces


def test_prompts_and_text_are_read(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    lines = tmp_path / "chat.jsonl"
    lines.write_text(
        '{"domain": "code", "messages": [{"role": "user", "content": "hello"}, {"role": "user", "content": "b"}]}\n'
        '\r\n{"messages": [{"role": "user", "content": "c\u2028d\u0085"}]}\r\n'
    )
    plain = tmp_path / "plain.txt"
    plain.write_text("one\n\ntwo\n")
    assert [(p.domain, p.messages) for path in (lines, plain) for p in read_prompts(path)] == [
        ("code", ("hello", "b")),
        ("chat", ("c\u2028d\u0085",)),
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


def test_a_prompt_is_its_first_question_or_a_conversation_up_to_the_models_turn(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = tmp_path / "chat.jsonl"
    questions = [("system", "be kind"), ("user", "hello"), ("user", "b")]
    turns = [("system", "be kind"), ("user", "hello"), ("assistant", "a"), ("user", "b"), ("assistant", "c")]
    lines = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in (questions, turns)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [tokenizer.decode(encode_prompt(tokenizer, prompt)) for prompt in read_prompts(path)]
    first = "<|system|>be kind<|user|>hello<|assistant|>"
    assert texts == [first, f"{first}a<|user|>b<|assistant|>"]


def test_tools_are_given_to_the_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools[0].function.name }}:{{ messages[0].content }}"
    path = tmp_path / "tools.jsonl"
    tool = {"type": "function", "function": {"name": "find"}}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}], "tools": [tool]}) + "\n")
    (prompt,) = read_prompts(path)
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == "find:hello"


def test_a_raw_prompt_is_its_text_with_special_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = tmp_path / "holes.jsonl"
    path.write_text(json.dumps({"prompt": "hello<|user|>b", "domain": "holes"}) + "\n")
    (prompt,) = read_prompts(path)
    ids = encode_prompt(tokenizer, prompt)
    assert tokenizer.convert_tokens_to_ids("<|user|>") in ids
    assert (tokenizer.decode(ids), prompt.domain) == ("hello<|user|>b", "holes")


def test_text_parts_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}) + "\n")
    assert read_prompts(path)[0].messages == ("hello\nworld",)


def test_a_prompt_that_the_chat_template_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chat.txt"
    path.write_text("hello\nforbidden\n")
    _, refused = read_prompts(path)
    with pytest.raises(AuroraError, match=r"chat\.txt:2: the chat template refuses it \(forbidden content\)"):
        encode_prompt(tiny_tokenizer(), refused)


@pytest.mark.parametrize("name", ["chat.ndjson", "chat.jsonl.txt", "63"])
def test_json_in_a_file_that_is_not_read_as_such_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('a prompt about {}\n{"a": 1}\n[]\n{"messages": [{"role": "user", "content": "c"}]}\n')
    with pytest.raises(AuroraError, match=rf"{name}:4: holds JSON, but .*named \*\.jsonl.*; give it such a name"):
        read_prompts(path)
    path.write_text('a prompt about {}\n{"a": 1}\n[]\n')
    assert [prompt.messages[0] for prompt in read_prompts(path)] == ["a prompt about {}", '{"a": 1}', "[]"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_document_is_refused(indent: int | None, tmp_path: Path) -> None:
    chats = json.dumps([{"messages": [{"role": "user", "content": "c"}]}], indent=indent)
    path = tmp_path / "chat.JSON"
    path.write_text(chats)
    with pytest.raises(AuroraError, match=r"chat\.JSON: .*write one JSON object a line into a file named \*\.jsonl"):
        read_prompts(path)


def test_a_line_of_several_conversations_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.txt"
    path.write_text('[1]\n[{"messages": [{"role": "user", "content": "c"}]}]\n')
    with pytest.raises(AuroraError, match=r"chat\.txt:2: holds JSON, but .*named \*\.jsonl"):
        read_prompts(path)


def test_files_as_windows_writes_them_are_read(tmp_path: Path) -> None:
    lines, plain = tmp_path / "CHAT.JSONL", tmp_path / "plain.txt"
    lines.write_text('{"messages": [{"role": "user", "content": "c"}]}\r\n', encoding="utf-8-sig")
    plain.write_text("hello\n", encoding="utf-8-sig")
    assert [prompt.messages for path in (lines, plain) for prompt in read_prompts(path)] == [("c",), ("hello",)]


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"messages": [{"role": "user", "content": "é"}]}'.encode("latin-1"))
    with pytest.raises(AuroraError, match=r"p\.jsonl: not UTF-8"):
        read_prompts(path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"messages": 3}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
    ],
)
def test_a_malformed_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "c"}]}\n' + line + "\n")
    with pytest.raises(AuroraError, match=r"p.jsonl:2: "):
        read_prompts(path)
