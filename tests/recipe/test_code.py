"""A recipe names classes of known libraries alone, unless it is trusted."""

from __future__ import annotations

import os
from functools import partial

import pytest
from jsonargparse import Namespace, _common

from loratune.recipe.code import functions, importing

FOREIGN = (
    "os.system",
    "subprocess.Popen",
    "evil.Thing",
    "builtins.eval",
    "torch.hub.load",
    "loratunes.x",
    "shutil.rmtree",
)
KNOWN = (
    "torch.optim.AdamW",
    "loratune.training.ema.EMA",
    "lightning.pytorch.callbacks.EarlyStopping",
    "prodigyopt.Prodigy",
)


def test_only_what_is_known_is_imported_and_settings_come_back() -> None:
    before = dict(_common.parsing_settings)
    for path in FOREIGN:
        with importing(allow_code=False), pytest.raises(_common.ImportDenied):
            _common.check_import_path(path)
    with importing(allow_code=False):
        for path in KNOWN:
            _common.check_import_path(path)
    assert dict(_common.parsing_settings) == before
    with importing(allow_code=True):
        _common.check_import_path("evil.Thing")
    assert dict(_common.parsing_settings) == before


def test_functions_that_a_recipe_hands_over_are_found_wherever_they_stand() -> None:
    tree = Namespace(a=[{"b": os.getcwd}], c=Namespace(d=partial(os.path.join, "x")), e=Namespace, f=3, g=None)
    assert list(functions(tree)) == ["posix.getcwd", "posixpath.join"]
    assert not list(functions(Namespace(optimizer=Namespace, rate=1.0, names=["os.system"])))
