"""Frequent directions: the bounds that the theory gives, and the oracle's numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_sketchy import frequent_directions

from hf_efcp.curvature import sketch as sketches
from hf_efcp.curvature.sketch import Sketch, exact_update, is_cheap_exactly, subspace_update


def empty(d, k, dtype=torch.float64):
    return Sketch(
        torch.zeros(d, k, dtype=dtype), torch.zeros(k, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    )


def covariance(sketch):
    basis = sketch.basis.double()
    return (basis * sketch.singular_values.square()) @ basis.mT


def run(gradients, k, beta2, dtype=torch.float64):
    sketch = empty(len(gradients[0]), k, dtype)
    for gradient in gradients:
        sketch = exact_update(sketch, gradient.to(dtype), beta2, beta2)
    return sketch


def stream(seed, d, b, n, decay=0.7):
    generator = torch.Generator().manual_seed(seed)
    spectrum = decay ** torch.arange(d, dtype=torch.float64)
    return [spectrum[:, None] * torch.randn(d, b, generator=generator, dtype=torch.float64) for _ in range(n)]


def assert_bounds(sketch, exact, tolerance):
    """`C ⪯ M ⪯ C + ρI` and `tr C + (k + 1)ρ ≤ tr M`."""
    c, rho, k = covariance(sketch), sketch.tail, sketch.basis.shape[-1]
    scale = tolerance * torch.linalg.eigvalsh(exact)[-1]
    gaps = torch.linalg.eigvalsh(exact - c)
    assert gaps[0] >= -scale
    assert gaps[-1] <= rho + scale
    assert c.trace() + (k + 1) * rho * (k < len(c)) <= exact.trace() + len(c) * scale


SHAPES = {"d": st.integers(1, 9), "b": st.integers(1, 9), "k": st.integers(1, 9), "n": st.integers(1, 8)}


@settings(max_examples=60)
@given(**SHAPES, beta2=st.sampled_from([0.5, 0.9, 0.999, 1.0]), seed=st.integers(0, 999))
def test_exact_update_keeps_the_bounds_and_equals_the_oracle(d, b, k, n, beta2, seed):
    k = min(k, d)
    gradients = stream(seed, d, b, n)
    sketch = run(gradients, k, beta2)
    c, rho, exact = frequent_directions(gradients, k, beta2)
    assert_bounds(sketch, exact, 1e-12)
    torch.testing.assert_close(covariance(sketch), c, rtol=1e-9, atol=1e-11 * float(exact.trace()))
    torch.testing.assert_close(sketch.tail, rho, rtol=1e-9, atol=1e-11 * float(exact.trace()))


@settings(max_examples=25)
@given(seed=st.integers(0, 999), k=st.integers(1, 5))
def test_tail_is_within_the_mean_of_what_is_not_kept(seed, k):
    """ρ ≤ min_{j ≤ k} Σ_{i > j} λ_i(M)/(k + 1 − j) (Liberty 2013), as (k + 1 − j)·ρ is deflated beyond every j."""
    gradients = stream(seed, 8, 3, 12)
    sketch = run(gradients, k, 1.0)
    values = torch.linalg.eigvalsh(sum(g @ g.T for g in gradients)).flip(0)
    for j in range(k + 1):
        assert sketch.tail <= values[j:].sum() / (k + 1 - j) * (1 + 1e-12)


@pytest.mark.parametrize("is_fast", [False, True], ids=["exact", "subspace"])
@settings(max_examples=25)
@given(seed=st.integers(0, 999))
def test_permutations_and_signs_of_rows_go_through(is_fast, seed):
    gradients = stream(seed, 30, 20, 5)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(30, generator=generator)
    signs = torch.randint(0, 2, (30, 1), generator=generator, dtype=torch.float64) * 2 - 1

    def end(steps):
        sketch = empty(30, 3)
        for t, g in enumerate(steps):
            sketch = subspace_update(sketch, g, 0.9, 0.9, number=t)[0] if is_fast else exact_update(sketch, g, 0.9, 0.9)
        return sketch

    plain, turned = end(gradients), end([signs * g[order] for g in gradients])
    torch.testing.assert_close(covariance(turned), signs * covariance(plain)[order][:, order] * signs.T)
    torch.testing.assert_close(turned.tail, plain.tail)


@pytest.mark.parametrize(("d", "b"), [(30, 4), (30, 50), (12, 30)])
def test_float32_equals_float64(d, b):
    """Within 2e-5 of the largest eigenvalue, as the Gram matrix is float64 and only the directions are stored."""
    gradients = [g.float() for g in stream(1, d, b, 40, decay=0.9)]
    narrow, wide = run(gradients, 6, 0.99, torch.float32), run(gradients, 6, 0.99)
    scale = float(wide.singular_values[0] ** 2)
    torch.testing.assert_close(covariance(narrow) / scale, covariance(wide) / scale, rtol=0, atol=2e-5)
    torch.testing.assert_close(narrow.tail, wide.tail, rtol=2e-5, atol=0)
    basis = narrow.basis.double()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6, dtype=torch.float64), rtol=0, atol=2e-5)


@pytest.mark.parametrize("decay", [0.8, 0.97, 1.0], ids=["steep", "slow", "flat"])
def test_subspace_update_keeps_the_upper_bound_over_500_drifting_steps(decay):
    """`C + ρI ⪰ M` to 1e-6 of its largest eigenvalue, which is float32's; nor does it stray from the exact sketch."""
    d, b, k, beta2 = 48, 40, 8, 0.99
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    spectrum = decay ** torch.arange(d)
    fast, exact = empty(d, k, torch.float32), empty(d, k)
    matrix = torch.zeros(d, d, dtype=torch.float64)
    for t in range(500):
        turn = torch.linalg.qr(turn + 0.01 * torch.randn(d, d, generator=generator) / d**0.5).Q
        gradient = (turn * spectrum) @ torch.randn(d, b, generator=generator)
        matrix = beta2 * matrix + gradient.double() @ gradient.double().T
        exact = exact_update(exact, gradient.double(), beta2, beta2)
        fast, projection = subspace_update(fast, gradient, beta2, beta2, number=t)
        torch.testing.assert_close(projection, fast.basis.mT @ gradient, rtol=0, atol=1e-4)
        if t % 10 == 9 or t < 10:
            gap = torch.linalg.eigvalsh(covariance(fast) + fast.tail * torch.eye(d) - matrix)[0]
            assert gap >= -1e-6 * torch.linalg.eigvalsh(matrix)[-1], t
    assert fast.tail <= 1.05 * exact.tail
    assert fast.tail >= 0.9 * exact.tail


