"""Decide which entry of a plan applies to each target of each layer.

Rules of layers override components and projections, which override the top level. An entry replaces what lower levels
ask for the weights it covers. A rule's own ``keep`` sizes everything in its layers that no rule has an entry for. A
rule's own ``method`` drops the entries of components and projections in its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any, get_args

from lrc.errors import nearest
from lrc.families import Architecture
from lrc.families.family import Component
from lrc.methods import Method
from lrc.methods.contract import Solver
from lrc.plan.document import Document, KeyPath, dotted
from lrc.plan.schema import Entry, Keep, Plan, Rule, matched_layers

COMPONENTS: tuple[Component, ...] = get_args(Component)
Methods = Mapping[str, Method]


@dataclass(frozen=True)
class Wish:
    """What a plan asks for one target of one layer, and the paths of the document that ask for it.

    ``own``: size and options by the method's names; a size there overrides ``keep``.
    """

    target: str
    method: str
    keep: float
    own: Mapping[str, Any]
    path: KeyPath
    method_path: KeyPath
    keep_path: KeyPath

    def solver(self, methods: Methods) -> Solver | None:
        """Return the solver of the target, or of its projections one by one."""
        method = methods.get(self.method)
        return None if method is None else method.solver(self.target)

    def sized(self, methods: Methods) -> bool:
        """Return whether the entry sets the size itself."""
        solver = self.solver(methods)
        return self.keep_path == (*self.path, "keep") or bool(solver and solver.size.word in self.own)


@dataclass(frozen=True)
class PlacedRule:
    """A rule with the layers it matches and its valid entries by path."""

    path: KeyPath
    rule: Rule
    layers: set[int]
    entries: Mapping[KeyPath, Entry]


class Levels:
    """The levels of a plan for one model; contradicting entries become mistakes of the document."""

    def __init__(self, plan: Plan, document: Document, architecture: Architecture, methods: Methods) -> None:
        self.plan, self.document, self.architecture, self.methods = plan, document, architecture, methods
        self.outside: dict[KeyPath, Entry] = {}
        self.shared = self._sound(("components",), plan.components.entries())
        self.shared |= self._sound(("projections",), plan.projections.entries())
        self._refuse_overlaps(combinations(self.shared, 2), "")
        placed = (self._place(i, rule) for i, rule in enumerate(plan.layers) if rule)
        self.rules = [rule for rule in placed if rule]
        self._refuse_clashes()

    def written(self) -> list[KeyPath]:
        """Return the paths of all entries below the top level, each of which must take effect in some layer."""
        paths = [(*placed.path, key) for placed in self.rules for key in ("keep", "method")]
        for path, entry in chain(self.shared.items(), *(placed.entries.items() for placed in self.rules)):
            paths += [path, *((*path, key) for key in ("keep", *entry.own))]
        return [path for path in paths if path in self.document.places]

    def layer(self, index: int) -> tuple[list[Wish], dict[KeyPath, str]]:
        """Return what the plan asks for one layer, and by path a warning where an entry leaves projections whole."""
        start = base = self._top(index)
        rules = [placed for placed in self.rules if index in placed.layers]
        for placed in rules:
            base = self._override(base, placed.path, placed.rule, index)
        wishes: dict[str, Wish] = {}
        for component in COMPONENTS:
            wish = replace(base, target=component)
            solver = wish.solver(self.methods)
            closed = component in self.architecture.closed
            if solver and solver.rotary and (closed or self.architecture.family.rotary != "none"):
                wish = replace(wish, method=solver.rotary)
            if solver or base.method not in self.methods:
                self._overlay(wishes, wish)
        replaced: list[tuple[Wish, Wish]] = []
        if base.method_path == start.method_path:
            for path, entry in self.shared.items():
                wish = self._wish(base, path, entry, index)
                if base.keep_path != start.keep_path:  # a rule sizes the layer in place of the entry
                    solver = wish.solver(self.methods)
                    own = {key: wish.own[key] for key in wish.own if not solver or key != solver.size.word}
                    wish = replace(wish, keep=base.keep, keep_path=base.keep_path, own=own)
                replaced += self._overlay(wishes, wish)
        for placed in rules:
            for path, entry in placed.entries.items():
                replaced += self._overlay(wishes, self._wish(base, path, entry, index))
        covered = {role for target in wishes for role in self._roles(target)}
        warnings = {}
        for old, new in replaced:
            roles = sorted(self._roles(old.target) - covered)
            if roles and (old.keep < 1 or old.own):
                stays = f"{' and '.join(roles)} stay{'' if roles[1:] else 's'} whole"
                warnings[new.path] = f"takes the place of all of {old.target}, so {stays}"
        return list(wishes.values()), warnings

    def outer(self, *, unsized: bool) -> list[Wish]:
        """Return what the plan asks for outside the layers.

        An entry without a size is a mistake, unless an allocation finds sizes (``unsized``); until then it has the
        plan's keep.
        """
        wishes = []
        for path, entry in self.outside.items():
            if isinstance(entry.keep, tuple):
                self.document.mistake((*path, "keep"), "is outside the layers; write one fraction, not two")
                continue
            wish = self._wish(replace(self._top(0), keep_path=path), path, entry, 0)
            solver = wish.solver(self.methods)
            if solver and not unsized and not wish.sized(self.methods):
                self.document.mistake(
                    path,
                    f"has no size; write {solver.size.word} or keep, as the plan's own keep is of the layers, or an "
                    "allocation that finds it, such as 'allocate: sensitivity'",
                )
            else:
                wishes.append(wish)
        return wishes

    def depth(self, keep: Keep, index: int) -> float:
        """Return the kept fraction at a layer; a pair runs linearly from the first layer to the last."""
        if not isinstance(keep, tuple):
            return keep
        share = index / max(self.architecture.layers - 1, 1)
        return keep[0] * (1 - share) + keep[1] * share

    def _roles(self, target: str) -> set[str]:
        return set(self.architecture.targets[target].matrices)

    def _sound(self, section: KeyPath, entries: Mapping[str, Entry]) -> dict[KeyPath, Entry]:
        """Return entries by path; an entry for a target that the model does not have is a mistake."""
        found = {}
        for target, entry in entries.items():
            path = (*section, target)
            if target in self.architecture.targets:
                found[path] = entry
            elif target in self.architecture.outer:
                self.outside[path] = entry
            elif target in COMPONENTS:
                model, roles = self.architecture.family.model_type, self.architecture.family.component(target)
                why = self.architecture.closed[target]
                reason = f"heads of {' and '.join(roles)} of {model} cannot be narrowed: {why}"
                self.document.mistake(path, f"{reason}; write {' and '.join(roles)} under projections")
            elif target == "lm_head":
                self.document.mistake(
                    path, "the head of this model is tied to its embedding; write embed for both"
                )
            else:
                known = nearest(target, self.architecture.matrices)
                model = self.architecture.family.model_type
                self.document.mistake(path, f"{model} has no projection {target!r}; {known}")
        return found

    def _place(self, position: int, rule: Rule) -> PlacedRule | None:
        path: KeyPath = ("layers", position)
        entries = self._sound(path, rule.entries())
        if list(self.document.values["layers"][position]) == ["match"]:
            self.document.mistake(
                path, "sets nothing for its layers; add keep, method or an entry such as mlp"
            )
        try:
            return PlacedRule(path, rule, matched_layers(rule.match, self.architecture.layers), entries)
        except ValueError as error:
            self.document.mistake((*path, "match"), str(error))
            return None

    def _refuse_overlaps(self, pairs: Iterable[tuple[KeyPath, KeyPath]], where: str) -> None:
        """Note a mistake for each pair of entries of one level that covers the same weights."""
        for pair in pairs:
            first, second = sorted(pair, key=self.document.line)
            if self._roles(str(first[-1])) & self._roles(str(second[-1])):
                other = f"{dotted(first)}{self.document.on_line(first)}"
                self.document.mistake(second, f"{other} is for the same weights{where}; keep one of the two")

    def _refuse_clashes(self) -> None:
        """Note a mistake where rules contradict each other in a layer."""
        for placed in self.rules:
            self._refuse_overlaps(combinations(placed.entries, 2), "")
        for one, two in combinations(self.rules, 2):
            if not (common := one.layers & two.layers):
                continue
            where = f" in layers {spans(common)}"
            self._refuse_overlaps(((a, b) for a in one.entries for b in two.entries), where)
            for key in ("keep", "method"):
                if key in one.rule.model_fields_set & two.rule.model_fields_set:
                    other = f"the rule{self.document.on_line(one.path)} sets it too{where}"
                    self.document.mistake((*two.path, key), f"{other}; keep one of the two")

    def _wish(self, base: Wish, path: KeyPath, entry: Entry, index: int) -> Wish:
        wish = replace(base, target=str(path[-1]), own=entry.own, path=path)
        return self._override(wish, path, entry, index)

    def _top(self, index: int) -> Wish:
        """Return what the top level asks for every target of a layer."""
        return Wish("", self.plan.method, self.depth(self.plan.keep, index), {}, (), ("method",), ("keep",))

    def _override(self, wish: Wish, path: KeyPath, level: Entry | Rule, index: int) -> Wish:
        """Return a wish with the keep and the method of an entry or a rule, where it has them."""
        if level.method is not None:
            wish = replace(wish, method=level.method, method_path=(*path, "method"))
        if level.keep is not None:
            wish = replace(wish, keep=self.depth(level.keep, index), keep_path=(*path, "keep"))
        return wish

    def _overlay(self, wishes: dict[str, Wish], new: Wish) -> list[tuple[Wish, Wish]]:
        """Put a wish over others; return each replaced wish with the one in its place.

        A component is split into its projections if only those have a solver in its method, or can shrink.
        """
        method, targets, replaced = self.methods.get(new.method), [new.target], []
        solvers = method.solvers if method else {}
        whole = new.target in solvers and new.target in self.architecture.targets
        if new.target in COMPONENTS and not whole and "projection" in solvers:
            targets = self.architecture.family.component(new.target)
        for target in targets:
            wish = replace(new, target=target)
            roles = self._roles(wish.target)
            replaced += [(wishes.pop(other), wish) for other in list(wishes) if self._roles(other) & roles]
            wishes[target] = wish
        return replaced


def spans(layers: Iterable[int]) -> str:
    """Return layer numbers as text, such as ``0-3, 7``."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
