"""Processes of one job that do not belong together, or cannot meet, say so before anything is computed."""

import dataclasses
import os
import socket

import pytest

from mutor_vision import runtime
from mutor_vision.cli import run_command
from mutor_vision.errors import UserError
from mutor_vision.runtime import Runtime
from mutor_vision.settings import override
from mutor_vision.tokenizer.encode import EncodeSettings, encode_folder
from mutor_vision.training import loop


def own(values):
    """What this rank takes of a value for each."""
    return values[int(os.environ["RANK"])]


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"seed": (0, 1)}, "seed is"),
        ({"log_every": (1, 2)}, "log_every is"),  # a sum over ranks for which one would wait
        ({"registers.weight": (0.5, 0.4), "lr": (1e-3, 2e-3)}, "registers.weight, lr are"),
        ({"batch_size": (8, 16)}, "batch_size is"),
    ],
)
def test_processes_with_other_settings_do_not_train_together(train_config, forked, tmp_path, changes, name):
    """They would: each with its own, towards weights that nobody asked for."""

    def work():
        config = override(train_config, [f"{setting}={own(values)}" for setting, values in changes.items()])
        run_command(lambda: loop.train(config, tmp_path / "run"))

    done = forked(work, ranks=2)
    assert done.code == 2 and f"{name} not the same in all 2 processes; rank " in done.out, done.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed, code", [(1, 2), (0, 0)])  # machines may mount the same set elsewhere
def test_processes_with_other_codes_do_not_train_together(
    train_config, tiny_tokenizer_path, token_set_path, write_token_set, forked, tmp_path, seed, code
):
    other = write_token_set(tmp_path / "set", tiny_tokenizer_path, 60, seed)

    def work():
        config = dataclasses.replace(train_config, codes=str(own((token_set_path, other))), steps=1)
        run_command(lambda: loop.train(config, tmp_path / "run"))

    done = forked(work, ranks=2)
    assert done.code == code, done.out
    assert ("codes is not the same in all 2 processes" in done.out) == (code == 2)


def test_processes_with_other_plans_do_not_encode_together(tiny_tokenizer_path, images, forked, tmp_path):
    def work():
        settings = EncodeSettings(views=own(("center", "center-flip")))
        run_command(
            lambda: encode_folder(tiny_tokenizer_path, images, tmp_path / "codes", settings, runtime.start(), workers=0)
        )

    done = forked(work, ranks=2)
    assert done.code == 2 and "view_plan, views are not the same in all 2 processes" in done.out, done.out
    assert not (tmp_path / "codes" / "plan.json").exists()


def test_another_version_is_told(forked, monkeypatch):
    def work():
        monkeypatch.setattr("mutor_vision.__version__", own(("0.1", "0.2")))
        run_command(lambda: runtime.start().check_same({"seed": 0}))

    done = forked(work, ranks=2)
    assert done.code == 2 and "the version, or what is set, is not the same in all 2 processes" in done.out, done.out


def test_one_process_asks_nobody():
    Runtime(0, 1, "no device", None).check_same({"seed": 0})


@pytest.mark.parametrize(
    "variables, says",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and LOCAL_RANK 0, expected less than WORLD_SIZE, which is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5'"),
        ({"WORLD_SIZE": "0"}, "which is 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR expected"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"}, "'abc'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "TAKEN"}, "already in use"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "NOBODY"}, "cannot meet"),
    ],
)
def test_processes_that_cannot_meet_say_why_in_one_line(forked, monkeypatch, variables, says):
    taken, free = socket.socket(), socket.socket()
    for each in (taken, free):
        each.bind(("0.0.0.0", 0))
    taken.listen()
    ports = {"TAKEN": str(taken.getsockname()[1]), "NOBODY": str(free.getsockname()[1])}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, ports.get(value, value))
    monkeypatch.setenv("MUTOR_TIMEOUT", "2")
    done = forked(lambda: run_command(runtime.start))
    assert done.code == 2 and says in done.out and "Traceback" not in done.out, done.out
    assert "torchrun" in done.out
    with pytest.raises(UserError):
        runtime.start()
