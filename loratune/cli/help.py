"""`loratune VERB --help` as the command line is typed: hyphens, bare flags, defaults only where they tell something."""

from __future__ import annotations

import inspect
from argparse import Action
from collections.abc import Callable
from typing import Any

from jsonargparse import DefaultHelpFormatter


class VerbHelp(DefaultHelpFormatter):
    """Each option once: `--in-place`, `--lora LORA`, `--rank RANK`, and what it is when it is not given."""

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return action.dest
        first = ", ".join(flag.replace("_", "-") for flag in action.option_strings if not flag.endswith("+"))
        return first if action.dest == "help" or _is_flag(action) else f"{first} {_value(action)}"

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").rstrip(".").replace("%", "%%")
        if action.dest == "help":
            return "show this help and exit"
        if action.required and action.option_strings:
            return f"{text} (required)"
        shown = isinstance(action.default, (int, float)) and action.default is not False
        shown = shown or action.default not in (None, False, [], "", "==SUPPRESS==")
        return f"{text} (default: {_plain(action.default)})" if shown else text


def _plain(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)


def _is_flag(action: Action) -> bool:
    return getattr(action, "_typehint", None) is bool or action.type is bool or "true,false" in str(action.metavar)


def _value(action: Action) -> str:
    choices = str(action.metavar or "")
    return choices if choices.startswith("{") else action.dest.upper().replace("_", "-")


def usage_of(verb: Callable[..., int | None]) -> str:
    """What must be given, and that there are options."""
    parameters = inspect.signature(verb).parameters.values()
    by_place = [each.name.upper() for each in parameters if each.kind is each.POSITIONAL_ONLY]
    needed = [
        each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    keys = ["[--KEY VALUE ...]"] if any(each.kind is each.VAR_POSITIONAL for each in parameters) else []
    words = [f"--{name.replace('_', '-')} {name.upper()}" for name in needed]
    return " ".join([f"loratune {verb.__name__}", *by_place, *words, "[options]", *keys])
