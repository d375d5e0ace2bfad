"""The window operations against sorts and dense matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_efcp.ops import torch_ops
from hf_efcp.ops.torch_ops import accumulate_topk_, block_topk, window_combine_, window_dots

SIZES = [1, 2, 3, 4, 5, 8, 12, 16, 31, 32, 64, 100, 128, 257, 512, 1000, 1024, 1028, 2048, 4096]
SHAPES = [(1, 1, 1, 1), (1, 5, 1, 1), (3, 1, 2, 7), (4, 6, 8, 8), (7, 3, 5, 256), (2, 9, 4, 300), (33, 4, 2, 31)]
each_value_dtype = pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
each_residual_dtype = pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_window(n_blocks, window, k, block_size, *, value_dtype=torch.float32):
    """Indices (B, m, k), distinct in a row, values, and the dense (m, B·block_size) float64 matrix they stand for."""
    indices = draw(n_blocks, window, block_size, seed=1).argsort(-1)[..., :k]
    values = draw(n_blocks, window, k, seed=2, dtype=value_dtype)
    dense = torch.zeros(n_blocks, window, block_size, dtype=torch.float64).scatter_(2, indices, values.double())
    index_dtype = torch.uint8 if block_size <= 256 else torch.int16
    return indices.to(index_dtype), values, dense.transpose(0, 1).reshape(window, -1)


@pytest.mark.parametrize("n", SIZES)
def test_topk_is_that_of_a_sort_for_every_k(n):
    """By one, two or three stages: the magnitudes kept are the largest, each once."""
    counts = {k for k in (1, 2, 3, n // 100, n // 64, n // 33, n // 32, n // 16, n // 8, n // 4, n // 2, n - 1, n) if k}
    x = draw(3, n, seed=n)
    expected = x.abs().sort(dim=1, descending=True).values
    for k in sorted(count for count in counts if count <= n):
        chosen = block_topk(x, k)
        assert chosen.shape == (3, k)
        assert all(len(set(row)) == k for row in chosen.tolist())
        kept = x.gather(1, chosen).abs().sort(dim=1, descending=True).values
        assert torch.equal(kept, expected[:, :k]), f"k = {k}"


@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(4096),
        -torch.zeros(4096),
        torch.ones(4096),
        torch.arange(4096.0) - 2048,
        torch.tensor([1e-45, -1e-45] * 2048),  # denormal
        torch.tensor([3e38, -3e38] * 2048),
        torch.cat([torch.full((4000,), 1e-20), torch.full((96,), -1e20)]),
    ],
    ids=["zeros", "negative zeros", "ties", "ramp", "denormal", "huge", "two scales"],
)
def test_topk_of_special_rows(row):
    for k in (1, 41, 100, 2048, 4096):
        chosen = block_topk(row[None], k)[0]
        assert len(set(chosen.tolist())) == k
        assert torch.equal(row[chosen].abs().sort().values, row.abs().sort().values[-k:])


@given(st.integers(1, 3), st.integers(1, 600), st.data())
def test_topk_of_any_shape_with_ties(n_rows, n, data):
    k = data.draw(st.integers(1, n))
    seed = data.draw(st.integers(0, 2**31))
    x = torch.randint(-5, 6, (n_rows, n), generator=torch.Generator().manual_seed(seed)).float()
    chosen = block_topk(x, k)
    assert all(len(set(row)) == k for row in chosen.tolist())
    kept = x.gather(1, chosen).abs().sort(dim=1).values
    assert torch.equal(kept, x.abs().sort(dim=1).values[:, n - k :])


@each_value_dtype
@each_residual_dtype
def test_push_takes_the_largest_and_leaves_the_rest(value_dtype, residual_dtype):
    """`residual + gradient = row + residual'` to the last bit, the rounding of the values included."""
    residual, gradient = draw(70, 64, seed=1, dtype=residual_dtype), draw(70, 64, seed=2)
    summed = residual.float() + gradient
    indices, values = accumulate_topk_(residual, gradient.clone(), 5, value_dtype, torch.tensor(True))[:2]
    assert torch.equal(values, summed.gather(1, indices).to(value_dtype))
    assert torch.equal(summed.gather(1, indices).abs().amin(1), summed.abs().sort(1).values[:, -5])
    row = torch.zeros_like(summed).scatter_(1, indices, values.float())
    assert torch.equal(residual, (summed - row).to(residual_dtype))


@each_residual_dtype
def test_push_that_is_not_accepted_leaves_the_residual(residual_dtype):
    residual = draw(70, 64, seed=1, dtype=residual_dtype)
    before = residual.clone()
    accumulate_topk_(residual, torch.zeros(70, 64), 5, torch.float32, torch.tensor(False))
    assert torch.equal(residual, before)


def test_push_over_several_chunks_is_that_of_each_block(monkeypatch):
    residual, gradient = draw(50, 16, seed=1), draw(50, 16, seed=2)
    whole = residual.clone()
    expected = accumulate_topk_(whole, gradient, 3, torch.float32, torch.tensor(True))[:2]
    monkeypatch.setattr(torch_ops, "_CHUNK", 16)
    chunked = accumulate_topk_(residual, gradient, 3, torch.float32, torch.tensor(True))[:2]
    assert torch.equal(residual, whole)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(chunked, expected, strict=True))


@pytest.mark.parametrize("kernel", ["_csr_dots", "_gather_dots", "window_dots"])
@each_value_dtype
@each_shape
def test_dots_are_those_of_the_dense_matrix(kernel, value_dtype, shape):
    indices, values, dense = random_window(*shape, value_dtype=value_dtype)
    x = draw(shape[0], shape[3], seed=9)
    ours = getattr(torch_ops, kernel)(indices, values, x)
    assert ours.dtype is torch.float64
    torch.testing.assert_close(ours, dense @ x.double().flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["_csr_dots", "_gather_dots"])
def test_dots_read_the_last_index_of_the_largest_block(kernel):
    """32767 is the largest signed 16-bit number."""
    x = torch.zeros(2, 32768)
    x[1, 32767] = 2.0
    indices = torch.tensor([[[0, 1]], [[32767, 3]]], dtype=torch.int16)
    assert getattr(torch_ops, kernel)(indices, torch.ones(2, 1, 2), x).item() == 2.0


@each_value_dtype
@each_shape
def test_combine_adds_the_product_with_the_transpose(value_dtype, shape):
    indices, values, dense = random_window(*shape, value_dtype=value_dtype)
    out, weights = draw(shape[0], shape[3], seed=8), draw(shape[1], seed=9).double()
    expected = out.double().flatten() + dense.T @ weights
    ours = window_combine_(out, indices, values, weights)
    assert ours is out
    torch.testing.assert_close(ours.double().flatten(), expected, rtol=1e-5, atol=1e-5)


@given(
    n_blocks=st.integers(1, 9), window=st.integers(1, 7), block_size=st.integers(1, 40), chunk=st.integers(1, 300),
    density=st.floats(0.01, 1),
)  # fmt: skip
def test_passes_do_not_depend_on_their_chunks(n_blocks, window, block_size, chunk, density):
    k = max(1, math.floor(density * block_size))
    indices, values, dense = random_window(n_blocks, window, k, block_size)
    x, weights = draw(n_blocks, block_size, seed=5), draw(window, seed=6).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ops, "_CHUNK", chunk)
        dots = window_dots(indices, values, x)
        combined = window_combine_(torch.zeros(n_blocks, block_size), indices, values, weights)
    torch.testing.assert_close(dots, dense @ x.double().flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combined.double().flatten(), dense.T @ weights, rtol=1e-5, atol=1e-5)


def test_gram_of_the_stored_values_is_positive_semidefinite():
    """In float64 to 1e-12 of its norm also where rows are nearly parallel: float32 sums would make it indefinite."""
    base = draw(6, 1, 300, seed=1).expand(6, 12, 300) + 1e-4 * draw(6, 12, 300, seed=2)
    indices = torch.arange(300, dtype=torch.int16).repeat(6, 12, 1)
    gram = torch.stack([window_dots(indices, base, base[:, i].contiguous()) for i in range(12)])
    assert torch.linalg.eigvalsh(gram).min() > -1e-12 * gram.norm()
