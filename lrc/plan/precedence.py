"""What a plan asks for each target of each layer: which of its entries counts where.

Layers go over components and projections, and those over the top level. At every level an entry replaces
whatever lower levels say of the weights it covers. A rule's own ``keep`` sets the size of everything in its
layers that no rule has an entry for; a rule's own ``method`` starts its layers afresh, without the entries of
components and projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any, get_args

from lrc.errors import nearest
from lrc.families import Architecture
from lrc.families.family import Component
from lrc.methods import Method
from lrc.methods.contract import Solver
from lrc.plan.document import Document, Path, dotted
from lrc.plan.schema import Entry, Keep, Plan, Rule

COMPONENTS: tuple[Component, ...] = get_args(Component)
Methods = Mapping[str, Method]


@dataclass(frozen=True)
class Wish:
    """What is asked for one target of one layer, and the paths of the document that ask for it.

    ``keep`` holds unless ``own``, size and options as the method names them, has the size.
    """

    target: str
    method: str
    keep: float
    own: Mapping[str, Any]
    path: Path
    method_path: Path
    keep_path: Path

    def solver(self, methods: Methods) -> Solver | None:
        """What solves the target, or takes it apart into single projections."""
        method = methods.get(self.method)
        return None if method is None else method.solver(self.target)

    def sized(self, methods: Methods) -> bool:
        """Whether its entry says a size of its own."""
        solver = self.solver(methods)
        own = solver is not None and solver.size.word in self.own
        return own or self.keep_path == (*self.path, "keep")


@dataclass(frozen=True)
class Placed:
    """A rule with the layers it matches and its sound entries by path."""

    path: Path
    rule: Rule
    layers: set[int]
    entries: Mapping[Path, Entry]


@dataclass(frozen=True)
class LayerWishes:
    """All that is asked for one layer, and by path what stays whole as an entry took a component's place."""

    wishes: list[Wish]
    left_whole: dict[Path, str] = field(default_factory=dict)


