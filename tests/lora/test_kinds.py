"""Every kind of adapter computes what its file will say, starts as the base, and goes on from a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratune.errors import UserError
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.inject import LoRA, adapted_layers, at_start, collect, factors, inject, parameter_groups, put
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lokr import LoKrLayer
from loratune.lora.kinds.lora import LoRALayer
from loratune.training.lora_module import LoRAModule
from loratune.training.schedules import LRSchedule, optimizer_and_schedule

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"type": "dora"},
    "loha": {"type": "loha"},
    "lokr": {"type": "lokr"},
    "lokr-whole": {"type": "lokr", "rank": 64},
    "rslora": {"rslora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "gaussian": {"init": "gaussian"},
}


class Pair(nn.Module):
    """A linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(12, 8), nn.Conv2d(6, 8, 3, padding=1)


def made(set_to: dict[str, Any], seed: int = 0) -> tuple[Pair, dict[str, Tensor], LoRA]:
    """Both layers adapted, and their W_0."""
    torch.manual_seed(seed)
    pair = Pair()
    weights = {name: getattr(pair, name).weight.detach().clone() for name in ("linear", "conv")}
    lora = LoRA(**{"rank": 4, "alpha": 6.0, "targets": "all", **set_to})
    inject(pair, lora, lora.pattern({}))
    return pair.eval(), weights, lora


def outputs(pair: nn.Module) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return [
            pair.linear(torch.randn(3, 12, generator=random)),
            pair.conv(torch.randn(2, 6, 5, 5, generator=random)),
        ]


