"""Real headers against the tables, detection by keys and shapes, and names for what is no base."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loratune.families.architectures import (
    architectures,
    describe_unsupported,
    detect,
    file_shapes,
    module_names,
    original_names,
    places,
    title,
)
from loratune.families.known import family_of
from loratune.families.sd import TEXT_PART
from loratune.families.single_file import canonical_keys
from loratune.formats.headers import Header, TensorInfo
from loratune.lora.tables.kohya import kohya_names

DATA = Path(__file__).parent.parent / "headers"
Shapes = dict[str, tuple[int, ...]]


def header_of(shapes: Shapes, dtype: str = "F16") -> Header:
    return Header({}, {key: TensorInfo(dtype, shape, 0, 0) for key, shape in shapes.items()}, 0, 0)


def real_header(name: str) -> Header:
    raw = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
    metadata = raw.pop("__metadata__", None) or {}
    return Header(metadata, {key: TensorInfo(value[0], tuple(value[1:]), 0, 0) for key, value in raw.items()}, 0, 0)


def shapes_of(name: str) -> Shapes:
    return file_shapes(architectures()[name])


def without(name: str, *prefixes: str) -> Header:
    return header_of({key: shape for key, shape in shapes_of(name).items() if not key.startswith(prefixes)})


def told(header: Header) -> str:
    assert detect(header) is None
    words = describe_unsupported(header)
    assert words is not None
    assert "\n" not in words
    return words


# Tables.


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("sd15", {"cond_stage_model.transformer.text_model.embeddings.position_ids"}),
        (
            "sdxl",
            {
                "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
                "conditioner.embedders.1.model.logit_scale",
            },
        ),
    ],
)
def test_the_table_is_the_real_file_key_for_key_and_shape_for_shape(name: str, beside: set[str]) -> None:
    held = {key: info.shape for key, info in real_header(name).tensors.items()}
    configs = architectures()[name]
    assert {key for key in held if key.startswith(family_of(configs).ignored(configs))} == beside
    assert file_shapes(configs) == {key: shape for key, shape in held.items() if key not in beside}


def test_the_kind_of_layout_follows_from_the_configurations() -> None:
    kinds = {name: family_of(configs).name for name, configs in architectures().items()}
    assert kinds == {
        "sd15": "sd1",
        "sd15-inpainting": "sd1",
        "sd2": "sd2",
        "sd2-inpainting": "sd2",
        "sdxl": "sdxl",
        "sdxl-inpainting": "sdxl",
    }
    assert title(architectures()["sd2-inpainting"]) == "Stable Diffusion 2.x (inpainting)"


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_inpainting_differs_in_one_shape(name: str) -> None:
    plain, painting = shapes_of(name), shapes_of(f"{name}-inpainting")
    assert plain.keys() == painting.keys()
    assert {key: (plain[key], painting[key]) for key in plain if plain[key] != painting[key]} == {
        "model.diffusion_model.input_blocks.0.0.weight": ((320, 4, 3, 3), (320, 9, 3, 3))
    }


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "scheduler"])
def test_configurations_are_whole_and_copies(name: str) -> None:
    architectures()["sd15"][name].clear()
    assert architectures()["sd15"][name]


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_layers_a_lora_can_adapt_are_the_matrices_and_convolutions(name: str) -> None:
    configs = architectures()[name]
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    expected: set[str] = set()
    for component in configs.keys() & {"unet", *kinds}:
        with torch.device("meta"):
            text = component in kinds
            model = (
                kinds[component](CLIPTextConfig(**configs[component]))
                if text
                else UNet2DConditionModel(**configs["unet"])
            )
        found = {
            path: torch.ones(1)
            for path, part in model.named_modules()
            if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)
        }
        expected |= {f"{component}.{path}" for path in (canonical_keys(TEXT_PART, found) if text else found)}
    assert set(module_names(configs)) == expected
    assert len(module_names(configs)) == len(expected)


@pytest.mark.parametrize("file", ["sd15_lora_attn_r16", "sd15_lora_default_r16"])
def test_a_lora_of_sd15_names_layers_of_the_table(file: str) -> None:
    table = kohya_names(module_names(architectures()["sd15"]))
    assert {key.partition(".")[0] for key in real_header(file).tensors} <= table.keys()


def test_a_lora_of_sdxl_names_layers_of_the_table() -> None:
    configs = architectures()["sdxl"]
    originals = original_names(configs)
    known = set()
    for name in module_names(configs):
        component, _, path = name.partition(".")
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
        known.add(f"{prefix}_{originals.get(name, path).replace('.', '_')}")
    found = {key.partition(".")[0] for key in real_header("sdxl_lora_attn_r16").tensors}
    assert len(found) == 736
    assert found <= known


def test_a_lora_on_all_attention_of_sdxl_changes_672_tensors() -> None:
    configs = architectures()["sdxl"]
    attention = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
    names = [name for name in module_names(configs) if name.endswith(attention)]
    found = places(configs)
    assert len(names) == 736
    assert len({found[f"{name}.weight"].key for name in names}) == 672


def test_original_names_of_the_unet() -> None:
    sd15, sdxl = (original_names(architectures()[name]) for name in ("sd15", "sdxl"))
    assert sd15["unet.down_blocks.0.attentions.0.proj_in"] == "input_blocks.1.1.proj_in"
    assert sd15["unet.up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert sdxl["unet.up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert sdxl["unet.add_embedding.linear_2"] == "label_emb.0.2"
    attention = "transformer_blocks.9.attn2.to_k"
    assert sdxl[f"unet.down_blocks.2.attentions.1.{attention}"] == f"input_blocks.8.1.{attention}"


# Detection.


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", architectures())
def test_the_architecture_is_told_by_keys_and_shapes(name: str, dtype: str) -> None:
    header = header_of(shapes_of(name) | {"something.new": (1,)}, dtype)
    assert detect(header) == name


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_real_files_are_told(name: str) -> None:
    assert detect(real_header(name)) == name
    assert describe_unsupported(real_header(name)) is None


def test_attention_of_the_vae_may_be_matrices() -> None:
    shapes = {key: shape[:2] if "attn_1" in key else shape for key, shape in shapes_of("sdxl").items()}
    assert detect(header_of(shapes)) == "sdxl"


def test_fused_and_turned_tensors_have_one_shape() -> None:
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    assert "is [1280, 1280] instead of [3840, 1280]" in told(header_of(shapes_of("sdxl") | {key: (1280, 1280)}))


@pytest.mark.parametrize(
    ("name", "key", "shape", "words"),
    [
        (
            "sdxl",
            "model.diffusion_model.label_emb.0.0.weight",
            (1280, 2560),
            "nearly a Stable Diffusion XL checkpoint: "
            "'model.diffusion_model.label_emb.0.0.weight' is [1280, 2560] instead of [1280, 2816] (1 such keys)",
        ),
        (
            "sd15-inpainting",
            "model.diffusion_model.out.2.bias",
            None,
            "nearly a Stable Diffusion 1.x (inpainting) checkpoint: "
            "'model.diffusion_model.out.2.bias' is missing (1 such keys)",
        ),
        (
            "sd2",
            "cond_stage_model.model.token_embedding.weight",
            (49410, 1024),
            "nearly a Stable Diffusion 2.x checkpoint: "
            "'cond_stage_model.model.token_embedding.weight' is [49410, 1024] instead of [49408, 1024] (1 such keys)",
        ),
    ],
)
def test_what_is_nearly_known_is_told_the_difference(
    name: str, key: str, shape: tuple[int, ...] | None, words: str
) -> None:
    shapes = shapes_of(name)
    del shapes[key]
    assert told(header_of(shapes | ({key: shape} if shape else {}))) == words


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (without("sd15", "first_stage_model."), "Stable Diffusion 1.x checkpoint that is not complete: it has no vae"),
        (without("sdxl", "conditioner.embedders.1."), "XL checkpoint that is not complete: it has no text_encoder_2"),
        (without("sd2", "model.diffusion_model."), "2.x checkpoint that is not complete: it has no unet"),
    ],
)
def test_what_is_not_complete_is_told_what_it_lacks(header: Header, words: str) -> None:
    assert words in told(header)


IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (1, 1)}, "a LoRA, not a base"),
        ({"unet.mid_block.attentions.0.to_q.lora.down.weight": (1, 1)}, "a LoRA, not a base"),
        ({"mid_block.attentions.0.processor.to_q_lora.down.weight": (1, 1)}, "a LoRA, not a base"),
        ({"unet:0:up": (1, 1)}, "a LoRA, not a base"),
        ({"emb_params": (4, 768)}, "a textual inversion embedding"),
        ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "a textual inversion embedding"),
        ({"<my-cat>": (768,)}, "a textual inversion embedding"),
        ({"control_model.input_hint_block.0.bias": (1,)}, "a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.bias": (1,)}, "a ControlNet"),
        ({"image_proj.proj.weight": (1,), "ip_adapter.1.to_k_ip.weight": (1,)}, "an IP-Adapter"),
        ({"down_blocks.0.motion_modules.0.norm.weight": (1,)}, "AnimateDiff"),
        ({"conditioner.embedders.0.model.transformer.resblocks.0.ln_1.bias": (1,)}, "an SDXL refiner"),
        (shapes_of("sdxl") | {"edm_mean": (1, 4, 1, 1)}, "Playground 2.5"),
        (shapes_of("sdxl-inpainting") | {IN: (320, 8, 3, 3), "edm_vpred.sigma_max": ()}, "CosXL"),
        ({"clip_txt_mapper.weight": (1,)}, "Stable Cascade"),
        ({"down_blocks.1.0.channelwise.0.weight": (1,)}, "Stable Cascade"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,), "text_encoders.clip_l.x": (1,)}, "Diffusion 3"),
        ({"transformer_blocks.0.attn.add_q_proj.weight": (1,)}, "Diffusion 3"),
        ({"double_blocks.0.img_attn.norm": (1,)}, "FLUX"),
        ({"single_transformer_blocks.0.x": (1,), "transformer_blocks.0.attn.add_q_proj.weight": (1,)}, "FLUX"),
        ({"double_blocks.0.x": (1,), "txt_in.individual_token_refiner.blocks.0.x": (1,)}, "HunyuanVideo"),
        ({"blocks.0.cross_attn.q_linear.weight": (1,), "t_block.1.weight": (1,)}, "PixArt"),
        ({"decoder.conv_in.weight": (1,)}, "a VAE alone"),
        ({"first_stage_model.decoder.conv_in.weight": (1,)}, "a VAE alone"),
        ({"down_blocks.0.attentions.0.norm.weight": (1,)}, "a U-Net alone"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a U-Net alone"),
        ({"text_model.encoder.layers.0.self_attn.q_proj.bias": (1,)}, "a text encoder alone"),
        ({"encoder.block.0.layer.0.SelfAttention.k.weight": (1,)}, "a text encoder alone"),
        ({"vision_model.encoder.layers.0.self_attn.q_proj.bias": (1,)}, "CLIP vision encoder"),
        (shapes_of("sd15") | {IN: (320, 8, 3, 3)}, "InstructPix2Pix"),
        (shapes_of("sd2") | {IN: (320, 5, 3, 3)}, "told depth"),
        (shapes_of("sd15") | {IN: (320, 6, 3, 3)}, "takes 6 channels"),
        (shapes_of("sdxl") | {"scaled_fp8": (0,)}, "scaled fp8"),
    ],
)
def test_other_kinds_of_file_are_named(shapes: Shapes, words: str) -> None:
    header = header_of(shapes)
    assert words in (describe_unsupported(header) or "")


@pytest.mark.parametrize("name", ["sd15_lora_attn_r16", "sd15_lora_default_r16", "sdxl_lora_attn_r16"])
def test_real_loras_are_named(name: str) -> None:
    assert told(real_header(name)) == "a LoRA, not a base"


@pytest.mark.parametrize("kind", ["vae", "unet", "text_encoder"])
def test_components_that_diffusers_saves_are_named(kind: str) -> None:
    configs = architectures()["sd15"]
    with torch.device("meta"):
        model: Any = {
            "vae": lambda: AutoencoderKL(**configs["vae"]),
            "unet": lambda: UNet2DConditionModel(**configs["unet"]),
            "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }[kind]()
    words = {"vae": "a VAE alone", "unet": "a U-Net alone", "text_encoder": "a text encoder alone"}[kind]
    assert words in told(header_of({key: tuple(value.shape) for key, value in model.state_dict().items()}))


def test_a_file_that_tells_nothing_has_no_name() -> None:
    assert describe_unsupported(header_of({"x": (1,)})) is None
    assert describe_unsupported(header_of({})) is None
    assert detect(header_of({})) is None


def test_headers_are_read_without_torch() -> None:
    modules = "architectures, base, layouts, unsupported"
    imports = f"import sys; from loratune.families import {modules}; from loratune.lora import names"
    code = f"{imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
