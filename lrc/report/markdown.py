"""``report.md`` and the model card."""

from __future__ import annotations

from collections.abc import Iterable

from lrc.records.compression import Report
from lrc.report.rows import (
    cost_table,
    error_note,
    facts,
    kept_text,
    refits_table,
    stages_table,
    targets_table,
)


def report_page(report: Report) -> str:
    """Return the report."""
    lines = [f"# {report.model}, {report.plan}", "", report.sentence, "", *_warnings(report), *_body(report)]
    if report.refits:
        summary = f"{len(report.refits)} output projections fitted again"
        lines += ["## Residual stream", "", *_folded(summary, refits_table(report).in_markdown())]
    lines += ["## Time and memory", "", *stages_table(report).in_markdown()]
    lines += ["## How it was made", "", *(f"- {name}: {value}" for name, value in facts(report)), ""]
    lines += _folded("Plan", ["```yaml", report.plan_text.rstrip(), "```", ""])
    return "\n".join(lines).rstrip() + "\n"


def model_card(report: Report) -> str:
    """Return the output's README.md: how to load the model, what it cost, the plan."""
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
        *_warnings(report),
        "## Plan",
        "",
        "```yaml",
        report.plan_text.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _body(report: Report) -> list[str]:
    record = report.calibration
    drawn = ", ".join(f"{source.blocks} of {source.data}" for source in record.sources)
    blocks = f"{record.samples} block{'s' * (record.samples != 1)}"
    return [
        kept_text(report),
        "",
        *cost_table(report.before, report.after, report.perplexity).in_markdown(),
        f"Calibrated on {blocks} of {record.seq_len} tokens: {drawn}.",
        "",
        *targets_table(report.targets).in_markdown(),
        error_note(report.targets),
        "",
        *([] if report.scale is None else [f"Scale: {report.scale.text}.", ""]),
    ]


def _folded(summary: str, lines: Iterable[str]) -> list[str]:
    """Return lines that the reader unfolds; blank lines around them make them Markdown."""
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "</details>", ""]


def _warnings(report: Report) -> list[str]:
    return [*(f"- Warning: {warning}" for warning in report.warnings), *([""] if report.warnings else [])]
