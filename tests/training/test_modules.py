"""The modules that train from scratch, and what they share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loratune.cli.main import main
from loratune.diffusion.process import diffuse, target
from loratune.families.load import load_model
from loratune.families.pixels import PixelDDPM
from loratune.families.sd import NewStableDiffusion
from loratune.formats.images import normalise
from loratune.training.autoencoder import gaussian_kl, laplacian_pyramid_loss
from loratune.training.contrastive import ContrastiveModule, contrastive_loss
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.ema import EMA
from loratune.training.objectives import Objective
from loratune.training.randomness import generator
from loratune.training.schedules import LRSchedule

PIXELS = """\
trainer:
  {{default_root_dir: {out}, max_steps: {steps}, accelerator: cpu, precision: 32-true, enable_progress_bar: false}}
model:
  class_path: {model}
  init_args: {init}
data: {{path: {data}, resolution: 16, batch_size: 4, validation_percent: 25}}
samples: {{every_n_steps: 0}}
"""


def fit(tmp_path: Path, data: Path, model: str, init: str, name: str = "run", steps: int = 4, *more: str) -> Path:
    """Train a module from scratch by recipe; returns the run's folder."""
    recipe, out = tmp_path / "scratch.yaml", tmp_path / name
    recipe.write_text(PIXELS.format(out=out, steps=steps, model=model, init=init, data=data))
    assert main(["fit", "-c", str(recipe), *more]) == 0
    return out


def pixel_batch(count: int = 3) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=random, dtype=torch.uint8)
    return {"name": [str(i) for i in range(count)], "caption": [""] * count, "pixels": pixels}


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_loss_is_algorithm_1_line_5(prediction: Any) -> None:
    torch.manual_seed(0)
    family = PixelDDPM(size=8, channels=(16, 16), attention_from=1, prediction=prediction)
    module, batch, t = DiffusionModule(architecture=family), pixel_batch(), torch.tensor([0, 400, 999])
    losses = module.losses(batch, t, generator("cpu", "place"), Objective())
    random = generator("cpu", "place")
    torch.randn((3, 3, 8, 8), generator=random)  # the posterior's noise, which pixels do not use
    noise, x_0 = torch.randn((3, 3, 8, 8), generator=random), normalise(batch["pixels"])
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    a, b = bars.sqrt().float(), (1 - bars).sqrt().float()
    output = module.model.network(diffuse(x_0, noise, a, b), t).sample
    wanted = (target(prediction, x_0, noise, a, b) - output).square().mean((1, 2, 3))
    assert torch.allclose(losses, wanted, atol=1e-6)
    if prediction == "eps":
        assert torch.allclose(losses, (noise - output).square().mean((1, 2, 3)), atol=1e-6)


def test_min_snr_weighs_the_loss() -> None:
    torch.manual_seed(0)
    module = DiffusionModule(architecture=PixelDDPM(size=8, channels=(16, 16), attention_from=1))
    batch, t = pixel_batch(), torch.tensor([5, 400, 999])
    plain = module.losses(batch, t, generator("cpu", 0), Objective())
    weighed = module.losses(batch, t, generator("cpu", 0), Objective(min_snr_gamma=5.0))
    bars = module.model.noise_schedule.a[t].square()
    snr = bars / (1 - bars)
    assert torch.allclose((weighed / plain).double(), torch.minimum(snr, torch.tensor(5.0)) / snr, rtol=1e-5)


