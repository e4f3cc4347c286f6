"""Resolve a plan's text for one model, reporting all mistakes at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lrc.errors import as_text_number, nearest
from lrc.families import Architecture
from lrc.methods.contract import Solver
from lrc.methods.sizes import size_text
from lrc.plan.document import Document, KeyPath, dotted, read_document
from lrc.plan.precedence import COMPONENTS, Levels, Methods, Wish, spans
from lrc.plan.resolved import Assignment, LayerPlan, ResolvedPlan
from lrc.plan.schema import OUTSIDE, WHOLE, Entry, Plan, elsewhere, read_plan

MAX_SEQ_LEN = 2048  # default tokens of a calibration block, unless the model reads fewer
# Default weight of the first token: one per this many tokens of a block.
TOKENS_PER_FIRST = 256


@dataclass(frozen=True)
class Draft:
    """A plan before ``resolve``, which raises the mistakes that the document collects.

    ``text``: as the user wrote it. ``name``: its name in reports. ``stem``: the start of its files' names.
    """

    plan: Plan
    document: Document
    text: str = ""
    name: str = ""
    stem: str = ""


def parse_plan(text: str, source: str) -> Draft:
    """Read a plan's text; ``source`` names it in messages. Raises UserError if it is not a YAML mapping."""
    document = read_document(text, source)
    return Draft(read_plan(document), document, text, source, Path(source).name.removesuffix(".yaml"))


