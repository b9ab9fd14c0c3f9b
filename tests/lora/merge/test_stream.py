"""W_0 + sum_i w_i Delta W_i of every kind of layer, rounded once, held against float64; and what is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.formats.files import DTYPES, write_safetensors
from loratune.formats.numbers import FLOATS, spacing, widened
from loratune.lora.file import read_layers
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lokr import LoKrLayer
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.merge.arithmetic import BLOCK, Term, checked, merged
from loratune.lora.merge.memory import stored
from loratune.lora.merge.stream import Buffers, turned

Random = Callable[..., Tensor]


def random_of(seed: int) -> Random:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def lora(rand: Random, out: int, n: int, *kernel: int, magnitude: Tensor | None = None) -> LoRALayer:
    up = rand(out, 4, *(1 for _ in kernel)) * 0.05
    return LoRALayer(rand(4, n, *kernel), up, 3.0, magnitude=magnitude)


def all_kinds() -> dict[str, tuple[tuple[int, ...], LowRank]]:
    """A shape of W_0 and a layer for it, larger than a block for one kind."""
    r = random_of(0)
    columns = BLOCK // 16
    return {
        "LoRA": ((24, columns), lora(r, 24, columns)),
        "LoRA conv": ((12, 6, 3, 3), lora(r, 12, 6, 3, 3)),
        "LoRA 1x1": ((12, 6, 1, 1), lora(r, 12, 6, 1, 1)),
        "LoRA Tucker": ((12, 6, 3, 3), LoRALayer(r(4, 6, 1, 1), r(12, 4, 1, 1), 0.25, mid=r(4, 4, 3, 3))),
        "LoHa": ((12, 10), LoHaLayer(r(12, 2), r(2, 10), r(12, 2), r(2, 10), 0.1)),
        "LoHa conv": ((12, 5, 3, 3), LoHaLayer(r(12, 2), r(2, 45), r(12, 2), r(2, 45), 0.1)),
        "LoKr": ((12, 10), LoKrLayer(0.2, w1=r(3, 2), w2_a=r(4, 2), w2_b=r(2, 5))),
        "LoKr conv": ((12, 10, 3, 3), LoKrLayer(1.0, w1=0.1 * r(3, 2), w2=r(4, 5, 3, 3))),
        "DoRA": ((12, 10), lora(r, 12, 10, magnitude=r(12, 1).abs() + 3)),
        "DoRA of inputs": ((12, 10), lora(r, 12, 10, magnitude=r(1, 10).abs() + 3)),
        "DoRA conv": ((12, 6, 3, 3), lora(r, 12, 6, 3, 3, magnitude=r(12, 1, 1, 1).abs() + 3)),
        "DoRA of LoHa": (
            (12, 10),
            LoHaLayer(r(12, 2), r(2, 10), r(12, 2), r(2, 10), 0.1, magnitude=r(12, 1).abs() + 3),
        ),
    }


def reference(w: Tensor, layer: LowRank) -> Tensor:
    """Delta W at weight 1 in float64, from the definitions, by other operations than the package's."""
    w = w.double()
    held = {name: value.double() for name, value in layer.tensors().items()}
    flat = w.flatten(1)
    if isinstance(layer, LoRALayer):
        down = held["down"]
        if layer.mid is not None:
            down = torch.einsum("ijkl,jn->inkl", held["mid"], down.flatten(1))
        delta = layer.alpha / 4 * torch.einsum("or,ri->oi", held["up"].flatten(1), down.flatten(1))
    elif isinstance(layer, LoHaLayer):
        sides = [torch.einsum("or,ri->oi", held[f"w{i}_a"], held[f"w{i}_b"]) for i in (1, 2)]
        delta = layer.alpha / 2 * sides[0] * sides[1]
    else:
        assert isinstance(layer, LoKrLayer)
        w2 = held["w2"] if "w2" in held else layer.alpha / 2 * held["w2_a"] @ held["w2_b"]
        w2 = w2.flatten(1)
        delta = torch.einsum("ij,kl->ikjl", held["w1"], w2).reshape(flat.shape)
    if layer.magnitude is None:
        return delta.reshape(w.shape)
    v, m = (flat + delta).reshape(w.shape), held["magnitude"]
    over = [axis for axis in range(w.dim()) if m.shape[axis] == 1]
    return m * v / v.square().sum(over, keepdim=True).sqrt() - w


