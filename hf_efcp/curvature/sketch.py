"""Frequent directions: a matrix of decayed gradient products in `k` directions and one number.

Sketchy, arXiv 2302.03764. All functions take any number of leading batch dimensions, form no d×d matrix, and
change nothing in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 8  # columns of the block power step besides the kept directions
COLD_POWERS = 8  # power steps of the first update, which starts from columns of the gradient; then half of the last's
COLD_SIDE = 256  # of a Gram matrix up to which the first update is exact instead


class Sketch(NamedTuple):
    """`C = U diag(s²) Uᵀ` with `C ⪯ M ⪯ C + ρI` for `M = Σ β₂^{T−t} G_t G_tᵀ`.

    Attributes:
        basis: `U`, (…, d, k); orthonormal columns, zero where nothing is kept.
        singular_values: `s`, (…, k) float64, descending, in units of gradient.
        tail: `ρ`, (…,) float64, the escaped mass, in units of squared gradient.
    """

    basis: Tensor
    singular_values: Tensor
    tail: Tensor


def exact_update(sketch: Sketch, gradient: Tensor, beta2: float, tail_decay: float) -> Sketch:
    """The sketch of `β₂(C + ρI) + GGᵀ` by the eigenvalues of a Gram matrix of side min(d, k + b), in float64.

    The singular values `σ` of `X = [√β₂·U diag(s), G]` give `s² = (σ − σ_{k+1})(σ + σ_{k+1})` and
    `ρ ← tail_decay·ρ + σ²_{k+1}`. Float32 would lose the orthogonality of the directions below 1e-3 of the largest.

    Args:
        sketch: the last one; all zero at the start.
        gradient: `G`, (…, d, b), of the dtype to compute with: its rounding is the noise that is no direction.
        beta2: β₂ in (0, 1]; 1 sums.
        tail_decay: β₂, or √β₂ where the published code is to be compared with.
    """
    basis, s, _ = sketch
    d, k = basis.shape[-2:]
    columns = torch.cat([basis.double() * (beta2**0.5 * s)[..., None, :], gradient.double()], -1)
    is_wide = columns.shape[-1] > d
    gram = columns @ columns.mT if is_wide else columns.mT @ columns
    values, vectors = top_eigenpairs(gram, k)
    kept, cut, positive = deflate(values, k, max(columns.shape[-2:]), gradient.dtype)
    if not is_wide:
        vectors = columns @ (vectors / torch.where(positive, values[..., :k], 1).sqrt()[..., None, :])
    return _keep_finite(sketch, vectors * positive[..., None, :], kept, sketch.tail * tail_decay + cut)


def subspace_update(
    sketch: Sketch, gradient: Tensor, beta2: float, tail_decay: float, number: int
) -> tuple[Sketch, Tensor]:
    """The same to the accuracy of one block power step that starts from the last directions.

    Costs three products of `G` with k + 8 columns and needs no more memory than they do. Directions not yet in use
    start from columns of the gradient. The first updates, whose gradient is as large as all before it, take more power
    steps, and small ones are exact.

    The bound `C + ρI ⪰ M` holds to rounding on sides up to `COLD_SIDE`, and where the spectrum falls fast. On larger
    sides ρ grows by the largest eigenvalue that the step has found outside of the k, below the largest there is: with
    400 directions, of which 16 are kept, the bound misses by 5 to 8 % of M's largest eigenvalue at the first update of
    a flat spectrum, and no more after the second where gradients change. One gradient again and again adds to it at
    each update, 13 % after eight. Take `exact_update` where the bound is needed.

    Args:
        number: of updates before; it also seeds the random columns, so that a resumed run draws the same.

    Returns:
        the sketch, and `UᵀG` (…, k, b), which comes for free.
    """
    basis, s = sketch.basis.to(gradient.dtype), sketch.singular_values
    d, k = basis.shape[-2:]
    if number == 0 and min(d, k + gradient.shape[-1]) <= COLD_SIDE:
        updated = exact_update(sketch, gradient, beta2, tail_decay)
        return updated, updated.basis.to(gradient.dtype).mT @ gradient
    squares = beta2 * s.square()
    scale = squares[..., 0] + _square_norm(gradient)
    scale = torch.where(scale > 0, scale, 1)[..., None, None]
    unit = scale.rsqrt().to(gradient.dtype)
    q = _start(basis, s, gradient, unit, number)
    # XXᵀq in units of `scale`, so that tiny and huge gradients neither vanish nor overflow. Rows first: on the CPU a
    # product of few rows with G or Gᵀ is up to a fifth faster than one of G or Gᵀ with few columns.
    for _ in range(max(1, COLD_POWERS >> number)):
        power = basis @ ((squares[..., None] / scale).to(basis.dtype) * (basis.mT @ q))
        q = torch.linalg.qr(power + ((q.mT @ gradient * unit) @ gradient.mT * unit).mT).Q
    rows = q.mT @ gradient
    weighted = squares.sqrt()[..., None] * (basis.mT @ q).double()
    wide = rows.double()
    values, vectors = top_eigenpairs(weighted.mT @ weighted + wide @ wide.mT, k)
    kept, cut, positive = deflate(values, k, max(gradient.shape[-2:]), gradient.dtype)
    vectors = (vectors * positive[..., None, :]).to(gradient.dtype)
    updated = _keep_finite(sketch, q @ vectors, kept, sketch.tail * tail_decay + cut)
    return updated, vectors.mT @ rows


def is_cheap_exactly(d: int, b: int, k: int) -> bool:
    """Whether the exact update is about as cheap as the power step: full factors, vectors, LoRA's shapes."""
    return k >= d or min(d, k + b) <= 2 * (k + OVERSAMPLING)


