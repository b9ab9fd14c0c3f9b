"""A verb's signature is its command line.

A positional-only parameter is given by place, *overrides are keys of a recipe, `*words` alone is all that is left to
the recipe's own parser, a list is an option that may be repeated, and a bool is a bare flag.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from loratune.errors import UserError

ALLOW_CODE = "--allow-code"
"""Lets a recipe name code of any module; without it only classes of the libraries that are known."""

Verb = Callable[..., int | None]


def is_of_a_recipe(verb: Verb) -> bool:
    """Whether a verb takes a recipe's keys on its command line."""
    return any(each.kind is each.VAR_POSITIONAL for each in inspect.signature(verb).parameters.values())


def arguments(verb: Verb, words: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """What a verb is called with, for the words of a command line.

    Raises:
        UserError: the words are not of its signature.
    """
    parameters = inspect.signature(verb).parameters.values()
    if all(each.kind is each.VAR_POSITIONAL for each in parameters):
        return list(words), {}
    words, overrides = overridden(words) if is_of_a_recipe(verb) else (list(words), [])
    by_place = [each.name for each in parameters if each.kind is each.POSITIONAL_ONLY]
    # As types, since jsonargparse imports all that a file imports for its checker alone to read them as text.
    verb.__annotations__.update(get_type_hints(verb))
    parser = _parser(verb, by_place)
    values = parser.instantiate_classes(parser.parse_args(_words(verb, words))).as_dict()
    return [*(values.pop(name) for name in by_place), *overrides], values


def _parser(verb: Verb, by_place: Sequence[str]) -> Any:
    from jsonargparse import ArgumentParser

    from loratune.cli.help import VerbHelp, usage_of

    name = verb.__name__

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
            raise UserError(f"{name}: {' '.join(message.split())}")

    parser = Parser(
        prog=f"loratune {name}",
        usage=usage_of(verb),
        description=(verb.__doc__ or "").split("Args:")[0],
        formatter_class=VerbHelp,
    )
    for argument in by_place:
        parser.add_argument(argument, type=Path, help=_help_of(verb, argument))
    parser.add_function_arguments(verb, as_group=False, skip=set(by_place))
    return parser


def overridden(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words without those for the recipe's parser (keys such as --data.resolution 512, --allow-code), and these."""
    rest: list[str] = []
    keys: list[str] = []
    pending = False
    for word in words:
        key = word.startswith("--") and ("." in word.partition("=")[0] or word.startswith("--seed_everything"))
        (keys if key or pending or word == ALLOW_CODE else rest).append(word)
        pending = key and "=" not in word
    return rest, keys


def _help_of(verb: Verb, name: str) -> str:
    """What a verb's docstring says of an argument."""
    lines = (line.strip() for line in (verb.__doc__ or "").splitlines())
    return next(line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: "))


def _words(verb: Verb, words: Sequence[str]) -> list[str]:
    """The words as jsonargparse takes them: `--in-place` is `--in_place=true`, and `--lora` adds to a list."""
    typed = []
    for word, after in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        kind = verb.__annotations__.get(key) if flag.startswith("--") else None
        if kind is None:
            typed.append(word)
        elif kind is bool and not equals and after not in ("true", "false"):
            typed.append(f"--{key}=true")
        else:
            typed.append(f"--{key}{'+' if str(kind).startswith('list[') else ''}{equals}{value}")
    return typed