def plain(path: Path, layer: LowRank) -> LowRank:
    """The same layer as a file of plain ones has it."""
    query = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    parts = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"}
    stem = f"lora_{query.replace('.', '_')}"
    tensors = {f"{stem}{parts[name]}": value for name, value in layer.tensors().items()}
    write_safetensors(path, {**tensors, f"{stem}.alpha": torch.tensor(layer.alpha)}, {})
    return read_layers(path).layers[query]


def run(w: Tensor, dtype: str, terms: Sequence[Term], **set_to: bool) -> tuple[Tensor, Any]:
    """The merged weight, and the tally."""
    new = w.to(DTYPES[dtype]).clone()
    raw = new.reshape(-1).view(torch.uint8).numpy()
    return new, merged(raw, dtype, tuple(w.shape), [(weight, stored(layer)) for weight, layer in terms], **set_to)


def off_by(found: Tensor, wanted: Tensor, dtype: str) -> float:
    """The largest difference in units in the last place of what was wanted; 1/2 is correctly rounded."""
    unit = torch.from_numpy(spacing(wanted.numpy(), dtype))
    return float(((found.double() - wanted).abs() / unit).max())


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("kind", all_kinds())
def test_every_kind_is_added_and_rounded_once(tmp_path: Path, kind: str, dtype: str) -> None:
    shape, layer = all_kinds()[kind]
    w = random_of(1)(*shape).to(DTYPES[dtype])
    wanted = w.double() + 0.7 * reference(w, layer)
    taken = plain(tmp_path / "a.safetensors", layer) if kind.startswith("LoRA") else layer
    exact, _ = run(w, dtype, [(0.7, taken)], exact=True)
    if dtype in ("F16", "BF16", "F32"):  # half a unit is the correctly rounded value, or the other of two as near
        assert off_by(exact, wanted, dtype) <= 0.5 + 1e-6
    found, tally = run(w, dtype, [(0.7, taken)])
    if dtype in ("F16", "BF16"):  # in float32 the sum is off by 1e-6 of it, which is little of their units
        assert off_by(found, wanted, dtype) <= (0.52 if dtype == "F16" else 0.505)
    else:
        assert torch.allclose(found.double(), wanted, rtol=1e-5 if dtype == "F32" else 1e-12, atol=1e-6)
    change = wanted - w.double()
    assert (tally.layers, tally.elements) == (1, w.numel())
    assert tally.ratio == pytest.approx(float(change.norm() / w.double().norm()), rel=1e-4)
    assert tally.unchanged == int((found == w).sum())


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_8_bit_bases(dtype: str) -> None:
    shape, layer = all_kinds()["LoHa"]
    w = random_of(1)(*shape).to(DTYPES[dtype])
    found, _ = run(w, dtype, [(1.0, layer)])
    assert torch.equal(found.float(), (w.float() + layer.change(w.float())).to(DTYPES[dtype]).float())


@pytest.mark.parametrize("kind", all_kinds())
@pytest.mark.parametrize("exact", [False, True])
def test_numpy_adds_what_torch_does(kind: str, exact: bool) -> None:
    shape, layer = all_kinds()[kind]
    w = random_of(1)(*shape)
    wide = torch.float64 if exact else torch.float32
    found, _ = run(w, "F32", [(0.5, layer)], exact=exact)
    wanted = (w.to(wide) + 0.5 * layer.change(w.to(wide))).float()
    assert torch.allclose(found, wanted, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-5)


