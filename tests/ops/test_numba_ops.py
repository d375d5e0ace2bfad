"""The numba backend against the definition in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    NO,
    YES,
    accumulate_on,
    assert_same,
    dense,
    draw,
    each_residual_dtype,
    each_value_dtype,
    make_residual,
    make_window,
)

from hf_efcp.ops import backend, torch_ops
from hf_efcp.optim import GGT, MFAC

pytest.importorskip("numba", reason="needs numba: pip install hf-efcp[cpu]")
from hf_efcp.ops import numba_calls, numba_compiler, numba_ops


@pytest.mark.parametrize(
    ("n_blocks", "block_size", "k"), [(6, 64, 5), (6, 4096, 41), (4, 32, 32), (4, 1030, 7), (2, 2, 1), (0, 64, 5)]
)
@each_residual_dtype
@each_value_dtype
def test_top_k_is_that_of_torch_to_the_bit(n_blocks, block_size, k, value_dtype, residual_dtype):
    """Whatever the formats: residual, grid, scales and, without ties, what is taken."""
    x, gradient = draw(n_blocks, block_size, seed=1), draw(n_blocks, block_size, seed=2)
    group = 2 if value_dtype is torch.int8 else 1
    theirs, ours = accumulate_on((torch_ops, numba_ops), x, gradient, k, value_dtype, residual_dtype, YES, group)
    for index in (0, 1, 4):
        assert_same(theirs[index], ours[index])
    assert ours[2].dtype is torch.int64
    assert_same(theirs[3].sort().values, ours[3].sort().values)
    assert_same(*(dense(result[2], result[3], block_size) for result in (theirs, ours)))


@each_residual_dtype
def test_what_is_not_accepted_leaves_the_residual(residual_dtype):
    residual, grid = make_residual(draw(4, 64), residual_dtype)
    before = residual.clone(), None if grid is None else grid.clone()
    numba_ops.accumulate_topk_(residual, torch.zeros(4, 64), 5, torch.float32, NO, grid=grid)
    assert_same(before[0], residual)
    assert_same(before[1], grid)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_top_k_of_any_shape_with_ties_and_zeros(data):
    """The magnitudes taken are the largest, each entry once, and nothing is lost."""
    n_blocks, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 700))
    k = data.draw(st.integers(1, n))
    magnitude = data.draw(st.sampled_from([0, 1, 3, 1000]))
    scale = data.draw(st.sampled_from([1e-45, 1e-38, 1.0, 1e34]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randint(-magnitude, magnitude + 1, (n_blocks, n), generator=generator).double().mul(scale).float()
    residual = torch.zeros(n_blocks, n)
    indices, values, _ = numba_ops.accumulate_topk_(residual, x.clone(), k, torch.float32, YES)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(values.abs().sort(1).values, x.abs().sort(1).values[:, n - k :])
    assert torch.equal(dense(indices, values, n) + residual, x)
    assert not residual.gather(1, indices).any()


@pytest.mark.parametrize("magnitudes", [[0.0], [1.0], [1e-45], [3e38], [1e-20, 1e20], [0.0, 1.0]], ids=str)
def test_top_k_of_special_blocks(magnitudes):
    x = torch.tensor(magnitudes).repeat(4096)[None, :4096].clone()
    x[:, ::3] *= -1
    for k in (1, 41, 1365, 4096):
        indices, values, _ = numba_ops.accumulate_topk_(torch.zeros(1, 4096), x.clone(), k, torch.float32, YES)
        assert len(set(indices[0].tolist())) == k
        assert torch.equal(values.abs().sort().values, x.abs().sort().values[:, -k:])


@each_value_dtype
def test_push_replaces_one_row(value_dtype):
    group = 2 if value_dtype is torch.int8 else 1
    windows, residuals = [], []
    for ops in (torch_ops, numba_ops):
        indices, values, scales = make_window(6, 3, 64, 5, value_dtype, group)
        residual = draw(6, 64, seed=4)
        for row, accept in ((1, YES), (2, NO)):
            gradient = draw(6, 64, seed=5) * accept
            ops.push_topk_(indices, values, torch.tensor(row), residual, gradient, accept, scales=scales)
        windows.append((indices, values, scales))
        residuals.append(residual)
    assert_same(*residuals)
    assert_same(windows[0][2], windows[1][2])
    rows = [[dense(indices[:, r].long(), values[:, r], 64) for r in range(3)] for indices, values, _ in windows]
    for theirs, ours in zip(*rows, strict=True):
        assert_same(theirs, ours)


@pytest.mark.parametrize("shape", [(6, 4, 64, 5), (131, 3, 300, 4), (4, 9, 8, 8), (1, 1, 1, 1), (0, 3, 64, 5)], ids=str)
@each_value_dtype
def test_dots_and_combine_are_those_of_torch(shape, value_dtype):
    """Float64 sums agree but for their order; float32 ones have the same order and agree to the bit."""
    group = 2 if value_dtype is torch.int8 and shape[0] % 2 == 0 else 1
    indices, values, scales = make_window(*shape, value_dtype, group)
    x, weights = draw(shape[0], shape[2], seed=7), draw(shape[1], seed=8).double()
    ours = numba_ops.window_dots(indices, values, x, scales)
    torch.testing.assert_close(ours, torch_ops.window_dots(indices, values, x, scales), rtol=1e-12, atol=1e-10)
    row, scratch = torch.tensor(shape[1] - 1), torch.empty_like(x)
    ours = numba_ops.row_dots(indices, values, row, scratch, scales)
    theirs = torch_ops.row_dots(indices, values, row, scratch, scales)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)
    for dtype in (torch.float32, torch.float64):
        theirs, ours = (
            ops.window_combine_(torch.ones_like(x, dtype=dtype), indices, values, weights, scales)
            for ops in (torch_ops, numba_ops)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if dtype is torch.float32 else 1e-12)


def test_dots_take_products_in_float64():
    """Two terms that cancel but for 2⁻⁴⁰ of them, which a float32 product rounds away."""
    indices, values = torch.tensor([[[0, 1]]], dtype=torch.uint8), torch.tensor([[[1 + 2**-20, 1.0]]])
    x = torch.tensor([[1 + 2**-20, -(1 + 2**-19)]])
    assert numba_ops.window_dots(indices, values, x).item() == 2**-40


def test_no_operation_hides_a_nan():
    indices, values, _ = make_window(2, 3, 64, 5, torch.float32)
    values[0, 1, 2] = torch.nan
    assert numba_ops.window_dots(indices, values, torch.ones(2, 64)).isnan().tolist() == [False, True, False]
    out = numba_ops.window_combine_(torch.zeros(2, 64), indices, values, torch.zeros(3))
    assert out.isnan().sum() == 1  # 0·NaN is NaN
    for value_dtype in (torch.float32, torch.bfloat16):
        gradient = torch.ones(1, 64)
        gradient[0, 9] = torch.nan
        taken, stored, _ = numba_ops.accumulate_topk_(torch.zeros(1, 64), gradient, 1, value_dtype, YES)
        assert taken.item() == 9
        assert stored.isnan()


@each_value_dtype
def test_results_do_not_depend_on_the_number_of_threads(value_dtype, monkeypatch):
    monkeypatch.setattr(numba_calls, "WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    group = 2 if value_dtype is torch.int8 else 1
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            indices, values, scales = make_window(150, 5, 64, 5, value_dtype, group)
            residual, row = draw(150, 64, seed=4), torch.tensor(2)
            numba_ops.push_topk_(indices, values, row, residual, draw(150, 64), YES, scales=scales)
            dots = numba_ops.row_dots(indices, values, row, residual, scales)
            update = numba_ops.window_combine_(torch.zeros(150, 64), indices, values, dots, scales)
            results.append((indices, values, residual, dots, update))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one_thread, several in zip(results[0], other, strict=True):
            assert torch.equal(one_thread, several)


@pytest.mark.parametrize("optimizer", [MFAC, GGT])
@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_optimizers_take_the_same_path_on_both_backends(optimizer, value_dtype, monkeypatch):
    """50 steps, the ring wrapped; what differs is the order of float64 sums."""
    paths = {}
    for name in ("torch", "numba"):
        monkeypatch.setenv(backend.VARIABLE, name)
        backend.cpu_backend.cache_clear()
        params = [torch.nn.Parameter(draw(*shape)) for shape in ((40, 30), (77,))]
        options = {"window": 8, "block_size": 128, "density": 0.05, "precondition": "compressed", "scaling": "none"}
        options["residual_dtype"] = "float32"  # no rounding that a last bit could tip
        step = optimizer(params, lr=1e-3, momentum=0.0, value_dtype=value_dtype, **options)
        for number in range(50):
            for p in params:
                p.grad = draw(*p.shape, seed=number) + 0.1 * p.detach()
            step.step()
        paths[name] = torch.cat([p.detach().flatten() for p in params])
    backend.cpu_backend.cache_clear()
    start = torch.cat([draw(40, 30).flatten(), draw(77)])
    assert (paths["numba"] - start).norm() > 1e-3
    assert (paths["numba"] - paths["torch"]).norm() < 1e-5 * (paths["torch"] - start).norm()


def test_a_kernel_compiles_where_nothing_can_be_cached(monkeypatch):
    """As in a container whose file system is read-only."""
    caching = numba_compiler.numba.core.caching
    assert caching.CacheImpl._locator_classes
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert numba_compiler.compiled()(lambda x: x + 1)(2) == 3
