"""Every ring of gradients against the matrix that it stands for."""

import math

import pytest
import torch

from hf_efcp.optim.segment import Segment

SHAPES = [(6, 5), (7,), (1,), (2, 3, 4)]
OPTIONS = {
    "window": 4, "block_size": 8, "density": 0.3, "rank": 2, "system": "model", "selection": "block",
    "value_dtype": "float32", "residual_dtype": "float32", "moment_dtype": "float32", "state_device": None,
}  # fmt: skip
KINDS = {
    "dense": {"compression": "none"},
    "dense bfloat16": {"compression": "none", "value_dtype": "bfloat16"},
    "block": {"compression": "topk"},
    "block bfloat16": {"compression": "topk", "value_dtype": "bfloat16"},
    "block bfloat16 residual": {"compression": "topk", "residual_dtype": "bfloat16"},
    "block int16 indices": {"compression": "topk", "block_size": 300, "density": 0.05},
    "block whole": {"compression": "topk", "density": 1.0},
    "global": {"compression": "topk", "selection": "global"},
    "global bfloat16": {"compression": "topk", "selection": "global", "value_dtype": "bfloat16"},
    "global bfloat16 residual": {"compression": "topk", "selection": "global", "residual_dtype": "bfloat16"},
    "low rank": {"compression": "lowrank"},
    "low rank bfloat16": {"compression": "lowrank", "value_dtype": "bfloat16"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def segment_of(kind, **options):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    return Segment(params, {**OPTIONS, **KINDS[kind], **options}, moments=[])


def gradient_of(segment, step):
    generator = torch.Generator().manual_seed(step)
    parts = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return segment.layout.flatten(parts, torch.device("cpu"))


def push(segment, step, accept=True, gradient=None):
    """Returns what the push returns, and the gradient."""
    gradient = gradient_of(segment, step) if gradient is None else gradient
    row = torch.tensor(step % OPTIONS["window"])
    scratch = torch.full_like(gradient, float("nan"))  # a push may not read it
    return segment.window.push(gradient.clone(), row, torch.tensor(accept), scratch), gradient


def combine(segment, weights):
    out = torch.zeros(segment.layout.size)
    segment.window.combine(weights.expand(segment.n_systems, -1), out)
    return out.double()


def matrix(segment):
    """`G` (m, size), row by row from the window itself."""
    return torch.stack([combine(segment, unit) for unit in torch.eye(OPTIONS["window"], dtype=torch.float64)])


def buffers(segment):
    states = [*segment.window.views(), segment.window.shared_buffers()]
    return [(name, value.clone()) for state in states for name, value in state.items()]


@each_kind
def test_dots_and_sums_are_those_of_the_matrix(kind):
    """After the ring wrapped."""
    segment = segment_of(kind)
    for step in range(6):
        push(segment, step)
    g, x = matrix(segment), gradient_of(segment, 99)
    weights = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(segment.window.dots(x).sum(0), g @ x.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(combine(segment, weights), g.T @ weights, rtol=1e-5, atol=1e-5)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_added_to_what_is_there(kind, dtype):
    segment = segment_of(kind)
    for step in range(6):
        push(segment, step)
    weights, start = torch.tensor([1.0, -0.5, 2.0, 0.1], dtype=dtype), gradient_of(segment, 77)
    out = start.clone()
    segment.window.combine(weights.expand(segment.n_systems, -1), out)
    torch.testing.assert_close(out.double(), start.double() + combine(segment, weights), rtol=1e-5, atol=1e-6)


@each_kind
def test_push_returns_the_products_of_the_new_row_with_all(kind):
    segment = segment_of(kind)
    for step in range(9):
        products, _ = push(segment, step)
        g = matrix(segment)
        assert products.dtype is torch.float64
        torch.testing.assert_close(products.sum(0), g @ g[step % 4], rtol=1e-5, atol=1e-5)


@each_kind
def test_push_replaces_one_row(kind):
    segment = segment_of(kind)
    for step in range(7):
        before = matrix(segment)
        push(segment, step)
        after = matrix(segment)
        same = [row for row in range(4) if torch.equal(before[row], after[row])]
        assert same == [row for row in range(4) if row != step % 4]


@pytest.mark.parametrize("kind", ["block", "block bfloat16", "block whole", "global", "global bfloat16", "low rank"])
def test_rows_and_residual_sum_to_the_gradients(kind):
    """Error feedback: what a row leaves out comes with the next ones."""
    segment = segment_of(kind)
    pushed, given = 0.0, 0.0
    for step in range(12):
        _, gradient = push(segment, step)
        pushed, given = pushed + matrix(segment)[step % 4], given + gradient.double()
        views = zip(segment.window.views(), segment.layout.shapes, strict=True)
        parts = [view.get("residual", torch.zeros(shape)) for view, shape in views]
        residual = segment.layout.flatten(parts, segment.device).double()
        torch.testing.assert_close(pushed + residual, given, rtol=1e-5, atol=1e-5)


@each_kind
def test_push_that_is_not_accepted_changes_nothing(kind):
    for n_steps in (0, 6):
        segment = segment_of(kind)
        for step in range(n_steps):
            push(segment, step)
        before = buffers(segment)
        push(segment, n_steps, accept=False, gradient=segment.layout.zeros(torch.float32, segment.device))
        for (name, value), (_, kept) in zip(buffers(segment), before, strict=True):
            assert torch.equal(value, kept), name


@each_kind
def test_views_are_the_buffers(kind):
    """What `state` holds is what the next step reads, by parameter."""
    segment, twin = segment_of(kind), segment_of(kind)
    for step in range(6):
        push(segment, step)
    pairs = [*zip(segment.window.views(), twin.window.views(), strict=True)]
    pairs.append((segment.window.shared_buffers(), twin.window.shared_buffers()))
    for source, target in pairs:
        assert source.keys() == target.keys()
        for name, value in source.items():
            target[name].copy_(value)
    for step in range(6, 9):
        ours, theirs = push(segment, step)[0], push(twin, step)[0]
        assert torch.equal(ours, theirs)
    assert torch.equal(matrix(segment), matrix(twin))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "global" not in kind])
def test_one_system_for_each_parameter_has_the_parts_of_the_sum(kind):
    whole, layered = segment_of(kind), segment_of(kind, system="layer")
    for step in range(6):
        products, parts = push(whole, step)[0], push(layered, step)[0]
        assert parts.shape == (len(SHAPES), 4)
        torch.testing.assert_close(parts.sum(0), products[0])
    weights = torch.eye(len(SHAPES), 4, dtype=torch.float64)
    out = torch.zeros(layered.layout.size)
    layered.window.combine(weights, out)
    for number, part in enumerate(layered.layout.split(out)):
        assert torch.equal(part.double(), layered.layout.split(combine(whole, weights[number]))[number])


@pytest.mark.parametrize(
    ("density", "block_size", "k"), [(1e-9, 8, 1), (0.3, 8, 3), (0.25, 8, 2), (1.0, 8, 8), (0.5, 1, 1)]
)
def test_block_keeps_the_ceiling_of_its_share(density, block_size, k):
    assert segment_of("block", density=density, block_size=block_size).window.k == k


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_whole_keeps_the_floor_of_its_share(density):
    d = sum(math.prod(shape) for shape in SHAPES)
    assert segment_of("global", density=density).window.k == max(1, int(density * d))


def test_low_rank_row_of_a_low_rank_gradient_is_exact():
    """One power step finds the column space of a matrix of rank 1 at once, unless its start is orthogonal to it."""
    options = {**OPTIONS, **KINDS["low rank"], "rank": 1}
    segment = Segment([torch.nn.Parameter(torch.zeros(30, 20))], options, moments=[])
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        gradient = torch.rand(30, 1, generator=generator) * torch.rand(1, 20, generator=generator)
        push(segment, step, gradient=gradient.flatten())
        torch.testing.assert_close(matrix(segment)[step % 4].float(), gradient.flatten(), rtol=1e-5, atol=1e-5)
        assert segment.window.views()[0]["residual"].abs().max() <= 1e-5
