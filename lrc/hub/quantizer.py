"""Let ``from_pretrained`` load compressed checkpoints, as a transformers quantizer.

Before the weights are loaded, modules of the empty model are replaced as the checkpoint's table says. The loaded model
is an ordinary float model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrc.checkpoint.headers import Shape, check_shapes, read_headers
from lrc.checkpoint.reader import full_name
from lrc.errors import UserError
from lrc.families import Family, family_of
from lrc.modules.low_rank import FACTORS
from lrc.modules.table import Table, apply_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "lrc"
FORMAT_VERSION = 1


class LrcConfig(QuantizationConfigMixin):
    """Hold the ``quantization_config`` of a compressed checkpoint: its module table and format version."""

    def __init__(
        self, modules: Table | None = None, format_version: int | None = None, **others: Any
    ) -> None:
        if modules is None or not isinstance(format_version, int):
            raise UserError("config.json: quantization_config needs `modules` and a whole `format_version`")
        if format_version > FORMAT_VERSION:
            known = f"format version {format_version}, this lrc reads up to {FORMAT_VERSION}"
            raise UserError(f"the checkpoint has {known}; pip install --upgrade lrc")
        self.__dict__.update(others)
        self.quant_method: Any = METHOD
        self.format_version = format_version
        self.modules = modules


class LrcQuantizer(HfQuantizer):
    """Quantizer that replaces modules before the weights are loaded and then checks that all were loaded."""

    requires_calibration = True  # in transformers: only for checkpoints that carry the config
    quantization_config: LrcConfig  # type: ignore[assignment]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        family = family_of(model.config.model_type)
        expected = replace_modules(model, self.quantization_config.modules)
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            stored = {full_name(n, family): held for n, held in read_headers(checkpoint_files).items()}
            check_shapes(expected, stored)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # Dispatch over several devices makes tensors without this mark; their headers were checked before.
        if len(set((getattr(model, "hf_device_map", None) or {"": None}).values())) == 1:
            for name, tensor in _own_tensors(model, family_of(model.config.model_type)).items():
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise UserError(f"the checkpoint lacks the tensor {name!r}")
        # transformers accepts only a dict where the config is used again.
        model.config.quantization_config = self.quantization_config.to_dict()
        # An ordinary float model from here on: `half`, adapters and training refuse quantized ones.
        model.is_quantized = False  # type: ignore[attr-defined]
        for name in ("quantization_method", "hf_quantizer"):
            vars(model).pop(name, None)
        vars(model.config).pop("_is_quantized", None)
        model._get_static_cache_init_shape = _no_early_cache  # type: ignore[method-assign]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    is_trainable = is_qat_trainable = is_compileable = property(lambda self: True)  # type: ignore[assignment]


def replace_modules(model: PreTrainedModel, table: Table) -> dict[str, Shape]:
    """Replace a model's modules by its checkpoint's table; return the shapes that the files must hold, by full name.

    Raises UserError if the table does not fit the model.
    """
    family = family_of(model.config.model_type)
    factorized = [path for path in (family.head, family.embedding) if path in table]
    if len(factorized) == 1 and getattr(model.config, "tie_word_embeddings", False):
        raise UserError(f"config.json: {factorized[0]!r} is factorized; set tie_word_embeddings to false")
    # Base models have no prefix, other tasks no LM head.
    prefix = f"{family.prefix}." if model.base_model is model else ""
    has_head = hasattr(model, family.head)
    local = {p.removeprefix(prefix): entry for p, entry in table.items() if p != family.head or has_head}
    apply_table(model, local, family)
    tied = getattr(model.config, "tie_word_embeddings", False) and has_head
    if tied and family.embedding in table:  # tie the factors instead of the weights
        keys = {f"{family.head}.{name}": f"{family.embedding}.{name}" for name in FACTORS}
        model._tied_weights_keys = keys  # type: ignore[assignment]
        model.all_tied_weights_keys = dict(keys)
    return {full_name(n, family): tuple(t.shape) for n, t in _own_tensors(model, family).items()}


def _own_tensors(model: PreTrainedModel, family: Family) -> Mapping[str, Tensor]:
    """Return the parameters and buffers that a checkpoint must hold: no tied ones, no head of a new task."""
    own = () if model.base_model is model else (f"{model.base_model_prefix}.", f"{family.head}.")
    tied = model.all_tied_weights_keys
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in tied and (not own or name.startswith(own))
    }


def _no_early_cache() -> None:
    """Give no shapes: layers differ, so a static cache takes its shapes from the first keys and values."""


if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantizer(METHOD)(LrcQuantizer)
if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(LrcConfig)
