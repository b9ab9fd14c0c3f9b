"""LoKr: Delta W = (alpha / r) w1 (x) w2, Kronecker's product (Edalati 2022; LyCORIS); w1 and w2 whole or factored."""

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
    columns,
    flattened,
    kron,
    lycoris_config,
    need,
    side,
    side_shape,
    sizes,
)

FIELDS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


@dataclass(frozen=True, eq=False)
class LoKrLayer(LowRank):
    """The Kronecker product of two small matrices.

    Args:
        alpha: the scale is alpha / r.
        w1: whole, (o1, i1), or None for w1_a w1_b.
        w1_a: (o1, r).
        w1_b: (r, i1).
        w2: whole, (o2, i2) or (o2, i2, k, k), or None for w2_a w2_b.
        w2_a: (o2, r); with t2 (r, o2).
        w2_b: (r, i2 k k) or (r, i2, k, k); with t2 (r, i2).
        t2: kernel of a Tucker-decomposed convolution, (r, r, k, k).
        magnitude: m of DoRA.

    Where both are whole there is no r and the scale is 1, whatever alpha says (as LyCORIS has it).

    Raises:
        ValueError: a factor is missing or there twice, or the shapes do not fit one another.
    """

    kind = "LoKr"
    makers = {"lokr": ("lycoris.kohya", {"algo": "lokr"})}  # noqa: RUF012
    suffixes = {name: f"lokr_{name}" for name in FIELDS}  # noqa: RUF012
    attributes = suffixes
    alpha: float
    w1: Array | None = None
    w1_a: Array | None = None
    w1_b: Array | None = None
    w2: Array | None = None
    w2_a: Array | None = None
    w2_b: Array | None = None
    t2: Array | None = None
    magnitude: Array | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        shapes = sizes(**self.tensors())
        for whole, a, b, t in self._sides():
            if whole is not None:
                need(a is None and b is None and t is None, f"both whole and factored: {shapes}")
                need(len(whole.shape) in (2, 4) and 0 not in whole.shape, f"not a matrix: {shapes}")
                continue
            need(a is not None and b is not None, f"a factor is missing: {shapes}")
            check_side(a, b, t, shapes)

    def _sides(self) -> tuple[tuple[Array | None, Array | None, Array | None, Array | None], ...]:
        return (self.w1, self.w1_a, self.w1_b, None), (self.w2, self.w2_a, self.w2_b, self.t2)

    @property
    def ranked(self) -> bool:
        return self.w1 is None or self.w2 is None

    @property
    def rank(self) -> int:
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return 1 if factor is None else int(factor.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.ranked else 1.0

    @property
    def flat_shape(self) -> tuple[int, int]:
        one, two = (
            side_shape(a, b, t) if whole is None else (whole.shape[0], columns(whole))
            for whole, a, b, t in self._sides()
        )
        return one[0] * two[0], one[1] * two[1]

    def rows(self, dtype: Any) -> Rows:
        one, two = (
            side(a, b, t, dtype).matrix if whole is None else flattened(whole, dtype)
            for whole, a, b, t in self._sides()
        )
        matrix = kron(one * self.scale, two)
        return lambda rows: matrix[rows]

    def kronecker(self, dtype: Any) -> list[Product]:
        """w1 with the scale, and w2, each as a product."""
        one, two = (
            side(a, b, t, dtype) if whole is None else Product.of(flattened(whole, dtype))
            for whole, a, b, t in self._sides()
        )
        return [one._replace(b=self.scale * one.b), two]

    def factors(self, dtype: Any) -> Product | None:
        """(B_1 (x) B_2) (A_1 (x) A_2), for Kronecker's product keeps products."""
        one, two = self.kronecker(dtype)
        if one.rank * two.rank >= min(self.flat_shape):
            return None
        return Product(kron(one.b, two.b), kron(one.a, two.a))

    @staticmethod
    def peft_config(lora: Any, shared: Mapping[str, Any]) -> Any:
        return lycoris_config("LoKrConfig", lora, shared)

    @classmethod
    def collected(cls, tensors: Mapping[str, Array], alpha: float, scale: float) -> LowRank:
        """Readers take the scale for 1 where both factors are whole, so that it goes into w1."""
        if {"w1", "w2"} <= tensors.keys():
            return cls(**{**tensors, "w1": tensors["w1"] * scale}, alpha=1.0)
        return cls(**tensors, alpha=alpha)
