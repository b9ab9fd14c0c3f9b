"""Options that save memory or time: how the frozen base is stored, and how passes through it run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loratune.errors import UserError
from loratune.families.model import Model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = 64  # of batches that are compiled, beyond which torch computes as it is


@dataclass(frozen=True)
class Memory:
    """Options that save memory or time.

    Args:
        quantization: store the frozen linear layers of the adapted components in nf4 (4 bits, Dettmers 2023, QLoRA) or
            int8 (Dettmers 2022), by bitsandbytes.
        dtype: of the frozen U-Net and text encoders; the VAE and the trained weights stay in float32.
        gradient_checkpointing: recompute activations in the backward pass instead of storing them (Chen 2016).
        attention: sdpa, torch's fused kernel; or plain, softmax(Q K^T) V written out, which on a CPU is faster for
            short sequences (the embedded base: a fifth off each step) and stores L S numbers for each head.
        channels_last: store convolution weights, the adapters' too, with the channels last, which is faster on most
            devices.
        compile: train through torch.compile; the first step of each image size takes minutes.
        unload_encoders: drop the text encoders and the VAE once everything is cached; the run can then sample no
            images.
    """

    quantization: Literal["nf4", "int8"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "plain"] = "sdpa"
    channels_last: bool = True
    compile: bool = False
    unload_encoders: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype`, as torch has it."""
        return DTYPES[self.dtype]

    def hold(self, model: Model, adapted: tuple[str, ...]) -> None:
        """Cast and quantize a frozen base, before adapters are put into it.

        Args:
            model: the base, changed in place.
            adapted: components that get adapters.
        """
        for name, part in model.components().items():
            facts = model.family.part(name)
            if facts.role != "vae" and self.dtype != "float32":
                for parameter in part.parameters():
                    parameter.data = parameter.data.to(self.torch_dtype)
            if name in adapted and self.quantization:
                quantize(part, self.quantization, facts.exact)
        if not self.channels_last:
            model.network.to(memory_format=torch.contiguous_format)

    def arrange(self, model: Model, trained_text: tuple[str, ...] = ()) -> None:
        """Set what concerns the passes through the network, when its layers are what they will be.

        Args:
            model: the base with its adapters.
            trained_text: text encoders that are trained too.
        """
        if self.attention == "plain":
            attend_plainly(model.network)
        if self.gradient_checkpointing:
            model.network.enable_gradient_checkpointing()
            for name in trained_text:
                part: Any = model.components()[name]
                part.gradient_checkpointing_enable({"use_reentrant": False})
        if self.channels_last:
            for parameter in model.network.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if self.compile:
            compile_steps(model.network)


def compile_steps(network: Any) -> None:
    """Let training steps go through torch.compile, each shape of batch by a program of its own.

    What comes without gradients (validation, drawings, comparisons) and a batch of fewer images than the largest
    before it (the rest of a size) is computed as it is: a program made for any number of images would be slower
    for all, and one for each number would take longer to make than it saves.

    Args:
        network: changed in place; called with the batch first.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    plain, compiled = network.forward, torch.compile(network.forward, dynamic=False)
    most = 0

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal most
        if x.is_meta or not torch.is_grad_enabled() or len(x) < most:
            return plain(x, *args, **kwargs)
        most = len(x)
        return compiled(x, *args, **kwargs)

    network.forward = forward


def quantize(module: nn.Module, kind: Literal["nf4", "int8"], exact: str = r"(?!)") -> int:
    """Hold a module's linear layers in 4 or 8 bits; returns how many.

    On the meta device, where there is nothing to quantize, the layers are only marked, as `quantized`.

    Args:
        module: changed in place, and marked as peft looks for it before it puts adapters beside such layers.
        kind: of quantization.
        exact: a regular expression of names of layers that are left as they are.
    """
    linear = [(name, part) for name, part in module.named_modules() if type(part) is nn.Linear]
    layers = [(name, part) for name, part in linear if not re.fullmatch(exact, name)]
    for name, part in layers:
        if part.weight.is_meta:
            part.quantized = kind  # type: ignore[assignment]
            continue
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, _nf4(part) if kind == "nf4" else _int8(part))
    module.is_loaded_in_4bit, module.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # type: ignore[assignment]
    return len(layers)


def _nf4(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        quantized = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4")
    quantized.weight = Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=quantized
    )
    quantized.bias = layer.bias
    # On some CPUs an evaluation would repack the weights into a form through which no gradient passes.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.to(layer.weight.device)  # quantizes


def _int8(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        quantized = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    quantized.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    quantized.bias = layer.bias
    return quantized.to(layer.weight.device)  # quantizes


class PlainAttention:
    """softmax(Q K^T / sqrt(d)) V (Vaswani 2017, eq. 1), written out, for diffusers' attention layers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """hidden_states (B, L, d) attend to encoder_hidden_states (B, S, e), or to themselves; returns (B, L, d)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        q, k, v = (tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in projected)
        scores = (q @ k.transpose(-1, -2)) * attn.scale
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
            scores = scores + mask.view(len(context), attn.heads, -1, mask.shape[-1])
        seen = scores.softmax(-1).to(v.dtype) @ v
        return attn.to_out[1](attn.to_out[0](seen.transpose(1, 2).flatten(2)))


def attend_plainly(network: Any) -> None:
    """Give a U-Net's transformers `PlainAttention`.

    Raises:
        ValueError: its attention layers do more than that.
    """
    layers = [part for part in network.modules() if hasattr(part, "set_processor")]
    if not layers or any(
        getattr(part, "group_norm", None) or getattr(part, "residual_connection", False) for part in layers
    ):
        raise ValueError("memory.attention is plain: only for Stable Diffusion's U-Net; set memory.attention: sdpa")
    network.set_attn_processor(PlainAttention())


class Unloaded(nn.Module):
    """In the place of a component whose weights were dropped: its configuration remains.

    Args:
        part: the component.
        name: of it.
    """

    def __init__(self, part: Any, name: str) -> None:
        super().__init__()
        self.config, self.dtype, self.name = part.config, part.dtype, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise UserError: it is gone."""
        reason = f"the {self.name} was unloaded when training began, and is needed again"
        raise UserError(f"memory.unload_encoders is true: {reason}; set memory.unload_encoders: false")

    encode = decode = forward


def unload_encoders(model: Model) -> None:
    """Drop a base's VAE and text encoders; only the network is left.

    The parts are attributes of the model under their names in `components`.
    """
    for name, part in model.components().items():
        if name not in model.names("denoiser"):
            setattr(model, name, Unloaded(part, name))
