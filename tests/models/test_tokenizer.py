"""A kept tokenizer gives the ids, texts and prompts of transformers' own, for tokenizers built by different rules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from jinja2 import TemplateError
from support import child_environment
from support.fake_engine import tiny_tokenizer
from support.tiny_models import tiny_config
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aurora_lit.errors import SourceError
from aurora_lit.models.tokenizer import KeptTokenizer, is_kept, keep_tokenizer, load_tokenizer

TEXTS = (
    "",
    "hello world",
    "  two  spaces\tand\n\nlines ",
    "héllo 🌍 ñandú 中文字符",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>[INST] the </s>",
    "a" * 300,
    "'t 're 12345 ... !?",
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "hi <b>&amp;</b> \"you\" 'there' 🌍"}],
    [{"role": "system", "content": "Be brief.  "}, {"role": "user", "content": "  hello\nworld "}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
    [{"role": "user", "content": "begin"}, {"role": "assistant", "content": "I begin "}],
    [{"role": "assistant", "content": "only me"}],
    [{"role": "user", "content": ""}],
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "alternating roles": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "generation tag": (
        "{%- for m in messages %}\n    {%- if m.role == 'assistant' %}\n"
        "    {% generation %}{% set kept = m.content %}{{ kept }}{{ eos_token }}{% endgeneration %}\n"
        "    {%- else %}\n{{ m.role }}: {{ m.content | trim }} {{ kept is defined }}\n    {%- endif %}\n{%- endfor %}\n"
    ),
    "blocks and spaces": (
        "  {# a comment #}\n  {% if add_generation_prompt %}\n  prompt\n  {% endif %}\n"
        "{% for m in messages %}\n   {{ m.role }} \n   {% if loop.last %}\n last\n {% endif %}\n{% endfor %}\n\n"
    ),
    "namespace, loop controls, tojson": (
        "{% set ns = namespace(seen=0, self='x') %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}"
        "{% endif %}{% set ns.seen = ns.seen + 1 %}{{ m | tojson }}{{ m | tojson(indent=2) }}"
        "{{ m.content | tojson(ensure_ascii=true) }}{% if ns.seen == 2 %}{% break %}{% endif %}{% endfor %}"
        "{{ ns.seen }}"
    ),
    "dict, tools, documents": (
        "{{ dict(a=1).a }}{{ dict.fromkeys(['x'], 2)['x'] }}{{ tools is none }}{{ documents is none }}"
        "{{ unknown is defined }}{{ pad_token if pad_token is defined else 'no pad' }}{{ messages | length }}"
    ),
    "date": "{{ strftime_now('%Y %B') }}{{ messages[0].content.upper() }}{{ messages[0]['content'][1:3] }}",
    "html": "{{ messages[0].content }}{{ messages[0].content | e }}{{ 1 if add_generation_prompt else 2 }}",
    "escape by an attribute": "{{ messages[0].content.__class__.__mro__ }}",
    "escape by a change": "{{ messages.append({}) }}",
    "hidden attribute": "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "wrong key": "{{ messages[0].nothing.more }}",
}


def save(folder: Path, backend: Tokenizer, **options: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(folder)
    return folder


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def byte_level() -> Tokenizer:
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġ", "t"), ("Ġt", "he")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", "</s>"])
    return backend


def sentencepiece_like() -> Tokenizer:
    letters = sorted(set("".join(TEXTS)) - {" "})
    vocab = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", "▁", *letters, "▁h", "he", "▁the"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "h"), ("h", "e")], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def save_byte_level(folder: Path) -> None:
    save(folder, byte_level(), bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML)


def save_with_template_around(folder: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=16, pad_token="</s>")
    save(folder, backend, bos_token="<s>", eos_token="</s>")


def save_with_bos_by_config(folder: Path) -> None:
    save(folder, byte_level(), bos_token="<s>", eos_token="</s>")
    change_config(folder, add_bos_token=True, add_eos_token=True)


def save_with_added_tokens(folder: Path) -> None:
    save(folder, byte_level(), bos_token="<s>", eos_token="<|new|>", extra_special_tokens=["[INST]", "12345"])
    change_config(folder, split_special_tokens=True)


def save_llama(folder: Path) -> None:
    """A family that transformers builds anew from vocabulary and merges, by rules of its own."""
    save(folder, sentencepiece_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    change_config(folder, tokenizer_class="LlamaTokenizer", legacy=False, add_bos_token=True)


SAVERS = (save_byte_level, save_with_template_around, save_with_bos_by_config, save_with_added_tokens, save_llama)


@pytest.mark.parametrize("saver", SAVERS)
def test_ids_and_texts_are_those_of_transformers(saver: Any, tmp_path: Path) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    saver(folder)
    assert not is_kept(folder, cache_dir=cache)
    keep_tokenizer(folder, cache_dir=cache)
    assert is_kept(folder, cache_dir=cache)
    kept, theirs = load_tokenizer(folder, cache_dir=cache), AutoTokenizer.from_pretrained(folder)
    assert isinstance(kept, KeptTokenizer)
    for text in TEXTS:
        for around in (True, False):
            ids = kept.encode(text, add_special_tokens=around)
            assert ids == theirs.encode(text, add_special_tokens=around), text
            for skip in (True, False):
                options: Any = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
                assert kept.decode(ids, **options) == theirs.decode(ids, **options)
    assert kept.get_vocab() == theirs.get_vocab()
    assert (kept.eos_token_id, kept.all_special_ids) == (theirs.eos_token_id, theirs.all_special_ids)
    assert kept.chat_template == theirs.chat_template
    ids = range(len(theirs) + 3)
    assert [kept.convert_ids_to_tokens(i) for i in ids] == [theirs.convert_ids_to_tokens(i) for i in ids]


def rendered(tokenizer: Any, chat: list[dict[str, str]], **how: bool) -> str:
    """The prompt, or how it is refused. The wording is ours but for what the template says itself."""
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **how))
    except TemplateError as error:
        message = str(error) if "roles must" in str(error) else ""
        return f"{type(error).__name__} {message}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_rendered_and_final_messages_continued_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", byte_level(), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATES[name])
    keep_tokenizer(folder, cache_dir=tmp_path)
    kept, theirs = load_tokenizer(folder, cache_dir=tmp_path), AutoTokenizer.from_pretrained(folder)
    assert isinstance(kept, KeptTokenizer)
    for chat in CHATS:
        for add in (True, False):
            how = {"add_generation_prompt": add}
            assert rendered(kept, chat, **how) == rendered(theirs, chat, **how)
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    for last in ("The answer is", "ends with a space ", "  spaces before", "a</s>b"):
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": last}]
        try:
            expected = rendered(theirs, chat, **continued)
        except ValueError:  # of a kind of its own
            expected = "Error"
        ours = rendered(kept, chat, **continued)
        # Of a message that is rendered twice, transformers leaves its mark in the prompt.
        if "CONTINUE_FINAL_MESSAGE" in expected or "Error" in expected:
            assert ours.partition(" ")[0].endswith("Error")
        else:
            assert ours == expected
        assert chat[-1]["content"] == last, "the caller's messages stay"


def test_a_template_gets_the_variables_that_a_request_sets(tmp_path: Path) -> None:
    template = "{% if thinks is defined %}{{ thinks }}{% endif %}{{ messages[0].content }}{{ eos_token }}"
    folder = save(tmp_path / "model", byte_level(), bos_token="<s>", eos_token="</s>", chat_template=template)
    keep_tokenizer(folder, cache_dir=tmp_path)
    chat = [{"role": "user", "content": "hi"}]
    for tokenizer in (load_tokenizer(folder, cache_dir=tmp_path), AutoTokenizer.from_pretrained(folder)):
        how = {"tokenize": False, "add_generation_prompt": True}
        assert tokenizer.apply_chat_template(chat, **how, thinks=False) == "Falsehi</s>"
        assert tokenizer.apply_chat_template(chat, **how) == "hi</s>"


def test_a_template_of_its_own_for_tools_is_kept(tmp_path: Path) -> None:
    """As Hermes has it. Command R's teaches calls that are not read."""
    templates = {
        "default": "{{ messages[0].content }}",
        "tool_use": "<tool_call>{{ tools | length }}{{ messages[0].content }}",
        "rag": "[TOOL_CALLS]",
    }
    folder = save(tmp_path / "model", byte_level(), bos_token="<s>", eos_token="</s>", chat_template=templates)
    keep_tokenizer(folder, cache_dir=tmp_path)
    kept = load_tokenizer(folder, cache_dir=tmp_path)
    assert isinstance(kept, KeptTokenizer)
    assert kept.chat_template == {name: templates[name] for name in ("default", "tool_use")}
    how: Any = {"tokenize": False, "add_generation_prompt": True}
    for tokenizer in (kept, AutoTokenizer.from_pretrained(folder)):
        for tools, expected in (([{}, {}], "<tool_call>2hi"), (None, "hi")):
            assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tools=tools, **how) == expected
    templates["tool_use"] = 'Action: ```json [{"tool_name": {{ tools[0].name }}, "parameters": {}}]'
    folder = save(tmp_path / "other", byte_level(), bos_token="<s>", eos_token="</s>", chat_template=templates)
    keep_tokenizer(folder, cache_dir=tmp_path)
    assert load_tokenizer(folder, cache_dir=tmp_path).chat_template == templates["default"]