def test_caption_dropout_replaces_captions_by_nothing(tiny_base: Path) -> None:
    module = DiffusionModule(str(tiny_base), trainable=("unet", "text_encoder"))
    family = module.model
    batch = {"name": ["a", "b"], "caption": ["a red disc", "a blue disc"]}
    batch |= {"mean": torch.zeros(2, 4, 8, 8), "logvar": torch.zeros(2, 4, 8, 8)}
    nothing = family.encode_prompts([""])["text"][0]
    both = module._condition(batch, torch.tensor([True, False]))["text"]
    assert torch.allclose(both[0], nothing, atol=1e-6)
    assert torch.allclose(both[1], family.encode_prompts(["a blue disc"])["text"][0], atol=1e-6)
    module = DiffusionModule(str(tiny_base))
    cached = batch | {"condition": family.encode_prompts(batch["caption"])}
    frozen = module._condition(cached, torch.tensor([True, False]))["text"]
    assert torch.allclose(frozen, both, atol=1e-6)
    torch.manual_seed(0)
    always = module.losses(cached, torch.tensor([500, 500]), generator("cpu", 0), Objective(caption_dropout=1.0))
    never = module.losses(cached, torch.tensor([500, 500]), generator("cpu", 0), Objective())
    assert not torch.allclose(always, never)


def test_full_fine_tuning_trains_the_unet_alone(tiny_base: Path) -> None:
    module = DiffusionModule(str(tiny_base))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in module.named_parameters() if name.startswith("model.unet.")}
    with pytest.raises(ValueError, match="unett"):
        DiffusionModule(str(tiny_base), trainable=("unett",))


def test_nonsense_pairs_are_refused(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match=r"caption_dropout is 1.5"):
        Objective(caption_dropout=1.5)
    with pytest.raises(ValueError, match="min_snr_gamma is -1"):
        Objective(min_snr_gamma=-1)
    with pytest.raises(ValueError, match="terminal"):
        DiffusionModule(architecture=PixelDDPM(size=8), objective=Objective(zero_terminal_snr=True))
    with pytest.raises(ValueError, match="base and architecture: give one"):
        DiffusionModule()


@pytest.mark.parametrize(
    ("kind", "init"),
    [
        (
            "DiffusionModule",
            "{architecture: {class_path: PixelDDPM, init_args: {size: 16, channels: [16, 16], attention_from: 1}}}",
        ),
        ("AutoencoderModule", "{channels: [16, 16]}"),
        ("ContrastiveModule", "{size: 16, patch: 8, width: 32, layers: 1}"),
    ],
    ids=["pixels", "vae", "text"],
)
def test_every_module_is_trained_and_resumed_to_the_bit(tmp_path: Path, images: Path, kind: str, init: str) -> None:
    whole = fit(tmp_path, images, kind, init)
    half = fit(tmp_path, images, kind, init, "half", 2)
    again = ["--ckpt_path", str(half / "checkpoints" / "last.ckpt")]
    fit(tmp_path, images, kind, init, "half", 4, *again)
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, half)]
    assert states[0]["global_step"] == states[1]["global_step"] == 4
    assert all(
        torch.equal(states[0]["state_dict"][key], states[1]["state_dict"][key]) for key in states[0]["state_dict"]
    )


