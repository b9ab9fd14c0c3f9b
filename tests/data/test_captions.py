"""What is told of an image in a step: chosen, shuffled and dropped as the recipe says."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.captions import Captions

words = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=5)
TEXT = "style, red, round, small, old"


def drawn(captions: Captions, told: tuple[str, ...], prefix: str = "", count: int = 400) -> list[str]:
    random = Random(7)
    return [captions.draw(told, prefix, random) for _ in range(count)]


def test_each_line_is_a_caption_where_the_recipe_says_so() -> None:
    written = ("a cat\n\n  a small cat \n", "a pet")
    assert Captions().read(written, "in ink, ") == ("in ink, a cat\n\n  a small cat \n", "in ink, a pet")
    assert Captions(lines=True).read(written, "in ink, ") == ("in ink, a cat", "in ink, a small cat", "in ink, a pet")
    assert Captions(lines=True).read(("\n",), "in ink") == ("in ink",)
    assert Captions().read((), "") == ("",)


def test_one_of_several_captions_is_chosen() -> None:
    told = ("a", "b", "c")
    counted = Counter(drawn(Captions(), told, count=900))
    assert set(counted) == set(told)
    assert min(counted.values()) > 230  # a third, less 4 standard deviations
    assert set(drawn(Captions(choose="first"), told)) == {"a"}
    assert Captions().possible(told) == told
    assert Captions(choose="first").possible(told) == ("a",)


def test_tags_are_shuffled_behind_those_that_are_kept() -> None:
    made = drawn(Captions(shuffle_tags=True, keep_tokens=2), (TEXT,))
    assert {tuple(text.split(", ")[:2]) for text in made} == {("style", "red")}
    assert len(set(made)) == 6  # 3! orders
    assert {tuple(sorted(text.split(", "))) for text in made} == {tuple(sorted(TEXT.split(", ")))}
    assert len(set(drawn(Captions(shuffle_tags=True), (TEXT,)))) > 50
    assert set(drawn(Captions(), (TEXT,))) == {TEXT}


def test_tags_are_dropped_but_those_that_are_kept() -> None:
    made = drawn(Captions(tag_dropout=0.25, keep_tokens=1), (TEXT,), count=2000)
    assert all(text.split(", ")[0] == "style" for text in made)
    left = sum(len(text.split(", ")) - 1 for text in made) / (4 * 2000)
    assert left == pytest.approx(0.75, abs=0.02)  # 4 standard deviations
    order = TEXT.split(", ")
    assert all(tags == sorted(tags, key=order.index) for tags in (text.split(", ") for text in made))


def test_what_parts_tags_can_be_said_and_the_prefix_stays() -> None:
    made = drawn(Captions(shuffle_tags=True, separator="."), ("sks man, a. b. c",), "sks man, ")
    assert set(made) == {f"sks man, {x}. {y}. {z}" for x, y, z in ("abc", "acb", "bac", "bca", "cab", "cba")}


@given(st.lists(words, max_size=8), st.integers(0, 9), st.floats(0, 0.9), st.integers())
def test_nothing_is_told_that_was_not_written(tags: list[str], keep: int, share: float, seed: int) -> None:
    captions = Captions(shuffle_tags=True, keep_tokens=keep, tag_dropout=share)
    made = [tag for tag in captions.draw((", ".join(tags),), "", Random(seed)).split(", ") if tag]
    assert not Counter(made) - Counter(tags)
    assert made[:keep] == tags[:keep]
    assert captions.draw((", ".join(tags),), "", Random(seed)) == captions.draw((", ".join(tags),), "", Random(seed))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tag_dropout": 1.0}, "captions.tag_dropout is 1.0"),
        ({"keep_tokens": -1, "shuffle_tags": True}, "captions.keep_tokens is -1"),
        ({"keep_tokens": 2}, "captions.keep_tokens is 2; give 0, or more with shuffle_tags or tag_dropout"),
        ({"separator": " "}, "captions.separator is ' '"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Captions(**wrong)  # type: ignore[arg-type]
