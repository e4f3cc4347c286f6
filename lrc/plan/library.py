"""Find plans in every form that a user may give, and write resolved plans as YAML with sizes by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lrc.errors import UserError, nearest
from lrc.plan.document import Document, flow, read_document
from lrc.plan.precedence import Methods, spans
from lrc.plan.resolve import Draft
from lrc.plan.resolved import Assignment, ResolvedPlan
from lrc.plan.schema import OUTSIDE, WHOLE, Plan, read_plan

PACKAGE = Path(__file__).resolve().parents[1]

PlanLike = str | Path | Plan

BEST = Plan(method="a3", allocate="sensitivity")  # for a run without a plan


def shipped_plans() -> dict[str, Path]:
    """Return the plans in ``configs/`` by name, from the installed package or from a checkout."""
    folders = [PACKAGE / "configs", PACKAGE.parent / "configs"]
    folder = next((f for f in folders if f.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_plan(name_or_path: str) -> tuple[str, str]:
    """Return the text of a plan and its path, by path or by name of a shipped plan, with or without ``.yaml``.

    Raises UserError for an unknown plan, or a file that is not text.
    """
    path, shipped = Path(name_or_path).expanduser(), shipped_plans()
    if not path.is_file():
        name = name_or_path.removesuffix(".yaml")
        if name not in shipped:
            missing = f"there is no plan file {name_or_path!r} and no shipped plan of that name"
            raise UserError(f"{missing}; {nearest(name, shipped)}")
        path = shipped[name]
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 (byte {error.start}); a plan is a YAML file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_draft(plan: PlanLike, keep: float | None = None, changes: Mapping[str, Any] | None = None) -> Draft:
    """Read a plan: a path, the name of a shipped plan, YAML that begins with ``{``, or ``lrc.Plan``.

    ``keep`` and ``changes`` (values by dotted key) replace entries of the plan. Raises UserError for a missing plan;
    mistakes in a plan are noted in the draft's document.
    """
    entries = [(key, value, f"--set {key}={flow(value)}") for key, value in (changes or {}).items()]
    if keep is not None:
        entries = [*(entry for entry in entries if entry[0] != "keep"), ("keep", keep, f"--keep {keep:g}")]
    document, text, name = _document(plan)
    for entry in entries:
        document = document.changed(*entry)
    read = read_plan(document)
    if name:
        endings = [f"{value}" if key == "keep" else f"{key}-{flow(value)}" for key, value, _ in entries]
        endings = [re.sub(r"[^\w.-]+", "-", ending).strip("-") for ending in endings]
        stem = "-".join([Path(name).name.removesuffix(".yaml"), *endings])
    else:
        keeps = read.keep if isinstance(read.keep, tuple) else (read.keep,)
        name = stem = "-".join([read.method, *(f"{keep:g}" for keep in keeps)])
    if not text:
        text = "".join(f"{key}: {flow(value)}\n" for key, value in document.values.items())
    elif entries:
        text = f"{text.rstrip()}\n# changed by {' '.join(option for *_, option in entries)}\n"
    return Draft(read, document, text, name, stem)


def find_draft(plan: PlanLike | None, keep: float | None, changes: Mapping[str, Any] | None) -> Draft:
    """Read a plan, or ``BEST`` at a keep. Raises UserError if neither a plan nor a keep is given."""
    if plan is None and keep is None and "keep" not in (changes or {}):
        raise UserError("say how much to keep, such as --keep 0.8, or name a plan, such as --plan a3-2x")
    return read_draft(BEST if plan is None else plan, keep, changes)


def draft_of(plan: Plan, source: str) -> Draft:
    """Return a plan that lrc made itself; ``source`` names it in messages."""
    return Draft(plan, Document.made(source, plan.values), "", source, source)


def _document(plan: PlanLike) -> tuple[Document, str, str]:
    """Return a plan's document, its text and the name of its file; empty strings where it has none."""
    if isinstance(plan, Plan):
        return Document.made("lrc.Plan", plan.values), "", ""
    if str(plan).lstrip().startswith("{"):
        document = read_document(str(plan), "--plan")
        document.values.setdefault("format", 1)
        return document, str(plan), ""
    text, source = find_plan(str(plan))
    # A shipped plan is reported by its name, not by the path where it is installed.
    return read_document(text, source), text, str(plan) if Path(plan).is_file() else Path(source).stem


def write_plan(resolved: ResolvedPlan, methods: Methods, header: Iterable[str]) -> str:
    """Return the text of a plan below a comment of ``header`` lines; layers with the same sizes share a rule.

    The embedding and the head have the sizes that an allocation found, else the plan's own entries. An assignment at
    full size is written as a target that stays whole.
    """
    plan = resolved.plan
    rules: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for layer in resolved.layers:
        entries = {a.target: _written_entry(a, plan, methods) for a in layer.assignments}
        if entries:
            rules.setdefault(flow(entries), (entries, []))[1].append(layer.index)
    lines = [f"# {' '.join(line.split())}".rstrip() for line in header]
    lines += ["format: 1", f"method: {flow(plan.method)}"]
    outside = {name: e for name, e in plan.projections.entries().items() if name in OUTSIDE}
    if outside:
        found = {a.target: _written_entry(a, plan, methods) for a in resolved.unsized(None)}
        entries = {
            name: found.get(name, WHOLE) if name in resolved.shared else entry.model_dump(exclude_none=True)
            for name, entry in outside.items()
        }
        lines.append(f"projections: {flow(entries)}")
    if rules:
        lines.append("layers:")
    for entries, members in rules.values():
        match = members[0] if len(members) == 1 else spans(members)
        lines.append(f"  - {flow({'match': match, **entries})}")
    calibration = plan.calibration.model_dump(mode="json", exclude_none=True)
    lines += [f"refit: {plan.refit}", *([f"scale: {plan.scale}"] if plan.scale else [])]
    lines.append(f"calibration: {flow(calibration)}")
    return "\n".join(lines) + "\n"


def _written_entry(assignment: Assignment, plan: Plan, methods: Methods) -> Any:
    if assignment.kept == assignment.whole:
        return WHOLE
    solver = methods[assignment.method].solver(assignment.target)
    assert solver is not None  # or it would not have been assigned
    defaults = {name: option.default for name, option in solver.options.items()}
    own = {name: value for name, value in assignment.options.items() if value != defaults[name]}
    named = {} if assignment.method == plan.method else {"method": assignment.method}
    return {solver.size.word: assignment.size, **named, **own}
