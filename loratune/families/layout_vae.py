"""The layers of the VAE of Stable Diffusion, by rule from its configuration."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.families.layouts import Config, Layer, get, refuse_blocks, resnet

BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")
# What diffusers called the parts of the attention until 2023; SD 1.x folders on the hub have them still.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae_middle(side: str, width: int, attention: bool) -> Iterator[Layer]:
    name, ldm = f"{side}.mid_block", f"{side}.mid"
    yield from resnet(f"{name}.resnets.0", f"{ldm}.block_1", width, width, None)
    if attention:
        for part, original in ATTENTION.items():
            both = (f"{name}.attentions.0.{part}", f"{ldm}.attn_1.{original}")
            if part == "group_norm":
                yield Layer(*both, (width,))
            else:
                yield Layer(*both, (width, width), file_shape=(width, width, 1, 1))
    yield from resnet(f"{name}.resnets.1", f"{ldm}.block_2", width, width, None)


def vae_layers(config: Config) -> Iterator[Layer]:
    """The layers of an AutoencoderKL.

    Raises:
        UserError: the configuration lacks a key or has a part that the original layout does not.
    """
    channels = get(config, "vae", "block_out_channels")
    types = (*get(config, "vae", "down_block_types"), *get(config, "vae", "up_block_types"))
    refuse_blocks("vae", types, BLOCKS)
    count, latent = config.get("layers_per_block", 1), get(config, "vae", "latent_channels")
    attention = bool(config.get("mid_block_add_attention", True))
    levels, last = len(channels), channels[-1]

    width = channels[0]
    yield Layer("encoder.conv_in", "encoder.conv_in", (width, config.get("in_channels", 3), 3, 3))
    for level, outer in enumerate(channels):
        name, ldm = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        for index in range(count):
            yield from resnet(f"{name}.resnets.{index}", f"{ldm}.block.{index}", width, outer, None)
            width = outer
        if level < levels - 1:
            yield Layer(f"{name}.downsamplers.0.conv", f"{ldm}.downsample.conv", (width, width, 3, 3))
    yield from _vae_middle("encoder", last, attention)
    yield Layer("encoder.conv_norm_out", "encoder.norm_out", (last,))
    yield Layer("encoder.conv_out", "encoder.conv_out", (2 * latent, last, 3, 3))

    yield Layer("decoder.conv_in", "decoder.conv_in", (last, latent, 3, 3))
    yield from _vae_middle("decoder", last, attention)
    for level, outer in enumerate(channels[::-1]):
        name, ldm = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
        for index in range(count + 1):
            yield from resnet(f"{name}.resnets.{index}", f"{ldm}.block.{index}", width, outer, None)
            width = outer
        if level < levels - 1:
            yield Layer(f"{name}.upsamplers.0.conv", f"{ldm}.upsample.conv", (width, width, 3, 3))
    yield Layer("decoder.conv_norm_out", "decoder.norm_out", (width,))
    yield Layer("decoder.conv_out", "decoder.conv_out", (config.get("out_channels", 3), width, 3, 3))
    if config.get("use_quant_conv", True):
        yield Layer("quant_conv", "quant_conv", (2 * latent, 2 * latent, 1, 1))
    if config.get("use_post_quant_conv", True):
        yield Layer("post_quant_conv", "post_quant_conv", (latent, latent, 1, 1))


def canonical_vae_key(key: str) -> str | None:
    """The name today of a key of an AutoencoderKL."""
    before, attention, part = key.partition(".mid_block.attentions.0.")
    name, dot, kind = part.partition(".")
    return f"{before}{attention}{OLD_ATTENTION.get(name, name)}{dot}{kind}"
