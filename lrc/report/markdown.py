"""A report as Markdown: the page for a pull request, and the model card of the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lrc.checkpoint.sizes import Size, byte_text
from lrc.compression.logit_scale import LogitScale
from lrc.compression.refit import RefitRecord
from lrc.records.compression import CalibrationRecord, Report, TargetRecord
from lrc.report.groups import summarise

_SIZES = (
    ("parameters", "parameters"),
    ("bytes", "bytes"),
    ("KV cache, bytes per token", "kv_bytes_per_token"),
)


def report_page(report: Report) -> str:
    """The whole report."""
    lines = [
        f"# {report.model}, {report.plan}",
        "",
        report.sentence,
        "",
        *([*_warnings(report), ""] if report.warnings else []),
        *_body(report),
        *_refits(report.refits),
        *_provenance(report),
        "",
        *_folded("Plan", ["```yaml", report.plan_text.rstrip(), "```"]),
    ]
    return "\n".join(lines) + "\n"


def model_card(report: Report) -> str:
    """The output folder's README.md: how to load it, what it cost, the plan."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [lrc, compressed]",
        "---",
        f"# {report.model} compressed with lrc ({report.plan})",
        "",
        "```python",
        "import lrc  # registers the loader",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")',
        "```",
        "",
        *_body(report),
        *([*_warnings(report), ""] if report.warnings else []),
        "## Plan",
        "",
        "```yaml",
        report.plan_text.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _body(report: Report) -> list[str]:
    tables = report.with_tables
    with_tables = f", {tables.keep:.1%} of {tables.weights}" if tables else ""
    lines = [
        f"Kept {report.keep:.1%} of the decoder's weights{with_tables}.",
        "",
        "| | before | after | ratio |",
        "|---|---|---|---|",
        *(_size_row(name, report.before, report.after, key) for name, key in _SIZES),
    ]
    for change in report.perplexity:
        before, after = change.before, change.after
        lines.append(
            f"| perplexity, {_cell(before.data)} ({before.windows} windows of {before.seq_len}, {before.dtype}) "
            f"| {before.value:.4g} | {after.value:.4g} | {change.ratio:.3f} |"
        )
    lines += ["", *_calibration(report.calibration)]
    lines += [
        "| target | method | layers | size | kept | predicted error | measured error |",
        "|---|---|---|---|---|---|---|",
    ]
    for g in summarise(report.targets):
        lines.append(
            f"| {g.target} | {g.method} | {g.layers} | {g.size_text} | {g.kept / g.whole:.1%} "
            f"| {g.predicted_text} | {g.measured_text} |"
        )
    lines += [
        "",
        error_note(report.targets),
        "",
    ]
    return [*lines, *_scale(report.scale)]


def error_note(records: Sequence[TargetRecord]) -> str:
    """What the errors of a report's targets are."""
    tables, scores = any(r.layer is None for r in records), any(r.target == "qk" for r in records)
    note = (
        "Errors are of each target alone, before the refit; measured ones come from running the original and the "
        "reduced module on one calibration block of every eight"
    )
    if tables:
        note += (
            ", those of an embedding and a head from counts and moments of all, where they are one as a mean over "
            "both uses"
        )
    note += ". A plain number is a relative error, root mean square over the layers, of the target's output"
    note += " or, predicted for qk, of the attention scores." if scores else "."
    if any(r.predicted.metric == "kl" or r.measured.kl is not None for r in records):
        note += (
            " Nats KL are the divergence of the attention distribution from the original's, mean over queries, heads "
            "and layers, measured on the first of those blocks."
        )
    return note


def _cell(text: str) -> str:
    """A name as the text of a table's cell."""
    return text.replace("|", "\\|")


def _scale(scale: LogitScale | None) -> list[str]:
    """What the logits were scaled by, in a sentence."""
    return [] if scale is None else [f"Scale: {scale.text}.", ""]


def _refits(refits: list[RefitRecord]) -> list[str]:
    """The error of the residual stream, a row a refit."""
    if not refits:
        return []
    text = [
        "Squared error of the compressed residual stream over the original's square, where a refitted output "
        "projection has been added to it: with the method's own solution, and fitted again. Left out is the error on "
        "the calibration blocks that chose the ridge, by the fit without them. They are left out of that fit alone, "
        "as the method's solution and the refits before it have seen them.",
        "",
        "| layer | behind | ridge | before | after | left out, before | left out, after |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(refit_cells(refit))} |" for refit in refits),
    ]
    return ["## Residual stream", "", *_folded(f"{len(refits)} output projections fitted again", text), ""]


def _folded(summary: str, lines: list[str]) -> list[str]:
    """Lines that a pull request shows when asked to; the blank ones around them make them Markdown."""
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>"]


def refit_cells(refit: RefitRecord) -> list[str]:
    """A refit in words: layer, projection, ridge, and errors before and after, of all blocks and of those left out."""
    ridge = f"{refit.ridge:g}" if refit.raised is None else f"{refit.ridge:g}, raised to {refit.raised:g}"
    held = refit.held_out
    errors = [f"{refit.error.before:.3g}", f"{refit.error.after:.3g}"]
    errors += ["", ""] if held is None else [f"{held.before:.3g}", f"{held.after:.3g}"]
    return [str(refit.layer), refit.role, ridge, *errors]


def _calibration(record: CalibrationRecord) -> list[str]:
    """What moments were taken of, in a sentence."""
    drawn = ", ".join(f"{source.blocks} of {source.data}" for source in record.sources)
    return [
        f"Calibrated on {record.samples} block{'s' * (record.samples != 1)} of {record.seq_len} tokens: {drawn}.",
        "",
    ]


def _provenance(report: Report) -> list[str]:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.stages.items())
    peaks = ", ".join(f"{name} {byte_text(size)}" for name, size in report.peak_bytes.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    record = report.calibration
    calibration = [_listed({k: v for k, v in asdict(record).items() if k != "sources"})]
    calibration += [_listed(asdict(source)) for source in record.sources]
    run = f"{report.device}, layers run in {report.dtype}, {report.batch_size} blocks at once"
    told = {"revision": report.revision, "fingerprint": report.fingerprint}
    return [
        "## How it was made",
        "",
        f"- Model: {report.model}, {_listed(told)}",
        *([f"- Sizes found by: {_listed(report.allocation)}"] if report.allocation else []),
        f"- Calibration: {'; '.join(calibration)}",
        f"- Run: {run}, {report.processes} process{'es' * (report.processes > 1)}, hidden states waiting on "
        f"{report.offload}",
        f"- Seconds: {stages}",
        f"- Peak memory: {peaks}",
        f"- Versions: {versions}",
    ]


def _warnings(report: Report) -> list[str]:
    return [f"- Warning: {warning}" for warning in report.warnings]


def _listed(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.items() if value is not None)


def _size_row(name: str, before: Size, after: Size, key: str) -> str:
    old, new = getattr(before, key), getattr(after, key)
    return f"| {name} | {old:,} | {new:,} | {new / old:.3f} |"
