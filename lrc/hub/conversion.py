"""Turn a model that is no full-precision checkpoint into one, once, in a folder of the Hugging Face cache.

These are a GGUF file, a PEFT adapter, which is merged into its base, and a folder of quantized weights. transformers
and PEFT read the whole model into memory.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError, safe_open

from lrc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
_MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_FORMAT = 2  # of what a conversion does; copies of an older one are made again
_PACKAGES = ("transformers", "peft", "gguf", "compressed-tensors", "bitsandbytes")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)
_ELSEWHERE = "set HF_HOME to a folder that can"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_BESIDE = (*_TOKENIZER, "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds a PEFT adapter. Raises UserError if it also holds the weights of a model.

    transformers would load both together, and what reads the files would see the model alone.
    """
    if not (folder / ADAPTER).is_file():
        return False
    if weights := _files(folder, _MODEL_WEIGHTS):
        raise UserError(
            f"{folder} holds a model ({weights[0].name}) and a PEFT adapter ({ADAPTER}); move one to another folder"
        )
    return True


def from_gguf(file: Path) -> Path:
    """Return a folder with the model of a GGUF file in float32, dequantized. A tokenizer beside the file is used
    instead of the one in it.

    Raises UserError for a file that transformers or the gguf package cannot read.
    """
    import transformers

    def make(folder: Path) -> None:
        options: dict[str, Any] = {"gguf_file": file.name, "dtype": "float32"}
        if hasattr(transformers, "GgufConfig"):  # newer releases keep weights quantized by default
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = _load(file.parent, **options)
        _check_rotary(file, model.config)
        _save(model, folder)
        if (file.parent / "tokenizer.json").is_file():
            _copy(file.parent, _TOKENIZER, folder)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            tokenizer.save_pretrained(folder)

    with _blamed_on(file):
        return _cached(file.stem, [file, *_files(file.parent, _TOKENIZER)], make)


def from_adapter(adapter: Path, base: Path, *, allow_pickle: bool = False) -> Path:
    """Return a folder with ``base`` and a PEFT adapter merged into it, in the base's precision.

    The adapter's tokenizer, if it has one, takes the place of the base's. Raises UserError for an adapter that cannot
    be merged or has other weights than ``base`` takes.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"{adapter} is a PEFT adapter, and peft is not installed; pip install peft"
        ) from error

    def make(folder: Path) -> None:
        whole = _load(base, use_safetensors=None if allow_pickle else True)
        with warnings.catch_warnings():
            # of names that do not fit and of tied matrices, which are refused, and of heads untied
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(whole, adapter)
            settings: Any = model.active_peft_config
            if settings.is_prompt_learning:
                kind = settings.peft_type.value
                raise UserError(
                    f"{adapter} is a {kind} adapter, which has no weights to merge; name its base"
                )
            _check_names(peft, model, adapter, base)
            _check_tied(peft, model, adapter)
            merged = model.merge_and_unload(safe_merge=True)
        _save(merged, folder)
        _copy(base, _BESIDE, folder)
        if (adapter / "tokenizer_config.json").is_file():
            _copy(adapter, _TOKENIZER, folder)

    with _blamed_on(adapter):
        return _cached(f"{base.name}-{adapter.name}", [*_files(adapter, ("*",)), *_files(base, ("*",))], make)


def dequantized(folder: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Path:
    """Return a folder with the weights of a quantized checkpoint in its own config's precision.

    Raises UserError naming the format if transformers cannot dequantize it.
    """
    from transformers import AutoConfig

    def make(made: Path) -> None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        named = config.quantization_config
        model = _load(
            folder,
            config=config,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            quantization_config=_dequantizing(named, folder),
        )
        if getattr(model, "is_quantized", False):
            model = model.dequantize()
        # transformers cannot turn names back that it changed while it dequantized
        _save(model, made, save_original_format=False)
        _copy(folder, _BESIDE, made)

    with _blamed_on(folder):
        return _cached(folder.name, _files(folder, ("*",)), make)


def _dequantizing(named: Any, folder: Path) -> Any:
    """Return the quantization config that makes transformers dequantize; None if the loaded model does it itself."""
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
    from transformers.quantizers.base import HfQuantizer

    if isinstance(named, str):
        _refuse(folder, named)
    held = named if isinstance(named, dict) else named.to_dict()
    method = str(held.get("quant_method", "quantized"))
    config = None
    try:
        config = AutoQuantizationConfig.from_dict(held)
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    except ValueError:
        _refuse(folder, method)
    except ImportError:
        if config is not None and not hasattr(config, "dequantize"):
            _refuse(folder, method)
        raise  # it names the package
    if hasattr(config, "dequantize"):
        if blocks := getattr(config, "weight_block_size", None):
            _check_blocks(folder, blocks)
        config.dequantize = True
        return config
    if type(quantizer)._dequantize is HfQuantizer._dequantize:
        _refuse(folder, method)
    return None


def _check_blocks(folder: Path, blocks: list[int]) -> None:
    """Raise UserError if blocks do not fill a matrix: transformers then divides it into blocks of another size."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored = tensors.get_slice(name)
                shape = stored.get_shape()
                if stored.get_dtype().startswith("F8") and any(
                    n % of for n, of in zip(shape[-2:], blocks, strict=True)
                ):
                    raise UserError(
                        f"{folder} is quantized in blocks of {' x '.join(map(str, blocks))}, which do not fill {name} "
                        f"of {' x '.join(map(str, shape))}; transformers would read other weights. Name the "
                        "full-precision original"
                    )


