"""GGT's trajectories against dense float64 references, with a wrapped ring of decayed rows."""

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
    optimizer = GGT(params, LR, **plain, **options)
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
