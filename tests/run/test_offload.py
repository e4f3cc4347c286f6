"""Hidden states wait where they are told to, and the place decides no bit of a result."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lrc.estimate.room
from lrc.errors import OutOfResources, UserError
from lrc.estimate.memory import estimate_memory
from lrc.estimate.room import choose_place, known_place
from lrc.plan.job import Job, make_job, open_checkpoint
from lrc.plan.library import read_draft
from lrc.run.offload import ON_DEVICE, States
from lrc.run.settings import Run
from lrc.verbs.compress import compress

TinyCheckpoint = Callable[..., Path]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def prepare(model: str | Path, plan: str | Path) -> Job:
    """A model and a plan resolved for it."""
    return make_job(*open_checkpoint(model, Run()), read_draft(plan))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    body = "keep: 0.6\nprojections: {embed: {method: svd, keep: 0.5}}\ncalibration: {samples: 5, seq_len: 48}"
    path.write_text(f"format: 1\n{body}\n", encoding="utf-8")
    return path


@pytest.fixture
def job(tiny_checkpoint: TinyCheckpoint, plan: Path) -> Job:
    return prepare(tiny_checkpoint("llama"), plan)


def test_on_the_device_nothing_is_copied() -> None:
    x = torch.randn(2, 3)
    assert ON_DEVICE.keep(x) is x


def test_what_is_on_disk_has_no_name_and_outlives_its_source(tmp_path: Path) -> None:
    states = States("disk", tmp_path)
    x = torch.randn(4, 5, 6).transpose(0, 1)
    held, expected = states.keep(x), x.clone()
    x.zero_()
    assert torch.equal(held, expected)
    assert held.untyped_storage().filename is not None
    assert not list(tmp_path.iterdir())
    assert states.keep(torch.empty(0, 3)).shape == (0, 3)


def test_a_full_disk_is_told_before_a_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutOfResources, match=r"the disk is full: .*96 bytes more"):
        States("disk", tmp_path).keep(torch.zeros(4, 6))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_place_changes_no_bit(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str, plan: Path
) -> None:
    text, model = tmp_path / "text.txt", tiny_checkpoint(family)
    text.write_text(
        "It was a bright cold day in April, and nobody had counted the words. " * 20, encoding="utf-8"
    )
    written = {}
    for place in ("device", "disk"):
        out = tmp_path / place
        report = compress(model, plan, out=out, calib=str(text), ppl=[], run=Run(device="cpu", offload=place))
        assert report.offload == place
        written[place] = [
            (out / name).read_bytes() for name in ("model.safetensors", "lrc.json", "config.json")
        ]
    assert written["device"] == written["disk"]


def test_the_first_place_with_room_is_taken(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = estimate_memory(job, torch.float32, 1, samples=64)
    free: dict[str, float] = {}
    monkeypatch.setattr(lrc.estimate.room, "free_bytes", lambda device: free[device.type])

    def chosen(device: torch.device, on_device: float, on_host: float) -> str:
        free.update(cuda=on_device, cpu=on_host)
        return choose_place(None, job, device, torch.float32, 1, 64)

    away = memory.states + memory.gradients
    assert chosen(CUDA, 1.3 * memory.peak, 0) == "device"
    assert chosen(CUDA, 1.2 * memory.peak, 1.3 * away) == "host"
    assert chosen(CUDA, 1.2 * memory.peak, 1.2 * away) == "disk"
    assert chosen(CPU, 0, 1.3 * memory.peak) == "device"
    assert chosen(CPU, 0, 1.2 * memory.peak) == "disk"


def test_a_place_that_is_not_known_is_refused(job: Job) -> None:
    assert choose_place(known_place("disk"), job, CPU, torch.float32, 1, 4) == "disk"
    assert known_place(None) is None
    with pytest.raises(UserError, match=r"--offload disc: .*did you mean 'disk'\?"):
        known_place("disc")
