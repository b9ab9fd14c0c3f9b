"""Gaps, their standard error, drift, and a base that is the base."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.errors import UserError
from loratune.evaluation.paired import (
    Chunk,
    Evaluation,
    Gap,
    base_alone,
    check_weights,
    drift,
    gap,
    levels,
    outputs,
    rise,
    spread,
    weighted,
)
from loratune.families.load import load_model
from loratune.families.sampling import sample_images
from loratune.lora.inject import LoRA, adapted_layers
from loratune.lora.tokens import NewToken
from loratune.training.lora_module import LoRAModule

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "text": {"text_encoder": True},
    "dora": {"type": "dora"},
    "loha": {"type": "loha"},
    "pissa": {"init": "pissa"},
}


def trained(base: Path, **settings: Any) -> LoRAModule:
    """A LoRA as if it had been trained."""
    torch.manual_seed(1)
    module = LoRAModule(str(base), LoRA(rank=2, **settings)).eval()
    for parameter in module.trained_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def chunks() -> list[Chunk]:
    random = torch.Generator().manual_seed(5)
    batch = {"name": ["a", "b"], "caption": ["a red disc", "a blue ring"]}
    return [Chunk([0, 1], torch.randn(2, 4, 8, 8, generator=random), batch)]


@pytest.mark.parametrize("kind", ["lora", "text", "dora"])
def test_at_step_zero_the_gap_is_zero_exactly(tiny_base: Path, kind: str) -> None:
    module = LoRAModule(str(tiny_base), LoRA(rank=2, **KINDS[kind])).eval()
    with_it = outputs(module, chunks(), "x", 3, 0, keep=True)
    with base_alone(module):
        base = outputs(module, chunks(), "x", 3, 0, keep=True)
    if kind == "dora":  # it divides by the norm of W_0 and multiplies by it again
        assert torch.allclose(with_it.losses, base.losses, atol=1e-5)
        return
    assert torch.equal(with_it.losses, base.losses)
    assert gap(with_it.losses, base.losses)[:2] == (0.0, 0.0)
    assert drift(with_it.outputs, base.outputs) == 0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_base_alone_is_the_base_and_all_is_as_it_was_afterwards(tiny_base: Path, kind: str) -> None:
    module, base = trained(tiny_base, **KINDS[kind]), LoRAModule(str(tiny_base), LoRA(rank=2)).eval()
    held = {name: value.detach().clone() for name, value in module.named_parameters()}
    asked = {name: value.requires_grad for name, value in module.named_parameters()}
    before = outputs(module, chunks(), "x", 2, 0)
    with base_alone(module):
        alone = outputs(module, chunks(), "x", 2, 0)
    wanted = outputs(base, chunks(), "x", 2, 0)
    assert torch.allclose(alone.losses, wanted.losses, atol=1e-5)
    assert not torch.allclose(before.losses, wanted.losses, atol=1e-3)
    assert torch.equal(outputs(module, chunks(), "x", 2, 0).losses, before.losses)
    assert all(torch.equal(held[name], value) for name, value in module.named_parameters())
    assert asked == {name: value.requires_grad for name, value in module.named_parameters()}


def test_a_new_token_is_as_it_began_in_the_base(tiny_base: Path) -> None:
    module = LoRAModule(
        str(tiny_base), LoRA(targets="none"), tokens=NewToken("<thing>", initializer_token="disc")
    ).eval()
    with torch.no_grad():
        start = module.model.encode_prompts(["a <thing>"])["text"]
        module._rows[0].add_(1.0)
        assert not torch.allclose(module.model.encode_prompts(["a <thing>"])["text"], start)
        with base_alone(module):
            assert torch.equal(module.model.encode_prompts(["a <thing>"])["text"], start)


def test_the_noise_is_the_same_each_time_and_no_generator_moves(tiny_base: Path) -> None:
    module = trained(tiny_base)
    state = torch.get_rng_state()
    one = outputs(module, chunks(), "x", 2, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    assert torch.equal(outputs(module, chunks(), "x", 2, 0).losses, one.losses)
    assert not torch.equal(outputs(module, chunks(), "x", 2, 1).losses, one.losses)
    assert not torch.equal(outputs(module, chunks(), "y", 2, 0).losses, one.losses)


def test_the_standard_error_is_the_textbooks() -> None:
    random = torch.Generator().manual_seed(0)
    adapted, base = (torch.rand(7, 3, generator=random, dtype=torch.float64) for _ in range(2))
    found = gap(adapted, base)
    each = [
        statistics.fmean(a - b for a, b in zip(*rows, strict=True))
        for rows in zip(adapted.tolist(), base.tolist(), strict=True)
    ]
    assert found.mean == pytest.approx(statistics.fmean(each))
    assert found.error == pytest.approx(statistics.stdev(each) / math.sqrt(7))
    assert found.adapted - found.base == pytest.approx(found.mean)
    assert math.isnan(gap(adapted[:1], base[:1]).error)


def test_pairs_tell_what_single_losses_cannot() -> None:
    # A gain of 0.01 on each image, whose losses themselves are apart by 1.
    base = torch.linspace(1, 9, 9, dtype=torch.float64)[:, None]
    found = gap(base - 0.01 + 1e-4 * base.sin(), base)
    assert found.mean < -50 * found.error


def test_drift_is_the_relative_squared_difference() -> None:
    base = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    moved = [torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 4.0]])]
    assert drift(moved, base) == pytest.approx((1 + 4) / (9 + 16))
    assert drift(base, base) == 0


def test_a_rise_is_told_only_beyond_two_standard_errors() -> None:
    best = torch.zeros(4, 1, dtype=torch.float64)
    sure, unsure = torch.tensor([[1.0], [1.1], [0.9], [1.0]]), torch.tensor([[1.0], [-1.1], [0.9], [-0.2]])
    assert rise(sure.double(), best) is not None
    assert rise(unsure.double(), best) is None
    assert rise(-sure.double(), best) is None
    assert rise(sure[:1].double(), best[:1]) is None


def test_levels_and_choices_are_spread_evenly() -> None:
    assert levels(1000, 4) == [125, 375, 625, 875]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(100, 4) == [0, 25, 50, 75]


def test_what_is_no_number_is_not_logged() -> None:
    one = Evaluation(3, {"held_out": Gap(-0.1, math.nan, 0.4, 0.5)}, math.nan, {125: 0.2})
    assert one.metrics() == {"held_out/gap": -0.1, "held_out/loss": 0.4, "held_out/gap_t125": 0.2}


def test_a_weight_scales_b_a_and_zero_is_the_base(tiny_base: Path) -> None:
    module, base = trained(tiny_base), load_model(str(tiny_base)).eval()
    prompts, seeds = ["a red disc"], [0]

    def drawn(weight: float) -> torch.Tensor:
        with weighted(module, weight):
            return sample_images(module.model, prompts, seeds, 16, 16, 2)

    plain = sample_images(module.model, prompts, seeds, 16, 16, 2)
    assert torch.equal(drawn(0.0), sample_images(base, prompts, seeds, 16, 16, 2))
    assert torch.equal(drawn(1.0), plain)
    half = drawn(0.5)
    assert not torch.allclose(half, plain, atol=1e-3)
    assert not torch.allclose(half, drawn(0.0), atol=1e-3)
    for layer in adapted_layers(module.model).values():
        layer.lora_B["default"].weight.data.mul_(0.5)  # type: ignore[union-attr,operator]
    assert torch.allclose(sample_images(module.model, prompts, seeds, 16, 16, 2), half, atol=1e-6)


def test_weights_that_cannot_be_drawn_are_refused(tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"samples.lora_scales has 0.5: with lora.init pissa"):
        check_weights(LoRAModule(str(tiny_base), LoRA(rank=2, init="pissa")), (0, 0.5, 1))
    with pytest.raises(UserError, match="there is no LoRA to weigh"):
        check_weights(torch.nn.Linear(1, 1), (0.5,))
