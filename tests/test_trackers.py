"""Trackers get what log.jsonl gets, and pictures and the configuration."""

import dataclasses
import sys
import types

import pytest

from mutor_vision.errors import UserError
from mutor_vision.storage.run_log import RunLog, read_log
from mutor_vision.storage.trackers import check_trackers
from mutor_vision.training.loop import train


@pytest.fixture(params=["wandb", "trackio"])
def hosted(request, monkeypatch):
    """(name, calls): a module of that name that writes down what is called."""
    module, calls = types.ModuleType(request.param), []
    for name in ("init", "log", "finish", "Image"):

        def called(*given, _name=name, **named):
            calls.append((_name, given, named))
            return f"picture {given[0]}" if _name == "Image" else None

        setattr(module, name, called)
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, calls


def test_a_training_is_shown_as_it_is_logged(hosted, train_config, tmp_path):
    name, calls = hosted
    config = dataclasses.replace(train_config, steps=4, sample_every=2, sample_classes=2)
    train(config, tmp_path / "run", [name])
    (_, _, begun), *told, last = [call for call in calls if call[0] != "Image"]
    assert begun["config"]["lr"] == 3e-3 and begun["config"]["model"]["layers"] == 2 and last[0] == "finish"
    assert begun["name"].startswith("run-") and begun["resume"] == "allow"
    numbers = [{"step": named["step"], **given[0]} for _, given, named in told if "samples" not in given[0]]
    assert numbers == read_log(tmp_path / "run")
    pictures = {named["step"]: given[0]["samples"] for _, given, named in told if "samples" in given[0]}
    assert pictures == {step: f"picture {tmp_path / 'run' / 'samples' / f'step-{step:07d}.png'}" for step in (2, 4)}
    calls.clear()
    train(dataclasses.replace(config, steps=5), tmp_path / "run", [name])
    assert calls[0][2]["name"] == begun["name"] and calls[1][2]["step"] == 5


def test_other_ranks_show_nothing(hosted, tmp_path):
    log = RunLog(tmp_path, 0, 3, active=False, trackers=[hosted[0]])
    log.write(1, loss=1.0)
    log.close()
    assert not hosted[1]


def test_tensorboard_has_numbers_pictures_and_the_configuration(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, 3, active=True, config={"lr": 0.25})
    log.write(1, loss=1.5)
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    log.picture(1, tmp_path / "a.png")
    log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1.5)]
    (image,) = found.Images(tmp_path.name)
    assert (image.width, image.height, image.step) == (8, 4, 1)
    assert b'"lr": 0.25' in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("name, message", [
    ("wandb", r"tracker wandb is not installed; pip install 'mutor-vision\[wandb\]', or leave it out"),
    ("mlflow", "tracker is 'mlflow', expected one of tensorboard, wandb, trackio"),
])  # fmt: skip
def test_what_is_not_there_is_one_line(name, message, monkeypatch):
    monkeypatch.setattr("mutor_vision.storage.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        check_trackers([name])


def test_the_command_refuses_before_it_begins(command, token_set_path, tmp_path):
    done = command("mutor", "train", "--preset", "tiny-imagenet-mutor-2d", "--codes", token_set_path, "--out",
                   tmp_path / "run", "--skip-preflight", "--track", "mlflow")  # fmt: skip
    assert done.code == 2 and "mlflow" in done.err and not (tmp_path / "run").exists()
