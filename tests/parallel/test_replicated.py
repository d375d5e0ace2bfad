"""DDP: the state divided over the ranks gives the steps, the weights and the checkpoints of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from contract import Case, assert_same, saved, small, tiny_model, weights
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_efcp.memory import footprint
from hf_efcp.optim.registry import get_spec, list_optimizers

FLOAT32 = {"value_dtype": "float32", "residual_dtype": "float32", "moment_dtype": "float32"}
STEPS, RESUMED = 50, 8
COMPRESSED = {"precondition": "compressed", "scaling": "rms", "momentum": 0.0}


def of_name(name, **options):
    """A case over a small window, its state in float32: that of bfloat16 may round a last bit either way."""
    own = get_spec(name).options()
    exact = {k: v for k, v in FLOAT32.items() if k in own}
    return Case(name, {**small(name).options, **exact, **options})


# Every optimizer with its own formats, in a model of float64: there sums in another order are those of one process to
# 1e-16. In float32 they are not, and what rounds, picks entries or divides by 1/√δ multiplies their last bit.
ALL = [Case(name, {**small(name).options, **({"T": 2} if "singd" in name else {})}) for name in list_optimizers()]
FIRST = of_name("efcp_mfac")
IN_FLOAT32 = [FIRST, *map(of_name, ("efcp_ggt", "mfac", "ggt", "sketchy_shampoo")), of_name("efcp_singd", T=2)]
VARIANTS = [
    of_name("efcp_mfac", system="layer", scaling="layer_rms"),
    of_name("efcp_mfac", value_dtype="int8", residual_dtype="int4", moment_dtype="bfloat16", block_size=16),
    of_name("efcp_mfac", selection="global"),
    of_name("efcp_mfac", **COMPRESSED),
    of_name("efcp_mfac_lowrank", system="layer"),
    of_name("mfac", system="layer"),
    of_name("ggt", beta1=0.9),
    of_name("singd", T=1, structures="block4diagonal+triltoeplitz", max_update_norm=0.5),
    of_name("singd", T=2, structures="hierarchical2_1+diagonal", kl_clip=1e-3, scaling="layer_rms"),
    of_name("efcp_singd", alpha1=0.5, kfac_like=False, warm_start=True),
]


def train(model, optimizer, steps, *, rank=0, n_ranks=1, change=lambda: None):
    """Steps on this rank's part of each batch; gradients are averaged by DDP, or here, and then changed."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(8, n, generator=generator)[rank::n_ranks].to(dtype) for n in (5, 3))
        (model(x) - y).square().mean().backward()
        if n_ranks > 1 and not isinstance(model, DistributedDataParallel):
            average_gradients(model)
        change()
        optimizer.step()


def average_gradients(model):
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.view(-1) for g in grads]) / dist.get_world_size()
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def single(case, steps, dtype=torch.float64):
    model = tiny_model(dtype)
    optimizer = case.build(model)
    train(model, optimizer, steps)
    return model, optimizer


def on_ranks(checkpoints):
    """What the tests below look at, in one launch: a launch costs more than all of it."""
    part = {"rank": dist.get_rank(), "n_ranks": dist.get_world_size()}
    results = {"names": [], "float32": [], "variants": [], "resumed": []}
    for case in ALL:
        model = tiny_model(torch.float64)
        optimizer = case.build(model)
        train(model, optimizer, range(STEPS), **part)
        results["names"].append((weights(model), optimizer.state_dict()["state"]))
    for case in IN_FLOAT32:
        model = tiny_model()
        optimizer = case.build(model)
        train(DistributedDataParallel(model) if case is FIRST else model, optimizer, range(STEPS), **part)
        results["float32"].append(weights(model))
    for case in VARIANTS:
        model, whole = tiny_model(), tiny_model()
        for m, shard_state in ((model, None), (whole, False)):
            optimizer = case.build(m, shard_state=shard_state)
            train(m, optimizer, range(6), **part)
        results["variants"].append((weights(model), weights(whole)))
    for case, checkpoint in zip(ALL, checkpoints, strict=True):
        model = tiny_model(torch.float64)
        model.load_state_dict(checkpoint["model"])
        optimizer = case.build(model, lr=0.5)
        optimizer.load_state_dict(checkpoint["optimizer"])
        train(model, optimizer, range(RESUMED, RESUMED + 4), **part)
        results["resumed"].append((weights(model), optimizer.state_dict()["state"]))
    results["skipped"] = nan_on_one_rank(**part)
    results["errors"] = errors(**part)
    results["bytes"] = sizes()
    results["alone"] = saved_by_one_rank(**part)
    return results


def nan_on_one_rank(rank, n_ranks):
    """For each optimizer weights before and after a burst of NaN on the last rank alone, later, and the count."""
    found = []
    for case in ALL:
        model = tiny_model(torch.float64)
        optimizer = case.build(model)
        part = {"rank": rank, "n_ranks": n_ranks}
        train(model, optimizer, range(3), **part)
        before = weights(model)
        for p in list(model.parameters())[:2]:
            if rank == n_ranks - 1:
                train(model, optimizer, [3], change=lambda p=p: p.grad.view(-1)[:1].fill_(torch.nan), **part)
            else:
                train(model, optimizer, [3], **part)
        after = weights(model)
        train(model, optimizer, [4], **part)
        found.append((before, after, weights(model), optimizer.skipped_steps))
    return found


def errors(rank, n_ranks):
    """The errors of ranks whose gradients, weights or parameters differ."""
    texts = []
    for what in ("gradients", "weights", "parameters"):
        model = tiny_model()
        if what == "weights":
            nn.init.constant_(model.norm.weight, rank)
        params = list(model.parameters())[: None if what != "parameters" or rank else -1]
        optimizer = FIRST.build_plain(params)
        for p in params:
            p.grad = torch.ones_like(p)
        if what == "gradients":
            model.norm.bias.grad += rank
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
        texts.append(str(raised.value))
    return texts


