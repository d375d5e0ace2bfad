"""`state_device="cpu"`: the state stays on the host, and only gradient and update cross.

A second device that any machine has stands in for the GPU: parameters that say they are on `cuda`, and a `Tensor.to`
that copies within the CPU for such a target and counts what goes there.
"""

import pytest
import torch

from hf_efcp.ops import scratch
from hf_efcp.optim import GGT, MFAC

SHAPES = [(60, 50), (7,), (3, 4, 5)]
FAKE = torch.device("cuda", 0)


class Elsewhere(torch.nn.Parameter):
    """A parameter that says it is on another device."""

    device = FAKE


@pytest.fixture
def crossed(monkeypatch):
    """Shapes of the tensors that went to the other device, in order."""
    shapes, to = [], torch.Tensor.to

    def spy(self, *args, **kwargs):
        if args and isinstance(args[0], torch.device) and args[0] == FAKE:
            shapes.append(tuple(self.shape))
            return to(self.clone(), *args[1:], **kwargs)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    return shapes


def train(cls, kind, steps=12, **options):
    """The parameters after some steps, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [kind(torch.zeros(shape)) for shape in SHAPES]
    optimizer = cls(params, lr=1e-2, window=8, density=0.05, block_size=64, weight_decay=0.1, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("cls", [MFAC, GGT])
@pytest.mark.parametrize("options", [{}, {"precondition": "compressed", "scaling": "none"}], ids=["default", "paper"])
def test_only_updates_cross_and_the_weights_are_the_same(crossed, cls, options):
    there, optimizer = train(cls, Elsewhere, state_device="cpu", **options)
    crossings = len(crossed) / 12
    weights_alone = [shape for shape in crossed if shape != ()]  # a number each for weight decay
    assert weights_alone == SHAPES * 12
    assert crossings <= 2 * len(SHAPES)
    here, _ = train(cls, torch.nn.Parameter, **options)
    for ours, theirs in zip(there, here, strict=True):  # one pass over blocks sums in another order
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-7)
    for state in optimizer.state.values():
        assert all(value.device.type == "cpu" for value in state.values())


def test_what_crosses_is_pinned_where_there_is_a_gpu(monkeypatch):
    asked, empty = [], torch.empty

    def spy(*args, pin_memory=False, **kwargs):
        asked.append(pin_memory)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", spy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert scratch.empty(5, torch.device("cpu"), serves=FAKE).shape == (5,)
    assert asked == [True]
    scratch.empty(5, torch.device("cpu"), serves=torch.device("cpu"))
    assert asked == [True]
