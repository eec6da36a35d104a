"""Two machines, played by two network namespaces with a cable between them: docs/multi-node.md."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from faults.score import everything
from PIL import Image

from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not everything(), reason="minutes, and network namespaces: make test-slow"),
]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TRAINING = """--preset digits-mutor-2d-15 --set registers.count=5 --set batch_size=8 --set val_every=0
    --set sample_every=0 --set log_every=1 --set model.layers=1 --set model.dim=32""".split()


@pytest.fixture
def hosts(root):
    """start(number, *torchrun's arguments) -> a process on that machine."""
    names = [f"mutor{os.getpid()}{side}" for side in "ab"]
    cables = [f"mut{os.getpid() % 100_000}{side}" for side in "ab"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    started = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")

        def start(number, *arguments):
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root),
                                        "GLOO_SOCKET_IFNAME": cables[number],
                                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # fmt: skip
            words = ["ip", "netns", "exec", names[number], sys.executable, "-m", "torch.distributed.run"]
            process = subprocess.Popen(
                [*words, *map(str, arguments)], cwd=root, env=environment, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            started.append(process)
            return process

        yield start
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def together(hosts, *arguments, processes=2):
    """The command on both machines, as docs/multi-node.md says."""
    started = [
        hosts(number, "--nnodes=2", f"--nproc-per-node={processes}", f"--node-rank={number}",
              f"--master-addr={ADDRESSES[0]}", "--master-port=29511", *arguments)
        for number in range(2)
    ]  # fmt: skip
    for process in started:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:]


def photographs(folder):
    """13 images in two classes of different sizes."""
    generator = np.random.default_rng(0)
    for i in range(13):
        path = folder / ("ant" if i < 4 else "bee") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(20 + i, 40, 3), dtype=np.uint8)).save(path)


def test_training_encoding_sampling_and_scoring_share_their_work(
    hosts, command, token_set_path, tiny_tokenizer_path, trained_run, tmp_path
):
    arguments = [*TRAINING, "--codes", token_set_path, "--steps", 6, "--set", "model.token_dropout=0",
                 "--set", "model.residual_dropout=0", "--set", "model.ffn_dropout=0"]  # fmt: skip
    together(hosts, "train/imagenet.py", *arguments, "--out", tmp_path / "two")
    assert command("train/imagenet.py", *arguments, "--out", tmp_path / "one").code == 0
    curves = [[line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("two", "one")]
    assert len(curves[0]) == 6 and np.allclose(*curves, rtol=0, atol=1e-5)

    photographs(tmp_path / "images")
    encode = ["encode", "--tokenizer", tiny_tokenizer_path, "--data", tmp_path / "images", "--shard-size", 5]
    sample = ["sample", trained_run, "--num-images", 9]
    score = [
        "fid", "--samples", tmp_path / "images", "--reference", tmp_path / "images", "--features",
        "timm:test_efficientnet@32", "--weights", "random", "--batch-size", 5, "--image-size", 32,
        "--metrics", "fid,kid",
    ]  # fmt: skip
    for words, flag, name in ((encode, "--out", "codes"), (sample, "--out", "set.npz"), (score, "--json", "scores")):
        together(hosts, "-m", "mutor_vision", *words, flag, tmp_path / "two" / name)
        done = command("mutor", *words, flag, tmp_path / "one" / name)
        assert done.code == 0, done.err
    for name in ("set.npz", *(f"codes/{path.name}" for path in (tmp_path / "one" / "codes").glob("*.npy"))):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    one, two = (json.loads((tmp_path / name / "scores").read_text())["metrics"] for name in ("one", "two"))
    assert one.keys() == two.keys() and all(abs(one[key]["value"] - two[key]["value"]) < 1e-6 for key in one)


def test_a_machine_that_is_lost_and_comes_back_goes_on(hosts, token_set_path, tmp_path):
    """Under torchrun's elastic rendezvous: the machine that is left waits, and both go on from the last checkpoint. To
    the bit with two processes; among more, gloo adds gradients in an order that a restart changes."""
    arguments = [*TRAINING, "--codes", token_set_path, "--steps", 400, "--set", "save_every=10"]
    together(hosts, "train/imagenet.py", *arguments, "--out", tmp_path / "whole", processes=1)

    def begin(number):
        return hosts(number, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=lost",
                     f"--rdzv-endpoint={ADDRESSES[0]}:29512", f"--local-addr={ADDRESSES[number]}", "--max-restarts=3",
                     f"--rdzv-conf=is_host={1 - number}",
                     "train/imagenet.py", *arguments, "--out", tmp_path / "lost")  # fmt: skip

    first, second = begin(0), begin(1)
    end = time.monotonic() + 200
    while checkpoint.newest(tmp_path / "lost") is None and time.monotonic() < end:
        assert first.poll() is None and second.poll() is None
        time.sleep(0.02)
    os.killpg(second.pid, signal.SIGKILL)  # the whole machine
    reached = checkpoint.newest(tmp_path / "lost")
    third = begin(1)
    for process in (first, third):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:]
    assert int(reached.name.removeprefix("step-")) < 400, "it was lost too late to prove anything"
    whole, lost = (checkpoint.newest(tmp_path / name) for name in ("whole", "lost"))
    for name in ("model", "ema"):
        one, other = checkpoint.read_weights(whole, name), checkpoint.read_weights(lost, name)
        assert all(torch.equal(one[key], other[key]) for key in one)
