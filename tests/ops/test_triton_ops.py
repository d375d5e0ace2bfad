"""The Triton backend against the definition in torch: in Triton's interpreter, and on a device where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import RESIDUALS, VALUES, assert_same, dense, draw, each_value_dtype, make_residual, make_window

from hf_efcp.ops import torch_ops

triton_ops = pytest.importorskip("hf_efcp.ops.triton_ops", reason="needs triton, which has wheels for Linux")

HAS_DEVICE = torch.cuda.is_available()
interpreter = pytest.mark.skipif(HAS_DEVICE, reason="Triton's interpreter is for machines without a device")
FORMATS = [(value, residual) for value in VALUES for residual in RESIDUALS]


@pytest.fixture(params=[pytest.param("cpu", marks=interpreter), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def moved(tensors, device):
    return [None if t is None else t.to(device, copy=True) for t in tensors]


def accumulate(x, gradient, k, value_dtype, residual_dtype, device, accept=True, group=1):
    """Residual, grid, indices, values and scales of both backends, on the CPU."""
    results = []
    for ops, on in ((torch_ops, "cpu"), (triton_ops, device)):
        residual, grid, grad = moved((*make_residual(x, residual_dtype), gradient), on)
        accepted = torch.tensor(accept, device=on)
        taken = ops.accumulate_topk_(residual, grad, k, value_dtype, accepted, grid=grid, group=group)
        results.append(moved((residual, grid, *taken), "cpu"))
    return results


def assert_same_rows(theirs, ours, block_size):
    """To the bit, whatever the order of the entries of a row."""
    for index in (0, 1, 4):
        assert_same(theirs[index], ours[index])
    assert ours[2].dtype is torch.int64
    assert all(len(set(row)) == len(row) for row in ours[2].tolist())
    assert_same(dense(*theirs[2:4], block_size), dense(*ours[2:4], block_size))


@pytest.mark.parametrize(("value_dtype", "residual_dtype"), FORMATS, ids=str)
@pytest.mark.parametrize(
    ("n_blocks", "block_size", "k"), [(6, 64, 5), (2, 4096, 41), (4, 32, 32), (2, 1030, 7), (2, 2, 1), (0, 64, 5)]
)
def test_top_k_is_that_of_torch_to_the_bit(n_blocks, block_size, k, value_dtype, residual_dtype, device):
    """Whatever the formats: residual, grid, scales and what is taken."""
    x, gradient = draw(n_blocks, block_size, seed=1), draw(n_blocks, block_size, seed=2)
    group = 2 if value_dtype is torch.int8 else 1
    results = accumulate(x, gradient, k, value_dtype, residual_dtype, device, group=group)
    assert_same_rows(*results, block_size)


@pytest.mark.parametrize("residual_dtype", RESIDUALS, ids=str)
def test_what_is_not_accepted_leaves_the_residual(residual_dtype, device):
    x = draw(3, 70)
    before = make_residual(x, residual_dtype)
    _, ours = accumulate(x, torch.zeros(3, 70), 5, torch.float32, residual_dtype, device, accept=False)
    assert_same(before[0], ours[0])
    assert_same(before[1], ours[1])


@pytest.mark.parametrize("magnitudes", [[0.0], [1.0], [1e-45], [3e38], [1e-20, 1e20], [0.0, 1.0, -1.0, 2.0]], ids=str)
@pytest.mark.parametrize("n", [37, 4096])
def test_top_k_with_ties_takes_the_lowest_indices(magnitudes, n, device):
    """And nothing is lost: residual and row add up to the gradient."""
    x = torch.tensor(magnitudes).repeat(n)[None, :n].clone()
    x[:, ::3] *= -1
    order = x.abs().sort(descending=True, stable=True).indices
    for k in (1, n // 3, n):
        _, (residual, _, indices, values, _) = accumulate(0 * x, x, k, torch.float32, torch.float32, device)
        assert sorted(indices[0].tolist()) == sorted(order[0, :k].tolist())
        assert torch.equal(dense(indices, values, n) + residual, x)


def test_top_k_takes_a_nan_first(device):
    """It is no number below another: `optim` keeps it out, and nothing here may hide it."""
    x = torch.ones(1, 70)
    x[0, 9], x[0, 3] = torch.nan, 3e38
    for value_dtype in (torch.float32, torch.bfloat16):
        _, (_, _, indices, values, _) = accumulate(torch.zeros(1, 70), x, 2, value_dtype, torch.float32, device)
        assert sorted(indices[0].tolist()) == [3, 9]
        assert values.isnan().sum() == 1


@each_value_dtype
@pytest.mark.parametrize("residual_dtype", RESIDUALS, ids=str)
@pytest.mark.parametrize("block_size", [64, 512])
def test_push_replaces_one_row(value_dtype, residual_dtype, block_size, device):
    """Rows with indices of 8 and of 16 bits; the one that is not accepted changes nothing."""
    group = 2 if value_dtype is torch.int8 else 1
    windows = []
    for ops, on in ((torch_ops, "cpu"), (triton_ops, device)):
        indices, values, scales = moved(make_window(6, 3, block_size, 5, value_dtype, group), on)
        residual, grid = moved(make_residual(draw(6, block_size, seed=4), residual_dtype), on)
        for row, accept in ((1, True), (2, False)):
            gradient = (draw(6, block_size, seed=5) * accept).to(on)
            row, accept = torch.tensor(row, device=on), torch.tensor(accept, device=on)
            ops.push_topk_(indices, values, row, residual, gradient, accept, scales=scales, grid=grid)
        windows.append(moved((residual, grid, scales, indices, values), "cpu"))
    theirs, ours = windows
    for index in range(3):
        assert_same(theirs[index], ours[index])
    for row in range(3):
        rows = [dense(indices[:, row].long(), values[:, row], block_size) for *_, indices, values in windows]
        assert_same(*rows)


SHAPES = [(6, 4, 64, 5), (5, 3, 300, 4), (4, 9, 8, 8), (1, 1, 1, 1), (2, 70, 128, 3), (0, 3, 64, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_value_dtype
def test_dots_and_combine_are_those_of_torch(shape, value_dtype, device):
    """Float64 sums agree but for their order; float32 ones have the same order and agree to the bit."""
    group = 2 if value_dtype is torch.int8 and shape[0] % 2 == 0 else 1
    window = make_window(*shape, value_dtype, group)
    x, weights = draw(shape[0], shape[2], seed=7), draw(shape[1], seed=8).double()
    assert_same_passes(window, x, weights, device)


def assert_same_passes(window, x, weights, device):
    indices, values, scales = window
    on_device = moved(window, device)
    ours = triton_ops.window_dots(*on_device[:2], x.to(device), on_device[2]).cpu()
    torch.testing.assert_close(ours, torch_ops.window_dots(indices, values, x, scales), rtol=1e-12, atol=1e-10)
    row, scratch = torch.tensor(len(weights) - 1), torch.full_like(x, torch.nan)
    ours = triton_ops.row_dots(*on_device[:2], row.to(device), scratch.to(device), on_device[2]).cpu()
    theirs = torch_ops.row_dots(indices, values, row, scratch, scales)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)
    for dtype in (torch.float32, torch.float64):
        theirs = torch_ops.window_combine_(torch.ones_like(x, dtype=dtype), indices, values, weights, scales)
        out = torch.ones_like(x, dtype=dtype).to(device)
        ours = triton_ops.window_combine_(out, *on_device[:2], weights.to(device), on_device[2]).cpu()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if dtype is torch.float32 else 1e-12)


def test_passes_over_large_blocks_wide_rows_and_long_windows(device, monkeypatch):
    """Blocks beyond what is staged, rows wider than a tile, several spans of rows, programs with several blocks."""
    monkeypatch.setattr(triton_ops, "_STAGED", 32)
    monkeypatch.setattr(triton_ops, "_TILE", 16)
    monkeypatch.setattr(triton_ops, "_SPAN", 4)
    monkeypatch.setattr(triton_ops, "_PROGRAMS", 2)
    window = make_window(3, 5, 70, 33, torch.float32)
    assert_same_passes(window, draw(3, 70, seed=7), draw(5, seed=8).double(), device)


@pytest.mark.parametrize("value_dtype", VALUES, ids=str)
def test_blocks_beyond_shared_memory_are_pushed_by_torch(value_dtype, device, monkeypatch):
    monkeypatch.setattr(triton_ops, "_STAGED", 63)
    monkeypatch.setattr(triton_ops, "push_topk", None)
    group = 2 if value_dtype is torch.int8 else 1
    x, gradient = draw(6, 64, seed=1), draw(6, 64, seed=2)
    assert_same_rows(*accumulate(x, gradient, 5, value_dtype, torch.float32, device, group=group), 64)
    window = moved(make_window(6, 3, 64, 5, value_dtype, group), device)
    before, row, yes = window[1].clone(), torch.tensor(1, device=device), torch.tensor(True, device=device)
    triton_ops.push_topk_(*window[:2], row, *moved((x, gradient), device), yes, scales=window[2])
    assert torch.equal(window[1][:, ::2], before[:, ::2])
    assert not torch.equal(window[1][:, 1], before[:, 1])


def test_dots_take_products_in_float64(device):
    """Two terms that cancel but for 2⁻⁴⁰ of them, which a float32 product rounds away."""
    indices, values = torch.tensor([[[0, 1]]], dtype=torch.uint8), torch.tensor([[[1 + 2**-20, 1.0]]])
    x = torch.tensor([[1 + 2**-20, -(1 + 2**-19)]])
    assert triton_ops.window_dots(*moved((indices, values, x), device)).item() == 2**-40


def test_no_pass_hides_a_nan_or_spreads_it(device):
    indices, values, _ = moved(make_window(2, 3, 64, 5, torch.float32), device)
    values[0, 1, 2] = torch.nan
    assert triton_ops.window_dots(indices, values, torch.ones(2, 64, device=device)).isnan().tolist() == [0, 1, 0]
    out = torch.zeros(2, 64, device=device)
    triton_ops.window_combine_(out, indices, values, torch.zeros(3, device=device))
    assert out.isnan().sum() == 1  # 0·NaN is NaN


COMPILE = """
import subprocess
from pathlib import Path
import torch
import triton
from triton.backends.compiler import GPUTarget
from hf_efcp.ops import fused, triton_moments, triton_ops, triton_step
from ops_cases import RESIDUALS, VALUES, draw, make_residual, make_window

