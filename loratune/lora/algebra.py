"""Matrices of low rank by their factors: norms, distances and the best approximation, without ever forming B A.

B = Q_B R_B and A^T = Q_A R_A (QR), so the singular values of B A are those of the small R_B R_A^T, and its singular
vectors are Q_B and Q_A times the small ones (Golub & Van Loan 2013, chapter 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.lora.kinds.layer import LowRank, Product

OVERSAMPLING = 10  # columns that the randomized SVD draws beyond the rank (Halko 2011, section 1.3)
POWER_ITERATIONS = 4
LARGEST = 1 << 28  # elements of a matrix that is formed whole; SDXL's largest layer has 2^25


class SVD(NamedTuple):
    """U diag(s) V: `u` is (m, k), `s` is (k,) and falls, `v` is (k, n), its rows the right singular vectors."""

    u: Tensor
    s: Tensor
    v: Tensor


def svd(product: Product) -> SVD:
    """The singular value decomposition of B A, at a cost of (m + n) r^2."""
    left, inner_left = torch.linalg.qr(product.b)
    right, inner_right = torch.linalg.qr(product.a.T)
    u, s, v = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    return SVD(left @ u, s, v @ right.T)


def singular_values(product: Product) -> Tensor:
    """Those of B A, falling; min(m, n, r) of them."""
    left, right = (torch.linalg.qr(side, mode="r").R for side in (product.b, product.a.T))
    return torch.linalg.svdvals(left @ right.T)


def truncate(parts: SVD, rank: int) -> Product:
    """The nearest matrix of at most this rank in Frobenius' norm (Eckart & Young 1936); sqrt(s) goes to each side."""
    root = parts.s[:rank].sqrt()
    return Product(parts.u[:, :rank] * root, root[:, None] * parts.v[:rank])


def rank_for(s: Tensor, share: float) -> int:
    """The smallest rank that keeps `share`, in (0, 1], of the squared Frobenius norm: of the sum of s^2; at least 1."""
    kept = s.double().square().cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1 if len(s) else 1


def tail(s: Tensor, rank: int) -> float:
    """The Frobenius norm of what truncation at a rank leaves out (Eckart & Young 1936)."""
    return float(s[rank:].double().norm())


def effective_rank(s: Tensor) -> float:
    """exp(H(p)) with p_i = s_i / sum s and Shannon's entropy H (Roy & Vetterli 2007); 0 for the zero matrix.

    r for r equal singular values, near 1 where one is far larger than the others.
    """
    total = float(s.sum())
    if total == 0:
        return 0.0
    p = s.double() / total
    return float(torch.special.entr(p).sum().exp())


def concatenate(terms: Sequence[tuple[float, Product]]) -> Product:
    """sum_i w_i B_i A_i as one product, the weights in B: exact, with the sum of the ranks."""
    sides = [weight * product.b for weight, product in terms], [product.a for _, product in terms]
    return Product(torch.cat(sides[0], 1), torch.cat(sides[1], 0))


def norm(product: Product) -> float:
    """Frobenius' norm of B A."""
    return float(singular_values(product).norm())


def distance(one: Product, other: Product) -> float:
    """Frobenius' norm of the difference; from the factors of the difference, so that nothing cancels."""
    return norm(concatenate([(1.0, one), (-1.0, other)]))


def inner(one: Product, other: Product) -> float:
    """sum_ij (B_1 A_1)_ij (B_2 A_2)_ij, as the sum over (B_1^T B_2) and (A_1 A_2^T) elementwise."""
    return float(((one.b.T @ other.b) * (one.a @ other.a.T)).sum())


def spectrum(layer: LowRank, dtype: torch.dtype = torch.float64) -> Tensor:
    """The singular values of what a layer adds, without DoRA's magnitude, falling.

    Those of a Kronecker product are all products of those of its factors.
    """
    if not (sides := layer.kronecker(dtype)):
        return singular_values(factors(layer, dtype))
    values = singular_values(sides[0])
    for one in sides[1:]:
        values = torch.outer(values, singular_values(one)).flatten()
    return values.sort(descending=True).values


def factors(layer: LowRank, dtype: torch.dtype = torch.float64) -> Product:
    """What a layer adds, without DoRA's magnitude, as B A with the scale in B; B A is (out, in k k).

    Where a kind's own factors are no smaller than the matrix, the matrix itself is taken.

    Raises:
        UserError: that is larger than any base's.
    """
    if (own := layer.factors(dtype)) is not None:
        return own
    outer, inner = layer.flat_shape
    if outer * inner > LARGEST:
        raise UserError(f"a {layer.kind} layer stands for a matrix of {outer} x {inner}; no base has such a layer")
    return Product.of(layer.matrix(dtype))


def randomized_svd(matrix: Tensor, rank: int, seed: int = 0) -> SVD:
    """The leading singular triplets: exactly for small matrices, else by random projection with power iterations.

    Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1, the basis made orthonormal at every step.

    Args:
        matrix: (m, n).
        rank: how many are asked for; min(m, n) at most.
        seed: of the projection; the same seed gives the same result.
    """
    drawn = rank + OVERSAMPLING
    if 2 * drawn >= min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return SVD(u[:, :rank], s[:rank], v[:rank])
    generator = torch.Generator(matrix.device).manual_seed(seed)
    start = torch.randn(matrix.shape[1], drawn, dtype=matrix.dtype, device=matrix.device, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return SVD((basis @ u)[:, :rank], s[:rank], v[:rank])
