"""Batches of one size in an order of seed and epoch alone, from sources that come as often as the recipe says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.buckets import Size
from loratune.data.entries import Draw, Entry
from loratune.data.order import BatchOrder, groups, in_order, often
from loratune.data.settings import SourceConfig

QUICK = settings(max_examples=150, deadline=None)
SIZES: list[Size] = [(8, 8), (16, 8), (8, 16)]
entries = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(SIZES)), min_size=1, max_size=60).map(
    lambda rows: [Entry(source, at, f"{at}", ("a",), f"{at}", size, size) for at, (source, size) in enumerate(rows)]
)
repeats = st.lists(st.integers(1, 4), min_size=3, max_size=3)
seeds = st.integers(0, 2**32 - 1)
batch_sizes = st.integers(1, 9)


def order(
    given_: Sequence[Entry],
    each: Sequence[float],
    size: int,
    seed: int,
    epoch: int = 0,
) -> BatchOrder:
    made = BatchOrder(groups(given_, each), [entry.bucket for entry in given_], size, seed)
    made.epoch = epoch
    return made


@QUICK
@given(entries, repeats, batch_sizes, seeds)
def test_each_image_comes_as_often_as_it_is_repeated_in_batches_of_one_size(
    given_: list[Entry], each: list[int], size: int, seed: int
) -> None:
    made = order(given_, each, size, seed)
    batches = list(made)
    assert len(made) == len(batches)
    assert all(len({given_[draw.sample].bucket for draw in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) <= size
    assert Counter(draw.sample for batch in batches for draw in batch) == {
        at: each[entry.source] for at, entry in enumerate(given_)
    }
    assert len({draw for batch in batches for draw in batch}) == sum(map(len, batches))  # each draw varies for itself


@QUICK
@given(st.integers(1, 60), seeds, batch_sizes)
def test_epochs_and_seeds_differ(count: int, seed: int, size: int) -> None:
    rows = [Entry(0, at, "", ("a",), "", (8, 8), (8, 8)) for at in range(count)]

    def epoch(number: int, seed: int = seed) -> list[int]:
        made = order(rows, [1], size, seed, number)
        return [draw.sample for batch in made for draw in batch]

    epochs = [epoch(number) for number in range(4)]
    assert all(sorted(one) == list(range(count)) for one in epochs)
    assert epochs[0] == epoch(0)
    if count >= 12:  # two of 12! orders alike: less than 1e-7
        assert len({tuple(one) for one in epochs}) == 4
        assert epochs[0] != epoch(0, seed + 1)


@QUICK
@given(entries, repeats, batch_sizes, seeds, st.data())
def test_a_resumed_order_is_the_rest_of_the_whole_one(
    given_: list[Entry], each: list[int], size: int, seed: int, data: st.DataObject
) -> None:
    whole = [list(order(given_, each, size, seed, epoch)) for epoch in range(3)]
    epoch, done = data.draw(st.integers(0, 2)), data.draw(st.integers(0, len(whole[0])))
    resumed = order(given_, each, size, seed)
    resumed.load_state_dict({"epoch": epoch, "done": done})
    assert list(resumed) == whole[epoch][done:]
    resumed.set_epoch(7)  # Lightning's count, which is not asked
    over = done == len(whole[0])
    assert (resumed.epoch, resumed.done) == ((epoch + 1, 0) if over else (epoch, done))


@pytest.mark.parametrize(("limit", "trained"), [(2, 2), (9, 3), (1.0, 3), (0.4, 1)])
def test_an_epoch_is_over_when_as_much_as_lightning_takes_was_trained_on(limit: float, trained: int) -> None:
    order = BatchOrder([(list(range(12)), 12)], [(8, 8)] * 12, 4, 3, limit=limit)
    for done in range(trained):
        order.done = done
        order.set_epoch(done)
        assert (order.epoch, order.done) == (0, done)
    order.done = trained
    order.set_epoch(0)
    assert (order.epoch, order.done) == (1, 0)


def test_an_order_that_is_fixed_is_the_same_in_every_epoch() -> None:
    made = BatchOrder([(list(range(12)), 12)], [(8, 8)] * 12, 4, 3, fixed=True, limit=1)
    first = list(made)
    made.done = 1
    made.set_epoch(1)
    assert list(made) == first


def test_of_part_of_a_source_every_image_comes_in_time() -> None:
    rows = [Entry(0, at, "", ("a",), "", (8, 8), (8, 8)) for at in range(10)]
    rows += [Entry(0, 10, "", ("a",), "", (16, 8), (16, 8))]  # the only one of its shape
    seen = [{d.sample for batch in order(rows, [0.3], 2, 1, e) for d in batch} for e in range(40)]
    assert {len(one) for one in seen} == {4}
    assert set().union(*seen) == set(range(11))


def sources(*told: dict[str, object]) -> list[SourceConfig]:
    return [SourceConfig("x", **one) for one in told]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("told", "counts", "wanted"),
    [
        ([{}, {}], [10, 4], [1, 1]),
        ([{"repeats": 3}, {}], [10, 4], [3, 1]),
        ([{"weight": 1}, {"weight": 1}], [10, 40], [4, 1]),
        ([{"weight": 3}, {"weight": 1}], [10, 10], [3, 1]),
        ([{"weight": 0.5}, {}], [10, 10], [1, 2]),
        ([{"repeats": 10}, {"role": "regularization"}], [20, 1000], [10, 0.2]),
        ([{}, {"role": "regularization"}], [20, 5], [1, 4]),
        ([{}, {"role": "regularization", "repeats": 2}], [20, 5], [1, 2]),
        ([{}, {"role": "regularization", "weight": 0.25}, {"role": "validation"}], [20, 5, 0], [1, 1, 0]),
    ],
)
def test_how_often_sources_come(told: list[dict[str, object]], counts: list[int], wanted: list[float]) -> None:
    each = often(sources(*told), counts)
    assert [one for one, count in zip(each, counts, strict=True) if count] == pytest.approx(
        [one for one, count in zip(wanted, counts, strict=True) if count]
    )


def test_validation_comes_once_in_order_and_does_not_vary() -> None:
    assert in_order([(8, 8), (16, 8), (8, 8), (8, 8)], 2) == [[Draw(0), Draw(2)], [Draw(3)], [Draw(1)]]
    assert in_order([], 2) == []
