"""GGT's trajectories against dense float64 references, with a wrapped ring of decayed rows."""

import oracles
import pytest
import torch

from hf_efcp.optim import GGT

SHAPES = [(20, 13), (7,), (4, 5, 3), (1,), ()]
WINDOW, EPS, LR, STEPS = 12, 1e-3, 1e-2, 40

# What stores every entry is the dense method, in whatever form.
WHOLE = {
    "dense": {"compression": "none"},
    "top-k": {"density": 1.0, "block_size": 16, "precondition": "compressed"},
    "low rank": {"compression": "lowrank", "rank": 100, "precondition": "compressed"},
    "gradient": {"density": 1.0, "block_size": 16, "precondition": "gradient"},
}
SETTINGS = [
    {"beta1": 0.0, "beta2": 1.0, "jitter": 0.0},
    {"beta1": 0.0, "beta2": 0.9, "jitter": 0.0},
    {"beta1": 0.0, "beta2": 0.9, "jitter": 1e-3},
    {"beta1": 0.9, "beta2": 1.0, "jitter": 1e-3},
    {"beta1": 0.9, "beta2": 0.9, "jitter": 0.0},
]


def gradients(seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator) * 0.1 + 0.05 for s in SHAPES] for _ in range(STEPS)]


def reference(flat: list[torch.Tensor], *, beta1: float, beta2: float, jitter: float) -> torch.Tensor:
    """`((G̃ᵀG̃)^½ + εI)⁻¹x` by the root of the d×d matrix; with jitter the published formula, row by row."""
    d = flat[0].numel()
    rows, ages = torch.zeros(WINDOW, d, dtype=torch.float64), torch.zeros(WINDOW, dtype=torch.float64)
    x, change = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    for step, gradient in enumerate(flat):
        ages += 1
        rows[step % WINDOW], ages[step % WINDOW] = gradient, 0
        decayed = beta2 ** ages[:, None] * rows
        x = beta1 * x + (1 - beta1) * gradient if beta1 else gradient
        if jitter:
            squared, vectors = torch.linalg.eigh(decayed @ decayed.T + jitter * torch.eye(WINDOW, dtype=torch.float64))
            inner = (1 / (squared.sqrt() + EPS) - 1 / EPS) / squared
            change -= LR * (x / EPS + decayed.T @ vectors @ (inner * (vectors.T @ decayed @ x)))
        else:
            values, vectors = torch.linalg.eigh(decayed.T @ decayed)
            change -= LR * (vectors @ ((vectors.T @ x) / (values.clamp_min(0).sqrt() + EPS)))
    return change


def trajectory(steps: list[list[torch.Tensor]], **options) -> torch.Tensor:
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    plain = {"window": WINDOW, "eps": EPS, "eps_mode": "absolute", "scaling": "none", "momentum": 0.0}
    optimizer = GGT(params, LR, **{**plain, **options})
    for step in steps:
        for p, gradient in zip(params, step, strict=True):
            p.grad = gradient.to(p.dtype)
        optimizer.step()
    return torch.cat([p.detach().view(-1) for p in params])


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_forty_steps_follow_the_dense_reference(form, settings):
    steps = gradients()
    flat = [torch.cat([g.double().view(-1) for g in step]) for step in steps]
    expected = reference(flat, **settings)
    error = (trajectory(steps, **WHOLE[form], **settings) - expected).norm() / expected.norm()
    # `x/ε + Gᵀc` for a dense x cancels to a thousandth at this ε; its float32 sum keeps four digits.
    assert error <= (2e-4 if form == "gradient" else 1e-5)


@pytest.mark.parametrize("beta2", [1.0, 0.9])
def test_forty_steps_of_sparse_rows_follow_the_reference(beta2):
    """Top-k with error feedback and a wrapped ring; rows are decayed by their age."""
    steps, eps = gradients(), 0.05
    ring = oracles.Ring([g.numel() for g in steps[0]], WINDOW, oracles.block_topk(0.2, 16))
    expected = torch.zeros(sum(ring.numels), dtype=torch.float64)
    for number, step in enumerate(steps):
        row, _ = ring.push(step)
        ages = (number - torch.arange(WINDOW)) % WINDOW
        expected -= LR * oracles.ggt(beta2 ** ages.double()[:, None] * ring.rows, row, eps)
    options = {"density": 0.2, "block_size": 16, "precondition": "compressed", "beta2": beta2}
    error = (trajectory(steps, **options, eps=eps) - expected).norm() / expected.norm()
    assert error <= 1e-5


