"""Published versions: complete after a crash at any step, numbered once, rolled back, promoted, pruned."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fork_host import run_program
from support.tiny_models import random_draft, save_model

from aurora_lit.drafts import checkpoint as checkpoint_module
from aurora_lit.drafts import store as store_module
from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.drafts.versions import version_number
from aurora_lit.errors import CheckpointError
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save_model("llama", tmp_path_factory.mktemp("llama")), precision="fp32")


@pytest.fixture(scope="module")
def draft(target: Target) -> Eagle3Draft:
    return random_draft(target)


@pytest.fixture
def store(tmp_path: Path) -> DraftStore:
    return DraftStore(tmp_path / "live", keep=3)


def names(store: DraftStore) -> list[str]:
    return [version.name for version in store.versions()]


def events(store: DraftStore) -> list[tuple[str, str]]:
    return [(event["event"], event["version"]) for event in store.history()]


def test_an_empty_store_means_the_starting_draft(store: DraftStore) -> None:
    assert store.current() is None
    assert store.versions() == store.history() == []
    assert not store.folder.exists(), "looking changes nothing"


def test_a_file_is_no_folder_of_versions(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="set checkpoint.dir to a folder"):
        DraftStore(tmp_path / "file", keep=1).versions()


def test_a_published_draft_is_current_and_complete(store: DraftStore, target: Target, draft: Eagle3Draft) -> None:
    assert store.publish(draft, record={"score": 2.5, "domains": {"code": 1.5}}) == "draft-000001"
    assert store.current() == "draft-000001"
    assert (store.folder / "CURRENT").read_text() == "draft-000001\n"
    loaded = load_draft(store.folder / "draft-000001", target)
    assert torch.equal(loaded.lm_head.weight, draft.lm_head.weight.bfloat16().float())
    (version,) = store.versions()
    assert (version.number, version.retired, version.record["score"]) == (1, None, 2.5)
    assert version.record["time"] > 1.7e9
    assert events(store) == [("published", "draft-000001")]
    assert sorted(path.name for path in store.folder.iterdir()) == [".lock", "CURRENT", "draft-000001", "history.jsonl"]


def test_version_numbers_of_names() -> None:
    names = ("draft-000042", "draft-1234567", "smollm2-base", "draft-42", "draft-000042.tmp", "")
    assert [version_number(name) for name in names] == [42, 1234567, 0, 0, 0, 0]


def test_everything_is_on_disk_before_current_names_it(
    store: DraftStore, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def recording(function: Callable[..., object], word: str) -> Callable[..., object]:
        def wrapped(*paths: Path) -> object:
            steps.append(f"{word} {paths[-1].relative_to(store.folder.parent)}")
            return function(*paths)

        return wrapped

    monkeypatch.setattr(store_module, "sync", recording(store_module.sync, "sync"))
    monkeypatch.setattr(checkpoint_module, "sync", recording(checkpoint_module.sync, "sync"))
    monkeypatch.setattr(store_module.os, "replace", recording(store_module.os.replace, "name"))
    store.publish(draft, record={})
    new = "live/.new.draft-000001"
    files = ("config.json", "model.safetensors", "value_head.safetensors", "manifest.json")
    assert steps == [
        *(f"sync {new}/{name}" for name in files),
        f"sync {new}",
        "sync live/.new.record.json",
        f"name {new}/record.json",
        f"sync {new}",
        "name live/draft-000001",
        "sync live",
        "sync live/.new.CURRENT",
        "name live/CURRENT",
        "sync live",
    ]


def test_rolling_back_skips_what_was_retired_and_ends_at_the_starting_draft(
    store: DraftStore, draft: Eagle3Draft
) -> None:
    for _ in range(3):
        store.publish(draft, record={})
    assert store.roll_back(bad="draft-000002", reason="slow") == "draft-000003", "not current: only retired"
    assert store.roll_back(bad="draft-000003", reason="broken\nhead") == "draft-000001"
    assert [version.retired for version in store.versions()] == [None, "slow", "broken head"]
    assert store.roll_back(bad="draft-000001", reason="worse") is None
    assert store.current() is None
    assert store.publish(draft, record={}) == "draft-000004", "a number is not used twice"
    assert events(store)[3:] == [
        ("rolled_back", "draft-000002"),
        ("rolled_back", "draft-000003"),
        ("rolled_back", "draft-000001"),
        ("published", "draft-000004"),
        ("pruned", "draft-000001"),
    ]


def test_rolling_back_returns_to_what_was_served_before(store: DraftStore, draft: Eagle3Draft) -> None:
    for _ in range(2):
        store.publish(draft, record={})
    store.promote("draft-000001")
    store.publish(draft, record={})
    assert store.version_before("draft-000003") == "draft-000001"
    assert store.roll_back(bad="draft-000003", reason="slow") == "draft-000001"
    assert store.version_before("draft-000001") is None


def test_a_draft_that_cannot_be_written_leaves_nothing(
    store: DraftStore, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(draft, record={})
    before = sorted(path.name for path in store.folder.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module._Files, "write", full)
    with pytest.raises(OSError, match="No space"):
        store.publish(draft, record={})
    assert sorted(path.name for path in store.folder.iterdir()) == before


def test_the_starting_draft_cannot_be_retired(store: DraftStore, draft: Eagle3Draft) -> None:
    store.publish(draft, record={})
    for name in ("smollm2-base", "", "..", "draft-000009"):
        assert store.roll_back(bad=name, reason="x") == "draft-000001"
    assert not list(store.folder.parent.rglob("RETIRED"))


def test_rolling_back_to_a_version_retires_all_newer_ones(store: DraftStore, draft: Eagle3Draft) -> None:
    for _ in range(3):
        store.publish(draft, record={})
    store.roll_back_to("draft-000001", reason="by hand")
    assert store.current() == "draft-000001"
    assert [version.retired for version in store.versions()] == [None, "by hand", "by hand"]
    store.roll_back_to(None, reason="all of them")
    assert store.current() is None
    assert [version.retired for version in store.versions()] == ["all of them", "by hand", "by hand"]


def test_promoting_forces_a_retired_version_and_refuses_an_unknown_one(store: DraftStore, draft: Eagle3Draft) -> None:
    for _ in range(2):
        store.publish(draft, record={})
    store.roll_back(bad="draft-000002", reason="slow")
    store.promote("draft-000002")
    assert store.current() == "draft-000002"
    assert store.versions()[1].retired is None
    for unknown in ("draft-000007", "..", "CURRENT"):
        with pytest.raises(CheckpointError, match=r"no version .* existing versions: draft-000001, draft-000002"):
            store.promote(unknown)
    assert store.current() == "draft-000002"


def test_old_versions_are_pruned_except_the_current_one_and_the_one_to_roll_back_to(
    store: DraftStore, draft: Eagle3Draft
) -> None:
    for _ in range(5):
        store.publish(draft, record={})
    assert names(store) == ["draft-000003", "draft-000004", "draft-000005"]
    store.promote("draft-000004")
    DraftStore(store.folder, keep=2).prune()
    assert names(store) == ["draft-000003", "draft-000004", "draft-000005"], "3: to roll back to, 4: current"
    store.roll_back_to("draft-000003", reason="by hand")
    store.publish(draft, record={})
    DraftStore(store.folder, keep=2).prune()
    assert names(store) == ["draft-000003", "draft-000005", "draft-000006"], "5 is retired: 3 is to roll back to"
    assert ("pruned", "draft-000004") in events(store)


def test_a_folder_without_locks_is_told_with_a_remedy(store: DraftStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for change in (store.prune, lambda: store.roll_back(bad="draft-000001", reason="slow", wait=False)):
        with pytest.raises(CheckpointError, match=r"live: .* no locks .Function not implemented.; set checkpoint\.dir"):
            change()


def test_what_cannot_be_deleted_stays_and_hinders_nothing(
    store: DraftStore, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a version that `sudo aurora-lit learn` has published, or what it left when it was killed."""

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "record.json")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    (store.folder / ".new.draft-000002").mkdir(parents=True)
    for _ in range(4):
        store.publish(draft, record={})
    assert store.current() == "draft-000004"
    assert names(store) == ["draft-000002", "draft-000003", "draft-000004"]
    assert events(store).count(("pruned", "draft-000001")) == 1
    left = store.folder / ".new.gone.draft-000001"
    assert left.is_dir()
    assert caplog.messages == [f"{left} cannot be deleted (Permission denied); delete it by hand"]
    assert store.roll_back(bad="draft-000004", reason="slow") == "draft-000003"
    store.promote("draft-000002")
    assert store.current() == "draft-000002"


