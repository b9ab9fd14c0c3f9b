"""Mathematics on factors, held against torch.linalg.svd of the whole matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.errors import UserError
from loratune.lora.algebra import (
    concatenate,
    distance,
    effective_rank,
    factors,
    inner,
    norm,
    randomized_svd,
    rank_for,
    singular_values,
    spectrum,
    svd,
    tail,
    truncate,
)
from loratune.lora.kinds.layer import LowRank, Product
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lokr import LoKrLayer
from loratune.lora.kinds.lora import LoRALayer

MANY = settings(max_examples=80, deadline=None)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 10**6))


def product(m: int, n: int, r: int, seed: int = 0) -> Product:
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((m, r), (r, n)))
    return Product(b, a)


def close(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@MANY
@given(SIZES)
def test_the_svd_of_the_factors_is_that_of_the_whole_matrix(sizes):
    one = product(*sizes)
    full = one.b @ one.a
    u, s, v = svd(one)
    wanted = torch.linalg.svdvals(full)
    close(s, wanted[: len(s)])
    close(singular_values(one), s)
    assert float(wanted[len(s) :].norm()) < 1e-10
    close((u * s) @ v, full)
    close(u.T @ u, torch.eye(len(s), dtype=torch.float64))
    close(v @ v.T, torch.eye(len(s), dtype=torch.float64))
    assert norm(one) == pytest.approx(float(full.norm()), rel=1e-12)


@MANY
@given(SIZES, st.integers(1, 14))
def test_truncation_is_as_far_off_as_eckart_and_young_say(sizes, rank):
    one = product(*sizes)
    parts = svd(one)
    kept = truncate(parts, rank)
    wanted = float(torch.linalg.svdvals(one.b @ one.a)[rank:].norm())
    assert kept.rank == min(rank, len(parts.s))
    assert float((one.b @ one.a - kept.b @ kept.a).norm()) == pytest.approx(wanted, abs=1e-9)
    assert tail(parts.s, rank) == pytest.approx(wanted, abs=1e-9)
    assert distance(one, kept) == pytest.approx(wanted, abs=1e-9)
    close(kept.b.norm(dim=0), kept.a.norm(dim=1))


@MANY
@given(SIZES, st.floats(0.01, 1))
def test_the_rank_for_a_share_is_the_smallest_that_keeps_it(sizes, share):
    s = singular_values(product(*sizes))
    rank = rank_for(s, share)
    kept = s.square().cumsum(0)
    assert 1 <= rank <= len(s)
    assert kept[rank - 1] >= share * kept[-1]
    assert rank == 1 or kept[rank - 2] < share * kept[-1]


def test_the_rank_for_a_share_of_nothing_is_one():
    assert rank_for(torch.zeros(3), 0.9) == 1
    assert rank_for(torch.tensor([3.0, 4.0]), 9 / 25) == 1
    assert rank_for(torch.tensor([4.0, 3.0]), 0.65) == 2


@MANY
@given(SIZES, st.floats(-2, 2), st.floats(-2, 2), st.integers(1, 5))
def test_sums_distances_and_inner_products(sizes, one_weight, other_weight, other_rank):
    one, other = product(*sizes), product(sizes[0], sizes[1], other_rank, 7)
    both = concatenate([(one_weight, one), (other_weight, other)])
    left, right = one.b @ one.a, other.b @ other.a
    assert both.rank == one.rank + other.rank
    close(both.b @ both.a, one_weight * left + other_weight * right)
    assert distance(one, other) == pytest.approx(float((left - right).norm()), rel=1e-9, abs=1e-12)
    assert inner(one, other) == pytest.approx(float((left * right).sum()), rel=1e-9, abs=1e-9)


def test_the_distance_of_near_equals_does_not_cancel():
    one = product(50, 40, 4)
    other = Product(one.b * (1 + 1e-10), one.a)
    assert distance(one, other) == pytest.approx(1e-10 * norm(one), rel=1e-4)


def test_the_effective_rank_of_equal_values_is_their_number():
    assert effective_rank(torch.full((5,), 3.0)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    p = torch.tensor([0.5, 0.25, 0.25])
    assert effective_rank(8 * p) == pytest.approx(math.exp(1.5 * math.log(2)))


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layers() -> dict[str, LowRank]:
    torch.manual_seed(0)
    return {
        "lora": LoRALayer(rand(3, 5), rand(7, 3), 2.0),
        "lora conv": LoRALayer(rand(3, 5, 3, 3), rand(7, 3, 1, 1), 2.0),
        "lora mid": LoRALayer(rand(3, 5, 1, 1), rand(7, 3, 1, 1), 2.0, mid=rand(3, 3, 3, 3)),
        "loha": LoHaLayer(rand(20, 2), rand(2, 30), rand(20, 3), rand(3, 30), 0.7),
        "loha wide": LoHaLayer(rand(7, 3), rand(3, 5), rand(7, 3), rand(3, 5), 0.7),
        "loha mid": LoHaLayer(rand(2, 9), rand(2, 8), rand(2, 9), rand(2, 8), 3.0, rand(2, 2, 3, 3), rand(2, 2, 3, 3)),
        "lokr": LoKrLayer(3.0, w1=rand(2, 3), w2_a=rand(8, 2), w2_b=rand(2, 9)),
        "lokr whole": LoKrLayer(3.0, w1=rand(2, 3), w2=rand(4, 5)),
        "lokr both": LoKrLayer(3.0, w1_a=rand(4, 1), w1_b=rand(1, 3), w2_a=rand(8, 2), w2_b=rand(2, 9)),
        "lokr conv": LoKrLayer(3.0, w1=rand(2, 3), w2=rand(4, 5, 3, 3)),
        "lokr mid": LoKrLayer(3.0, w1=rand(2, 3), w2_a=rand(2, 8), w2_b=rand(2, 5), t2=rand(2, 2, 3, 3)),
        "dora": LoRALayer(rand(3, 5), rand(7, 3), 2.0, magnitude=rand(7, 1)),
    }


@pytest.mark.parametrize("name", layers())
def test_the_factors_of_every_kind_multiply_to_its_matrix(name):
    layer = layers()[name]
    found = factors(layer)
    close(found.b @ found.a, layer.matrix(torch.float64))
    assert found.rank <= max(layer.rank, min(layer.flat_shape))
    values = torch.linalg.svdvals(layer.matrix(torch.float64))
    shown = min(len(values), len(spectrum(layer)))
    close(spectrum(layer)[:shown], values[:shown])
    assert float(values[shown:].norm()) < 1e-10
    assert float(spectrum(layer)[shown:].norm()) < 1e-10


def test_a_kronecker_product_may_be_larger_than_memory():
    huge = LoKrLayer(1.0, w1=torch.eye(300), w2=torch.eye(300))
    assert torch.equal(spectrum(huge), torch.ones(90000, dtype=torch.float64))
    with pytest.raises(UserError, match="a matrix of 90000 x 90000; no base has such a layer"):
        factors(huge)


def test_products_of_low_rank_stay_factored():
    assert factors(layers()["loha"]).rank == 6
    assert factors(layers()["lokr both"]).rank == 2


@MANY
@given(st.integers(1, 9), st.integers(1, 9))
def test_a_whole_matrix_is_a_product(m, n):
    matrix = rand(m, n)
    found = Product.of(matrix)
    assert torch.equal(found.b @ found.a, matrix)
    assert found.rank == min(m, n)


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (12, 90)])
def test_the_randomized_svd_is_the_svd_where_the_values_fall(shape):
    torch.manual_seed(1)
    u, v = (torch.linalg.qr(rand(size, min(shape))).Q for size in shape)
    matrix = (u * 0.5 ** torch.arange(min(shape), dtype=torch.float64)) @ v.T
    found = randomized_svd(matrix, 5)
    wanted = torch.linalg.svd(matrix, full_matrices=False)
    close(found.s, wanted.S[:5])
    error = (matrix - (found.u * found.s) @ found.v).norm()
    assert float(error) == pytest.approx(float(wanted.S[5:].norm()), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(found, randomized_svd(matrix, 5), strict=True))


def test_the_randomized_svd_recovers_a_matrix_of_low_rank():
    one = product(200, 150, 6)
    found = randomized_svd(one.b @ one.a, 6)
    close((found.u * found.s) @ found.v, one.b @ one.a)
