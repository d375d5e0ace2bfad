"""Every structure against dense matrices, none of them symmetric, in float64."""

import pytest
import torch

from hf_efcp.curvature.kronecker import Factor, Moment, update_factors
from hf_efcp.curvature.structures import DenseMetric, make_structure

NAMES = [
    "dense",
    "diagonal",
    "block1diagonal",
    "block4diagonal",
    "block30diagonal",
    "hierarchical2_3",
    "hierarchical4_1",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
]
DIMS = [1, 2, 5, 8, 13, 70]
each = [pytest.mark.parametrize("name", NAMES), pytest.mark.parametrize("dim", DIMS)]


def cases(test):
    for mark in each:
        test = mark(test)
    return test


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sample(name, dim, seed=0):
    structure = make_structure(name, dim)
    return structure, random(structure.numel, seed=seed)


def mask(structure):
    """(numel, d, d): where each stored entry lies in the matrix."""
    return torch.stack([structure.to_dense(row) for row in torch.eye(structure.numel, dtype=torch.float64)]).round()


def projection(structure, symmetric):
    """Π from the definition: mean of an entry's places, doubled where the mirror image is stored nowhere."""
    places = mask(structure)
    stored = places.sum(0)
    values = []
    for place in places:
        mean = (place * symmetric).sum() / place.sum()
        values.append(mean * (1 if (stored * place.T).abs().sum() > 1e-9 else 2))
    return torch.stack(values)


@cases
def test_rows_are_multiplied_by_the_matrix_and_its_transpose(name, dim):
    structure, values = sample(name, dim)
    matrix, rows = structure.to_dense(values), random(3, dim, seed=1)
    torch.testing.assert_close(structure.apply(values, rows), rows @ matrix)
    torch.testing.assert_close(structure.apply(values, rows, transpose=True), rows @ matrix.T)


@cases
def test_stored_entries_are_those_extracted(name, dim):
    structure, values = sample(name, dim)
    matrix = structure.to_dense(values)
    torch.testing.assert_close(structure.extract(torch.eye(dim, dtype=torch.float64), matrix), values)


@cases
def test_products_stay_inside(name, dim):
    structure, values = sample(name, dim)
    other = random(structure.numel, seed=2)
    expected = structure.to_dense(values) @ structure.to_dense(other)
    torch.testing.assert_close(structure.to_dense(structure.product(values, other)), expected)
    torch.testing.assert_close(
        super(type(structure), structure).product(values, other), structure.product(values, other)
    )


@cases
def test_projection_of_second_moments_and_grams(name, dim):
    structure, values = sample(name, dim)
    matrix, rows = structure.to_dense(values), random(4, dim, seed=3)
    torch.testing.assert_close(structure.project(rows), projection(structure, rows.T @ rows))
    torch.testing.assert_close(structure.gram(values), projection(structure, matrix.T @ matrix))
    moment = structure.moment(values, rows)
    moved = structure.finish(values, moment)
    torch.testing.assert_close(moved, projection(structure, matrix.T @ rows.T @ rows @ matrix))
    if structure.sums_raw:
        torch.testing.assert_close(structure.moment_trace(moment), rows.square().sum() / dim)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_have_no_moment(name):
    structure, values = sample(name, 13)
    moment = structure.moment(values, torch.empty(0, 13, dtype=torch.float64))
    assert torch.equal(structure.finish(values, moment), torch.zeros_like(values))


@cases
def test_means_and_damped_curvature(name, dim):
    """`τ(MᵀM)`, `τ(MᵀUM)`, `Π(Mᵀ(0.3 U + 0.2 I)M)` and `rows @ MMᵀ`."""
    structure, values = sample(name, dim)
    matrix, rows = structure.to_dense(values), random(4, dim, seed=3)
    u, moment = rows.T @ rows, structure.moment(values, rows)
    torch.testing.assert_close(structure.mean_square(values), (matrix.T @ matrix).trace() / dim)
    torch.testing.assert_close(structure.mean_curvature(values, moment), (matrix.T @ u @ matrix).trace() / dim)
    damped = 0.3 * u + 0.2 * torch.eye(dim, dtype=torch.float64)
    moved = structure.damped(values, moment, 0.3, 0.2)
    torch.testing.assert_close(moved, projection(structure, matrix.T @ damped @ matrix))
    product = rows @ matrix @ matrix.T
    kept = [None, structure.metric(values)] if structure.keeps_metric else [None]
    for metric in kept:
        torch.testing.assert_close(structure.times_metric(values, rows, metric), product)
        torch.testing.assert_close(structure.metric_times(values, rows.T, metric), product.T)


@pytest.mark.parametrize("name", ["triltoeplitz", "triutoeplitz"])
@pytest.mark.parametrize("dim", [256, 257, 900])
def test_toeplitz_metric_of_any_size(name, dim):
    """Dense up to 256, by FFT of more rows than are transformed at a time above."""
    structure, values = sample(name, dim)
    matrix, rows = structure.to_dense(values), random(90, dim, seed=3)
    torch.testing.assert_close(structure.times_metric(values, rows), rows @ matrix @ matrix.T)
    torch.testing.assert_close(structure.metric_times(values, rows.T), matrix @ matrix.T @ rows.T)
    moved = rows @ matrix
    means = [(moved[:, lag:] * moved[:, : dim - lag]).sum() / (dim - lag) for lag in range(dim)]
    moment = 2 * torch.stack(means)
    moment[0] /= 2
    torch.testing.assert_close(structure.finish(values, structure.moment(values, rows)), moment)


