"""S-Shampoo's updates against float64 references, and what its options cost and do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_sketchy import s_shampoo

from hf_efcp.optim import SketchyShampoo, create_optimizer
from hf_efcp.optim.grafting import UPDATE_RMS
from hf_efcp.optim.sketch_state import Due, due_update

PLAIN = {"grafting": "none", "momentum": 0.0}


def updates(gradients, *, dtype=torch.float64, lr=1.0, **options):
    """Minus the change of a zero weight at each step."""
    weight = torch.nn.Parameter(torch.zeros(gradients[0].shape, dtype=dtype))
    optimizer = SketchyShampoo([weight], lr, **{**PLAIN, **options})
    changes = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.to(dtype)
        optimizer.step()
        changes.append(before - weight.detach())
    return changes


def stream(shape, n, seed=0, decay=0.8):
    generator = torch.Generator().manual_seed(seed)
    spectrum = decay ** torch.arange(shape[0] if shape else 1, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n))
    return [(spectrum * x).view(shape) for x in drawn]


@pytest.mark.parametrize("shape", [(), (9, 7), (7, 9), (11,), (4, 3, 5), (3, 2, 4, 2)], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_update_is_minus_the_preconditioned_gradient_of_algorithm_3(shape, rank):
    gradients = stream(shape, 6)
    for ours, expected in zip(updates(gradients, rank=rank, beta2=0.9), s_shampoo(gradients, rank, 0.9), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(9, 9), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("rank", [3, 16])
def test_full_sketch_between_updates_is_the_paper_s(shape, rank):
    gradients = stream(shape, 9, decay=0.95)
    expected = s_shampoo(gradients, rank, 0.9, update_freq=3)
    for ours, paper in zip(updates(gradients, rank=rank, beta2=0.9, update_freq=3), expected, strict=True):
        torch.testing.assert_close(ours, paper, rtol=1e-9, atol=1e-11)


def test_warm_steps_are_those_of_updates_at_each_step():
    gradients = stream((9, 7), 12)
    often, warm = (
        updates(gradients, rank=3, beta2=0.9),
        updates(gradients, rank=3, beta2=0.9, update_freq=8, warm_steps=5),
    )
    assert all(torch.equal(a, b) for a, b in zip(often[:5], warm[:5], strict=True))
    assert not torch.equal(often[5], warm[5])
    assert due_update(8, {"warm_steps": 5, "update_freq": 8}) == Due(5, 4)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), shape=st.sampled_from([(6, 5), (5, 6), (4, 3, 5), (6,)]))
def test_rank_of_the_axis_is_full_shampoo(seed, shape):
    """Rank ≥ d keeps the whole matrix: Shampoo to 1e-10 of the update's length."""
    gradients = stream(shape, 8, seed)
    full = s_shampoo(gradients, 10**6, 0.9)
    for ours, expected in zip(updates(gradients, rank=8, beta2=0.9), full, strict=True):
        if len(shape) > 1:  # a vector's matrix has rank t: its null directions are roundoff times ε^{-1/2}
            assert (ours - expected).norm() <= 1e-10 * expected.norm()
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_permutations_and_signs_of_rows_and_columns_go_through(seed):
    gradients = stream((7, 6), 4, seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(7, generator=generator), torch.randperm(6, generator=generator)
    signs = torch.randint(0, 2, (7, 6), generator=generator).double().mul(2).sub(1)
    signs = signs[:, :1] * signs[:1]
    plain, turned = updates(gradients, rank=3), updates([signs * g[rows][:, columns] for g in gradients], rank=3)
    for a, b in zip(plain, turned, strict=True):
        torch.testing.assert_close(signs * a[rows][:, columns], b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sketch_update", ["exact", "subspace"])
@pytest.mark.parametrize("shape", [(40, 30), (30,), (6, 5, 7)], ids=str)
def test_float32_equals_float64(shape, sketch_update):
    gradients = [g.float() for g in stream(shape, 8, decay=0.95)]
    options = {"rank": 4, "sketch_update": sketch_update}
    wide, narrow = updates(gradients, **options), updates(gradients, dtype=torch.float32, **options)
    for a, b in zip(narrow, wide, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm()


def test_subspace_direction_is_the_exact_one():
    gradients = stream((60, 50), 30, decay=0.9)
    exact, fast = (updates(gradients, rank=6, sketch_update=u) for u in ("exact", "subspace"))
    for a, b in zip(exact, fast, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_permutations_go_through_a_subspace_update_nearly():
    """Rows of one axis are the columns of which the other's power step draws some: only the draw differs."""
    gradients = stream((60, 50), 10, decay=0.9)
    rows, columns = (torch.randperm(d, generator=torch.Generator().manual_seed(d)) for d in (60, 50))
    options = {"rank": 6, "sketch_update": "subspace"}
    plain, turned = updates(gradients, **options), updates([g[rows][:, columns] for g in gradients], **options)
    for a, b in zip(plain, turned, strict=True):
        assert torch.cosine_similarity(a[rows][:, columns].flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "adafactor", "rms"])
def test_graft_gives_the_whole_tensor_its_length(kind):
    gradients = stream((8, 6), 3)
    changes = updates(gradients, rank=3, grafting=kind, block_size=4, beta2=0.9)
    square = torch.zeros(8, 6, dtype=torch.float64)
    for t, (gradient, change) in enumerate(zip(gradients, changes, strict=True), 1):
        square = 0.9 * square + 0.1 * gradient.square()
        v = square / (1 - 0.9**t)
        factored = v.mean(1, keepdim=True) * v.mean(0) / v.mean()
        expected = {
            "sgd": gradient.norm(),
            "rmsprop": (gradient / v.sqrt()).norm(),
            "adafactor": (gradient / factored.sqrt()).norm(),
            "rms": torch.tensor(UPDATE_RMS * 48**0.5, dtype=torch.float64),
        }[kind]
        torch.testing.assert_close(change.norm(), expected, rtol=1e-6, atol=0)  # moments are float32
    warm = updates(gradients, rank=3, grafting=kind, beta2=0.9, start_preconditioning_step=3)
    for step, change in zip(warm, changes, strict=True):
        torch.testing.assert_close(step.norm(), change.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "adafactor", "rms"])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (12,), (12, 11)], ids=str)