def test_the_version_to_roll_back_to_survives_retired_ones_between(store: DraftStore, draft: Eagle3Draft) -> None:
    for number in range(1, 7):
        store.publish(draft, record={})
        if 1 < number < 6:
            store.roll_back(bad=f"draft-{number:06d}", reason="slow")
    assert names(store) == ["draft-000001", "draft-000004", "draft-000005", "draft-000006"]
    assert store.roll_back(bad="draft-000006", reason="slow") == "draft-000001"


@pytest.mark.parametrize("content", ["", "draft-1\n", "../elsewhere\n", "draft-000001 \n", "draft-000001\nx"])
def test_an_invalid_current_is_an_error_until_the_next_version(
    store: DraftStore, draft: Eagle3Draft, content: str
) -> None:
    store.publish(draft, record={})
    (store.folder / "CURRENT").write_text(content)
    with pytest.raises(CheckpointError, match="CURRENT holds .*, which is not a version"):
        store.current()
    assert store.publish(draft, record={}) == "draft-000002"
    assert store.current() == "draft-000002"


def test_a_history_cut_short_loses_one_line(store: DraftStore, draft: Eagle3Draft) -> None:
    store.publish(draft, record={})
    with (store.folder / "history.jsonl").open("a") as history:
        history.write('{"event": "pub')
    store.publish(draft, record={})
    assert events(store) == [("published", "draft-000001"), ("published", "draft-000002")]


