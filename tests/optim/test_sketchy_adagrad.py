"""S-AdaGrad against Algorithm 2 written out in float64, and the ball it may be kept in."""

import pytest
import torch
from oracle_sketchy import frequent_directions, s_adagrad

from hf_efcp.optim import SketchyAdaGrad


def gradients(d, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(d, generator=generator) * 0.8 ** torch.arange(d) for _ in range(n)]


def run(steps, shapes, **options):
    """Weights after each step, flat; `steps` are flat gradients."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = SketchyAdaGrad(params, **{"lr": 1.0, **options})
    ends = []
    for step in steps:
        for p, g in zip(params, step.split([p.numel() for p in params]), strict=True):
            p.grad = g.view(p.shape)
        optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    return ends, optimizer


@pytest.mark.parametrize("delta", [1e-6, 1.0])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_step_is_that_of_algorithm_2(rank, delta):
    steps = gradients(12, 20)
    ends, _ = run(steps, [(12,)], rank=rank, delta=delta)
    expected = -torch.stack(s_adagrad(steps, rank, delta)).cumsum(0)
    # Directions are rounded to float32 and what is outside of them is multiplied by up to 1/√δ.
    torch.testing.assert_close(torch.stack(ends).double(), expected, rtol=0, atol=1e-6 / delta**0.5 + 1e-5)


def test_model_is_one_vector_and_parameters_are_many():
    steps, shapes = gradients(12, 10), [(2, 3), (), (5,)]
    whole, _ = run(steps, [(12,)], rank=3, delta=0.1)
    model, optimizer = run(steps, shapes, rank=3, delta=0.1, system="model")
    torch.testing.assert_close(model, whole, rtol=1e-4, atol=1e-5)
    assert sum("singular_values" in state for state in optimizer.state.values()) == 1
    parts, _ = run(steps, shapes, rank=3, delta=0.1)
    alone, _ = run([step[:6] for step in steps], [(2, 3)], rank=3, delta=0.1)
    torch.testing.assert_close([x[:6] for x in parts], alone)


@pytest.mark.parametrize("system", ["parameter", "model"])
def test_weights_stay_in_the_ball(system):
    ends, optimizer = run(gradients(12, 30), [(3, 2), (6,)], rank=3, delta=0.1, radius=0.5, system=system)
    norms = torch.stack([(x if system == "model" else x[:6]).norm() for x in ends])
    assert norms.max() <= 0.5 * (1 + 1e-5)
    assert norms[-1] >= 0.49  # the pull is outward
    assert optimizer.skipped_steps == 0


def test_projection_is_nearest_in_the_norm_of_the_sketch():
    """Against projected gradient descent on `(x − y)ᵀH(x − y)` over the ball, `H = G̃^{1/2}`."""
    steps, radius = gradients(10, 6, seed=2), 0.4
    inside, _ = run(steps[:5], [(10,)], rank=3, delta=0.05, radius=radius)
    ends, _ = run(steps, [(10,)], rank=3, delta=0.05, radius=radius)
    sketch, rho, _ = frequent_directions([g[:, None] for g in steps], 3, 1.0)
    values, vectors = torch.linalg.eigh(sketch + (rho + 0.05) * torch.eye(10, dtype=torch.float64))
    h = (vectors * values.sqrt()) @ vectors.T
    y = inside[-1].double() - torch.linalg.solve(h, steps[5].double())
    assert y.norm() > radius
    x = torch.zeros(10, dtype=torch.float64)
    for _ in range(5000):
        x = x - h @ (x - y) / values[-1].sqrt()
        x = x * min(1.0, radius / x.norm())
    torch.testing.assert_close(ends[-1].double(), x, rtol=1e-3, atol=1e-5)


def test_point_within_the_ball_is_left_alone():
    steps = gradients(8, 4)
    free, _ = run(steps, [(8,)], rank=2, delta=1.0)
    ball, _ = run(steps, [(8,)], rank=2, delta=1.0, radius=100.0)
    assert all(torch.equal(a, b) for a, b in zip(free, ball, strict=True))


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_scale_of_the_gradients_does_not_matter(scale):
    steps = gradients(12, 15)
    plain, _ = run(steps, [(12,)], rank=3, delta=0.0)
    scaled, _ = run([scale * g for g in steps], [(12,)], rank=3, delta=0.0)
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-4)


def test_factorisation_that_is_not_finite_keeps_the_old_sketch(monkeypatch):
    """The step is that of the sketch as it was."""
    _, optimizer = run(gradients(8, 3), [(8,)], rank=2, delta=0.1)
    (state,) = optimizer.state.values()
    before = {name: value.clone() for name, value in state.items() if name in ("basis", "singular_values", "tail")}

    def fail(matrix):
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    optimizer.step()
    for name, value in before.items():
        assert torch.equal(state[name], value)
    assert all(p.isfinite().all() for p in optimizer.param_groups[0]["params"])
