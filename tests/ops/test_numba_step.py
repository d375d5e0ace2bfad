"""The two passes of a step against the single operations in torch, format by format."""

import pytest
import torch
from ops_cases import RESIDUALS, VALUES, YES, draw, make_residual, make_window

from hf_efcp.ops import Moments, Rows, Vector, Weights, cautious, torch_moments, torch_ops, weight_table

pytest.importorskip("numba", reason="needs numba: pip install hf-efcp[cpu]")
from hf_efcp.ops import numba_calls, numba_ops

N, M, K = 64, 4, 5
BLOCKS = [range(4), range(4, 4), range(4, 6), range(6, 8)]  # of a piece with a part of a block, an empty one, …
SIZES, GROUPS = [200, 0, 128, 70], [0, 0, 1, 0]
PIECES = torch.tensor([0, 0, 0, 0, 2, 2, 3, 3], dtype=torch.int32)
STEP, ROW, CPU = torch.tensor(3), torch.tensor(2), torch.device("cpu")


def laid_out(vectors):
    """(B, N) float32: the pieces at their blocks, zeros elsewhere."""
    flat = torch.zeros(len(PIECES), N)
    for blocks, vector in zip(BLOCKS, vectors, strict=True):
        if vector is not None:
            flat.view(-1)[blocks.start * N : blocks.start * N + len(vector)] = vector
    return flat


def pieces_of(dtype, seed):
    return [draw(size, seed=seed + number).to(dtype) for number, size in enumerate(SIZES)]


def address_table(vectors):
    return weight_table(vectors, BLOCKS, GROUPS, CPU)


def copies(*tensors):
    return [None if t is None else t.clone() for t in tensors]


@pytest.mark.parametrize(
    ("value_dtype", "residual_dtype", "moment_dtype", "second"),
    [
        *[(v, r, torch.float32, True) for v, r in zip(VALUES, RESIDUALS, strict=True)],
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, None, False),
    ],
    ids=str,
)
def test_first_pass_is_push_mean_and_products(value_dtype, residual_dtype, moment_dtype, second):
    group = 2 if value_dtype is torch.int8 else 1
    vectors = pieces_of(torch.float32, seed=3)
    if residual_dtype is torch.float32:  # sums of few bits would have ties
        vectors[3] = vectors[3].bfloat16()
    gradient = laid_out(vectors)
    indices, values, scales = make_window(8, M, N, K, value_dtype, group)
    residual, grid = make_residual(laid_out(pieces_of(torch.float32, seed=9)), residual_dtype)
    moments = [None, None]
    if moment_dtype is not None:
        moments = [
            draw(8 * N, seed=11).to(moment_dtype),
            draw(8 * N, seed=12).abs().to(moment_dtype) if second else None,
        ]
    theirs, ours = copies(indices, values, scales, residual, grid, *moments), (indices, values, scales, residual, grid)
    newest, dots, squares = numba_ops.start_step_(
        *(indices, values, ROW, residual, (PIECES, address_table(vectors)), STEP),
        block_size=N,
        scales=scales,
        grid=grid,
        moments=None if moment_dtype is None else Moments(*moments, 0.9, 0.99),
        keeps=True,
    )
    x = gradient.clone()
    torch_ops.push_topk_(*theirs[:2], ROW, theirs[3], gradient, YES, scales=theirs[2], grid=theirs[4])
    if moment_dtype is not None:
        torch_moments.adam_mean_(x.view(-1), *theirs[5:], STEP, YES, beta1=0.9, beta2=0.99)
    for expected, found in zip(theirs[2:], (*ours[2:], *moments), strict=True):
        if expected is not None:
            torch.testing.assert_close(
                found.float(), expected.float(), rtol=2**-7 if expected is theirs[-1] else 1e-6, atol=1e-6
            )
    rows = [torch.zeros(8, N).scatter_(1, i[:, 2].long(), v[:, 2].float()) for i, v in (ours[:2], theirs[:2])]
    assert torch.equal(*rows)
    exact = {"rtol": 1e-12, "atol": 1e-10}
    torch.testing.assert_close(newest, torch_ops.row_dots(indices, values, ROW, torch.empty(8, N), scales), **exact)
    torch.testing.assert_close(dots, torch_ops.window_dots(indices, values, x, scales), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares, x.double().square().sum(1))