def test_concurrent_publishers_get_different_numbers(store: DraftStore, draft: Eagle3Draft) -> None:
    published: list[str] = []

    def publish() -> None:
        published.extend(DraftStore(store.folder, keep=100).publish(draft, record={}) for _ in range(5))

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(published) == [f"draft-{number:06d}" for number in range(1, 21)] == names(store)


CRASHES = """
import json, os
from types import SimpleNamespace
import torch
from support.crash_points import kill_at_every_step
from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.modules.draft.eagle3 import Eagle3Draft, Eagle3Config
from aurora_lit.drafts.store import DraftStore

torch.set_num_threads(1)
os.fsync = lambda _: None  # a killed process loses nothing that it has written; the disk is slow
config = Eagle3Config(hidden_size=8, target_hidden_size=8, intermediate_size=8, num_attention_heads=1,
    num_key_value_heads=1, head_dim=8, vocab_size=11, draft_vocab_size=7, aux_layer_ids=(1, 2, 3))
target = SimpleNamespace(vocab_size=11, hidden_size=8, aux_layer_ids=(1, 2, 3))
store = DraftStore(folder, keep=2)
with torch.no_grad():
    drafts = [Eagle3Draft(config) for _ in range(9)]
    for number, draft in enumerate(drafts):
        draft.lm_head.weight.fill_(number)
for number in (1, 2, 3):
    store.publish(drafts[number], record={"n": number})
actions = {
    "publish": lambda: store.publish(drafts[4], record={"n": 4}),
    "roll_back": lambda: store.roll_back(bad="draft-000003", reason="x"),
    "promote": lambda: store.promote("draft-000002"),
}
seen, steps = set(), 0
for step in kill_at_every_step(actions[action], folder=folder):
    steps += 1
    current = store.current()
    seen.add(current)
    assert load_draft(folder / current, target).lm_head.weight[6, 7] == int(current[-6:]), step
    for each in store.versions():
        load_draft(folder / each.name, target)
        assert each.record.keys() >= {"n", "time"}, step
    # The next process finds a working store, without leftovers of the killed one.
    last = store.publish(drafts[8], record={"n": 8})
    assert store.current() == last and load_draft(folder / last, target).lm_head.weight[6, 7] == 8
    left = sorted(p.name for p in folder.iterdir() if not p.name.startswith("draft-"))
    assert left == [".lock", "CURRENT", "history.jsonl"], left
print(json.dumps({"steps": steps, "seen": sorted(seen)}))
"""


@pytest.mark.parametrize(("action", "least_steps"), [("publish", 20), ("roll_back", 7), ("promote", 4)])
def test_killed_at_any_step_current_names_a_complete_version(action: str, least_steps: int, tmp_path: Path) -> None:
    values = f"folder, action = Path({str(tmp_path / 'live')!r}), {action!r}\n"
    done = run_program(f"from pathlib import Path\n{values}{CRASHES}", timeout_s=250)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] >= least_steps
    assert len(report["seen"]) >= 2, "kills before and after the switch"