def test_a_changed_model_is_not_served_by_what_was_kept_of_it_before(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_byte_level(folder)
    keep_tokenizer(folder, cache_dir=tmp_path)
    change_config(folder, eos_token="</s>")
    assert not is_kept(folder, cache_dir=tmp_path)
    assert load_tokenizer(folder, cache_dir=tmp_path).eos_token_id == AutoTokenizer.from_pretrained(folder).eos_token_id


def test_a_damaged_copy_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_byte_level(folder)
    keep_tokenizer(folder, cache_dir=tmp_path)
    (state,) = (tmp_path / "tokenizers").glob("*.tokenizer.json")
    state.write_text(state.read_text()[:1000])
    assert not isinstance(load_tokenizer(folder, cache_dir=tmp_path), KeptTokenizer)


def test_a_copy_of_which_a_part_is_gone_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_byte_level(folder)
    keep_tokenizer(folder, cache_dir=tmp_path)
    assert is_kept(folder, cache_dir=tmp_path)
    (state,) = (tmp_path / "tokenizers").glob("*.tokenizer.json")
    state.unlink()
    assert not is_kept(folder, cache_dir=tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "gemma", "llama"])
def test_a_model_without_a_tokenizer_is_refused_with_a_remedy(family: str, tmp_path: Path) -> None:
    """Of the first two, transformers would make a tokenizer that knows nearly nothing."""
    tiny_config(family).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    for load in (keep_tokenizer, load_tokenizer):
        with pytest.raises(SourceError, match=r"target.source: .*model has no tokenizer; .*tokenizer.save_pretrained"):
            load(tmp_path / "model", cache_dir=tmp_path)
    assert not (tmp_path / "tokenizers").exists()


