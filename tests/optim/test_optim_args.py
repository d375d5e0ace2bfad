"""The text of `--optim_args`: pairs, the JSON of the published cards, and errors that say what is wrong."""

import pytest

from hf_efcp.optim import get_spec
from hf_efcp.optim.optim_args import format_optim_args, parse_optim_args


def test_pairs():
    assert parse_optim_args("window=4, density = 0.01") == {"window": "4", "density": "0.01"}


@pytest.mark.parametrize("text", [None, "", "  "])
def test_nothing(text):
    assert parse_optim_args(text) == {}


def test_json_values_are_words():
    text = '{"lr": 1e-4, "num_grads": 512, "nesterov": true, "cap": null, "scaling": "rms"}'
    expected = {"lr": "0.0001", "num_grads": "512", "nesterov": "true", "cap": "null", "scaling": "rms"}
    assert parse_optim_args(text) == expected


def test_a_dict_survives_as_text():
    options = {"window": 3, "damping": 1e-7, "scaling": "none", "preset": "paper"}
    spec = get_spec("efcp_mfac")
    assert spec.resolve(parse_optim_args(format_optim_args(options))) == spec.resolve(options)


def test_a_dict_and_its_print_are_understood():
    options = {"window": 3, "damping": 1e-7, "shard_state": False, "scaling": "none"}
    words = {"window": "3", "damping": "1e-07", "shard_state": "false", "scaling": "none"}
    assert parse_optim_args(options) == parse_optim_args(str(options)) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("window=4,", "surplus comma"),
        ("window=4,,density=1", "surplus comma"),
        ("window", "`window`"),
        ("=4", "`=4`"),
        ("window=", "`window=`"),
        ("a=b=c", "more than one '='"),
        ("window=4,window=8", "`window` twice"),
        ('{"window": 4, "window": 8}', "`window` twice"),
        ('{"window": 4', "starts like JSON"),
        ("{'window', 4}", "starts like JSON"),
        ("{'window': [4]}", "starts like JSON"),
        ("{" * 10000, "starts like JSON"),
        ('{"window": [4]}', "flat"),
        ('{"window": {"a": 4}}', "flat"),
    ],
)
def test_errors_name_the_fault(text, message):
    with pytest.raises(ValueError, match=message):
        parse_optim_args(text)
