"""The mean of gradients as what is preconditioned: against float64 references, Adam, and its own limits."""

import oracles
import pytest
import torch
from test_mfac import PLAIN, compress_of, correlated_gradients, relative_error, updates_of

from hf_efcp.optim import GGT, MFAC

# Not less: the mean lies almost in the span of the rows, so float32 leaves 1e-7 / (m·damping) of what remains of it.
MEAN = {"precondition": "momentum", "momentum": 0.8, "damping": 0.01}


def mean_reference(gradients, *, warmup=0, beta2=None, **options):
    """Updates by the dense matrix: `F⁻¹x̂` with `x̂` the corrected mean; with `beta2` as long as `x̂`, by `√v̂ + 1e-8`."""
    options = {**PLAIN, **MEAN, **options}
    ring = oracles.Ring([g.numel() for g in gradients[0]], options["window"], compress_of(**options))
    mean = square = 0.0
    updates = []
    for t, step in enumerate(gradients, start=1):
        _, g = ring.push(step)
        mean = options["momentum"] * mean + (1 - options["momentum"]) * g
        damping = options["damping"] * (1 + warmup / t)
        if options["damping_mode"] == "relative":
            damping *= (ring.rows.square().sum() / options["window"] ** 2).item()
        x = mean / (1 - options["momentum"] ** t)
        update = oracles.dense_inverse(ring.rows, x, damping)
        if beta2 is not None:
            square = beta2 * square + (1 - beta2) * g.square()
            update *= x.norm() / update.norm() / ((square / (1 - beta2**t)).sqrt() + 1e-8)
        updates.append(update)
    return updates


def assert_follows(gradients, reference, tolerance=1e-5, **options):
    ours = updates_of(gradients, **{**MEAN, **options})
    assert max(map(relative_error, ours, reference)) <= tolerance


@pytest.mark.parametrize(
    "changes",
    [{}, {"density": 1.0}, {"compression": "none"}, {"selection": "global"}, {"window": 1}, {"momentum": 0.0},
     {"damping": 0.5, "damping_mode": "relative"}],
    ids=str,
)  # fmt: skip
def test_update_is_the_dense_inverse_of_the_mean_over_40_steps(changes):
    gradients = correlated_gradients(40)
    assert_follows(gradients, mean_reference(gradients, **changes), **changes)


@pytest.mark.parametrize("compression", ["topk", "none"])
def test_with_adam_the_root_of_the_gradients_mean_square_divides_it(compression):
    gradients = correlated_gradients(40)
    options = {"compression": compression, "damping": 0.5, "damping_mode": "relative"}
    reference = mean_reference(gradients, beta2=0.95, **options)
    # Of a mean in the span of dense rows 1/17 is left, and its length is found from float32's 1e-7 of the whole.
    assert_follows(gradients, reference, tolerance=5e-5, scaling="adam", adam_beta2=0.95, **options)


@pytest.mark.parametrize("damping_mode", ["absolute", "relative"])
def test_damping_falls_as_the_reciprocal_of_the_step(damping_mode):
    gradients = correlated_gradients(20)
    options = {"damping": 0.01, "damping_mode": damping_mode}
    assert_follows(gradients, mean_reference(gradients, warmup=7, **options), damping_warmup=7, **options)


def test_a_large_window_whose_damping_falls_keeps_no_inverse():
    """The sliding inverse is one of a λ that stands still."""
    gradients = correlated_gradients(6)
    options = {"window": 128, "damping": 0.01}
    assert_follows(gradients, mean_reference(gradients, warmup=3, **options), damping_warmup=3, **options)


@pytest.mark.parametrize("compression", ["topk", "none", "lowrank"])
def test_large_damping_is_adamw(compression):
    ours = torch.nn.Linear(9, 5, dtype=torch.float32)
    theirs = torch.nn.Linear(9, 5)
    theirs.load_state_dict(ours.state_dict())
    options = {"compression": compression, "precondition": "momentum", "damping": 1e12, "damping_mode": "absolute"}
    pairs = [
        (ours, MFAC(ours.parameters(), lr=0.01, weight_decay=0.1, adam_beta2=0.99, **options)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))),
    ]
    for step in range(30):
        batch = torch.randn(8, 9, generator=torch.Generator().manual_seed(step))
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_ggt_takes_the_root_of_the_rows_for_the_mean():
    gradients = correlated_gradients(40)
    params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients[0]]
    options = {"window": 8, "eps": 0.03, "eps_mode": "absolute", "compression": "none", "scaling": "none"}
    optimizer = GGT(params, lr=1.0, precondition="momentum", momentum=0.8, **options)
    ring, mean = oracles.Ring([p.numel() for p in params], 8, oracles.keep_all), 0.0
    for t, step in enumerate(gradients, start=1):
        mean = 0.8 * mean + 0.2 * ring.push(step)[1]
        for param, gradient in zip(params, step, strict=True):
            param.data.zero_()
            param.grad = gradient.clone()
        optimizer.step()
        update = -torch.cat([p.detach().flatten() for p in params]).double()
        assert relative_error(update, oracles.ggt(ring.rows, mean / (1 - 0.8**t), 0.03)) <= 1e-5


def test_where_all_gradients_agree_the_step_is_adamws():
    """The mean is held back as a whole, and its length restored."""
    ours, theirs = (torch.nn.Parameter(torch.ones(12)) for _ in range(2))
    options = {"precondition": "momentum", "compression": "none", "damping": 1.0, "damping_mode": "relative"}
    pairs = ((ours, MFAC([ours], lr=0.01, **options)), (theirs, torch.optim.Adam([theirs], lr=0.01)))
    for _ in range(40):
        for weight, optimizer in pairs:
            weight.grad = torch.linspace(-1, 2, 12)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # F⁻¹ leaves 1/33 of the mean


def test_ggt_averages_once():
    with pytest.raises(ValueError, match=r"`beta1` .* precondition='momentum'"):
        GGT([torch.nn.Parameter(torch.zeros(3))], lr=1.0, beta1=0.9, precondition="momentum")


@pytest.mark.parametrize("scaling", ["adam", "none"])
def test_a_step_that_is_left_out_leaves_the_mean_as_it_was(scaling):
    param = torch.nn.Parameter(torch.ones(20))
    optimizer = MFAC([param], lr=0.1, precondition="momentum", scaling=scaling, block_size=4, density=0.5)
    for value in (1.0, float("nan")):
        param.grad = torch.linspace(-1, 1, 20) * value
        before = {name: tensor.clone() for name, tensor in optimizer.state[param].items()}
        optimizer.step()
    after = optimizer.state[param]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != "skipped")
    assert optimizer.skipped_steps == 1
