"""Compact storage of rows, residual and moments: what it costs in exactness, and that the cost stays bounded."""

import pytest
import torch

from hf_efcp.ops.torch_ops import pack_int4, unpack_int4
from hf_efcp.optim import MFAC

WINDOW = 16


def gradients(steps: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale, mean = torch.randn(60, 50, generator=generator).exp() * 0.01, torch.randn(60, 50, generator=generator)
    return [scale * (0.5 * mean + torch.randn(60, 50, generator=generator)) for _ in range(steps)]


def residual_of(optimizer: MFAC) -> torch.Tensor:
    return next(iter(optimizer._segments)).window.residuals()[0].float()


def newest_row(optimizer: MFAC, step: int) -> torch.Tensor:
    segment = next(iter(optimizer._segments))
    one, out = torch.zeros(1, WINDOW), torch.zeros(segment.layout.size)
    one[0, step % WINDOW] = 1
    segment.window.combine(one, out)
    return segment.layout.split(out)[0]


def make(parameter: torch.nn.Parameter, **options) -> MFAC:
    plain = {"window": WINDOW, "density": 0.02, "block_size": 256, "precondition": "compressed", "scaling": "none"}
    return MFAC([parameter], lr=1e-2, **{**plain, "momentum": 0.0, **options})


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8"])
def test_nothing_is_lost_in_a_float32_residual(value_dtype):
    """Rows pushed and residual together are the sum of all gradients, however coarse the stored values."""
    parameter = torch.nn.Parameter(torch.zeros(60, 50))
    optimizer = make(parameter, value_dtype=value_dtype)
    pushed, total = torch.zeros(60, 50), torch.zeros(60, 50)
    for step, gradient in enumerate(gradients(100)):
        parameter.grad = gradient.clone()
        optimizer.step()
        pushed += newest_row(optimizer, step)
        total += gradient
    difference = pushed + residual_of(optimizer) - total
    assert difference.abs().max() <= 1e-5 * total.abs().max()  # rounding of a hundred float32 sums


def test_error_of_a_4_bit_residual_stays_bounded_over_1000_steps():
    """Each step adds at most one grid step to an entry, and the grid does not grow: top-k takes the large entries."""
    parameter = torch.nn.Parameter(torch.zeros(60, 50))
    optimizer = make(parameter, residual_dtype="int4")
    errors, norms = [], []
    before = torch.zeros(60, 50)
    for step, gradient in enumerate(gradients(1000)):
        parameter.grad = gradient.clone()
        optimizer.step()
        exact = before + gradient - newest_row(optimizer, step)
        before = residual_of(optimizer)
        state = optimizer.state[parameter]
        assert (before - exact).abs().max() <= state["residual_grid"][:, 0].max() * (1 + 1e-5)
        errors.append((before - exact).norm())
        norms.append(before.norm())
    errors, norms = torch.stack(errors), torch.stack(norms)
    assert errors[500:].max() <= 1.5 * errors[100:500].max()
    assert norms[500:].max() <= 1.5 * norms[100:500].max()


def test_zero_is_exact_in_4_bits_and_the_error_at_most_a_step():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator) * torch.logspace(-20, 5, 50)[:, None]
    x[:, ::3] = 0
    packed, grid = pack_int4(x)
    back = unpack_int4(packed, grid)
    assert packed.dtype is torch.uint8
    assert packed.shape == (50, 32)
    assert (back[:, ::3] == 0).all()
    assert ((back - x).abs() <= grid[:, :1] * (1 + 1e-6)).all()


def test_second_moment_in_bfloat16_does_not_stand_still():
    """β₂ = 0.999 moves it by less than half a step of bfloat16; rounded to the nearest it would keep its value."""
    runs = {}
    for dtype in ("float32", "bfloat16"):
        parameter = torch.nn.Parameter(torch.zeros(60, 50))
        optimizer = make(parameter, scaling="adam", momentum=0.9, moment_dtype=dtype, damping=1e6)
        for gradient in gradients(600):
            parameter.grad = gradient.clone()
            optimizer.step()
        runs[dtype] = optimizer.state[parameter]["exp_avg_sq"].float()
    assert optimizer.state[parameter]["exp_avg_sq"].dtype is torch.bfloat16
    ratio = runs["bfloat16"] / runs["float32"]
    assert abs(ratio[runs["float32"] > 0].mean() - 1) <= 0.02  # unbiased up to the noise of 3000 entries


def test_moments_in_bfloat16_give_nearly_the_same_weights():
    weights = {}
    for dtype in ("float32", "bfloat16"):
        parameter = torch.nn.Parameter(torch.zeros(60, 50))
        optimizer = make(parameter, scaling="adam", momentum=0.9, moment_dtype=dtype)
        for gradient in gradients(200):
            parameter.grad = gradient.clone()
            optimizer.step()
        weights[dtype] = parameter.detach()
    gap = (weights["bfloat16"] - weights["float32"]).norm() / weights["float32"].norm()
    assert 0 < gap <= 0.02  # two decimals of bfloat16
