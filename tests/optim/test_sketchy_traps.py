"""Faults of published Sketchy code, by the numbers T1–T10 of its description, that this package must not have."""

import pytest
import torch
from oracle_sketchy import s_adagrad

from hf_efcp.curvature.sketch import Sketch, exact_update
from hf_efcp.optim import SketchyAdaGrad, SketchyShampoo, create_optimizer, get_spec


def run(gradients, **options):
    """Weight changes of plain S-Shampoo in float32, and the optimizer."""
    weight = torch.nn.Parameter(torch.zeros(gradients[0].shape))
    optimizer = SketchyShampoo([weight], 1.0, **{"grafting": "none", "momentum": 0.0, **options})
    changes = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        changes.append(before - weight.detach())
    return changes, optimizer


def low_rank(shape, r, n, seed=0, same_rows=False):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], r, generator=generator)
    return [
        (left if same_rows else torch.randn(shape[0], r, generator=generator))
        @ torch.randn(r, shape[1], generator=generator)
        for _ in range(n)
    ]


def state_of(optimizer):
    (state,) = optimizer.state.values()
    return state


@pytest.mark.parametrize(("tail_decay", "power"), [("linear", 1.0), ("sqrt", 0.5)])
def test_t1_tail_decays_by_beta2_and_not_its_root(tail_decay, power):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(9, 8, generator=generator)
    _, optimizer = run([gradient], rank=3, beta2=0.81, tail_decay=tail_decay)
    first = state_of(optimizer)["tail_0_0"].clone()
    _, optimizer = run([gradient, torch.zeros(9, 8)], rank=3, beta2=0.81, tail_decay=tail_decay)
    torch.testing.assert_close(state_of(optimizer)["tail_0_0"], first * 0.81**power)


@pytest.mark.parametrize("rank", [4, 20], ids=["sketch", "whole"])
@pytest.mark.parametrize("sketch_update", ["exact", "subspace"])
def test_t2_rounding_is_no_direction(rank, sketch_update):
    """Gradients of one 3-dimensional row space: float32 noise of 1e-7 must not be multiplied by ε^{-1/4} = 56."""
    gradients = low_rank((20, 30), 3, 12, same_rows=True)
    changes, optimizer = run(gradients, rank=rank, sketch_update=sketch_update, max_dim=25)
    assert int((state_of(optimizer)["singular_values_0_0"] > 0).sum()) == 3
    assert state_of(optimizer)["tail_0_0"] == 0
    space = torch.linalg.qr(gradients[0][:, :3]).Q
    for change in changes:
        assert (change - space @ (space.T @ change)).norm() <= 1e-4 * change.norm()


@pytest.mark.parametrize("rank", [5, 10], ids=["sketch", "whole"])
def test_t3_stale_sketch_that_is_not_full_amplifies_nothing(rank):
    """Updated every third step, new directions between: an empty tail alone gives them ε^{-1/4} on either side."""
    gradients = low_rank((10, 10), 1, 9)
    fresh, _ = run(gradients, rank=rank)
    stale, optimizer = run(gradients, rank=rank, update_freq=3)
    for a, b in zip(stale, fresh, strict=True):
        assert a.norm() <= 4 * b.norm()
        assert a.norm() >= b.norm() / 10
    state = state_of(optimizer)
    s, u, v = (state[name].double() for name in ("singular_values_0_0", "basis_0_0", "basis_0_1"))
    naive = ((s**2).max() * 1e-7) ** -0.25
    outside = gradients[1].double() - u @ (u.T @ gradients[1].double())
    outside = outside - (outside @ v) @ v.T
    assert naive**2 * outside.norm() > 100 * fresh[1].norm()  # what these gradients would have become


def test_t3_sketch_that_is_not_full_at_the_first_gradient():
    """One gradient of rank 1, then another direction: the second step is no longer than the first by much."""
    gradients = [torch.outer(torch.eye(8)[0], torch.ones(6)), torch.outer(torch.eye(8)[1], torch.ones(6))]
    first, second = run(gradients, rank=4, update_freq=10)[0]
    assert second.norm() <= 3 * first.norm()


def test_t4_directions_stay_orthonormal():
    """Norms of 0.25, 0.8 and 10 were seen elsewhere after SVDs on accelerators."""
    generator = torch.Generator().manual_seed(0)
    for sketch_update in ("exact", "subspace"):
        gradients = [torch.randn(40, 50, generator=generator) for _ in range(100)]
        _, optimizer = run(gradients, rank=5, sketch_update=sketch_update)
        for axis in (0, 1):
            basis = state_of(optimizer)[f"basis_0_{axis}"]
            torch.testing.assert_close(basis.mT @ basis, torch.eye(5), rtol=0, atol=1e-5)


