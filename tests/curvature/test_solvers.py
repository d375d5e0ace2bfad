"""The m×m systems against general solvers and the dense definitions."""

import oracles
import pytest
import torch

from hf_efcp.curvature.solvers import (
    SlidingInverse,
    cancels,
    mean_eigenvalue,
    spectral_solve,
    spectral_weights,
    woodbury_solve,
)


def rows_of(m, d=60, *, noise=0.3, seed=0):
    """Correlated rows of norm near 1, (m, d)."""
    generator = torch.Generator().manual_seed(seed)
    common, own = torch.randn(d, generator=generator), torch.randn(m, d, generator=generator)
    return ((common + noise * own) / d**0.5).double()


@pytest.mark.parametrize("damping", [1e-7, 1e-3, 10.0])
def test_woodbury_is_the_dense_inverse_for_the_newest_row_and_for_any_vector(damping):
    rows, x = rows_of(16), rows_of(1, seed=1)[0]
    unit = torch.zeros(16, dtype=torch.float64)
    unit[5] = 16.0
    for ours, reference in (
        (rows.T @ woodbury_solve(rows @ rows.T, unit, damping), oracles.dense_inverse(rows, rows[5], damping)),
        (
            (x - rows.T @ woodbury_solve(rows @ rows.T, rows @ x, damping)) / damping,
            oracles.dense_inverse(rows, x, damping),
        ),
    ):
        assert (ours - reference).norm() <= 1e-6 * reference.norm()


def test_mean_eigenvalue_is_that_of_the_scaled_gram():
    rows = rows_of(9)
    torch.testing.assert_close(mean_eigenvalue(rows @ rows.T), torch.linalg.eigvalsh(rows @ rows.T / 9).mean())


def test_systems_are_solved_one_by_one_in_a_batch():
    batch = torch.stack([rows_of(7, seed=s) for s in range(3)])
    grams, rhs = batch @ batch.mT, batch.sum(-1)
    dampings = torch.tensor([1e-3, 1.0, 1e-5], dtype=torch.float64)
    solved = woodbury_solve(grams, rhs, dampings)
    for i in range(3):
        torch.testing.assert_close(solved[i], woodbury_solve(grams[i], rhs[i], dampings[i]))


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.3, 10.0])
@pytest.mark.parametrize("damping", [1e-7, 1e-2])
def test_cancellation_is_seen_from_the_gram_matrix(noise, damping):
    """`Σ|c_i|·|g_i|` against `|Gᵀc|` from the rows themselves; in a batch, the worst system counts."""
    batch = torch.stack([rows_of(12, noise=noise), rows_of(12, noise=10.0, seed=1)])
    grams, unit, row = batch @ batch.mT, torch.zeros(2, 12, dtype=torch.float64), torch.tensor(5)
    unit[:, 5] = 12
    c = woodbury_solve(grams, unit, damping)
    terms, total = (c.abs() * batch.norm(dim=-1)).sum(-1), (c[:, None] @ batch).squeeze(1).norm(dim=-1)
    worst = (terms / total).max()
    for limit in (worst * 1.01, worst * 0.99, worst * 10, 1.0):
        assert cancels(grams, c, row, float(limit)) == (worst > limit)


def test_sums_of_nothing_do_not_cancel():
    assert not cancels(torch.zeros(1, 3, 3).double(), torch.zeros(1, 3).double(), torch.tensor(0), 50)


@pytest.mark.parametrize("filled", [1, 5, 12])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_spectral_weights_are_the_dense_square_root(filled, eps):
    """Also with empty rows, where `GᵀG` has no more than `filled` directions."""
    rows = rows_of(12)
    rows[filled:] = 0
    ours = rows.T @ spectral_weights(rows @ rows.T, torch.tensor(0), eps, 0.0)
    reference = oracles.ggt(rows, rows[0], eps)
    # The reference is a root of a singular 60×60 matrix: 1e-8 of its norm is noise, which ε = 1e-5 divides.
    assert (ours - reference).norm() <= 1e-4 * reference.norm()


@pytest.mark.parametrize("eps", [1e-4, 1e-2])
def test_spectral_solve_is_the_dense_square_root_for_any_vector(eps):
    rows, x = rows_of(12), rows_of(1, seed=4)[0]
    rows[8:] = 0
    ours = x / eps + rows.T @ spectral_solve(rows @ rows.T, rows @ x, eps, 0.0)
    reference = oracles.ggt(rows, x, eps)
    assert (ours - reference).norm() <= 1e-4 * reference.norm()  # as above


