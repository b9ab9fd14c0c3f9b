"""LoHa: Delta W = (alpha / r) (w1_a w1_b) * (w2_a w2_b), elementwise (Hyeon-Woo 2022, FedPara, eq. 1; LyCORIS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratune.lora.kinds.layer import (
    Array,
    LowRank,
    Product,
    Rows,
    check_side,
    lycoris_config,
    need,
    side,
    side_shape,
    sizes,
)

FIELDS = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")


@dataclass(frozen=True, eq=False)
class LoHaLayer(LowRank):
    """The elementwise product of two products.

    Args:
        w1_a: (out, r), or (out, r, 1, 1); with t1 (r, out).
        w1_b: (r, in k k), or (r, in, k, k); with t1 (r, in).
        w2_a: as w1_a.
        w2_b: as w1_b.
        alpha: the scale is alpha / r.
        t1: kernel of a Tucker-decomposed convolution, (r, r, k, k).
        t2: as t1.
        magnitude: m of DoRA.

    Raises:
        ValueError: the shapes do not fit one another.
    """

    kind = "LoHa"
    makers = {"loha": ("lycoris.kohya", {"algo": "loha"})}  # noqa: RUF012
    suffixes = {name: f"hada_{name}" for name in FIELDS}  # noqa: RUF012
    attributes = suffixes
    w1_a: Array
    w1_b: Array
    w2_a: Array
    w2_b: Array
    alpha: float
    t1: Array | None = None
    t2: Array | None = None
    magnitude: Array | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        shapes = sizes(w1_a=self.w1_a, w1_b=self.w1_b, w2_a=self.w2_a, w2_b=self.w2_b, t1=self.t1, t2=self.t2)
        need((self.t1 is None) == (self.t2 is None), f"only one of t1 and t2 is there: {shapes}")
        for a, b, t in self._sides():
            check_side(a, b, t, shapes)
        first, second = (side_shape(*one) for one in self._sides())
        need(first == second, f"the two products have different shapes: {shapes}")

    def _sides(self) -> tuple[tuple[Array, Array, Array | None], ...]:
        return (self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    @property
    def flat_shape(self) -> tuple[int, int]:
        return side_shape(self.w1_a, self.w1_b, self.t1)

    def rows(self, dtype: Any) -> Rows:
        one, two = (side(*parts, dtype) for parts in self._sides())
        scale = self.scale

        def some(rows: slice) -> Array:
            product = one.b[rows] @ one.a
            product *= scale
            product *= two.b[rows] @ two.a
            return product

        return some

    def factors(self, dtype: Any) -> Product | None:
        """The columns of B are all products b_1i * b_2j of columns, the rows of A alike: rank r^2."""
        one, two = (side(*parts, dtype) for parts in self._sides())
        if one.rank * two.rank >= min(self.flat_shape):
            return None
        b = (one.b[:, :, None] * two.b[:, None, :]).reshape(one.b.shape[0], -1)
        return Product(self.scale * b, (one.a[:, None] * two.a[None]).reshape(-1, one.a.shape[1]))

    @staticmethod
    def peft_config(lora: Any, shared: Mapping[str, Any]) -> Any:
        return lycoris_config("LoHaConfig", lora, shared)
