from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lrc.checkpoint import durable
from lrc.checkpoint import staging as module
from lrc.checkpoint.staging import MANIFEST, Staging, staging
from lrc.errors import Resumable, UserError

KEY = {"plan": {"keep": 0.5}, "seed": 0}


def open_staging(out: Path, key: dict[str, Any] = KEY, *, fresh: bool = False, force: bool = False) -> Any:
    return staging(out, key, source=out.with_name("source"), fresh=fresh, force=force)


def write_and_fail(out: Path, error: BaseException) -> None:
    """A run that stores one part and then fails."""
    with open_staging(out) as stage:
        stage.write("layer-0", {"b": torch.eye(2)}, {"table": {"x": 1}})
        raise error


def finish(stage: Staging, value: float = 1.0) -> None:
    stage.write("rest", {"a": torch.full((3,), value)}, {})
    stage.write("layer-0", {"b": torch.full((2, 2), value)}, {"table": {}})
    stage.assemble(["rest", "layer-0"])
    stage.write_json(MANIFEST, {"value": value})
    stage.publish()


def work(out: Path) -> Path:
    """The staging folder of an output."""
    return out.with_name(f".{out.name}.lrc-partial")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model"


def test_the_folder_appears_only_when_whole(out):
    with open_staging(out) as stage:
        stage.write("rest", {"a": torch.ones(3)}, {})
        assert not out.exists()
        finish(stage)
    assert sorted(p.name for p in out.iterdir()) == [MANIFEST, "model.safetensors"]
    tensors = load_file(out / "model.safetensors")
    assert {n: t.shape for n, t in tensors.items()} == {"a": (3,), "b": (2, 2)}
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_an_earlier_output_is_replaced_at_once(out):
    for value in (1.0, 2.0):
        with open_staging(out) as stage:
            if value == 2:
                assert load_file(out / "model.safetensors")["a"][0] == 1
            finish(stage, value)
    assert load_file(out / "model.safetensors")["a"][0] == 2
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def killed_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    """Have the ``number``-th call of a function end the run before it does anything."""
    left, call = [number], getattr(owner, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)


@pytest.mark.parametrize(("number", "named"), [(1, 1.0), (2, None), (3, 2.0)])
def test_a_run_killed_at_its_last_renames_loses_nothing(out, monkeypatch, number, named):
    """The renames of the earlier output, of the finished one, and of the staging folder."""
    with open_staging(out) as stage:
        finish(stage)
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt), open_staging(out) as stage:
        killed_at(patch, module.Path, "rename", number)
        finish(stage, 2.0)
    found = load_file(out / "model.safetensors")["a"][0] if out.exists() else None
    assert found == named
    with open_staging(out) as stage:
        assert out.exists()
        assert stage.has("rest")
        stage.assemble(["rest", "layer-0"])
        stage.write_json(MANIFEST, {"value": 2.0})
        stage.publish()
    assert load_file(out / "model.safetensors")["a"][0] == 2
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_a_staging_folder_that_was_not_removed_to_the_end_is_removed_by_the_next_run(out):
    doomed = out.with_name(".model.lrc-partial.old")
    (doomed / "parts").mkdir(parents=True)
    (doomed / "parts" / "rest.safetensors").write_text("left over")
    with open_staging(out) as stage:
        assert not stage.has("rest")
        finish(stage, 3.0)
    assert load_file(out / "model.safetensors")["a"][0] == 3
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_a_run_killed_before_its_journal_was_written_starts_clean(out):
    parts = work(out) / "parts"
    parts.mkdir(parents=True)
    for suffix in ("json", "safetensors"):
        (parts / f"rest.{suffix}").write_text("{}")
    with open_staging(out) as stage:
        assert not stage.has("rest")
        finish(stage)
    assert sorted(p.name for p in out.iterdir()) == [MANIFEST, "model.safetensors"]


def test_what_a_killed_run_laid_out_is_laid_out_anew(out):
    with suppress(KeyboardInterrupt), open_staging(out) as stage:
        stage.write("rest", {"a": torch.ones(3)}, {})
        stage.assemble(["rest"])
        stage.write_file("tokenizer.json", "of a source that has none any more")
        (stage.folder / ".tmpAbCdEf").write_text("half a file")
        raise KeyboardInterrupt
    with open_staging(out) as stage:
        finish(stage)
    assert sorted(p.name for p in out.iterdir()) == [MANIFEST, "model.safetensors"]


def test_half_written_parts_of_a_killed_run_are_removed(out):
    with suppress(KeyboardInterrupt), open_staging(out) as stage:
        stage.write("layer-0", {"b": torch.eye(2)}, {})
        for name in (".tmpAbCdEf", "rest.safetensors", "layer-1.safetensors.partial", "rest.json.partial"):
            (work(out) / "parts" / name).write_text("half a file")
        raise KeyboardInterrupt
    with open_staging(out) as stage:
        held = sorted(path.name for path in (work(out) / "parts").iterdir())
        assert held == ["layer-0.json", "layer-0.safetensors"]
        assert stage.has("layer-0")


