"""A change of one layer's W_0 from few numbers, as files hold it: what all kinds of adapter share.

The arithmetic is that of torch's tensors and of numpy's arrays alike, so that a merge needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

Array: TypeAlias = Any
"""torch's tensor or numpy's array; as a field also `Stored` or a header's entry, of which there are shapes alone."""
Rows: TypeAlias = Callable[[slice], Array]
"""Some rows of a matrix (out, in k k)."""


class Product(NamedTuple):
    """The matrix B A of (m, n): `b` is (m, r), `a` is (r, n)."""

    b: Array
    a: Array

    @property
    def rank(self) -> int:
        """r; the matrix' own rank may be less."""
        return int(self.b.shape[1])

    @property
    def matrix(self) -> Array:
        """B A, (m, n)."""
        return self.b @ self.a

    @classmethod
    def of(cls, matrix: Array) -> Product:
        """A matrix as the product of itself and the identity, on its shorter side."""
        import torch

        eye = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
        return cls(eye, matrix) if matrix.shape[0] <= matrix.shape[1] else cls(matrix, eye)


class LowRank:
    """A change of W_0; `change` adds what depends on W_0 itself (DoRA).

    Matrices stand for convolutions too: (out, in, k, k) is (out, in k k), as W_0 flattened from its second
    dimension. A kind is a frozen dataclass of its tensors, and a row in `kinds.known.KINDS`.

    Every kind has `alpha`, and `magnitude`: m of DoRA (Liu 2024, eq. 5), broadcast against
    W_0: (out, 1, ...), a norm for each output, or (1, in, ...), for each input, as older LyCORIS has it; None for no
    DoRA.
    """

    kind: ClassVar[str] = ""  # what people call it
    # By `lora.type` in a recipe: what makes such layers, as sd-scripts' metadata call it, and its arguments.
    makers: ClassVar[Mapping[str, tuple[str, dict[str, str] | None]]] = {}
    # The tensors by field: how files call them where their format has no name of its own, and peft's attributes.
    suffixes: ClassVar[Mapping[str, str]] = {}
    attributes: ClassVar[Mapping[str, str]] = {}
    alpha: float
    magnitude: Array | None

    @property
    def rank(self) -> int:
        """r, by which alpha is divided; 1 where there is none."""
        raise NotImplementedError

    @property
    def ranked(self) -> bool:
        """Whether there is an r."""
        return True

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def flat_shape(self) -> tuple[int, int]:
        """(out, in k k) of the W_0 that this was made for."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(out, in) or (out, in, k, k) of that W_0, where the tensors tell the kernel."""
        return None

    @property
    def name(self) -> str:
        """What people call it."""
        return f"DoRA of {self.kind}" if self.magnitude is not None else self.kind

    def matrix(self, dtype: Any = None) -> Array:
        """Delta W without the magnitude, scaled, as (out, in k k), computed in `dtype` (float32 by default)."""
        return self.rows(_float32() if dtype is None else dtype)(slice(None))

    def rows(self, dtype: Any) -> Rows:
        """Some rows of `matrix` at a time."""
        raise NotImplementedError

    def factors(self, dtype: Any) -> Product | None:
        """Delta W without the magnitude as B A, the scale in B; None where such factors are larger than the matrix."""
        raise NotImplementedError

    def kronecker(self, dtype: Any) -> list[Product]:
        """Matrices whose Kronecker product is Delta W without the magnitude; [] where it is none of smaller ones."""
        return []

    def change(self, w: Array) -> Array:
        """What is added to W_0 at weight 1, in W_0's dtype and shape: Delta W, or m V / ||V|| - W_0 for DoRA.

        V = W_0 + Delta W; the norm is over all dimensions but the magnitude's own (Liu 2024, eq. 5).
        """
        delta = self.matrix(w.dtype).reshape(w.shape)
        if self.magnitude is None:
            return delta
        v = delta + w
        m = wide(self.magnitude, w.dtype)
        m = m.reshape(*m.shape, *[1] * (len(w.shape) - len(m.shape)))
        over = tuple(axis for axis in range(len(w.shape)) if m.shape[axis] == 1)
        norm = (v * v).sum(axis=over, keepdims=True) ** 0.5
        return v * (m / norm.clip(min=1e-38)) - w

    def tensors(self) -> dict[str, Array]:
        """Its tensors by the names of its fields, without those that are not there."""
        named = {one.name: getattr(self, one.name) for one in fields(cast(Any, self)) if one.name != "alpha"}
        return {name: value for name, value in named.items() if value is not None}

    def __eq__(self, other: object) -> bool:
        """Whether both are the same bit for bit, dtypes included."""
        if type(self) is not type(other) or not isinstance(other, LowRank):
            return NotImplemented
        import torch

        mine, theirs = self.tensors(), other.tensors()
        return (
            self.alpha == other.alpha
            and mine.keys() == theirs.keys()
            and all(a.dtype == theirs[key].dtype and torch.equal(a, theirs[key]) for key, a in mine.items())
        )

    @staticmethod
    def peft_config(lora: Any, shared: Mapping[str, Any]) -> Any:
        """The configuration of peft that makes this kind.

        Args:
            lora: how W_0 is adapted, an `inject.LoRA`.
            shared: r, target_modules and the patterns of ranks and alphas.
        """
        raise NotImplementedError

    @classmethod
    def collected(cls, tensors: Mapping[str, Array], alpha: float, scale: float) -> LowRank:
        """A layer from peft's parameters by field, where Delta W is `scale` times their product."""
        return cast(Any, cls)(**tensors, alpha=alpha)


