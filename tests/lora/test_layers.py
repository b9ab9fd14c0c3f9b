"""What a layer of each kind adds: against sums written out, and against LyCORIS' own functions where there."""

import importlib

import pytest
import torch
from torch import Tensor

from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lokr import LoKrLayer
from loratune.lora.kinds.lora import LoRALayer


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_ij t[i, j, k, l] a[i, o] b[j, n] with loops, as (o, n, k, l)."""
    total = torch.zeros(a.shape[1], b.shape[1], *t.shape[2:], dtype=t.dtype)
    for i in range(t.shape[0]):
        for j in range(t.shape[1]):
            total += a[i][:, None, None, None] * b[j][None, :, None, None] * t[i, j]
    return total


def kronecker(one: Tensor, two: Tensor) -> Tensor:
    """(o1 o2, i1 i2, ...) with w1[a, b] w2 in the block at (a, b)."""
    rows = [torch.cat([one[a, b] * two for b in range(one.shape[1])], 1) for a in range(one.shape[0])]
    return torch.cat(rows, 0)


LINEAR, CONV, ONE = (5, 6), (5, 6, 3, 3), (5, 6, 1, 1)
R = 2
LORA = {
    "LoRA": (LINEAR, LoRALayer(numbers(R, 6), numbers(5, R), 3.0)),
    "LoRA of a 1x1 convolution": (ONE, LoRALayer(numbers(R, 6, 1, 1), numbers(5, R, 1, 1), 3.0)),
    "LoCon": (CONV, LoRALayer(numbers(R, 6, 3, 3), numbers(5, R, 1, 1), 3.0)),
    "LoCon, Tucker": (CONV, LoRALayer(numbers(R, 6, 1, 1), numbers(5, R, 1, 1), 3.0, numbers(R, R, 3, 3))),
}
LOHA = {
    "LoHa": (LINEAR, LoHaLayer(numbers(5, R), numbers(R, 6), numbers(5, R, seed=1), numbers(R, 6, seed=1), 3.0)),
    "LoHa of a convolution": (
        CONV,
        LoHaLayer(numbers(5, R), numbers(R, 54), numbers(5, R, seed=1), numbers(R, 54, seed=1), 3.0),
    ),
    "LoHa, Tucker": (
        CONV,
        LoHaLayer(
            *(numbers(R, 5), numbers(R, 6), numbers(R, 5, seed=1), numbers(R, 6, seed=1)),
            *(3.0, numbers(R, R, 3, 3), numbers(R, R, 3, 3, seed=1)),
        ),
    ),
}
W1 = {"whole": {"w1": numbers(1, 2)}, "factored": {"w1_a": numbers(1, R), "w1_b": numbers(R, 2)}}
W2 = {
    "whole": (LINEAR, {"w2": numbers(5, 3)}),
    "factored": (LINEAR, {"w2_a": numbers(5, R), "w2_b": numbers(R, 3)}),
    "whole, of a convolution": (CONV, {"w2": numbers(5, 3, 3, 3)}),
    "factored, of a convolution": (CONV, {"w2_a": numbers(5, R), "w2_b": numbers(R, 27)}),
    "factored with a kernel": (CONV, {"w2_a": numbers(5, R), "w2_b": numbers(R, 3, 3, 3)}),
    "Tucker": (CONV, {"w2_a": numbers(R, 5), "w2_b": numbers(R, 3), "t2": numbers(R, R, 3, 3)}),
}
LOKR = {
    f"LoKr, {one} and {two}": (shape, LoKrLayer(3.0, **first, **second))
    for one, first in W1.items()
    for two, (shape, second) in W2.items()
}
ALL = {**LORA, **LOHA, **LOKR}


def expected(layer: LowRank, shape: tuple[int, ...]) -> Tensor:
    held = layer.tensors()
    if isinstance(layer, LoRALayer):
        if layer.mid is not None:
            whole = tucker(layer.mid, layer.up[:, :, 0, 0].T, layer.down[:, :, 0, 0])
        else:
            whole = torch.einsum("or,r...->o...", layer.up.reshape(5, R), layer.down)
        return layer.alpha / R * whole
    if isinstance(layer, LoHaLayer):
        if layer.t1 is not None and layer.t2 is not None:
            return layer.alpha / R * tucker(layer.t1, layer.w1_a, layer.w1_b) * tucker(layer.t2, layer.w2_a, layer.w2_b)
        return layer.alpha / R * ((layer.w1_a @ layer.w1_b) * (layer.w2_a @ layer.w2_b)).reshape(shape)
    one = held["w1"] if "w1" in held else held["w1_a"] @ held["w1_b"]
    if "t2" in held:
        two = tucker(held["t2"], held["w2_a"], held["w2_b"])
    else:
        two = held["w2"] if "w2" in held else held["w2_a"] @ held["w2_b"].flatten(1)
        two = two.reshape(5, 3, *shape[2:])
    scale = 1.0 if {"w1", "w2"} <= held.keys() else layer.alpha / R
    return scale * kronecker(one, two)


@pytest.mark.parametrize("name", ALL)
def test_what_a_layer_adds_is_its_formula(name: str) -> None:
    shape, layer = ALL[name]
    assert layer.flat_shape == (shape[0], expected(layer, shape)[0].numel())
    found = layer.change(torch.zeros(shape, dtype=torch.float64))
    torch.testing.assert_close(found, expected(layer, shape).reshape(shape), rtol=1e-12, atol=1e-12)
    assert layer.matrix().dtype == torch.float32


def magnitudes(shape: tuple[int, ...]) -> dict[str, Tensor]:
    kernel = [1] * (len(shape) - 2)
    return {"of outputs": numbers(5, 1, *kernel).abs(), "of inputs": numbers(1, 6, *kernel).abs()}


@pytest.mark.parametrize("axis", ["of outputs", "of inputs"])
@pytest.mark.parametrize("name", ALL)
def test_dora_sets_the_norms_to_the_magnitude(name: str, axis: str) -> None:
    shape, layer = ALL[name]
    m = magnitudes(shape)[axis]
    dora = type(layer)(**{**vars(layer), "magnitude": m})
    w = numbers(*shape, seed=7)
    made = w + dora.change(w)
    along = 0 if axis == "of outputs" else 1
    others = [i for i in range(len(shape)) if i != along]
    torch.testing.assert_close(made.square().sum(others).sqrt(), m.flatten(), rtol=1e-12, atol=1e-12)
    v = w + layer.change(w)
    for index in range(shape[along]):  # the directions stay those of V
        ours, theirs = made.select(along, index).flatten(), v.select(along, index).flatten()
        torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm())
    assert dora.name == f"DoRA of {layer.kind}"


def by_lycoris(layer: LowRank) -> Tensor:
    functional = importlib.import_module("lycoris.functional")
    held: dict[str, Tensor | None] = dict.fromkeys(("mid", "t1", "t2"))
    held |= dict.fromkeys(("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")) | layer.tensors()
    if isinstance(layer, LoRALayer):
        return functional.locon.diff_weight(held["down"], held["up"], held["mid"], gamma=layer.scale)
    if isinstance(layer, LoHaLayer):
        names = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")
        # autograd's function there needs the scale as a tensor
        return functional.loha.diff_weight(*(held[name] for name in names), gamma=torch.tensor(layer.scale))
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    return functional.lokr.kron_weight(*(held[name] for name in names), scale=layer.scale)


@pytest.mark.parametrize("name", ALL)
def test_lycoris_makes_the_same_of_it(name: str) -> None:
    shape, layer = ALL[name]
    found = by_lycoris(layer).reshape(shape)
    torch.testing.assert_close(layer.change(torch.zeros(shape, dtype=torch.float64)), found, rtol=1e-12, atol=1e-12)
    general = importlib.import_module("lycoris.functional.general")
    w = numbers(*shape, seed=7)
    for axis, m in magnitudes(shape).items():
        dora = type(layer)(**{**vars(layer), "magnitude": m})
        theirs = general.weight_decompose(w + found, m, wd_on_out=axis == "of outputs", backend="torch")
        torch.testing.assert_close(w + dora.change(w), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr, factored and factored"])
def test_half_precision_is_multiplied_in_the_dtype_asked_for(kind: str) -> None:
    _, layer = ALL[kind]
    half = type(layer)(**{**vars(layer), **{name: value.half() for name, value in layer.tensors().items()}})
    exact = type(half)(**{**vars(half), **{name: value.double() for name, value in half.tensors().items()}})
    torch.testing.assert_close(half.matrix(torch.float64), exact.matrix(torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LoRALayer(numbers(R, 6, 1, 1), numbers(5, R, 1, 1), 1.0, numbers(R, 3, 3, 3)), "mid"),
        (lambda: LoRALayer(numbers(R, 6, 3, 3), numbers(5, R, 1, 1), 1.0, numbers(R, R, 3, 3)), "mid"),
        (lambda: LoHaLayer(numbers(5, R), numbers(3, 6), numbers(5, R), numbers(R, 6), 1.0), "ranks"),
        (lambda: LoHaLayer(numbers(5, R), numbers(R, 6), numbers(4, R), numbers(R, 6), 1.0), "different shapes"),
        (
            lambda: LoHaLayer(numbers(R, 5), numbers(R, 6), numbers(R, 5), numbers(R, 6), 1.0, numbers(R, R, 3, 3)),
            "only one of t1 and t2",
        ),
        (lambda: LoHaLayer(numbers(5), numbers(R, 6), numbers(5, R), numbers(R, 6), 1.0), "not matrices"),
        (lambda: LoKrLayer(1.0, w1=numbers(2, 2)), "a factor is missing"),
        (lambda: LoKrLayer(1.0, w1=numbers(2, 2), w1_a=numbers(2, 1), w2=numbers(2, 2)), "both whole and factored"),
        (lambda: LoKrLayer(1.0, w1=numbers(2), w2=numbers(2, 2)), "not a matrix"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make, told) -> None:
    with pytest.raises(ValueError, match=told):
        make()
