"""What a recipe says of its sources: contradictions are refused before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.data.settings import SourceConfig, gathered, left_out

SHORT: dict[str, Any] = {"caption_prefix": "", "image_column": "image", "caption_column": None}


def test_a_path_is_the_only_source() -> None:
    (one,) = gathered("images", None, SHORT | {"caption_prefix": "sks "})
    assert one == SourceConfig("images", caption_prefix="sks ")


def test_several_sources_stay_as_they_are() -> None:
    told = [SourceConfig("a", repeats=2), SourceConfig("b", role="validation")]
    assert gathered(None, told, SHORT) == tuple(told)
    assert [
        left_out(one) for one in (SourceConfig("a", weight=0), SourceConfig("b", weight=0.1), SourceConfig("c"))
    ] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"repeats": 2, "weight": 1.0}, "repeats is 2 and weight 1.0; keep one of them"),
        ({"repeats": 0}, "repeats is 0; give 1 to 10000, or leave the source out"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"loss_weight": -0.5}, "loss_weight is -0.5"),
        ({"role": "validation", "repeats": 2}, "repeats says nothing of role validation"),
        ({"role": "validation", "loss_weight": 0.5}, "loss_weight says nothing of role validation"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(told: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SourceConfig("images", **told)


@pytest.mark.parametrize(
    ("path", "sources", "short", "said"),
    [
        (None, None, {}, "data.path is null; give a folder"),
        ("a", [{}], {}, "data.path is 'a', and data.sources is given too"),
        (
            None,
            [{}],
            {"caption_prefix": "sks "},
            "data.caption_prefix is 'sks ', but data.sources is given; set caption_prefix in each source",
        ),
        (None, [{}], {"caption_column": "c"}, "data.caption_column is 'c'"),
        (None, [{"role": "regularization"}], {}, "none has role training"),
        (None, [{"weight": 1.0}, {"repeats": 2}], {}, "has weight 1.0, x repeats 2; use one of both for all"),
        (None, [{"weight": 0.0}, {"weight": 0.0}], {}, "weight is 0 for every source"),
        (None, [{"weight": 0.0}, {"weight": 1.0, "role": "regularization"}], {}, "weight is 0 for every source"),
        (None, [{"loss_weight": 0.0}], {}, "loss_weight is 0 for every source"),
    ],
)
def test_sources_that_make_no_sense_are_refused(path: Any, sources: Any, short: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gathered(path, sources and [SourceConfig("x", **told) for told in sources], SHORT | short)
