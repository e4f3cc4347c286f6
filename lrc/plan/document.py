"""A YAML text as plain values that remember their lines, and the list of mistakes found in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from lrc.errors import UserError

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """``values`` of a text, the line on which every path of keys and positions starts, and the mistakes."""

    source: str
    values: dict[str, Any]
    lines: Mapping[Path, int]
    mistakes: set[tuple[int, str]] = field(default_factory=set)

    def line(self, path: Path) -> int:
        """The line of a path, or of the nearest thing around it that is written."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]

    def mistake(self, path: Path, message: str) -> None:
        """Note a mistake at a path, once however often it is found."""
        self.mistakes.add((self.line(path), f"{dotted(path)}: {message}" if path else message))

    def stop(self) -> None:
        """Raise UserError with every mistake noted, in the order of the lines, if there are any."""
        if self.mistakes:
            raise UserError(
                "\n".join(f"{self.source}:{line}: {text}" for line, text in sorted(self.mistakes))
            )


def dotted(path: Path) -> str:
    """A path as people write it: ``layers[0].mlp.rank``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def read_document(text: str, source: str) -> Document:
    """Read one YAML mapping; duplicate keys and keys without a value become mistakes of the document.

    Raises UserError with the line where the text is not YAML, or not a mapping.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{source}:1: a plan is a mapping of keys to values that begins with 'format: 1'")
        reader = _Reader(loader)
        values = reader.mapping(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{source}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{source}: not a plan: nested too deeply") from error
    return Document(source, values, reader.lines, reader.mistakes)


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