def _refuse(folder: Path, method: str) -> NoReturn:
    raise UserError(
        f"{folder} is quantized ({method}), which transformers cannot turn back; name the full-precision original"
    )


def _load(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a whole model on the CPU. Raises UserError if the files lack a weight, or one has another shape."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": "auto", "output_loading_info": True, **options}
    )
    model, found = loaded
    wrong = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if wrong:
        raise UserError(
            f"{folder} lacks weights of its model, or has others: {', '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more" if wrong[3:] else "")
        )
    return model


def _check_names(peft: Any, model: Any, adapter: Path, base: Path) -> None:
    """Raise UserError unless the file has all weights of the adapter, and no other but whole embeddings of the base.

    PEFT leaves a weight that the file lacks at its initial value, and one that has no place unread.
    """
    taken = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    held = set(peft.utils.load_peft_weights(str(adapter), device="cpu"))
    lacking, unplaced = sorted(taken - held), sorted(held - taken - set(model.state_dict()))
    for names, fault in ((unplaced, "has no place for"), (lacking, "also takes")):
        if names:
            raise UserError(f"{adapter} is an adapter for another model: {base} {fault} {names[0]}")


def _check_tied(peft: Any, model: Any, adapter: Path) -> None:
    """Raise UserError if the adapter changes the embedding or the head alone, and they are one tensor.

    PEFT merges into that tensor, and so changes both.
    """
    whole = model.get_base_model()
    tables = [whole.get_input_embeddings(), whole.get_output_embeddings()]
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    if whole.config.get_text_config().tie_word_embeddings and any(isinstance(each, layer) for each in tables):
        raise UserError(
            f"{adapter} changes the embedding or the head, which its base ties to one tensor, so that a merge would "
            "change both; merge it into an untied copy of the base"
        )


def _check_rotary(file: Path, config: Any) -> None:
    """Raise UserError if the file scales rotary positions, and transformers read no scaling from it."""
    import gguf

    reader = gguf.GGUFReader(file)
    kinds = [field.contents() for name, field in reader.fields.items() if name.endswith(".rope.scaling.type")]
    scaled = [kind for kind in kinds if kind != "none"]
    scaled += [
        tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))
    ]
    rope = getattr(config, "rope_parameters", None) or {}
    read = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    if scaled and not any(each.get("rope_type", "default") != "default" for each in read):
        raise UserError(
            f"{file} scales its rotary positions ({scaled[0]}), which transformers does not read; name the "
            "full-precision original"
        )


def _save(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    vars(model.config).pop("quantization_config", None)
    try:
        model.save_pretrained(folder, **options)
    except SafetensorError as error:  # of a full disk too
        raise UserError(f"{folder.parent} cannot hold the converted model ({error}); {_ELSEWHERE}") from error


def _copy(source: Path, patterns: tuple[str, ...], folder: Path) -> None:
    for file in _files(source, patterns):
        if file.suffix not in (".safetensors", ".bin"):
            shutil.copy(file, folder)


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _cached(name: str, sources: list[Path], make: Callable[[Path], None]) -> Path:
    """Return the folder that ``make`` filled for these files, as long as neither they nor the packages change.

    Processes that need the same folder wait for the first. A folder appears whole or not at all.
    """
    from filelock import FileLock
    from huggingface_hub.constants import HF_HOME

    marks = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    key = hashlib.sha256(repr((_FORMAT, _versions(), marks)).encode()).hexdigest()[:16]
    cache = Path(HF_HOME) / "lrc"
    folder = cache / f"{name}-{key}"
    if folder.is_dir():  # a cache that others share may be read-only
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            if not folder.is_dir():
                _fill(cache / f".{folder.name}", folder, make)
    except OSError as error:
        at = Path(str(error.filename))
        if error.errno not in _NO_ROOM and cache not in (at, *at.parents) and at not in cache.parents:
            raise
        reason = error.strerror or type(error).__name__
        message = f"{cache} cannot hold the converted model ({reason}); {_ELSEWHERE}"
        raise UserError(message) from error
    return folder


def _versions() -> list[str]:
    there = {each.name.lower().replace("_", "-"): each.version for each in distributions()}
    return [f"{name} {there.get(name)}" for name in _PACKAGES]


def _fill(unfinished: Path, folder: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        make(unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _blamed_on(path: Path) -> Iterator[None]:
    """Turn what transformers, gguf, PEFT and the file system raise into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each of these libraries raises its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read as a model: {reason}") from error