def test_graft_gives_each_word_of_a_vocabulary_its_length(kind, shape):
    """Axes beyond `max_dim`: every slice as long as the graft step's, though the gradients' lengths differ."""
    gradients = stream(shape, 3)
    options = {"rank": 3, "grafting": kind, "beta2": 0.9, "max_dim": 10}
    axes = [axis for axis, d in enumerate(shape) if d <= 10]
    changes = updates(gradients, **options)
    steps = updates(gradients, **options, start_preconditioning_step=3)
    for change, step, gradient in zip(changes, steps, gradients, strict=True):
        if kind == "rms":
            step = (
                UPDATE_RMS * gradient / (gradient.square().mean(axes, keepdim=True).sqrt() if axes else gradient.abs())
            )
        if axes:
            torch.testing.assert_close(change.norm(dim=axes), step.norm(dim=axes), rtol=1e-5, atol=0)
        else:  # nothing is left to precondition
            torch.testing.assert_close(change, step, rtol=1e-5, atol=0)


def test_first_steps_are_the_graft_rules_own():
    gradients = stream((8, 6), 3)
    changes = updates(gradients, rank=3, grafting="sgd", start_preconditioning_step=2)
    for gradient, change in zip(gradients[:2], changes[:2], strict=True):
        torch.testing.assert_close(change, gradient)
    plain = updates(gradients, rank=3)[2]
    torch.testing.assert_close(changes[2], plain * (gradients[2].norm() / plain.norm()))


@pytest.mark.parametrize("shape", [(8, 6), (9,)], ids=str)
def test_scaling_divides_a_step_by_what_its_rows_and_columns_were(shape):
    """Adafactor's root of the mean squares, of the grafted steps themselves; a vector's entry by entry."""
    gradients = stream(shape, 4)
    options = {"rank": 3, "grafting": "sgd", "beta2": 0.9}
    squares = 0.0
    plain = updates(gradients, **options)
    for t, (u, change) in enumerate(zip(plain, updates(gradients, scaling="adafactor", **options), strict=True), 1):
        squares = 0.9 * squares + 0.1 * u.square()
        mean = squares / (1 - 0.9**t)
        mean = mean + 1e-08 * mean.max() if len(shape) == 1 else mean.mean(1, keepdim=True) * mean.mean(0) / mean.mean()
        torch.testing.assert_close(change, u / mean.sqrt(), rtol=1e-9, atol=1e-12)


def test_entries_that_are_rounding_stay_small():
    """A bias of attention's keys has no gradient but rounding; the rest of a joint bias steps as ever."""
    gradients = [torch.cat([g, 1e-7 * g]) for g in stream((9,), 4)]
    for change in updates(gradients, rank=18, grafting="adafactor", scaling="adafactor"):
        assert change[9:].abs().max() < 0.01 < change[:9].abs().max()


def test_factored_squares_of_convolutions_are_few():
    """As those of the matrix, though their last two axes are short."""
    for shape in ((64, 32, 1, 1), (64, 32, 3, 3)):
        sizes = [make(shape, grafting=kind, rank=1)[0].state_bytes() for kind in ("adafactor", "none")]
        area = shape[2] * shape[3]
        assert sizes[0] - sizes[1] == 4 * area * (64 + 32)


