"""Which code a recipe may name: recipes are written by strangers, and a class path is imported and called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import _common, set_parsing_settings

KNOWN = (
    *("loratune", "lightning", "torch.optim", "torch.distributed.fsdp"),
    *("bitsandbytes.optim", "prodigyopt", "schedulefree", "transformers.optimization"),
)
"""Modules whose classes may be named; each place takes only those that are of its type."""


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
