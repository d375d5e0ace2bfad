"""FSDP2: optimizers over DTensor parameters step as one process does, and their state is saved and cut anew."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract import Case, assert_same, small
from ranks import run_ranks
from test_replicated import of_name
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_efcp import create_optimizer

CASES = [
    of_name("efcp_mfac"),
    of_name("efcp_ggt"),
    of_name("mfac"),
    of_name("ggt"),
    of_name("efcp_mfac", system="layer", scaling="layer_rms"),
    of_name("efcp_mfac", value_dtype="int8", residual_dtype="int4", moment_dtype="bfloat16", block_size=16),
    Case("efcp_mfac", small("efcp_mfac").options),
]
# State of few bits: where a sum differs in its last bit, an entry may round or wait another way.
ROUNDED = CASES[5:]
STEPS = 8
PLACED = Shard(0), Shard(1)


def model():
    """Uneven on 2 ranks: 17 and 16 rows, 3 and 2; a vector of one entry."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 5), nn.Tanh(), nn.Linear(5, 1))


def sharded():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    network = model()
    for layer in network:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def train(network, optimizer, steps, *, rank=0, n_ranks=1):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(8, n, generator=generator)[rank::n_ranks] for n in (5, 1))
        (network(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def whole(network):
    return [full_tensor(p.detach()) for p in network.parameters()]


def full_tensor(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def run(folder, earlier=None):
    """For each case: weights after training, saved in `folder`; after loading from `earlier`, too, in both forms."""
    part = {"rank": dist.get_rank(), "n_ranks": dist.get_world_size()}
    results = []
    for number, case in enumerate(CASES):
        network, optimizer = built(case)
        train(network, optimizer, range(STEPS), **part)
        save(network, optimizer, f"{folder}/{number}")
        results.append({"trained": whole(network), "bytes": optimizer.state_bytes()})
        for form in ("full", "sharded") if earlier else ():
            network, optimizer = built(case)
            load(network, optimizer, f"{earlier}/{number}", form)
            state = optimizer.state_dict()["state"]
            results[-1][f"{form} state"] = {i: {n: full_tensor(t) for n, t in s.items()} for i, s in state.items()}
            train(network, optimizer, range(STEPS, STEPS + 3), **part)
            results[-1][form] = whole(network)
    return results


def built(case):
    network = sharded()
    optimizer = case.build_plain(network.parameters())
    return network, optimizer


def save(network, optimizer, path):
    """As accelerate does for FULL_STATE_DICT and for SHARDED_STATE_DICT."""
    model_state, state = get_state_dict(network, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=path)
    full = get_state_dict(network, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(full, f"{path}/full.pt")


def load(network, optimizer, path, form):
    if form == "full":
        model_state, state = torch.load(f"{path}/full.pt", weights_only=True)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    else:
        model_state, state = get_state_dict(network, optimizer)
        dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=path)
        options = None
    set_state_dict(network, optimizer, model_state_dict=model_state, optim_state_dict=state, options=options)
    assert isinstance(next(network.parameters()), DTensor)
    assert isinstance(optimizer.state[next(network.parameters())]["values"], DTensor)


def on_two_ranks(folder, earlier):
    return {"cases": run(folder, earlier), "errors": refusals()}


def refusals():
    """Errors at the first step, of what cannot be sharded."""
    texts = []
    for name in ("efcp_mfac_lowrank",):
        network, optimizer = built(of_name(name))
        with pytest.raises(NotImplementedError) as raised:
            train(network, optimizer, [0])
        texts.append(str(raised.value))
    network = sharded()
    optimizer = CASES[0].build_plain(network.parameters(), shard_state=False)
    with pytest.raises(ValueError, match="shard_state=False"):
        train(network, optimizer, [0])
    rows, columns = (distribute_tensor(torch.ones(8, 8), network[0].weight.device_mesh, [p]) for p in PLACED)
    optimizer = CASES[0].build_plain([nn.Parameter(rows), nn.Parameter(columns)])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(NotImplementedError) as raised:
        optimizer.step()
    texts.append(str(raised.value))
    optimizer = CASES[0].build_plain([nn.Parameter(rows), nn.Parameter(torch.ones(3))])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(NotImplementedError) as raised:
        optimizer.step()
    return [*texts, str(raised.value)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One rank, two that load its checkpoints, one that loads theirs."""
    folder = tmp_path_factory.mktemp("sharded")
    one = alone(folder / "meeting", run, str(folder / "one"))
    two = run_ranks(on_two_ranks, 2, folder / "ranks", str(folder / "two"), str(folder / "one"))
    back = alone(folder / "second meeting", run, str(folder / "back"), str(folder / "two"))
    return {"one": one, "two": [r["cases"] for r in two], "errors": [r["errors"] for r in two], "back": back}


def alone(meeting, function, *args):
    """A function in this process, as the one rank of a group."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


def unsharded(case, n_steps):
    network = model()
    optimizer = case.build_plain(network.parameters())
    train(network, optimizer, range(n_steps))
    return whole(network), optimizer


def tolerance(number):
    return 2e-2 if CASES[number] in ROUNDED else 1e-6


each = pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))


@each
def test_as_without_fsdp(results, number):
    """To the rounding of sums over the batch: blocks are those of the whole parameters on any number of ranks."""
    expected, optimizer = unsharded(CASES[number], STEPS)
    torch.testing.assert_close(results["one"][number]["trained"], expected, rtol=0, atol=tolerance(number))
    assert results["one"][number]["bytes"] == optimizer.state_bytes()
    for rank in results["two"]:
        torch.testing.assert_close(rank[number]["trained"], expected, rtol=0, atol=tolerance(number))


@each
def test_checkpoints_of_one_rank_resume_on_two_and_of_two_on_one(results, number):
    """The state arrives to the last bit, through a full and through a distributed checkpoint, and so do the steps."""
    expected, _ = unsharded(CASES[number], STEPS + 3)
    for case in (results["two"][0][number], results["two"][1][number], results["back"][number]):
        assert_same(case["full state"], case["sharded state"])
        assert_same(case["full"], case["sharded"])
        torch.testing.assert_close(case["full"], expected, rtol=0, atol=tolerance(number))
    assert_same(results["two"][1][number]["full state"], results["two"][0][number]["full state"])


@pytest.mark.parametrize("number", range(5))
def test_a_rank_keeps_a_part(results, number):
    """Layers are uneven here and blocks few; test_replicated measures the share of equal layers."""
    whole_size = results["one"][number]["bytes"]
    assert all(rank[number]["bytes"] < 0.62 * whole_size for rank in results["two"])


def test_what_cannot_be_sharded_is_refused_by_name(results):
    for lowrank, tensor_parallel, mixed in results["errors"]:
        assert "compression='lowrank'" in lowrank
        assert "efcp_mfac" in lowrank
        assert "parameter 1 of shape (8, 8)" in tensor_parallel
        assert "tensor parallelism" in tensor_parallel
        assert "FSDP2" in tensor_parallel
        assert "parameter 1 of shape (3,) is no DTensor" in mixed


def test_fsdp1_is_refused_by_name():
    parameter = nn.Parameter(torch.ones(4))
    parameter._fsdp_flattened = True  # as FSDP1 marks what it flattens
    optimizer = CASES[0].build_plain([parameter])
    parameter.grad = torch.ones(4)
    with pytest.raises(NotImplementedError, match=r"parameter 0 of shape \(4,\) is flattened by FSDP1.*fsdp_version 2"):
        optimizer.step()


@pytest.mark.parametrize("name", ["efcp_singd", "singd"])
def test_flat_partitions_are_refused_by_name(name):
    """DeepSpeed ZeRO puts one in the place of each group's parameters; no layer would be left."""
    optimizer = create_optimizer(name, model(), lr=0.01)
    flat = nn.Parameter(torch.ones(10))
    flat.grad = torch.ones(10)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(NotImplementedError, match=r"parameter 0 there has shape \(10,\). DeepSpeed ZeRO.*use DDP"):
        optimizer.step()
