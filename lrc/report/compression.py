"""The report of a compression as ``report.html``, as ``report.md`` and as a model card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from lrc.checkpoint.sizes import byte_text
from lrc.records.compression import Report, TargetRecord
from lrc.records.number import number, ratio_text
from lrc.report.outputs import Original, Output, as_original, points
from lrc.report.page import Picture, Section, render
from lrc.report.plots.cost import cost
from lrc.report.plots.kept import Row, kept
from lrc.report.table import Table, grouped, table
from lrc.report.tables import (
    answers_table,
    cost_table,
    domains_table,
    every_table,
    listed,
    size_ends,
    size_span,
    targets_table,
)

_LICENSES = {"Apache License Version 2.0": "apache-2.0", "MIT License": "mit"}


def html_page(report: Report, beside: Sequence[Output] = ()) -> str:
    """Return the report, with outputs of the same original ``beside`` it in the picture of the cost."""
    label = Path(report.out).name if beside else plan_name(report)
    original = as_original([Output(label, report.out, report), *beside])
    costs, targets, *rest = report_sections(report)
    costs = replace(costs, pictures=list(_costs(original)), notes=[*costs.notes, *original.notes])
    targets = replace(
        targets, pictures=list(_kept(report)), folded={"Every layer": every_table(report.targets)}
    )
    title = f"{Path(report.model).name}, {plan_name(report)}"
    return render(title, report.sentence, [costs, targets, *rest], _figures(report), report.warnings)


def report_sections(report: Report) -> list[Section]:
    """Return the sections of a report's page in words and tables: first its cost, then its targets, last its plan."""
    record, share = report.calibration, report.with_tables
    drawn = ", ".join(f"{source.blocks} of {source.data}" for source in record.sources)
    blocks = f"{record.samples} block{'s' * (record.samples != 1)}"
    first = "" if record.first_id is None else f", each starting with token {record.first_id}"
    rest = f", {share.keep:.1%} of {share.weights}" if share else ""
    notes = [
        f"Kept {report.keep:.1%} of the decoder's weights{rest}.",
        f"Calibrated on {blocks} of {record.seq_len} tokens{first}: {drawn}.",
        *([f"Scale: {report.scale.text}."] if report.scale else []),
        *([] if report.perplexity else [report.unmeasured]),
        *(note for change in report.perplexity for note in change.notes),
        *report.domains.skipped,
        *(report.answers.skipped if report.answers else []),
    ]
    costs = cost_table(report.before, report.after, report.perplexity, report.last_words)
    domains = [domains_table(report.domains)] if report.domains.changes else []
    answers = [answers_table(report.answers)] if report.answers and report.answers.answers else []
    targets = [targets_table(report.targets)]
    refitted = {f"{len(report.refits)} output projections refitted": _refits_table(report)}
    return [
        Section("What it cost", beside=[costs], notes=notes, tables=[*domains, *answers]),
        Section("What was kept, and the errors", notes=[error_note(report.targets)], tables=targets),
        *([Section("Residual stream", notes=_norm_note(report), folded=refitted)] if report.refits else []),
        Section("Time and memory", tables=[_stages_table(report)]),
        Section("How it was made", facts=list(_facts(report))),
        Section("Plan", text=report.plan_text.rstrip()),
    ]


def _norm_note(report: Report) -> list[str]:
    """Return the counts of the layer in which the most norms change."""
    worst = max(report.stream_norms, key=lambda each: each.share, default=None)
    return [f"Most norms change {worst.text}."] if worst and worst.changed else []


def _refits_table(report: Report) -> Table:
    """Return a row for each refit: its ridge, and errors before and after on all and on held-out blocks."""
    rows = []
    for refit in report.refits:
        raised = "" if refit.raised is None else f", raised to {refit.raised:g}"
        ridge = f"{refit.ridge:g}{raised}" if refit.applied else "not applied"
        row = {"layer:n": f"{refit.layer}", "projection": refit.role, "ridge:n": ridge}
        for of, errors in (("", refit.error), ("held-out, ", refit.held_out)):
            row[f"{of}before:n"] = "" if errors is None else f"{errors.before:.3g}"
            row[f"{of}after:n"] = "" if errors is None else f"{errors.after:.3g}"
        rows.append(row)
    return table(
        rows,
        "Squared error of the compressed residual stream over the original's square, before and after the refit. "
        "Held-out: on the blocks that chose the ridge, which no method and no fit has seen. A refit that does not "
        "lower the error there is not applied.",
    )


