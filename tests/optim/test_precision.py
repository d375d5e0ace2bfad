"""Every optimizer in every precision: autocast, models of 16 bits, and a GradScaler whose steps really overflow."""

import pytest
import torch
from contract import assert_same, each_name, saved, tiny_model, weights

from hf_efcp import create_optimizer

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step % 3)
    return [torch.randn(16, n, generator=generator).to(dtype) for n in (5, 3)]


def loss_of(model, step, dtype=torch.float32, autocast=None):
    x, y = batch(step, dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        return (model(x) - y).float().square().mean()


def scaled_steps(model, optimizer, scaler, steps):
    """Steps under fp16 autocast; for each whether the scaler left it out."""
    skipped = []
    for step in steps:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, autocast=torch.float16)).backward()
        scaler.unscale_(optimizer)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < before)
    return skipped


def scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


@each_name
def test_a_step_that_overflows_leaves_no_trace(case):
    """fp16 gradients of a huge scale are infinite; the run afterwards is the one that began at the scale that works."""
    model = tiny_model()
    optimizer = case.build(model)
    tell(optimizer, first := scaler(2.0**30))
    before = weights(model)
    count = 0
    while scaled_steps(model, optimizer, first, [0]) == [True]:
        assert_same(weights(model), before)
        assert not optimizer.state_dict()["state"]
        count += 1
    assert count > 3
    scaled_steps(model, optimizer, first, range(1, 6))
    plain = tiny_model()
    other = case.build(plain)
    tell(other, second := scaler(first.get_scale()))
    assert scaled_steps(plain, other, second, range(6)) == [False] * 6
    assert_same(weights(model), weights(plain))
    assert_same(saved(optimizer), saved(other))


@each_name
def test_an_overflow_in_the_middle_leaves_state_and_counters(case):
    model = tiny_model()
    optimizer = case.build(model)
    tell(optimizer, small_scale := scaler(2.0**8))
    scaled_steps(model, optimizer, small_scale, range(3))
    state, before = saved(optimizer), weights(model)
    tell(optimizer, huge := scaler(2.0**30))
    assert scaled_steps(model, optimizer, huge, [3]) == [True]
    assert_same(saved(optimizer), state)
    assert_same(weights(model), before)


def tell(optimizer, grad_scaler):
    """As Trainer's callback does: statistics of hooks are taken before gradients are unscaled."""
    if hasattr(optimizer, "use_scaler"):
        optimizer.use_scaler(grad_scaler)


@each_name
@LOW
def test_models_of_16_bits_learn(case, dtype):
    model = tiny_model(dtype)
    optimizer = case.build(model, lr=0.02 if "adagrad" not in case.name else 0.3)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = loss_of(model, step, dtype)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.dtype is dtype and p.isfinite().all() for p in model.parameters())
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])


@each_name
def test_bfloat16_autocast_learns(case):
    model = tiny_model()
    optimizer = case.build(model, lr=0.02 if "adagrad" not in case.name else 0.3)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = loss_of(model, step, autocast=torch.bfloat16)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])


@LOW
def test_the_residual_of_16_bit_weights_may_be_float32(dtype):
    """And stays it when the state is loaded."""
    model = tiny_model(dtype)
    optimizer = create_optimizer("efcp_mfac", model, lr=0.01, residual_dtype="float32")
    loss_of(model, 0, dtype).backward()
    optimizer.step()
    again = create_optimizer("efcp_mfac", model, lr=0.01, residual_dtype="float32")
    again.load_state_dict(optimizer.state_dict())
    assert {state["residual"].dtype for state in again.state.values()} == {torch.float32}
