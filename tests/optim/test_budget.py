"""`memory_budget` picks the largest window that fits, and what it counts is what a real optimizer holds."""

import logging

import pytest
import torch

from hf_efcp.optim import GGT, MFAC, create_optimizer
from hf_efcp.optim.budget import count_bytes, parse_bytes

SHAPES = [(300, 200), (200,), (40, 30, 3, 3), (1,)]
FORMATS = [
    {"window": 8},
    {"window": 300, "damping_mode": "absolute"},  # keeps an inverse besides
    {"window": 8, "value_dtype": "int8", "residual_dtype": "int4", "block_size": 256, "moment_dtype": "bfloat16"},
    {"window": 8, "compression": "lowrank", "rank": 2, "system": "layer"},
    {"window": 8, "compression": "none", "scaling": "none", "value_dtype": "bfloat16"},
    {"window": 8, "selection": "global", "scaling": "rms"},
]


def parameters(device: str = "cpu") -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in SHAPES]


@pytest.mark.parametrize("cls", [MFAC, GGT])
@pytest.mark.parametrize("options", FORMATS, ids=lambda o: "-".join(map(str, o.values())))
def test_bytes_on_the_meta_device_are_those_of_a_real_optimizer(cls, options):
    if cls is GGT:
        options = {name: value for name, value in options.items() if name != "damping_mode"}
    params = parameters()
    optimizer = cls(params, lr=1e-3, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    counted = count_bytes(cls, parameters("meta"), {"lr": 1e-3, **options})
    assert counted == optimizer.state_bytes() > 0


def test_bytes_at_twenty_million_parameters():
    """The published code holds 131 bytes per parameter at window 1024 and density 1 %, AdamW 8."""
    params = [torch.nn.Parameter(torch.empty(2000, 2500, device="meta")) for _ in range(4)]
    plain = {"lr": 1e-3, "density": 0.01, "damping": 1e-4, "damping_mode": "absolute", "block_size": 4096}
    plain |= {"precondition": "compressed", "scaling": "none", "momentum": 0.0}
    small = {"value_dtype": "int8", "residual_dtype": "int4", "block_size": 256}
    for most, options in (
        (70, {"window": 1024}),
        (48, {"window": 1024, "value_dtype": "bfloat16"}),
        (27, {"window": 1024, **small}),
        (8, {"window": 256, **small}),
    ):
        assert count_bytes(MFAC, params, {**plain, **options}) / 20e6 <= most, options


@pytest.mark.parametrize("scaling", ["none", "adam"])
@pytest.mark.parametrize("budget", ["adamw", "2MB", "12MiB"])
def test_what_is_picked_fits_and_uses_the_budget(budget, scaling, caplog):
    params = [torch.nn.Parameter(torch.empty(500, 512, device="meta"))]
    with caplog.at_level(logging.WARNING):
        optimizer = MFAC(params, lr=1e-3, memory_budget=budget, scaling=scaling)
    optimizer.materialize_state()
    allowed = parse_bytes(budget, params)
    assert 0.4 * allowed < optimizer.state_bytes() <= allowed
    assert f"window={optimizer.defaults['window']}" in caplog.text
    assert optimizer.defaults["window"] >= 32


def test_a_budget_too_small_says_what_the_smallest_window_takes():
    with pytest.raises(ValueError, match=r"`memory_budget` 1KB is 1,000 bytes; the smallest window, of 8 rows, takes"):
        create_optimizer("efcp_mfac", parameters(), lr=1e-3, memory_budget="1KB")


@pytest.mark.parametrize("text", ["8 apples", "", ".", "-1", "1.2.3GB"])
def test_an_unreadable_budget_is_refused_by_name(text):
    with pytest.raises(ValueError, match="`memory_budget` must be bytes"):
        MFAC(parameters(), lr=1e-3, memory_budget=text)


def test_bytes_are_read_in_decimal_and_binary_units():
    params = parameters()
    assert parse_bytes(1000, params) == parse_bytes("1kB", params) == 1000
    assert parse_bytes("1.5 GiB", params) == 3 * 2**29
    assert parse_bytes("adamw", params) == 8 * sum(p.numel() for p in params)


def test_dense_rows_have_no_budget():
    with pytest.raises(ValueError, match="block-wise top-k rows"):
        MFAC(parameters(), lr=1e-3, memory_budget="1GB", compression="none")