def test_jitter_is_the_published_one():
    """`x/ε + GᵀV diag[(1/(s+ε) − 1/ε)/s²] VᵀGx` with `GGᵀ + jitter·I = V s² Vᵀ`, in float64."""
    rows, eps, jitter = rows_of(12), 1e-2, 1e-4
    squared, vectors = torch.linalg.eigh(rows @ rows.T + jitter * torch.eye(12, dtype=torch.float64))
    scales = (1 / (squared.sqrt() + eps) - 1 / eps) / squared
    published = rows[3] / eps + rows.T @ (vectors @ (scales * (vectors.T @ (rows @ rows[3]))))
    ours = rows.T @ spectral_weights(rows @ rows.T, torch.tensor(3), eps, jitter)
    torch.testing.assert_close(ours, published, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("noise", [1e-3, 1e-6, 0.0])
def test_nearly_parallel_rows_give_finite_weights(noise):
    """The official code takes roots of negative eigenvalues there."""
    rows = rows_of(12, noise=noise).float().double()
    gram = rows @ rows.T
    for solution in (
        spectral_weights(gram, torch.tensor(3), 1e-5, 0.0),
        spectral_weights(gram, torch.tensor(3), 1e-5, 1e-6),
        spectral_solve(gram, rows @ rows[3], 1e-5, 0.0),
        woodbury_solve(gram, rows @ rows[3], 1e-7),
    ):
        assert solution.isfinite().all()


def slide(m, n_steps, damping, *, d=40, noise=0.3):
    """A window whose rows are replaced one by one, its Gram matrix and the inverse that follows it."""
    generator = torch.Generator().manual_seed(0)
    rows, gram = torch.zeros(m, d, dtype=torch.float64), torch.zeros(m, m, dtype=torch.float64)
    inverse = SlidingInverse(torch.eye(m, dtype=torch.float64) / (m * damping), damping)
    common = torch.randn(d, generator=generator).double()
    for step in range(n_steps):
        row = torch.tensor(step % m)
        rows[row] = (common + noise * torch.randn(d, generator=generator).double()) / d**0.5
        dots = rows @ rows[row]
        change = dots - gram[row]
        gram[row], gram[:, row] = dots, dots
        inverse.replace_row(row, change)
        yield step, gram, inverse


@pytest.mark.parametrize(("m", "damping"), [(24, 1e-2), (24, 1e-7), (48, 1e-4)])
def test_sliding_inverse_does_not_drift_over_thousands_of_rows(m, damping):
    """More rows than directions in the last case: the system is as singular as its damping allows."""
    for step, gram, inverse in slide(m, 5000, damping):
        if step % 500 == 499 or step < 3:
            rhs = torch.zeros(m, dtype=torch.float64)
            rhs[step % m] = m
            fresh = woodbury_solve(gram, rhs, damping)
            for row in (None, torch.tensor(step % m)):
                solution = inverse.solve(gram, rhs, row)
                assert (solution - fresh).norm() <= 1e-7 * fresh.norm()
                assert (gram @ solution + m * damping * solution - rhs).norm() <= 1e-9 * rhs.norm()


def test_update_alone_is_the_inverse_without_a_rebuild(monkeypatch):
    """The rank-2 formula itself, for 200 rows."""
    monkeypatch.setattr(SlidingInverse, "reset", lambda *_: pytest.fail("rebuilt"))
    for _, gram, inverse in slide(16, 200, 1e-3):
        inverse.solve(gram, gram[0])
    exact = torch.linalg.inv(gram + inverse.shift * torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(inverse.inverse, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damage", ["another", "one entry", "nan"])
def test_lost_inverse_is_rebuilt(damage):
    """It may be overwritten, or come from a state that never had one."""
    *_, (_, gram, inverse) = slide(16, 40, 1e-3)
    if damage == "another":
        inverse.inverse.copy_(torch.eye(16, dtype=torch.float64))
    else:
        inverse.inverse[2, 3] += float("nan") if damage == "nan" else 1.0
    rhs = gram[0].clone()
    torch.testing.assert_close(inverse.solve(gram, rhs), woodbury_solve(gram, rhs, 1e-3), rtol=1e-8, atol=1e-8)


def test_sliding_inverse_updates_the_given_tensor():
    """That tensor is the state that is saved."""
    state = torch.eye(4, dtype=torch.float64)
    change = torch.tensor([0.1, 0.5, 0.2, 0.0], dtype=torch.float64)
    SlidingInverse(state, 0.25).replace_row(torch.tensor(1), change)
    changed = torch.eye(4, dtype=torch.float64)
    changed[1] += change
    changed[:, 1] += change
    changed[1, 1] -= change[1]  # the diagonal entry changes once
    torch.testing.assert_close(state, torch.linalg.inv(changed))
