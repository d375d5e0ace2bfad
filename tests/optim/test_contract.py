"""The state of every registered optimizer: where it lives, how it is saved, loaded, copied and extended."""

import copy
import pickle

import pytest
import torch
from contract import Tiny, assert_same, backward, each_case, each_name, saved, tiny_model, train, weights
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def run(case, steps=range(7), dtype=torch.float32):
    """A model and its optimizer after some steps; a ring of 4 has wrapped."""
    model = tiny_model(dtype)
    optimizer = case.build(model)
    train(model, optimizer, steps)
    return model, optimizer


def through_file(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "optimizer.pt")
    return torch.load(tmp_path / "optimizer.pt", weights_only=True)


@each_case
def test_state_is_tensors_under_words_and_groups_are_primitives(case):
    _, optimizer = run(case, range(2))
    for state in optimizer.state.values():
        assert all(name.isidentifier() for name in state)
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    for group in optimizer.param_groups:
        values = [value for name, value in group.items() if name not in ("params", "param_names")]
        assert all(isinstance(value, bool | int | float | str | None) for value in values)


@each_case
@DTYPES
def test_file_holds_the_state_to_the_last_bit(case, dtype, tmp_path):
    _, optimizer = run(case, dtype=dtype)
    assert_same(through_file(optimizer.state_dict(), tmp_path), optimizer.state_dict())


@each_name
def test_state_is_made_at_the_first_step_for_every_parameter(case):
    """Also for those without a gradient."""
    model = tiny_model()
    model.first.bias.requires_grad_(False)
    optimizer = case.build(model)
    optimizer.load_state_dict(optimizer.state_dict())  # accelerate loads at every `prepare`, before any step
    assert not optimizer.state_dict()["state"]
    train(model, optimizer, [0], lambda _: setattr(model.second.weight, "grad", None))
    assert set(optimizer.state) == {p for group in optimizer.param_groups for p in group["params"]}


@each_case
@DTYPES
def test_resume_from_a_file_is_bit_for_bit(case, dtype, tmp_path):
    model, optimizer = run(case, dtype=dtype)
    resumed = copy.deepcopy(model)
    fresh = case.build(resumed, lr=0.5)
    fresh.load_state_dict(through_file(optimizer.state_dict(), tmp_path))
    assert_same(fresh.state_dict(), optimizer.state_dict())
    for step in range(7, 12):
        train(model, optimizer, [step])
        train(resumed, fresh, [step])
        assert_same(weights(resumed), weights(model), f"step {step}")
    assert_same(fresh.state_dict(), optimizer.state_dict())


@each_case
def test_options_of_the_saved_state_replace_those_of_the_constructor(case, tmp_path):
    """Nothing on `self` is needed after loading."""
    model, optimizer = run(case)
    resumed = copy.deepcopy(model)
    fresh = type(case)(case.name).build(resumed)
    fresh.load_state_dict(through_file(optimizer.state_dict(), tmp_path))
    train(model, optimizer, range(7, 12))
    train(resumed, fresh, range(7, 12))
    assert_same(weights(resumed), weights(model))
    assert_same(fresh.state_dict(), optimizer.state_dict())


@each_case
def test_load_keeps_dtypes_and_leaves_the_given_dict_alone(case, tmp_path):
    """torch would cast every state tensor, integer indices included, to the bfloat16 of the parameters."""
    _, optimizer = run(case, dtype=torch.bfloat16)
    given = through_file(optimizer.state_dict(), tmp_path)
    kept = copy.deepcopy(given)
    model = tiny_model(torch.bfloat16)
    fresh = case.build(model)
    fresh.load_state_dict(given)
    for state in fresh.state.values():
        assert not state.get("indices", torch.zeros(0, dtype=torch.uint8)).is_floating_point()
        assert state.get("gram", torch.zeros(0, dtype=torch.float64)).dtype is torch.float64
    train(model, fresh, range(2))
    assert_same(given, kept)


@each_case
def test_loading_from_a_live_optimizer_shares_nothing_with_it(case):
    model, optimizer = run(case)
    expected_model, expected = run(case, range(10))
    other = copy.deepcopy(model)
    loaded = case.build(other)
    loaded.load_state_dict(optimizer.state_dict())
    for step in range(7, 10):
        train(model, optimizer, [step])
        train(other, loaded, [step])
    for m, o in ((model, optimizer), (other, loaded)):
        assert_same(weights(m), weights(expected_model))
        assert_same(o.state_dict(), expected.state_dict())