def test_what_counts_is_on_the_disk_first(out, monkeypatch):
    """A file is synced before it has its name, and its name before what stands on it is written."""
    done: list[tuple[str, str]] = []

    def note(what: str) -> Any:
        def call(path: Path, *args: Any) -> None:
            done.append((what, path.name))

        return call

    sync, replace, rename = durable.sync, Path.replace, Path.rename
    for owner in (module, durable):
        monkeypatch.setattr(owner, "sync", lambda path: (note("sync")(path), sync(path)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (note("name")(to), replace(path, to)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (note("name")(Path(to)), rename(path, to)))
    with open_staging(out) as stage:
        finish(stage)

    def at(what: str, name: str, after: int = 0) -> int:
        return next(i for i, event in enumerate(done) if i >= after and event == (what, name))

    for part in ("rest", "layer-0"):
        data = at("sync", f"{part}.safetensors.partial")
        entry = at("sync", "parts", at("name", f"{part}.safetensors", data))
        assert entry < at("name", f"{part}.json", at("sync", f"{part}.json.partial"))
    weights = at("name", "model.safetensors", at("sync", "model.safetensors.partial"))
    assert weights < at("sync", "checkpoint", at("name", MANIFEST, weights)) < at("name", "model")
    published = at("sync", out.parent.name, at("name", "model"))
    assert published < at("name", ".model.lrc-partial.old")


def test_a_mistake_of_the_user_leaves_nothing_behind(out):
    with pytest.raises(UserError, match="no such text"):
        write_and_fail(out, UserError("no such text"))
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_is_no_output_is_replaced_only_by_force(out):
    out.mkdir()
    (out / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="not an lrc output"), open_staging(out):
        pass
    assert (out / "thesis.tex").read_text() == "dear"
    with open_staging(out, force=True) as stage:
        assert (out / "thesis.tex").exists()
        finish(stage)
    assert not (out / "thesis.tex").exists()


def test_the_current_folder_is_not_replaced(out, monkeypatch):
    (out / "below").mkdir(parents=True)
    (out / MANIFEST).write_text("{}")
    monkeypatch.chdir(out / "below")
    with pytest.raises(UserError, match="current folder"), open_staging(out):
        pass


def test_a_folder_that_is_not_there_or_not_writable_is_refused(out, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"), open_staging(tmp_path / "no" / "model"):
        pass
    monkeypatch.setattr(module.os, "access", lambda *args: False)
    with pytest.raises(UserError, match="read-only"), open_staging(out):
        pass


def test_a_run_that_died_is_taken_up_with_its_parts(out):
    with pytest.raises(ZeroDivisionError):
        write_and_fail(out, ZeroDivisionError())
    assert not out.exists()
    with open_staging(out) as stage:
        assert stage.has("layer-0")
        assert not stage.has("rest")
        assert stage.record("layer-0") == {"table": {"x": 1}}
        assert torch.equal(stage.tensors("layer-0")["b"], torch.eye(2))
        assert stage.headers("layer-0")["b"].shape == (2, 2)


def test_a_part_without_its_record_is_not_finished(out, monkeypatch):
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with open_staging(out) as stage:
        monkeypatch.setattr(module, "write_text", fail)
        stage.write("rest", {"a": torch.ones(3)}, {})
        with pytest.raises(KeyboardInterrupt):
            stage.settle()
        assert not stage.has("rest")


def test_a_changed_source_is_told_before_settings_that_follow_from_it(out):
    """Text that the model writes is other text once a weight is another."""
    (source := out.with_name("source")).mkdir()
    (file := source / "weights").write_bytes(b"one")

    def opened(key: dict[str, Any]) -> Any:
        return staging(out, key, source=source, files=[file], fresh=False, force=False)

    with opened(KEY) as stage:
        stage.write("rest", {"a": torch.ones(3)}, {})
    file.write_bytes(b"two")
    with pytest.raises(Resumable, match="weights has changed"), opened({**KEY, "calibration": "b"}):
        pass
    with pytest.raises(Resumable, match="weights has changed"), opened(KEY):
        pass
    file.write_bytes(b"one")
    with opened(KEY) as stage:
        assert stage.has("rest")


def test_other_settings_are_named_and_need_fresh(out):
    with open_staging(out) as stage:
        stage.write("rest", {"a": torch.ones(3)}, {})
    other = {"plan": {"keep": 0.6}, "seed": 0}
    with pytest.raises(UserError, match=r"other settings \(plan\).*--fresh"), open_staging(out, other):
        pass
    with open_staging(out, {"plan": {"keep": 0.5}, "seed": 0}) as stage:
        assert stage.has("rest")
    with open_staging(out, other, fresh=True) as stage:
        assert not stage.has("rest")
    with open_staging(out, other) as stage:
        assert not stage.has("rest")


def test_two_runs_at_once_are_kept_apart_and_a_dead_ones_lock_dies(out):
    code = f"""
import sys
from contextlib import suppress
from pathlib import Path
from lrc.checkpoint.staging import staging
with staging(Path({str(out)!r}), {KEY!r}, source=Path("/nowhere"), fresh=False, force=False):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing"), open_staging(out, fresh=True):
            pass
        other.kill()
        other.wait()
    with open_staging(out) as stage:
        finish(stage)
    assert out.is_dir()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full.*free some space"),
        (module.SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (module.SafetensorError("I/O error: File too large (os error 27)"), "as large as files may.*ulimit"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "your quota of the disk"),
    ],
)
def test_a_full_disk_is_said_and_the_rest_is_kept(out, monkeypatch, error, told):
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    def run() -> None:
        with open_staging(out) as stage:
            stage.write("layer-0", {"b": torch.eye(2)}, {})
            stage.settle()
            monkeypatch.setattr(module, "save_file", full)
            stage.write("rest", {"a": torch.ones(3)}, {})

    with pytest.raises(UserError, match=told):
        run()
    monkeypatch.undo()
    with open_staging(out) as stage:
        assert stage.has("layer-0")
        assert not stage.has("rest")
        finish(stage)
    assert out.is_dir()


def test_other_errors_of_the_file_system_are_not_the_disk_being_full(out, monkeypatch):
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with open_staging(out) as stage:
        monkeypatch.setattr(module, "save_file", denied)
        stage.write("rest", {"a": torch.ones(3)}, {})
        with pytest.raises(PermissionError):
            stage.settle()


def test_a_part_is_written_while_the_run_goes_on_and_waited_for_where_it_is_read(out, monkeypatch):
    going, gone_on = module.save_file, threading.Event()

    def slow(*args: Any, **kwargs: Any) -> None:
        assert gone_on.wait(60)
        going(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", slow)
    with open_staging(out) as stage:
        stage.write("layer-0", {"b": torch.eye(2)}, {"table": {"x": 1}})
        assert not stage.has("rest")
        gone_on.set()
        assert stage.has("layer-0")
        assert stage.record("layer-0") == {"table": {"x": 1}}


def test_what_went_wrong_behind_the_run_is_raised_at_the_next_part(out, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_staging(out) as stage:
        stage.write("layer-0", {"b": torch.eye(2)}, {})
        stage.settle()
        monkeypatch.setattr(module, "save_file", full)
        stage.write("layer-1", {"b": torch.eye(2)}, {})
        with pytest.raises(UserError, match="the disk is full"):
            stage.write("layer-2", {"b": torch.eye(2)}, {})


@pytest.mark.parametrize("damage", ["cut", "flip"])
@pytest.mark.parametrize("use", ["tensors", "assemble"])
def test_a_damaged_part_says_how_to_go_on(out, damage, use):
    with suppress(KeyboardInterrupt), open_staging(out) as stage:
        stage.write("rest", {"a": torch.ones(3)}, {})
        raise KeyboardInterrupt
    file = work(out) / "parts" / "rest.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    told = r"rest.safetensors is damaged.*delete it.*--fresh"
    with pytest.raises(UserError, match=told), open_staging(out) as stage:
        stage.assemble(["rest"]) if use == "assemble" else stage.tensors("rest")
    file.unlink()
    with open_staging(out) as stage:
        assert not stage.has("rest")
        finish(stage)
    assert out.is_dir()


def test_the_hashes_are_those_of_the_files_and_of_their_values(out, monkeypatch):
    for limit in (0, 2**30):
        monkeypatch.setattr(module, "_SINGLE_FILE_BYTES", limit)
        with open_staging(out) as stage:
            stage.write("rest", {"a": torch.ones(3), "none": torch.empty(0)}, {})
            stage.write("layer-0", {"b": torch.eye(2, dtype=torch.bfloat16)}, {})
            stage.assemble(["rest", "layer-0"])
            stage.write_json("config.json", {})
            found = stage.hashes()
            files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in stage.folder.iterdir()}
        assert found["files"] == files
        assert found["source"] == {}
        by_tensor = {name: digest for held in found["tensors"].values() for name, digest in held.items()}
        assert by_tensor == {
            "a": hashlib.sha256(torch.ones(3).numpy().tobytes()).hexdigest()[:32],
            "none": hashlib.sha256(b"").hexdigest()[:32],
            "b": hashlib.sha256(bytes.fromhex("803f00000000803f")).hexdigest()[:32],
        }
        for file, held in found["tensors"].items():
            assert set(load_file(work(out) / "checkpoint" / file)) == set(held)


def test_a_large_checkpoint_keeps_its_parts_as_shards(out, monkeypatch):
    monkeypatch.setattr(module, "_SINGLE_FILE_BYTES", 10)
    with open_staging(out) as stage:
        finish(stage)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 4 + 4 * 4
    assert set(index["weight_map"]) == {"a", "b"}
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    assert not (out / "model.safetensors").exists()


def test_views_are_stored_as_they_look(out):
    x = torch.arange(12.0).view(3, 4)
    with open_staging(out) as stage:
        stage.write("rest", {"turned": x.T, "first": x[0], "second": x[1], "none": x.new_empty(0)}, {})
        held = stage.tensors("rest")
    assert torch.equal(held["turned"], x.T)
    assert torch.equal(held["first"], x[0])
    assert torch.equal(held["second"], x[1])
    assert held["none"].shape == (0,)
