"""The schema of a plan: entries, types and defaults."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    model_validator,
)

from lrc.errors import as_text_number, nearest
from lrc.methods import methods
from lrc.plan.document import Document, KeyPath, flow
from lrc.run.settings import Run
from lrc.text.mixture import Data, Misplaced, check_data

WHOLE = "keep-all"
OUTSIDE = ("embed", "lm_head")  # projections outside the decoder layers
Allocation = Literal["uniform", "energy", "fisher", "importance", "sensitivity"]
Count = Annotated[int, Field(ge=1)]
_COUNT: TypeAdapter[int] = TypeAdapter(Count)


def _fraction(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = as_text_number(value) or f"{value!r} is not a number"
        raise ValueError(f"{shown}; keep is a fraction above 0 and at most 1")
    if not value > 0:  # NaN too
        raise ValueError(f"{value} is outside (0, 1]; keep must be above 0, such as 0.1")
    if value > 1:
        raise ValueError(f"{value} is outside (0, 1]; the nearest is 1")
    return float(value)


def _keep(value: object) -> float | tuple[float, float]:
    if not isinstance(value, list | tuple):
        return _fraction(value)
    if len(value) != 2:
        raise ValueError(f"a gradient over depth has two ends, such as [0.9, 0.6], not {len(value)}")
    return _fraction(value[0]), _fraction(value[1])


def _samples(value: object) -> int | str:
    return "all" if value == "all" else _COUNT.validate_python(value, strict=True)


def _format(value: object) -> int:
    if value != 1 or isinstance(value, bool | float):
        raise ValueError(f"format {value!r} is not known to this version of lrc; it reads format 1")
    return 1


Keep = Annotated[float | tuple[float, float], PlainValidator(_keep)]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A section of a plan: no unknown keys, no conversions, no later changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def entries(self) -> dict[str, Entry]:
        """Return the entries by target."""
        return {name: value for name, value in self if isinstance(value, Entry)}


class Entry(Strict):
    """An entry for one target: ``keep`` or a size, the method, and the options of its solver.

    The key of the size and the options depend on the method and are checked in ``lrc.plan.resolve``.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    keep: Keep | None = None
    method: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _keep_all(cls, value: object) -> object:
        if value == WHOLE:
            return {"keep": 1}
        if not isinstance(value, dict):
            neither = f"{value!r} is neither {WHOLE!r} nor a mapping such as {{rank: 32}}"
            raise ValueError(as_text_number(value) or neither)
        return value

    @property
    def own(self) -> dict[str, Any]:
        """Size and options, by the names of the method's solver."""
        return self.model_extra or {}


class Components(Strict):
    """Entries by component."""

    qk: Entry | None = None
    ov: Entry | None = None
    mlp: Entry | None = None


class Roles(Strict):
    """Entries by projection of a decoder layer."""

    q: Entry | None = None
    k: Entry | None = None
    v: Entry | None = None
    o: Entry | None = None
    gate: Entry | None = None
    up: Entry | None = None
    down: Entry | None = None
    fc_in: Entry | None = None
    fc_out: Entry | None = None


class Projections(Roles):
    """Entries by projection."""

    embed: Entry | None = None
    lm_head: Entry | None = None


class Rule(Roles, Components):
    """What differs in the layers that ``match``: ``keep`` and ``method`` of the whole layer, and entries."""

    match: Annotated[str, PlainValidator(str)]
    keep: Keep | None = None
    method: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, value: object) -> object:
        return lifted(value)


def lifted(rule: object) -> object:
    """Return a rule whose entries inside ``components`` and ``projections`` are its own, unless it has them."""
    if not isinstance(rule, dict):
        return rule
    nested = [name for name in ("components", "projections") if isinstance(rule.get(name), dict)]
    own = {key: value for key, value in rule.items() if key not in nested}
    return {key: value for name in nested for key, value in rule[name].items()} | own


