"""There and back between the two layouts, bit for bit, and as diffusers' own conversion has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loratune.errors import UserError
from loratune.families.architectures import file_shapes, places
from loratune.families.known import family_of
from loratune.families.sd import TEXT_PART, UNET_PART, VAE_PART
from loratune.families.single_file import canonical_keys, from_single_file, module_keys, to_single_file

Configs = dict[str, dict[str, Any]]
Weights = dict[str, dict[str, Tensor]]
KINDS = ["sd15", "sd2", "sdxl", "sdxl-inpainting"]
Tiny = Callable[..., Configs]
Random = Callable[..., Weights]


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys() and all(torch.equal(one[part][k], other[part][k]) for k in one[part])
        for part in one
    )


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_there_and_back_is_the_same_bit_for_bit(
    name: str, data: st.DataObject, tiny_configs: Tiny, tiny_weights: Random
) -> None:
    configs = tiny_configs(name, width=data.draw(st.sampled_from([4, 8, 12])), depth=data.draw(st.integers(1, 3)))
    channels = configs["unet"]["block_out_channels"]
    depths = data.draw(st.lists(st.integers(1, 3), min_size=len(channels), max_size=len(channels)))
    configs["unet"] |= {
        "block_out_channels": [4 * data.draw(st.integers(1, 3)) for _ in channels],
        "transformer_layers_per_block": depths,
        "layers_per_block": data.draw(st.integers(1, 2)),
        "use_linear_projection": data.draw(st.booleans()),
    }
    configs["vae"] |= {"layers_per_block": data.draw(st.integers(1, 2)), "latent_channels": data.draw(st.just(4))}
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    held = tiny_weights(configs, dtype, data.draw(st.integers(0, 9)))
    file = to_single_file(held, configs)
    assert {key: tuple(value.shape) for key, value in file.items()} == file_shapes(configs)
    assert {value.dtype for value in file.values()} == {dtype}
    assert same(from_single_file(file, configs), held)


@pytest.mark.parametrize("name", KINDS)
def test_a_place_says_where_a_tensor_lies(name: str, tiny_configs: Tiny, tiny_weights: Random) -> None:
    configs = tiny_configs(name)
    held = tiny_weights(configs)
    file, found = to_single_file(held, configs), places(configs)
    assert found.keys() == {f"{part}.{key}" for part, tensors in held.items() for key in tensors}
    for part, tensors in held.items():
        for key, value in tensors.items():
            place = found[f"{part}.{key}"]
            lies = file[place.key] if place.rows is None else file[place.key][slice(*place.rows)]
            assert tuple(file[place.key].shape) == place.shape
            assert torch.equal((lies.T if place.transposed else lies).reshape(value.shape), value)


@pytest.mark.parametrize("name", KINDS)
def test_diffusers_reads_our_file_as_we_do(name: str, tiny_configs: Tiny, tiny_weights: Random) -> None:
    configs = tiny_configs(name)
    held = tiny_weights(configs)
    file, prefixes = to_single_file(held, configs), {part.name: part.prefix for part in family_of(configs).parts}
    theirs: dict[str, Any] = {
        "unet": convert_ldm_unet_checkpoint(dict(file), configs["unet"]),  # type: ignore[no-untyped-call]
        "vae": convert_ldm_vae_checkpoint(dict(file), configs["vae"]),  # type: ignore[no-untyped-call]
    }
    for part in held.keys() - theirs.keys():
        kind: Any = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
        if "transformer." in prefixes[part]:
            theirs[part] = convert_ldm_clip_checkpoint(dict(file))  # type: ignore[no-untyped-call]
        else:
            model, prefix = kind(CLIPTextConfig(**configs[part])), prefixes[part]
            theirs[part] = convert_open_clip_checkpoint(model, dict(file), prefix)  # type: ignore[no-untyped-call]
    assert same({part: dict(theirs[part]) for part in held}, held)


def test_what_real_files_hold_besides_the_weights_is_left_out(tiny_configs: Tiny, tiny_weights: Random) -> None:
    extra = {
        "sd15": ["cond_stage_model.transformer.text_model.embeddings.position_ids", "model_ema.decay", "betas"],
        "sd2": [
            "cond_stage_model.model.transformer.resblocks.2.ln_1.weight",
            "cond_stage_model.model.text_projection",
            "cond_stage_model.model.logit_scale",
            "sqrt_alphas_cumprod",
        ],
        "sdxl": [
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
            "conditioner.embedders.1.model.logit_scale",
            "v_pred",
            "ztsnr",
            "denoiser.sigmas",
        ],
    }
    for name, keys in extra.items():
        configs = tiny_configs(name)
        held = tiny_weights(configs)
        file = to_single_file(held, configs)
        assert same(from_single_file(file | {key: torch.ones(2) for key in keys}, configs), held)
    configs = tiny_configs("sd2", depth=3)  # where the third layer is read, it is not left out
    held = tiny_weights(configs)
    assert same(from_single_file(to_single_file(held, configs), configs), held)


def test_errors_name_the_file_and_the_key(tiny_configs: Tiny, tiny_weights: Random) -> None:
    configs = tiny_configs("sdxl")
    held = tiny_weights(configs)
    file, key = to_single_file(held, configs), "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"
    new = {"model.diffusion_model.new": torch.ones(1), "conditioner.embedders.1.new": torch.ones(1)}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (file | new, r"^a/b: 'model\.diffusion_model\.new' is not part of this architecture \(2 such keys\)"),
        ({name: value for name, value in file.items() if name != key}, rf"^a/b: '{key}' is missing \(1 such keys\)"),
        (file | {key: torch.ones(35)}, rf"^a/b: '{key}' has shape \[35\]; this architecture has \[36\]"),
    ]
    for tensors, told in cases:
        with pytest.raises(UserError, match=told) as error:
            from_single_file(tensors, configs, "a/b")
        assert len(str(error.value).splitlines()) == 1
    name = "text_model.encoder.layers.1.self_attn.q_proj.bias"
    second = held["text_encoder_2"]
    with pytest.raises(UserError, match=r"^a/b: 'unet\.new' is not part"):
        to_single_file(held | {"unet": held["unet"] | {"new": torch.ones(1)}}, configs, "a/b")
    with pytest.raises(UserError, match=rf"^a/b: 'text_encoder_2\.{name}' is missing"):
        to_single_file(held | {"text_encoder_2": {k: v for k, v in second.items() if k != name}}, configs, "a/b")
    with pytest.raises(UserError, match=rf"^a/b: 'text_encoder_2\.{name}' has shape \[1\]"):
        to_single_file(held | {"text_encoder_2": second | {name: torch.ones(1)}}, configs, "a/b")


def test_a_component_that_is_not_there_is_missing_keys(tiny_configs: Tiny, tiny_weights: Random) -> None:
    configs = tiny_configs("sdxl")
    file = to_single_file(tiny_weights(configs), configs)
    sd1 = {key: value for key, value in file.items() if not key.startswith("conditioner.embedders.1.")}
    with pytest.raises(UserError, match=r"'conditioner\.embedders\.1\.model\..* is missing"):
        from_single_file(sd1, configs)


def test_attention_of_a_vae_is_taken_as_a_matrix_too(tiny_configs: Tiny, tiny_weights: Random) -> None:
    configs = tiny_configs("sd15")
    held = tiny_weights(configs)
    file = to_single_file(held, configs)
    assert file["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    flat = {key: value.flatten(1) if ".attn_1." in key and value.dim() > 1 else value for key, value in file.items()}
    assert same(from_single_file(flat, configs), held)


def test_the_names_that_diffusers_gave_the_vae_until_2023() -> None:
    old = {f"decoder.mid_block.attentions.0.{part}.bias": torch.ones(1) for part in ("query", "key", "value")}
    old |= {"encoder.mid_block.attentions.0.proj_attn.weight": torch.ones(1), "encoder.conv_in.bias": torch.ones(1)}
    found = canonical_keys(VAE_PART, old)
    assert found.keys() == {
        *(f"decoder.mid_block.attentions.0.{part}.bias" for part in ("to_q", "to_k", "to_v")),
        "encoder.mid_block.attentions.0.to_out.0.weight",
        "encoder.conv_in.bias",
    }
    assert canonical_keys(VAE_PART, found).keys() == found.keys()
    assert canonical_keys(UNET_PART, old).keys() == old.keys()


def test_text_keys_of_both_majors_of_transformers() -> None:
    bare = {"encoder.layers.0.mlp.fc1.weight": torch.ones(1), "embeddings.position_ids": torch.ones(1)}
    full = {"text_model.encoder.layers.0.mlp.fc1.weight": bare["encoder.layers.0.mlp.fc1.weight"]}
    assert canonical_keys(TEXT_PART, bare) == full == canonical_keys(TEXT_PART, full)
    for state_dict in (bare, full):
        for keys in (bare, full):
            assert module_keys(TEXT_PART, state_dict, keys).keys() == keys.keys() - {"embeddings.position_ids"}
    assert module_keys(TEXT_PART, {"new": torch.ones(1)}, bare).keys() == {"text_model.new"}
