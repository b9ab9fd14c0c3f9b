"""A recipe's mistakes in one line: file, line, key, what is wrong, and the nearest valid name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from loratune.recipe.reader import compose, walk


class Entry(NamedTuple):
    """A key of a recipe: where it stands, its dotted name, and its value where that is a scalar."""

    path: Path
    line: int
    key: str
    value: str


def entries_of(recipes: Sequence[Path]) -> list[Entry]:
    """All keys of recipes, the last recipe's first; read before the parser goes into a recipe's folder."""
    return [
        Entry(path, key.start_mark.line + 1, dotted, value.value if isinstance(value, yaml.ScalarNode) else "")
        for path in reversed(recipes)
        for dotted, key, value in walk(compose(path))
    ]


def foreign(name: str) -> str:
    """What is said of code that a recipe may not name."""
    remedy = "give --allow-code if you trust this recipe"
    return f"{name!r} is code from outside the classes that recipes may name; {remedy}"


FOREIGN = re.compile(r"(?:\S+:\d+: )?'[^']+' is code from .+? if you trust this recipe")


def explain(message: str, recipes: Sequence[Entry], known: Iterable[str]) -> str:
    """jsonargparse's message as one line.

    Args:
        message: what the parser said.
        recipes: the keys of the files that were parsed.
        known: dotted names of all keys.
    """
    if match := re.search(r"- (\S+:\d+: .+?) - Expected a", " ".join(message.split())):
        return match[1]  # explained already by an inner parser
    if match := FOREIGN.search(" ".join(message.split())):
        return match[0]  # likewise
    if match := re.search(r"Importing '([^']+)' is not allowed", message):
        return f"{place(match[1], recipes)}{foreign(match[1])}"
    if match := re.search(r"does not accept option '([^']+)'", message):
        return _unknown(_dotted(match[1], recipes), recipes, known)
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message):
        return _unknown(match[1], recipes, known)
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        return _unknown_in_class(match[1], recipes, known)
    if match := re.search(r"Expected a dot import path string: (\S+)", message):
        names = [candidate.__name__ for base in _named_classes() for candidate in _below(base)]
        return f"{place(match[1], recipes)}unknown class {match[1]!r}{_did_you_mean(match[1], names)}"
    keys = re.findall(r'Parser key "([^"]+)":', message)
    rest = " ".join(re.split(r'Parser key "[^"]+":', message)[-1].split())
    if not keys:
        return " ".join(message.split())
    rest = re.sub(r"Expected an? <class '(?:\w+\.)*(\w+)'>\. Got value: (.*)", r"\2 is not of type \1", rest)
    return f"{place('.'.join(keys), recipes)}'{'.'.join(keys)}': {rest}"


def _unknown(key: str, recipes: Sequence[Entry], known: Iterable[str]) -> str:
    known = list(known)
    section = key.split(".")[0]
    if section not in {name.split(".")[0] for name in known}:
        key, known = section, sorted({name.split(".")[0] for name in known})
    return f"{place(key, recipes)}unknown key '{key}'{_did_you_mean(key, known)}"


def _unknown_in_class(key: str, recipes: Sequence[Entry], known: Iterable[str]) -> str:
    classes = {(entry.path, entry.key): entry.value for entry in recipes}
    for path, line, dotted, _ in recipes:
        named = classes.get((path, f"{dotted.rsplit('.', 2)[0]}.class_path"))
        if dotted.split(".")[-1] == key and named:
            names = [f"{dotted.rsplit('.', 1)[0]}.{name}" for name in _parameters(named)]
            return f"{path}:{line}: unknown key '{dotted}' of {named}{_did_you_mean(dotted, names)}"
    return _unknown(_dotted(key, recipes), recipes, known)


def _dotted(key: str, recipes: Sequence[Entry]) -> str:
    """A key with what is above it; without a sub-command the parser names the last part alone."""
    keys = [entry.key for entry in recipes]
    return key if key in keys else next((other for other in keys if other.endswith(f".{key}")), key)


def _parameters(name: str) -> list[str]:
    module, _, attribute = name.rpartition(".")
    try:
        named: Any = getattr(import_module(module), attribute) if module else None
    except (ImportError, AttributeError):
        named = None
    for base in _named_classes() if named is None else ():
        named = next((candidate for candidate in _below(base) if candidate.__name__ == attribute), named)
    return list(inspect.signature(named).parameters) if named else []


def _named_classes() -> tuple[type[Any], ...]:
    """What recipes name by class path."""
    import lightning as L
    import torch

    from loratune.families.family import Architecture

    return torch.optim.Optimizer, L.Callback, L.LightningModule, Architecture


def _below(base: type[Any]) -> Iterator[type[Any]]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from _below(subclass)


def _did_you_mean(word: str, names: Iterable[str]) -> str:
    close = get_close_matches(word, list(names), 1, 0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def place(key: str, entries: Sequence[Entry]) -> str:
    """`FILE:LINE: ` of a dotted key, or of a value; empty where it is in no file (but on the command line)."""
    for entry in entries:
        if key in (entry.key, entry.key.replace("model.init_args.", "model."), entry.value):
            return f"{entry.path}:{entry.line}: "
    parent = key.rpartition(".")[0]
    return place(parent, entries) if parent else ""