def matched_layers(match: str, count: int) -> set[int]:
    """Return the layers that ``0-1``, ``3``, ``0,2,5-7`` or ``-1`` name in a model of ``count`` layers.

    Raises ValueError if the text names no layers or a layer that does not exist.
    """
    found = set()
    for part in match.split(","):
        if not (ends := re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", part.strip())):
            raise ValueError(
                f'{part.strip()!r} names no layers; write such as "0-1", 3, "0,2,5-7" or -1 for the last'
            )
        first, last = (int(end or ends[1]) for end in ends.groups())
        for end in (first, last):
            if not -count <= end < count:
                raise ValueError(f"there is no layer {end}; the model has {count} layers, 0 to {count - 1}")
        first, last = first % count, last % count
        if first > last:
            raise ValueError(f"{part.strip()!r} matches no layer; it runs from {first} down to {last}")
        found.update(range(first, last + 1))
    return found


class Calibration(Strict):
    """The calibration texts; ``seq_len`` None means the model's limit, at most 2048.

    Without ``data``, a job names the model's default. For ``general``, a job raises the defaults of ``samples`` and
    ``gradient_samples`` to 256 and 64. Gradients are taken on ``gradient_samples`` of the blocks, drawn with the seed.
    Many models use the first token of a text as an attention sink. ``first_token`` is the weight of a block's first
    token in the moments, in tokens (default: one for every 256 tokens of the block, at least one).
    """

    data: Annotated[Data | None, PlainValidator(check_data), PlainSerializer(lambda data: data)] = None
    samples: Annotated[int | Literal["all"], PlainValidator(_samples)] = 128
    seq_len: Annotated[int, Field(ge=2)] | None = None
    gradient_samples: Count = 32
    first_token: Count | None = None
    seed: int = Field(default=0, ge=0)


class Plan(Strict):
    """A plan, made in Python as in YAML. Raises UserError with every mistake at once.

    A pair in ``keep`` runs linearly from the first layer to the last. ``scale`` None means channels with a residual
    refit, else none.
    """

    format: Annotated[int, PlainValidator(_format)] = 1
    keep: Keep = 1.0
    method: Text = "a3"
    allocate: Allocation = "uniform"
    components: Components = Components()
    projections: Projections = Projections()
    layers: tuple[Rule | None, ...] = Field(default=(), strict=False)
    refit: Literal["residual", "none"] = "residual"
    scale: Literal["channels", "logits", "none"] | None = None
    calibration: Calibration = Calibration()

    @model_validator(mode="wrap")
    @classmethod
    def _raise_user_error(
        cls, values: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        """Raise the mistakes of a plan made in Python; ``read_plan`` notes those of a document."""
        try:
            return handler(values)
        except ValidationError as error:
            if info.context is None and isinstance(values, dict):
                document = Document.made("lrc.Plan", values)
                _note(document, error)
                document.stop()
            raise

    @property
    def values(self) -> dict[str, Any]:
        """The entries of the plan as plain values, without defaults."""
        return {"format": 1, **self.model_dump(mode="json", exclude_unset=True, exclude_none=True)}

    @property
    def scales(self) -> bool:
        """Whether a scale of the logits is fitted."""
        return self.refit == "residual" and self.scale != "none"


SECTIONS: dict[KeyPath, type[Strict]] = {
    (): Plan,
    ("components",): Components,
    ("projections",): Projections,
    ("calibration",): Calibration,
}


def read_plan(document: Document) -> Plan:
    """Return the plan in a document; mistakes are noted there and left out of the plan."""
    if "format" not in document.values:
        document.mistake(("format",), "is missing; write 'format: 1'")
    _lift_rules(document)
    return _read(document, document.values)


def _lift_rules(document: Document) -> None:
    """Lift the entries of each rule, with their lines; an entry that a rule has twice is a mistake."""
    rules = document.values.get("layers")
    if not isinstance(rules, list):
        return
    for path in list(document.places):
        if path[:1] == ("layers",) and path[2:3] in (("components",), ("projections",)) and len(path) > 3:
            short = path[:2] + path[3:]
            if len(path) == 4 and short in document.places:
                document.mistake(path, "this rule has the entry twice; keep one of the two")
            document.places.setdefault(short, document.places[path])
    document.values["layers"] = [lifted(rule) for rule in rules]


def _read(document: Document, values: dict[str, Any]) -> Plan:
    try:
        return Plan.model_validate(values, context=document)
    except ValidationError as error:
        _note(document, error)
        for problem in error.errors(include_url=False):
            path = problem["loc"]
            whole_rule = path[0] == "layers" and path[2:] in ((), ("match",))
            values = _without(values, path[:2] if whole_rule else path)
    return _read(document, values)


def _note(document: Document, error: ValidationError) -> None:
    """Note every problem of a validation as a mistake of the document."""
    for problem in error.errors(include_url=False):
        path, cause = problem["loc"], problem.get("ctx", {}).get("error")
        if isinstance(cause, Misplaced):
            for place, message in cause.places.items():
                document.mistake((*path, place), message)
        else:
            document.mistake(path, _message(problem))


def _message(problem: Any) -> str:
    path, kind, value = problem["loc"], problem["type"], problem["input"]
    if kind == "extra_forbidden":
        key, known = str(path[-1]), SECTIONS.get(path[:-1], Rule).model_fields
        return elsewhere(key, value, path[:-1]) or f"unknown key; {nearest(key, known)}"
    if kind == "missing":
        return "is missing; a rule says which layers it is for"
    if kind == "value_error":
        error = problem["ctx"]["error"]
        return _message(error.errors()[0]) if isinstance(error, ValidationError) else str(error)
    if kind == "literal_error":
        known = re.findall(r"'(.+?)'", problem["ctx"]["expected"])
        return f"{value!r} is not known; {nearest(str(value), known)}"
    if kind == "int_type":
        return as_text_number(value) or f"{value!r} is not a whole number"
    if kind == "greater_than_equal":
        return f"{value} is too small; the smallest is {problem['ctx']['ge']}"
    if kind.startswith("string"):
        return f"{value!r} is not a name"
    return f"{value!r} is not a {'list of rules' if path == ('layers',) else 'mapping of keys to values'}"


def elsewhere(key: str, value: object, section: KeyPath, *, entry: bool = False) -> str | None:
    """Return the message for a key that belongs to another place of a plan than ``section``; None if to none.

    ``entry``: the section is the entry of a target.
    """
    name = key.rpartition(".")[2].replace("-", "_")
    try:
        written = f"{name}: {flow(value)}"
    except yaml.YAMLError:  # a value made in Python
        written = f"{name}: ..."
    home = next((part[0] for part, model in SECTIONS.items() if part and name in model.model_fields), None)
    top = "at the top of the plan"
    if name in Plan.model_fields and section:
        return f"unknown key here; write '{written}' {top}"
    if home:
        option = "" if not isinstance(value, str | int | float) else f", or --set {home}.{name}={value}"
        return f"unknown key here; write '{home}: {{{written}}}' {top}{option}"
    if name == "match":
        return f"unknown key here; write 'layers: [{{{written}, ...}}]' {top}"
    if name in {each.name for each in fields(Run)}:
        return f"no key of a plan; it is an option of the command line, --{name.replace('_', '-')}"
    solvers = [solver for method in methods().values() for solver in method.solvers.values()]
    if not entry and name in {word for solver in solvers for word in (solver.size.word, *solver.options)}:
        inner = f"mlp: {{{written}}}"
        inner = inner if section[:1] == ("layers",) else f"components: {{{inner}}}"
        return f"unknown key here; write it in an entry, such as '{inner}'"
    return None


def _without(values: Any, path: KeyPath) -> Any:
    """Return a copy of nested values without the value at a path; lists keep their length, so positions stay valid."""
    key, rest = path[0], path[1:]
    if isinstance(values, list):
        return [v if i != key else _without(v, rest) if rest else None for i, v in enumerate(values)]
    if isinstance(values, dict):
        return {k: _without(v, rest) if k == key else v for k, v in values.items() if k != key or rest}
    return values  # left out already