class Levels:
    """A plan's entries on top of one another; entries that cannot stand become mistakes of the document."""

    def __init__(self, plan: Plan, document: Document, architecture: Architecture, methods: Methods) -> None:
        self.plan, self.document, self.architecture, self.methods = plan, document, architecture, methods
        self.outside: dict[Path, Entry] = {}
        self.shared = self._sound(("components",), plan.components.entries())
        self.shared |= self._sound(("projections",), plan.projections.entries())
        self._refuse_overlaps(combinations(self.shared, 2), "")
        self.rules = [
            placed for i, rule in enumerate(plan.layers) if rule and (placed := self._place(i, rule))
        ]
        self._refuse_clashes()

    def written(self) -> list[Path]:
        """Paths of all below the top level of the document, which must take effect in some layer."""
        paths = [(*placed.path, key) for placed in self.rules for key in ("keep", "method")]
        for path, entry in chain(self.shared.items(), *(placed.entries.items() for placed in self.rules)):
            paths += [path, *((*path, key) for key in ("keep", *entry.own))]
        return [path for path in paths if path in self.document.lines]

    def layer(self, index: int) -> LayerWishes:
        """What the plan asks for one layer."""
        base = Wish("", self.plan.method, self.depth(self.plan.keep, index), {}, (), ("method",), ("keep",))
        start = base
        rules = [placed for placed in self.rules if index in placed.layers]
        for placed in rules:
            if placed.rule.keep is not None:
                base = replace(
                    base, keep=self.depth(placed.rule.keep, index), keep_path=(*placed.path, "keep")
                )
            if placed.rule.method is not None:
                base = replace(base, method=placed.rule.method, method_path=(*placed.path, "method"))
        wishes: dict[str, Wish] = {}
        for component in COMPONENTS:
            whole_component = replace(base, target=component)
            if whole_component.solver(self.methods) or base.method not in self.methods:
                self._overlay(wishes, self._expand(self._unnamed(whole_component)))
        lost: list[tuple[Wish, Wish]] = []
        if base.method_path == start.method_path:
            for path, entry in self.shared.items():
                wish = self._wish(base, path, entry, index)
                if base.keep_path != start.keep_path:
                    wish = self._resized(wish, base)
                lost += self._overlay(wishes, self._expand(wish))
        for placed in rules:
            for path, entry in placed.entries.items():
                lost += self._overlay(wishes, self._expand(self._wish(base, path, entry, index)))
        covered = {role for target in wishes for role in self._roles(target)}
        left_whole = {}
        for old, new in lost:
            roles = sorted(self._roles(old.target) - covered)
            if roles and (old.keep < 1 or old.own):
                stays = f"{' and '.join(roles)} stay{'' if roles[1:] else 's'} whole"
                left_whole[new.path] = f"takes the place of all of {old.target}, so {stays}"
        return LayerWishes(list(wishes.values()), left_whole)

    def outer(self, *, unsized: bool) -> list[Wish]:
        """What the plan asks for outside the layers; ``unsized`` entries may be, else they are mistakes.

        Such an entry has the plan's own keep until its size is found.
        """
        wishes = []
        for path, entry in self.outside.items():
            if isinstance(entry.keep, tuple):
                self.document.mistake((*path, "keep"), "is outside the layers; write one fraction, not two")
                continue
            base = Wish("", self.plan.method, self.depth(self.plan.keep, 0), {}, (), ("method",), path)
            wish = self._wish(base, path, entry, 0)
            solver = wish.solver(self.methods)
            if solver and not unsized and not wish.sized(self.methods):
                message = (
                    f"has no size; write {solver.size.word} or keep, as the plan's own keep is of the layers, "
                    "or an allocation that finds it, such as 'allocate: sensitivity'"
                )
                self.document.mistake(path, message)
                continue
            wishes.append(wish)
        return wishes

    def depth(self, keep: Keep, index: int) -> float:
        """The kept fraction at a layer: a pair runs linearly from the first layer to the last."""
        if not isinstance(keep, tuple):
            return keep
        share = index / max(self.architecture.layers - 1, 1)
        return keep[0] * (1 - share) + keep[1] * share

    def _roles(self, target: str) -> set[str]:
        return set(self.architecture.targets[target].matrices)

    def _sound(self, section: Path, entries: Mapping[str, Entry]) -> dict[Path, Entry]:
        """Entries by path, without those for what the model does not have."""
        found = {}
        for target, entry in entries.items():
            path = (*section, target)
            if target in self.architecture.targets:
                found[path] = entry
            elif target in self.architecture.outer:
                self.outside[path] = entry
            elif target == "lm_head":
                self.document.mistake(
                    path, "the head of this model is its embedding; write embed, which stands for both"
                )
            else:
                model, known = (
                    self.architecture.family.model_type,
                    nearest(target, self.architecture.matrices),
                )
                self.document.mistake(path, f"{model} has no projection {target!r}; {known}")
        return found

    def _place(self, position: int, rule: Rule) -> Placed | None:
        path: Path = ("layers", position)
        entries = self._sound(path, rule.entries())
        if list(self.document.values["layers"][position]) == ["match"]:
            self.document.mistake(
                path, "says nothing of its layers; add keep, method or an entry such as mlp"
            )
        try:
            return Placed(path, rule, rule.layers(self.architecture.layers), entries)
        except ValueError as error:
            self.document.mistake((*path, "match"), str(error))
            return None

    def _refuse_overlaps(self, pairs: Iterable[tuple[Path, Path]], where: str) -> None:
        """Note pairs of entries of one level that ask for the same weights."""
        for pair in pairs:
            first, second = sorted(pair, key=self.document.line)
            if self._roles(str(first[-1])) & self._roles(str(second[-1])):
                other = f"{dotted(first)}{self.document.on_line(first)}"
                self.document.mistake(second, f"{other} is for the same weights{where}; keep one of the two")

    def _refuse_clashes(self) -> None:
        """Note rules that say two things of one layer."""
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

    def _wish(self, base: Wish, path: Path, entry: Entry, index: int) -> Wish:
        wish = replace(base, target=str(path[-1]), own=entry.own, path=path)
        if entry.method is not None:
            wish = replace(wish, method=entry.method, method_path=(*path, "method"))
        if entry.keep is not None:
            wish = replace(wish, keep=self.depth(entry.keep, index), keep_path=(*path, "keep"))
        return wish

    def _resized(self, wish: Wish, base: Wish) -> Wish:
        """The same with the size of the whole layer in place of its own."""
        solver = wish.solver(self.methods)
        own = {key: value for key, value in wish.own.items() if not solver or key != solver.size.word}
        return replace(wish, keep=base.keep, keep_path=base.keep_path, own=own)

    def _unnamed(self, wish: Wish) -> Wish:
        """A wish for a component that no entry names, with the method that has it then."""
        solver = wish.solver(self.methods)
        if solver is None or solver.rotary is None or self.architecture.family.rotary == "none":
            return wish
        return replace(wish, method=solver.rotary)

    def _expand(self, wish: Wish) -> list[Wish]:
        """A wish, or one for each projection of a component that its method takes apart."""
        method = self.methods.get(wish.method)
        if (
            method
            and wish.target in COMPONENTS
            and wish.target not in method.solvers
            and "projection" in method.solvers
        ):
            return [replace(wish, target=role) for role in self.architecture.family.component(wish.target)]
        return [wish]

    def _overlay(self, wishes: dict[str, Wish], new: list[Wish]) -> list[tuple[Wish, Wish]]:
        """Put wishes over others; returns each that had to go with the one in its place."""
        lost = []
        for wish in new:
            roles = self._roles(wish.target)
            lost += [(wishes.pop(target), wish) for target in list(wishes) if self._roles(target) & roles]
            wishes[wish.target] = wish
        return lost


def spans(layers: Iterable[int]) -> str:
    """Layer numbers as people write them: ``0-3, 7``."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
