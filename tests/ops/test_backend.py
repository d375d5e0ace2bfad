"""Which backend serves the window operations."""

import inspect
import logging
import subprocess
import sys

import pytest
import torch

from hf_efcp import ops
from hf_efcp.ops import backend, torch_moments, torch_ops


@pytest.fixture
def chosen(monkeypatch):
    """`chosen(value)`: the module for a tensor on the CPU with `HF_EFCP_BACKEND` set so, chosen afresh."""

    def choose(value, tensor=None):
        if value is None:
            monkeypatch.delenv(backend.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(backend.VARIABLE, value)
        clear()
        return backend.backend_of(torch.zeros(1) if tensor is None else tensor)

    def clear():
        backend.cpu_backend.cache_clear()
        backend.cuda_backend.cache_clear()

    yield choose
    clear()


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("numba_ops", "numba_step", "numba_calls", "numba_kernels", "numba_compiler"):
        monkeypatch.delitem(sys.modules, f"hf_efcp.ops.{name}", raising=False)
        monkeypatch.delattr(ops, name, raising=False)


def test_numba_is_chosen_where_it_is_installed(chosen):
    pytest.importorskip("numba", reason="needs hf-efcp[cpu]")
    assert chosen(None).__name__ == "hf_efcp.ops.numba_ops"
    assert chosen("numba").__name__ == "hf_efcp.ops.numba_ops"


def test_torch_is_chosen_on_request(chosen):
    assert chosen("torch") is torch_ops


@pytest.mark.usefixtures("no_numba")
def test_torch_is_chosen_where_numba_is_missing(chosen, caplog):
    with caplog.at_level(logging.INFO):
        assert chosen(None) is torch_ops
    assert not caplog.records


@pytest.mark.usefixtures("no_numba")
def test_numba_on_request_fails_with_the_pip_line_where_it_is_missing(chosen):
    with pytest.raises(ImportError, match=r"pip install hf-efcp\[cpu\]"):
        chosen("numba")


def test_a_broken_numba_is_reported_once(chosen, caplog, monkeypatch):
    """As when numba refuses the installed numpy."""
    monkeypatch.delattr(ops, "numba_ops", raising=False)
    monkeypatch.setitem(sys.modules, "hf_efcp.ops.numba_ops", None)
    with caplog.at_level(logging.INFO):
        assert chosen(None) is torch_ops
        assert backend.backend_of(torch.zeros(1)) is torch_ops
    assert ["numba cannot be used" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("value", ["cuda", "Numba", " "])
def test_an_unknown_backend_is_refused_by_name(chosen, value):
    with pytest.raises(
        ValueError, match=rf"`HF_EFCP_BACKEND` must be one of 'torch', 'numba', 'triton', got '{value}'"
    ):
        chosen(value)


def test_other_devices_and_tensor_subclasses_go_to_torch(chosen):
    """A subclass may stand for a tensor without memory, as in `torch._subclasses.FakeTensor`."""
    assert chosen(None, torch.zeros(1, device="meta")) is torch_ops
    assert chosen(None, torch.nn.Parameter(torch.zeros(1))) is torch_ops


def test_triton_serves_the_cpu_in_its_interpreter_alone(chosen, monkeypatch):
    triton_ops = pytest.importorskip("hf_efcp.ops.triton_ops", reason="needs triton")
    monkeypatch.setattr(triton_ops, "INTERPRETED", True)
    assert chosen("triton") is triton_ops
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"needs tensors on a CUDA device.*TRITON_INTERPRET=1"):
        chosen("triton")


@pytest.mark.parametrize("wanted", [None, "triton", "numba"])
def test_triton_serves_cuda_devices(chosen, wanted):
    """`numba` is a choice for the CPU."""
    triton_ops = pytest.importorskip("hf_efcp.ops.triton_ops", reason="needs triton")
    chosen("torch")
    assert backend.cuda_backend() is torch_ops
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backend.VARIABLE, wanted) if wanted else patch.delenv(backend.VARIABLE)
        backend.cuda_backend.cache_clear()
        assert backend.cuda_backend() is triton_ops


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("triton_ops", "triton_kernels", "triton_topk"):
        monkeypatch.delitem(sys.modules, f"hf_efcp.ops.{name}", raising=False)
        monkeypatch.delattr(ops, name, raising=False)


@pytest.mark.usefixtures("no_triton")
def test_cuda_devices_fall_back_to_torch_where_triton_is_missing_and_say_so(chosen, caplog, monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend.cuda_backend.cache_clear()
    assert backend.cuda_backend() is torch_ops
    assert "Triton cannot be used" in caplog.text
    with pytest.raises(ImportError, match="pip install triton"):
        chosen("triton")


def test_the_choice_is_logged_once(chosen, caplog):
    with caplog.at_level(logging.DEBUG, logger=backend.__name__):
        chosen("torch")
        backend.backend_of(torch.zeros(1))
    assert caplog.messages == ["Window operations on the CPU run on torch."]


def test_an_operation_goes_to_the_chosen_backend(chosen, monkeypatch):
    chosen("torch")
    monkeypatch.setattr(torch_ops, "window_dots", lambda *args: args)
    window = (torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1))
    assert ops.window_dots(*window) == window


@pytest.mark.parametrize("name", ["numba", "triton"])
def test_backends_take_the_arguments_of_the_definition(name):
    module = pytest.importorskip(f"hf_efcp.ops.{name}_ops", reason=f"needs {name}")
    names = ("accumulate_topk_", "adam_", "push_topk_", "row_dots", "window_combine_", "window_dots")
    for function in names:
        definition = getattr(torch_moments if function == "adam_" else torch_ops, function)
        assert inspect.signature(getattr(module, function)) == inspect.signature(definition), function


def test_importing_the_package_does_not_import_numba():
    code = "import sys, hf_efcp.optim; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
