"""What SINGD's hooks sum: the same for any split of a batch, padding or loss scale, with or without checkpoints."""

import copy
import gc
import weakref

import pytest
import torch
from test_singd import PLAIN, Deep, batch, parameters, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_efcp.optim.singd import SINGD

KINDS = {
    "dense": {},
    "ikfac": {"kfac_like": True},
    "reduce": {"kfac_approx": "reduce"},
    "hierarchical": {"structures": "hierarchical2_2"},
    "toeplitz": {"structures": "triltoeplitz"},
    "diagonal": {"structures": "diagonal", "normalize_lr_cov": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def squared(out, y):
    return (out - y).square().sum(-1)


def assert_equal_models(one, other):
    torch.testing.assert_close(parameters(one), parameters(other), rtol=1e-9, atol=1e-12)


@each_kind
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("average", ["batch", "batch+sequence", None])
def test_split_of_a_batch_does_not_matter(kind, sizes, average):
    """Micro-batches of any sizes, of a mean over samples, over tokens, or a sum."""
    whole, split = Deep(), Deep()
    options = {**PLAIN, **KINDS[kind], "loss_average": average}
    optimizers = SINGD(whole, **options), SINGD(split, **options)
    total = {"batch": 6, "batch+sequence": 24, None: 1}[average]
    for step in range(6):
        x, y = batch(step, tokens=(4,))
        for model, optimizer, parts in ((whole, optimizers[0], (6,)), (split, optimizers[1], sizes)):
            optimizer.zero_grad()
            for a, b in zip(x.split(parts), y.split(parts), strict=True):
                (squared(model(a), b).sum() / total).backward()
            optimizer.step()
    assert_equal_models(whole, split)


@each_kind
def test_padding_does_not_matter(kind):
    """Longer padding, masked out of the loss, adds no rows, no terms, no mean."""
    short, long = Deep(), Deep()
    options = {**PLAIN, **KINDS[kind], "loss_average": "batch+sequence"}
    optimizers = SINGD(short, **options), SINGD(long, **options)
    for step in range(6):
        x, y = batch(step, tokens=(4,))
        mask = torch.ones(6, 4, dtype=torch.float64)
        mask[:3, 2:] = 0
        for model, optimizer, extra in ((short, optimizers[0], 0), (long, optimizers[1], 3)):
            x_p, y_p, m_p = (nn.functional.pad(t, (0, 0, 0, extra), value=9.0) for t in (x, y, mask.unsqueeze(-1)))
            m_p = torch.where(m_p == 9, 0, m_p)[..., 0]
            optimizer.zero_grad()
            ((squared(model(x_p), y_p) * m_p).sum() / m_p.sum()).backward()
            optimizer.step()
    assert_equal_models(short, long)


def test_loss_terms_may_be_given():
    """`num_items_in_batch`: a mean over 4 labels, where 24 tokens have gradients."""
    given, scaled = Deep(), Deep()
    options = {**PLAIN, "damping": 0.0, "T": 1, "kfac_like": True, "momentum": 0.0, "lr_cov": 0.002}
    optimizers = [SINGD(model, **options, loss_average="batch+sequence") for model in (given, scaled)]
    for model, optimizer, terms in zip((given, scaled), optimizers, (4, 24), strict=True):
        x, y = batch(0, tokens=(4,))
        ((squared(model(x), y).sum()) / terms).backward()
        if model is given:
            optimizer.set_loss_terms(4)
        optimizer.step()
    for module in ("first", "second"):
        v = []
        for optimizer, model in zip(optimizers, (given, scaled), strict=True):
            state, d = optimizer.state[getattr(model, module).weight], 7 if module == "first" else 3
            values, vectors = torch.linalg.eigh(state["output_metric"].view(d, d))
            # CCᵀ is the square of C = (1 + ½β) I − ½β V, and V = N Σ ggᵀ is 24/4 times larger where the loss is.
            v.append(1.001 * torch.eye(d, dtype=torch.float64) - vectors @ values.sqrt().diag() @ vectors.T)
        torch.testing.assert_close(v[0], 6 * v[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    plain, saving = Deep(), Deep()
    forward = Deep.forward
    optimizers = SINGD(plain, **PLAIN), SINGD(saving, **PLAIN)
    for step in range(5):
        x, y = batch(step)
        for model, optimizer in zip((plain, saving), optimizers, strict=True):
            optimizer.zero_grad()
            a = x.clone().requires_grad_()
            out = checkpoint(forward, model, a, use_reentrant=reentrant) if model is saving else model(a)
            squared(out, y).mean().backward()
            optimizer.step()
    assert_equal_models(plain, saving)


def test_checkpointing_pins_no_activations():
    """Of what the hooks see in the first forward pass nothing lives until backward."""
    model = Deep()
    optimizer = SINGD(model, **PLAIN)
    seen = []
    model.second.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    x, y = batch(0)
    out = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    gc.collect()
    assert seen[0]() is None
    squared(out, y).mean().backward()
    optimizer.step()
    assert optimizer.state[model.second.weight]["refreshes"] == 1


class Scaled:
    """What a GradScaler is to an optimizer, without the device."""

    def __init__(self, scale):
        self.scale = scale

    def is_enabled(self):
        return True

    def get_scale(self):
        return self.scale


@pytest.mark.parametrize("told", ["scaler", "init_grad_scale"])
def test_statistics_of_a_scaled_loss_are_unscaled(told):
    plain, scaled = Deep(), Deep()
    expected = SINGD(plain, **PLAIN)
    optimizer = SINGD(scaled, **PLAIN, init_grad_scale=2.0**16 if told == "init_grad_scale" else 1.0)
    scaler = Scaled(2.0**16)
    if told == "scaler":
        optimizer.use_scaler(scaler)
    for step in range(6):
        x, y = batch(step)
        train(plain, expected, [step])
        if told == "scaler":
            scaler.scale = 2.0 ** (10 + step)
        optimizer.zero_grad()
        (squared(scaled(x), y).mean() * scaler.scale).backward()
        for p in scaled.parameters():
            p.grad /= scaler.scale  # unscale_
        optimizer.step()
    assert_equal_models(plain, scaled)


def test_real_scaler_with_skipped_steps_does_what_float64_would_have_done():
    """A skipped step takes its statistics with it, and a skipped update of the factors comes with the next step."""
    plain, scaled = Deep().float(), Deep().float()
    expected, optimizer = SINGD(plain, **PLAIN), SINGD(scaled, **PLAIN)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer.use_scaler(scaler)
    for step in range(8):
        x, y = (t.float() for t in batch(step))
        optimizer.zero_grad()
        scaler.scale(squared(scaled(x), y).mean()).backward()
        if step in (0, 3):
            scaled.first.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(scaled.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        if step not in (0, 3):
            expected.zero_grad()
            squared(plain(x), y).mean().backward()
            expected.step()
    torch.testing.assert_close(parameters(scaled), parameters(plain))


def test_fp16_without_a_scale_is_refused():
    model = Deep().float()
    SINGD(model, **PLAIN)
    with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeError, match="use_scaler"):
        model(torch.ones(2, 5))


def test_skipped_update_of_the_factors_is_made_up_for():
    model, expected = Deep(), Deep()
    options = {**PLAIN, "T": 3}
    optimizer, reference = SINGD(model, **options), SINGD(expected, **options)
    for step in range(8):
        optimizer.zero_grad()
        squared(model(batch(step)[0]), batch(step)[1]).mean().backward()
        if step == 3:
            model.first.bias.grad[0] = float("nan")
        optimizer.step()
    train(expected, reference, [0, 1, 2, 4, 5, 6, 7])
    assert_equal_models(model, expected)
    assert optimizer.skipped_steps == 1


def test_statistics_are_taken_on_due_steps_in_training_with_gradients_alone(monkeypatch):
    model = Deep()
    optimizer = SINGD(model, **{**PLAIN, "T": 3})
    calls = []
    record = optimizer._collector.record
    monkeypatch.setattr(optimizer._collector, "record", lambda *args: (calls.append(1), record(*args)))
    counts = []
    for step in range(7):
        calls.clear()
        with torch.no_grad():
            model(batch(step)[0])
        model.eval()
        model(batch(step)[0]).sum().backward()
        model.train()
        train(model, optimizer, [step])
        counts.append(len(calls))
    assert counts == [2, 0, 0, 2, 0, 0, 2]


def test_gradients_by_torch_func_are_left_alone():
    model = Deep()
    optimizer = SINGD(model, **PLAIN)
    loss = torch.func.grad(lambda weights: torch.func.functional_call(model, weights, (batch(0)[0],)).sum())
    loss(dict(model.named_parameters()))
    assert not optimizer._statistics()


def test_hooks_come_off_and_are_not_copied():
    model = Deep()
    optimizer = SINGD(model, **PLAIN)
    twin = copy.deepcopy(model)
    twin(batch(0)[0]).sum().backward()
    assert optimizer._collector.sums(optimizer._layers()[0]) is None
    optimizer.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_hidden_states_read_by_several_layers_share_one_moment(monkeypatch):
    """Query, key and value see the same input."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(5, 3) for _ in range(3)).double()

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    ends = []
    for apart in (False, True):
        model = Three()
        optimizer = SINGD(model, **PLAIN)
        if apart:
            record = optimizer._collector.record
            monkeypatch.setattr(
                optimizer._collector, "record", lambda layer, m, x, g, r=record: r(layer, m, x.clone(), g)
            )
        train(model, optimizer, range(4))
        ends.append(parameters(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tokens", [(), (1,)], ids=["samples", "tokens"])
def test_samples_without_a_gradient_are_rows_and_tokens_are_not(tokens):
    """Units that are off take a sample's gradient away; padding takes a token's. `KKᵀ = (I − ½β(U − I))²`."""
    model = nn.Linear(5, 3, bias=False).double()
    optimizer = SINGD(model, lr=0.0, T=1, lr_cov=0.1, damping=0.0, kfac_like=True)
    x = batch(0, tokens=tokens)[0]
    model(x)[:4].square().sum(-1).mean().backward()
    optimizer.step()
    rows = x.flatten(0, -2) if not tokens else x[:4].flatten(0, -2)
    one = torch.eye(5, dtype=torch.float64)
    factor = one - 0.05 * (rows.T @ rows / len(rows) - one)
    torch.testing.assert_close(optimizer.state[model.weight]["input_metric"].view(5, 5), factor @ factor)
