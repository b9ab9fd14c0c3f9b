"""SDXL does what diffusers' pipeline does: text, U-Net call, drawing, folders and LoRA files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from loratune.errors import UserError
from loratune.families.load import load_model
from loratune.families.locate import ASSETS
from loratune.families.model import Model
from loratune.families.sampling import sample_images
from loratune.families.save import save_diffusers_folder
from loratune.families.sdxl import StableDiffusionXL
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.inject import LoRA, adapted_layers, collect, inject
from loratune.training.lora_module import LoRAModule
from loratune.training.objectives import Objective

CAPTIONS = ["a red disc", "a very long caption " * 30]  # one is padded, one truncated


def text_config(width: int, projected: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projected,
        hidden_act=act,
    )


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL with random weights, written by diffusers; tokenizers as in Stability's folder."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "clip-tokenizer")
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(16, 16, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(24, 20, "gelu")),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        add_watermarker=False,
    )
    path = tmp_path_factory.mktemp("sdxl") / "tiny"
    pipe.save_pretrained(path)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        shutil.rmtree(path / name)
        shutil.copytree(ASSETS / "clip-tokenizer", path / name)
        config = json.loads((path / name / "tokenizer_config.json").read_text())
        (path / name / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": pad}))
    return path


def open_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(folder: Path) -> StableDiffusionXLPipeline:
    return open_pipeline(folder)


@pytest.fixture
def family(folder: Path) -> Model:
    found = load_model(str(folder))
    assert isinstance(found.family, StableDiffusionXL)
    return found.requires_grad_(False).eval()


def some_latents(count: int = 2, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def told_by(pipe: StableDiffusionXLPipeline, captions: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pipeline's text, nothing's text, pooled text, and nothing's pooled text."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = pipe.encode_prompt(captions)
    return found


@torch.no_grad()
def unet_of(pipe: StableDiffusionXLPipeline, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """The pipeline's U-Net as its __call__ calls it, at the size of the latents."""
    size = (x.shape[-2] * pipe.vae_scale_factor, x.shape[-1] * pipe.vae_scale_factor)
    ids = pipe._get_add_time_ids(size, (0, 0), size, text.dtype, pipe.text_encoder_2.config.projection_dim)
    added = {"text_embeds": pooled, "time_ids": ids.repeat(len(x), 1)}
    output: Tensor = pipe.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=added).sample
    return output


def test_text_is_encoded_as_by_the_pipeline(family: Model, pipe: StableDiffusionXLPipeline) -> None:
    text, no_text, pooled, no_pooled = told_by(pipe, CAPTIONS)
    told = family.encode_prompts(CAPTIONS)
    assert told.keys() == {"text", "pooled"}
    assert text.shape == (2, 77, 40)
    assert pooled.shape == (2, 20)
    assert torch.equal(told["text"], text)
    assert torch.equal(told["pooled"], pooled)
    nothing = family.encode_prompts(["", CAPTIONS[0]])
    assert torch.equal(nothing["text"], torch.stack([no_text[0], text[0]]))
    assert_close(nothing["pooled"], torch.stack([no_pooled[0], pooled[0]]))


def test_the_unet_is_called_as_by_the_pipeline(family: Model, pipe: StableDiffusionXLPipeline) -> None:
    text, _, pooled, _ = told_by(pipe, CAPTIONS)
    x, t = some_latents(width=12), torch.tensor([3, 900])
    told = family.encode_prompts(CAPTIONS)
    assert family.family.time_ids(family, x).tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    output = family.denoise(x, t, told)
    assert_close(output, unet_of(pipe, x, t, text, pooled), rtol=1e-5, atol=1e-5)
    for other in ({**told, "pooled": told["pooled"].flip(0)}, {**told, "text": told["text"].flip(0)}):
        assert (family.denoise(x, t, other) - output).abs().max() > 1e-4  # the check above sees both


