"""The commands as a person types them."""

import json
import os
import subprocess
import sys

import pytest

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(root, *words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=root, capture_output=True, text=True, env=ONE_THREAD)


@pytest.mark.parametrize(
    "words, message, code",
    [
        (["--preset", "digits-mutor2d"], "unknown preset 'digits-mutor2d'; did you mean 'digits-mutor-2d'?", 2),
        (["--preset", "digits-mutor-2d", "--set", "leraning=1"], "unknown setting 'leraning'", 2),
        (["--preset", "digits-mutor-2d", "--set", "registers.cont=9"], "did you mean 'registers.count'?", 2),
        (["--preset", "digits-mutor-2d", "--set", "registers.count=-3"], "registers.count -3", 2),
        (["--preset", "digits-mutor-2d", "--step", "3"], "unrecognized arguments: --step", 2),
        (["--preset", "digits-mutor-2d", "--codes", "/nowhere"], "/nowhere is not a folder", 2),
        (["--preset", "imagenet256-B-next-token"], "model.vocab_size is 16384, but the token set", 5),
        (["--preset", "digits-mutor-2d", "--set", "batch_size=12"], "a 4x4 grid has 16 slots", 2),
    ],
)
def test_train_imagenet_refuses_in_one_line_and_writes_nothing(root, tmp_path, token_set_path, words, message, code):
    if "--codes" not in words:
        words = [*words, "--codes", token_set_path]
    result = command(root, "train/imagenet.py", *words, "--out", tmp_path / "run")
    assert result.returncode == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_resolved_configuration(root, tmp_path, token_set_path):
    result = command(root, "train/imagenet.py", "--preset", "digits-mutor-2d-15", "--codes", token_set_path,
                     "--set", "registers.count=5", "--steps", "7", "--out", tmp_path / "run", "--dry-run")  # fmt: skip
    config = json.loads(result.stdout)
    assert config["steps"] == 7 and config["registers"]["count"] == 5 and config["model"]["vocab_size"] == 32
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_demo_goes_through_every_stage(root, tmp_path):
    """The whole pipeline with a handful of steps: numbers mean nothing, every command and file is real."""
    result = command(
        root, "train/demo.py", "--out", tmp_path, "--tokenizer-steps", "3", "--steps", "20", "--samples", "40"
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in result.stdout
    for picture in (
        "inputs.png",
        "reconstructions.png",
        "losses.png",
        "samples-next-token.png",
        "samples-MuToR-2D.png",
    ):
        assert f'src="{picture}"' in page and (tmp_path / picture).stat().st_size > 1000
    results = json.loads((tmp_path / "demo.json").read_text())["results"]
    assert results.keys() == {"next-token", "MuToR-2D"}
    assert all(isinstance(value, float) for column in results.values() for value in column.values())
