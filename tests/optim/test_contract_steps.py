"""What one step of every registered optimizer does with gradients, groups, schedules and parameters."""

import pytest
import torch
from contract import (
    assert_same,
    backward,
    each_case,
    each_name,
    rounding,
    saved,
    tiny_model,
    train,
    weights,
    without_count,
)  # fmt: skip

from hf_efcp.optim import window
from hf_efcp.optim.base import EfcpOptimizer
from hf_efcp.optim.window import WindowOptimizer

BAD = [float("nan"), float("inf"), -float("inf")]


def poison(model, at, value=float("nan")):
    """Puts `value` in one entry of one gradient before the steps `at`."""

    def change(step):
        if step in at:
            model.second.weight.grad[1, 2] = value

    return change


@each_case
@pytest.mark.parametrize("at", [0, 6], ids=["first", "later"])
@pytest.mark.parametrize("value", BAD, ids=str)
def test_gradient_that_is_not_finite_is_left_out_and_counted(case, at, value):
    """The run goes on as if that step had never been."""
    model, expected_model = tiny_model(), tiny_model()
    optimizer, expected = case.build(model), case.build(expected_model)
    train(model, optimizer, range(at))
    before, state = weights(model), saved(optimizer)
    train(model, optimizer, [at], poison(model, [at], value))
    assert_same(weights(model), before)
    if at:
        assert_same(without_count(optimizer.state_dict()), without_count(state))
    assert optimizer.skipped_steps == 1
    steps = [step for step in range(10) if step != at]
    train(model, optimizer, [step for step in steps if step > at])
    train(expected_model, expected, steps)
    assert_same(weights(model), weights(expected_model))
    assert_same(without_count(optimizer.state_dict()), without_count(expected.state_dict()))
    assert optimizer.skipped_steps == 1


@each_case
def test_masks_do_what_branches_do(case, monkeypatch):
    """On a GPU no host reads a flag: steps at lr 0, with NaN, and all zero must come out the same.

    Sums in float64, which only a host that may look chooses, are left out. Where steps are counted on the CPU, masked
    ones count too, and move the schedules of those that follow: there the NaN comes last.
    """
    monkeypatch.setattr(window, "cancels", lambda *_: False)

    def run():
        model = tiny_model()
        optimizer = case.build(model)
        change = poison(model, [0, 1, 6, 7] if isinstance(optimizer, WindowOptimizer) else [9], float("inf"))
        for step in range(10):
            for group in optimizer.param_groups:
                group["lr"] = 0.0 if step in (2, 8) else 0.01
            zero = step == 8
            train(
                model, optimizer, [step], change if not zero else lambda _: [p.grad.zero_() for p in model.parameters()]
            )
        state = optimizer.state_dict()
        if not isinstance(optimizer, WindowOptimizer):
            for tensors in state["state"].values():
                for count in ("step", "steps", "adam_step"):
                    tensors.pop(count, None)
        return weights(model), state, rounding(optimizer)

    *branches, within = run()
    monkeypatch.setattr(EfcpOptimizer, "_reads", lambda self, flag: False)
    assert_same(list(run()[:2]), branches, within=within)


@each_case
def test_gradients_that_are_all_zero_are_a_step(case):
    """At a learning rate above 0 they are no reason to skip: decay goes on, nothing becomes NaN."""
    model = tiny_model()
    optimizer = case.build(model, lr=0.1)
    before = model.second.weight.detach().clone()
    train(model, optimizer, range(2), lambda _: [p.grad.zero_() for p in model.parameters()])
    torch.testing.assert_close(model.second.weight.detach(), before * (1 - 0.1 * 0.1) ** 2)
    train(model, optimizer, range(2, 4))
    assert optimizer.skipped_steps == 0
    assert not torch.equal(model.second.weight.detach(), before)


@each_case
def test_parameters_on_two_devices_are_one_model(case, monkeypatch):
    """Devices exchange m dots, nothing more; float64 sums in another order are the only difference."""
    if not hasattr(case.build(tiny_model()), "_segment_key"):
        pytest.skip("this optimizer treats each parameter by itself")
    expected_model, model = tiny_model(), tiny_model()
    train(expected_model, case.build(expected_model), range(8))
    monkeypatch.setattr(WindowOptimizer, "_segment_key", lambda self, parameter: parameter.ndim)
    optimizer = case.build(model)
    if case.options.get("selection") == "global":
        with pytest.raises(NotImplementedError, match="selection='block'"):
            train(model, optimizer, [0])
        return
    train(model, optimizer, range(8))
    torch.testing.assert_close(weights(model), weights(expected_model), rtol=1e-5, atol=1e-6)


@each_case
def test_order_of_the_parameters_does_not_matter(case):
    models = [tiny_model(), tiny_model()]
    for model, order in zip(models, (1, -1), strict=True):
        params = dict(list(model.named_parameters())[::order])
        optimizer = case.build_plain(model if case.needs_model else list(params.values()))
        train(model, optimizer, range(8))
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-5, atol=1e-6)


