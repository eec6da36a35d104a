"""Every command lives in the package; scripts at fixed places are doors to it."""

import os
import re
import subprocess
import sys

import pytest

from mutor_vision.cli import COMMANDS, Parser, _command
from mutor_vision.storage import checkpoint

DOORS = {name: found[1] for name, text in COMMANDS.items() if (found := re.search(r"\((\S+\.py)\)", text))}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does_and_how_it_is_called(name):
    command, parser = _command(name), Parser(prog="mutor")
    command.add_arguments(parser)
    assert command.__doc__.strip().count("\n") == 0 or f"mutor {name}" in command.__doc__


def test_there_is_a_door_at_every_place_that_users_know(root):
    assert set(DOORS.values()) == {
        "tokenizers/train_vq.py", "tokenizers/encode.py", "tokenizers/reconstruct.py", "train/imagenet.py",
        "train/demo.py", "eval/fid.py", "eval/reference.py", "eval/train_features.py", "eval/cfg_sweep.py",
    }  # fmt: skip
    for name, script in DOORS.items():
        code = (root / script).read_text()
        assert f'door("{name}", "{script}")' in code and len(code.splitlines()) < 10


def test_help_imports_no_torch_and_shows_the_pipeline_in_order(root):
    code = "import sys; sys.argv[1:] = ['--help']\ntry:\n import mutor_vision.cli as c; c.main()\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    shown = [line.split()[0] for line in result.stdout.splitlines() if re.match(r"    \S", line)]
    assert [name for name in shown if name in COMMANDS] == list(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [*([script] for script in DOORS.values()), ["-m", "mutor_vision", "plan"]], ids=" ".join
)
def test_a_door_is_started_and_refuses_in_one_line(root, words):
    """In an interpreter of its own, as a person does it; all other tests of commands run in theirs."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *words, "--colour"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    name = "mutor plan" if words[0] == "-m" else words[0]
    assert re.fullmatch(rf"error: .*; see {re.escape(name)} --help\n", done.stderr), done.stderr


@pytest.mark.slow
def test_two_ranks_start_by_script_by_module_and_by_command_and_train_the_same_weights(root, tmp_path, token_set_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    mutor = os.path.join(os.path.dirname(sys.executable), "mutor")
    ways = {"script": ["train/imagenet.py"], "module": ["-m", "mutor_vision", "train"],
            "command": ["--no-python", mutor, "train"]}  # fmt: skip
    arguments = ["--preset", "digits-mutor-2d-15", "--codes", token_set_path, "--steps", "2", "--set", "batch_size=4",
                 "--set", "registers.count=5", "--set", "val_every=0", "--set", "sample_every=0"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for name, way in ways.items():
        result = subprocess.run([*launch, *way, *map(str, arguments), "--out", tmp_path / name], cwd=root,
                                env=environment, capture_output=True, text=True)  # fmt: skip
        assert result.returncode == 0, f"{name}: {result.stderr[-1500:]}"
    weights = [(checkpoint.newest(tmp_path / name) / "model.safetensors").read_bytes() for name in ways]
    assert weights[0] == weights[1] == weights[2]
