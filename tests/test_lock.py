"""One job at a time writes into a run directory."""

import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest
import torch
from torch.utils.data import Dataset

from mutor_vision.data.reading import read_batches
from mutor_vision.errors import UserError
from mutor_vision.runtime import Runtime
from mutor_vision.storage import lock

ALONE = Runtime(0, 1, torch.device("cpu"), None)


def in_another_process(out, then=None):
    """hold(out) in a forked process -> (its message or '', the process, which keeps the lock until it is killed)."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work():
        lock.leave_to_parent()  # another job has none
        try:
            lock.hold(out, ALONE)
            theirs.send("")
        except lock.LockedError as error:
            theirs.send(str(error))
        signal.pause()

    process = context.Process(target=work, daemon=True)
    process.start()
    assert ours.poll(60)
    return ours.recv(), process


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr(lock, "_held", {})
    started = []

    def run(out):
        said, process = in_another_process(out)
        started.append(process)
        return said, process

    yield run
    for process in started:
        process.kill()
        process.join()


def test_a_second_job_says_who_has_the_directory(tmp_path, elsewhere):
    said, process = elsewhere(tmp_path / "run")
    assert said == ""
    with pytest.raises(lock.LockedError, match=f"in use by process {process.pid} on {socket.gethostname()} since"):
        lock.hold(tmp_path / "run", ALONE)
    assert "in use by" in elsewhere(tmp_path / "run")[0] and lock.LockedError.exit_code == 7


def test_the_lock_of_a_killed_job_is_free(tmp_path, elsewhere):
    said, process = elsewhere(tmp_path / "run")
    process.kill()
    process.join()
    lock.hold(tmp_path / "run", ALONE)
    lock.hold(tmp_path / "run", ALONE)  # the same job may begin again
    assert said == "" and f"process {os.getpid()} on" in elsewhere(tmp_path / "run")[0]


def test_other_ranks_of_a_job_take_no_lock(tmp_path, elsewhere):
    elsewhere(tmp_path / "run")
    lock.hold(tmp_path / "run", Runtime(1, 1, torch.device("cpu"), None))


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is a link, expected a file"):
        lock.hold(tmp_path, ALONE)
    assert not (tmp_path / "precious").exists()


def test_a_training_holds_its_directory(trained_run, train_config, elsewhere):
    from mutor_vision.training.loop import train

    said, process = elsewhere(trained_run)
    with pytest.raises(lock.LockedError, match="in use by process"):
        train(train_config, trained_run)


class Slow(Dataset):
    def __getitem__(self, number):
        time.sleep(30)


def test_readers_that_outlive_a_killed_job_do_not_keep_its_lock(tmp_path, forked):
    """They are forked from it, and take seconds to see that it is gone."""

    def job():
        lock.hold(tmp_path / "run", ALONE)
        threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        next(read_batches(Slow(), [[0]], workers=1))

    assert forked(job).code == -signal.SIGKILL
    lock.hold(tmp_path / "run", ALONE)
