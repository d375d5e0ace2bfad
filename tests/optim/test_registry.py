"""Optimizers by name: defaults, presets, published flags, and what is refused."""

import inspect
import re

import pytest
import torch
from torch import nn

from hf_efcp.optim import MFAC, create_optimizer, get_spec, list_optimizers
from hf_efcp.optim.registry import register

NAMES = list_optimizers()
each_name = pytest.mark.parametrize("name", NAMES)


def model():
    return nn.Linear(3, 2)


def option_of(optimizer, name):
    return optimizer.param_groups[0][name]


def wrong_values(option):
    """Values just outside of an option's range, or of no choice."""
    if option.choices:
        yield option.choices[0] + "x"
    elif option.kind in (int, float):
        if option.low > -float("inf"):
            yield option.kind(option.low if option.low_open else option.low - 1)
        if option.high < float("inf"):
            yield option.kind(option.high if option.high_open else option.high + 1)


def edge_values(option):
    """The ends of an option's range, where they belong to it."""
    if option.kind in (int, float) and not option.choices:
        if option.low > -float("inf") and not option.low_open:
            yield option.kind(option.low)
        if option.high < float("inf") and not option.high_open:
            yield option.kind(option.high)


@each_name
def test_defaults_of_the_registry_are_those_built(name):
    optimizer = create_optimizer(name, model(), lr=0.1)
    for option, default in get_spec(name).options().values():
        found = option_of(optimizer, option.name)
        fits_model = option.name == "block_size" and default is None and name.startswith("efcp_")
        assert found == (256 if fits_model else default), option.name
        assert option.check(default) == default, f"the default of {option.name} is out of its range"


@each_name
def test_every_constructor_argument_has_its_option(name):
    """So that it is checked, explained and saved."""
    spec = get_spec(name)
    arguments = list(inspect.signature(spec.cls.__init__).parameters)[2:]
    if spec.needs_model:
        arguments.remove("params")
    assert sorted(arguments) == sorted(option.name for option in spec.cls.options)
    assert all(option.help for option in spec.cls.options)


@each_name
def test_value_outside_of_the_range_is_refused_for_every_option(name):
    for option, _ in get_spec(name).options().values():
        for value in wrong_values(option):
            with pytest.raises(ValueError, match=re.escape(f"`{option.name}` must be {option.allowed}, got")):
                create_optimizer(name, model(), lr=0.1, **{option.name: value})
        with pytest.raises(TypeError, match=f"`{option.name}` must be"):
            create_optimizer(name, model(), lr=0.1, **{option.name: object()})


@each_name
def test_constructor_refuses_what_the_registry_refuses(name):
    spec = get_spec(name)
    if spec.needs_model:
        pytest.skip("built over a module")
    for option in spec.cls.options:
        for value in wrong_values(option):
            arguments = {"lr": 0.1, **spec.fixed, option.name: value}
            with pytest.raises(ValueError, match=f"`{option.name}` must be"):
                spec.cls(model().parameters(), **arguments)


@each_name
def test_ends_of_the_range_are_taken(name):
    spec = get_spec(name)
    for option, _ in spec.options().values():
        for value in edge_values(option):
            assert option.check(value) == value
            assert option.parse(str(value)) == value


@each_name
@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_learning_rate_is_checked(name, lr):
    with pytest.raises(ValueError, match="`lr` must be in"):
        create_optimizer(name, model(), lr=lr)
    with pytest.raises(ValueError, match="`weight_decay` must be in"):
        create_optimizer(name, model(), lr=0.1, weight_decay=lr)


@each_name
def test_misspelt_option_is_refused_with_the_closest(name):
    for option in get_spec(name).options():
        misspelt = option + "x"
        with pytest.raises(ValueError, match=rf"no option `{misspelt}`\. Did you mean `{option}`\?"):
            create_optimizer(name, model(), lr=0.1, **{misspelt: 1})


@each_name
def test_option_that_makes_the_name_cannot_be_set(name):
    for option, value in get_spec(name).fixed.items():
        with pytest.raises(ValueError, match=f"`{option}` is '{value}' in `{name}`"):
            create_optimizer(name, model(), lr=0.1, **{option: value})


