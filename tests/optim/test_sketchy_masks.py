"""On an accelerator no host reads a flag, and equal shapes go in batches: both must come out as on the CPU."""

import pytest
import torch
from contract import assert_same

from hf_efcp.optim import SketchyAdaGrad, SketchyShampoo

SHAPES = [(40, 30), (30,), (40, 30), (5, 4, 3), (30,), (40, 30), ()]
CLASSES = pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SketchyShampoo, {"rank": 4, "sketch_update": "subspace", "grafting": "sgd", "scaling": "adafactor"}),
        (SketchyShampoo, {"rank": 4, "tail": "trace", "grafting": "adafactor", "nesterov": False, "block_size": 16}),
        (SketchyAdaGrad, {"rank": 3, "radius": 4.0, "system": "model"}),
    ],
    ids=["subspace", "blocks", "adagrad"],
)


def run(cls, options, bad=(), steps=5, **changes):
    """Weights and state after some steps; those in `bad` have a NaN."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = cls(params, 0.1, weight_decay=0.1, **{**options, **changes})
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if step in bad:
            params[2].grad[3, 3] = torch.nan
        optimizer.step()
    state = {k: {n: t for n, t in s.items() if n != "step"} for k, s in optimizer.state_dict()["state"].items()}
    return [p.detach() for p in params], state


@CLASSES
def test_masks_do_what_branches_do(cls, options, monkeypatch):
    expected = run(cls, options)
    with_nan = run(cls, options, bad=[4])
    monkeypatch.setattr(cls, "_reads", lambda self, flag: False)
    assert_same(run(cls, options), expected)
    assert_same(run(cls, options, bad=[4]), with_nan)
    for x in run(cls, options, bad=[0, 2])[0]:
        assert x.isfinite().all()


@CLASSES
def test_batches_of_equal_shapes_do_what_each_alone_does(cls, options, monkeypatch):
    if cls is SketchyAdaGrad:
        pytest.skip("has no batches: its products have as few columns as the sketch")
    expected, _ = run(cls, options, steps=3)
    for room in (2, 100):
        monkeypatch.setattr(cls, "_batch_size", lambda self, parameter, room=room: room)
        torch.testing.assert_close(run(cls, options, steps=3)[0], expected, rtol=1e-4, atol=1e-5)  # order of sums


@pytest.mark.parametrize("kind", ["none", "sgd", "rmsprop", "adafactor", "rms"])
@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (60, 3, 4), (3, 60, 4), (60,)], ids=str)
@pytest.mark.parametrize(
    "momentum",
    [{}, {"momentum": 0.9, "scaling": "adafactor"}, {"momentum": 0.9, "nesterov": False, "ema": True}],
    ids=str,
)
def test_words_that_do_not_occur_change_nothing(kind, shape, momentum, monkeypatch):
    """A vocabulary's gradient without its zeros: the same weights and state as with them."""
    axis = shape.index(60)

    def run_words():
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
        optimizer = SketchyShampoo([weight], 0.1, rank=4, max_dim=50, grafting=kind, weight_decay=0.1, **momentum)
        for step in range(5):
            words = torch.randperm(60, generator=generator)[: 9 if step != 2 else 40]
            drawn = torch.randn(shape, generator=generator)
            weight.grad = torch.zeros(shape).index_copy(axis, words, drawn.index_select(axis, words))
            optimizer.step()
        state = {name: x for name, x in optimizer.state[weight].items() if not name.startswith("basis")}
        return weight.detach(), state

    found = run_words()
    monkeypatch.setattr(SketchyShampoo, "_slices", lambda *_: None)
    torch.testing.assert_close(found, run_words(), rtol=1e-4, atol=1e-5)  # order of sums