@torch.no_grad()
def test_a_image_is_drawn_as_by_the_pipeline(family: Model, pipe: StableDiffusionXLPipeline) -> None:
    drawn = sample_images(family, [CAPTIONS[0]], [5], height=16, width=16, steps=3, guidance_scale=4.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    wanted = pipe(
        CAPTIONS[0], height=16, width=16, latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="pt"
    ).images
    assert_close((drawn + 1) / 2, wanted, rtol=1e-4, atol=1e-4)
    assert drawn.std() > 0.01


def test_a_lora_starts_as_the_base(folder: Path, family: Model) -> None:
    x, t, told = some_latents(), torch.tensor([3, 900]), family.encode_prompts(CAPTIONS)
    module = LoRAModule(str(folder), LoRA(rank=2, text_encoder=True)).eval()
    assert torch.equal(module.model.encode_prompts(CAPTIONS)["text"], told["text"])
    assert torch.equal(module.model.denoise(x, t, told), family.denoise(x, t, told))
    randomise(module)
    assert not torch.equal(module.model.encode_prompts(CAPTIONS)["text"], told["text"])
    assert not torch.equal(module.model.denoise(x, t, told), family.denoise(x, t, told))


def test_a_dropped_caption_trains_on_nothing(folder: Path) -> None:
    module = LoRAModule(str(folder), LoRA(rank=2))
    shape, t = some_latents(), torch.tensor([3, 900])
    batch = {"mean": shape, "logvar": torch.zeros_like(shape), "condition": module.model.encode_prompts(CAPTIONS)}
    nothing = {**batch, "condition": module.model.encode_prompts(["", ""])}
    kept, dropped, wanted = (
        module.losses(one, t, torch.Generator().manual_seed(0), Objective(caption_dropout=share))
        for one, share in ((batch, 0.0), (batch, 1.0), (nothing, 0.0))
    )
    assert torch.equal(dropped, wanted)
    assert not torch.equal(kept, wanted)
    dropped.sum().backward()
    assert any(parameter.grad is not None for parameter in module.trained_parameters())


def randomise(module: torch.nn.Module) -> None:
    """Give every B values, so that the adapter does something."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)


def test_the_pipeline_reads_a_lora_file(folder: Path, pipe: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    module = LoRAModule(str(folder), LoRA(rank=2, alpha=3, text_encoder=True)).eval()
    if not adapted_layers(module.model.text_encoder_2):
        inject(module.model.text_encoder_2, module.lora, StableDiffusionXL.text_targets)
    randomise(module)
    layers = collect(module.model.components())
    parts = {".".join(name.split(".")[:2]) for name in layers if not name.startswith("unet.")}
    assert parts == {"text_encoder.text_model", "text_encoder_2.text_model"}
    modules = {name for name, _ in pipe.unet.named_modules()}
    inside = {name.removeprefix("unet.") for name in layers if name.startswith("unet.")}
    assert inside
    assert inside <= modules
    write_lora(tmp_path / "lora.safetensors", LoRAFile(layers))
    x, t = some_latents(), torch.tensor([3, 900])
    before = unet_of(pipe, x, t, *told_by(pipe, CAPTIONS)[::2])
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    text, _, pooled, _ = told_by(pipe, CAPTIONS)
    with torch.no_grad():
        told = module.model.encode_prompts(CAPTIONS)
        output = module.model.denoise(x, t, told)
    assert_close(told["text"], text, rtol=1e-5, atol=1e-5)
    assert_close(told["pooled"], pooled, rtol=1e-5, atol=1e-5)
    read = unet_of(pipe, x, t, text, pooled)
    assert_close(output, read, rtol=1e-5, atol=1e-5)
    assert (read - before).abs().max() > 1e-2


@torch.no_grad()
def test_the_vae_stays_in_float32(folder: Path, family: Model) -> None:
    half = load_model(str(folder), torch.bfloat16).eval()
    kinds = {name: {p.dtype for p in part.parameters()} for name, part in half.components().items()}
    assert kinds.pop("vae") == {torch.float32}
    assert set.union(*kinds.values()) == {torch.bfloat16}
    x, t = some_latents(), torch.tensor([3, 900])
    wanted = family.denoise(x, t, family.encode_prompts(CAPTIONS))
    assert_close(half.denoise(x, t, half.encode_prompts(CAPTIONS)), wanted, rtol=0.1, atol=0.1)
    pixels = family.decode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(family.decode(x), pixels)
        inside = family.encode_images(pixels)
    assert torch.equal(inside["mean"], family.encode_images(pixels)["mean"])


def test_a_saved_folder_is_the_same_base(family: Model, tmp_path: Path) -> None:
    save_diffusers_folder(family, tmp_path / "saved", torch.float32)
    again, pipe = load_model(str(tmp_path / "saved")), open_pipeline(tmp_path / "saved")
    for name, part in family.components().items():
        for key, value in part.state_dict().items():
            assert torch.equal(value, again.components()[name].state_dict()[key]), f"{name}.{key}"
    told = family.encode_prompts(CAPTIONS)
    assert torch.equal(again.encode_prompts(CAPTIONS)["text"], told["text"])
    assert torch.equal(told_by(pipe, CAPTIONS)[0], told["text"])
    assert (again.tokenizer.pad_token, again.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    assert pipe.config.force_zeros_for_empty_prompt


def test_an_unknown_pipeline_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index | {"_class_name": "KolorsPipeline"}))
    with pytest.raises(UserError, match="other: it is for KolorsPipeline, which is not supported") as told:
        load_model(str(tmp_path / "other"))
    assert len(str(told.value).splitlines()) == 1