def test_a_vae_is_trained_by_recipe_with_unit_latents(tmp_path: Path, images: Path) -> None:
    out = fit(tmp_path, images, "AutoencoderModule", "{channels: [16, 16]}")
    assert load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    from diffusers import AutoencoderKL
    from PIL import Image

    vae = AutoencoderKL.from_pretrained(out / "vae")
    files = sorted(images.glob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    with torch.no_grad():
        latents = vae.encode(normalise(pixels)).latent_dist.mean * vae.config["scaling_factor"]
    assert 0.7 < float(latents.std()) < 1.4


def test_a_conditional_model_is_trained_from_scratch_on_a_vae(tmp_path: Path, images: Path) -> None:
    vae = fit(tmp_path, images, "AutoencoderModule", "{channels: [16, 16]}", "vae") / "vae"
    base = f"{{vae: {vae}, channels: [16, 16], heads: [2, 2], text_width: 16, text_layers: 1, latent_size: 8}}"
    init = f"{{trainable: [unet, text_encoder], architecture: {{class_path: NewStableDiffusion, init_args: {base}}}}}"
    cache = ["--data.cache_dir", str(tmp_path / "cache"), "--trainer.callbacks+=EMA"]
    out = fit(tmp_path, images, "DiffusionModule", init, "ldm", 4, *cache)
    made = load_model(str(out / "base-4"))
    average = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["EMA"]["average"]
    weight = average["model.unet.conv_in.weight"].half().float()
    assert torch.equal(made.network.conv_in.weight, weight)
    assert made.prediction == "v"
    assert made.noise_schedule.ends_in_noise


def test_ema_is_its_formula_and_swaps_in_and_out() -> None:
    torch.manual_seed(0)
    module = L.LightningModule()
    module.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    ema, trainer = EMA(0.9), type("Stub", (), {"global_step": 0, "callbacks": []})()
    ema.on_fit_start(trainer, module)
    wanted, values = torch.zeros(3, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    for step, value in enumerate(values, 1):
        module.weight.data.copy_(value)
        trainer.global_step = step
        ema.on_train_batch_end(trainer, module)
        ema.on_train_batch_end(trainer, module)  # another batch of the same step counts once
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value
    assert torch.allclose(ema.average["weight"], wanted, atol=1e-12)
    with ema.applied(module):
        assert torch.allclose(module.weight, wanted)
        with ema.applied(module):
            assert torch.allclose(module.weight, wanted)
    assert torch.equal(module.weight, values[-1])
    other = EMA(0.9)
    other.load_state_dict(ema.state_dict())
    assert other.steps == 30
    assert torch.equal(other.average["weight"], ema.average["weight"])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_warm_up_and_end(name: Any) -> None:
    schedule = LRSchedule(name, warmup_steps=10)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] < factors[10] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(1.0 if name == "constant" else 0.0)
    assert factors[55] == pytest.approx({"constant": 1, "linear": 0.5, "cosine": (1 + math.cos(math.pi / 2)) / 2}[name])
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        LRSchedule(name, warmup_steps=-1)


def test_kl_equals_torch_distributions() -> None:
    mean, logvar = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0))
    assert torch.allclose(gaussian_kl(mean, logvar), wanted)


def test_the_detail_loss_sees_edges_and_not_brightness() -> None:
    edge = torch.zeros(1, 1, 16, 16)
    edge[..., 8:] = 1
    assert float(laplacian_pyramid_loss(edge, edge)) == 0
    assert float(laplacian_pyramid_loss(edge, edge + 0.3)) == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(edge, (2, 2, 2, 2), "replicate"), 5, 1)
    assert float(laplacian_pyramid_loss(edge, blurred)) > 0.01


def test_places_give_their_own_noise() -> None:
    draw = lambda *place: torch.randn(4, generator=generator("cpu", *place))  # noqa: E731
    assert torch.equal(draw(1, "train", 5), draw(1, "train", 5))
    assert not torch.equal(draw(1, "train", 5), draw(1, "train", 6))
    assert not torch.equal(draw(1, "train", 5), draw(2, "train", 5))


def test_the_contrastive_loss_is_transformers_own() -> None:
    torch.manual_seed(0)
    module = ContrastiveModule(size=16, width=32, layers=1).eval()
    tokens = module.tokenizer(["a", "red", "disc"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = module.clip(input_ids=tokens, pixel_values=torch.randn(3, 3, 16, 16), return_loss=True)
    made = contrastive_loss(wanted.image_embeds, wanted.text_embeds, module.clip.logit_scale.exp())
    assert torch.allclose(made, wanted.loss, atol=1e-6)


def test_a_text_encoder_is_trained_by_recipe_and_taken_over(tmp_path: Path, images: Path) -> None:
    out = fit(tmp_path, images, "ContrastiveModule", "{size: 16, width: 32, layers: 1}", "clip")
    vae = fit(tmp_path, images, "AutoencoderModule", "{channels: [16, 16]}", "vae") / "vae"
    family = NewStableDiffusion(vae, (16, 16), (2, 2), text_encoder=out / "text_encoder", text_width=32).build()
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained = next(value for key, value in state.items() if key.endswith("token_embedding.weight"))
    assert torch.equal(family.text_encoder.get_input_embeddings().weight, trained)