try:
    from triton.runtime.jit import type_canonicalisation_dict as TYPES
except ImportError:
    from triton._utils import type_canonicalisation_dict as TYPES
USAGE = next(Path(triton.__file__).parent.rglob("cuobjdump"), None)

class Compiled:
    'A kernel that compiles what it is called with, for the chip of an H100 or H200, and does not run.'
    count = 0

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps, enable_fp_fusion, **constants):
        names = self.kernel.arg_names
        types, aligned, given = {}, {}, {}
        for index, (name, value) in enumerate({**dict(zip(names, args)), **constants}.items()):
            if isinstance(value, torch.Tensor):
                types[name] = f"*{TYPES[str(value.dtype).split('.')[1]]}"
                aligned[index,] = [["tt.divisibility", 16]]
            elif name in ("n_blocks", "window", "n") and value != 1:  # a launch takes 1 as a constant
                types[name] = "i32"
            elif name in ("rate1", "rate2"):
                types[name] = "fp32"
            else:
                types[name], given[index,] = "constexpr", value
        source = triton.compiler.ASTSource(self.kernel, types, constexprs=given, attrs=aligned)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert done.metadata.shared <= 99 * 1024, (self.kernel, done.metadata.shared)  # of consumers' cards
        if USAGE:
            Path("kernel.cubin").write_bytes(done.asm["cubin"])
            told = subprocess.run([USAGE, "-res-usage", "kernel.cubin"], capture_output=True, text=True).stdout
            assert "STACK:0" in told and "LOCAL:0" in told, (self.kernel, told)  # no register is spilled
        Compiled.count += 1

