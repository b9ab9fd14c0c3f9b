"""Kinds of file that are no base, told by their keys: other models, and parts of models."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loratune.families.layouts import Shape

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
# How the keys of the components of a checkpoint begin.
COMPONENTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
# By a part of a key that only they have; the first fit counts, so what is built from others comes before them.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "a LoRA, not a base",
        ("lora_", ".lora.", "_lora.", ".lora_A.", ".hada_", ".lokr_", ".oft_", "unet:0:", "text_encoder:0:"),
    ),
    ("a checkpoint quantized by bitsandbytes", (".quant_state.", ".absmax")),
    ("a checkpoint with scaled fp8 weights", ("scaled_fp8", ".scale_weight")),
    ("a ControlNet", ("control_model.", "input_hint_block.", "controlnet_cond_embedding.", "control_all_x_embedder.")),
    ("an IP-Adapter", ("ip_adapter.", "image_proj.")),
    ("a T2I-Adapter", ("adapter.body.", "body.0.resnets.0.block1.")),
    ("an AnimateDiff motion module", ("motion_modules.",)),
    ("a Stable Video Diffusion checkpoint", (".time_stack.", ".temporal_transformer_blocks.", ".time_mixer.")),
    ("a Playground 2.5 checkpoint (SDXL trained as EDM)", ("edm_mean",)),
    ("a CosXL checkpoint (SDXL trained as EDM)", ("edm_vpred.",)),
    ("an SDXL refiner", ("conditioner.embedders.0.model.",)),
    ("a Stable unCLIP checkpoint", ("noise_augmentor.",)),
    ("a Stable Cascade checkpoint", ("clip_txt_mapper.", ".channelwise.")),
    ("a HunyuanVideo checkpoint", ("individual_token_refiner.",)),
    ("a Chroma checkpoint", ("distilled_guidance_layer.",)),
    ("an AuraFlow checkpoint", ("double_layers.", "joint_transformer_blocks.")),
    ("a Qwen-Image checkpoint", (".img_mod.",)),
    ("a FLUX checkpoint", ("double_blocks.", "single_transformer_blocks.")),
    ("a Stable Diffusion 3 checkpoint", ("joint_blocks.", ".attn.add_q_proj.")),
    ("an LTX-Video checkpoint", ("patchify_proj.",)),
    ("a Sana checkpoint", (".mlp.depth_conv.", ".ff.conv_depth.")),
    ("a PixArt checkpoint", ("adaln_single.", "t_block.1.", "y_embedder.y_proj.")),
    ("a Lumina checkpoint", ("cap_embedder.", "caption_projection.")),
    ("a HunyuanDiT checkpoint", ("mlp_t5.",)),
    ("a Wan checkpoint", ("head.modulation",)),
    ("a Mochi checkpoint", (".qkv_x.",)),
    ("an upscaler (ESRGAN)", ("RDB1.", "rdb1.")),
)
# What a U-Net in the original layout is, by its input channels; 4 and 9 are known.
CHANNELS = {
    5: "a Stable Diffusion 2.x checkpoint told depth (its U-Net takes 5 channels)",
    7: "a Stable Diffusion upscaler (its U-Net takes 7 channels)",
    8: "an InstructPix2Pix checkpoint (its U-Net takes 8 channels)",
}
# Parts of models, where the file holds nothing else, by a part of a key.
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a U-Net alone, in diffusers' layout", ("down_blocks.0.resnets.0.time_emb_proj.", "down_blocks.0.attentions.0.")),
    ("a U-Net alone, in the original layout", ("input_blocks.0.0.",)),
    ("a VAE alone", ("decoder.conv_in.",)),
    ("a CLIP vision encoder, not a base", ("vision_model.", "visual.transformer.")),
    ("a text encoder alone", ("encoder.layers.0.self_attn.", "resblocks.0.attn.", "encoder.block.0.layer.")),
)
INVERSIONS = ("emb_params", "clip_l", "clip_g", "string_to_param")


def name_of_kind(shapes: Mapping[str, Shape]) -> str | None:
    """What a file is that is no base, in words for a message, or None where its keys do not tell.

    Args:
        shapes: of its tensors, by key.
    """
    if _is_inversion(shapes):
        return "a textual inversion embedding, not a base"
    if words := _first(KINDS, shapes):
        return words
    channels = shapes.get(CONV_IN, ())[1:2]
    if channels and channels[0] not in (4, 9):
        other = f"a Stable Diffusion checkpoint of another kind (its U-Net takes {channels[0]} channels)"
        return CHANNELS.get(channels[0], other)
    several = sum(any(key.startswith(prefix) for key in shapes) for prefix in COMPONENTS) > 1
    return None if several else _first(PARTS, shapes)


def _is_inversion(shapes: Mapping[str, Shape]) -> bool:
    named = all(key in INVERSIONS or (key[:1] == "<" and key[-1:] == ">") for key in shapes)
    return bool(shapes) and named and all(len(shape) <= 2 for shape in shapes.values())


def _first(table: tuple[tuple[str, tuple[str, ...]], ...], keys: Collection[str]) -> str | None:
    text = "\n".join(keys)  # one search for each part, not one for each part and key
    return next((words for words, parts in table if any(part in text for part in parts)), None)