def _start(basis: Tensor, s: Tensor, gradient: Tensor, unit: Tensor, seed: int) -> Tensor:
    """Columns (…, d, min(d, k + 8)) that the power step multiplies: the directions, and mixed columns of the gradient.

    Each mixes 64 columns drawn at random. A product of the whole gradient with 8 random columns is no better
    for the power step that follows, and took a fifth of the update's time.
    """
    d, b = gradient.shape[-2:]
    k = basis.shape[-1]
    extra = min(OVERSAMPLING, d - k)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(b, (k + 8 * extra,), generator=generator).to(gradient.device)
    mix = torch.randn(8 * extra, extra, generator=generator).to(gradient)
    columns = _columns(gradient, drawn) * unit
    start = torch.where((s > 0)[..., None, :], basis, columns[..., :k])
    return torch.cat([start, columns[..., k:] @ mix], -1)


def _columns(matrix: Tensor, drawn: Tensor) -> Tensor:
    """`matrix[..., drawn]`, by whole rows of memory where the matrix is a transposed view."""
    if matrix.mT.is_contiguous():
        return matrix.mT.index_select(-2, drawn).mT
    return matrix.index_select(-1, drawn)


def top_eigenpairs(gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k + 1 largest eigenvalues of (…, n, n), descending, and eigenvectors of the k largest.

    On the CPU: the matrices are small, and batched `eigh` on CUDA is slower by an order (pytorch#174674). An update
    therefore waits for the device; a step without one does not.
    """
    home = gram.device
    finite = gram.isfinite().all(-1).all(-1)
    gram = torch.where(finite[..., None, None], gram, 0).to("cpu")
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # no convergence: as good as not finite, and the caller keeps its old sketch
        values, vectors = gram.new_full(gram.shape[:-1], torch.nan), torch.zeros_like(gram)
    values = torch.where(finite[..., None], values.to(home), torch.nan)
    return values.flip(-1)[..., : k + 1], vectors[..., -k:].flip(-1).to(home)


def deflate(values: Tensor, k: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`s` of the kept directions, `σ²_{k+1}`, and which of the kept are more than rounding.

    Singular values of `size`-long rounded vectors reach √size·eps of the largest; the Gram matrix's own rounding
    is that of float64. Counted as directions they would be amplified by `ε^{-1/p}`.
    """
    eps = max(torch.finfo(dtype).eps ** 2, torch.finfo(torch.float64).eps)
    sigma = torch.where(values > size * eps * values[..., :1], values, 0).sqrt()
    sigma = torch.where(values.isnan(), values, sigma)
    cut = sigma[..., k] if sigma.shape[-1] > k else torch.zeros_like(sigma[..., 0])
    kept = sigma[..., :k]
    s = ((kept - cut[..., None]) * (kept + cut[..., None])).sqrt()
    return s, cut.square(), kept > 0


def _keep_finite(old: Sketch, basis: Tensor, s: Tensor, tail: Tensor) -> Sketch:
    """The new sketch, the old one where the new is not finite."""
    finite = basis.sum((-2, -1)).isfinite() & s.isfinite().all(-1) & tail.isfinite()
    return Sketch(
        torch.where(finite[..., None, None], basis.to(old.basis.dtype), old.basis),
        torch.where(finite[..., None], s, old.singular_values),
        torch.where(finite, tail, old.tail),
    )


def _square_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1)).double().square()
