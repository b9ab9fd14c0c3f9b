"""Which code a recipe may name: recipes are written by strangers, and a class path is imported and called."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from jsonargparse import Namespace, _common, set_parsing_settings

KNOWN = (
    *("loratune", "lightning", "torch.optim", "torch.distributed.fsdp"),
    *("bitsandbytes.optim", "prodigyopt", "schedulefree", "transformers.optimization"),
)
"""Modules whose classes may be named; each place takes only those that are of its type."""


def functions(value: Any) -> Iterator[str]:
    """The functions, but no classes, that a parsed recipe hands over to be called, by their import paths."""
    if isinstance(value, Namespace | Mapping):
        for part in vars(value).values() if isinstance(value, Namespace) else value.values():
            yield from functions(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from functions(part)
    elif inspect.isroutine(value) or isinstance(value, partial):
        value = value.func if isinstance(value, partial) else value
        yield f"{value.__module__}.{value.__qualname__}"


@contextmanager
def importing(allow_code: bool) -> Iterator[None]:
    """Parse so that nothing outside `KNOWN` is imported, and nothing is called where any value is taken.

    jsonargparse's settings are the process's; it has no way back from a denial but to restore them.

    Args:
        allow_code: whether a recipe may name any code.
    """
    before = dict(_common.parsing_settings)
    if allow_code:
        set_parsing_settings(instantiate_subclass_spec_in_any=True)
    else:
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=list(KNOWN),
            instantiate_subclass_spec_in_any=False,
            validate_subclass_spec_in_any=True,
        )
    try:
        yield
    finally:
        _common.parsing_settings.update(before)
