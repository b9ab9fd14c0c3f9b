"""Drawing is diffusers' pipeline, number by number, and a seed is an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from loratune.cli.verbs.sample import sample
from loratune.errors import UserError
from loratune.families.load import load_model
from loratune.families.model import Model
from loratune.families.pixels import PixelDDPM
from loratune.families.sampling import make_scheduler, sample_images, sample_latents
from loratune.families.sd import StableDiffusion

SAMPLERS = StableDiffusion.samplers

PROMPTS = ["a red disc", "a blue ring", ""]


@pytest.fixture(scope="module")
def family(tiny_base: Path) -> Model:
    return load_model(str(tiny_base)).eval()


def noise(seed: int) -> Tensor:
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.5])
@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_is_the_pipelines(family: Model, tiny_base: Path, guidance_scale: float, steps: int) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)  # type: ignore[no-untyped-call]
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    seeds = [3, 4, 5]
    wanted = pipeline(
        PROMPTS,
        height=16,
        width=16,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        latents=torch.stack([noise(seed) for seed in seeds]),
        output_type="pt",
    ).images
    found = sample_images(family, PROMPTS, seeds, 16, 16, steps, guidance_scale, "ddim")
    assert (found + 1).div(2).sub(wanted).abs().max() < 1e-4
    assert float(wanted.std()) > 1e-3


def test_the_first_step_is_at_pure_noise(family: Model) -> None:
    # With zero terminal SNR and trailing steps, x_T is noise and nothing but noise, at t = T - 1.
    scheduler = make_scheduler(family, "ddim")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    assert scheduler.init_noise_sigma == 1
    assert scheduler.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler-a", "dpm++"])
def test_a_seed_is_a_image_in_any_batch(family: Model, sampler: str) -> None:
    together = sample_images(family, PROMPTS, [7, 8, 9], 16, 16, 4, 3.0, sampler)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (7, 8, 9), strict=True)):
        alone = sample_images(family, [prompt], [seed], 16, 16, 4, 3.0, sampler)
        assert (alone[0] - together[row]).abs().max() < 1e-4
    others = sample_images(family, ["a green star", PROMPTS[1]], [1, 8], 16, 16, 4, 3.0, sampler)
    assert (others[1] - together[1]).abs().max() < 1e-4
    assert (together[0] - sample_images(family, PROMPTS[:1], [8], 16, 16, 4, 3.0, sampler)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_and_always_the_same(family: Model, sampler: str) -> None:
    torch.manual_seed(1)
    one = sample_images(family, PROMPTS[:2], [0, 1], 16, 16, 5, 4.0, sampler)
    assert one.shape == (2, 3, 16, 16)
    assert torch.isfinite(one).all()
    assert one.abs().max() <= 1
    torch.manual_seed(2)
    assert torch.equal(one, sample_images(family, PROMPTS[:2], [0, 1], 16, 16, 5, 4.0, sampler))
    made = make_scheduler(family, sampler)
    assert type(made).__name__ == SAMPLERS[sampler]
    assert made.config.prediction_type == "v_prediction"
    assert made.config.beta_end == 0.012


def test_deterministic_samplers_agree_in_the_limit(family: Model) -> None:
    # DDIM, Euler and the solvers follow one ODE: with many steps they end close together.
    drawn = {name: sample_images(family, ["a disc"], [0], 16, 16, 80, 1.0, name) for name in ("ddim", "dpm++", "unipc")}
    for name in ("dpm++", "unipc"):
        assert (drawn[name] - drawn["ddim"]).abs().mean() < 0.03


def test_an_unknown_sampler_lists_the_known(family: Model) -> None:
    with pytest.raises(UserError, match=r"sampler 'dimm' is not known for Stable Diffusion 1\.x; there is ddim, ddpm"):
        sample_images(family, ["x"], [0], 16, 16, 2, sampler="dimm")


def test_a_size_that_cannot_be(family: Model) -> None:
    with pytest.raises(UserError, match="size 15: the VAE needs a multiple of 2"):
        sample_images(family, ["x"], [0], 15, 15, 2)


def test_each_step_is_told(family: Model) -> None:
    told: list[tuple[int, tuple[int, ...]]] = []
    sample_images(family, ["x", "y"], [0, 1], 16, 16, 3, on_step=lambda done, x: told.append((done, tuple(x.shape))))
    assert told == [(number, (2, 4, 8, 8)) for number in (1, 2, 3)]


def test_guidance_of_1_is_no_guidance_and_asks_once(family: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    denoise = family.denoise
    monkeypatch.setattr(family, "denoise", lambda x, t, told: asked.append(len(x)) or denoise(x, t, told))
    plain = sample_images(family, ["a disc"], [0], 16, 16, 2, 1.0)
    assert asked == [1, 1]
    near = sample_images(family, ["a disc"], [0], 16, 16, 2, 1.0 + 1e-6)
    assert asked[2:] == [2, 2]
    assert (plain - near).abs().max() < 1e-4


def test_a_family_without_text_draws_too() -> None:
    torch.manual_seed(0)
    pixels = PixelDDPM(8, (16, 16), attention_from=2, steps=20).build().eval()
    drawn = sample_images(pixels, ["", ""], [0, 1], 8, 8, 4, 4.0, "ddpm")
    assert drawn.shape == (2, 3, 8, 8)
    assert torch.isfinite(drawn).all()


def drawn_files(out: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {path.name[4:]: np.asarray(Image.open(path)) for path in out.glob("0*.png")}


def test_the_verb_draws_a_image_whatever_is_listed_beside_it(tiny_base: Path, tmp_path: Path) -> None:
    def run(name: str, prompts: list[str], count: int, seed: int, batch_size: int = 1) -> dict[str, Any]:
        out = tmp_path / name
        settings: dict[str, Any] = {"steps": 3, "sampler": "ddim", "seed": seed, "count": count, "device": "cpu"}
        sample(str(tiny_base), prompt=prompts, out=out, batch_size=batch_size, **settings)
        assert (out / "grid.png").is_file()
        return drawn_files(out)

    alone = run("alone", ["a red disc"], 1, 6)
    assert list(alone) == ["a-red-disc-6.png"]
    among = run("among", ["a blue ring", "a red disc", ""], 2, 5)
    assert len(among) == 6
    assert np.array_equal(alone["a-red-disc-6.png"], among["a-red-disc-6.png"])
    assert not np.array_equal(alone["a-red-disc-6.png"], among["a-red-disc-5.png"])
    batched = run("batched", ["a blue ring", "a red disc", ""], 2, 5, 4)
    assert batched.keys() == among.keys()
    for name, image in batched.items():
        assert image.shape == (16, 16, 3)
        assert np.abs(image.astype(int) - among[name]).max() <= 1


@pytest.mark.parametrize("key", ["steps", "count", "batch_size"])
def test_the_verb_refuses_less_than_one(tiny_base: Path, tmp_path: Path, key: str) -> None:
    values = {"steps": 1, "count": 1, "batch_size": 1} | {key: 0}
    with pytest.raises(UserError, match=f"--{key.replace('_', '-')} is 0; give 1 or more"):
        sample(str(tiny_base), [], ["x"], None, tmp_path / "out", guidance_scale=1.0, sampler="ddim", seed=0, size=None,
               device="cpu", **values)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_estimates_of_the_image_end_in_the_image(family: Model) -> None:
    states: list[Tensor] = []
    estimates: list[Tensor] = []
    end = sample_latents(
        family,
        ["x"],
        [0],
        16,
        16,
        4,
        on_step=lambda _, x: states.append(x),
        on_estimate=lambda _, x: estimates.append(x),
    )
    assert len(states) == len(estimates) == 4
    assert torch.equal(states[-1], end)
    assert torch.allclose(estimates[-1], end, atol=1e-5)  # the last step goes to t = 0
    assert not torch.allclose(estimates[0], end, atol=1e-3)
    assert torch.equal(sample_images(family, ["x"], [0], 16, 16, 4), family.decode(end).clamp(-1, 1))