def resolve(
    draft: Draft,
    architecture: Architecture,
    methods: Methods,
    collectors: Collection[str],
    *,
    finder: str | None = None,
) -> ResolvedPlan:
    """Resolve a plan for a model from shapes alone; ``collectors`` names the statistics that lrc can collect.

    ``finder``: the command or option that finds the sizes, for messages (default: the plan's ``allocate``). With one,
    the plan's layers must set no sizes, and get uniform ones. Raises UserError with every mistake and its line.
    """
    plan, document, count = draft.plan, draft.document, architecture.layers
    levels = Levels(plan, document, architecture, methods)
    order = list(architecture.targets)
    if plan.allocate != "uniform":
        finder = finder or f"allocate {plan.allocate}"
        if isinstance(plan.keep, tuple):
            message = (
                f"allocate {plan.allocate} shares out one fraction over all layers; write one, such as 0.8"
            )
            document.mistake(("keep",), message)
        elif plan.keep == 1:
            message = f"{plan.allocate} has nothing to share out; write a keep below 1"
            document.mistake(("allocate",), message)
    if finder:
        _refuse_sizes(plan, document, methods, finder)
    assigner = _Assigner(document, architecture, methods, set(collectors), finder)
    layers = []
    for index in range(count):
        wishes, warnings = levels.layer(index)
        wishes.sort(key=lambda wish: order.index(wish.target))
        assignments = [assigner.assign(wish, index) for wish in wishes]
        layers.append(LayerPlan(index, tuple(a for a in assignments if a)))
        for path, message in warnings.items():
            assigner.warn(path, message, index)
    wishes = levels.outer(unsized=bool(finder))
    outer = tuple(found for wish in wishes if (found := assigner.assign(wish)))
    if not outer and not any(layer.assignments for layer in layers):
        for index in range(count):
            assigner.warn(("keep",), "every layer stays whole", index)
    if plan.scale in ("channels", "logits") and plan.refit == "none":
        message = f"{plan.scale} needs 'refit: residual'; with 'refit: none' the nearest is none"
        document.mistake(("scale",), message)
    if architecture.logits.cap is not None and plan.scales:
        reason = (
            f"{architecture.family.model_type} caps its logits, so no scale of the final norm scales them"
        )
        if plan.scale is None:
            for index in range(count):
                assigner.warn(("scale",), f"is left out: {reason}", index)
        else:
            document.mistake(("scale",), f"{plan.scale} is not for this model: {reason}; the nearest is none")
    limit = architecture.positions
    seq_len = plan.calibration.seq_len or min(limit, MAX_SEQ_LEN)
    if seq_len > limit:
        message = f"{seq_len} is longer than the model reads; the nearest is {limit}"
        document.mistake(("calibration", "seq_len"), message)
    if not document.mistakes:
        for path in levels.written():
            if path not in assigner.used:
                document.mistake(path, "has no effect; layer rules or entries set all that it is for")
    document.stop()
    return ResolvedPlan(
        plan=plan,
        layers=tuple(layers),
        seq_len=seq_len,
        first_token=plan.calibration.first_token or max(1, seq_len // TOKENS_PER_FIRST),
        whole=count * architecture.layer_parameters,
        warnings=assigner.warnings(),
        outer=outer,
        tables={wish.target: architecture.outer[wish.target].parameters for wish in wishes},
        shared=tuple(wish.target for wish in wishes if not wish.sized(methods)),
    )


@dataclass
class _Assigner:
    """Check wishes against their solvers and find their sizes."""

    document: Document
    architecture: Architecture
    methods: Methods
    collectors: set[str]
    finder: str | None
    used: set[KeyPath] = field(default_factory=set)
    warned: dict[tuple[KeyPath, str], list[int]] = field(default_factory=dict)

    def assign(self, wish: Wish, index: int | None = None) -> Assignment | None:
        """Return the assignment for a wish in a layer (None: outside the layers).

        Return None if the target stays whole or the wish is a mistake.
        """
        self.used |= {wish.path, wish.method_path, *((*wish.path, key) for key in wish.own)}
        solver = self._solver(wish)
        if solver is None:
            self.used.add(wish.keep_path)
            return None
        targets = self.architecture.targets | self.architecture.outer
        target, word = targets[wish.target], solver.size.word
        options, wrong = _read_options(wish.own, wish.path, solver)
        for key, message in wrong.items():
            self.document.mistake((*wish.path, key), message)
        own = wish.own.get(word)
        path = wish.keep_path if own is None else (*wish.path, word)
        self.used.add(path)
        if own is not None and wish.keep_path == (*wish.path, "keep"):
            self.document.mistake(path, "contradicts keep of the same entry; write one of the two")
        if own is None and wish.keep == 1:
            return None
        self._check_needs(wish, solver, options, inside=index is not None)
        try:
            rule = solver.size
            size = rule.nearest(target, wish.keep, options) if own is None else rule.read(own)
        except ValueError as error:
            self.document.mistake(path, str(error))
            return None
        if refusal := rule.refusal(target, size, options):
            place = path if own is not None or not wish.own else wish.path
            self.document.mistake(place, refusal if wish.target in place else f"{wish.target}: {refusal}")
            return None
        kept = rule.weights(target, size, options)
        share, whole = kept / target.parameters, kept >= target.parameters
        if own is None and share > wish.keep and (whole or not self.finder):
            least = "saves nothing, so it stays whole" if whole else f"keeps {share:.3g} of its weights"
            self.warn(path, f"{wish.keep:g} is too small for {wish.target}: its smallest size {least}", index)
        if not whole:
            return Assignment(wish.target, wish.method, size, options, kept, target.parameters)
        if own is not None and wish.target not in COMPONENTS:
            size = f"{word} {size_text(size)}"
            self.warn(path, f"{size} saves nothing for {wish.target}; it stays dense", index)
        return None

    def warn(self, path: KeyPath, message: str, index: int | None) -> None:
        """Record a warning about a layer, or about targets outside the layers."""
        self.warned.setdefault((path, message), []).extend([] if index is None else [index])

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings by line; each lists its layers unless it is about all."""
        every = list(range(self.architecture.layers))
        found = []
        for (path, message), layers in self.warned.items():
            where = "" if layers in (every, []) else f" (layers {spans(layers)})"
            text = f"{self.document.place(path)}: {dotted(path)}: {message}{where}"
            found.append((self.document.line(path), text))
        return tuple(text for _, text in sorted(found))

    def _solver(self, wish: Wish) -> Solver | None:
        """Return a wish's solver; None if the method is unknown or has none for the target."""
        if wish.method not in self.methods:
            hint = nearest(wish.method, self.methods)
            self.document.mistake(wish.method_path, f"{wish.method!r} is not a method; {hint}")
            return None
        solver = wish.solver(self.methods)
        if solver is None and (wish.own or wish.keep < 1):
            target = wish.target if wish.target in COMPONENTS else f"{wish.target}, a single projection"
            able = [name for name, method in self.methods.items() if method.solver(wish.target)]
            message = f"is for {', '.join(self.methods[wish.method].solvers)}, not for {target}"
            hint = nearest(wish.method, able)
            self.document.mistake(wish.path, f"method {wish.method!r} {message}; {hint}")
        return solver

    def _check_needs(self, wish: Wish, solver: Solver, options: dict[str, Any], *, inside: bool) -> None:
        """Note a mistake for statistics that lrc does not collect, and for a model that the solver refuses."""
        known = self.collectors if inside else self.collectors & {"moments"}
        uncollected = f"which lrc does not collect yet{'' if inside else ' outside the layers'}"
        if missing := sorted(set(solver.needs) - known):
            solvers = {name: method.solver(wish.target) for name, method in self.methods.items()}
            others = [name for name, other in solvers.items() if other and set(other.needs) <= known]
            message = f"{wish.method!r} needs {', '.join(missing)}, {uncollected}"
            self.document.mistake(
                wish.method_path, f"{message}; these do without: {', '.join(others) or 'none'}"
            )
        elif missing := sorted(solver.collectors(options) - known):
            message = f"these options of {wish.method!r} need {', '.join(missing)}, {uncollected}"
            self.document.mistake(wish.path or wish.method_path, message)
        if refusal := solver.refuses(self.architecture.geometry, options):
            self.document.mistake(
                wish.path or wish.method_path, f"{wish.method!r} cannot do this model: {refusal}"
            )


def _refuse_sizes(plan: Plan, document: Document, methods: Methods, finder: str) -> None:
    """Note as a mistake every size that a plan sets in its layers, below the top level; ``finder`` finds them."""
    words = {solver.size.word for method in methods.values() for solver in method.solvers.values()}
    rules = {("layers", i): rule for i, rule in enumerate(plan.layers) if rule}
    inside = {name: entry for name, entry in plan.projections.entries().items() if name not in OUTSIDE}
    sections: dict[KeyPath, dict[str, Entry]] = {
        ("components",): plan.components.entries(),
        ("projections",): inside,
        **{path: rule.entries() for path, rule in rules.items()},
    }
    entries = {(*path, name): entry for path, section in sections.items() for name, entry in section.items()}
    sizes = [(*path, word) for path, entry in entries.items() for word in words & entry.own.keys()]
    sizes += [(*path, "keep") for path, each in (entries | rules).items() if each.keep not in (None, 1)]
    for path in sizes:
        document.mistake(path, f"sets a size, but {finder} finds the sizes; leave it out, or write {WHOLE}")


def _read_options(
    own: Mapping[str, Any], path: KeyPath, solver: Solver
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return every option of a solver with the entry's value or the default, and the mistakes by key."""
    known, wrong = solver.options, {}
    values = {name: option.default for name, option in known.items()}
    for key, value in own.items():
        if key == solver.size.word:
            continue
        if key not in known:
            near = f"unknown key; {nearest(key, {'keep', 'method', solver.size.word, *known})}"
            wrong[key] = elsewhere(key, value, path, entry=True) or near
            continue
        try:
            values[key] = _adapter(known[key].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            wrong[key] = _option_mistake(value, known[key].annotation, error)
    return values, wrong


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def _option_mistake(value: Any, annotation: Any, error: ValidationError) -> str:
    if get_origin(annotation) is Literal:
        return f"{value!r} is not known; {nearest(str(value), map(str, get_args(annotation)))}"
    if number := as_text_number(value):
        return number
    reason = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
    return f"{value!r} is not legal: it {reason}"
