"""The m×m side of the window family: from a Gram matrix to the weights of its rows. All in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_eigenvalue(gram: Tensor) -> Tensor:
    """Mean eigenvalue of `GGᵀ/m`, (…); `gram` is `GGᵀ`, (…, m, m)."""
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1) / gram.shape[-1]


def cancels(gram: Tensor, coefficients: Tensor, row: Tensor, limit: float) -> bool:
    """Whether the terms of `Gᵀc` are together more than `limit` times as long as their sum, in any system.

    A sum in float32 has `Σ|c_i|·|g_i| / |Gᵀc|` times its rounding error. Nearly parallel rows and little damping make
    that large. `|Gᵀc| ≥ |g_row·Gᵀc|/|g_row|`, so one row of the Gram matrix mostly shows that it is not, in O(m);
    only where that does not suffice is the whole matrix read. The host waits for the answer.

    Args:
        gram: `GGᵀ`, (…, m, m) float64.
        coefficients: (…, m) float64.
        row: () int64, any row; best one along which the sum is long.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    terms = (coefficients.abs() * lengths).sum(-1)
    along = (coefficients * gram.select(-2, row)).sum(-1).abs()  # pyright: ignore[reportArgumentType]
    if (terms * lengths.select(-1, row) <= limit * along).all():  # pyright: ignore[reportArgumentType]
        return False
    squared = (coefficients * (gram @ coefficients[..., None]).squeeze(-1)).sum(-1)
    return bool((terms > limit * squared.clamp_min(0).sqrt()).any())


def length_ratio(gram: Tensor, coefficients: Tensor, dots: Tensor, squares: Tensor) -> Tensor:
    """`|x| / |x + Gᵀc|` without either vector, (…) float64; 1 where x is zero.

    Args:
        gram, coefficients, dots: `GGᵀ` (…, m, m), `c` (…, m) and `G x` (…, m), float64.
        squares: `|x|²`, (…) float64. The ratio is at most 1000: beyond, rounding is what is left of the sum.
    """
    through = (coefficients * (gram @ coefficients[..., None]).squeeze(-1)).sum(-1)
    squared = squares + 2 * (coefficients * dots).sum(-1) + through
    ratio = (squares / squared.clamp_min(1e-6 * squares)).sqrt()
    return torch.where(squares > 0, ratio, torch.ones_like(ratio))


def woodbury_solve(gram: Tensor, rhs: Tensor, damping: Tensor | float) -> Tensor:
    """`(mλI + GGᵀ)⁻¹ rhs`, the inner system of `(λI + GᵀG/m)⁻¹`.

    With `rhs = m·e_j` these are the weights `c` with `(λI + GᵀG/m)⁻¹ g_j = Gᵀc`, free of the cancellation in
    `(x − Gᵀ(mλI + GGᵀ)⁻¹Gx)/λ`, which for any `x` is the general form (M-FAC, arXiv 2107.03356, section 3).

    Args:
        gram: `GGᵀ`, (…, m, m) float64, positive semi-definite.
        rhs: (…, m) float64.
        damping: λ > 0, a number or (…), in units of squared gradient.

    Returns:
        (…, m) float64. Raises nothing and does not wait for the device: the system is positive definite.
    """
    shift = torch.as_tensor(gram.shape[-1] * damping, dtype=gram.dtype, device=gram.device)
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    factor = torch.linalg.cholesky_ex(shifted).L
    return torch.cholesky_solve(rhs[..., None], factor).squeeze(-1)


def spectral_weights(
    gram: Tensor, row: Tensor, eps: Tensor | float, jitter: float, basis: Tensor | None = None
) -> Tensor:
    """Weights `c` with `((GᵀG)^½ + εI)⁻¹ g_j = Gᵀc`, free of cancellation (GGT, arXiv 1806.02958).

    With `K = GGᵀ + jitter·I = V s² Vᵀ` they are `V w(s) Vᵀe_j`,
    `w = 1/(s + ε) + (1/ε − 1/(s + ε))·jitter/s²`, the published rule in exact arithmetic.

    Args:
        gram: `GGᵀ`, (…, m, m) float64, without jitter.
        row: () int64, j.
        eps: ε > 0, a number or (…), in units of gradient.
        jitter: added to the diagonal, in units of squared gradient; 0 for none.
        basis: V of an earlier `K`, (…, m, m) orthonormal, from `eigenvectors`; `s²` are then the Rayleigh quotients
            of its columns, and no eigendecomposition is taken.

    Returns:
        (…, m) float64.
    """
    squared, vectors = _spectrum(gram, jitter, basis)
    eps = torch.as_tensor(eps, dtype=gram.dtype, device=gram.device)[..., None]
    inverse = 1 / (squared.sqrt() + eps)
    weights = inverse
    if jitter:
        weights = inverse + (1 / eps - inverse) * jitter / squared
    return (vectors * (weights * vectors.index_select(-2, row[None]).squeeze(-2))[..., None, :]).sum(-1)


