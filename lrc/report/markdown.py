"""``report.md`` and the model card."""

from __future__ import annotations

from collections.abc import Iterable

from lrc.records.compression import Report
from lrc.report.html import report_sections
from lrc.report.page import Section


def report_page(report: Report) -> str:
    """Return the report."""
    lines = [f"# {report.model}, {report.plan}", "", report.sentence, "", *_warnings(report)]
    return "\n".join([*lines, *_markdown(report_sections(report))]).rstrip() + "\n"


def model_card(report: Report) -> str:
    """Return the output's README.md: how to load the model, what it cost, the plan."""
    costs, targets, *_, plan = report_sections(report)
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
        *_markdown([costs, targets]),
        *_warnings(report),
        *_markdown([plan]),
    ]
    return "\n".join(lines)


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
