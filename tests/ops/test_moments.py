"""Adam's moments on every backend: against torch's Adam in float64, and what rounding to bfloat16 costs."""

import importlib.util

import pytest
import torch

from hf_efcp.ops import torch_moments

N = 5000
YES, NO = torch.tensor(True), torch.tensor(False)
MODULES = [torch_moments]
if importlib.util.find_spec("numba"):
    from hf_efcp.ops import numba_calls, numba_ops

    MODULES.append(numba_ops)
if importlib.util.find_spec("triton") and not torch.cuda.is_available():  # in Triton's interpreter
    from hf_efcp.ops import triton_ops

    MODULES.append(triton_ops)
BACKENDS = [module.adam_ for module in MODULES]
each_module = pytest.mark.parametrize("ops", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
each_backend = pytest.mark.parametrize("adam_", BACKENDS, ids=lambda f: f.__module__.rpartition(".")[2])


def draw(seed, n=N):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@each_backend
def test_direction_is_that_of_torchs_adam(adam_):
    first, second = torch.zeros(N), torch.zeros(N)
    weight = torch.nn.Parameter(torch.zeros(N, dtype=torch.float64))
    reference = torch.optim.Adam([weight], lr=1.0, betas=(0.8, 0.95))
    for step in range(1, 31):
        gradient = draw(step)
        weight.data.zero_()
        weight.grad = gradient.double()
        reference.step()
        ours = adam_(gradient, first, second, torch.tensor(step), YES, beta1=0.8, beta2=0.95)
        torch.testing.assert_close(ours.double(), -weight.detach(), rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_accepted_changes_no_moment(adam_, dtype):
    first, second = draw(1).to(dtype), draw(2).abs().to(dtype)
    before = first.clone(), second.clone()
    update = adam_(draw(3), first, second, torch.tensor(7), NO, beta1=0.9, beta2=0.999)
    assert not update.any()
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


@each_backend
def test_second_moment_is_rounded_without_bias_to_a_neighbour(adam_):
    n = 200_000
    update, first, second = draw(1, n), torch.zeros(n), torch.zeros(n, dtype=torch.bfloat16)
    exact = update.square()
    adam_(update, first, second, torch.tensor(3), YES, beta1=0.0, beta2=0.0)
    step = torch.exp2(exact.log2().floor() - 7)  # bfloat16 has 8 bits, one of them implied
    error = (second.float() - exact) / step
    assert error.abs().max() < 1
    assert abs(error.mean()) < 5 * error.std() / n**0.5
    assert error.std() > 0.3  # rounded to the nearest it would be 0.29, and 0.41 so


@pytest.mark.skipif(len(BACKENDS) == 1, reason="needs numba or triton")
def test_backends_agree_on_the_bits_of_bfloat16_moments():
    """But where the last bit of a float32 differs: there the two neighbours are as good as one another."""
    results = []
    for adam_ in BACKENDS:
        update, first, second = draw(1), draw(2).bfloat16(), draw(3).abs().bfloat16()
        adam_(update, first, second, torch.tensor(5), YES, beta1=0.9, beta2=0.999)
        results.append((update, first.float(), second.float()))
    for result in results[1:]:
        for theirs, ours in zip(results[0], result, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)
            assert (ours - theirs).abs().gt(1e-5 * theirs.abs()).float().mean() <= 0.2
        torch.testing.assert_close(result[0], results[0][0], rtol=1e-5, atol=0)


@pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="needs numba: pip install hf-efcp[cpu]")
def test_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(numba_calls, "WORTH_A_THREAD", 1)
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            update, first, second = draw(1), draw(2).bfloat16(), draw(3).abs().bfloat16()
            numba_ops.adam_(update, first, second, torch.tensor(5), YES, beta1=0.9, beta2=0.999)
            results.append((update, first, second))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, several) for one, several in zip(*results, strict=True))


@each_module
def test_mean_and_root_are_torchs_adam_in_two_parts(ops):
    first, second = torch.zeros(N), torch.zeros(N)
    weight = torch.nn.Parameter(torch.zeros(N, dtype=torch.float64))
    reference = torch.optim.Adam([weight], lr=1.0, betas=(0.8, 0.95))
    for count in range(1, 31):
        gradient, step = draw(count), torch.tensor(count)
        weight.data.zero_()
        weight.grad = gradient.double()
        reference.step()
        mean = ops.adam_mean_(gradient, first, second, step, YES, beta1=0.8, beta2=0.95)
        assert mean is gradient
        torch.testing.assert_close(mean, first / (1 - 0.8**count))
        ours = ops.adam_direction_(mean, second, step, YES, beta2=0.95)
        torch.testing.assert_close(ours.double(), -weight.detach(), rtol=1e-5, atol=1e-6)


@each_module
def test_mean_needs_no_second_moment(ops):
    first = draw(1)
    expected = (0.9 * first + 0.1 * draw(2)) / (1 - 0.9**4)
    mean = ops.adam_mean_(draw(2), first, None, torch.tensor(4), YES, beta1=0.9, beta2=0.999)
    torch.testing.assert_close(mean, expected)


@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_part_takes_what_is_not_accepted(ops, dtype):
    first, second = draw(1).to(dtype), draw(2).abs().to(dtype)
    before = first.clone(), second.clone()
    ops.adam_mean_(draw(3), first, second, torch.tensor(7), NO, beta1=0.9, beta2=0.999)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    assert not ops.adam_direction_(draw(3), second, torch.tensor(7), NO, beta2=0.999).any()


@pytest.mark.skipif(len(MODULES) == 1, reason="needs numba or triton")
def test_backends_round_the_parts_moments_alike():
    results = []
    for ops in MODULES:
        gradient, first, second = draw(1), draw(2).bfloat16(), draw(3).abs().bfloat16()
        ops.adam_mean_(gradient, first, second, torch.tensor(5), YES, beta1=0.9, beta2=0.999)
        results.append((gradient, first.float(), second.float()))
    for result in results[1:]:
        torch.testing.assert_close(result[0], results[0][0], rtol=1e-5, atol=1e-7)
        for theirs, ours in zip(results[0][1:], result[1:], strict=True):  # the last bit of a float32 may round it
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)
            assert (ours != theirs).float().mean() <= 0.01
