"""Write the Hugging Face checkpoint and its manifest from the staged parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lrc.checkpoint.sizes import Size, size_of
from lrc.checkpoint.staging import MANIFEST, Staging
from lrc.compression.logit_scale import LogitScale
from lrc.compression.loop import REST, part_name, part_names
from lrc.compression.norms import NORMS, StreamNorms
from lrc.compression.ridge import REFITS, RefitRecord
from lrc.hub.quantizer import FORMAT_VERSION, METHOD, NOTICE
from lrc.modules.table import Table
from lrc.plan.job import Job

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
)


def write_checkpoint(job: Job, staging: Staging, settings: Mapping[str, Any]) -> None:
    """Write the checkpoint and its manifest."""
    staging.assemble(part_names(job.plan))
    table = module_table(job, staging)
    quantization = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "modules": table}
    # The source's own keys, so that other readers find them unchanged.
    source = job.reader.raw_config
    staging.write_json(
        "config.json", {**source, "transformers_weights": NOTICE, "quantization_config": quantization}
    )
    for path in copied_files(job.reader.folder):
        staging.copy(path, path.name)
    scale = logit_scale(staging)
    manifest = {
        **settings,
        "targets": target_records(job, staging),
        "refits": [asdict(record) for record in refit_records(job, staging)],
        "stream_norms": [asdict(record) for record in norm_records(job, staging)],
        "scale": scale and asdict(scale),
        "sha256": staging.hashes(),
    }
    staging.write_json(MANIFEST, manifest)


def copied_files(folder: Path) -> list[Path]:
    """Return the files of the source checkpoint that are copied unchanged."""
    return sorted({path for pattern in COPIED for path in folder.glob(pattern)})


def module_table(job: Job, staging: Staging) -> Table:
    """Return the module table of the whole model, by full path."""
    table = {path: entry for a in job.plan.outer for path, entry in staging.record(a.target)["table"].items()}
    for layer in job.plan.layers:
        entries = staging.record(part_name(layer.index))["table"]
        table |= {f"{job.reader.family.layers}.{layer.index}.{path}": e for path, e in entries.items()}
    return table


def target_records(job: Job, staging: Staging) -> list[dict[str, Any]]:
    """Return the records of all targets: first outside the layers, then layer by layer."""
    return [record for name in part_names(job.plan) for record in staging.record(name)["results"]]


def refit_records(job: Job, staging: Staging) -> list[RefitRecord]:
    """Return the records of all refits, layer by layer."""
    names = [part_name(layer.index) for layer in job.plan.layers]
    return REFITS.validate_python([record for name in names for record in staging.record(name)["refits"]])


def norm_records(job: Job, staging: Staging) -> list[StreamNorms]:
    """Return the counts of changed norms, layer by layer; none without a refit."""
    records = [staging.record(part_name(layer.index))["norms"] for layer in job.plan.layers]
    return NORMS.validate_python([record for record in records if record])


def logit_scale(staging: Staging) -> LogitScale | None:
    """Return the logit scale, or None if none was fitted."""
    record = staging.record(REST)["scale"]
    return None if record is None else TypeAdapter(LogitScale).validate_python(record)


def sizes(job: Job, staging: Staging) -> tuple[Size, Size]:
    """Return the sizes of the original and of the output."""
    reader, table = job.reader, module_table(job, staging)
    written = [stored for part in part_names(job.plan) for stored in staging.headers(part).values()]
    before = size_of(reader.tensors.values(), reader.architecture, reader.dtype, {})
    return before, size_of(written, reader.architecture, reader.dtype, table)
