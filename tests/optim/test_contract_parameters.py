"""Parameters of every shape, layout and dtype under every registered optimizer."""

import pytest
import torch
from contract import assert_same, each_case, each_name, rounding, weights
from torch import nn

LAYOUTS = {
    "one element": [(1,), (4, 3)],
    "no element first": [(0,), (4, 3)],
    "no element last": [(4, 3), (0, 5)],
    "no element alone": [(0,)],
    "scalar alone": [()],
    "one block": [(2, 4)],
    "a row more than blocks": [(3, 3), (17,)],
    "four dimensions": [(3, 2, 3, 3), (3,)],
}


class Given(nn.Module):
    """Parameters whose gradients a test sets itself."""

    def __init__(self, shapes, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)) for shape in shapes
        )


def set_gradients(model, step, dtype=None):
    """Numbers that bfloat16 holds, so that every dtype sees the same."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(dtype or p.dtype)


def steps(model, optimizer, numbers=range(6)):
    for step in numbers:
        set_gradients(model, step)
        optimizer.step()


@each_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_any_shape_take_steps_and_resume(case, layout):
    model = Given(LAYOUTS[layout])
    optimizer = case.build_plain(model)
    start = weights(model)
    steps(model, optimizer)
    for p, before in zip(model.parameters(), start, strict=True):
        assert p.isfinite().all()
        assert not p.numel() or not torch.equal(p, before)
    assert optimizer.skipped_steps == 0
    resumed = Given(LAYOUTS[layout])
    resumed.load_state_dict(model.state_dict())
    fresh = case.build_plain(resumed)
    fresh.load_state_dict(optimizer.state_dict())
    steps(model, optimizer, range(6, 9))
    steps(resumed, fresh, range(6, 9))
    assert_same(weights(resumed), weights(model))


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_dtype_take_the_float32_step(case, dtype):
    """The rule is computed in float32 and rounded once, to the parameter's dtype.

    Sketchy computes in float64 for float64, and S-AdaGrad multiplies what float32 rounds by up to 1/√δ = 1e4.
    """
    close = {"rtol": 0, "atol": 1e-4} if dtype is torch.float64 and case.name == "sketchy_adagrad" else {}
    shapes = [(9, 5), (11,)]
    reference, model = Given(shapes), Given(shapes, dtype)
    expected, optimizer = case.build_plain(reference, lr=0.01), case.build_plain(model, lr=0.01)
    steps(reference, expected, range(1))
    steps(model, optimizer, range(1))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.dtype is dtype
        torch.testing.assert_close(p, q.to(dtype), **close)


@each_name
def test_dtypes_may_be_mixed(case):
    """A model in bfloat16 whose norms stay in float32."""
    model = nn.Sequential(Given([(9, 5)], torch.bfloat16), Given([(9,)]))
    optimizer = case.build_plain(model)
    steps(model, optimizer)
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16, torch.float32]
    assert all(p.isfinite().all() for p in model.parameters())


@each_case
def test_memory_format_does_not_matter(case):
    """Of the weight, of the gradient, or of both: entries are counted in their logical order."""
    ends = []
    formats = [torch.contiguous_format, torch.channels_last]
    for weight_format, gradient_format in [(a, b) for a in formats for b in formats]:
        model = Given([(4, 3, 2, 2), (5,)])
        model.weights[0].data = model.weights[0].data.contiguous(memory_format=weight_format)
        optimizer = case.build_plain(model)
        for step in range(6):
            set_gradients(model, step)
            model.weights[0].grad = model.weights[0].grad.contiguous(memory_format=gradient_format)
            optimizer.step()
        assert model.weights[0].is_contiguous(memory_format=weight_format)
        ends.append(weights(model))
    for end in ends[1:]:
        assert_same(end, ends[0], within=rounding(optimizer))


@each_name
def test_transposed_weight_is_a_weight(case):
    """As a tied or converted checkpoint may hold it."""
    plain, strided = Given([(6, 4)]), Given([(6, 4)])
    strided.weights[0].data = strided.weights[0].data.T.contiguous().T
    steps(plain, case.build_plain(plain))
    optimizer = case.build_plain(strided)
    steps(strided, optimizer)
    assert_same(weights(strided), weights(plain), within=rounding(optimizer))


@each_name
def test_shared_parameter_counts_once(case):
    model = Given([(6, 4)])
    model.same = model.weights[0]
    optimizer = case.build_plain(model)
    steps(model, optimizer, range(2))
    assert len(optimizer.state) == 1


@each_name
def test_empty_group_is_fine(case):
    """Trainer makes one where no parameter goes without decay."""
    model = Given([(6, 4)])
    if case.needs_model:
        pytest.skip("built over a module: it makes no groups")
    optimizer = case.build_plain([{"params": list(model.parameters())}, {"params": [], "weight_decay": 0.0}])
    steps(model, optimizer, range(6))
    fresh = case.build_plain([{"params": list(model.parameters())}, {"params": [], "weight_decay": 0.0}])
    fresh.load_state_dict(optimizer.state_dict())
    assert_same(fresh.state_dict(), optimizer.state_dict())


@each_name
def test_moved_model_keeps_its_state(case):
    """`model.to(dtype)` between steps replaces the data of the parameters, not the parameters."""
    model = Given([(9, 5), (11,)])
    optimizer = case.build_plain(model)
    steps(model, optimizer, range(5))
    before = {name: value.clone() for name, value in optimizer.state[model.weights[0]].items()}
    model.to(torch.bfloat16)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(dict(optimizer.state[model.weights[0]]), before)
    steps(model, optimizer, range(5, 7))
    assert all(p.isfinite().all() for p in model.parameters())


@each_name
def test_integer_and_complex_parameters_are_refused(case):
    if case.needs_model:
        pytest.skip("modules hold floating point parameters")
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="floating point"):
            case.build_plain([nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)])


@each_name
def test_sparse_gradient_is_refused_with_what_works_instead(case):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = case.build_plain(model)
    model(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse=False"):
        optimizer.step()


@each_name
def test_group_options_are_checked(case):
    if case.needs_model:
        pytest.skip("built over a module: it takes no groups")

    def build(**options):
        return case.build_plain([{"params": [nn.Parameter(torch.zeros(3))], **options}])

    for wrong in ({"lr": -1.0}, {"weight_decay": -0.1}, {"lr": float("nan")}, {"lr": float("inf")}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            build(**wrong)
    with pytest.raises(TypeError, match="`lr` must be"):
        build(lr="1e-3")
    with pytest.raises(ValueError, match="no option `learning_rate`"):
        build(learning_rate=1e-3)
    optimizer = build(lr=0.5)
    if "momentum" in optimizer.defaults:
        with pytest.raises(ValueError, match="`momentum` is one setting for the whole optimizer"):
            build(momentum=0.123)
    with pytest.raises(ValueError, match="`lr` must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@each_name
def test_model_may_be_trained_again_after_a_refusal(case):
    """A refused sparse gradient leaves state and weights as they were."""
    model = Given([(6, 4)])
    optimizer = case.build_plain(model)
    steps(model, optimizer, range(5))
    before = weights(model)
    model.weights[0].grad = torch.zeros(6, 4).to_sparse()
    with pytest.raises(NotImplementedError):
        optimizer.step()
    assert_same(weights(model), before)
    steps(model, optimizer, range(5, 6))
    expected = Given([(6, 4)])
    steps(expected, case.build_plain(expected), range(6))
    assert_same(weights(model), weights(expected))
