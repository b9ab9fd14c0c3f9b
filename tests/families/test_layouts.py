"""The layers that follow from a configuration are those of diffusers' and transformers' models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loratune.errors import UserError
from loratune.families.architectures import architectures
from loratune.families.known import family_of
from loratune.families.layout_text import open_clip_layers, open_clip_projected_layers, text_layers
from loratune.families.layout_unet import unet_layers
from loratune.families.layout_vae import vae_layers
from loratune.families.layouts import Layer
from loratune.families.sd import TEXT_PART
from loratune.families.single_file import canonical_keys

UNET = {
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "in_channels": 3,
    "out_channels": 3,
}
TEXT = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
TEXT |= {"max_position_embeddings": 12, "projection_dim": 6, "num_attention_heads": 2}


def live(component: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the model that the library makes of a configuration."""
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        if component in kinds:
            held = canonical_keys(TEXT_PART, kinds[component](CLIPTextConfig(**config)).state_dict())
        else:
            held = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component](**config).state_dict()
    return {key: tuple(value.shape) for key, value in held.items()}


def ours(layers: Any, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    made = [(name, shape) for layer in layers(config) for name, shape, _ in layer.tensors()]
    assert len(made) == len(dict(made))
    return dict(made)


@pytest.mark.parametrize("name", architectures())
def test_every_key_and_shape_of_the_full_size_models(name: str) -> None:
    configs = architectures()[name]
    parts = {part.name: part.layers for part in family_of(configs).parts}
    assert {*parts, "scheduler"} == configs.keys()
    for component, layers in parts.items():
        assert ours(layers, configs[component]) == live(component, configs[component]), component


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"transformer_layers_per_block": [1, 2, 1]},
        {"transformer_layers_per_block": [1, 2, 3], "reverse_transformer_layers_per_block": [[2, 1], 1, [1, 3]]},
        {"layers_per_block": [1, 2, 1]},
        {"use_linear_projection": True},
        {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]},
        {"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]},
        {"block_out_channels": [8, 8, 24], "in_channels": 9},
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 30,
        },
    ],
)
def test_the_unet_follows_its_configuration(changes: dict[str, Any]) -> None:
    assert ours(unet_layers, UNET | changes) == live("unet", UNET | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_out_channels": [8, 16, 16], "down_block_types": ["DownEncoderBlock2D"] * 3}
        | {"up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 8, "layers_per_block": 2},
        {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
    ],
)
def test_the_vae_follows_its_configuration(changes: dict[str, Any]) -> None:
    assert ours(vae_layers, VAE | changes) == live("vae", VAE | changes)


def test_text_encoders_have_the_same_names_in_both_layouts() -> None:
    assert ours(text_layers, TEXT) == ours(open_clip_layers, TEXT) == live("text_encoder", TEXT)
    assert ours(open_clip_projected_layers, TEXT) == live("text_encoder_2", TEXT)


def test_open_clip_keeps_q_k_and_v_in_thirds_of_one_tensor() -> None:
    places = {name: place for layer in open_clip_projected_layers(TEXT) for name, _, place in layer.tensors()}
    attention = "text_model.encoder.layers.1.self_attn"
    for part, rows in {"q_proj": (0, 8), "k_proj": (8, 16), "v_proj": (16, 24)}.items():
        weight, bias = places[f"{attention}.{part}.weight"], places[f"{attention}.{part}.bias"]
        assert (weight.key, weight.shape) == ("transformer.resblocks.1.attn.in_proj_weight", (24, 8))
        assert (bias.key, bias.shape) == ("transformer.resblocks.1.attn.in_proj_bias", (24,))
        assert weight.rows == bias.rows == rows
    projection = places["text_projection.weight"]
    assert (projection.key, projection.shape, projection.transposed) == ("text_projection", (8, 6), True)
    assert places["text_model.embeddings.position_embedding.weight"].key == "positional_embedding"
    assert not any(place.transposed for name, place in places.items() if name != "text_projection.weight")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"addition_embed_type": "text_image"}, "addition_embed_type is 'text_image'; only None and 'text_time' is"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim is missing"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; only None"),
        ({"mid_block_type": None}, "mid_block_type is None; only 'UNetMidBlock2DCrossAttn'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "'AttnDownBlock2D' is not known"),
        ({"in_channels": None}, "in_channels is missing"),
    ],
)
def test_a_unet_of_another_kind_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"unet configuration: .*{told}"):
        list(unet_layers(UNET | changes))


def test_a_vae_and_a_text_encoder_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match=r"vae configuration: .*'AttnDownEncoderBlock2D' is not known"):
        list(vae_layers(VAE | {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}))
    with pytest.raises(UserError, match="text_encoder configuration: hidden_size is missing"):
        list(text_layers({key: value for key, value in TEXT.items() if key != "hidden_size"}))


def test_lora_sits_on_matrices_and_convolutions() -> None:
    shapes = {(4,): False, (4, 4): True, (4, 4, 1, 1): True, (4, 4, 3, 3): True}
    assert {shape: Layer("a", "a", shape).adaptable for shape in shapes} == shapes
    assert not Layer("a", "a", (4, 4), table=True).adaptable
