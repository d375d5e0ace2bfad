"""Options: words and values in, checked values or an error that names the option, its range and the closest match."""

import re

import numpy as np
import pytest
import torch

from hf_efcp.optim.options import Option, check_options, closest, refuse_unknown

COUNT = Option("window", int, "rows", low=1, high=65536)
SHARE = Option("density", float, "share", low=0, low_open=True, high=1)
FACTOR = Option("momentum", float, "factor", low=0, high=1, high_open=True)
POSITIVE = Option("damping", float, "λ", low=0, low_open=True)
CHOICE = Option("scaling", str, "length", choices=("none", "rms", "layer_rms"))
DTYPE = Option("value_dtype", str, "storage", choices=("float32", "bfloat16"))
FLAG = Option("exact", bool, "whether")
MAYBE = Option("clip", float, "bound", low=0, optional=True)


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        (COUNT, "512", 512),
        (COUNT, " 512 ", 512),
        (COUNT, "1e3", 1000),
        (COUNT, "1_000", 1000),
        (COUNT, "64.0", 64),
        (SHARE, "1e-2", 0.01),
        (SHARE, ".5", 0.5),
        (SHARE, "1", 1.0),
        (FACTOR, "0", 0.0),
        (POSITIVE, "1e-30", 1e-30),
        (CHOICE, "rms", "rms"),
        (CHOICE, "none", "none"),
        (CHOICE, "'rms'", "rms"),
        (DTYPE, "bfloat16", "bfloat16"),
        (FLAG, "true", True),
        (FLAG, "False", False),
        (MAYBE, "none", None),
        (MAYBE, "null", None),
        (MAYBE, "0.5", 0.5),
    ],
)
def test_words_become_values(option, text, value):
    parsed = option.parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("option", "value", "checked"),
    [
        (COUNT, 512.0, 512),
        (COUNT, np.int64(3), 3),
        (SHARE, 1, 1.0),
        (SHARE, np.float32(0.5), 0.5),
        (DTYPE, torch.bfloat16, "bfloat16"),
        (MAYBE, None, None),
        (FLAG, True, True),
    ],
)
def test_values_get_the_type_of_their_option(option, value, checked):
    ours = option.check(value)
    assert ours == checked
    assert type(ours) is type(checked)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (COUNT, 0, "`window` must be in [1, 65536], got 0."),
        (COUNT, 65537, "`window` must be in [1, 65536], got 65537."),
        (SHARE, 0.0, "`density` must be in (0, 1], got 0.0."),
        (SHARE, 3.0, "`density` must be in (0, 1], got 3.0."),
        (SHARE, -0.5, "`density` must be in (0, 1], got -0.5."),
        (FACTOR, 1.0, "`momentum` must be in [0, 1), got 1.0."),
        (POSITIVE, 0, "`damping` must be in (0, inf), got 0.0."),
        (POSITIVE, float("inf"), "`damping` must be in (0, inf), got inf."),
        (POSITIVE, float("nan"), "`damping` must be in (0, inf), got nan."),
        (CHOICE, "layer", "`scaling` must be one of none, rms, layer_rms, got 'layer'. Did you mean `layer_rms`?"),
        (DTYPE, torch.float64, "`value_dtype` must be one of float32, bfloat16, got 'float64'."),
    ],
)  # fmt: skip
def test_value_out_of_range_is_refused_with_the_range(option, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        option.check(value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (COUNT, 1.5), (COUNT, True), (COUNT, None), (COUNT, [1]), (COUNT, float("nan")), (COUNT, "many"),
        (SHARE, True), (SHARE, "x"), (SHARE, None), (SHARE, torch.tensor(0.5)),
        (CHOICE, 1), (CHOICE, None), (FLAG, 1), (FLAG, "yes"), (FLAG, None), (MAYBE, "x"),
    ],
)  # fmt: skip
def test_value_of_another_kind_is_refused_by_name(option, value):
    with pytest.raises(TypeError, match=f"`{option.name}` must be"):
        option.check(value)


@pytest.mark.parametrize("text", ["", "yes", "0.5x", "None", "[1]", "1,2", "__import__('os')"])
def test_word_that_is_no_number_is_refused(text):
    with pytest.raises(TypeError, match="`density` must be"):
        SHARE.parse(text)


def test_false_is_not_true():
    """`bool("False")` is."""
    assert FLAG.parse("False") is False
    with pytest.raises(TypeError, match="true or false"):
        FLAG.parse("0")


def test_closest_match_is_near_or_absent():
    assert closest("windw", ["window", "density"]) == " Did you mean `window`?"
    assert closest("zzz", ["window", "density"]) == ""


def test_unknown_option_is_refused_with_the_closest_and_all():
    with pytest.raises(
        ValueError, match=r"`mfac` has no option `windw`\. Did you mean `window`\?.*: density, window\."
    ):
        refuse_unknown("`mfac`", ["density", "windw"], ["window", "density"])
    refuse_unknown("`mfac`", ["density"], ["window", "density"])


def test_every_option_is_checked():
    assert check_options([COUNT, SHARE], {"window": 4.0, "density": 1}) == {"window": 4, "density": 1.0}
    with pytest.raises(ValueError, match="`density`"):
        check_options([COUNT, SHARE], {"window": 4, "density": 2})
