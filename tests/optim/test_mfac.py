"""M-FAC's updates against float64 references, the published formulas and their limits."""

import math

import oracles
import pytest
import torch

from hf_efcp.optim import MFAC

SHAPES = [(13, 7), (31,), (1,), (4, 5, 3)]
PLAIN = {
    "window": 8, "damping": 1e-7, "damping_mode": "absolute", "compression": "topk", "density": 0.1,
    "selection": "block", "block_size": 16, "precondition": "compressed", "scaling": "none", "update_rms": 0.25,
    "momentum": 0.0, "adam_beta2": 0.999, "weight_decay": 0.0, "system": "model",
    "value_dtype": "float32", "residual_dtype": "float32",
}  # fmt: skip


def correlated_gradients(steps, shapes=SHAPES, *, noise=0.3, scale=1.0, seed=0):
    """Gradients of norm `scale` that share a direction, as those of training do: [step][parameter]."""
    generator = torch.Generator().manual_seed(seed)
    common = [torch.randn(shape, generator=generator) for shape in shapes]
    drawn = [[c + noise * torch.randn(c.shape, generator=generator) for c in common] for _ in range(steps)]
    norms = [math.sqrt(sum(g.double().square().sum().item() for g in step)) for step in drawn]
    return [[g * (scale / norm) for g in step] for step, norm in zip(drawn, norms, strict=True)]


def updates_of(gradients, *, inspect=None, **options):
    """What each step subtracts at lr 1, flat: exact, because the weights are zero before each step."""
    params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients[0]]
    optimizer = MFAC(params, lr=1.0, **{**PLAIN, **options})
    updates = []
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.data.zero_()
            param.grad = gradient.clone()
        optimizer.step()
        updates.append(-torch.cat([p.detach().flatten() for p in params]).double())
        if inspect:
            inspect(optimizer, params)
    return updates


def compress_of(compression="topk", selection="block", density=0.1, block_size=16, **_):
    if compression == "none":
        return oracles.keep_all
    return oracles.global_topk(density) if selection == "global" else oracles.block_topk(density, block_size)


def oracle_of(gradients, *, inverse=oracles.dense_inverse, **options):
    options = {**PLAIN, **options}
    return oracles.mfac(
        gradients, window=options["window"], damping=options["damping"], compress=compress_of(**options),
        relative=options["damping_mode"] == "relative", precondition=options["precondition"], inverse=inverse,
    )  # fmt: skip


def relative_error(ours, reference):
    return ((ours - reference).norm() / reference.norm()).item()


def assert_follows(gradients, tolerance=1e-5, **options):
    """Every update of the run, not the last alone, is the oracle's."""
    ours, reference = updates_of(gradients, **options), oracle_of(gradients, **options)
    errors = [relative_error(u, r) for u, r in zip(ours, reference, strict=True)]
    assert max(errors) <= tolerance, f"step {errors.index(max(errors))}: {max(errors):.1e}"


def test_oracles_agree_with_one_another():
    """Woodbury, the dense matrix and M-FAC's recursion are one formula."""
    gradients = correlated_gradients(20)
    options = {"damping": 1e-3, "precondition": "gradient"}
    dense = oracle_of(gradients, **options)
    recursive = oracle_of(gradients, inverse=oracles.sequential_inverse, **options)
    assert max(map(relative_error, dense, recursive)) < 1e-10


@pytest.mark.parametrize("selection", ["block", "global"])
@pytest.mark.parametrize("damping", [1e-4, 1e-7])
def test_update_is_the_dense_inverse_over_90_steps(selection, damping):
    """The published float32 form is 4e-2 off at damping 1e-7."""
    assert_follows(correlated_gradients(90), selection=selection, damping=damping, window=16)


def test_dense_window_is_the_dense_inverse_over_90_steps():
    assert_follows(correlated_gradients(90), compression="none", window=16)