@pytest.mark.parametrize(
    ("decay", "repeats", "gap"),
    [(0.9, False, 1e-6), (1.0, False, 0.1), (1.0, True, 0.15)],
    ids=["steep", "flat", "same"],
)
def test_subspace_update_of_a_large_side_misses_the_bound_by_what_its_docstring_says(decay, repeats, gap):
    d, b, k, beta2 = 400, 380, 16, 0.99
    generator = torch.Generator().manual_seed(0)
    sketch, matrix, gaps = empty(d, k, torch.float32), torch.zeros(d, d, dtype=torch.float64), []
    drawn = torch.randn(d, b, generator=generator)
    for t in range(8):
        gradient = decay ** torch.arange(d)[:, None] * drawn
        matrix = beta2 * matrix + gradient.double() @ gradient.double().T
        sketch, _ = subspace_update(sketch, gradient, beta2, beta2, number=t)
        if t in (0, 2, 7):
            least = torch.linalg.eigvalsh(covariance(sketch) + sketch.tail * torch.eye(d) - matrix)[0]
            gaps.append(float(-least / torch.linalg.eigvalsh(matrix)[-1]))
        drawn = drawn if repeats else torch.randn(d, b, generator=generator)
    assert max(gaps) <= gap
    if decay == 1.0:
        assert gaps[0] > 0.04  # else the docstring is too modest
        assert (gaps[-1] > gaps[0]) if repeats else max(gaps[1:]) <= 1e-6