def test_first_update_has_the_closed_form_of_one_row():
    """`((ggᵀ)^½ + εI)⁻¹ g = g/(|g| + ε)`."""
    steps = gradients()[:1]
    g = torch.cat([part.double().view(-1) for part in steps[0]])
    torch.testing.assert_close(trajectory(steps, compression="none"), -LR * g / (g.norm() + EPS), rtol=1e-6, atol=0)


def test_nearly_parallel_rows_stay_finite_in_float32():
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(s, generator=generator) for s in SHAPES]
    steps = [[b + 1e-6 * torch.randn(b.shape, generator=generator) for b in base] for _ in range(STEPS)]
    for settings in SETTINGS:
        assert trajectory(steps, **WHOLE["top-k"], **settings).isfinite().all()


def test_large_eps_is_sgd():
    steps = gradients()
    summed = torch.cat([torch.stack([step[i] for step in steps]).sum(0).double().view(-1) for i in range(len(SHAPES))])
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    eps = 1e6
    options = {"window": WINDOW, "eps": eps, "eps_mode": "absolute", "scaling": "none", "momentum": 0.0}
    optimizer = GGT(params, LR * eps, compression="none", **options)
    for step in steps:
        for p, gradient in zip(params, step, strict=True):
            p.grad = gradient.to(p.dtype)
        optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach().view(-1) for p in params]), -LR * summed, rtol=1e-4, atol=1e-6)


def stale_reference(flat: list[torch.Tensor], every: int) -> torch.Tensor:
    """The general form with eigenvectors of every `every`-th step, and quotients `vᵀKv` in the place of eigenvalues."""
    rows, change = torch.zeros(WINDOW, flat[0].numel(), dtype=torch.float64), torch.zeros_like(flat[0])
    for step, x in enumerate(flat):
        rows[step % WINDOW] = x
        if step % every == 0:
            basis = torch.linalg.eigh(rows @ rows.T).eigenvectors
        squared = (basis.T @ rows @ rows.T @ basis).diagonal()
        shown = squared > 1e-12 * squared.max()
        weights = torch.where(shown, (1 / (squared.clamp_min(1e-300).sqrt() + EPS) - 1 / EPS) / squared, 0)
        change -= LR * (x / EPS + rows.T @ basis @ (weights * (basis.T @ rows @ x)))
    return change


@pytest.mark.parametrize("every", [1, 2, 5])
def test_eigenvectors_may_be_older_than_the_window(every):
    """With `every` = 1 it is the method itself."""
    steps = gradients()
    flat = [torch.cat([g.view(-1) for g in step]).double() for step in steps]
    ours = trajectory(steps, **WHOLE["gradient"], basis_every=every)
    expected = stale_reference(flat, every)
    # Float32 updates cancel to 1e-3 of their terms: x/ε against the window's part.
    assert (ours - expected).norm() < 2e-4 * expected.norm()
    if every == 1:
        exact = reference(flat, beta1=0.0, beta2=1.0, jitter=0.0)
        assert (expected - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("system", ["model", "layer"])
def test_old_eigenvectors_resume_to_the_bit(system):
    """Between two eigendecompositions, in the middle of a run."""
    steps, ends = gradients()[:9], []
    for cut in (None, 5):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        options = {"window": 4, "block_size": 16, "density": 0.3, "basis_every": 3, "system": system}
        optimizer = GGT(params, LR, **options)
        for number, step in enumerate(steps):
            if number == cut:
                saved, optimizer = optimizer.state_dict(), GGT(params, LR, **options)
                optimizer.load_state_dict(saved)
            for p, gradient in zip(params, step, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
        assert optimizer.state[params[0]]["basis_age"] == len(steps)
        ends.append(torch.cat([p.detach().view(-1) for p in params]))
    assert torch.equal(*ends)


def test_averages_in_bfloat16_follow_those_in_float32():
    weights = {}
    for dtype in ("float32", "bfloat16"):
        weights[dtype] = torch.nn.Parameter(torch.zeros(40))
        optimizer = GGT([weights[dtype]], lr=0.01, beta1=0.9, moment_dtype=dtype, block_size=8, density=0.5)
        for step in range(20):
            weights[dtype].grad = torch.randn(40, generator=torch.Generator().manual_seed(step)) + 1
            optimizer.step()
    torch.testing.assert_close(weights["bfloat16"], weights["float32"], rtol=0, atol=0.02)  # of 0.2, at 8 bits