@pytest.mark.parametrize("compression", ["topk", "none"])
def test_update_is_the_recursion_of_mfac(compression):
    gradients = correlated_gradients(20)
    options = {"compression": compression, "damping": 1e-3, "density": 0.3}
    reference = oracle_of(gradients, inverse=oracles.sequential_inverse, **options)
    assert max(map(relative_error, updates_of(gradients, **options), reference)) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 1},
        {"window": 2},
        {"window": 50},  # never full
        {"density": 1e-6},  # k = 1
        {"density": 1.0},  # k = block
        {"density": 0.5, "block_size": 1},
        {"block_size": 3, "density": 0.34},
        {"block_size": 256, "density": 0.02},  # uint8 indices, all parameters shorter than a block
        {"block_size": 257, "density": 0.02},  # int16
        {"block_size": 32768, "density": 0.0002},
        {"block_size": 128, "density": 0.05, "window": 5},
        {"selection": "global", "density": 1.0},
        # k = 1: rows on the same entry are parallel, and float32 sums of them lose |g|²/(mλ) of their precision
        {"selection": "global", "density": 0.006, "damping": 0.01},
    ],
    ids=str,
)
def test_ring_and_blocks_of_any_size_follow_the_oracle(changes):
    assert_follows(correlated_gradients(25), **{"damping": 1e-4, **changes})


def test_full_density_is_dense():
    gradients = correlated_gradients(20)
    dense = updates_of(gradients, compression="none")
    for changes in ({"density": 1.0}, {"density": 1.0, "selection": "global"}):
        assert max(map(relative_error, updates_of(gradients, **changes), dense)) <= 1e-5


def test_large_damping_is_sgd_with_compressed_gradients():
    """`(λI + GᵀG/m)⁻¹ → I/λ`."""
    gradients = correlated_gradients(20)
    ours = updates_of(gradients, damping=1e8, density=1.0)
    for update, gradient in zip(ours, gradients, strict=True):
        assert relative_error(update * 1e8, torch.cat([g.flatten() for g in gradient]).double()) <= 1e-5


@pytest.mark.parametrize("compression", ["topk", "none"])
def test_first_update_has_the_closed_form_of_one_row(compression):
    """`(λI + ggᵀ/m)⁻¹g = g·m/(mλ + |g|²)`: the window's size counts from the first step on."""
    (gradient,) = correlated_gradients(1)
    (update,) = updates_of([gradient], compression=compression, density=1.0, damping=0.01, window=8)
    g = torch.cat([g.flatten() for g in gradient]).double()
    torch.testing.assert_close(update, g * 8 / (8 * 0.01 + g @ g), rtol=1e-6, atol=0)


@pytest.mark.parametrize("changes", [{}, {"selection": "global"}, {"compression": "none"}], ids=str)
@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
def test_relative_damping_is_in_mean_eigenvalues(precondition, changes):
    options = {"damping_mode": "relative", "damping": 0.1, "precondition": precondition, **changes}
    assert_follows(correlated_gradients(30), **options)


@pytest.mark.parametrize("selection", ["block", "global"])
def test_dense_gradient_is_preconditioned_with_its_own_dots(selection):
    """The official code reuses the compressed gradient's dots and is 92 to 100 % off."""
    options = {"precondition": "gradient", "selection": selection, "window": 16}
    assert_follows(correlated_gradients(60), damping=1e-3, **options)


def test_dense_gradient_at_tiny_damping():
    """`(x − …)/λ` subtracts, in float32: here the part of `x` outside the window dominates and little cancels."""
    assert_follows(correlated_gradients(60), precondition="gradient", damping=1e-7)


@pytest.mark.parametrize(("window", "steps"), [(300, 330), (520, 530)])
def test_sliding_inverse_follows_the_oracle_after_the_ring_wrapped(window, steps):
    """More rows than 256, absolute damping: the inverse is updated and not solved for."""
    gradients = correlated_gradients(steps, [(50, 15), (3,)])
    ours = updates_of(gradients, window=window, damping=1e-6)
    ring = oracles.Ring([750, 3], window, oracles.block_topk(0.1, 16))
    for step, gradient in enumerate(gradients):
        row, _ = ring.push(gradient)
        if step % 97 == 0 or step > steps - 4:
            assert relative_error(ours[step], oracles.dense_inverse(ring.rows, row, 1e-6)) <= 1e-5


