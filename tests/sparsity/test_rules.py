"""The rules that change masks: what the papers say they keep, remove, grow, and when."""

import math

import pytest
import torch
from torch import nn

from hf_efcp.sparsity import METHODS, Sparsifier, sparse_method


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 4))


def train(sparsifier, net, steps, optimizer=None, seed=1):
    """Steps with random dense gradients, as Trainer takes them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        sparsifier.observe_()
        sparsifier.mask_gradients_()
        if optimizer and not sparsifier.replaces_step:
            optimizer.step()
        sparsifier.finish_step_(optimizer)
        yield {name: mask.clone() for name, mask in sparsifier.masks.items()}


def active(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


PUBLISHED = {
    "static": ("erk", "none", 0.0, 0.0, "epoch", 1.0, None, "after"),
    "set": ("uniform", "random", 0.5, 0.0, "epoch", 1.0, 99, "after"),
    "rigl": ("erk", "gradient", 0.3, 0.0, 100, 0.75, None, "replace"),
    "rigl_itop": ("erk", "gradient", 0.5, 0.005, 4000, 1.0, None, "after"),
    "set_itop": ("erk", "random", 0.5, 0.005, 1500, 1.0, None, "after"),
    "snfs": ("uniform", "momentum", 0.5, 0.0, "epoch", 1.0, 99, "after"),
    "gmp": ("erk", "none", 0.0, 0.0, 100, 0.75, None, "after"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_ones(name):
    m = METHODS[name]
    settings = (m.distribution, m.grow, m.rate, m.final_rate, m.interval, m.stop, m.stop_epochs, m.order)
    assert settings == PUBLISHED[name]
    assert m.regrow_keep_value == ("itop" in name)
    assert (m.first_dense, m.gradual, m.begin) == (name == "set", name == "gmp", 700 if name == "gmp" else 1)
    assert METHODS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("order", ["replace", "after"])
@pytest.mark.parametrize("name", ["set", "rigl", "rigl_itop", "set_itop", "snfs"])
def test_density_never_changes(name, order, keep):
    """Per layer; with SNFS of the whole. What is inactive is 0, in the weights and in every moment."""
    net = model()
    made = Sparsifier(
        net, 0.7, name, total_steps=30, steps_per_epoch=5, order=order, regrow_keep_value=keep, interval=2, stop=1.0
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    made.apply_(optimizer)
    first, total = active(made.masks), round(0.3 * made.size)
    for masks in train(made, net, 30, optimizer):
        assert sum(active(masks).values()) == total
        assert name == "snfs" or active(masks) == first
        for layer in made.layers:
            mask, state = masks[layer.name], optimizer.state[layer.parameter]
            assert not layer.parameter[~mask].any()
            assert all(not state[k][~mask].any() for k in ("exp_avg", "exp_avg_sq") if k in state)
    assert made.changes == 14  # every second step, and never the last
    assert made.exploration() > made.density()


def test_rigl_drops_the_smallest_and_grows_the_steepest():
    """At one change, entry by entry; new weights and their moments start at 0."""
    net = model()
    made = Sparsifier(net, 0.6, "rigl", total_steps=100, interval=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    made.apply_()
    steps = train(made, net, 3, optimizer)
    before = [next(steps), next(steps)][1]
    weights = {layer.name: layer.parameter.detach().clone() for layer in made.layers}
    after = next(steps)
    generator = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(p.shape, generator=generator) for p in net.parameters()] for _ in range(3)][2]
    gradient_of = dict(zip((n for n, _ in net.named_parameters()), gradients, strict=True))
    rate = 0.3 * (1 + math.cos(math.pi * 3 / 75)) / 2
    for layer in made.layers:
        name, old, new = layer.name, before[layer.name], after[layer.name]
        count = math.ceil(rate * int(old.sum()))
        kept = old & new & (layer.parameter != 0)
        assert int(old.sum()) - int(kept.sum()) == count
        assert weights[name][old & ~kept].abs().max() <= weights[name][kept].abs().min()
        born = new & ~kept
        assert gradient_of[name][born].abs().min() >= gradient_of[name][~new].abs().max()
        assert torch.equal(layer.parameter[kept], weights[name][kept])  # the change took the place of the step
        assert not layer.parameter[born].any()
        assert not optimizer.state[layer.parameter]["momentum_buffer"][born].any()


def test_regrown_weights_may_keep_their_value():
    """The masks are the same either way; a weight that is pruned and grown at once is kept or zeroed."""
    results = []
    for keep in (False, True):
        net = model()
        made = Sparsifier(net, 0.3, "rigl", total_steps=10, interval=1, rate=0.9, regrow_keep_value=keep, stop=1.0)
        made.apply_()
        before = {n: m.clone() for n, m in made.masks.items()}
        list(train(made, net, 1))
        results.append((made.masks, {x.name: x.parameter.detach().clone() for x in made.layers}))
    found = 0
    for name in before:
        assert torch.equal(results[0][0][name], results[1][0][name])
        differing = results[0][1][name] != results[1][1][name]
        found += int(differing.sum())
        assert (before[name] & results[0][0][name])[differing].all()
    assert found > 50


@pytest.mark.parametrize("name", ["rigl", "set", "snfs", "gmp", "rigl_itop", "set_itop"])
def test_two_processes_choose_alike(name):
    """Same seed and gradients, other global generators: the same masks, bit for bit."""
    runs = []
    for noise in (0, 1):
        net = model()
        settings = {"begin": 1} if name == "gmp" else {}
        made = Sparsifier(net, 0.8, name, total_steps=20, steps_per_epoch=4, interval=2, seed=5, **settings)
        torch.manual_seed(noise)
        made.apply_()
        runs.append(list(train(made, net, 20)))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(*runs, strict=True) for n in a)
    assert any(not torch.equal(runs[0][0][n], runs[0][-1][n]) for n in runs[0][0])


def test_layers_that_are_dense_stay_so():
    """Nothing could be explored there, and pruning would only zero weights."""
    net = model()
    made = Sparsifier(net, 0.5, "rigl", total_steps=20, interval=1, densities={"^2": 1.0})
    made.apply_()
    weight = net[2].weight.detach().clone()
    list(train(made, net, 5))
    assert torch.equal(net[2].weight, weight)
    assert made.changes == 5


def test_gmp_prunes_along_a_cubic():
    """From dense, the smallest of the whole model; nothing returns; the end is exact."""
    net = model()
    made = Sparsifier(net, 0.9, "gmp", total_steps=100, interval=10, begin=10)
    made.apply_()
    weights = {x.name: x.parameter.detach().clone() for x in made.layers}
    previous = {n: m.clone() for n, m in made.masks.items()}
    assert made.density() == 1
    for number, masks in enumerate(train(made, net, 100), 1):
        expected = 0.9 * (1 - (1 - min(1, max(0, (number // 10 * 10 - 10) / 65))) ** 3) if number >= 10 else 0
        if number <= 70:
            assert sum(active(masks).values()) == round((1 - expected) * made.size)
        assert not any((masks[n] & ~previous[n]).any() for n in masks)
        previous = masks
    everything = torch.cat([weights[n].abs().flatten() for n in weights])
    kept = torch.cat([masks[n].flatten() for n in weights])
    assert everything[kept].min() >= everything[~kept].max()


def test_gmp_that_never_ends_is_refused():
    with pytest.raises(ValueError, match=r"from step 700 \(`begin`\) to step 75 \(`stop`\) of 100"):
        Sparsifier(model(), 0.9, "gmp", total_steps=100, begin=700)


@pytest.mark.parametrize("name", ["rigl", "rigl_itop", "set_itop", "gmp"])
def test_schedules_fit_short_runs(name, caplog):
    """Published for runs a hundred times as long; a schedule that was asked for stays as it is."""
    net = model()
    made = Sparsifier(net, 0.8, name, total_steps=60)
    assert "never in these 60 steps" in caplog.text
    made.apply_()
    *_, masks = train(made, net, 60)
    assert 9 <= made.changes <= 12
    assert sum(active(masks).values()) == round(0.2 * made.size)
    assert Sparsifier(net, 0.8, "rigl", total_steps=60, interval=100).method.interval == 100
    assert Sparsifier(net, 0.8, "rigl", total_steps=200).method.interval == 100


def test_rates_follow_the_published_schedules():
    rigl, itop = METHODS["rigl"], METHODS["rigl_itop"]
    assert [rigl.exchange_rate(t, 100) for t in (0, 50, 100, 120)] == pytest.approx([0.3, 0.15, 0, 0])
    assert [itop.exchange_rate(t, 100) for t in (0, 50, 100)] == pytest.approx([0.5, 0.2525, 0.005])
    assert rigl.last_step(1000, 100) == 750
    assert METHODS["set"].last_step(20_000, 100) == 9900
    assert itop.last_step(1000, 100) == 999


def test_a_skipped_step_counts_for_no_schedule():
    net = model()
    made = Sparsifier(net, 0.7, "rigl", total_steps=20, interval=2)
    made.finish_step_()
    assert made.is_due
    made.finish_step_(skipped=True)
    assert (made.step, made.changes, made.is_due) == (1, 0, True)
    made.finish_step_()
    assert (made.step, made.changes, made.is_due) == (2, 1, False)


def test_gradients_are_read_where_they_are_due_alone():
    net = model()
    made = Sparsifier(net, 0.7, "rigl", total_steps=20, interval=3)
    needed = []
    for _ in range(6):
        needed.append(made.needs_gradients)
        made.finish_step_()
    assert needed == [False, False, True, False, False, True]


def test_gradients_that_are_no_numbers_grow_nothing_first():
    net = model()
    made = Sparsifier(net, 0.7, "rigl", total_steps=20, interval=1)
    made.apply_()
    total = sum(active(made.masks).values())
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.nan)
    made.observe_()
    made.finish_step_()
    assert sum(active(made.masks).values()) == total
    assert all(p.isfinite().all() for p in net.parameters())


def test_state_goes_on_bit_for_bit():
    runs = []
    for stop in (None, 7):
        net = model()
        made = Sparsifier(net, 0.8, "snfs", total_steps=20, interval=2, steps_per_epoch=5)
        made.apply_()
        steps = list(train(made, net, 7))
        if stop:
            state = made.state_dict()
            made = Sparsifier(net, 0.8, "snfs", total_steps=20, interval=2, steps_per_epoch=5, seed=9)
            made.load_state_dict(state)
            made.seed = 0
        steps += list(train(made, net, 13, seed=2))
        runs.append((steps, made.exploration(), [p.detach().clone() for p in net.parameters()]))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(runs[0][0], runs[1][0], strict=True) for n in a)
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))


def test_masks_of_another_model_are_refused():
    made, other = Sparsifier(model(), 0.8, "static"), Sparsifier(nn.Sequential(nn.Linear(12, 20)), 0.8, "static")
    with pytest.raises(ValueError, match=r"not of the layers that are masked here: 1\.weight, 2\.weight"):
        made.load_masks(other.packed_masks())
    with pytest.raises(ValueError, match=r"mask of 0\.weight is not one of shape \(20, 12\)"):
        made.load_masks({**made.packed_masks(), "0.weight": torch.zeros(3, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rigle", {}, "Did you mean `rigl`"),
        ("rigl", {"intervall": 3}, "has no setting `intervall`. Did you mean `interval`"),
        ("rigl", {"grow": "random"}, "has no setting `grow`"),
        ("rigl", {"rate": 1.5}, r"`rate` must be in \[0, 1\]"),
        ("rigl", {"interval": 0}, "`interval` must be `epoch` or"),
        ("rigl", {"order": "before"}, "`order` must be one of replace, after"),
        ("rigl", {"begin": -1}, "`begin` must be"),
    ],
)
def test_wrong_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        sparse_method(name, **settings)
    with pytest.raises(ValueError, match=message):
        Sparsifier(model(), 0.9, name, **settings)