def test_scaling_forgets_no_step_that_overflowed():
    weight = torch.nn.Parameter(torch.zeros(8, 6))
    optimizer = SketchyShampoo([weight], 1.0, rank=3, grafting="sgd", scaling="adafactor")
    for scale in (1.0, 3e38, 1.0):
        weight.grad = stream((8, 6), 1)[0].float().clamp(-1, 1) * scale
        optimizer.step()
        assert all(t.isfinite().all() for t in optimizer.state[weight].values())
    assert 0 < weight.abs().amax() < 100


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_heavy_ball_after_grafting(nesterov):
    gradients = stream((8, 6), 4)
    options = {"rank": 3, "grafting": "sgd"}
    velocity = 0.0
    plain = updates(gradients, **options)
    for u, change in zip(plain, updates(gradients, momentum=0.5, nesterov=nesterov, **options), strict=True):
        velocity = 0.5 * velocity + u
        expected = u + 0.5 * velocity if nesterov else velocity
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)  # momentum is float32


def test_momentum_that_averages_keeps_the_length_of_steps():
    gradients = stream((8, 6), 4)
    options = {"rank": 3, "grafting": "sgd"}
    average = 0.0
    plain = updates(gradients, **options)
    averaged = updates(gradients, momentum=0.5, nesterov=False, ema=True, **options)
    for t, (u, change) in enumerate(zip(plain, averaged, strict=True), 1):
        average = 0.5 * average + 0.5 * u
        torch.testing.assert_close(change, average / (1 - 0.5**t), rtol=1e-5, atol=1e-6)  # momentum is float32


def test_blocks_are_sketched_by_themselves():
    gradients = stream((8, 6), 3)
    whole = updates(gradients, rank=2, block_size=4)
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 6)):
            alone = updates([g[rows, columns] for g in gradients], rank=2)
            for a, b in zip(whole, alone, strict=True):
                torch.testing.assert_close(a[rows, columns], b)


def test_long_axes_are_left_out_and_the_root_is_of_the_others():
    """One axis: p = 2. A vocabulary's axis is left out by `max_dim`, the longer one by `one_sided`."""
    gradients = stream((12, 5), 3)
    expected = s_shampoo([g.T.reshape(5, 12) for g in gradients], 10**6, 0.999)
    columns = sum(0.999 ** (2 - t) * g.T @ g for t, g in enumerate(gradients))
    values, vectors = torch.linalg.eigh(columns)
    expected = gradients[-1] @ (vectors * (values + 1e-7 * values[-1]).rsqrt()) @ vectors.T
    for options in ({"max_dim": 10}, {"one_sided": True}):
        torch.testing.assert_close(updates(gradients, rank=8, **options)[-1], expected)


def test_trace_tail_is_the_mean_eigenvalue_that_is_not_kept():
    """With a flat rest of 4 directions of 1 beside 10 and 5: `tr M` less the kept, over d − k."""
    spectrum = torch.tensor([10.0, 5.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    gradient = turn * spectrum
    (change,) = updates([gradient], rank=2, tail="trace", max_dim=6, epsilon=0.0, block_size=6)
    # The kept count as s² + ρ, with ρ = 1: exactly their eigenvalues; the rest has the mean of 4 ones.
    roots = (turn * spectrum.square() ** -0.25) @ turn.T
    torch.testing.assert_close(change, roots @ gradient @ torch.diag(spectrum.square() ** -0.25))


def make(shape, **options):
    weight = torch.nn.Parameter(torch.empty(shape, device="meta"))
    optimizer = SketchyShampoo([weight], 0.1, **options)
    optimizer.materialize_state()
    return optimizer, weight.numel()


def sketch_bytes(optimizer):
    (state,) = optimizer.state.values()
    names = ("basis", "singular_values", "tail")
    return sum(t.nbytes for name, t in state.items() if name.startswith(names))


def test_memory_of_a_768_by_3072_matrix():
    """Bytes a parameter: 0.42 for the sketch, 5 with SGD's length, 2.5 with bfloat16 momentum and Adafactor's."""
    optimizer, numel = make((768, 3072), rank=64, grafting="sgd", momentum=0.9)
    assert sketch_bytes(optimizer) <= 0.42 * numel
    assert optimizer.state_bytes() <= 5 * numel
    small, _ = make((768, 3072), rank=64, scaling="adafactor", momentum=0.9, momentum_dtype="bfloat16")
    assert small.state_bytes() <= 2.5 * numel


def test_state_made_beforehand_is_the_state_of_the_first_step():
    for name in ("sketchy_shampoo", "sketchy_adagrad"):
        sizes = []
        for device in ("cpu", "meta"):
            model = torch.nn.Sequential(torch.nn.Linear(20, 30, device=device), torch.nn.LayerNorm(30, device=device))
            optimizer = create_optimizer(name, model, lr=0.1)
            if device == "meta":
                optimizer.materialize_state()
            else:
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                optimizer.step()
            sizes.append(optimizer.state_bytes())
        assert sizes[0] == sizes[1]