def _stages_table(report: Report) -> Table:
    """Return seconds by stage, with device memory where there is a device."""
    whole = sum(report.seconds.values()) or 1.0
    rows = []
    for name, seconds in report.stages.items():
        row = {"stage": name, "seconds:n": f"{seconds:.2f}", "of all:n": f"{seconds / whole:.1%}"}
        if report.device_bytes:
            row["device memory:n"] = byte_text(report.device_bytes.get(name, 0))
        rows.append(row)
    return table(rows)


def error_note(records: Sequence[TargetRecord]) -> str:
    """Explain the errors of a report's targets."""
    note = (
        "Errors are of each target alone, before the refit. Measured ones compare the original and the reduced module "
        "on one calibration block in sixteen"
    )
    if any(r.layer is None for r in records):
        note += "; those of an embedding and a head use counts and moments of all blocks"
    note += ". A plain number is a relative error, root mean square over the layers, of the target's output"
    note += (
        " or, predicted for qk, of the attention scores." if any(r.target == "qk" for r in records) else "."
    )
    if any(r.predicted.metric == "kl" or r.measured.kl is not None for r in records):
        note += (
            " Nats KL are the divergence of the attention distribution from the original's, mean over queries, heads "
            "and layers, measured on the first of those blocks."
        )
    return note


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the settings and versions that reproduce the output, by name."""
    record = report.calibration
    yield "Model", report.model
    if report.revision:
        yield "Revision", report.revision
    yield "Fingerprint", report.fingerprint
    yield "Written to", report.out
    yield "Plan", report.plan
    if report.allocation:
        yield "Sizes found by", listed(report.allocation)
    yield "Calibration", listed({k: v for k, v in asdict(record).items() if k != "sources"})
    for source in record.sources:
        yield "Calibration text", listed(asdict(source))
    for change in report.perplexity:
        text = change.before
        yield "Perplexity text", f"{text.data}, protocol {text.protocol}, ids_sha256 {text.ids_sha256}"
    processes = f", {report.processes} processes" if report.processes > 1 else ""
    yield "Run", f"{report.device}, layers in {report.dtype}, {report.batch_size} blocks at once{processes}"
    yield "Hidden states", f"waiting on {report.offload}"
    yield "Peak memory", listed({place: byte_text(size) for place, size in report.peak_bytes.items()})
    yield "Versions", listed(report.versions)


def report_page(report: Report) -> str:
    """Return the report in Markdown."""
    lines = [f"# {report.model}, {report.plan}", "", report.sentence, "", *_warnings(report)]
    return "\n".join([*lines, *_markdown(report_sections(report))]).rstrip() + "\n"


def model_card(report: Report, source: Path | None = None) -> str:
    """Return the output's README.md: how to load the model, what it cost, the plan; ``source``: the model's folder."""
    costs, targets, *_, plan = report_sections(report)
    lines = [
        "---",
        yaml.safe_dump(_front_matter(report, source), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {report.model} compressed with lrc ({report.plan})",
        "",
        "```sh",
        "pip install lrc",
        "```",
        "",
        "```python",
        "import lrc  # registers the loader",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "PATH OF THIS FOLDER"',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
        "",
        *_markdown([costs, targets]),
        *_warnings(report),
        *_markdown([plan]),
    ]
    return "\n".join(lines)


def _front_matter(report: Report, source: Path | None) -> dict[str, Any]:
    """Return the metadata of a model card, as the hub reads it; a licence only where the source states one."""
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if report.revision:  # only models of the hub have one
        found |= {"base_model": report.model}
    return found | (_license(source) if source else {}) | {"tags": ["lrc", "compressed"]}


def _license(source: Path) -> dict[str, Any]:
    """Return the licence keys of a folder's README.md, else the licence whose text its LICENSE begins with."""
    readme = _text(source / "README.md")
    if readme.startswith("---") and readme.count("\n---") > 0:
        try:
            stated = yaml.safe_load(readme[3:].partition("\n---")[0])
        except yaml.YAMLError:
            stated = None
        if isinstance(stated, dict) and stated.get("license"):
            return {key: stated[key] for key in ("license", "license_name", "license_link") if key in stated}
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        words = " ".join(_text(source / name).split())
        for title, license in _LICENSES.items():
            if words.startswith(title):
                return {"license": license}
    return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _markdown(sections: Iterable[Section]) -> list[str]:
    lines = []
    for section in sections:
        lines += [f"## {section.heading}", ""]
        for each in (*section.beside, *section.tables):
            lines += each.in_markdown()
        for note in section.notes:
            lines += [note, ""]
        for name, each in section.folded.items():
            lines += ["<details>", f"<summary>{name}</summary>", "", *each.in_markdown(), "</details>", ""]
        lines += [f"- {name}: {value}" for name, value in section.facts]
        lines += [*(["```yaml", section.text, "```"] if section.text else []), ""]
    return lines


