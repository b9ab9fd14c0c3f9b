"""The layers of U-Net, VAE and CLIP text encoder, by rule from their configurations: names and shapes.

Names are diffusers' and transformers' (`name`) and those of the original single file (`ldm`, latent-diffusion
at CompVis). No model is made, so the names do not follow what a library's next version calls its modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.errors import UserError

Config = Mapping[str, Any]

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
PLAIN = ("DownBlock2D", "UpBlock2D")
# What would add or reshape layers if it were otherwise; the value that means "not used".
UNET_DEFAULTS: dict[str, Any] = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}
VAE_BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")
# The parts of a residual block: here, in the U-Net's original and in the VAE's.
RESNET = {
    "norm1": ("in_layers.0", "norm1"),
    "conv1": ("in_layers.2", "conv1"),
    "time_emb_proj": ("emb_layers.1", ""),
    "norm2": ("out_layers.0", "norm2"),
    "conv2": ("out_layers.3", "conv2"),
    "conv_shortcut": ("skip_connection", "nin_shortcut"),
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@dataclass(frozen=True)
class Layer:
    """A module with a weight.

    Args:
        name: as diffusers or transformers have it, without the component.
        ldm: as the single file has it, without the component's prefix.
        shape: of the weight in the module.
        bias: whether there is one; its length is the weight's first.
        file_shape: of the weight in the single file, where it is another (1x1 convolutions
            in the VAE's attention).
        table: whether the weight is looked up in, not multiplied with (embeddings).
    """

    name: str
    ldm: str
    shape: tuple[int, ...]
    bias: bool = True
    file_shape: tuple[int, ...] = ()
    table: bool = False

    @property
    def adaptable(self) -> bool:
        """Whether a LoRA can sit here: W_0 is a matrix or a convolution."""
        return len(self.shape) in (2, 4) and not self.table

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Its parameters: name, shape in the module, shape in the single file."""
        yield "weight", self.shape, self.file_shape or self.shape
        if self.bias:
            yield "bias", self.shape[:1], self.shape[:1]


def _get(config: Config, component: str, key: str) -> Any:
    if config.get(key) is None:
        raise UserError(f"{component} configuration: {key} is missing; give the whole config.json")
    return config[key]


def _refuse_other(config: Config, component: str, defaults: Mapping[str, Any]) -> None:
    for key, value in defaults.items():
        if config.get(key, value) != value:
            raise UserError(f"{component} configuration: {key} is {config[key]!r}; only {value!r} is known here")


def _per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _resnet(name: str, ldm: str, inner: int, outer: int, time: int | None) -> Iterator[Layer]:
    shapes: dict[str, tuple[int, ...]] = {"norm1": (inner,), "conv1": (outer, inner, 3, 3)}
    if time is not None:
        shapes["time_emb_proj"] = (outer, time)
    shapes |= {"norm2": (outer,), "conv2": (outer, outer, 3, 3)}
    if inner != outer:
        shapes["conv_shortcut"] = (outer, inner, 1, 1)
    for part, shape in shapes.items():
        yield Layer(f"{name}.{part}", f"{ldm}.{RESNET[part][time is None]}", shape)


def _transformer(name: str, ldm: str, width: int, context: int, depth: int, linear: bool) -> Iterator[Layer]:
    project = (width, width) if linear else (width, width, 1, 1)

    def both(part: str, shape: tuple[int, ...], bias: bool = True) -> Layer:
        return Layer(f"{name}.{part}", f"{ldm}.{part}", shape, bias)

    yield both("norm", (width,))
    yield both("proj_in", project)
    for block in (f"transformer_blocks.{index}" for index in range(depth)):
        for attention, source in (("attn1", width), ("attn2", context)):
            yield both(f"{block}.{attention}.to_q", (width, width), bias=False)
            yield both(f"{block}.{attention}.to_k", (width, source), bias=False)
            yield both(f"{block}.{attention}.to_v", (width, source), bias=False)
            yield both(f"{block}.{attention}.to_out.0", (width, width))
        yield both(f"{block}.ff.net.0.proj", (8 * width, width))
        yield both(f"{block}.ff.net.2", (width, 4 * width))
        yield from (both(f"{block}.norm{number}", (width,)) for number in (1, 2, 3))
    yield both("proj_out", project)


def unet_layers(config: Config) -> Iterator[Layer]:
    """The layers of a UNet2DConditionModel of the SD 1.x kind, in the order of its forward pass.

    Raises:
        UserError: the configuration lacks a key or has a part that the original layout does not.
    """
    _refuse_other(config, "unet", UNET_DEFAULTS)
    channels = _get(config, "unet", "block_out_channels")
    levels = len(channels)
    kinds = (_get(config, "unet", "down_block_types"), _get(config, "unet", "up_block_types"))
    if wrong := [kind for kind in (*kinds[0], *kinds[1]) if kind not in CROSS + PLAIN]:
        raise UserError(f"unet configuration: the block type {wrong[0]!r} is not known; known are {CROSS + PLAIN}")
    counts = _per_level(config.get("layers_per_block", 2), levels)
    depths = _per_level(config.get("transformer_layers_per_block", 1), levels)
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    context, time = _get(config, "unet", "cross_attention_dim"), 4 * channels[0]
    linear = bool(config.get("use_linear_projection"))
    first = (channels[0], _get(config, "unet", "in_channels"), 3, 3)
    yield Layer("time_embedding.linear_1", "time_embed.0", (time, channels[0]))
    yield Layer("time_embedding.linear_2", "time_embed.2", (time, time))
    yield Layer("conv_in", "input_blocks.0.0", first)

    place, width = 1, channels[0]
    for level, kind in enumerate(kinds[0]):
        for index in range(counts[level]):
            name, ldm = f"down_blocks.{level}", f"input_blocks.{place}"
            yield from _resnet(f"{name}.resnets.{index}", f"{ldm}.0", width, channels[level], time)
            width, place = channels[level], place + 1
            if kind in CROSS:
                inside = (width, context, depths[level], linear)
                yield from _transformer(f"{name}.attentions.{index}", f"{ldm}.1", *inside)
        if level < levels - 1:
            shape = (width, width, 3, 3)
            yield Layer(f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{place}.0.op", shape)
            place += 1

    yield from _resnet("mid_block.resnets.0", "middle_block.0", width, width, time)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", width, context, depths[-1], linear)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", width, width, time)

    place, backwards = 0, list(channels[::-1])
    for level, kind in enumerate(kinds[1]):
        outer, below = backwards[level], backwards[min(level + 1, levels - 1)]
        count = counts[::-1][level] + 1
        for index in range(count):
            name, ldm = f"up_blocks.{level}", f"output_blocks.{place}"
            skip = below if index == count - 1 else outer
            yield from _resnet(f"{name}.resnets.{index}", f"{ldm}.0", width + skip, outer, time)
            width, place = outer, place + 1
            if kind in CROSS:
                inside = (width, context, up_depths[level], linear)
                yield from _transformer(f"{name}.attentions.{index}", f"{ldm}.1", *inside)
        if level < levels - 1:
            ldm = f"output_blocks.{place - 1}.{2 if kind in CROSS else 1}.conv"
            yield Layer(f"up_blocks.{level}.upsamplers.0.conv", ldm, (width, width, 3, 3))
    yield Layer("conv_norm_out", "out.0", (width,))
    yield Layer("conv_out", "out.2", (_get(config, "unet", "out_channels"), width, 3, 3))


def _vae_middle(side: str, width: int, attention: bool) -> Iterator[Layer]:
    name, ldm = f"{side}.mid_block", f"{side}.mid"
    yield from _resnet(f"{name}.resnets.0", f"{ldm}.block_1", width, width, None)
    if attention:
        for part, original in VAE_ATTENTION.items():
            both = (f"{name}.attentions.0.{part}", f"{ldm}.attn_1.{original}")
            if part == "group_norm":
                yield Layer(*both, (width,))
            else:
                yield Layer(*both, (width, width), file_shape=(width, width, 1, 1))
    yield from _resnet(f"{name}.resnets.1", f"{ldm}.block_2", width, width, None)


def vae_layers(config: Config) -> Iterator[Layer]:
    """The layers of an AutoencoderKL of the SD 1.x kind.

    Raises:
        UserError: the configuration lacks a key or has a part that the original layout does not.
    """
    channels = _get(config, "vae", "block_out_channels")
    types = (*_get(config, "vae", "down_block_types"), *_get(config, "vae", "up_block_types"))
    if wrong := [kind for kind in types if kind not in VAE_BLOCKS]:
        raise UserError(f"vae configuration: the block type {wrong[0]!r} is not known; known are {VAE_BLOCKS}")
    count, latent = config.get("layers_per_block", 1), _get(config, "vae", "latent_channels")
    attention = bool(config.get("mid_block_add_attention", True))
    levels, last = len(channels), channels[-1]

    width = channels[0]
    yield Layer("encoder.conv_in", "encoder.conv_in", (width, config.get("in_channels", 3), 3, 3))
    for level, outer in enumerate(channels):
        name, ldm = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        for index in range(count):
            yield from _resnet(f"{name}.resnets.{index}", f"{ldm}.block.{index}", width, outer, None)
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
            yield from _resnet(f"{name}.resnets.{index}", f"{ldm}.block.{index}", width, outer, None)
            width = outer
        if level < levels - 1:
            yield Layer(f"{name}.upsamplers.0.conv", f"{ldm}.upsample.conv", (width, width, 3, 3))
    yield Layer("decoder.conv_norm_out", "decoder.norm_out", (width,))
    yield Layer("decoder.conv_out", "decoder.conv_out", (config.get("out_channels", 3), width, 3, 3))
    if config.get("use_quant_conv", True):
        yield Layer("quant_conv", "quant_conv", (2 * latent, 2 * latent, 1, 1))
    if config.get("use_post_quant_conv", True):
        yield Layer("post_quant_conv", "post_quant_conv", (latent, latent, 1, 1))


def text_layers(config: Config) -> Iterator[Layer]:
    """The layers of a CLIPTextModel; the single file has the same names, with the text_model level.

    Raises:
        UserError: the configuration lacks a key.
    """

    def same(part: str, shape: tuple[int, ...], bias: bool = True, table: bool = False) -> Layer:
        return Layer(f"text_model.{part}", f"text_model.{part}", shape, bias, table=table)

    width, inner = (_get(config, "text_encoder", key) for key in ("hidden_size", "intermediate_size"))
    words, places = (_get(config, "text_encoder", key) for key in ("vocab_size", "max_position_embeddings"))
    yield same("embeddings.token_embedding", (words, width), bias=False, table=True)
    yield same("embeddings.position_embedding", (places, width), bias=False, table=True)
    for index in range(_get(config, "text_encoder", "num_hidden_layers")):
        layer = f"encoder.layers.{index}"
        yield same(f"{layer}.layer_norm1", (width,))
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield same(f"{layer}.self_attn.{part}", (width, width))
        yield same(f"{layer}.layer_norm2", (width,))
        yield same(f"{layer}.mlp.fc1", (inner, width))
        yield same(f"{layer}.mlp.fc2", (width, inner))
    yield same("final_layer_norm", (width,))
