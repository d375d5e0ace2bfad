"""Counts and masks: exact, safe against ties, the same everywhere."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_efcp.sparsity import Sparsifier, maskable_parameters, nonzero_counts
from hf_efcp.sparsity.allocation import allocate
from hf_efcp.sparsity.maskable import Maskable
from hf_efcp.sparsity.masks import grown, largest, pack, pruned, random_scores, unpack


def layers(*shapes):
    return [Maskable(f"layer{i}", nn.Parameter(torch.zeros(shape)), tuple(shape)) for i, shape in enumerate(shapes)]


def erk_densities(shapes, density):
    """RigL, appendix A, as stated: ε·Σshape/∏shape; while one exceeds 1 the largest is made dense, ε solved anew."""
    dense = set()
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = budget / sum(raw[i] * sizes[i] for i in free)
        worst = max(free, key=lambda i: raw[i])
        if epsilon * raw[worst] <= 1:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense.add(worst)


SHAPES = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (64, 64, 1, 1), (10, 64)]


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
def test_counts_are_exact(distribution, density):
    made = layers(*SHAPES)
    counts = nonzero_counts(made, density, distribution)
    assert sum(counts.values()) == round(density * sum(layer.size for layer in made))
    assert all(1 <= counts[layer.name] <= layer.size for layer in made)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.6])
def test_erk_is_the_papers(density):
    counts = nonzero_counts(layers(*SHAPES), density, "erk")
    for count, shape, expected in zip(counts.values(), SHAPES, erk_densities(SHAPES, density), strict=True):
        assert abs(count - expected * math.prod(shape)) <= 1


def test_er_looks_at_channels_alone():
    """Two layers of equal channels and other kernels have the same density."""
    counts = nonzero_counts(layers((32, 16, 3, 3), (32, 16, 1, 1), (64, 64)), 0.1, "er")
    assert counts["layer0"] / (32 * 16 * 9) == pytest.approx(counts["layer1"] / (32 * 16), rel=0.01)


def test_uniform_may_keep_the_first_layer():
    made = layers(*SHAPES)
    counts = nonzero_counts(made, 0.1, "uniform", first_dense=True)
    rest = round(0.1 * sum(layer.size for layer in made)) - made[0].size
    assert counts["layer0"] == made[0].size
    assert sum(list(counts.values())[1:]) == rest
    assert max(counts[x.name] / x.size for x in made[1:]) - min(counts[x.name] / x.size for x in made[1:]) < 0.01


def test_a_first_layer_that_is_most_of_the_model_is_sparse(caplog):
    made = layers((100, 100), (10, 10))
    counts = nonzero_counts(made, 0.1, "uniform", first_dense=True)
    assert counts == {"layer0": 1000, "layer1": 10}
    assert "layer0 is made sparse" in caplog.text


def test_layers_may_have_densities_of_their_own():
    made = layers(*SHAPES)
    counts = nonzero_counts(made, 0.1, "uniform", densities={"layer[03]": 0.5})
    assert counts["layer0"] == made[0].size // 2
    assert counts["layer3"] == made[3].size // 2
    assert sum(counts.values()) == round(0.1 * sum(layer.size for layer in made))
    every = nonzero_counts(made, 0.1, densities={".": 0.25})
    assert all(every[layer.name] == round(0.25 * layer.size) for layer in made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distribution": "even"}, "`distribution` must be one of erk, er, uniform, got 'even'"),
        ({"density": 0.0}, "`density` must be in"),
        ({"densities": {"layer2": 1.5}}, "must be in"),
        ({"densities": {"head": 0.5}}, "no masked layer matches 'head'"),
        ({"densities": {"layer[0-3]": 0.9}}, "leaves -?[0-9]+ weights"),
    ],
)
def test_impossible_counts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        nonzero_counts(layers(*SHAPES), **{"density": 0.1, **changes})


@given(st.data())
def test_allocation_is_exact_and_bounded(data):
    capacities = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    weights = data.draw(st.lists(st.floats(0, 10), min_size=len(capacities), max_size=len(capacities)))
    total = data.draw(st.integers(0, sum(capacities)))
    shares = allocate(total, weights, capacities)
    assert sum(shares) == total
    assert all(0 <= share <= capacity for share, capacity in zip(shares, capacities, strict=True))


def test_allocation_is_proportional():
    assert allocate(60, [1, 2, 3], [100, 100, 100]) == [10, 20, 30]
    assert allocate(60, [1, 2, 3], [100, 100, 12]) == [16, 32, 12]
    with pytest.raises(ValueError, match="cannot be shared out"):
        allocate(4, [1], [3])


def test_ties_take_neither_more_nor_others():
    """Freshly grown zeros tie with masked zeros, and with one another: exactly as many go as were asked for."""
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    weight = torch.zeros(8)
    left = pruned(weight, mask, 3)
    assert left.tolist() == [True, True, False, False, False, False, False, False]
    more = grown(torch.zeros(8), left, 2)
    assert more.tolist() == [True, True, True, True, False, False, False, False]


@given(st.integers(0, 2**31), st.integers(1, 60))
def test_pruning_and_growing_do_what_they_say(seed, size):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (size,), generator=generator).float()  # many ties
    mask = torch.rand(size, generator=generator) < 0.5
    count = int(mask.sum()) // 2
    left = pruned(weight, mask, count)
    assert int(left.sum()) == int(mask.sum()) - count
    assert not (left & ~mask).any()
    gone = mask & ~left
    if gone.any() and left.any():
        assert weight[gone].abs().max() <= weight[left].abs().min()
    scores = torch.randint(0, 3, (size,), generator=generator).float()
    more = grown(scores, left, int((~left).sum()) // 2)
    assert int(more.sum()) == int(left.sum()) + int((~left).sum()) // 2
    assert not (left & ~more).any()


def test_scores_in_float64_are_ranked_as_such():
    scores = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert largest(scores, torch.ones(2, dtype=torch.bool), 1).tolist() == [False, True]


def test_scores_that_are_no_numbers_lose():
    scores = torch.tensor([torch.nan, 1.0, 2.0, torch.nan])
    assert largest(scores, torch.ones(4, dtype=torch.bool), 2).tolist() == [False, True, True, False]


@given(st.integers(0, 2**31), st.integers(0, 40))
def test_packing_keeps_every_bit(seed, size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert len(pack(mask)) == -(-size // 8)
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


def test_random_scores_depend_on_nothing_else():
    first = random_scores(torch.Size([3, 4]), 1, 2, 3)
    torch.manual_seed(99)
    assert torch.equal(first, random_scores(torch.Size([3, 4]), 1, 2, 3))
    others = [random_scores(torch.Size([3, 4]), *key) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert not any(torch.equal(first, other) for other in others)


class Model(nn.Module):
    """A little of everything."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.experts = nn.Parameter(torch.randn(3, 8, 5))
        self.position_embeddings = nn.Parameter(torch.randn(2, 4, 8))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight


def test_what_is_masked_by_default():
    found = maskable_parameters(Model())
    assert [layer.name for layer in found] == ["experts", "conv.weight", "first.weight"]
    assert [(layer.shape, layer.copies) for layer in found] == [((8, 5), 3), ((4, 3, 3, 3), 1), ((8, 8), 1)]


def test_patterns_choose_otherwise():
    assert [x.name for x in maskable_parameters(Model(), include="embed")] == ["position_embeddings", "embed.weight"]
    assert [x.name for x in maskable_parameters(Model(), exclude=["conv", "experts"])] == ["first.weight"]
    with pytest.raises(ValueError, match="`include`: no parameter's name matches 'nothing'"):
        maskable_parameters(Model(), include=["conv", "nothing"])
    with pytest.raises(ValueError, match="no parameter to mask"):
        maskable_parameters(Model(), exclude=".")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"include": "("}, ValueError, "`include`: '\\(' is no regular expression"),
        ({"exclude": ["conv", 3]}, TypeError, "`exclude` must be a regular expression or several, got 3"),
        ({"exclude": 3}, TypeError, "`exclude` must be a regular expression or several, got 3"),
        ({"densities": {"(": 0.5}}, ValueError, "`densities`: '\\(' is no regular expression"),
        ({"densities": "conv"}, TypeError, "`densities` must be a dict"),
        ({"densities": {"conv": "half"}}, ValueError, "that of 'conv' must be in"),
        ({"sparsity": "0.9"}, ValueError, "`sparsity` must be in .*, got '0.9'"),
        ({"sparsity": math.nan}, ValueError, "`sparsity` must be in"),
    ],
)
def test_what_is_no_pattern_or_number_is_refused_by_name(given, error, message):
    with pytest.raises(error, match=message):
        Sparsifier(Model(), **{"sparsity": 0.5, "method": "static", **given})


def test_layers_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    names = [layer.name for layer in maskable_parameters(gpt2)]
    assert names == [f"transformer.h.0.{x}.weight" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    found = {layer.name: layer for layer in maskable_parameters(MixtralForCausalLM(config))}
    experts = [layer for name, layer in found.items() if "experts" in name]
    assert [layer.copies for layer in experts] == [2, 2]
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in found)


@pytest.mark.parametrize("initial", ["random", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.9, 0.98, 0.99])
def test_the_realised_density_is_exact(initial, sparsity):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(32, 10))
    sparsifier = Sparsifier(model, sparsity, "static", initial=initial)
    sparsifier.apply_()
    total = sum(m.weight.numel() for m in model)
    active = sum(int(mask.sum()) for mask in sparsifier.masks.values())
    assert active == round((1 - sparsity) * total)
    if initial == "magnitude":
        assert sum(int((m.weight != 0).sum()) for m in model) == active


def test_masks_of_a_sparse_model_are_its_own():
    model = nn.Linear(20, 20)
    with torch.no_grad():
        model.weight.mul_(torch.rand(20, 20) < 0.5)
    sparsity = float((model.weight == 0).float().mean())
    sparsifier = Sparsifier(model, sparsity, "static", initial="zeros")
    assert torch.equal(sparsifier.masks["weight"], model.weight != 0)
    with pytest.raises(ValueError, match="the model has sparsity"):
        Sparsifier(model, 0.9, "static", initial="zeros")
