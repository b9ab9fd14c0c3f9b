"""What libraries say at every start, and no user can act on, is not shown."""

from __future__ import annotations

import logging

from loratune.cli.quiet import quiet


def test_bitsandbytes_says_nothing_of_an_optional_package() -> None:
    from bitsandbytes.backends.cpu import ops

    before = ops.logger.level
    try:
        quiet()
        assert not ops.logger.isEnabledFor(logging.WARNING)
        assert ops.logger.isEnabledFor(logging.ERROR)
    finally:
        ops.logger.setLevel(before)
