"""The memory of a training step, from shapes alone: nothing is allocated and no weight is read."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from loratune.families.model import Model

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
# nf4: half a byte, one byte of scale for 64 numbers and a float32 for 256 scales (Dettmers 2023, section 3).
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class Step:
    """What one step takes.

    Args:
        activations: bytes kept between the forward and the backward pass, casts of frozen weights among them.
        transient: bytes beyond them at the step's peak.
        flops: of the forward pass.
    """

    activations: int
    transient: int
    flops: int


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._meet(value.untyped_storage())
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _meet(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.now -= self._seen.pop(key)


class _Flash(torch.autograd.Function):
    """What fused attention keeps: Q, K, V, the result and the logarithm of each row's sum (Dao 2022, algorithm 1)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Rules(TorchFunctionMode):
    """Autocast and fused attention, which torch does not have on the meta device.

    Args:
        precision: as Lightning's trainer calls it.
        gpu: whether autocast follows a GPU's rules, by which norms are taken in float32.
    """

    LOW = (
        *(F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm),
    )
    WIDE = (F.group_norm, F.layer_norm)

    def __init__(self, precision: str, gpu: bool) -> None:
        super().__init__()
        self.precision, self.dtype, self.gpu, self.flops = precision, AUTOCAST.get(precision), gpu, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = _cast(args[:3], self.dtype)
            self.flops += 4 * q.numel() * k.shape[-2]
            return _Flash.apply(q, k, v)
        dtype = torch.float32 if self._wide(func) else None
        if func in self.LOW:  # without autocast an adapter in float32 takes what a base in bfloat16 gives
            dtype = self.dtype or torch.float32 if _mixed(args) else self.dtype
        names, values = list(kwargs), list(kwargs.values())
        return func(*_cast(args, dtype), **dict(zip(names, _cast(values, dtype), strict=True)))

    def reach(self, module: nn.Module) -> None:
        """Let the rules hold where a checkpointed block is computed again, which runs outside of `with`."""

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), Rules(self.precision, self.gpu)

        for part in module.modules():
            if hasattr(part, "_gradient_checkpointing_func"):
                again: Any = partial(checkpoint, use_reentrant=False, context_fn=contexts)
                part._gradient_checkpointing_func = again

    def _wide(self, func: Any) -> bool:
        return self.gpu and self.dtype is not None and func in self.WIDE


def _mixed(values: Sequence[Any]) -> bool:
    return len({value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}) > 1


def _cast(values: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    floating = (isinstance(value, Tensor) and value.is_floating_point() for value in values)
    return [value.to(dtype) if dtype and is_float else value for value, is_float in zip(values, floating, strict=True)]


def imagine(module: nn.Module, precision: str) -> None:
    """Replace a module's parameters and buffers by ones on the meta device, in the dtypes that training gives them."""
    for part in module.modules():
        for values in (part._parameters, part._buffers):
            for name, value in values.items():
                if value is None:
                    continue
                dtype = WHOLE.get(precision, value.dtype) if value.is_floating_point() else value.dtype
                imagined = torch.empty_like(value, dtype=dtype, device="meta")
                parameter = isinstance(value, nn.Parameter)
                values[name] = nn.Parameter(imagined, value.requires_grad) if parameter else imagined  # type: ignore[assignment]


def weight_bytes(module: nn.Module, trained: bool, precision: str = "32-true") -> int:
    """Bytes of a module's trained or frozen weights, as they will be held."""
    total = 0.0
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            if value.requires_grad != trained:
                continue
            size: float = WHOLE.get(precision, value.dtype).itemsize
            if name == "weight" and hasattr(part, "quantized"):
                kind = str(part.quantized)
                size = QUANTIZED[kind] + (4 / value.shape[1] if kind == "int8" else 0)
            total += value.numel() * size
    return math.ceil(total)


def step(
    model: Model,
    count: int,
    shape: Sequence[int],
    conditioning: Callable[[], dict[str, Any]],
    rules: Rules,
    backward: bool,
) -> Step:
    """What a forward pass for `count` images keeps and takes, and with `backward` the backward pass too.

    Args:
        model: imagined.
        count: images in the batch.
        shape: of one x_0.
        conditioning: makes the batch's condition.
        rules: of the device and the precision.
        backward: whether the peak may be in it, as with checkpointing.
    """
    own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return value

    rules.reach(model)
    with Live() as live, rules:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            x_t = torch.empty(count, *shape, device="meta")
            t = torch.zeros(count, dtype=torch.long, device="meta")
            loss = model.denoise(x_t, t, conditioning()).square().mean()
        flops = live.flops + rules.flops
        if backward:
            loss.backward()
    activations = sum(kept.values())
    return Step(activations, max(0, live.peak - activations), flops)


def peak(run: Callable[[], Any], rules: Rules) -> int:
    """Bytes that something takes at its peak without gradients, beside the weights."""
    with torch.no_grad(), Live() as live, rules:
        run()
    return live.peak


def state_bytes(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], sizes: Sequence[int]) -> int:
    """Bytes that an optimizer keeps for parameters of such sizes, measured on a small and a large one."""
    rates = {}
    for size in (1024, 65536):
        parameter = nn.Parameter(torch.zeros(size))
        stepped = optimizer([parameter])
        if hasattr(stepped, "train"):
            stepped.train()
        parameter.grad = torch.full((size,), 1e-3)
        stepped.step()
        states = [value for value in stepped.state[parameter].values() if isinstance(value, Tensor)]
        rates[size] = sum(value.numel() * value.element_size() for value in states) / size
    return math.ceil(sum(size * rates[1024 if size < 4096 else 65536] for size in sizes))
