"""A plan as plain values with the line of each, and the mistakes found in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from lrc.errors import UserError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """Values, and by path of keys and positions the ``places`` where they are set.

    A place is a line of the text, the option of the command line that set the value, or 0 for values made in Python.
    """

    source: str
    values: dict[str, Any]
    places: dict[KeyPath, int | str]
    mistakes: set[tuple[int, str, str]] = field(default_factory=set)

    @classmethod
    def made(cls, source: str, values: dict[str, Any]) -> Document:
        """Return a document of values made in Python."""
        return cls(source, values, dict.fromkeys(dict(_nested(values, ())), 0))

    def line(self, path: KeyPath) -> int:
        """Return the line of a path, or of the nearest written value around it; 0 if no text has it."""
        place = self._place(path)
        return place if isinstance(place, int) else 0

    def place(self, path: KeyPath) -> str:
        """Return the start of a message about a path: source and line, or the option that set it."""
        place = self._place(path)
        if isinstance(place, str):
            return place
        return f"{self.source}:{place}" if place else self.source

    def on_line(self, path: KeyPath) -> str:
        """Return the line of a path as the middle of a message, or an empty string if no text has it."""
        return f" on line {line}" if (line := self.line(path)) else ""

    def mistake(self, path: KeyPath, message: str) -> None:
        """Note a mistake at a path; repeated mistakes count once."""
        text = f"{dotted(path)}: {message}" if path else message
        self.mistakes.add((self.line(path), self.place(path), text))

    def stop(self) -> None:
        """Raise UserError with all mistakes in the order of their lines, if there are any."""
        if self.mistakes:
            raise UserError("\n".join(f"{place}: {text}" for _, place, text in sorted(self.mistakes)))

    def changed(self, key: str, value: Any, option: str) -> Document:
        """Return the document with ``value`` at a dotted ``key``, such as ``calibration.samples`` or ``layers.0.keep``.

        Messages name ``option`` as the place of the value.
        """
        path = _path_of(key, self.values)
        values = _put(self.values, path, value)
        old, new = dict(_nested(self.values, ())), dict(_nested(values, ()))
        kept = {
            at for at in self.places if at[: len(path)] != path and type(old.get(at)) is type(new.get(at))
        }
        return replace(
            self, values=values, places={at: self.places[at] if at in kept else option for at in new}
        )

    def _place(self, path: KeyPath) -> int | str:
        while path not in self.places:
            path = path[:-1]
        return self.places[path]


def dotted(path: KeyPath) -> str:
    """Return a path as written in messages: ``layers[0].mlp.rank``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n...\n").strip()


def read_document(text: str, source: str) -> Document:
    """Read one YAML mapping; duplicate keys and keys without a value become mistakes of the document.

    Raises UserError with the line if the text is not YAML, or not a mapping.
    """
    values, reader = _read(text, source)
    if not isinstance(values, dict):
        raise UserError(f"{source}:1: a plan is a mapping of keys to values that begins with 'format: 1'")
    mistakes = {(line, f"{source}:{line}", message) for line, message in reader.mistakes}
    return Document(source, values, reader.lines, mistakes)


def read_value(text: str, source: str) -> Any:
    """Read one YAML value. Raises UserError if the text is empty or not YAML."""
    value, reader = _read(text, source)
    for _, message in sorted(reader.mistakes):
        raise UserError(f"{source}: {message}")
    if value is None:
        raise UserError(f"{source}: has no value; write such as keep=0.8")
    return value


def _read(text: str, source: str) -> tuple[Any, _Reader]:
    try:
        loader = yaml.SafeLoader(text)
        root, reader = loader.get_single_node(), _Reader(loader)
        return None if root is None else reader.value(root, ()), reader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{source}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{source}: not a plan: nested too deeply, or an anchor contains itself") from error


def _nested(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield a value with its path, and everything in it."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from _nested(each, (*path, key))


def _path_of(key: str, values: Any) -> KeyPath:
    """Return the path that a dotted key names; a number is a position where there is a list."""
    path: KeyPath = ()
    for word in key.split("."):
        if isinstance(values, list) and word.isdecimal() and int(word) < len(values):
            path, values = (*path, int(word)), values[int(word)]
        else:
            path, values = (*path, word), values.get(word) if isinstance(values, dict) else None
    return path


def _put(values: Any, path: KeyPath, value: Any) -> Any:
    """Return a copy of nested values with one more; a value in the way of a mapping is replaced."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(values, list) and isinstance(key, int):
        return [_put(each, rest, value) if i == key else each for i, each in enumerate(values)]
    found = values if isinstance(values, dict) else {}
    return {**found, key: _put(found.get(key), rest, value)}


class _Reader:
    """Turn the nodes of a YAML text into values, and collect their lines and mistakes."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.loader = loader
        self.lines: dict[KeyPath, int | str] = {(): 1}
        self.mistakes: set[tuple[int, str]] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.item(child, child, (*path, i)) for i, child in enumerate(node.value)]
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # such as the date 2026-13-45
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error

    def item(self, marked: yaml.Node, node: yaml.Node, path: KeyPath) -> Any:
        line = self.lines[path] = marked.start_mark.line + 1
        value = self.value(node, path)
        if value is None:
            self.mistakes.add((line, f"{dotted(path)}: has no value; give it one or leave it out"))
        return value

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        written: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            line = key.start_mark.line + 1
            if key.value in written:
                name, first = dotted((*path, key.value)), written[key.value]
                self.mistakes.add((line, f"{name}: written twice, first on line {first}"))
            written.setdefault(key.value, line)
        self.loader.flatten_mapping(node)  # resolves `<<: *anchor`
        values = {key.value: self.item(key, child, (*path, key.value)) for key, child in node.value}
        return {key: value for key, value in values.items() if value is not None}
