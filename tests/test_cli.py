"""`hf-efcp`: what it prints is what the registry holds, and a wrong line is refused by name."""

import re
import subprocess
import sys

import pytest

from hf_efcp.cli import _parser, explain_text, list_text, main
from hf_efcp.optim.registry import get_spec, list_optimizers

NAMES = list_optimizers()


def test_list_names_every_optimizer_with_its_paper():
    text = " ".join(list_text().split())
    for name in NAMES:
        spec = get_spec(name)
        assert f"{name} {' '.join(spec.summary.split())} {' '.join(spec.paper.split())}" in text


@pytest.mark.parametrize("name", NAMES)
def test_explain_has_each_option_with_type_default_range_meaning_and_source(name):
    text = explain_text(name)
    for option, default in get_spec(name).options().values():
        line, meaning = re.search(rf"^{option.name} +(.*)\n((?:    .*\n)+)", text, re.MULTILINE).groups()
        cells = re.split(r"  +", line.strip())
        assert cells[0] == option.kind.__name__ + (" or none" if option.optional else "")
        assert option.parse(cells[1]) == default
        assert cells[2] in option.allowed
        assert " ".join(meaning.split()) == option.help + (f" [{option.source}]" if option.source else "")


@pytest.mark.parametrize("name", NAMES)
def test_explain_prints_flags_that_the_registry_takes(name):
    """The example of the last lines resolves to the values that it prints."""
    spec = get_spec(name)
    words = dict(pair.split("=") for pair in re.search(r"--optim_args (\S+)", explain_text(name))[1].split(","))
    resolved = spec.resolve(words)
    assert all(resolved[option] == spec.options()[option][1] for option in words)


@pytest.mark.parametrize("name", [name for name in NAMES if get_spec(name).presets])
def test_explain_prints_presets_whole(name):
    spec = get_spec(name)
    for preset, values in spec.presets.items():
        printed = re.search(rf"^preset={preset}: ((?:.|\n    )*)", explain_text(name), re.MULTILINE)[1]
        words = dict(pair.split("=") for pair in " ".join(printed.split()).split(", "))
        settable = {option: value for option, value in values.items() if option not in spec.fixed}
        assert words.keys() == settable.keys()
        assert all(spec.options()[option][0].parse(word) == settable[option] for option, word in words.items())


def test_explain_tells_names_of_published_flags():
    assert "num_grads = window" in explain_text("MFAC")


def test_unknown_name_exits_2_with_the_closest_match(capsys):
    assert main(["explain", "efcp_mfca"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "`efcp_mfca`" in captured.err
    assert "Did you mean `efcp_mfac`?" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("argv", [[], ["explain"], ["lst"]])
def test_incomplete_command_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: hf-efcp" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_efcp.cli", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 0
    process.stderr.close()


def test_list_and_explain_need_torch_alone():
    """No Hugging Face library is imported on the way."""
    program = (
        "import sys; from hf_efcp.cli import main; main(['list']); main(['explain', 'efcp_mfac']);"
        "heavy = {'transformers', 'accelerate', 'datasets', 'huggingface_hub', 'triton', 'numba'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "efcp_mfac" in done.stdout


@pytest.mark.parametrize("command", ["explain", "memory", "plot", "compare"])
def test_help_explains_every_argument(command, capsys):
    """With its default where it has one."""
    (commands,) = [action for action in _parser()._actions if action.dest == "command"]
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for action in commands.choices[command]._actions:
        assert action.help
        assert " ".join(str(action.help).split()) in text
        assert (action.option_strings or [action.metavar])[0] in text
    if command in ("memory", "compare"):
        assert "(default: " in text


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("list", "explain", "memory", "plot", "compare", "run"):
        assert re.search(rf"^    {command} +\w", text, re.MULTILINE)
    assert "--debug" in text


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="Did you mean"):
        main(["--debug", "explain", "efcp_mfca"])
    with pytest.raises(ValueError, match="Did you mean"):
        main(["explain", "efcp_mfca", "--debug"])


def test_run_hands_its_arguments_to_the_launcher(monkeypatch):
    """Flags of the script, and of the launcher, are not the console script's."""
    run = pytest.importorskip("hf_efcp.run")
    seen = []
    monkeypatch.setattr(run, "main", lambda argv: seen.append(argv))
    assert main(["run", "--patch-adamw", "efcp_mfac", "script.py", "--help"]) == 0
    assert main(["--debug", "--optimizers", "mine.py", "run", "script.py"]) == 0
    assert seen == [
        ["--patch-adamw", "efcp_mfac", "script.py", "--help"],
        ["--debug", "--optimizers", "mine.py", "script.py"],
    ]
