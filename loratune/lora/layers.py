"""What a LoRA file holds for one layer, and the change of W_0 that it stands for: LoRA, LoHa, LoKr, with DoRA."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor


class LowRank:
    """A change of W_0 from few numbers; `change` adds what depends on W_0 itself (DoRA).

    Matrices stand for convolutions too: (out, in, k, k) is (out, in k k), as W_0 flattened from its second
    dimension.

    Every kind has `alpha`, and `magnitude`: m of DoRA (Liu 2024, eq. 5), broadcast against
    W_0: (out, 1, ...), a norm for each output, or (1, in, ...), for each input, as older LyCORIS has it; None for no
    DoRA.
    """

    kind: ClassVar[str] = ""
    alpha: float
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        """r, by which alpha is divided."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def flat_shape(self) -> tuple[int, int]:
        """(out, in k k) of the W_0 that this was made for."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """What people call it."""
        return f"DoRA of {self.kind}" if self.magnitude is not None else self.kind

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Delta W without the magnitude, scaled, as (out, in k k), computed in `dtype`."""
        raise NotImplementedError

    def change(self, w: Tensor) -> Tensor:
        """What is added to W_0 at weight 1, in W_0's dtype and shape: Delta W, or m V / ||V|| - W_0 for DoRA.

        V = W_0 + Delta W; the norm is over all dimensions but the magnitude's own (Liu 2024, eq. 5).
        """
        delta = self.matrix(w.dtype).to(w.device).reshape(w.shape)
        if self.magnitude is None:
            return delta
        v = w + delta
        m = self.magnitude.to(w).reshape(*self.magnitude.shape, *[1] * (w.dim() - self.magnitude.dim()))
        over = [axis for axis in range(w.dim()) if m.shape[axis] == 1]
        norm = torch.linalg.vector_norm(v, dim=over, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return v * (m / norm) - w

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of its fields, without those that are not there."""
        named = {one.name: getattr(self, one.name) for one in fields(cast(Any, self))}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def __eq__(self, other: object) -> bool:
        """Whether both are the same bit for bit, dtypes included."""
        if type(self) is not type(other) or not isinstance(other, LowRank):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        return (
            self.alpha == other.alpha
            and mine.keys() == theirs.keys()
            and all(a.dtype == theirs[key].dtype and torch.equal(a, theirs[key]) for key, a in mine.items())
        )


def _need(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


def _check_factors(a: Tensor, b: Tensor, t: Tensor | None, told: str) -> None:
    matrices = a.dim() == 2 and b.dim() in ((2,) if t is not None else (2, 4))
    _need(matrices and 0 not in (*a.shape, *b.shape), f"not matrices: {told}")
    fits = a.shape[1] == b.shape[0] if t is None else t.dim() == 4 and t.shape[:2] == (a.shape[0], b.shape[0])
    _need(fits, f"the ranks do not fit: {told}")


def _sizes(**tensors: Tensor | None) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor is not None)


@dataclass(frozen=True, eq=False)
class LoRALayer(LowRank):
    """B and A beside one W_0: h = W_0 x + (alpha / r) B A x (Hu 2021, section 4.1); LoCon beside convolutions.

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
    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None
    magnitude: Tensor | None = None

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
            _need(fits, f"mid {mid} is not (r, r, k, k) beside down {down}")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def flat_shape(self) -> tuple[int, int]:
        kernel = 1 if self.mid is None else self.mid.shape[2] * self.mid.shape[3]
        return self.up.shape[0], self.down[0].numel() * kernel

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        up, down = self.up.to(dtype).flatten(1), self.down.to(dtype).flatten(1)
        if self.mid is not None:
            down = torch.einsum("ijkl,jn->inkl", self.mid.to(dtype), down).flatten(1)
        return (self.scale * up) @ down


@dataclass(frozen=True, eq=False)
class LoHaLayer(LowRank):
    """Delta W = (alpha / r) (w1_a w1_b) * (w2_a w2_b), elementwise (Hyeon-Woo 2022, FedPara, eq. 1; LyCORIS).

    Args:
        w1_a: (out, r); with t1 (r, out).
        w1_b: (r, in k k); with t1 (r, in).
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
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        told = _sizes(w1_a=self.w1_a, w1_b=self.w1_b, w2_a=self.w2_a, w2_b=self.w2_b, t1=self.t1, t2=self.t2)
        _need((self.t1 is None) == (self.t2 is None), f"only one of t1 and t2 is there: {told}")
        sides: list[tuple[int, ...]] = []
        for a, b, t in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)):
            _check_factors(a, b, t, told)
            sides.append((a.shape[0], b[0].numel()) if t is None else (a.shape[1], b.shape[1], *t.shape[2:]))
        _need(sides[0] == sides[1], f"the two products have different shapes: {told}")

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def flat_shape(self) -> tuple[int, int]:
        if self.t1 is None:
            return self.w1_a.shape[0], self.w1_b[0].numel()
        return self.w1_a.shape[1], self.w1_b.shape[1] * self.t1.shape[2] * self.t1.shape[3]

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        one = _product(self.w1_a, self.w1_b, self.t1, dtype)
        return one.mul_(self.scale).mul_(_product(self.w2_a, self.w2_b, self.t2, dtype))


@dataclass(frozen=True, eq=False)
class LoKrLayer(LowRank):
    """Delta W = (alpha / r) w1 (x) w2, Kronecker's product (Edalati 2022; LyCORIS); w1 and w2 whole or factored.

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
    alpha: float
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        told = _sizes(**self.tensors())
        for whole, a, b, t in ((self.w1, self.w1_a, self.w1_b, None), (self.w2, self.w2_a, self.w2_b, self.t2)):
            if whole is not None:
                _need(a is None and b is None and t is None, f"both whole and factored: {told}")
                _need(whole.dim() in (2, 4) and 0 not in whole.shape, f"not a matrix: {told}")
                continue
            if a is None or b is None:
                raise ValueError(f"a factor is missing: {told}")
            _check_factors(a, b, t, told)

    @property
    def whole(self) -> bool:
        """Whether both factors are, so that there is no r."""
        return self.w1 is not None and self.w2 is not None

    @property
    def rank(self) -> int:
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return 1 if factor is None else factor.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.whole else self.alpha / self.rank

    @property
    def flat_shape(self) -> tuple[int, int]:
        one, two = (matrix.shape for matrix in self._factors(torch.float32, meta=True))
        return one[0] * two[0], one[1] * two[1]

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        one, two = self._factors(dtype)
        return torch.kron(one * self.scale, two)

    def _factors(self, dtype: torch.dtype, meta: bool = False) -> tuple[Tensor, Tensor]:
        """w1 (o1, i1) and w2 (o2, i2 k k); on the meta device for the shapes alone."""
        held = {name: value.to("meta") if meta else value for name, value in self.tensors().items()}
        made = []
        for name in ("w1", "w2"):
            if name in held:
                made.append(held[name].to(dtype).flatten(1))
            else:
                made.append(_product(held[f"{name}_a"], held[f"{name}_b"], held.get(f"t{name[1]}"), dtype))
        return made[0], made[1]


def _product(a: Tensor, b: Tensor, t: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a b as (out, in k k), or the Tucker form's sum over both ranks of its kernel."""
    if t is None:
        return a.to(dtype) @ b.to(dtype).flatten(1)
    return torch.einsum("ijkl,ip,jn->pnkl", t.to(dtype), a.to(dtype), b.to(dtype)).flatten(1)
