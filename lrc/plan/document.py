"""A plan as plain values that remember where they were written, and the list of mistakes found in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from lrc.errors import UserError

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """Values, and for every path of keys and positions the line of the text on which it starts.

    The line is 0 for what no text has: values made in Python, and those that an option of the command line set, which
    ``options`` then names by path.
    """

    source: str
    values: dict[str, Any]
    lines: Mapping[Path, int]
    options: Mapping[Path, str] = field(default_factory=dict)
    mistakes: set[tuple[int, str, str]] = field(default_factory=set)

    @classmethod
    def made(cls, source: str, values: dict[str, Any]) -> Document:
        """Return a document of values that no text has."""
        return cls(source, values, dict.fromkeys(_paths(values, ()), 0))

    def line(self, path: Path) -> int:
        """Return the line of a path, or of the nearest thing around it that is written."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]

    def place(self, path: Path) -> str:
        """Return where a path is written, as messages begin: source and line, or the option that set it."""
        while path not in self.lines:
            path = path[:-1]
        if path in self.options:
            return self.options[path]
        return f"{self.source}:{self.lines[path]}" if self.lines[path] else self.source

    def on_line(self, path: Path) -> str:
        """Return where a path is written, as the middle of a message has it; empty where no text has it."""
        return f" on line {line}" if (line := self.line(path)) else ""

    def mistake(self, path: Path, message: str) -> None:
        """Note a mistake at a path, once however often it is found."""
        text = f"{dotted(path)}: {message}" if path else message
        self.mistakes.add((self.line(path), self.place(path), text))

    def stop(self) -> None:
        """Raise UserError with every mistake noted, in the order of the lines, if there are any."""
        if self.mistakes:
            raise UserError("\n".join(f"{place}: {text}" for _, place, text in sorted(self.mistakes)))

    def changed(self, key: str, value: Any, option: str) -> Document:
        """Return the document with ``value`` at a dotted ``key``, such as ``calibration.samples`` or ``layers.0.keep``.

        ``option`` is what messages name as the place of the value.
        """
        path, kept = _path_of(key, self.values)
        new = [*(path[:end] for end in range(kept + 1, len(path))), *_paths(value, path)]
        lines, options = (
            {p: at for p, at in known.items() if p[: len(path)] != path}
            for known in (self.lines, self.options)
        )
        return replace(
            self,
            values=_put(self.values, path, value),
            lines=lines | dict.fromkeys(new, 0),
            options=options | dict.fromkeys(new, option),
        )


def dotted(path: Path) -> str:
    """A path as people write it: ``layers[0].mlp.rank``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n...\n").strip()


def read_document(text: str, source: str) -> Document:
    """Read one YAML mapping; duplicate keys and keys without a value become mistakes of the document.

    Raises UserError with the line where the text is not YAML, or not a mapping.
    """
    values, reader = _read(text, source)
    if not isinstance(values, dict):
        raise UserError(f"{source}:1: a plan is a mapping of keys to values that begins with 'format: 1'")
    mistakes = {(line, f"{source}:{line}", message) for line, message in reader.mistakes}
    return Document(source, values, reader.lines, mistakes=mistakes)


def read_value(text: str, source: str) -> Any:
    """Read one YAML value. Raises UserError where the text is not YAML, and where it is empty."""
    value, reader = _read(text, source)
    for _, message in sorted(reader.mistakes):
        raise UserError(f"{source}: {message}")
    if value is None:
        raise UserError(f"{source}: has no value; write such as keep=0.8")
    return value


def _read(text: str, source: str) -> tuple[Any, _Reader]:
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        reader = _Reader(loader)
        return None if root is None else reader.value(root, ()), reader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{source}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{source}: not a plan: nested too deeply") from error


def _paths(value: Any, path: Path) -> Iterator[Path]:
    """Yield the path of a value and of everything in it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from _paths(each, (*path, key))


def _path_of(key: str, values: Any) -> tuple[Path, int]:
    """Return the path that a dotted key names, and how many of its steps lead through what is there already.

    A number is a position where there is a list.
    """
    path, kept = (), 0
    for word in key.split("."):
        if isinstance(values, list) and word.isdecimal() and int(word) < len(values):
            path, values = (*path, int(word)), values[int(word)]
        else:
            if isinstance(values, list):  # a word in it makes it a mapping
                kept = min(kept, len(path) - 1)
            path, values = (*path, word), values.get(word) if isinstance(values, dict) else None
        kept += kept == len(path) - 1 and isinstance(values, dict | list)
    return path, kept


def _put(values: Any, path: Path, value: Any) -> Any:
    """Return a copy of nested values with one more; what is in the way of a mapping is replaced."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(values, list) and isinstance(key, int):
        return [_put(each, rest, value) if i == key else each for i, each in enumerate(values)]
    found = values if isinstance(values, dict) else {}
    return {**found, key: _put(found.get(key), rest, value)}


class _Reader:
    """Turns the nodes of a YAML text into values, with the lines and the mistakes on the way."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.loader = loader
        self.lines: dict[Path, int] = {(): 1}
        self.mistakes: set[tuple[int, str]] = set()
        self.open: list[yaml.Node] = []

    def value(self, node: yaml.Node, path: Path) -> Any:
        if node in self.open:
            raise yaml.MarkedYAMLError(problem="an anchor that contains itself", problem_mark=node.start_mark)
        self.open.append(node)
        if isinstance(node, yaml.MappingNode):
            value = self.mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            value = [self.item(child, child, (*path, i)) for i, child in enumerate(node.value)]
        else:
            value = self.scalar(node)
        self.open.pop()
        return value

    def item(self, marked: yaml.Node, node: yaml.Node, path: Path) -> Any:
        self.lines[path] = marked.start_mark.line + 1
        value = self.value(node, path)
        if value is None:
            self.mistakes.add(
                (self.lines[path], f"{dotted(path)}: has no value; give it one or leave it out")
            )
        return value

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        written: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            line = key.start_mark.line + 1
            if key.value in written:
                first = written[key.value]
                self.mistakes.add(
                    (line, f"{dotted((*path, key.value))}: written twice, first on line {first}")
                )
            written.setdefault(key.value, line)
        self.loader.flatten_mapping(node)  # resolves `<<: *anchor`
        values = {key.value: self.item(key, child, (*path, key.value)) for key, child in node.value}
        return {key: value for key, value in values.items() if value is not None}

    def scalar(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # such as the date 2026-13-45
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error