def direction(x, kind, moments):
    """The update after moments, in torch."""
    if kind == "momentum":
        return moments[0].add_(x - moments[0] * 0.1).clone()  # 0.9·v + u
    if kind == "adam":
        return torch_moments.adam_(x, *moments, STEP, YES, beta1=0.9, beta2=0.99)
    return torch_moments.adam_direction_(x, moments[1], STEP, YES, beta2=0.99) if kind == "root" else x


@pytest.mark.parametrize("value_dtype", VALUES, ids=str)
@pytest.mark.parametrize(
    ("kind", "source", "own"),
    [("none", "none", None), ("momentum", "out", 1.0), ("adam", "table", 0.5), ("root", "mean", 2.0)],
)
def test_second_pass_is_combine_moments_caution_and_step(value_dtype, kind, source, own):
    group = 2 if value_dtype is torch.int8 else 1
    indices, values, scales = make_window(8, M, N, K, value_dtype, group)
    coefficients, vectors, weights = (
        draw(1, M, seed=5),
        pieces_of(torch.float32, seed=3),
        pieces_of(torch.float32, seed=20),
    )
    x = laid_out(vectors)
    moments = [draw(8 * N, seed=11), draw(8 * N, seed=12).abs()]
    vector = {
        "table": Vector(table=address_table(vectors)),
        "mean": Vector(flat=x.view(-1).bfloat16(), factor=1.5),
        "none": Vector(),
        "out": None,
    }[source]
    u = {"mean": x.bfloat16().float() * 1.5, "none": torch.zeros(8, N)}.get(source, x.clone()) * (
        1.0 if own is None else own
    )
    torch_ops.window_combine_(u, indices, values, coefficients[0], scales)
    expected = direction(u.view(-1), kind, copies(*moments)).view(8, N) * 3.0
    squared = expected.double().square().sum(1)
    against = [None if kind == "none" else g for g in pieces_of(torch.bfloat16, seed=40)]
    against[3] = None
    kept = laid_out([torch.zeros(n) if g is None else g.float() for g, n in zip(against, SIZES, strict=True)])
    expected = cautious(expected, kept)
    steps = [expected.reshape(-1)[b.start * N : b.start * N + n] for b, n in zip(BLOCKS, SIZES, strict=True)]
    moved = [
        w * f - lr * s
        for w, s, (lr, f) in zip(weights, steps, [((0.1, 0.9), (0.2, 1.0))[g] for g in GROUPS], strict=True)
    ]
    out, squares = x.clone(), torch.zeros(8, dtype=torch.float64)
    taken = {"none": None, "momentum": Moments(moments[0], None, 0.9), "adam": Moments(*moments, 0.9, 0.99)}
    numba_ops.combine_step_(
        *(out, STEP, YES),
        pieces=PIECES,
        rows=Rows(indices, values, scales, coefficients, None if own is None else torch.tensor([own])),
        source=vector,
        moments=taken.get(kind, Moments(None, moments[1], 0.9, 0.99)),
        factors=torch.tensor([3.0]),
        squares=squares,
        against=address_table(against),
        weights=Weights(PIECES, address_table(weights), torch.tensor([[0.1, 0.9], [0.2, 1.0]]), frozenset(), True),
        store=True,
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares, squared, rtol=1e-6, atol=0)  # those of a step as it is
    for ours, theirs in zip(weights, moved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_passes_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(numba_calls, "WORTH_A_THREAD", 1)
    before, results = torch.get_num_threads(), []
    vectors, coefficients = pieces_of(torch.float32, seed=3), draw(1, M, seed=5)
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            indices, values, _ = make_window(8, M, N, K, torch.float32)
            residual, out = draw(8, N, seed=9), torch.empty(8, N)
            table = PIECES, address_table(vectors)
            products = numba_ops.start_step_(indices, values, ROW, residual, table, STEP, block_size=N, keeps=True)
            rows, source = Rows(indices, values, None, coefficients, 1.0), Vector(table=table[1])
            numba_ops.combine_step_(out, STEP, YES, pieces=PIECES, rows=rows, source=source, store=True)
            results.append((indices, values, residual, out, *products))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, several) for one, several in zip(*results, strict=True))