@each_name
def test_loading_over_a_state_forgets_it(case):
    model, optimizer = run(case, range(3))
    other, loaded = run(case, range(20, 26))
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 9))
    train(other, loaded, range(3, 9))
    assert_same(weights(other), weights(model))


@each_name
def test_state_of_another_model_is_refused(case):
    """And leaves the optimizer as it was, whether the number of tensors or their shapes tell."""
    model, optimizer = run(case, range(2))
    expected_model, _ = run(case, range(4))
    before = saved(optimizer)
    for other in (torch.nn.Linear(5, 9), Tiny(hidden=9)):
        other_optimizer = case.build(other)
        backward(other, 0) if isinstance(other, Tiny) else other(torch.ones(2, 5)).sum().backward()
        other_optimizer.step()
        with pytest.raises(ValueError, match="saved"):
            optimizer.load_state_dict(other_optimizer.state_dict())
        assert_same(optimizer.state_dict(), before)
    train(model, optimizer, range(2, 4))
    assert_same(weights(model), weights(expected_model))


@each_name
def test_state_of_another_optimizer_is_refused(case):
    model, optimizer = run(case, range(2))
    adamw = torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups])
    train(model, adamw, [0])
    with pytest.raises(ValueError, match="saved state is not"):
        optimizer.load_state_dict(adamw.state_dict())


@each_case
def test_preparing_by_accelerate_changes_nothing(case):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    expected_model, expected = run(case, range(10), torch.bfloat16)
    model = tiny_model(torch.bfloat16)
    optimizer = accelerator.prepare_optimizer(case.build(model))
    train(model, optimizer, range(7))
    optimizer = accelerator.prepare_optimizer(optimizer.optimizer)
    train(model, optimizer, range(7, 10))
    assert_same(weights(model), weights(expected_model))
    assert_same(optimizer.state_dict(), expected.state_dict())


@each_case
@pytest.mark.parametrize("first", [0, 6])
def test_zero_gradients_at_lr_0_change_nothing(case, first):
    """So torch.distributed.checkpoint materialises a state: at the first step too."""
    model, optimizer = run(case, range(first))
    before, state = weights(model), saved(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, [99], lambda _: [p.grad.zero_() for p in model.parameters()])
    assert_same(weights(model), before)
    if first:
        assert_same(optimizer.state_dict()["state"], state["state"])
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    train(model, optimizer, range(first, 9))
    expected_model, expected = run(case, range(9))
    assert_same(weights(model), weights(expected_model))
    assert_same(optimizer.state_dict(), expected.state_dict())


@each_case
def test_distributed_checkpoint_restores_by_name(case):
    model, optimizer = run(case)
    by_name = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    resumed = copy.deepcopy(model)
    fresh = case.build(resumed)
    set_optimizer_state_dict(resumed, fresh, optim_state_dict=by_name)
    train(model, optimizer, range(7, 10))
    train(resumed, fresh, range(7, 10))
    assert_same(weights(resumed), weights(model))


@each_case
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copy_continues_by_itself(case, copied):
    model, optimizer = run(case)
    twin_model, twin = copied((model, optimizer))
    train(model, optimizer, range(7, 10))
    train(twin_model, twin, range(7, 10))
    assert_same(weights(twin_model), weights(model))
    assert_same(twin.state_dict(), optimizer.state_dict())


@each_case
def test_group_added_after_some_steps_is_optimized_and_the_state_stays(case):
    model, optimizer = run(case)
    before = saved(optimizer)["state"]
    added = torch.nn.Parameter(torch.ones(3, 2))
    group = {"params": [added], "lr": 0.02, "weight_decay": 0.0}
    if "global" in case.options.values() or "layer" in case.options.values():
        with pytest.raises(NotImplementedError, match="selection='block'"):
            optimizer.add_param_group(group)
        assert_same(optimizer.state_dict()["state"], before)
        return
    optimizer.add_param_group(group)
    optimizer.zero_grad()
    backward(model, 7)
    added.grad = 2 * added.detach()
    optimizer.step()
    assert added in optimizer.state
    assert not torch.equal(added, torch.ones(3, 2))
    after = optimizer.state_dict()["state"]
    assert all(before[i].keys() == after[i].keys() for i in before)
