"""Jobs of two processes under a real torchrun, one or all of which are killed at random moments, again and again: the
same command goes on, and in the end leaves what a job leaves that was never killed. `make test` kills one job once, and
`make test-slow` four kinds of jobs fifty times.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.crash_points import differing, tree
from faults.score import everything, record

TRAIN = """--preset digits-mutor-2d-15 --set registers.count=5 --set model.layers=1 --set model.heads=2
    --set model.dim=16 --set batch_size=12 --set val_every=20 --set log_every=5 --set save_every=10
    --set sample_every=50 --set warmup_steps=0 --steps 150""".split()
TOKENIZER = """--preset digits --set model.image_size=16 --set model.channels=4,4 --set model.latent_channels=4
    --set model.code_dim=4 --set model.codebook_size=16 --set model.norm_groups=2 --set batch_size=4 --steps 150
    --set schedule=constant --set warmup_steps=0 --set val_every=20 --set sample_every=50 --set save_every=10
    --set log_every=5 --set workers=1 --set val_fraction=0.2""".split()
KILLS = {"training": 13, "training, fsdp": 13, "tokenizer training": 12, "encoding": 12}


@pytest.fixture
def jobs(images, token_set_path, tiny_tokenizer_path):
    train = ["train", "--codes", token_set_path, *TRAIN]
    return {
        "training": train,
        "training, fsdp": [*train, "--set", "parallel=fsdp"],
        "tokenizer training": ["train-tokenizer", "--data", images, *TOKENIZER],
        "encoding": ["encode", "--tokenizer", tiny_tokenizer_path, "--data", images, "--shard-size", 1],
    }


class Job:
    """A command under torchrun, in two processes."""

    def __init__(self, words: list, out: Path, root: Path):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                   "-m", "mutor_vision", *words, "--out", out]  # fmt: skip
        out.parent.mkdir(exist_ok=True)
        self.log, self.out = out.with_suffix(".log").open("a"), out
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            [str(word) for word in command], cwd=root, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def began(self) -> bool:
        """Waits until both processes are there and the job has its folder; False when it ended before."""
        while self.process.poll() is None:
            if self.out.is_dir() and len(self.workers()) == 2:
                return True
            time.sleep(0.01)
        return False

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def kill(self, victim: str) -> bool:
        """Whether it was still running."""
        try:
            workers = self.workers()
            victims = {"rank 0": workers[:1], "rank 1": workers[1:2], "all": [self.process.pid, *workers]}[victim]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
        except OSError:
            return False
        return bool(victims)

    def ended(self) -> int:
        code = self.process.wait(timeout=120)
        self.log.close()
        return code


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_job_of_two_processes_survives_kills(jobs, root, tmp_path, name):
    if name != "tokenizer training" and not everything():  # the one that also has processes which read images
        pytest.skip("minutes: make test-slow")
    whole = Job(jobs[name], tmp_path / "whole" / "out", root)
    assert whole.began()
    since = time.monotonic()
    assert whole.ended() == 0, whole.out.with_suffix(".log").read_text()[-3000:]
    lasts, expected = time.monotonic() - since, tree(whole.out)

    chance, out = random.Random(name), tmp_path / "killed" / "out"
    wanted, kills, failed = KILLS[name] if everything() else 1, 0, []
    while not failed:
        job = Job(jobs[name], out, root)
        if killed := kills < wanted and job.began():
            time.sleep(chance.uniform(0, lasts))
            killed = job.kill(chance.choice(["rank 0", "rank 1", "all"]))
        code = job.ended()
        if killed and code:
            kills += 1
            continue
        wrong = differing(tree(out), expected)  # it came to its end, perhaps just before a kill
        if code or wrong:
            failed = [f"exit {code}", *wrong, out.with_suffix(".log").read_text()[-2000:]]
        elif kills >= wanted:
            break
        shutil.rmtree(out)
    record("A job of several processes survives kills", name, kills if not failed else kills - 1, max(kills, 1))
    assert not failed, "\n".join(failed)
