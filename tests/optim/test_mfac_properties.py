"""What holds for M-FAC whatever the numbers: nothing is lost, scale does not matter, extremes stay finite."""

import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mfac import PLAIN, SHAPES, assert_follows, correlated_gradients, relative_error, updates_of

from hf_efcp.optim import MFAC

BLOCK = PLAIN["block_size"]
VALUE_DTYPES = [c for option in MFAC.options if option.name == "value_dtype" for c in option.choices]


def stored_rows(optimizer, params):
    """The window as it is held, (m, d) float64, block padding cut off."""
    parts = []
    for p in params:
        state = optimizer.state[p]
        values = state["values"].double()
        if "scales" in state:
            values *= state["scales"].double().repeat_interleave(len(values) // len(state["scales"]), 0)[:, :, None]
        n_blocks, window, _ = values.shape
        dense = torch.zeros(n_blocks, window, BLOCK, dtype=torch.float64).scatter_(2, state["indices"].long(), values)
        parts.append(dense.transpose(0, 1).reshape(window, -1)[:, : p.numel()])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_what_a_row_rounds_away_stays_in_the_residual(value_dtype):
    """Sum of all rows ever pushed, plus the residual, is the sum of the gradients: nothing is lost."""
    gradients = correlated_gradients(60)
    pushed = torch.zeros(sum(math.prod(shape) for shape in SHAPES), dtype=torch.float64)
    given = torch.zeros_like(pushed)
    step = 0

    def check(optimizer, params):
        nonlocal step
        pushed.add_(stored_rows(optimizer, params)[step % 8])
        given.add_(torch.cat([g.flatten() for g in gradients[step]]).double())
        residual = torch.cat([optimizer.state[p]["residual"].flatten() for p in params]).double()
        assert relative_error(pushed + residual, given) <= 1e-6
        step += 1

    updates_of(gradients, inspect=check, value_dtype=value_dtype, damping=1e-3, density=0.2)
    assert step == 60


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_what_is_solved_is_what_is_held(value_dtype):
    """The Gram matrix is that of the rounded rows, so a coarse format costs no accuracy of the solution."""
    gradients = correlated_gradients(30)
    held = []
    updates = updates_of(
        gradients, inspect=lambda *pair: held.append(stored_rows(*pair)), value_dtype=value_dtype, damping=1e-5
    )
    for step, (update, rows) in enumerate(zip(updates, held, strict=True)):
        assert relative_error(update, oracles.dense_inverse(rows, rows[step % 8], 1e-5)) <= 1e-5


@pytest.mark.parametrize(
    ("scaling", "exponent"),
    [("rms", 20), ("rms", -40), ("layer_rms", 20), ("layer_rms", -40), ("adam", 20)],  # below, Adam's ε counts
)
@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
def test_scale_of_the_loss_does_not_matter_with_relative_damping(scaling, precondition, exponent):
    """Gradients of 1e6 or 1e-12: `λ` follows their square, and the scaled update does not follow them."""
    options = {
        "scaling": scaling, "precondition": precondition, "damping_mode": "relative", "damping": 0.1,
        "momentum": 0.9, "density": 0.3,
    }  # fmt: skip
    gradients = correlated_gradients(20)
    scaled = [[g * 2.0**exponent for g in step] for step in gradients]
    pairs = zip(updates_of(scaled, **options), updates_of(gradients, **options), strict=True)
    assert max(relative_error(ours, reference) for ours, reference in pairs) <= 1e-5


@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
@pytest.mark.parametrize("compression", ["topk", "none"])
@pytest.mark.parametrize("exponent", [20, -40])
def test_absolute_damping_scales_with_the_square_of_the_gradient(precondition, compression, exponent):
    """`(s²λI + s²GᵀG/m)⁻¹ sx = u/s`, for gradients of 1e6 and of 1e-12."""
    gradients = correlated_gradients(20)
    options = {"precondition": precondition, "compression": compression}
    scaled = updates_of(
        [[g * 2.0**exponent for g in step] for step in gradients], damping=1e-3 * 4.0**exponent, **options
    )
    reference = updates_of(gradients, damping=1e-3, **options)
    for ours, expected in zip(scaled, reference, strict=True):
        assert relative_error(ours * 2.0**exponent, expected) <= 1e-5


@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
@pytest.mark.parametrize("compression", ["topk", "none"])
@pytest.mark.parametrize("scale", [1e6, 1e-12])
def test_extreme_gradients_stay_finite(precondition, compression, scale):
    """Under a damping of 1e-7, 19 orders of magnitude below and 17 above the squared gradient."""
    gradients = correlated_gradients(20, scale=scale)
    for update in updates_of(gradients, precondition=precondition, compression=compression):
        assert update.isfinite().all()


@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
@pytest.mark.parametrize("compression", ["topk", "none"])
@pytest.mark.parametrize("noise", [1e-3, 1e-7, 0.0])
def test_nearly_parallel_rows_stay_finite(precondition, compression, noise):
    """Also where the same gradient comes again and again."""
    gradients = correlated_gradients(40, noise=noise)
    for update in updates_of(gradients, compression=compression, precondition=precondition):
        assert update.isfinite().all()


def test_repeated_gradient_has_the_closed_form():
    """`t` equal rows are one of `t` times the square: `u = g·m/(mλ + t|g|²)`."""
    (gradient,) = correlated_gradients(1)
    g = torch.cat([part.flatten() for part in gradient]).double()
    for t, update in enumerate(updates_of([gradient] * 12, compression="none", damping=0.01), start=1):
        expected = g * 8 / (8 * 0.01 + min(t, 8) * (g @ g))
        # Parallel rows: the float32 sum over them loses |g|²/(mλ) ≈ 12 times its rounding.
        assert relative_error(update, expected) <= 2e-5


@settings(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=4),
    window=st.integers(1, 6), density=st.floats(0.01, 1.0), block_size=st.integers(1, 40),
    selection=st.sampled_from(["block", "global"]), precondition=st.sampled_from(["compressed", "gradient"]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shapes_blocks_and_densities_follow_the_oracle(
    shapes, window, density, block_size, selection, precondition, seed
):
    """Independent rows: where they are parallel, float32 sums lose more than 1e-5 at this damping."""
    d = sum(math.prod(shape) for shape in shapes)
    if selection == "global" and int(density * d) == 0:
        density = 1.0  # one entry is kept where `int(density·d)` is none: no row as first published
    assert_follows(
        correlated_gradients(10, shapes, noise=2.0, seed=seed), tolerance=3e-5, window=window, density=density,
        block_size=block_size, selection=selection, precondition=precondition, damping=0.03,
    )  # fmt: skip


@pytest.mark.parametrize("selection", ["block", "global"])
def test_window_keeps_the_stated_number_of_entries(selection):
    """`ceil(density·block_size)` a block, `int(density·d)` in all."""
    params = [torch.nn.Parameter(torch.zeros(33)), torch.nn.Parameter(torch.zeros(5, 4))]
    options = {**PLAIN, "block_size": 10, "density": 0.25, "selection": selection}
    optimizer = MFAC(params, lr=1.0, **options)
    for p in params:
        p.grad = torch.arange(1.0, 1.0 + p.numel()).view_as(p)
    optimizer.step()
    first = optimizer.state[params[0]]
    if selection == "block":
        assert first["values"].shape == (4, 8, 3)
        assert optimizer.state[params[1]]["values"].shape == (2, 8, 3)
    else:
        assert first["values"].shape == (8, 13)


def test_state_is_as_small_as_its_formats():
    """Bytes per entry of the window and of the residual, the m×m matrices apart."""
    size = {}
    for dtype in ("float32", "bfloat16"):
        params = [torch.nn.Parameter(torch.zeros(64, 256))]
        options = {**PLAIN, "block_size": 256, "density": 1 / 64, "value_dtype": dtype, "residual_dtype": dtype}
        optimizer = MFAC(params, lr=1.0, **{**options, "window": 64})
        params[0].grad = torch.ones(64, 256)
        optimizer.step()
        size[dtype] = optimizer.state_bytes() - 64 * 64 * 8 - 16  # Gram matrix, step and skipped
    entries, d = 64 * 64 * 4, 64 * 256
    assert size == {"float32": entries * (1 + 4) + 4 * d, "bfloat16": entries * (1 + 2) + 2 * d}