def spectral_solve(
    gram: Tensor, dots: Tensor, eps: Tensor | float, jitter: float, basis: Tensor | None = None
) -> Tensor:
    """Weights `c` with `((GᵀG)^½ + εI)⁻¹ x = x/ε + Gᵀc`, for any `x`.

    Args:
        gram, eps, jitter, basis: as in `spectral_weights`.
        dots: `G x`, (…, m) float64.

    Returns:
        (…, m) float64; directions in which `G` vanishes to rounding get no weight.
    """
    squared, vectors = _spectrum(gram, jitter, basis)
    eps = torch.as_tensor(eps, dtype=gram.dtype, device=gram.device)[..., None]
    root = squared.sqrt()
    # (1/(s + ε) − 1/ε)/s², without the difference of two near numbers
    weights = -1 / (eps * root * (root + eps))
    weights = torch.where(
        squared > gram.shape[-1] * 1e-15 * squared.amax(-1, keepdim=True), weights, torch.zeros_like(weights)
    )
    return (vectors @ (weights[..., None] * (vectors.mT @ dots[..., None]))).squeeze(-1)


def eigenvectors(gram: Tensor) -> Tensor:
    """Orthonormal eigenvectors of (…, m, m), as columns; jitter would not change them. On CUDA the host waits."""
    return torch.linalg.eigh(gram).eigenvectors


def _spectrum(gram: Tensor, jitter: float, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    if basis is not None:
        return (basis * (gram @ basis)).sum(-2).add_(jitter).clamp_min(jitter), basis
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(jitter)
    squared, vectors = torch.linalg.eigh(shifted)
    return squared.clamp_min(jitter), vectors


class SlidingInverse:
    """`P = (mλI + GGᵀ)⁻¹` kept up to date while single rows of `G` change.

    Changing row j changes row and column j of the Gram matrix, a symmetric rank-2 update, so `P` follows in
    O(m²) where a fresh factor costs O(m³): at m = 1024 on one core 0.9 ms against 19 ms. Every solution is
    refined once against the Gram matrix itself; where its residual shows that `P` drifted, `P` is rebuilt.
    Reading that residual makes the host wait, so this is for the CPU; elsewhere use `woodbury_solve`.

    Args:
        inverse: (m, m) float64, the state that lives between steps; updated in place.
        damping: λ, in units of squared gradient.
    """

    tolerance = 1e-9

    def __init__(self, inverse: Tensor, damping: float):
        self.inverse = inverse
        self.shift = len(inverse) * damping

    def reset(self, gram: Tensor) -> None:
        """Rebuild from the Gram matrix."""
        shifted = gram.clone()
        shifted.diagonal().add_(self.shift)
        self.inverse.copy_(torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L))

    def replace_row(self, row: Tensor, change: Tensor) -> None:
        """Follow `gram[row, :] += change` and `gram[:, row] += change` (the diagonal entry changes once).

        Args:
            row: () int64.
            change: (m,) float64.
        """
        # A' = A + e dᵀ + d eᵀ with d = change, its own entry halved. With U = P[e, d] the inverse is
        # P − U S⁻¹ Uᵀ, S = [[e·Pe, 1 + e·Pd], [1 + e·Pd, d·Pd]]: Woodbury for E = [e, d], C = [[0, 1], [1, 0]].
        half = change.clone()
        half[row] *= 0.5
        u = torch.stack((self.inverse[row], self.inverse @ half), dim=1)
        corner = u[row, 1] + 1
        small = torch.stack((torch.stack((u[row, 0], corner)), torch.stack((corner, half @ u[:, 1]))))
        self.inverse.addmm_(u, torch.linalg.solve(small, u.T), alpha=-1)

    def solve(self, gram: Tensor, rhs: Tensor, row: Tensor | None = None) -> Tensor:
        """`(mλI + gram)⁻¹ rhs`, (m,), with one step of iterative refinement.

        `row`, () int64, is the place of the only entry of `rhs`, if it has but one: its first solution is a row of `P`.
        """
        solution, error = self._refine(gram, rhs, row)
        if not error <= self.tolerance * rhs.norm():  # also where the inverse is lost in NaN
            self.reset(gram)
            solution, _ = self._refine(gram, rhs, row)
        return solution

    def _refine(self, gram: Tensor, rhs: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor]:
        guess = self.inverse @ rhs if row is None else self.inverse[row] * rhs[row]
        residual = rhs - gram @ guess - self.shift * guess
        return guess + self.inverse @ residual, residual.norm()
