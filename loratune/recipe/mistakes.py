"""A recipe's mistakes in one line: file, line, key, what is wrong, and the nearest valid name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from loratune.errors import UserError
from loratune.families.family import Architecture

NAMED_CLASSES = (torch.optim.Optimizer, L.Callback, L.LightningModule, Architecture)


def explain(message: str, recipes: Sequence[Path], known: Iterable[str]) -> str:
    """jsonargparse's message as one line.

    Args:
        message: what the parser said.
        recipes: the files that were parsed, the last one first to be searched.
        known: dotted names of all keys.
    """
    if found := re.search(r"- (\S+:\d+: .+?) - Expected a", " ".join(message.split())):
        return found[1]  # told already by a parser within
    if found := re.search(r"does not accept option '([^']+)'", message):
        return _unknown(found[1], recipes, known)
    if found := re.search(r"unrecognized arguments: --([\w.]+)", message):
        return _unknown(found[1], recipes, known)
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        return _unknown_in_class(found[1], recipes)
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        place, names = _place(found[1], recipes), [one.__name__ for base in NAMED_CLASSES for one in _below(base)]
        return f"{place}unknown class {found[1]!r}{_did_you_mean(found[1], names)}"
    keys = re.findall(r'Parser key "([^"]+)":', message)
    rest = " ".join(re.split(r'Parser key "[^"]+":', message)[-1].split())
    if not keys:
        return " ".join(message.split())
    rest = re.sub(r"Expected an? <class '(?:\w+\.)*(\w+)'>\. Got value: (.*)", r"\2 is not of type \1", rest)
    return f"{_place('.'.join(keys), recipes)}'{'.'.join(keys)}': {rest}"


def _unknown(key: str, recipes: Sequence[Path], known: Iterable[str]) -> str:
    known = list(known)
    section = key.split(".")[0]
    if section not in {name.split(".")[0] for name in known}:
        key, known = section, sorted({name.split(".")[0] for name in known})
    return f"{_place(key, recipes)}unknown key '{key}'{_did_you_mean(key, known)}"


def _unknown_in_class(key: str, recipes: Sequence[Path]) -> str:
    for path, line, dotted, siblings in _all_keys(recipes):
        if dotted.split(".")[-1] == key and (named := siblings.get(f"{dotted.rsplit('.', 2)[0]}.class_path")):
            names = [f"{dotted.rsplit('.', 1)[0]}.{name}" for name in _parameters(named)]
            return f"{path}:{line}: unknown key '{dotted}' of {named}{_did_you_mean(dotted, names)}"
    return f"unknown key '{key}'"


def _parameters(name: str) -> list[str]:
    module, _, attribute = name.rpartition(".")
    try:
        found: Any = getattr(import_module(module), attribute) if module else None
    except (ImportError, AttributeError):
        found = None
    for base in NAMED_CLASSES if found is None else ():
        found = next((one for one in _below(base) if one.__name__ == attribute), found)
    return list(inspect.signature(found).parameters) if found else []


def _below(base: type[Any]) -> Iterator[type[Any]]:
    for one in base.__subclasses__():
        yield one
        yield from _below(one)


def _did_you_mean(word: str, names: Iterable[str]) -> str:
    found = get_close_matches(word, list(names), 1, 0.6)
    return f"; did you mean '{found[0]}'?" if found else ""


def _place(key: str, recipes: Sequence[Path]) -> str:
    """`FILE:LINE: ` of a dotted key, or of a value; empty where it is in no file (but on the command line)."""
    entries = list(_all_keys(recipes))
    for path, line, dotted, siblings in entries:
        if dotted == key or siblings.get(dotted) == key:
            return f"{path}:{line}: "
    parent = key.rpartition(".")[0]
    return _place(parent, recipes) if parent else ""


def _all_keys(recipes: Sequence[Path]) -> Iterator[tuple[Path, int, str, dict[str, str]]]:
    for path in reversed(recipes):
        values: dict[str, str] = {}
        found = list(_walk(yaml.compose(path.read_text(encoding="utf-8")), ""))
        for _, dotted, value in found:
            values[dotted] = value
        for line, dotted, _ in found:
            yield path, line, dotted, values


def _walk(node: Any, prefix: str) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}.{key.value}" if prefix else key.value
            yield key.start_mark.line + 1, dotted, getattr(value, "value", "") if _scalar(value) else ""
            yield from _walk(value, dotted)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item, prefix)


def _scalar(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode)


def check_recipes(recipes: Sequence[Path]) -> None:
    """See that recipes are there and are YAML mappings.

    Raises:
        UserError: one is not, with the file and the line.
    """
    for path in recipes:
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; a recipe is a YAML file such as recipes/quickstart.yaml"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a text file") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
        if not isinstance(read, dict):
            raise UserError(f"{path}: a recipe has sections such as trainer:, model: and data:")
