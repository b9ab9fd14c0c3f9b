"""Reads a recipe's YAML, which strangers write: bounded, every key once, and each mistake with its file and line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from loratune.errors import UserError

BYTES = 1 << 20
"""More than any recipe has; a run's own recipe has 5,000."""
NODES = 100_000
"""Of a recipe with its aliases written out: nine to the twelfth fit into a page."""
DEPTH = 50
SECTIONS = ("trainer", "model", "data", "samples", "evaluation", "export", "checkpoint", "run", "guard")
EXAMPLE = "a recipe is a YAML file such as recipes/quickstart.yaml"


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's sections.

    Raises:
        UserError: it cannot be read, is not valid YAML, has a key twice or an empty section; with the line.
    """
    root = compose(path)
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise UserError(f"{path}: a recipe has sections such as trainer:, model: and data:")
    _check_keys(path, root)
    _check_sections(path, root)
    tree: dict[str, Any] = _construct(path, root)
    return tree


def compose(path: Path) -> yaml.Node | None:
    """A recipe's nodes, with their lines; None of an empty file.

    Raises:
        UserError: it cannot be read, is no YAML, or is too large or too deep.
    """
    text = _text(path)
    try:
        _check_size(path, text)
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{path}{line}: not valid YAML ({problem})") from None


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no file'}; {EXAMPLE}")
        with path.open("rb") as file:
            content = file.read(BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}; {EXAMPLE}") from None
    if len(content) > BYTES:
        raise UserError(f"{path}: has more than {BYTES:,} bytes; {EXAMPLE}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; {EXAMPLE}") from None


def _check_size(path: Path, text: str) -> None:
    """Follow the events, which needs neither recursion nor the aliases written out."""
    opened: list[tuple[str | None, int]] = []  # the anchors that are not closed yet, and the count before each
    sizes: dict[str, int] = {}
    count = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            anchored = sizes.get(event.anchor or "", 0)
            if anchored < 0:
                raise UserError(f"{path}:{line}: *{event.anchor} stands within itself; write its value out")
            count += anchored
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, count))
            if event.anchor:
                sizes[event.anchor] = -1
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if len(opened) > DEPTH:
            raise UserError(f"{path}:{line}: is nested more than {DEPTH} deep; {EXAMPLE}")
        if count > NODES:
            raise UserError(f"{path}:{line}: has more than {NODES:,} values, its aliases written out; {EXAMPLE}")


def walk(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """The dotted keys below a node, each with the nodes of its key and of its value."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}.{key.value}" if prefix else str(key.value)
            yield dotted, key, value
            yield from walk(value, dotted)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from walk(item, prefix)


def _check_keys(path: Path, node: yaml.Node) -> None:
    """Raise UserError where a key is no text or stands twice in a mapping; the parser would take the last."""
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{path}:{line}: a key is {key.tag.rpartition(':')[2]}; write a name")
            if key.value in first and key.value != "<<":
                fault = f"'{key.value}' stands twice, first in line {first[key.value]}"
                raise UserError(f"{path}:{line}: {fault}; keep one of them")
            first[key.value] = line
            _check_keys(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(path, item)


def _check_sections(path: Path, root: yaml.MappingNode) -> None:
    for key, value in root.value:
        empty = isinstance(value, yaml.ScalarNode) and value.tag.endswith(":null")
        if empty and key.value in SECTIONS:
            line = f"{path}:{key.start_mark.line + 1}"
            raise UserError(f"{line}: '{key.value}' is empty; give it keys, or leave the section out")


def _construct(path: Path, root: yaml.Node) -> Any:
    """Python's values of the nodes; each scalar alone first, so that a wrong one is told with its line."""
    loader = yaml.SafeLoader("")
    for dotted, _, value in walk(root):
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for item in items:
            if isinstance(item, yaml.ScalarNode):
                try:
                    loader.construct_object(item)
                except (yaml.YAMLError, ValueError, OverflowError) as error:
                    problem = getattr(error, "problem", None) or error
                    raise UserError(f"{path}:{item.start_mark.line + 1}: '{dotted}': {problem}") from None
    try:
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML ({error.problem})") from None