triton_ops.push_topk = Compiled(triton_ops.push_topk)
for name in ("window_dots", "window_combine"):
    setattr(triton_ops.kernels, name, Compiled(getattr(triton_ops.kernels, name)))
triton_moments.adam = Compiled(triton_moments.adam)
triton_step.combine_step = Compiled(triton_step.combine_step)
yes, row = torch.tensor(True), torch.tensor(1)
triton_moments.adam_(draw(9), draw(9), draw(9).bfloat16(), row, yes, beta1=0.9, beta2=0.999)
pieces, rates = torch.zeros(2, dtype=torch.int32), torch.ones(1, 2)
for (value, residual), size in (((1, 1), 8192), ((2, 2), 256)):
    indices, values, scales = make_window(2, 3, size, size // 100, VALUES[value], group=2)
    memory, grid = make_residual(draw(2, size), RESIDUALS[residual])
    triton_ops.push_topk_(indices, values, row, memory, draw(2, size), yes, scales=scales, grid=grid)
    triton_ops.window_dots(indices, values, draw(2, size), scales)
    triton_ops.row_dots(indices, values, row, draw(2, size), scales)
    triton_ops.window_combine_(draw(2, size), indices, values, draw(3), scales)
    moments = [draw(2 * size).bfloat16() for _ in range(2)]
    weights = [draw(2 * size).to(dtype) for dtype in fused.KINDS]
    table = fused.weight_table(weights, [range(2)] * 3, [0] * 3, torch.device("cpu"))
    table = fused.Weights(pieces, table, rates, frozenset(fused.KINDS), value == 1)
    rows = fused.Rows(indices, values, scales, draw(2, 3), draw(2))
    adam, ball = fused.Moments(*moments, 0.9, 0.999), fused.Moments(moments[0], None, 0.9)
    at = {"pieces": pieces, "rows": rows}
    triton_step.combine_step_(draw(2, size), row, yes, **at, moments=adam, weights=table)
    triton_step.combine_step_(draw(2, size), row, yes, **at, moments=adam, weights=table, against=table.table)
    triton_step.combine_step_(draw(2, size), row, yes, **at, moments=ball, squares=draw(2).double(), store=True)
    triton_step.combine_step_(draw(2, size), row, yes, pieces=pieces, factors=draw(2), weights=table, store=True)
triton_ops.accumulate_topk_(draw(1, 64), draw(1, 64), 3, torch.float32, yes)
print(Compiled.count)
"""


def test_kernels_compile_for_a_device(tmp_path):
    """The compiler checks types that the interpreter does not."""
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "18"