def four_layers():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(96, 96) for _ in range(4)])


def options_of(name):
    return {"window": 8} if "window" in get_spec(name).options() else {}


def sizes():
    """Bytes of this rank's state after a step, and their share of one process's, for 4 equal layers."""
    counts = {}
    for name in list_optimizers():
        found = []
        for shard_state in (None, False):
            model = four_layers()
            optimizer = Case(name, options_of(name)).build_plain(model, shard_state=shard_state)
            model(torch.ones(2, 96)).square().sum().backward()
            optimizer.step()
            found.append(optimizer.state_bytes())
        counts[name] = found[0], found[0] / found[1]
    return counts


def saved_by_one_rank(rank, n_ranks):
    """Rank 0's `state_dict` inside `whole_state`, without the others."""
    model = tiny_model()
    optimizer = FIRST.build(model)
    train(model, optimizer, range(3), rank=rank, n_ranks=n_ranks)
    with optimizer.whole_state(keeps=rank == 0):
        alone = optimizer.state_dict()["state"] if rank == 0 else {}
    return alone, optimizer.state_dict()["state"]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(request, tmp_path_factory):
    checkpoints = []
    for case in ALL:
        model, optimizer = single(case, range(RESUMED))
        checkpoints.append({"model": copy.deepcopy(model.state_dict()), "optimizer": saved(optimizer)})
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(on_ranks, request.param, folder, checkpoints, timeout=600)


@pytest.mark.parametrize("number", range(len(ALL)), ids=map(str, ALL))
def test_as_one_process_after_50_steps(results, number):
    """To 1e-6; sums over the batch and over the blocks have another order, nothing else differs."""
    model, optimizer = single(ALL[number], range(STEPS))
    ours, state = results[0]["names"][number]
    torch.testing.assert_close(ours, weights(model), rtol=0, atol=1e-6)
    expected = optimizer.state_dict()["state"]
    assert {i: {n: (t.shape, t.dtype) for n, t in s.items()} for i, s in state.items()} == {
        i: {n: (t.shape, t.dtype) for n, t in s.items()} for i, s in expected.items()
    }


@pytest.mark.parametrize("number", range(len(IN_FLOAT32)), ids=map(str, IN_FLOAT32))
def test_as_one_process_after_50_steps_in_float32(results, number):
    """SINGD's factors and S-Shampoo's evened steps grow what such sums differ by: 1.01e-6 and 2.5e-5 were seen."""
    case = IN_FLOAT32[number]
    model, _ = single(case, range(STEPS), torch.float32)
    atol = {"singd": 2e-6, "efcp_singd": 2e-6, "sketchy_shampoo": 1e-4}.get(case.name, 1e-6)
    torch.testing.assert_close(results[0]["float32"][number], weights(model), rtol=0, atol=atol)


def test_every_rank_has_the_same_weights_bit_for_bit(results):
    for other in results[1:]:
        for what in ("names", "float32", "variants", "resumed", "skipped"):
            assert_same(other[what], results[0][what], what)


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=map(str, VARIANTS))
def test_divided_as_whole(results, number):
    ours, whole = results[0]["variants"][number]
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", range(len(ALL)), ids=map(str, ALL))
def test_checkpoint_of_one_process_resumes_on_several_and_back(results, number):
    case = ALL[number]
    model, optimizer = single(case, range(RESUMED + 4))
    ours, state = results[0]["resumed"][number]
    torch.testing.assert_close(ours, weights(model), rtol=0, atol=1e-6)
    groups = optimizer.state_dict()["param_groups"]
    resumed = tiny_model(torch.float64)
    for p, w in zip(resumed.parameters(), ours, strict=True):
        p.data.copy_(w)
    back = case.build(resumed)
    back.load_state_dict({"state": state, "param_groups": groups})
    assert_same(back.state_dict()["state"], state)
    train(model, optimizer, range(12, 16))
    train(resumed, back, range(12, 16))
    torch.testing.assert_close(weights(resumed), weights(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", range(len(ALL)), ids=map(str, ALL))
def test_nan_bursts_of_one_rank_are_skipped_on_all(results, number):
    """In a parameter that this rank owns, and in one of another."""
    for rank in results:
        before, after, later, skipped = rank["skipped"][number]
        assert_same(after, before)
        assert skipped == 2
        assert not torch.equal(later[0], after[0])


def test_ranks_that_differ_are_told_which_parameter_and_what_to_do(results):
    for rank in results:
        gradients, unequal, counts = rank["errors"]
        assert "the gradients of parameter 4 of shape (7,)" in gradients
        assert "the weights of parameter 3 of shape (7,)" in unequal
        assert "the number of their parameters" in counts
        for text in rank["errors"]:
            assert "DistributedDataParallel" in text
            assert "shard_state=False" in text
            assert "DeepSpeed ZeRO" in text


def test_a_rank_keeps_its_share_of_the_bytes(results):
    share = {2: 0.55, 4: 0.3}[len(results)]
    for rank in results:
        for name, (_, part) in rank["bytes"].items():
            assert part <= share, name


def test_bytes_of_a_rank_are_counted_before_there_are_ranks(results):
    """`hf-efcp memory --world_size N`, to the byte."""
    for name, (size, _) in results[0]["bytes"].items():
        model = four_layers().to("meta")
        assert footprint(model, name, options_of(name), world_size=len(results)).state == size, name


def test_one_rank_may_save_alone_after_all_gathered(results):
    alone, whole = results[0]["alone"]
    assert_same(alone, whole)
