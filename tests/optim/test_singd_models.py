"""SINGD over Hugging Face's models: every parameter trained, resumed bit for bit, nothing silently left out."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_efcp import create_optimizer
from hf_efcp.optim.singd import SINGD

# transformers renames checkpointing, and peft still asks for the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

OPTIONS = {"lr": 5e-3, "T": 2, "lr_cov": 0.1, "scaling": "layer_rms", "warm_start": True, "normalize_lr_cov": True}


def random(*shape, high=None):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(high, shape, generator=generator) if high else torch.randn(shape, generator=generator)


def vit():
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config), {"pixel_values": random(8, 1, 8, 8), "labels": random(8, high=4)}


def bert():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config), {"input_ids": random(8, 12, high=50), "labels": random(8, high=2)}


def gpt2():
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    tokens = random(8, 12, high=50)
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


class Convolutions(nn.Module):
    """A convolutional net with a grouped and a circular layer and activations in place."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, pixel_values, labels):
        return nn.functional.cross_entropy(self.net(pixel_values), labels)


class Mixture(nn.Module):
    """Three experts: one runs always, one from the third step on, one never; and a weight that no module applies."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.bypassed = nn.Linear(4, 4)
        self.count = 0

    def forward(self, x):
        self.count += 1
        y = self.experts[0](input=x)
        if self.count >= 4:
            y = y + self.experts[1](x[0])
        return nn.functional.linear(y, self.bypassed.weight, self.bypassed.bias).square().mean()


def convolutions():
    return Convolutions(), {"pixel_values": random(8, 1, 8, 8), "labels": random(8, high=4)}


def lora():
    peft = pytest.importorskip("peft")
    model, batch = bert()
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    return peft.get_peft_model(model, config), batch


def build(make):
    torch.manual_seed(0)
    model, batch = make()
    return model.train(), batch


def loss_of(model, batch):
    out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.loss


def train(model, optimizer, batch, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


MODELS = pytest.mark.parametrize("make", [vit, bert, gpt2, convolutions, lora])


@MODELS
def test_every_trainable_parameter_moves_and_the_loss_falls(make):
    model, batch = build(make)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SINGD(model, **OPTIONS)
    losses = train(model, optimizer, batch, 12)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        # Attention's key bias has no influence on a softmax: its gradient is rounding.
        assert torch.equal(p, before[name]) != p.requires_grad, name


@MODELS
@pytest.mark.parametrize("structures", ["dense", "hierarchical2_2"])
def test_registered_defaults_train_every_model(make, structures):
    """At a rate that AdamW takes: the loss falls, and all that is trained moves."""
    model, batch = build(make)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, create_optimizer("efcp_singd", model, lr=3e-3, structures=structures), batch, 12)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) != p.requires_grad for name, p in model.named_parameters())


@MODELS
def test_each_parameter_is_explained_as_it_is_treated(make):
    model, batch = build(make)
    optimizer = SINGD(model, **OPTIONS)
    train(model, optimizer, batch, 1)
    told = optimizer.explain_parameters()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert told[name] == "not trained"
        else:
            assert told[name].startswith("AdamW: ") == ("exp_avg" in optimizer.state[p]), name
            assert told[name].startswith("SINGD: ") == ("exp_avg" not in optimizer.state[p]), name


def test_gpt2s_layers_are_preconditioned_and_its_tied_head_steps_once():
    model, _ = build(gpt2)
    told = SINGD(model, **OPTIONS).explain_parameters()
    assert told["transformer.wte.weight"] == "AdamW: shared by Embedding and Linear"
    assert told["transformer.h.0.mlp.c_fc.weight"] == "SINGD: inputs dense (17), outputs dense (64)"
    assert told["transformer.h.0.mlp.c_fc.bias"].endswith("with transformer.h.0.mlp.c_fc.weight")


def test_lora_adapters_are_layers():
    model, _ = build(lora)
    told = SINGD(model, **OPTIONS).explain_parameters()
    adapters = [told[name] for name in told if "lora_" in name]
    assert len(adapters) == 4
    assert all(treatment.startswith("SINGD") for treatment in adapters)


def test_experts_that_never_run_stay_and_late_ones_are_preconditioned_at_once(caplog):
    torch.manual_seed(0)
    model = Mixture()
    optimizer = SINGD(model, **{**OPTIONS, "T": 5})
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        for step in range(8):
            optimizer.zero_grad()
            model(random(6, 4)).backward()
            optimizer.step()
            refreshes = [int(optimizer.state[expert.weight]["refreshes"]) for expert in model.experts]
            assert refreshes == [1 + (step >= 5), (step >= 3) + (step >= 5), 0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before) - {"experts.2.weight", "experts.2.bias"}
    assert "never ran: AdamW optimizes it" in caplog.text
    assert "exp_avg" in optimizer.state[model.bypassed.weight]


@MODELS
def test_resume_is_bit_for_bit(make, tmp_path):
    model, batch = build(make)
    optimizer = SINGD(model, **OPTIONS)
    train(model, optimizer, batch, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twin = copy.deepcopy(model)
    resumed = SINGD(twin, **OPTIONS)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(model, optimizer, batch, 4)
    train(twin, resumed, batch, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_bfloat16_keeps_factors_in_float32(precision):
    model, batch = build(bert)
    model = model.bfloat16() if precision == "pure" else model
    optimizer = SINGD(model, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        losses = train(model, optimizer, batch, 12)
    assert losses[-1] < losses[0]
    state = optimizer.state[model.classifier.weight]
    assert {state[name].dtype for name in ("input_factor", "output_factor", "momentum")} == {torch.float32}


def test_gradient_checkpointing_of_transformers_changes_nothing():
    ends = []
    for checkpoints in (False, True):
        model, batch = build(bert)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train(model, SINGD(model, **OPTIONS), batch, 4)
        ends.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(ends[0], ends[1])


def test_wide_heads_get_a_diagonal_side():
    head = nn.Linear(4, 50_000, bias=False)
    told = SINGD(head, **OPTIONS).explain_parameters()
    assert told == {"weight": "SINGD: inputs dense (4), outputs diagonal (50000, above max_dense_dim)"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_model_trains_the_same():
    """Hooks run outside of the compiled graph."""
    ends = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = SINGD(model, **OPTIONS)
        called = torch.compile(model, backend="aot_eager") if compiles else model
        for _ in range(4):
            optimizer.zero_grad()
            called(random(6, 4)).square().mean().backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
        assert optimizer.state[model[0].weight]["refreshes"] == 2
    torch.testing.assert_close(ends[0], ends[1])


def test_step_inside_of_autocast_is_computed_in_full_precision():
    ends = []
    for inside in (False, True):
        model, batch = build(bert)
        optimizer = SINGD(model, **OPTIONS)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