def test_subspace_update_finds_what_a_sketch_that_is_not_full_lacks():
    """A rank-2 past and a gradient of full rank: all k directions are in use after one update."""
    generator = torch.Generator().manual_seed(0)
    past = torch.randn(40, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    gradient = torch.randn(40, 30, generator=generator)
    start = exact_update(empty(40, 6, torch.float32), past, 0.9, 0.9)
    assert (start.singular_values > 0).sum() == 2
    fast, _ = subspace_update(start, gradient, 0.9, 0.9, number=1)
    exact = exact_update(start, gradient, 0.9, 0.9)
    assert (fast.singular_values > 0).all()
    torch.testing.assert_close(fast.tail, exact.tail, rtol=0.35, atol=0)  # one step from columns, not from directions


@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1.0, 1e6, 1e15])
def test_scale_of_the_gradient_does_not_matter(scale):
    gradients = [g.float() for g in stream(2, 40, 30, 4)]
    ends = []
    for factor in (1.0, scale):
        sketch = exact_update(empty(40, 5, torch.float32), factor * gradients[0], 0.9, 0.9)
        for t, gradient in enumerate(gradients[1:], 1):
            sketch, _ = subspace_update(sketch, factor * gradient, 0.9, 0.9, number=t)
        ends.append(covariance(sketch) / factor**2)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5 * float(ends[0].max()))  # float32 products


def test_batches_equal_their_members():
    gradients = torch.stack(stream(3, 30, 25, 2)).float()
    one = [exact_update(empty(30, 4, torch.float32), g, 0.9, 0.9) for g in gradients]
    both = Sketch(*(torch.stack(parts) for parts in zip(*one, strict=True)))
    stepped, projections = subspace_update(both, gradients.flip(0), 0.9, 0.9, number=5)
    for i, g in enumerate(gradients.flip(0)):
        alone, projection = subspace_update(one[i], g, 0.9, 0.9, number=5)
        torch.testing.assert_close(covariance(Sketch(*(part[i] for part in stepped))), covariance(alone))
        torch.testing.assert_close(projections[i].mT @ projections[i], projection.mT @ projection, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "update", [exact_update, lambda *a: subspace_update(*a, number=3)[0]], ids=["exact", "subspace"]
)
def test_factorisation_that_is_not_finite_keeps_the_old_sketch(update, monkeypatch):
    gradients = [g.float() for g in stream(4, 30, 25, 2)]
    sketch = exact_update(empty(30, 4, torch.float32), gradients[0], 0.9, 0.9)
    whole = sketches.top_eigenpairs
    monkeypatch.setattr(sketches, "top_eigenpairs", lambda gram, k: [x * torch.nan for x in whole(gram, k)])
    for ours, old in zip(update(sketch, gradients[1], 0.9, 0.9), sketch, strict=True):
        assert torch.equal(ours, old)
    monkeypatch.undo()
    with_inf = gradients[1].clone()
    with_inf[0, 0] = torch.inf
    assert torch.equal(exact_update(sketch, with_inf, 0.9, 0.9).basis, sketch.basis)


@pytest.mark.parametrize(
    "update", [exact_update, lambda *a: subspace_update(*a, number=3)[0]], ids=["exact", "subspace"]
)
def test_factorisation_that_does_not_converge_keeps_the_old_sketch(update, monkeypatch):
    gradients = [g.float() for g in stream(4, 30, 25, 2)]
    sketch = exact_update(empty(30, 4, torch.float32), gradients[0], 0.9, 0.9)

    def fail(matrix):
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    for ours, old in zip(update(sketch, gradients[1], 0.9, 0.9), sketch, strict=True):
        assert torch.equal(ours, old)


def test_first_power_steps_find_the_directions_of_one_gradient():
    """Without a d×d matrix: from columns of the gradient, to the eigenvalues that the exact update has."""
    (gradient,) = stream(6, 300, 280, 1, decay=0.95)
    fast, _ = subspace_update(empty(300, 5), gradient, 0.9, 0.9, number=0)
    exact = exact_update(empty(300, 5), gradient, 0.9, 0.9)
    torch.testing.assert_close(fast.singular_values, exact.singular_values, rtol=1e-3, atol=0)
    torch.testing.assert_close(fast.tail, exact.tail, rtol=1e-3, atol=0)


def test_all_zero_gradient_leaves_an_empty_sketch_empty():
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros(30, 25, dtype=dtype)
        exact = exact_update(empty(30, 4, dtype), zero, 0.9, 0.9)
        fast, projection = subspace_update(empty(30, 4, dtype), zero, 0.9, 0.9, number=0)
        assert not any(x.any() for x in (*exact, *fast, projection))


def test_narrow_gradients_take_the_exact_path():
    """LoRA's factors, vectors and axes that are kept whole."""
    assert all(is_cheap_exactly(d, b, 64) for d, b in [(3072, 8), (3072, 64), (768, 1), (64, 768), (8, 3072)])
    assert not is_cheap_exactly(768, 3072, 64)
