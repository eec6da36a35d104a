"""What is tried before a long run: it tells mistakes from a run that will work, and changes nothing in the run."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from mutor_vision.errors import UserError
from mutor_vision.runtime import start
from mutor_vision.storage import checkpoint
from mutor_vision.training import preflight as tried
from mutor_vision.training.preflight import preflight

SETTINGS = "model.layers=1 model.heads=2 model.dim=32 batch_size=12 val_every=0 sample_every=0 log_every=1 save_every=2"


@pytest.fixture
def arguments(token_set_path, tmp_path):
    settings = [word for setting in SETTINGS.split() for word in ("--set", setting)]
    return ["train/imagenet.py", "--preset", "digits-mutor-2d-15", "--codes", token_set_path, "--steps", 4, *settings,
            "--set", "registers.count=5"]  # fmt: skip


def test_it_reports_and_leaves_the_run_as_it_is(command, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(tried, "LONG", 4)
    result = command(*arguments, "--out", tmp_path / "tried")
    assert result.code == 0, result.err
    for pattern in (r"60 to train on, 0 held out", r"5 with 4 to 20 images, 12 in the middle",
                    r"first loss +3\.4\d\d nats a token; all of 32 codes alike are 3\.466\n",
                    r"one batch +loss (\S+) -> (\S+) after 12 steps", r"GiB in this process", r"GiB free",
                    r"hours for 4"):  # fmt: skip
        assert re.search(pattern, result.out), (pattern, result.out)
    picture = Image.open(tmp_path / "tried-preflight.png")
    assert picture.height == 5 * (128 + 4) + 4 and picture.width > 4 * 132
    result = command(*arguments, "--out", tmp_path / "not", "--skip-preflight")
    assert result.code == 0 and "preflight" not in result.out and not (tmp_path / "not-preflight.png").exists()
    one, other = (checkpoint.read_weights(checkpoint.newest(tmp_path / name), "model") for name in ("tried", "not"))
    assert all((one[key] == other[key]).all() for key in one)


def test_a_run_that_goes_on_is_not_tried_again(command, arguments, tmp_path, monkeypatch):
    command(*arguments, "--out", tmp_path / "run", "--skip-preflight")
    monkeypatch.setattr(tried, "LONG", 4)
    assert "preflight" not in command(*arguments, "--out", tmp_path / "run").out


def test_two_processes_try_together(forked, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(tried, "LONG", 4)
    result = forked(*arguments, "--out", tmp_path / "run", ranks=2)
    assert result.code == 0, result.out[-2000:]
    assert result.out.count("preflight of") == 1


@pytest.mark.parametrize(
    "fault, told",
    [
        ({"lr": 1e20, "clip": 0.0}, "the loss (becomes nan|does not fall)"),
        ({"lr": 1e-12}, "the loss does not fall"),
        ({"keep": 1000}, "checkpoints need .* make space, lower keep"),
    ],
)
@pytest.mark.bad_input("settings")
def test_what_cannot_work_is_said_before_it_begins(train_config, tmp_path, monkeypatch, fault, told):
    if "keep" in fault:
        monkeypatch.setattr(tried.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000_000}))
    with pytest.raises(UserError, match=told):
        preflight(dataclasses.replace(train_config, **fault), tmp_path / "run", start("float32"))
    assert not (tmp_path / "run").exists()


def test_the_bytes_of_a_checkpoint_are_those_on_disk(train_config, trained_run):
    inputs = tried.open_inputs(train_config, start("float32"))
    *_, expected = tried._overfit(inputs, start("float32"))
    found = sum(path.stat().st_size for path in checkpoint.newest(trained_run).iterdir())
    assert np.isclose(found, expected, rtol=0.1), (found, expected)  # the tiny model's headers are some thousand bytes


def test_weights_that_do_not_know_the_codes_are_told():
    assert "trained with this tokenizer?" in tried._surprise(9.0, 8.3, begun_from_weights=True)
    assert tried._surprise(5.0, 8.3, begun_from_weights=True) == "" == tried._surprise(8.3, 8.3, False)
    assert "should start there" in tried._surprise(7.0, 8.3, begun_from_weights=False)