@pytest.mark.parametrize("name", KINDS)
def test_at_the_start_it_is_the_base(name: str) -> None:
    torch.manual_seed(0)
    before = outputs(Pair())
    tolerance = 1e-4 if name in ("dora", "pissa", "olora") else 0.0
    targets = "linear" if name in ("pissa", "olora") else "all"
    for start, base in zip(outputs(made({**KINDS[name], "targets": targets})[0]), before, strict=True):
        torch.testing.assert_close(start, base, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", KINDS)
def test_the_file_says_what_the_layer_computes(name: str) -> None:
    set_to = KINDS[name] if name not in ("pissa", "olora") else {**KINDS[name], "targets": "linear"}
    pair, weights, lora = made(set_to)
    start = at_start({"unet": pair}) if lora.init in ("pissa", "olora") else {}
    with torch.no_grad():
        for layer in adapted_layers(pair).values():
            for value in factors(layer).values():
                value.add_(0.1 * torch.randn_like(value))
    found = collect({"unet": pair}, start)
    kind = {"loha": LoHaLayer, "lokr": LoKrLayer}.get(lora.type, LoRALayer)
    assert {type(layer) for layer in found.values()} == {kind}
    assert all((layer.magnitude is not None) == (name == "dora") for layer in found.values())
    plain = Pair()
    plain.load_state_dict(_base_state(pair, weights))
    with torch.no_grad():
        for full, layer in found.items():
            part = plain.get_submodule(full.removeprefix("unet."))
            part.weight += layer.change(part.weight)
    for computed, wanted in zip(outputs(pair), outputs(plain), strict=True):
        torch.testing.assert_close(computed, wanted, rtol=1e-4, atol=1e-4)


def _base_state(pair: Pair, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {f"{name}.weight": weight for name, weight in weights.items()}
    return state | {f"{name}.bias": getattr(pair, name).bias for name in weights}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_taken_from_w_0_is_taken_from_matrices(init: str) -> None:
    with pytest.raises(UserError, match=f"lora.init {init} is for linear layers; conv is a convolution"):
        made({"init": init})


def linear(init: str, rank: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_0, what is left of it in the layer, A and B."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(300, 40))
    whole = holder[0].weight.detach().clone()
    inject(holder, LoRA(rank=rank, targets=".*", init=init), ".*")  # type: ignore[arg-type]
    held: Any = holder[0]
    own = factors(held)
    return whole, held.base_layer.weight.detach(), own["down"].detach(), own["up"].detach()


def test_gaussian_draws_a_from_a_normal_of_deviation_one_over_the_rank() -> None:
    drawn, uniform = (linear(init)[2] for init in ("gaussian", "kaiming"))
    assert float(drawn.std()) == pytest.approx(1 / 4, rel=0.1)
    kurtosis = [float((one**4).mean() / (one**2).mean() ** 2) for one in (drawn, uniform)]
    assert kurtosis[0] == pytest.approx(3.0, abs=0.6)
    assert kurtosis[1] == pytest.approx(1.8, abs=0.2)


def test_pissa_takes_the_leading_singular_triplets() -> None:
    whole, left, a, b = linear("pissa")
    singular = torch.linalg.svdvals(whole)
    torch.testing.assert_close(torch.linalg.svdvals(b @ a)[:4], singular[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(left)[:36], singular[4:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a @ a.T, torch.diag(singular[:4]), rtol=1e-3, atol=1e-4)  # each takes the root


def test_olora_takes_the_leading_part_of_qr() -> None:
    whole, left, a, b = linear("olora")
    torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left, whole - b @ a, rtol=1e-4, atol=1e-5)
    q, r = torch.linalg.qr(whole)
    torch.testing.assert_close(b @ a, q[:, :4] @ r[:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_dropout_is_for_training_alone(kind: str) -> None:
    pair, _, _ = made({"type": kind, "dropout": 0.5})
    with torch.no_grad():
        for layer in adapted_layers(pair).values():
            for value in factors(layer).values():
                value.add_(0.1 * torch.randn_like(value))
    assert torch.equal(outputs(pair)[0], outputs(pair)[0])
    pair.train()
    assert len({float(outputs(pair)[0].sum()) for _ in range(5)}) > 1


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    layer = collect({"unet": made({"rslora": True})[0]})["unet.linear"]
    assert layer.scale == pytest.approx(6.0 / 4**0.5)


def test_ranks_and_alphas_by_pattern() -> None:
    found = collect({"unet": made({"rank_pattern": {"con.": 2}, "alpha_pattern": {"lin.*": 9.0}})[0]})
    assert {name: (layer.rank, layer.alpha) for name, layer in found.items()} == {
        "unet.linear": (4, 9.0),
        "unet.conv": (2, 6.0),
    }
    found = collect({"unet": made({"rank_pattern": {"con.": 2}, "alpha": None})[0]})
    assert {layer.scale for layer in found.values()} == {1.0}


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr"])
def test_training_goes_on_from_a_file(name: str) -> None:
    first, _, _ = made(KINDS[name])
    with torch.no_grad():
        for layer in adapted_layers(first).values():
            for value in factors(layer).values():
                value.add_(torch.randn_like(value))
    second, _, _ = made({**KINDS[name], "alpha": 3.0})
    put({"unet": second}, collect({"unet": first}), Path("a.safetensors"))
    for computed, wanted in zip(outputs(second), outputs(first), strict=True):
        torch.testing.assert_close(computed, wanted)
    assert collect({"unet": second}) == collect({"unet": first})


@pytest.mark.parametrize(
    ("kind", "format"), [("lora", "peft"), ("lora", "kohya"), ("dora", "kohya"), ("loha", "kohya"), ("lokr", "kohya")]
)
def test_a_run_goes_on_from_a_file_of_any_format(tiny_base: Path, tmp_path: Path, kind: Any, format: Any) -> None:
    set_to: Any = {"type": kind, "rank": 4, "text_encoder": True}
    first = LoRAModule(str(tiny_base), LoRA(**set_to))
    with torch.no_grad():
        for layer in adapted_layers(first.model).values():
            for value in factors(layer).values():
                value.add_(torch.randn_like(value))
    path = tmp_path / "before.safetensors"
    write_lora(path, LoRAFile(first.layers()), format)
    second = LoRAModule(str(tiny_base), LoRA(**set_to, init_from=path))
    assert second.layers().keys() == first.layers().keys()
    for name, layer in second.layers().items():
        for part, value in layer.tensors().items():
            torch.testing.assert_close(value, first.layers()[name].tensors()[part])
        assert layer.scale == pytest.approx(first.layers()[name].scale)


def test_what_does_not_fit_a_file_is_told() -> None:
    layers = collect({"unet": made({})[0]})
    for set_to, said in (
        ({"rank": 2}, "has rank 4; set lora.rank"),
        ({"type": "dora"}, "is a LoRA; set lora.type"),
        ({"type": "loha"}, "is a LoRA; set lora.type"),
        ({"targets": "linear"}, "unet.conv is not adapted here (1 such layers)"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            put({"unet": made(set_to)[0]}, layers, Path("a.safetensors"))


class _Run:
    estimated_stepping_batches = 10


class _Module:
    trainer = _Run()


def test_b_and_the_text_encoder_have_their_own_rates() -> None:
    unet, text = made({})[0], made({})[0]
    lora = LoRA(loraplus_lr_ratio=16.0, text_encoder=True, text_encoder_lr=3e-4)
    for module in (unet, text):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)
    groups = parameter_groups({"unet": unet, "text_encoder": text}, lora, ["text_encoder"])
    optimizer = optimizer_and_schedule(
        _Module(),  # type: ignore[arg-type]
        groups,
        lambda p: torch.optim.AdamW(p, lr=1e-3),  # type: ignore[arg-type]
        LRSchedule(),
    )["optimizer"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for module, lr in ((unet, 1e-3), (text, 3e-4)):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                wanted = lr * (16.0 if "lora_B" in name else 1.0)
                assert rates[id(parameter)] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("set_to", "said"),
    [
        ({"type": "loha", "rslora": True}, "rslora, init and loraplus_lr_ratio are of type lora and dora"),
        ({"type": "lokr", "loraplus_lr_ratio": 2.0}, "leave them out for lokr"),
        ({"type": "dora", "init": "pissa"}, "not with type dora"),
        ({"init": "olora", "init_from": Path("a.safetensors")}, "or init_from"),
        ({"text_encoder_lr": 5e-5}, "set it to true"),
        ({"loraplus_lr_ratio": 0.0}, "lora.loraplus_lr_ratio is 0.0"),
        ({"rank_pattern": {"x": 0}}, "lora.x is 0"),
        ({"alpha_pattern": {"(": 1.0}}, "lora.alpha_pattern '(' is no preset and no regular expression"),
    ],
)
def test_settings_that_contradict_are_refused(set_to: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        LoRA(**set_to)
