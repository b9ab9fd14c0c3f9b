"""Every setting of the objective changes the loss as it says, and senseless ones are refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.diffusion import process
from loratune.families.load import load_model
from loratune.families.model import PREDICTION_KEY, ZERO_SNR_KEY
from loratune.families.pixels import PixelDDPM
from loratune.families.sampling import make_scheduler
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.load import load_with
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.lora_module import LoRAModule
from loratune.training.objectives import Objective, Timesteps, mask_of
from loratune.training.provenance import sampling_facts
from loratune.training.randomness import generator


@pytest.fixture(scope="module")
def module() -> DiffusionModule:
    torch.manual_seed(0)
    return DiffusionModule(architecture=PixelDDPM(size=16, channels=(16, 16), attention_from=1, prediction="v"))


def losses(module: DiffusionModule, objective: Objective, **more: Tensor) -> Tensor:
    pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=generator("cpu", 1), dtype=torch.uint8)
    batch: dict[str, Any] = {"pixels": pixels, "name": list("abcdef"), "caption": [""] * 6, **more}
    t = torch.tensor([0, 100, 300, 500, 800, 999])
    with torch.no_grad():
        return module.losses(batch, t, generator("cpu", 0), objective)


@pytest.mark.parametrize(
    "set_to",
    [
        {"min_snr_gamma": 5.0},
        {"debiased_estimation": True},
        {"huber_c": 0.1},
        {"huber_c": 0.1, "huber_schedule": "exponential"},
        {"huber_c": 0.1, "huber_schedule": "snr"},
        {"noise_offset": 0.1},
        {"pyramid_noise": 0.3},
        {"input_perturbation": 0.1},
    ],
)
def test_every_knob_does_something(module: DiffusionModule, set_to: dict[str, Any]) -> None:
    plain, turned = losses(module, Objective()), losses(module, Objective(**set_to))
    assert torch.isfinite(turned).all()
    assert not torch.allclose(plain, turned)
    if set_to.get("huber_schedule"):
        assert not torch.allclose(turned, losses(module, Objective(huber_c=0.1)))


def test_perturbed_inputs_keep_the_plain_target(module: DiffusionModule) -> None:
    given, inside = Objective(input_perturbation=0.1).noise((2, 3, 8, 8), generator("cpu", 0))
    plain, same = Objective().noise((2, 3, 8, 8), generator("cpu", 0))
    assert torch.equal(given, plain)
    assert plain is same
    assert not torch.equal(given, inside)


def test_a_mask_takes_the_loss_from_where_it_is_zero(module: DiffusionModule) -> None:
    whole = losses(module, Objective())
    assert torch.allclose(losses(module, Objective(), mask=torch.ones(6, 1, 16, 16)), whole, atol=1e-6)
    left, right = torch.zeros(6, 1, 16, 16), torch.zeros(6, 1, 16, 16)
    left[..., :8], right[..., 8:] = 1, 1
    halves = losses(module, Objective(), mask=left), losses(module, Objective(), mask=right)
    assert not torch.allclose(*halves)
    assert torch.allclose(sum(halves) / 2, whole, atol=1e-5)  # type: ignore[arg-type]


def test_the_held_out_loss_does_not_see_the_tricks(module: DiffusionModule) -> None:
    values = []
    for objective in (Objective(), Objective(noise_offset=0.5, input_perturbation=0.5, pyramid_noise=0.5)):
        module.objective, logged = objective, []
        module.log = lambda name, value, **_: logged.append(float(value))  # type: ignore[method-assign, misc, assignment] # noqa: B023
        pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=generator("cpu", 1), dtype=torch.uint8)
        module._trainer = None
        with torch.no_grad():
            module._held_out({"pixels": pixels, "name": ["a", "b"], "caption": ["", ""]}, 0, "val")
        values += logged
    assert values[0] == values[1]


def test_timesteps_follow_their_density() -> None:
    def drawn(**set_to: Any) -> Tensor:
        return Timesteps(**set_to).draw(20000, 1000, generator("cpu", 0)).float()

    plain = drawn()
    assert (plain.min(), plain.max()) == (0, 999)
    assert abs(float(plain.mean()) - 499.5) < 8  # 4 deviations of the mean of 20,000
    middle = drawn(distribution="logit_normal")
    assert float(middle.std()) < 0.8 * float(plain.std())
    assert float(drawn(distribution="logit_normal", mean=1.0).mean()) > float(middle.mean()) + 100
    assert float(drawn(shift=3.0).mean()) > float(plain.mean()) + 100
    part = drawn(min=0.2, max=0.6)
    assert (part.min(), part.max()) == (200, 599)
    shifted = drawn(min=0.2, max=0.6, shift=3.0)
    assert (shifted.min() >= 200) & (shifted.max() == 599)
    assert drawn(min=0.5, max=0.5001).unique().tolist() == [500]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Objective(debiased_estimation=True, min_snr_gamma=5.0),
            "debiased_estimation and min_snr_gamma both weigh",
        ),
        (lambda: Objective(huber_schedule="snr"), "huber_schedule is 'snr', but huber_c is null"),
        (lambda: Objective(huber_c=0.0), "huber_c is 0.0; give a number between 0 and 1"),
        (lambda: Objective(pyramid_noise=1.0), "pyramid_noise is 1.0"),
        (lambda: Objective(noise_offset=-0.1), "noise_offset is -0.1; give a number from 0 to 1"),
        (lambda: Objective(input_perturbation=2), "input_perturbation is 2"),
        (lambda: Objective(caption_dropout=1.5), "caption_dropout is 1.5"),
        (lambda: Timesteps(min=0.5, max=0.5), "min is 0.5, max 0.5"),
        (lambda: Timesteps(shift=0.0), "shift is 0.0"),
        (lambda: Timesteps(mean=1.0), "set distribution to logit_normal"),
        (lambda: Timesteps(shift=float("nan")), "shift is nan"),
        (lambda: Timesteps("logit_normal", mean=float("inf")), "mean inf; give numbers"),
        (lambda: Timesteps("logit_normal", std=float("inf")), "std inf"),
        (lambda: Objective(min_snr_gamma=float("nan")), "min_snr_gamma is nan"),
        (lambda: Objective(huber_c=float("nan")), "huber_c is nan"),
        (lambda: Objective(pyramid_noise=float("nan")), "pyramid_noise is nan"),
        (lambda: Objective(noise_offset=float("nan")), "noise_offset is nan"),
        (lambda: Objective(prediction="eps", zero_terminal_snr=True), "prediction 'eps' learns nothing where zero"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


# The base's prediction and its schedule.


def pixels(prediction: Any = "v") -> PixelDDPM:
    return PixelDDPM(size=16, channels=(16, 16), attention_from=1, prediction=prediction)


def test_zero_terminal_snr_rescales_the_schedule_for_the_loss_and_for_drawing() -> None:
    plain, module = pixels(), DiffusionModule(architecture=pixels(), objective=Objective(zero_terminal_snr=True))
    bars = module.model.noise_schedule.a.square()
    betas = process.rescale_zero_terminal_snr(process.linear_betas(1000))
    torch.testing.assert_close(bars, process.alpha_bars(betas).to(bars), rtol=1e-9, atol=1e-12)
    assert bars[-1] == 0 < plain.build().noise_schedule.a[-1]
    sampler = make_scheduler(module.model, "ddim")
    torch.testing.assert_close(sampler.alphas_cumprod, bars.float(), rtol=1e-5, atol=1e-6)
    sampler.set_timesteps(10)
    assert sampler.timesteps[0] == 999
    module.objective.prepare(module.model)
    assert torch.equal(module.model.noise_schedule.a.square(), bars)  # a schedule that ends in noise is left as it is


@pytest.mark.parametrize("set_to", [{"min_snr_gamma": 5.0}, {"debiased_estimation": True}])
def test_weights_are_of_the_rescaled_schedule(set_to: dict[str, Any]) -> None:
    module = DiffusionModule(architecture=pixels(), objective=Objective(zero_terminal_snr=True, **set_to))
    weighed = losses(module, module.objective)
    plain = losses(module, Objective())
    t = torch.tensor([0, 100, 300, 500, 800, 999])
    betas = process.rescale_zero_terminal_snr(process.linear_betas(1000))
    bars = process.alpha_bars(betas)[t]
    snr = bars / (1 - bars)
    wanted = (snr.sqrt() if "debiased_estimation" in set_to else snr.clamp(max=5.0)) / (snr + 1)
    torch.testing.assert_close((weighed / plain).double(), wanted, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weighed, losses(DiffusionModule(architecture=pixels()), module.objective))


def test_another_prediction_is_the_targets_and_the_samplers() -> None:
    torch.manual_seed(0)
    module = DiffusionModule(architecture=pixels("eps"), objective=Objective(prediction="v"))
    torch.manual_seed(0)
    same, kept = DiffusionModule(architecture=pixels("v")), DiffusionModule(architecture=pixels("eps"))
    same.model.load_state_dict(module.model.state_dict())
    kept.model.load_state_dict(module.model.state_dict())
    assert torch.equal(losses(module, Objective()), losses(same, Objective()))
    assert not torch.allclose(losses(module, Objective()), losses(kept, Objective()))
    assert make_scheduler(module.model, "ddim").config.prediction_type == "v_prediction"


def test_a_schedule_that_ends_in_noise_is_refused_for_eps() -> None:
    with pytest.raises(ValueError, match="prediction 'eps' learns nothing where zero_terminal_snr"):
        DiffusionModule(architecture=pixels("eps"), objective=Objective(zero_terminal_snr=True))
    DiffusionModule(architecture=pixels("eps"), objective=Objective(zero_terminal_snr=True, prediction="v"))


def test_what_makes_no_sense_for_a_base_is_refused_before_a_weight_is_read(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loratune.training.diffusion_module as read

    monkeypatch.setattr(read, "load_model", lambda *_, **__: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match="prediction 'eps' learns nothing"):
        LoRAModule(str(tiny_base), objective=Objective(prediction="eps"))  # its schedule ends in noise


def test_a_file_says_how_it_is_drawn_and_drawing_follows(tiny_sdxl: Path, tmp_path: Path) -> None:
    assert load_model(str(tiny_sdxl)).prediction == "eps"
    module = LoRAModule(str(tiny_sdxl), objective=Objective(prediction="v", zero_terminal_snr=True))
    told = sampling_facts(module.objective)
    assert told == {PREDICTION_KEY: "v", ZERO_SNR_KEY: "true", "ss_zero_terminal_snr": "True"}
    name = next(iter(module.layers()))
    layer = module.layers()[name]
    assert isinstance(layer, LoRALayer)
    write_lora(tmp_path / "x.safetensors", LoRAFile({name: layer}, told))
    drawn = load_with(str(tiny_sdxl), [str(tmp_path / "x.safetensors")], "cpu")
    assert drawn.prediction == "v"
    assert torch.equal(drawn.noise_schedule.a, module.model.noise_schedule.a)
    assert drawn.scheduler_config == module.model.scheduler_config
    module.objective = Objective()
    assert sampling_facts(module.objective) == {}


# What a step does with it.


def test_training_draws_its_steps_from_the_density(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = DiffusionModule(architecture=pixels(), objective=Objective(timesteps=Timesteps(min=0.9)))
    drawn: list[Tensor] = []

    def kept(batch: Any, t: Tensor, *_: Any) -> Tensor:
        drawn.append(t)
        return torch.zeros(len(t))

    monkeypatch.setattr(module, "losses", kept)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "_generator", lambda *_: generator("cpu", 0))
    module._trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=1)
    module.training_step({"name": ["x"] * 200}, 0)
    assert drawn[0].min() >= 900
    assert len(drawn[0].unique()) > 50


def test_a_mask_is_brought_to_the_latents_size() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :8, :12] = 1
    made = mask_of({"mask": mask}, torch.zeros(1, 4, 4, 4))
    assert made is not None
    assert made[0, 0].tolist() == [[1.0, 0.5, 0.0, 0.0]] + [[0.0] * 4] * 3
    assert mask_of({}, torch.zeros(1, 4, 4, 4)) is None
