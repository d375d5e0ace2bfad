"""What comes from outside is data: checkpoints are tensors, words of a command line are words."""

import ast
import pickle
import sys
from pathlib import Path

import pytest
import torch
from contract import each_name, tiny_model, train

from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.run import main, parse

SOURCES = sorted((Path(__file__).parents[1] / "hf_efcp").rglob("*.py"))


def calls(source):
    """Every call in a file, with its dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_files_are_loaded_as_tensors_alone():
    for path in SOURCES:
        for name, node in calls(path.read_text()):
            if name == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", path


def test_nothing_is_pickled_evaluated_or_given_to_a_shell():
    forbidden = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.dump"}
    forbidden |= {"pickle.dumps", "dist.all_gather_object", "dist.gather_object", "dist.broadcast_object_list"}
    for path in SOURCES:
        for name, node in calls(path.read_text()):
            assert name not in forbidden, path
            assert not any(keyword.arg == "shell" for keyword in node.keywords), path


@each_name
def test_no_state_needs_more_than_tensors_to_load(case, tmp_path):
    model = tiny_model()
    optimizer = case.build(model)
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.load(tmp_path / "optimizer.pt", weights_only=True)


def test_an_object_in_a_checkpoint_is_refused(tmp_path):
    """The file would run a command where it is unpickled."""

    class Command:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state": Command()}, tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("word", ["$(touch ran)", "`touch ran`", "; touch ran", "a b&&touch ran", "'\"$IFS"])
def test_words_with_shell_characters_are_words(word, tmp_path, monkeypatch):
    """In a script's path, in its arguments, and in options."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / f"{word.replace('/', '_')}.py"
    script.write_text("import sys, pathlib; pathlib.Path('seen').write_text(sys.argv[1])")
    monkeypatch.setattr(sys, "argv", ["hf_efcp.run"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["--trainer", "transformers", str(script), word])
    assert (tmp_path / "seen").read_text() == word
    assert parse(["script.py", word]).script == ["script.py", word]
    assert parse_optim_args(f"preset={word}") == {"preset": word.replace(" ", "")}
    assert not (tmp_path / "ran").exists()