def test_several_are_rounded_once(tmp_path: Path) -> None:
    rand, dtype = random_of(3), "BF16"
    w = rand(40, 50).to(DTYPES[dtype])
    some = [lora(rand, 40, 50) for _ in range(4)]
    weights = (0.01, -0.02, 1.5, 0.3)
    wanted = w.double() + sum(weight * reference(w, one) for weight, one in zip(weights, some, strict=True))
    terms = [
        (a, plain(tmp_path / f"{n}.safetensors", one)) for n, (a, one) in enumerate(zip(weights, some, strict=True))
    ]
    found, _ = run(w, dtype, terms)
    assert off_by(found, wanted, dtype) <= 0.505
    one_by_one = w
    for term in terms:
        one_by_one, _ = run(one_by_one, dtype, [term])
    assert off_by(one_by_one, wanted, dtype) > 0.6


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_unmerged_is_as_near_as_told(dtype: str) -> None:
    rand = random_of(7)
    w = rand(80, 90).to(DTYPES[dtype])
    w[0, :4] = torch.tensor([0.0, 1.0, 2.0**-14, -1.0])
    layer = lora(rand, 80, 90)
    changed, _ = run(w, dtype, [(2.0, layer)])
    back, tally = run(changed, dtype, [(-2.0, layer)], unmerge=True)
    differs = back != w
    assert 0 < int(differs.sum()) <= tally.doubtful < w.numel() * (1 if dtype == "F32" else 0.9)
    off = float((back.double() - w.double()).square().sum())
    assert off <= tally.bound
    assert tally.expected / 4 < off < 4 * tally.expected


def test_what_a_small_change_leaves_is_told(tmp_path: Path) -> None:
    rand = random_of(2)
    w = rand(30, 30).bfloat16()
    small = LoRALayer(rand(4, 30), 1e-4 * rand(30, 4), 4.0)
    found, tally = run(w, "BF16", [(1.0, plain(tmp_path / "a.safetensors", small))])
    assert tally.unchanged == int((found == w).sum()) > 400


def test_what_is_not_finite_is_told() -> None:
    w, layer = torch.ones(6, 8), LoRALayer(torch.ones(1, 8), torch.ones(6, 1), 1.0)
    for values, weight, told in (
        (w, 7e4, "would get values beyond 65504, the most its dtype holds; give a smaller weight"),
        (w * torch.tensor([1] * 7 + [torch.nan]), 1.0, "values that are not finite; the base is damaged"),
        (w * torch.inf, 1.0, "values that are not finite; the base is damaged"),
    ):
        raw = values.half().view(torch.uint8).reshape(-1).numpy().copy()
        with pytest.raises(UserError, match=rf"base: 'key' .*{told}"):
            checked(raw, "F16", (6, 8), [(weight, stored(layer))], "base: 'key'")
    raw = (w * 6e4).half().view(torch.uint8).reshape(-1).numpy().copy()
    assert checked(raw, "F16", (6, 8), [(5e3, stored(layer))], "base").beyond == 0
    assert widened(raw, "F16").max() == 64992  # the norms alone would not tell


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F16", "F32", "F64"])
def test_turned(dtype: str) -> None:
    w = torch.arange(12.0).reshape(3, 4).to(DTYPES[dtype])
    found = turned(w.view(torch.uint8).reshape(-1).numpy(), (3, 4))
    assert torch.equal(torch.from_numpy(found).view(w.dtype).reshape(4, 3).float(), w.T.float())
    assert FLOATS[dtype].eps < 1


def test_buffers_are_few_and_go_round() -> None:
    buffers = Buffers(100)
    first, second = buffers.take(60), buffers.take(40)
    waited: list[int] = []
    thread = threading.Thread(target=lambda: waited.append(len(buffers.take(30))), daemon=True)
    thread.start()
    thread.join(0.05)
    assert not waited  # there is no more
    buffers.give(second)
    thread.join(5)
    assert waited == [40]  # the one that came back
    buffers.give(first)
    assert buffers.take(50) is first


def test_one_buffer_may_be_larger_than_all() -> None:
    buffers = Buffers(100)
    large = buffers.take(500)
    assert len(large) == 500
    buffers.give(large)
    assert buffers.take(400) is large
