"""Whatever a file or a message holds: it is read, or refused by the error that its reader names."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import strategies as st
from support.fake_engine import tiny_tokenizer
from support.mutations import ODD, mutated_bytes, mutated_header, mutated_json
from support.tiny_gguf import gguf_header, write_gguf
from support.trace_examples import trace_with_rounds

from aurora_lit.config import load_config, to_yaml
from aurora_lit.drafts.centroid_file import published_names, published_version, read_centroids, write_centroids
from aurora_lit.drafts.checkpoint import check_fits, load_draft, read_config, save_draft
from aurora_lit.errors import CacheError, CheckpointError, ConfigError, SourceError, TraceError
from aurora_lit.ipc.messages import Call, Delta, Failure, decode_call, decode_updates, encode
from aurora_lit.learn.data import training_state
from aurora_lit.models import packed_file
from aurora_lit.models.gguf import GgufFile
from aurora_lit.models.tokenizer import keep_tokenizer, load_tokenizer
from aurora_lit.modules.domains.centroids import Centroids
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft
from aurora_lit.request import Request, SamplingParams, StructuredOutputsParams, TokenLogprob
from aurora_lit.traces import record

TARGET = SimpleNamespace(vocab_size=11, hidden_size=8, aux_layer_ids=(1, 2, 3))


def test_traces(fuzz: Any) -> None:
    good = record.to_bytes(trace_with_rounds([(2, 2, 1), (4, 1, 1)]))
    whole = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    begin, end = whole[record._PLAIN_NAME]["data_offsets"]
    data_at = 8 + int.from_bytes(good[:8], "little")
    plain = json.loads(good[data_at + begin : data_at + end])

    def with_plain(changed: Any) -> bytes:
        """The plain fields are the last tensor."""
        text = json.dumps(changed).encode()
        header = whole | {
            record._PLAIN_NAME: {"dtype": "U8", "shape": [len(text)], "data_offsets": [begin, begin + len(text)]}
        }
        head = json.dumps(header).encode()
        return len(head).to_bytes(8, "little") + head + good[data_at : data_at + begin] + text

    assert end == len(good) - data_at
    record.from_bytes(with_plain(plain))

    def check(content: bytes) -> None:
        with contextlib.suppress(TraceError):
            record.check(record.from_bytes(content))

    fuzz(check, st.one_of(mutated_header(good), mutated_json(plain).map(with_plain)), examples=120)


def test_states_of_learners(fuzz: Any) -> None:
    good = training_state.to_bytes({"module": {"a": torch.ones(3)}, "steps": 3, "pairs": [(1, "x"), None]})

    def check(content: bytes) -> None:
        with contextlib.suppress(ValueError):
            training_state.from_bytes(content)

    fuzz(check, mutated_header(good), examples=80)


def test_domains(fuzz: Any, tmp_path: Path) -> None:
    path = tmp_path / "domains.safetensors"
    made = Centroids(
        names=("a", "b"),
        centroid_DE=torch.randn(2, 24),
        mean_E=torch.randn(24),
        variance_E=torch.rand(24),
        common=1.5,
        novelty_threshold=0.7,
    )
    write_centroids(path, made, version=12, target=TARGET)
    good = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        assert isinstance(published_version(path), int)
        assert all(isinstance(name, str) for name in published_names(path))
        with contextlib.suppress(CheckpointError):
            read_centroids(path, TARGET)

    fuzz(check, mutated_header(good), examples=100)


def test_drafts_without_a_manifest(fuzz: Any, tmp_path: Path) -> None:
    target = SimpleNamespace(vocab_size=30, hidden_size=8, aux_layer_ids=(1, 2, 3))
    config = Eagle3Config(
        **{"hidden_size": 8, "target_hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1},
        **{"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 30, "draft_vocab_size": 20},
        aux_layer_ids=(1, 2, 3),
        max_position_embeddings=64,
    )
    folder = tmp_path / "draft"
    save_draft(Eagle3Draft(config, torch.arange(20)), folder)
    (folder / "manifest.json").unlink()
    good = {
        name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors", "value_head.safetensors")
    }
    load_draft(folder, target)

    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        (folder / name).write_bytes(content)
        try:
            check_fits(folder, read_config(folder), target)
            load_draft(folder, target)
        except CheckpointError:
            pass
        finally:
            (folder / name).write_bytes(good[name])

    settings = mutated_json(json.loads(good["config.json"])).map(lambda changed: json.dumps(changed).encode())
    fuzz(
        check,
        st.one_of(
            settings.map(lambda content: ("config.json", content)),
            mutated_bytes(good["config.json"]).map(lambda content: ("config.json", content)),
            *(
                mutated_header(good[name]).map(lambda content, name=name: (name, content))
                for name in ("model.safetensors", "value_head.safetensors")
            ),
        ),
        examples=80,
    )


def test_settings(fuzz: Any, tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    text = to_yaml(load_config(None, ["server.default_sampling={top_p: 0.9}"]))
    whole = yaml.safe_load(text)
    lines = st.sampled_from([line for line in text.encode().splitlines(keepends=True) if b":" in line])
    keys = [f"{section}.{key}" for section, settings in whole.items() for key in settings]
    values = st.one_of(st.sampled_from(ODD).map(lambda value: f"{value}"), st.text(max_size=12))

    def check(content: bytes, override: tuple[str, str]) -> None:
        path.write_bytes(content)
        for paths, overrides in ((path, []), (None, ["=".join(override)])):
            with contextlib.suppress(ConfigError):
                load_config(paths, overrides)

    def written(value: Any) -> bytes:
        return yaml.safe_dump(value).encode(errors="surrogatepass")

    sections = st.sampled_from(sorted(whole)).flatmap(lambda name: mutated_json({name: whole[name]}))
    content = st.one_of(sections.map(written), st.lists(lines, max_size=6).map(b"".join).flatmap(mutated_bytes))
    fuzz(check, content, st.tuples(st.sampled_from(keys), values), examples=12)


def test_packed_files(fuzz: Any, tmp_path: Path) -> None:
    path, key = tmp_path / "packed.safetensors", {"of": "x", "by": "y"}
    packed_file.write(path, {"a": torch.ones(5), "b": torch.ones(3, 2).bfloat16()}, facts={"n": 1}, key=key)
    good = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(CacheError):
            assert content == good or packed_file.read(path, key=key) is None
        with contextlib.suppress(CacheError):
            assert content == good or packed_file.read(path, key=key, mapped=True) is None

    fuzz(check, mutated_header(good), examples=80)


def test_gguf_files(fuzz: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf")
    good = path.read_bytes()
    end = good.index(b"blk.3.ffn_down.weight") + 64
    whole = mutated_bytes(good[:end]).map(lambda head: head + good[end : end + 50_000])

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(SourceError):
            file = GgufFile(path)
            for name in file.tensors:
                assert file.rows(name, 0, 2).nbytes < 1 << 24

    fuzz(check, st.one_of(whole, mutated_bytes(gguf_header())), examples=60)


def test_tokenizers(fuzz: Any, tmp_path: Path) -> None:
    made, folder, cache = tiny_tokenizer(), tmp_path / "model", tmp_path / "cache"
    made.save_pretrained(folder)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    wholes = {name: json.loads(good[name]) for name in good if name.endswith(".json")}

    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        if re.search(rb"\d{7}", content):
            return  # ids far apart take `tokenizers` minutes
        (folder / name).write_bytes(content)
        try:
            keep_tokenizer(folder, cache_dir=cache)
            for path in (cache / "tokenizers").iterdir():
                path.write_bytes(path.read_bytes()[: len(content)])  # perhaps damaged
            load_tokenizer(folder, cache_dir=cache)
        except SourceError:
            pass
        finally:
            (folder / name).write_bytes(good[name])
            shutil.rmtree(cache, ignore_errors=True)

    def changed(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        values = mutated_json(wholes[name]).map(lambda value: json.dumps(value).encode())
        return st.tuples(st.just(name), st.one_of(values, mutated_bytes(good[name])))

    fuzz(check, st.sampled_from(sorted(wholes)).flatmap(changed), examples=8)


UPDATES = (
    ("a", (Delta(index=3, token_ids=(1, 2), logprobs=(TokenLogprob(token_id=1, logprob=-0.5, top=((1, -0.5),)),)),)),
    ("b", Failure(message="broken", param="prompt", status=503)),
)
REQUEST = Request(
    request_id="r",
    prompt_ids=(1, 2),
    params=SamplingParams(max_tokens=2, logit_bias={7: -1.0}, structured_outputs=StructuredOutputsParams(regex="a")),
)


@pytest.mark.parametrize(
    ("content", "decode"),
    [(encode(UPDATES)[8:], decode_updates), (encode(("c", Call(call_id="c", requests=(REQUEST,))))[8:], decode_call)],
    ids=["updates", "calls"],
)
def test_messages(fuzz: Any, content: bytes, decode: Any) -> None:
    def check(changed: bytes) -> None:
        with contextlib.suppress(ValueError):
            decode(changed)

    fuzz(check, mutated_bytes(content), examples=100)
