"""LoRA: Delta W = (alpha / r) B A (Hu 2021, section 4.1), and with a magnitude DoRA (Liu 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratune.lora.kinds.layer import Array, LowRank, Product, Rows, columns, flattened, folded, need, wide


@dataclass(frozen=True, eq=False)
class LoRALayer(LowRank):
    """B and A beside one W_0: h = W_0 x + (alpha / r) B A x; LoCon beside convolutions.

    Args:
        down: A, shape (r, in) beside a Linear and (r, in, k, k) beside a convolution.
        up: B, shape (out, r) or (out, r, 1, 1).
        alpha: the scale is alpha / r.
        mid: the kernel of a Tucker-decomposed convolution (LyCORIS), (r, r, k, k); A is then (r, in, 1, 1).
        magnitude: m of DoRA.

    Raises:
        ValueError: the shapes do not fit one another.
    """

    kind = "LoRA"
    makers = {  # noqa: RUF012
        "lora": ("networks.lora", None),
        "dora": ("lycoris.kohya", {"algo": "lora", "dora_wd": "True"}),
    }
    suffixes = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}  # noqa: RUF012
    attributes = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}  # noqa: RUF012
    down: Array
    up: Array
    alpha: float
    mid: Array | None = None
    magnitude: Array | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        fits = len(down) == len(up) and len(down) in (2, 4) and up[2:] in ((), (1, 1))
        if not fits or up[1] != down[0] or 0 in (*down, *up):
            raise ValueError(
                f"down {down} and up {up} are not (r, in) and (out, r), or (r, in, k, k) and (out, r, 1, 1)"
            )
        if self.mid is not None:
            mid = tuple(self.mid.shape)
            fits = len(mid) == 4 and mid[:2] == (down[0], down[0]) and down[2:] == (1, 1)
            need(fits, f"mid {mid} is not (r, r, k, k) beside down {down}")

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def flat_shape(self) -> tuple[int, int]:
        kernel = 1 if self.mid is None else math.prod(self.mid.shape[2:])
        return self.up.shape[0], columns(self.down) * kernel

    @property
    def shape(self) -> tuple[int, ...]:
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def factors(self, dtype: Any) -> Product:
        down = flattened(self.down, dtype)
        if self.mid is not None:
            down = folded(wide(self.mid, dtype), down)
        return Product(self.scale * flattened(self.up, dtype), down)

    def rows(self, dtype: Any) -> Rows:
        b, a = self.factors(dtype)
        return lambda rows: b[rows] @ a

    @staticmethod
    def peft_config(lora: Any, shared: Mapping[str, Any]) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            **shared,
            lora_alpha=lora.scaled_alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            use_dora=lora.type == "dora",
            init_lora_weights=True if lora.init == "kaiming" else lora.init,
            bias="none",
        )

    @classmethod
    def collected(cls, tensors: Mapping[str, Array], alpha: float, scale: float) -> LowRank:
        factors = dict(tensors)
        if "magnitude" in factors:
            factors["magnitude"] = factors["magnitude"].reshape(-1, *[1] * (len(factors["down"].shape) - 1))
        return cls(**factors, alpha=alpha)
