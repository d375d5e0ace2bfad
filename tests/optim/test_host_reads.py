"""No step makes the host wait for a device.

On the meta device a tensor has no value, so every read of one fails: `item`, `if tensor`, plain indexing with a
tensor, copies to the CPU. What waits without reading is caught by name: eigendecompositions and checked
factorizations, and copies of CPU tensors to the device. Masks do the work, as on CUDA. The same steps run on a CUDA
device, where there is one, with torch's own check.
"""

import pytest
import torch
from contract import CASES, Case, each_name, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efcp.optim.base import EfcpOptimizer
from hf_efcp.optim.registry import get_spec
from hf_efcp.optim.singd_layers import SingdLayers

WAITING = {"_linalg_eigh", "_linalg_svd", "_linalg_check_errors", "nonzero", "masked_select", "equal", "unique"}
# Steps at which factors or sketches are updated wait once; the cases below take none of them.
SELDOM = {"update_freq": 1000, "basis_every": 1000, "T": 1000, "warm_steps": 0}


class NoWait(TorchDispatchMode):
    """Fail at operations that make the host wait for a CUDA device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITING, f"{name} makes the host wait"
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            assert source.device == result.device, f"{name} from {source.device} to {result.device}"
        return result


def without_update(case: Case) -> Case:
    """Such that only the first step is one at which the host waits."""
    options = {name: value for name, value in SELDOM.items() if name in get_spec(case.name).options()}
    return Case(case.name, {**case.options, **options})


def after_first_step(optimizer):
    """Tell the counts that the host keeps that a step was taken; there is no first step without values."""
    optimizer.materialize_state()
    for state in optimizer.state.values():
        for name in ("step", "steps", "refreshes", "basis_age"):
            if name in state and not state[name].is_meta:
                state[name] += 1


@pytest.fixture
def counts_on_the_cpu(monkeypatch):
    monkeypatch.setattr(EfcpOptimizer, "_counting_device", staticmethod(lambda device: torch.device("cpu")))
    monkeypatch.setattr(SingdLayers, "_check_forward", lambda self, device_type: None)  # autocast knows no meta


def backward(model, device):
    x, y = torch.randn(6, 5, device=device), torch.randn(6, 3, device=device)
    (model(x) - y).square().mean().backward()


def applies(case):
    # S-AdaGrad takes an eigendecomposition in each step, on the CPU.
    return case.name != "sketchy_adagrad"


@pytest.mark.usefixtures("counts_on_the_cpu")
@pytest.mark.parametrize("case", [case for case in CASES if applies(case.values[0])])
def test_a_step_reads_nothing_of_the_device(case):
    model = tiny_model().to("meta")
    optimizer = without_update(case).build(model)
    after_first_step(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, "meta")
        with NoWait():
            optimizer.step()


def test_the_check_finds_what_waits():
    x = torch.ones(3, 3, device="meta")
    for waits in (lambda: x[0, 0].item(), lambda: bool(x[0, 0]), lambda: x.cpu(), lambda: x[x > 0], x.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), NoWait():
            waits()
    for waits in (lambda: torch.linalg.eigh(x), lambda: torch.linalg.solve(x, x), lambda: torch.ones(3).to("meta")):
        with pytest.raises(AssertionError), NoWait():
            waits()


@each_name
def test_a_captured_step_is_refused_by_name(case, monkeypatch):
    model = tiny_model()
    optimizer = case.build(model)
    backward(model, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(NotImplementedError, match=f"{type(optimizer).__name__}.step.* cannot be captured"):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if applies(case.values[0])])
def test_a_step_makes_no_host_wait_for_a_cuda_device(case):
    model = tiny_model().to("cuda")
    optimizer = without_update(case).build(model)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, "cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
