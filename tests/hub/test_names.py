"""What a user may call a model, and what is said of what is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from lrc.errors import UserError
from lrc.hub.names import ASSETS, BUILTIN, SHORT_NAMES, ResolvedModel, resolve_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A hub with one snapshot; the calls it gets are recorded, and ``raises`` makes it fail."""
    state: dict[str, Any] = {"folder": tmp_path / "0123abc", "raises": None}
    state["folder"].mkdir()
    (state["folder"] / "model.safetensors").touch()
    (state["folder"] / "config.json").touch()

    def snapshot_download(repository: str, **kwargs: Any) -> str:
        state["call"] = {"repository": repository, **kwargs}
        if state["raises"]:
            raise state["raises"]
        return str(state["folder"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind.__new__(kind)


def test_folder_comes_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert resolve_model(str(tmp_path)) == ResolvedModel(tmp_path, str(tmp_path))


def test_a_folder_that_shadows_a_short_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("gpt2") == ResolvedModel(Path("gpt2"), "gpt2")


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin(name: str) -> None:
    assert resolve_model(name) == ResolvedModel(ASSETS / name, name, builtin=True)
    assert (ASSETS / name).is_dir()


def test_short_name_and_hub_id(hub: dict[str, Any]) -> None:
    expected = ResolvedModel(hub["folder"], "huggyllama/llama-7b", "0123abc")
    assert resolve_model("llama-7b") == expected
    assert resolve_model("huggyllama/llama-7b", revision="main") == expected
    assert hub["call"]["revision"] == "main"
    assert "*.bin" not in hub["call"]["allow_patterns"]
    assert {"llama-13b", "llama-2-7b", "llama-3.1-8b", "gpt2", "smollm2-135m"} <= set(SHORT_NAMES)


def test_pickled_weights_only_if_asked_for(hub: dict[str, Any]) -> None:
    (hub["folder"] / "model.safetensors").unlink()
    with pytest.raises(UserError, match="org/name has no safetensors weights"):
        resolve_model("org/name")
    with pytest.raises(UserError, match="has no safetensors weights; convert them"):
        resolve_model("org/name", remedy="convert them")
    assert resolve_model("org/name", allow_pickle=True).path == hub["folder"]
    assert "*.bin" in hub["call"]["allow_patterns"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError), "org/name is gated"),
        (http_error(errors.RepositoryNotFoundError), "no public model org/name on the Hugging Face hub"),
        (errors.HFValidationError("bad"), "no public model org/name on the Hugging Face hub"),
        (errors.LocalEntryNotFoundError("offline"), "org/name is not on this machine.*cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "org/name is not on this machine.*cannot be reached"),
        (OSError(28, "No space left on device"), "org/name cannot be stored: .*No space left"),
    ],
)
def test_hub_failures_are_one_message(hub: dict[str, Any], error: Exception, message: str) -> None:
    hub["raises"] = error
    with pytest.raises(UserError, match=message):
        resolve_model("org/name")


def test_unknown_revision(hub: dict[str, Any]) -> None:
    hub["raises"] = http_error(errors.RevisionNotFoundError)
    with pytest.raises(UserError, match="org/name has no revision 'v9'"):
        resolve_model("org/name", revision="v9")


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'lama-7b'; did you mean 'llama-7b'\?.*or a folder, or org/name"):
        resolve_model("lama-7b")
    with pytest.raises(UserError, match=r"did you mean 'tiny-gpt2'\?"):
        resolve_model("tiny-gpt")
    with pytest.raises(UserError, match=r"there is no folder \./nowhere"):
        resolve_model("./nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve_model(str(tmp_path / "model.bin"))


def test_a_link_is_named_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "chain").symlink_to("link")
    monkeypatch.chdir(tmp_path)
    for spelling in ("link", "./link", "link/", f"{tmp_path}/link", "snapshots/../link"):
        assert resolve_model(spelling).name == "link"
    assert resolve_model("chain").name == "chain"
    assert resolve_model("snapshots/0123abc").name == "0123abc"
    monkeypatch.chdir(folder)
    assert resolve_model(".").name == "0123abc"
