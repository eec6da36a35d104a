"""One of two processes is stopped, killed, or fails: the other does not wait for ever, and names it."""

import dataclasses
import json
import os
import signal

import pytest
from faults.score import record

from mutor_vision import runtime
from mutor_vision.cli import run_command
from mutor_vision.errors import UserError
from mutor_vision.storage import checkpoint
from mutor_vision.training import loop


def fail():
    raise ValueError("a fault of rank 1")


@pytest.fixture
def lost(tmp_path, train_config, forked, monkeypatch):
    """What happens to rank 1 at its fourth step -> what both printed, and status.json."""

    def run(happens):
        monkeypatch.setenv("MUTOR_TIMEOUT", "4")
        config = dataclasses.replace(train_config, save_every=2)
        step = loop.train_step

        def train_step(*arguments, **more):
            if more["step"] == 3 and os.environ["RANK"] == "1":
                happens()
            return step(*arguments, **more)

        monkeypatch.setattr(loop, "train_step", train_step)
        done = forked(lambda: run_command(lambda: loop.train(config, tmp_path / "run")), ranks=2)
        assert done.code != 0 and checkpoint.newest(tmp_path / "run").name == "step-0000002"
        return done.out, json.loads((tmp_path / "run" / "status.json").read_text())

    return run


def test_a_rank_that_hangs_is_named_with_the_step(lost):
    out, status = lost(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    said = "rank 1 of the 2 processes ended or hangs, at step 4"
    assert f"error [rank 0]: {said}" in out and "Traceback" not in out and "gloo" not in out
    assert status["state"] == "failed" and said in status["reason"]
    record("A process that ends or hangs is named", "SIGSTOP of one of two", 1, 1)


def test_a_rank_that_ended_is_named_by_those_that_wait(monkeypatch, forked, train_config, tmp_path):
    """Nobody ends rank 0 while it asks, as torchrun would after a moment."""

    def two():
        where = runtime.start()
        where.barrier()
        if where.rank == 1:
            os._exit(0)  # which `forked`, and torchrun, take for a good end
        where.barrier()

    done = forked(lambda: run_command(two), ranks=2)
    assert done.code == 1 and "rank 1 of the 2 processes ended or hangs" in done.out and "Traceback" not in done.out
    record("A process that ends or hangs is named", "the end of one of two", 1, 1)


@pytest.mark.parametrize("happens, code", [(lambda: os.kill(os.getpid(), signal.SIGKILL), -9), (fail, 1)])
def test_the_root_cause_is_not_hidden_by_the_others(lost, happens, code):
    """They wait for a moment, in which the launcher sees who was first."""
    out, _ = lost(happens)
    assert ("a fault of rank 1" in out) == (code == 1)
    assert "Connection closed by peer" not in out and "gloo" not in out


@pytest.mark.parametrize("text", ["0", "-5", "soon", "nan", "inf"])
def test_a_time_to_wait_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("MUTOR_TIMEOUT", text)
    with pytest.raises(UserError, match="MUTOR_TIMEOUT is .*expected seconds above 0"):
        runtime.patience()


def test_other_errors_stay_as_they_are():
    error = RuntimeError("Connection closed by peer")  # of something else: there is no process group
    assert runtime.blamed(error) is error
