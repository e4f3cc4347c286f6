"""Turn a model's path, built-in name, short name or hub id into a folder."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from lrc.checkpoint.files import read_json
from lrc.errors import UserError, nearest
from lrc.hub.conversion import ADAPTER, from_adapter, from_gguf, is_adapter
from lrc.hub.conversion import dequantized as dequantize

ASSETS = Path(__file__).parents[1] / "assets"
BUILTIN = ("tiny-gpt2", "tiny-llama")
GGUF = ".gguf"
ALLOW_PICKLE = "pass --allow-pickle to read pickled ones"
SHORT_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "llama-65b": "huggyllama/llama-65b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}
# Config, weights, tokenizer, chat template, licence.
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]
UNWANTED = ["*/*", "consolidated*"]  # the same weights in other formats


@dataclass(frozen=True)
class ResolvedModel:
    """Hold a model's folder, the name or id given for it, and the commit of a hub model.

    ``note`` says what the folder was made from, if the source is no full-precision checkpoint.
    """

    path: Path
    source: str
    revision: str | None = None
    builtin: bool = False
    note: str | None = None

    @property
    def name(self) -> str:
        """Return the last part of the source, for file names."""
        # of a link, not of what it points to
        return Path(os.path.abspath(Path(self.source).expanduser())).name.removesuffix(GGUF)


def resolve_model(
    name: str, *, revision: str | None = None, allow_pickle: bool = False, remedy: str = ALLOW_PICKLE
) -> ResolvedModel:
    """Find a model's folder; download it from the hub if it is not on this machine.

    A GGUF file is dequantized into a folder of the cache, and a PEFT adapter is merged into its base there. Pickled
    weights (``.bin``) are downloaded only with ``allow_pickle``; ``remedy`` ends the message if there are no others.
    Raises UserError for an unknown name and for a repository that cannot be downloaded or converted.
    """
    found = _locate(name, revision, allow_pickle, remedy)
    if is_adapter(found.path):
        return _merged(found, allow_pickle)
    if not (found.path / "config.json").is_file():
        files = sorted(file.name for file in found.path.glob(f"*{GGUF}"))
        ggufs = f"; name one of its GGUF files, such as {found.path / files[0]}" if files else ""
        raise UserError(f"{name} is not a checkpoint: the folder has no config.json{ggufs}")
    return found


def _locate(name: str, revision: str | None, allow_pickle: bool, remedy: str) -> ResolvedModel:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # of a user without a home
        raise UserError(f"there is no folder {name}: {error}") from error
    if path.is_dir():
        return ResolvedModel(path, name)
    if path.is_file():
        if path.suffix == GGUF:
            made = from_gguf(path)
            note = f"{name} is a GGUF file; its weights were read as float32, into {made}"
            return ResolvedModel(made, name, note=note)
        raise UserError(f"{name} is a file; a model is the folder that holds config.json, or a GGUF file")
    if name in BUILTIN:
        return ResolvedModel(ASSETS / name, name, builtin=True)
    if name in SHORT_NAMES or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return _download(SHORT_NAMES.get(name, name), revision, allow_pickle, remedy)
    if "/" in name or name.startswith((".", "~")):
        raise UserError(f"there is no folder {name}")
    known = nearest(name, (*SHORT_NAMES, *BUILTIN))
    raise UserError(f"unknown model {name!r}; {known}, or a folder, or org/name")


def dequantized(
    model: ResolvedModel, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> ResolvedModel:
    """Return a quantized model's full-precision copy in the cache; any other model, and lrc's output, as it is.

    Raises UserError naming the format if transformers cannot dequantize it.
    """
    method = _quantization(model.path)
    if method in (None, "lrc"):
        return model
    made = dequantize(model.path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    note = f"{model.source} is quantized ({method}); its weights were dequantized, into {made}"
    return replace(model, path=made, note=" ".join(filter(None, (model.note, note))))


def default_texts(model: str) -> tuple[str, ...]:
    """Return the default texts of an evaluation: ``builtin`` for built-in models and their outputs, else two texts."""
    return ("builtin",) if _is_builtin(model) else ("wikitext2", "c4")


def default_calibration(model: str) -> str:
    """Return the default calibration: ``builtin`` for built-in models and their outputs, else ``general``."""
    return "builtin" if _is_builtin(model) else "general"


def _is_builtin(model: str) -> bool:
    manifest = Path(model).expanduser() / "lrc.json"
    if manifest.is_file():
        model = json.loads(manifest.read_text(encoding="utf-8"))["model"]["source"]
    return model in BUILTIN


def _merged(found: ResolvedModel, allow_pickle: bool) -> ResolvedModel:
    """Return the base of a PEFT adapter with the adapter merged into it."""
    settings = read_json(found.path / ADAPTER)
    name = settings.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(
            f"{found.path / ADAPTER} names no base (base_model_name_or_path); write the base's there"
        )
    if not allow_pickle and not (found.path / "adapter_model.safetensors").is_file():
        raise UserError(f"{found.source} has no safetensors weights; {ALLOW_PICKLE}")
    try:
        base = _locate(name, settings.get("revision"), allow_pickle, ALLOW_PICKLE)
    except UserError as error:
        raise UserError(f"{found.source} is a PEFT adapter, and its base cannot be had: {error}") from error
    if is_adapter(base.path):
        raise UserError(
            f"{found.source} is a PEFT adapter of {name}, which is an adapter too; merge that first"
        )
    if _quantization(base.path) == "lrc":
        raise UserError(f"{found.source} is a PEFT adapter of {name}, which is compressed already (lrc)")
    base = dequantized(base, allow_pickle=allow_pickle)
    made = from_adapter(found.path, base.path, allow_pickle=allow_pickle)
    note = f"{found.source} is a PEFT adapter; it was merged into {name}, in {made}"
    return replace(found, path=made, note=" ".join(filter(None, (base.note, note))))


def _quantization(folder: Path) -> str | None:
    """Return the format of quantized weights that config.json names; None if it names none."""
    found = read_json(folder / "config.json").get("quantization_config")
    if found is None:
        return None
    return str(found.get("quant_method", "quantized") if isinstance(found, dict) else found)


def _download(repository: str, revision: str | None, allow_pickle: bool, remedy: str) -> ResolvedModel:
    from huggingface_hub import errors, snapshot_download

    what = f"{repository} at revision {revision}" if revision else repository
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*WANTED, "*.bin"] if allow_pickle else WANTED,
            ignore_patterns=UNWANTED,
        )
    except errors.GatedRepoError:
        message = f"{what} is gated: ask for access on its page at the hub, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        message = f"{repository} has no revision {revision!r}"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        message = f"there is no folder and no public model {repository} on the Hugging Face hub"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        message = f"{what} is not on this machine and the Hugging Face hub cannot be reached; pass a folder"
    except errors.HfHubHTTPError as error:
        message = f"{what} cannot be downloaded: {error}"
    except OSError as error:
        message = f"{what} cannot be stored: {error}"
    else:
        path = Path(folder)
        if not any(path.glob("*.safetensors")) and not allow_pickle:
            raise UserError(f"{what} has no safetensors weights; {remedy}")
        return ResolvedModel(path, repository, path.name)
    raise UserError(message)