def test_momentum_is_heavy_ball():
    gradients = correlated_gradients(25)
    reference = oracles.heavy_ball(oracle_of(gradients, damping=1e-3), 0.9)
    ours = updates_of(gradients, damping=1e-3, momentum=0.9)
    assert max(map(relative_error, ours, reference)) <= 1e-5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rms_fixes_the_length_of_the_whole_update(momentum):
    """Padding does not count: the root mean square is over the model's own entries."""
    gradients = correlated_gradients(12)
    plain = oracles.heavy_ball(oracle_of(gradients, damping=1e-3), momentum)
    for update, reference in zip(
        updates_of(gradients, damping=1e-3, momentum=momentum, scaling="rms", update_rms=0.3), plain, strict=True
    ):
        assert relative_error(update, reference * (0.3 / oracles.root_mean_square(reference))) <= 1e-5


def test_layer_rms_fixes_the_length_of_each_parameter():
    gradients = correlated_gradients(12)
    numels = [math.prod(shape) for shape in SHAPES]
    ours = updates_of(gradients, damping=1e-3, scaling="layer_rms", update_rms=0.3, density=0.3)
    for update, reference in zip(ours, oracle_of(gradients, damping=1e-3, density=0.3), strict=True):
        for part, target in zip(update.split(numels), reference.split(numels), strict=True):
            assert relative_error(part, target * (0.3 / oracles.root_mean_square(target))) <= 1e-5


def test_adam_scaling_is_torchs_adam_over_the_preconditioned_gradients():
    """Over `λF⁻¹x`, in float64, for every step of the run."""
    gradients = correlated_gradients(25)
    options = {"damping": 1e-3, "precondition": "gradient"}
    weight = torch.nn.Parameter(torch.zeros(sum(math.prod(s) for s in SHAPES), dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.8, 0.95))
    ours = updates_of(gradients, scaling="adam", momentum=0.8, adam_beta2=0.95, **options)
    for update, reference in zip(ours, oracle_of(gradients, **options), strict=True):
        weight.data.zero_()
        weight.grad = reference * options["damping"]
        adam.step()
        assert relative_error(update, -weight.detach()) <= 1e-5


def test_strong_damping_with_adam_scaling_is_adamw():
    """λ → ∞ turns `λF⁻¹` into the identity."""
    gradients = correlated_gradients(25)
    weight = torch.nn.Parameter(torch.zeros(sum(math.prod(s) for s in SHAPES), dtype=torch.float64))
    adam = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    options = {"damping": 1e6, "damping_mode": "relative", "precondition": "gradient", "momentum": 0.9}
    ours = updates_of(gradients, scaling="adam", adam_beta2=0.999, **options)
    for update, gradient in zip(ours, gradients, strict=True):
        weight.data.zero_()
        weight.grad = torch.cat([part.double().flatten() for part in gradient])
        adam.step()
        assert relative_error(update, -weight.detach()) <= 1e-5


def test_weights_follow_decoupled_decay():
    gradients = correlated_gradients(30)
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(5)) for shape in SHAPES]
    params = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = MFAC(params, lr=1e-3, **{**PLAIN, "damping": 1e-3, "weight_decay": 0.5})
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
    ours = torch.cat([p.detach().flatten() for p in params]).double()
    reference = oracles.descend(torch.cat([w.flatten() for w in start]), oracle_of(gradients, damping=1e-3), 1e-3, 0.5)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", [1e-1, 1e-4])
def test_nearly_parallel_rows_keep_the_update_exact(noise):
    """At λ = 1e-7 the terms of `Gᵀc` are a thousand times their sum; it is then taken in float64."""
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [[d + noise * torch.randn(d.shape, generator=generator) for d in direction] for _ in range(60)]
    ours = updates_of(gradients, damping=1e-7)
    for update, reference in zip(ours, oracle_of(gradients, damping=1e-7), strict=True):
        assert relative_error(update, reference) <= 1e-5