def _warnings(report: Report) -> list[str]:
    return [*(f"- Warning: {warning}" for warning in report.warnings), *([""] if report.warnings else [])]


def _figures(report: Report) -> Iterator[tuple[str, str, str]]:
    before, after = report.before, report.after
    for change in report.perplexity:
        both = f"{number(change.before.value)} to {number(change.after.value)}"
        detail = f"{both} ({change.sureness})" if change.sureness else both
        yield f"perplexity, {change.before.data}", f"× {ratio_text(change.ratio)}", detail
        if found := change.tokens:
            kl = f"KL divergence {number(found.kl_mean.value, 3)} nats per token"
            yield f"same top token, {change.before.data}", f"{found.top1_agreement.value:.1%}", kl
    if report.domains.changes:
        name = [*report.domains.ratios][-1]
        worst = report.domains.changes[name]
        both = f"{number(worst.before.value)} to {number(worst.after.value)}"
        yield f"worst domain, {name}", f"× {ratio_text(worst.ratio)}", f"perplexity {both}"
    both = f"{byte_text(before.bytes)} to {byte_text(after.bytes)}"
    yield "bytes", f"× {after.bytes / before.bytes:.3f}", both
    cache = before.kv_bytes_per_token, after.kv_bytes_per_token
    yield "KV cache", f"× {cache[1] / cache[0]:.3f}", f"{cache[0]:,} to {cache[1]:,} bytes per token"
    yield "took", f"{sum(report.seconds.values()):,.0f} s", f"on {report.device}"


def _costs(original: Original) -> Iterator[Picture]:
    """Yield a picture of each text that this output, the first of the original, was measured on."""
    for i, text in enumerate(text for text in original.texts if 0 in text.changes):
        caption = f"{text.windows}, the same for all."
        if len(original.outputs) == 1:
            caption += " lrc compare shows other outputs beside it."
        yield Picture(cost(f"cost-{i}", text.text, points(original, text), original.methods), caption)


def _kept(report: Report) -> Iterator[Picture]:
    """Yield a picture with a row for each target; a layer in which the plan keeps the target is whole."""
    by_target = grouped(report.targets, lambda record: record.target)
    rows = []
    for target, records in by_target.items():
        at = {record.layer: record for record in records}
        here = [at.get(place) for place in ([None] if None in at else range(report.layers))]
        fractions = [1.0 if record is None else record.kept / record.whole for record in here]
        sizes = size_span(*size_ends(records))
        rows.append(Row(target, fractions, [record and record.method for record in here], sizes))
    if rows:
        caption = (
            "Weights kept of each target, by layer, as a part of the whole light bar; at the right the rank"
        )
        caption += ", for mlp the neurons." if "mlp" in by_target else "."
        if any(None in row.methods for row in rows):
            caption += " Grey: whole in that layer, or reduced there as part of another target."
        yield Picture(kept("kept", rows), caption)


def plan_name(report: Report) -> str:
    """Return the plan's name without its folder and ending."""
    return Path(report.plan).name.removesuffix(".yaml")