def _float32() -> Any:
    import torch

    return torch.float32


def wide(value: Array, dtype: Any) -> Array:
    """A tensor's numbers in another dtype."""
    return value.wide(dtype) if hasattr(value, "wide") else value.to(dtype)


def flattened(value: Array, dtype: Any) -> Array:
    """(m, n k k) of (m, n) or (m, n, k, k), in a dtype."""
    return wide(value, dtype).reshape(value.shape[0], -1)


def columns(value: Array) -> int:
    """n k k of (m, n, k, k)."""
    return math.prod(value.shape[1:])


def folded(kernel: Array, a: Array) -> Array:
    """The kernel of a Tucker-decomposed convolution in A: sum_j T_ijkl A_jn, as (r, n k k).

    Args:
        kernel: T, (r, r, k, k).
        a: A, (r, n).
    """
    return (kernel.swapaxes(1, 3) @ a).swapaxes(1, 3).reshape(kernel.shape[0], -1)


def side(a: Array, b: Array, t: Array | None, dtype: Any) -> Product:
    """One product of LyCORIS' kinds, whose files call B a and A b: a b, or of the Tucker form a^T (t b).

    Args:
        a: (out, r), or (out, r, 1, 1); with t (r, out).
        b: (r, in k k) or (r, in, k, k); with t (r, in).
        t: (r, r, k, k), or None.
        dtype: to compute in.
    """
    if t is None:
        return Product(flattened(a, dtype), flattened(b, dtype))
    return Product(flattened(a, dtype).T, folded(wide(t, dtype), flattened(b, dtype)))


def side_shape(a: Array, b: Array, t: Array | None) -> tuple[int, int]:
    """(out, in k k) of `side`."""
    if t is None:
        return a.shape[0], columns(b)
    return columns(a), columns(b) * math.prod(t.shape[2:])


def need(fits: bool, message: str) -> None:
    """Check a shape.

    Raises:
        ValueError: it does not fit.
    """
    if not fits:
        raise ValueError(message)


def check_side(a: Array, b: Array, t: Array | None, shapes: str) -> None:
    """Check the shapes of `side`.

    Raises:
        ValueError: they do not fit one another.
    """
    square = a.shape[2:] in ((), (1, 1))
    matrices = len(a.shape) in (2, 4) and square and len(b.shape) in ((2,) if t is not None else (2, 4))
    need(matrices and 0 not in (*a.shape, *b.shape), f"not matrices: {shapes}")
    if t is None:
        need(a.shape[1] == b.shape[0], f"the ranks do not fit: {shapes}")
    else:
        ranks = (a.shape[0], b.shape[0])
        need(len(t.shape) == 4 and tuple(t.shape[:2]) == ranks, f"the ranks do not fit: {shapes}")


def sizes(**tensors: Array | None) -> str:
    """Shapes by name, for messages."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor is not None)


def kron(one: Array, two: Array) -> Array:
    """Kronecker's product of matrices: the blocks one_ij two."""
    shape = one.shape[0] * two.shape[0], one.shape[1] * two.shape[1]
    return (one[:, None, :, None] * two[None, :, None, :]).reshape(*shape)


def lycoris_config(name: str, lora: Any, shared: Mapping[str, Any]) -> Any:
    """One of peft's configurations of LyCORIS' kinds."""
    import peft

    return getattr(peft, name)(**shared, alpha=lora.scaled_alpha, rank_dropout=lora.dropout)


def missing(kind: type[LowRank], given: Sequence[str]) -> str | None:
    """A field without which a layer of this kind is not whole and that is not among those given, or None."""
    needed = [one.name for one in fields(cast(Any, kind)) if one.default is not None]
    return next((name for name in needed if name not in ("alpha", *given)), None)