@pytest.mark.parametrize("name", ["dense", "diagonal", "block4diagonal", "hierarchical2_3", "triltoeplitz"])
@pytest.mark.parametrize("options", [{"kfac_like": True}, {"kfac_like": False}])
def test_layers_of_one_shape_are_updated_as_a_batch(name, options):
    """`vmap` over layers gives what each gives by itself."""
    stores_metric = name == "dense" and options["kfac_like"]
    inputs, outputs = (DenseMetric(dim) if stores_metric else make_structure(name, dim) for dim in (13, 6))
    rules = {"damping": 0.1, "alpha1": 0.5, "normalize_lr_cov": False, "limit_lr_cov": True, **options}

    def updated(k, c, u, v, scale):
        sides = Factor(inputs, k, 0.1 * k), Factor(outputs, c, 0.1 * c)
        return [side.values for side in update_factors(*sides, Moment(u, scale), Moment(v, scale), rules, 0.1)]

    k, c = random(3, inputs.numel), random(3, outputs.numel, seed=1)
    u = torch.stack([inputs.moment(one, random(9, 13, seed=n)) for n, one in enumerate(k)])
    v = torch.stack([outputs.moment(one, random(9, 6, seed=n)) for n, one in enumerate(c)])
    scale = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    batch = torch.vmap(updated)(k, c, u, v, scale)
    alone = [updated(*layer) for layer in zip(k, c, u, v, scale, strict=True)]
    torch.testing.assert_close(batch, [torch.stack(side) for side in zip(*alone, strict=True)])


@pytest.mark.parametrize("name", NAMES)
def test_radius_is_the_largest_eigenvalues(name):
    structure, values = sample(name, 13)
    one = structure.identity(values.dtype, values.device)
    near = structure.gram(one + 0.1 * values) + 5 * structure.project(torch.ones(1, 13, dtype=torch.float64))
    largest = torch.linalg.eigvals(structure.to_dense(near)).abs().max()
    assert structure.radius(near) > 0.9 * largest
    if name.startswith(("dense", "diagonal", "block")):  # others are not symmetric: a bound from above, as safe
        assert structure.radius(near) < 1.001 * largest


@cases
def test_identity_and_trace(name, dim):
    structure, values = sample(name, dim)
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(structure.to_dense(structure.identity(torch.float64, eye.device)), eye)
    torch.testing.assert_close(structure.mean_trace(values), structure.to_dense(values).trace() / dim)


@pytest.mark.parametrize(
    ("name", "numel"),
    [("dense", 70**2), ("diagonal", 70), ("block30diagonal", 1900), ("hierarchical15_15", 31 * 70 - 255)],
)
def test_entries_stored(name, numel):
    assert make_structure(name, 70).numel == numel


def test_projected_step_keeps_the_metric_to_first_order():
    """`(I + εΠ(S))(I + εΠ(S))ᵀ` and `(I + εS)²` agree to ε inside the structure: why mirrored entries are doubled."""
    structure = make_structure("hierarchical2_3", 9)
    root = random(9, 9)
    symmetric = root @ root.T
    inside = structure.to_dense(structure.project(root.T))
    linear = inside + inside.T
    kept = (mask(structure).sum(0) + mask(structure).sum(0).T) > 0
    torch.testing.assert_close(linear[kept], 2 * symmetric[kept])


@pytest.mark.parametrize("name", NAMES[1:])
def test_curvatures_of_several_layers_at_once(name):
    """As one batch, by operations that `torch.vmap` knows: it warns of others."""
    structure = make_structure(name, 13)
    values, rows = random(3, structure.numel), random(3, 4, 13, seed=1)
    moments = torch.stack([structure.moment(*each) for each in zip(values, rows, strict=True)])
    alone = [structure.damped(v, moment, 0.3, 0.2) for v, moment in zip(values, moments, strict=True)]
    together = torch.vmap(lambda v, moment: structure.damped(v, moment, 0.3, 0.2))(values, moments)
    torch.testing.assert_close(together, torch.stack(alone))


def test_toeplitz_forms_no_square_matrix():
    """A dense 60 000 × 60 000 matrix would take 14 GB."""
    structure = make_structure("triltoeplitz", 60_000)
    values = torch.randn(60_000)
    rows = torch.randn(2, 60_000)
    moved = structure.finish(values, structure.moment(values, rows))
    assert structure.product(values, structure.gram(values) + moved).isfinite().all()


@pytest.mark.parametrize(
    ("name", "near"),
    [("block30", "block30diagonal"), ("diag", "diagonal"), ("hierarchical15", "hierarchical15_15"), ("Dense", "dense")],
)
def test_unknown_name_is_refused_with_the_closest(name, near):
    with pytest.raises(ValueError, match=f"got '{name}'. Did you mean `{near}`"):
        make_structure(name, 4)


@pytest.mark.parametrize("name", ["block0diagonal", "hierarchical0_3", "block-1diagonal"])
def test_sizes_start_at_one(name):
    with pytest.raises(ValueError, match="sizes from 1 on"):
        make_structure(name, 4)
