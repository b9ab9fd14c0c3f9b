"""The layers of a U-Net of SD 1.x, SD 2.x and SDXL, by rule from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loratune.families.layouts import Config, Layer, get, refuse_blocks, refuse_other, resnet

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
PLAIN = ("DownBlock2D", "UpBlock2D")
# What would add or reshape layers if it were otherwise; the values that are known, first what a missing key means.
KNOWN: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}


@dataclass(frozen=True)
class _Plan:
    """What a configuration comes to: a value for each level, the depths of transformers for each block of a level."""

    channels: list[int]
    counts: list[int]
    down_types: list[str]
    up_types: list[str]
    down_depths: list[Any]
    up_depths: list[Any]
    context: int
    linear: bool

    @property
    def time(self) -> int:
        return 4 * self.channels[0]


def _plan(config: Config) -> _Plan:
    refuse_other(config, "unet", KNOWN)
    channels = list(get(config, "unet", "block_out_channels"))
    down, up = (list(get(config, "unet", f"{side}_block_types")) for side in ("down", "up"))
    refuse_blocks("unet", (*down, *up), CROSS + PLAIN)
    counts = _each(config.get("layers_per_block", 2), len(channels))
    depths = _each(config.get("transformer_layers_per_block", 1), len(channels))
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    context, linear = get(config, "unet", "cross_attention_dim"), bool(config.get("use_linear_projection"))
    return _Plan(channels, counts, down, up, depths, up_depths, context, linear)


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


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


def _down(plan: _Plan) -> Iterator[Layer]:
    place, width = 1, plan.channels[0]
    for level, kind in enumerate(plan.down_types):
        for index in range(plan.counts[level]):
            name, ldm = f"down_blocks.{level}", f"input_blocks.{place}"
            yield from resnet(f"{name}.resnets.{index}", f"{ldm}.0", width, plan.channels[level], plan.time)
            width, place = plan.channels[level], place + 1
            if kind in CROSS:
                inside = (width, plan.context, _each(plan.down_depths[level], index + 1)[index], plan.linear)
                yield from _transformer(f"{name}.attentions.{index}", f"{ldm}.1", *inside)
        if level < len(plan.channels) - 1:
            shape = (width, width, 3, 3)
            yield Layer(f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{place}.0.op", shape)
            place += 1


def _middle(plan: _Plan) -> Iterator[Layer]:
    width, depth = plan.channels[-1], _each(plan.down_depths[-1], 1)[0]
    yield from resnet("mid_block.resnets.0", "middle_block.0", width, width, plan.time)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", width, plan.context, depth, plan.linear)
    yield from resnet("mid_block.resnets.1", "middle_block.2", width, width, plan.time)


def _up(plan: _Plan) -> Iterator[Layer]:
    backwards, place, width = plan.channels[::-1], 0, plan.channels[-1]
    for level, kind in enumerate(plan.up_types):
        outer, below = backwards[level], backwards[min(level + 1, len(backwards) - 1)]
        count = plan.counts[::-1][level] + 1
        for index in range(count):
            name, ldm = f"up_blocks.{level}", f"output_blocks.{place}"
            skip = below if index == count - 1 else outer
            yield from resnet(f"{name}.resnets.{index}", f"{ldm}.0", width + skip, outer, plan.time)
            width, place = outer, place + 1
            if kind in CROSS:
                inside = (width, plan.context, _each(plan.up_depths[level], count)[index], plan.linear)
                yield from _transformer(f"{name}.attentions.{index}", f"{ldm}.1", *inside)
        if level < len(backwards) - 1:
            ldm = f"output_blocks.{place - 1}.{2 if kind in CROSS else 1}.conv"
            yield Layer(f"up_blocks.{level}.upsamplers.0.conv", ldm, (width, width, 3, 3))


def unet_layers(config: Config) -> Iterator[Layer]:
    """The layers of a UNet2DConditionModel, in the order of its forward pass.

    Raises:
        UserError: the configuration lacks a key or has a part that the original layout does not.
    """
    plan = _plan(config)
    first, time = plan.channels[0], plan.time
    yield Layer("time_embedding.linear_1", "time_embed.0", (time, first))
    yield Layer("time_embedding.linear_2", "time_embed.2", (time, time))
    if config.get("addition_embed_type"):
        width = get(config, "unet", "projection_class_embeddings_input_dim")
        yield Layer("add_embedding.linear_1", "label_emb.0.0", (time, width))
        yield Layer("add_embedding.linear_2", "label_emb.0.2", (time, time))
    yield Layer("conv_in", "input_blocks.0.0", (first, get(config, "unet", "in_channels"), 3, 3))
    yield from _down(plan)
    yield from _middle(plan)
    yield from _up(plan)
    yield Layer("conv_norm_out", "out.0", (first,))
    yield Layer("conv_out", "out.2", (get(config, "unet", "out_channels"), first, 3, 3))
