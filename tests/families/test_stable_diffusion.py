"""A base as a folder, as a file and in memory is one and the same, for us and for diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from loratune.cli.verbs.merge import merge
from loratune.diffusion.process import snr
from loratune.errors import UserError
from loratune.families.conditions import join_conditions, repeat_condition
from loratune.families.load import load_model
from loratune.families.locate import builtin_names, locate
from loratune.families.model import Model
from loratune.families.save import configs_of, save_diffusers_folder, weights_of
from loratune.families.sd import NewStableDiffusion
from loratune.formats.files import write_safetensors
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.kinds.lora import LoRALayer

CAPTIONS = ["a red disc", "", "two words, " * 60]


@pytest.fixture(scope="module")
def family(tiny_base: Path) -> Model:
    return load_model(str(tiny_base)).eval()


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path) -> Any:
    made = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)  # type: ignore[no-untyped-call]
    made.set_progress_bar_config(disable=True)
    return made


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_weights(one: Model, other: Model, dtype: torch.dtype = torch.float32) -> bool:
    left, right = weights_of(one, dtype), weights_of(other, dtype)
    return left.keys() == right.keys() and all(
        left[part].keys() == right[part].keys() and all(torch.equal(left[part][k], right[part][k]) for k in left[part])
        for part in left
    )


def zero_lora(path: Path, width: int = 16) -> Path:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    write_lora(path, LoRAFile({name: LoRALayer(random(2, width), torch.zeros(16, 2), 2.0)}))
    return path


def refused(name: str | Path) -> str:
    with pytest.raises(UserError) as error:
        locate(str(name))
    return str(error.value)


# Round trips.


def test_a_folder_is_written_and_read_without_loss(family: Model, tmp_path: Path) -> None:
    save_diffusers_folder(family, tmp_path / "copy", torch.float32)
    again = load_model(str(tmp_path / "copy"))
    assert same_weights(family, again)
    assert configs_of(family) == configs_of(again)
    assert again.prediction == family.prediction == "v"
    assert torch.equal(again.noise_schedule.b, family.noise_schedule.b)


def test_a_folder_of_halves_is_the_weights_rounded_once(family: Model, tmp_path: Path) -> None:
    save_diffusers_folder(family, tmp_path / "half")
    again = load_model(str(tmp_path / "half"))
    assert same_weights(family, again, torch.float16)
    assert next(again.network.parameters()).dtype == torch.float32
    assert next(family.network.parameters()).dtype == torch.float32
    halves = load_model(str(tmp_path / "half"), torch.float16)
    assert {value.dtype for value in halves.parameters()} == {torch.float16}


def test_a_folder_that_is_there_is_not_overwritten(family: Model, tiny_base: Path) -> None:
    with pytest.raises(UserError, match="not an empty folder"):
        save_diffusers_folder(family, tiny_base)


def test_a_single_file_is_the_same_base(family: Model, tiny_base: Path, tmp_path: Path) -> None:
    lora, file, folder = zero_lora(tmp_path / "zero.safetensors"), tmp_path / "one.safetensors", tmp_path / "back"
    merge(str(tiny_base), [str(lora)], file)
    again = load_model(str(file))
    assert same_weights(family, again)
    assert again.prediction == "v"
    assert torch.equal(again.noise_schedule.b, family.noise_schedule.b)
    merge(str(file), [str(lora)], folder)
    assert same_weights(family, load_model(str(folder)))


def test_weights_that_do_not_fit_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    file = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    write_safetensors(file, {"encoder.conv_in.weight": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="the weights of its vae do not fit its configuration"):
        load_model(str(tmp_path / "base"))
    (tmp_path / "base" / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match=r"unet/config\.json: missing; the base is not complete"):
        load_model(str(tmp_path / "base"))


# diffusers.


@torch.no_grad()
def test_diffusers_loads_the_folder_and_computes_the_same(family: Model, pipeline: Any) -> None:
    told, nothing = pipeline.encode_prompt(CAPTIONS, "cpu", 1, True)
    assert torch.equal(family.encode_prompts(CAPTIONS)["text"], told)
    assert torch.equal(family.encode_prompts([""] * 3)["text"], nothing)
    x, t = random(3, 4, 8, 8), torch.tensor([0, 500, 999])
    network = pipeline.unet.to(memory_format=torch.channels_last)  # as ours, so that sums have one order
    assert torch.equal(family.denoise(x, t, {"text": told}), network(x, t, told).sample)
    pixels = random(2, 3, 16, 16).clamp(-1, 1)
    posterior, encoded = pipeline.vae.encode(pixels).latent_dist, family.encode_images(pixels)
    assert torch.equal(encoded["mean"], posterior.mean)
    assert torch.equal(encoded["logvar"], posterior.logvar)
    scale = pipeline.vae.config.scaling_factor
    assert torch.equal(family.decode(x), pipeline.vae.decode(x / scale).sample)


def test_the_noise_schedule_is_the_schedulers(family: Model, pipeline: Any) -> None:
    assert family.noise_schedule.a.dtype == torch.float64
    assert torch.allclose(family.noise_schedule.a.square().float(), pipeline.scheduler.alphas_cumprod, atol=1e-6)
    assert family.noise_schedule.a[-1] == 0
    a, b = family.noise_schedule.at(torch.tensor([0, 300, 999]), torch.zeros(3, 4, 8, 8, dtype=torch.float64))
    assert a.shape == (3, 1, 1, 1)
    assert torch.allclose(a**2 + b**2, torch.ones_like(a), atol=1e-12)
    assert snr(a, b).flatten()[-1] == 0
    assert family.noise_schedule.at(torch.tensor([5]), torch.zeros(1, 1))[0].dtype == torch.float32


# Images and text as what the network takes.


@pytest.mark.parametrize("shift", [None, 0.3])
def test_start_draws_from_the_posterior(family: Model, monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    monkeypatch.setattr(family.vae, "_internal_dict", {**family.vae.config, "shift_factor": shift})
    batch = {"mean": random(2, 4, 8, 8), "logvar": random(2, 4, 8, 8, seed=1)}
    kept = {key: value.clone() for key, value in batch.items()}
    noise, scale = random(2, 4, 8, 8, seed=2), family.vae.config["scaling_factor"]
    deviation = torch.sqrt(torch.exp(batch["logvar"]))
    wanted = scale * (batch["mean"] + deviation * noise - (shift or 0))
    assert torch.allclose(family.x_0(batch, noise), wanted, atol=1e-6)
    assert torch.allclose(family.x_0(batch, None), scale * (batch["mean"] - (shift or 0)), atol=1e-6)
    assert torch.equal(family.x_0(batch, None), family.x_0(batch, torch.zeros_like(noise)))
    assert all(torch.equal(batch[key], kept[key]) for key in kept)
    latents: list[Tensor] = []
    monkeypatch.setattr(family.vae, "decode", lambda x: latents.append(x) or type("D", (), {"sample": x}))
    family.decode(family.x_0(batch, None))
    assert torch.allclose(latents[0], batch["mean"], atol=1e-6)  # decode undoes scale and shift


def test_latent_shape(family: Model) -> None:
    assert family.latent_shape(16, 16) == (4, 8, 8)
    assert family.latent_shape(10, 16) == (4, 5, 8)
    with pytest.raises(UserError, match="size 15: the VAE needs a multiple of 2"):
        family.latent_shape(16, 15)


def test_tokens_fill_the_window_and_long_captions_are_cut(family: Model) -> None:
    ids = family.family.read(family, CAPTIONS).ids
    begin, end = family.tokenizer.bos_token_id, family.tokenizer.eos_token_id
    assert ids.shape == (3, 77)
    assert set(ids[:, 0].tolist()) == {begin}
    assert ids[1, 1] == end
    assert ids[1, 2:].tolist() == [family.tokenizer.pad_token_id] * 75
    assert ids[2, -1] == end
    assert end not in ids[2, :-1]


@torch.no_grad()
def test_conditions_are_joined_and_repeated(family: Model) -> None:
    one, two = family.encode_prompts(["a disc"]), family.encode_prompts(["a ring"])
    joined = join_conditions([one, repeat_condition(two, 3)])
    assert joined["text"].shape[0] == 4
    assert torch.equal(joined["text"][0], one["text"][0])
    assert all(torch.equal(joined["text"][row], two["text"][0]) for row in (1, 2, 3))


# New bases.


def test_a_new_base_refuses_what_makes_no_sense(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"zero_terminal_snr: .*use prediction: v"):
        NewStableDiffusion(tiny_base / "vae", prediction="eps").build()
    with pytest.raises(UserError, match=r"nothing: no VAE here; train one with recipes/pretrain/vae\.yaml"):
        NewStableDiffusion(tmp_path / "nothing").build()


def test_a_prediction_type_that_is_not_known(family: Model) -> None:
    config = {**family.scheduler_config, "prediction_type": "flow"}
    with pytest.raises(UserError, match=r"here: prediction type 'flow'.*epsilon"):
        Model(family.family, family.components(), config, {"tokenizer": family.tokenizer}, "here")


# Finding bases.


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin", "pkl"])
@pytest.mark.parametrize("there", [True, False])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str, there: bool) -> None:
    path = tmp_path / f"base.{suffix}"
    if there:
        path.write_bytes(b"a pickle")
    assert "base." + suffix in refused(path)
    assert "pickle can run any code" in refused(path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", tmp_path / "x.safetensors", "nothing", "a/b/c", "x/y.safetensors"):
        assert f"base {name}: no such file or folder" in refused(name)
    assert "no model_index.json, so this is no diffusers folder" in refused(tmp_path)


def test_a_builtin_that_is_not_there_lists_those_that_are() -> None:
    told = refused("builtin:nothing")
    assert "builtin:nothing" in told
    assert all(name in told for name in builtin_names())
    assert "there is no such embedded base" in refused("builtin:../families")


def test_what_is_there_is_found(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(tiny_base)) == tiny_base
    file = zero_lora(tmp_path / "x.safetensors")
    assert locate(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/x.safetensors") == file
    with pytest.raises(UserError, match=r"x\.safetensors: a LoRA, not a base"):
        load_model(str(file))