def test_a_damaged_tokenizer_is_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_byte_level(folder)
    state = folder / "tokenizer.json"
    state.write_text(state.read_text()[:1000])
    with pytest.raises(SourceError, match=r"model cannot be loaded \(.*\); .*tokenizer.save_pretrained"):
        load_tokenizer(folder, cache_dir=tmp_path)


class Shouting(PreTrainedTokenizerFast):
    """A family with Python code of its own."""

    def encode(self, text: Any, *args: Any, **options: Any) -> Any:
        return super().encode(text.upper(), *args, **options)


def test_a_tokenizer_with_code_of_its_own_is_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save_byte_level(folder)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path, **_: Shouting.from_pretrained(path))
    keep_tokenizer(folder, cache_dir=tmp_path)
    assert is_kept(folder, cache_dir=tmp_path), "there is nothing to do at the next start either"
    assert isinstance(load_tokenizer(folder, cache_dir=tmp_path), Shouting)


def test_a_kept_tokenizer_loads_without_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_byte_level(folder)
    keep_tokenizer(folder, cache_dir=tmp_path)
    code = (
        "import sys, pathlib; from aurora_lit.models.tokenizer import load_tokenizer\n"
        "tokenizer = load_tokenizer(pathlib.Path(sys.argv[1]), cache_dir=pathlib.Path(sys.argv[2]))\n"
        "chat = [{'role': 'user', 'content': 'hello'}]\n"
        "text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)\n"
        "print(tokenizer.encode(text, add_special_tokens=False))\n"
        "sys.exit(str({'torch', 'transformers', 'numpy'} & set(sys.modules) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    assert done.stderr.strip() == ""
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert json.loads(done.stdout) == theirs.encode(text, add_special_tokens=False)


def test_a_vocabulary_that_cannot_be_written_is_left_to_transformers(tmp_path: Path) -> None:
    """Such as one with an id far beyond all others: `tokenizers` loses tokens when it writes it."""
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"]["!"] = 2**32 - 1
    path.write_text(json.dumps(fields))
    keep_tokenizer(tmp_path, cache_dir=tmp_path / "cache")
    loaded = load_tokenizer(tmp_path, cache_dir=tmp_path / "cache")
    assert not isinstance(loaded, KeptTokenizer)
    assert loaded.encode("hello", add_special_tokens=False)