@each_name
def test_rate_and_decay_are_no_options(name):
    """Given among the options they would be given twice; published M-FAC commands alone print them there."""
    spec = get_spec(name)
    for option in ("lr", "weight_decay"):
        if spec.takes_lr:
            assert spec.resolve({option: "1e-4"})[option] == 1e-4
        else:
            flag = "learning_rate" if option == "lr" else option
            with pytest.raises(ValueError, match=rf"`{option}` is given by its own argument.*--{flag}"):
                spec.resolve({option: "1e-4"})


@each_name
def test_presets_are_valid_and_the_users_own_options_win(name):
    spec = get_spec(name)
    for preset, values in spec.presets.items():
        optimizer = create_optimizer(name, model(), lr=0.1, preset=preset)
        for option, value in values.items():
            assert option_of(optimizer, option) == value
        assert set(values) <= set(spec.options())
        for option in values:
            resolved = spec.resolve({"preset": preset, option: spec.options()[option][1]})
            assert resolved[option] == spec.options()[option][1]
    assert spec.resolve({"preset": "default"}) == spec.resolve({})
    with pytest.raises(ValueError, match=r"`preset` of .* must be one of default"):
        spec.resolve({"preset": "papr"})


@each_name
def test_words_of_a_command_line_are_the_values(name):
    spec = get_spec(name)
    values = {option: default for option, (_, default) in spec.options().items() if default is not None}
    assert spec.resolve({option: str(value) for option, value in values.items()}) == spec.resolve(values)


@each_name
def test_frozen_parameters_of_a_module_are_left_out(name):
    frozen = model()
    frozen.bias.requires_grad_(False)
    optimizer = create_optimizer(name, frozen, lr=0.1)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [p is frozen.weight for p in held] == [True]


@each_name
def test_named_parameters_are_taken(name):
    if get_spec(name).needs_model:
        pytest.skip("built over a module")
    optimizer = create_optimizer(name, list(model().named_parameters()), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_name_that_is_not_registered_is_refused_with_the_closest():
    with pytest.raises(ValueError, match=r"No optimizer `efcp_mfca`\. Did you mean `efcp_mfac`\?"):
        get_spec("efcp_mfca")
    with pytest.raises(ValueError, match="registered already"):
        register(get_spec("mfac"))


def test_published_flags_of_the_m_fac_cards_are_the_dense_window():
    """`--optim MFAC --optim_args '{"lr": 1e-4, "num_grads": 512, "damp": 1e-6}'`"""
    resolved = get_spec("MFAC").resolve({"lr": "1e-4", "num_grads": "512", "damp": "1e-6"})
    assert resolved["lr"] == 1e-4
    optimizer = MFAC(model().parameters(), **resolved)
    published = {
        "window": 512, "damping": 1e-6, "damping_mode": "absolute", "compression": "none", "scaling": "none",
        "momentum": 0.0,
    }  # fmt: skip
    assert {name: option_of(optimizer, name) for name in published} == published
    assert option_of(optimizer, "lr") == 1e-4


def test_option_under_both_of_its_names_is_refused():
    with pytest.raises(ValueError, match="`num_grads` is `window` in `MFAC`, and both are given"):
        get_spec("MFAC").resolve({"num_grads": "512", "window": "256"})


def test_combinations_that_cannot_work_are_refused():
    params = list(model().parameters())
    with pytest.raises(ValueError, match="selection='global'"):
        MFAC(params, lr=0.1, compression="none", selection="global")
    with pytest.raises(TypeError, match="windw"):
        MFAC(params, lr=0.1, windw=3)


def test_module_and_its_parameters_give_the_same_optimizer():
    ends = []
    for over in (lambda m: m, lambda m: m.parameters(), lambda m: [{"params": list(m.parameters())}]):
        torch.manual_seed(0)
        net = model()
        optimizer = create_optimizer("efcp_mfac", over(net), lr=0.1, window=4)
        for _ in range(3):
            net(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        ends.append(net.weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