def test_t5_adagrad_without_delta_is_not_blown_up_by_a_sketch_that_is_not_full():
    """`G̃^{-1/2} g` is at most of length 1: the sum has `g` in it. 1e31 is what a test for `≤ 0` gives."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(30))
    optimizer = SketchyAdaGrad([weight], 1.0, rank=10, delta=0.0)
    gradients = [torch.randn(30, generator=generator) for _ in range(20)]
    expected = s_adagrad(gradients, 10, 1e-12)
    for t, gradient in enumerate(gradients):
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
        change = before - weight.detach()
        assert change.norm() <= 1 + 1e-5
        torch.testing.assert_close(change.double(), expected[t], rtol=1e-3, atol=1e-5)


def test_t6_beta2_counts_steps_unless_it_is_to_count_updates():
    zero, gradient = torch.zeros(6, 5), torch.ones(6, 5)
    for per_step, power in ((True, 4), (False, 1)):
        _, optimizer = run([gradient, *[zero] * 4], rank=2, beta2=0.9, update_freq=4, beta2_per_step=per_step)
        torch.testing.assert_close(state_of(optimizer)["singular_values_0_0"][0].square().item(), 30 * 0.9**power)


def test_t7_the_sum_has_no_factor_of_one_minus_beta2():
    gradient = torch.ones(6, 5)
    _, optimizer = run([gradient] * 3, rank=2, beta2=0.9)
    torch.testing.assert_close(state_of(optimizer)["singular_values_0_0"][0].square().item(), 30 * (1 + 0.9 + 0.81))


def test_t8_no_extrapolated_tail():
    option, _ = get_spec("sketchy_shampoo").options()["tail"]
    assert option.choices == ("rho", "trace")


def test_t9_an_option_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no option `truncate_numerical_noise`"):
        create_optimizer("sketchy_shampoo", [torch.nn.Parameter(torch.ones(2))], lr=0.1, truncate_numerical_noise=True)


def test_t10_axes_are_not_merged():
    """A 12×8 matrix merged into a vector of 96 would have the root of a vector."""
    gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    (as_matrix,), optimizer = run([gradient], rank=20)
    (as_vector,), _ = run([gradient.flatten()], rank=100)
    assert {"basis_0_0", "basis_0_1"} <= state_of(optimizer).keys()
    assert not torch.allclose(as_matrix.flatten(), as_vector, rtol=0.1)
    (with_units,), _ = run([gradient.view(1, 12, 1, 8)], rank=20)
    torch.testing.assert_close(with_units.view(12, 8), as_matrix)


@pytest.mark.parametrize("update_freq", [1, 3])
@pytest.mark.parametrize("sketch_update", ["exact", "subspace"])
def test_first_gradient_of_zeros(update_freq, sketch_update):
    generator = torch.Generator().manual_seed(0)
    later = [torch.randn(30, 40, generator=generator) for _ in range(6)]
    changes, _ = run([torch.zeros(30, 40), *later], rank=4, update_freq=update_freq, sketch_update=sketch_update)
    assert not changes[0].any()
    lengths = torch.stack([change.norm() for change in changes[1:]])
    assert lengths.isfinite().all()
    assert lengths.max() <= 30  # √(entries) is 35: each entry at most of order one


@pytest.mark.parametrize("scale", [1e-12, 1e6])
@pytest.mark.parametrize("sketch_update", ["exact", "subspace"])
def test_scale_of_the_gradients_does_not_matter(scale, sketch_update):
    """p = 4 on two sides: the update has no unit, so gradients of 1e-12 and 1e6 make the same steps."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(30, 40, generator=generator) for _ in range(6)]
    plain, _ = run(gradients, rank=4, sketch_update=sketch_update, update_freq=2)
    scaled, _ = run([scale * g for g in gradients], rank=4, sketch_update=sketch_update, update_freq=2)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for jump in (scale, 1 / scale):
        changes, _ = run([*gradients[:3], *(jump * g for g in gradients[3:])], rank=4, update_freq=4)
        assert all(change.norm() <= 4 * changes[0].norm() for change in changes)


def test_exact_low_rank_update_is_the_pseudo_inverse():
    """Gradients of rank 2 in 12 dimensions, rank 4: nothing is lost, and the sketch is the sum itself."""
    gradients = [g.double() for g in low_rank((12, 9), 2, 1)]
    sketch = Sketch(torch.zeros(12, 4).double(), torch.zeros(4).double(), torch.zeros(()).double())
    sketch = exact_update(sketch, gradients[0], 1.0, 1.0)
    covariance = (sketch.basis * sketch.singular_values**2) @ sketch.basis.mT
    torch.testing.assert_close(covariance, gradients[0] @ gradients[0].T)
    assert sketch.tail == 0
    assert (sketch.singular_values > 0).sum() == 2