@each_case
def test_weight_decay_is_decoupled_and_the_groups_own(case):
    """`p ← p(1 − lr·weight_decay) − lr·u`: with and without decay a first step differs by `lr·weight_decay·p`."""
    start = weights(tiny_model())
    ends = []
    for decays in ((0.0, 0.0), (0.5, 0.0)):
        model = tiny_model()
        optimizer = case.build(model, lr=0.1)
        for group, decay in zip(optimizer.param_groups, decays, strict=False):
            group["weight_decay"] = decay
        train(model, optimizer, [0])
        ends.append(weights(model))
    decayed = optimizer.param_groups[0]["params"]
    for parameter, p, plain, shorter in zip(model.parameters(), start, *ends, strict=True):
        factor = 0.1 * 0.5 * any(parameter is q for q in decayed)
        torch.testing.assert_close(plain - shorter, factor * p, rtol=1e-5, atol=1e-6)  # a difference of float32 weights


@each_name
def test_each_group_has_its_own_learning_rate(case):
    model, reference = tiny_model(), tiny_model()
    optimizer, expected = case.build(model), case.build(reference)
    if len(optimizer.param_groups) < 2:
        pytest.skip("built over a module: one group")
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, [0])
    train(reference, expected, [0])
    still = {id(p) for p in optimizer.param_groups[0]["params"]}
    for p, q, start in zip(model.parameters(), reference.parameters(), weights(tiny_model()), strict=True):
        assert_same(p.detach(), start if id(p) in still else q.detach())


@each_name
def test_learning_rate_scheduler_sets_the_rate(case):
    model, reference = tiny_model(), tiny_model()
    optimizer, expected = case.build(model, lr=0.01), case.build(reference)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(6):
        train(model, optimizer, [step])
        schedule.step()
        for group in expected.param_groups:
            group["lr"] = 0.01 / (1 + step)
        train(reference, expected, [step])
    assert_same(weights(model), weights(reference))


@each_name
def test_schedule_of_momentum_and_rate_resumes_bit_for_bit(case):
    """OneCycleLR also writes the groups' `momentum`, which loading reads."""
    model, halted = tiny_model(), tiny_model()

    def start(model):
        optimizer = case.build(model)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.01, total_steps=20, cycle_momentum="momentum" in optimizer.defaults
        )

    def go(model, optimizer, schedule, steps):
        for step in steps:
            train(model, optimizer, [step])
            schedule.step()

    go(model, *start(model), range(10))
    optimizer, schedule = start(halted)
    go(halted, optimizer, schedule, range(5))
    resumed = case.build(halted)
    resumed_schedule = torch.optim.lr_scheduler.OneCycleLR(
        resumed, max_lr=0.01, total_steps=20, cycle_momentum="momentum" in resumed.defaults
    )
    resumed.load_state_dict(optimizer.state_dict())
    resumed_schedule.load_state_dict(schedule.state_dict())
    go(halted, resumed, resumed_schedule, range(5, 10))
    assert_same(weights(halted), weights(model))


@each_name
def test_closure_gives_gradients_and_the_loss(case):
    model, reference = tiny_model(), tiny_model()
    optimizer, expected = case.build(model), case.build(reference)
    loss = optimizer.step(lambda: backward(model, 0))
    train(reference, expected, [0])
    assert loss.requires_grad
    assert_same(weights(model), weights(reference))


@each_case
def test_gradients_are_read_and_not_written(case):
    model = tiny_model()
    optimizer = case.build(model)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    assert all(
        p.grad is grad and torch.equal(grad, copy) for p, (grad, copy) in zip(model.parameters(), before, strict=True)
    )


@each_case
def test_parameter_without_gradient_stays_where_it_is(case):
    """Frozen from the start, frozen later, or not reached by this step's loss: decay and momentum leave it alone."""
    model = tiny_model()
    optimizer = case.build(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5
    model.first.weight.requires_grad_(False)
    train(model, optimizer, range(4))
    assert_same(model.first.weight.detach(), tiny_model().first.weight.detach())
    model.second.weight.requires_grad_(False)
    before = model.second.weight.detach().clone()
    bias = model.first.bias.detach().clone()
    train(model, optimizer, range(4, 6))
    assert_same(model.second.weight.detach(), before)
    assert not torch.equal(model.first.bias.detach(), bias)


@each_case
def test_step_without_any_gradient_does_nothing(case):
    model = tiny_model()
    optimizer = case.build(model)
    optimizer.step()
    assert_same(weights(model), weights(tiny_model()))
    train(model, optimizer, range(3))
    before, state = weights(model), saved(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(weights(model), before)
    assert_same(optimizer.state_dict(), state)
