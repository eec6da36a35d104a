"""A training that is asked to stop saves first, and continues as if it had never stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from faults.score import record

from mutor_vision.storage import checkpoint

TRAIN = """--preset digits-mutor-2d-15 --set registers.count=5 --set model.layers=1 --set model.dim=32
    --set batch_size=12 --set val_every=0 --set log_every=1 --set sample_every=0 --set save_every=100
    --steps 6""".split()
TOKENIZER = """--preset digits --set model.image_size=16 --set model.channels=4,4 --set model.latent_channels=4
    --set model.code_dim=4 --set model.codebook_size=16 --set model.norm_groups=2 --set batch_size=4 --set val_every=0
    --set sample_every=0 --set save_every=1000 --set log_every=1 --set val_fraction=0.2 --set schedule=constant
    --set warmup_steps=0 --steps""".split()
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


@pytest.fixture
def jobs(images, token_set_path):
    return {
        "training": ["mutor", "train", "--codes", token_set_path, *TRAIN],
        "tokenizer training": ["mutor", "train-tokenizer", "--data", images, *TOKENIZER, 6, "--set", "workers=1"],
    }


# What each job calls once in every step.
STEPS = {"training": "mutor_vision.training.loop.train_step",
         "tokenizer training": "mutor_vision.tokenizer.losses.generator_losses"}  # fmt: skip


@pytest.fixture
def signalled(jobs, enter, monkeypatch):
    """signalled(job, out, {step: signals}, rank) -> a function for `forked`: the job, whose process `rank` sends itself
    the signals in those steps, the first of which is 1."""

    def prepared(name, out, signals, rank=0):
        module, function = STEPS[name].rsplit(".", 1)

        def job():
            found = sys.modules.get(module) or __import__(module, fromlist=[function])
            original, count = getattr(found, function), [0]

            def step(*arguments, **settings):
                count[0] += 1
                if int(os.environ.get("RANK", 0)) == rank:
                    for number in signals.get(count[0], ()):
                        os.kill(os.getpid(), number)
                return original(*arguments, **settings)

            setattr(found, function, step)  # in the forked process alone
            enter(*jobs[name], "--out", out)

        return job

    return prepared


def same_weights(one, other):
    one, other = checkpoint.newest(one), checkpoint.newest(other)
    names = checkpoint.weight_names(one)
    assert names == checkpoint.weight_names(other) and one.name == other.name
    for name in names:
        ours, theirs = checkpoint.read_weights(one, name), checkpoint.read_weights(other, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.parametrize("name", STEPS)
def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_stopped(forked, signalled, tmp_path, name):
    assert forked(signalled(name, tmp_path / "whole", {})).code == 0
    saved = 0
    for number in SIGNALS:
        out = tmp_path / number.name
        stopped = forked(signalled(name, out, {3: [number]}))
        assert stopped.code == 75 and f"stopped by {number.name} after step 3" in stopped.out, stopped.out
        assert "Traceback" not in stopped.out
        status = json.loads((out / "status.json").read_text())
        assert status["state"] == "preempted" and status["step"] == 3
        assert checkpoint.newest(out).name == "step-0000003"
        again = forked(signalled(name, out, {}))
        assert again.code == 0, again.out
        same_weights(tmp_path / "whole", out)
        saved += 1
    record("A training that is asked to stop saves first", name, saved, len(SIGNALS))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", STEPS)
def test_a_signal_to_one_process_stops_all_at_the_same_step(forked, signalled, tmp_path, name, rank):
    stopped = forked(signalled(name, tmp_path / "run", {2: [signal.SIGTERM]}, rank), ranks=2)
    assert stopped.code == 75, stopped.out[-2000:]
    assert checkpoint.newest(tmp_path / "run").name == "step-0000002"
    assert forked(signalled(name, tmp_path / "run", {}), ranks=2).code == 0
    assert forked(signalled(name, tmp_path / "whole", {}), ranks=2).code == 0
    same_weights(tmp_path / "whole", tmp_path / "run")
    record("A training that is asked to stop saves first", f"{name}, one of two processes is told", 1, 1)


def test_a_second_signal_ends_it_at_once(forked, signalled, tmp_path):
    ended = forked(signalled("training", tmp_path / "run", {2: [signal.SIGTERM, signal.SIGTERM]}))
    assert ended.code == -signal.SIGTERM and not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_signal_in_the_last_step_changes_nothing(forked, signalled, tmp_path):
    done = forked(signalled("training", tmp_path / "run", {6: [signal.SIGTERM]}))
    assert done.code == 0 and json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_signals_do_again_what_they_did(token_set_path, train_config, tmp_path):
    from mutor_vision.training.loop import train

    before = [signal.getsignal(number) for number in SIGNALS]
    train(train_config, tmp_path / "run")
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.slow
def test_under_torchrun_with_data_workers(root, images, tmp_path):
    """As a cluster does it: SIGTERM to every process of the job, readers included."""
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mutor_vision",
        "train-tokenizer", "--data", images, *TOKENIZER, 100_000, "--set", "workers=2", "--out", tmp_path / "run",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    job = subprocess.Popen([str(word) for word in words], cwd=root, env=environment, text=True, start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    log, end = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 3) and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "preempted", out[-3000:]
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run")) == status["step"] > 3
    with pytest.raises(ProcessLookupError):  # no process of the job is left
        os.killpg(job.pid, 0)
    record("A training that is asked to stop saves first", "torchrun, two processes with two readers each", 1, 1)
