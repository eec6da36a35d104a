import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from faults.score import record

from mutor_vision.config import RegisterConfig, TransformerConfig

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
# A process is forked only if autograd has no threads. It starts one for each device that it sees at its first backward
# pass, so the first is here, before a test of another order pretends that there are devices.
torch.ones(1, requires_grad=True).backward()
# torch waits this long, in seconds, for a reading process whose reader has stopped early; 5 by default.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and not report.skipped and (marker := item.get_closest_marker("bad_input")):
        record("Bad inputs are told", *marker.args, int(report.passed), 1)
    return report


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that is not part of the project; tests that need it skip without it."""
    path = Path(os.environ.get("MUTOR_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"reference data not found at {path}; set MUTOR_SHARED")
    return path


@pytest.fixture
def tiny_config() -> TransformerConfig:
    """2 layers, 64 wide, 4x4 grid, 32 codes, 5 classes, no dropout."""
    return TransformerConfig(
        layers=2, heads=4, dim=64, vocab_size=32, num_classes=5, grid=(4, 4),
        token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0,
    )  # fmt: skip


REGISTER_KINDS = {
    "1d": RegisterConfig("1d", 5),
    "1d, every slot": RegisterConfig("1d", 16),
    "2d": RegisterConfig("2d", 5),
    "2d, every slot": RegisterConfig("2d", 16),
    "2d, per register": RegisterConfig("2d", 7, offset_per="register"),
    "2d, per batch": RegisterConfig("2d", 7, offset_per="batch"),
    "2d, edge ignored": RegisterConfig("2d", 7, edge="ignore"),
    "2d, all slots drawn": RegisterConfig("2d", 7, placement="all"),
    "2d, below-left": RegisterConfig("2d", 7, max_offset=3, min_offset_w=-1),
    "2d, no next token": RegisterConfig("2d", 7, next_token=False),
    "2d, not at the class slot": RegisterConfig("2d", 7, class_slot=False),
    "2d, blind to itself": RegisterConfig("2d", 7, self_attention=False),
}


@pytest.fixture(params=REGISTER_KINDS.values(), ids=REGISTER_KINDS.keys())
def registers(request) -> RegisterConfig:
    return request.param


DRAWING = {
    "guided": {},
    "unguided": {"cfg_scale": 1.0},
    "guided for a while": {"cfg_scale": 3.0, "cfg_interval": (2, 7)},
    "greedy": {"temperature": 0},
    "filtered": {"cfg_schedule": "linear", "top_k": 5, "top_p": 0.9},
}


@pytest.fixture(params=DRAWING.values(), ids=DRAWING.keys())
def drawing(request) -> dict:
    """Arguments of SampleSettings that take each way through a decoder."""
    return request.param


@pytest.fixture
def random_model(tiny_config):
    """A model whose head is not zero, so that its logits depend on its inputs."""
    from mutor_vision.model.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(tiny_config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="session")
def tiny_tokenizer_path(tmp_path_factory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "run")


def write_tiny_tokenizer(run: Path) -> Path:
    """An exported tokenizer with random weights: 16 pixels, 4x4 codes of 32."""
    from mutor_vision.config import TokenizerConfig, TokenizerTrainConfig
    from mutor_vision.storage import checkpoint
    from mutor_vision.tokenizer.model import VQTokenizer

    torch.manual_seed(0)
    config = TokenizerConfig(
        image_size=16, channels=(8, 8, 8), layers_per_block=1, latent_channels=8, code_dim=4, codebook_size=32,
        attention=False, norm_groups=4,
    )  # fmt: skip
    weights = {"model": VQTokenizer(config).state_dict()}
    checkpoint.save(run, 1, "tokenizer", TokenizerTrainConfig(model=config), weights, {}, keep=2)
    return run


def _write_token_set(path: Path, tokenizer: Path, num_images: int, seed: int) -> Path:
    """Codes that a model can learn: a class has a favourite code, and neighbours are often equal. As in real sets,
    images are listed class by class, and classes have different numbers of them: 20, 4, 12, 8 and 16 of 60."""
    from mutor_vision.data.token_set import save_array, shard_names, write_manifest
    from mutor_vision.storage import checkpoint
    from mutor_vision.tokenizer.model import load_tokenizer, tokenizer_identity

    generator = np.random.default_rng(seed)
    path.mkdir()
    checkpoint.export(tokenizer, path / "tokenizer")
    labels = np.searchsorted(np.cumsum([5, 1, 3, 2, 4]) / 15, (np.arange(num_images) + 0.5) / num_images)
    codes = generator.integers(32, size=(num_images, 2, 16))
    common = generator.random(codes.shape) < 0.7
    codes = np.where(common, labels[:, None, None] * 6 + generator.integers(2, size=codes.shape), codes)
    sizes = [num_images // 2, num_images - num_images // 2]
    for shard, (start, size) in enumerate(zip((0, sizes[0]), sizes, strict=True)):
        codes_name, labels_name = shard_names(shard)
        save_array(path / codes_name, codes[start : start + size].astype(np.uint16))
        save_array(path / labels_name, labels[start : start + size].astype(np.int64))
    plan = {
        "format": 1, "tokenizer_sha256": tokenizer_identity(load_tokenizer(tokenizer, torch.device("cpu"))),
        "codebook_size": 32, "image_size": 16, "grid": [4, 4], "views": ["center", "center-flip"],
        "class_names": ["ant", "bee", "cat", "dog", "eel"],
    }  # fmt: skip
    write_manifest(path, plan, sizes)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of two classes of 7 smooth pictures of about 20 pixels, each of another size."""
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    for number in range(14):
        path = folder / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(255, size=(4, 4, 3), dtype=np.uint8))
        small.resize((20 + number, 22), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of 11 images of noise, each of another size: 4 of one class, 7 of another."""
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(11):
        path = folder / ("ant" if number < 4 else "bee") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(256, size=(20, 18 + number, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def token_set_path(tmp_path_factory, tiny_tokenizer_path) -> Path:
    """60 images of 5 classes, 2 views, 4x4 codes of 32, in two shards."""
    return _write_token_set(tmp_path_factory.mktemp("codes") / "set", tiny_tokenizer_path, 60, seed=0)


@pytest.fixture(scope="session")
def train_config(token_set_path):
    """10 steps of a tiny model with dropout and EMA; one log line a step."""
    from mutor_vision.config import TrainConfig

    return TrainConfig(
        model=TransformerConfig(2, 2, 32), registers=RegisterConfig("2d", 6), codes=str(token_set_path),
        val_fraction=0.2, val_images=8, steps=10, batch_size=12, lr=3e-3, ema_decay=0.9, log_every=1, val_every=5,
        sample_every=0, save_every=5,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, train_config) -> Path:
    """A finished run of 10 steps."""
    from mutor_vision.training.loop import train

    out = tmp_path_factory.mktemp("runs") / "trained"
    train(train_config, out)
    return out


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


def _enter(words) -> None:
    """Become the command `mutor WORD ...` or `SCRIPT WORD ...`, through the same door as a person's."""
    sys.argv = [str(word) for word in words]
    if sys.argv[0] == "mutor":
        runpy.run_module("mutor_vision", run_name="__main__")
    else:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


def _exit_code(stopped: SystemExit) -> tuple[int, str]:
    """Exit code and last words, as Python takes the argument of sys.exit."""
    if isinstance(stopped.code, str):
        return 1, stopped.code + "\n"
    return stopped.code or 0, ""


@pytest.fixture(scope="session")
def enter():
    """enter("mutor", ...) or enter("eval/fid.py", ...): become that command, for a function given to `forked`."""
    return lambda *words: _enter(words)


@pytest.fixture
def command(monkeypatch, capsys):
    """command("mutor", "plan", ...) or command("eval/fid.py", ...) -> Finished. In this process, since starting Python
    and importing torch takes longer than most commands do; test_doors starts every kind of door for real."""

    def run(*words) -> Finished:
        monkeypatch.setattr(sys, "argv", [])
        monkeypatch.delenv("MUTOR_DEBUG", raising=False)
        capsys.readouterr()  # what was printed before is not the command's
        code, last = 0, ""
        try:
            _enter(words)
        except SystemExit as stopped:
            code, last = _exit_code(stopped)
        out, err = capsys.readouterr()
        return Finished(code, out, err + last)

    return run


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """forked("train/imagenet.py", ..., ranks=2) or forked(function) -> Finished, with what all of them printed as out:
    the same in processes that are forked from this one, so that none has to start Python and import torch. Two ranks
    find each other as those of torchrun, which test_doors starts for real."""
    if torch.cuda.is_available():
        pytest.skip("CUDA cannot be used in a forked process; to run this test, set CUDA_VISIBLE_DEVICES=")

    def run(*work, ranks: int = 1, seconds: float = 120) -> Finished:
        function = work[0] if callable(work[0]) else lambda: _enter(work)
        log, environments = tmp_path_factory.mktemp("forked") / "log", [{}]
        if ranks > 1:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # any free port
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            environments = [{"RANK": n, "LOCAL_RANK": n, "WORLD_SIZE": ranks, **meeting} for n in range(ranks)]
        context, end = multiprocessing.get_context("fork"), time.monotonic() + seconds
        processes = [context.Process(target=_forked, args=(function, log, values)) for values in environments]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):  # as torchrun does: the others may wait for this one
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        return Finished(next((code for code in codes if code), int(None in codes)), log.read_text(), "")

    return run


@pytest.fixture
def starts_are_forked(forked, monkeypatch):
    """Programs that start our commands by subprocess.run get them forked. -> the list of what was started."""
    started, two = [], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def run(words, check=False, **_):
        python, *words = map(str, words)
        assert python == sys.executable
        words, ranks = (words[len(two) :], 2) if words[: len(two)] == two else (words, 1)
        words = ["mutor", *words[2:]] if words[:2] == ["-m", "mutor_vision"] else words
        started.append(words)
        done = forked(*words, ranks=ranks)
        assert not (check and done.code), done.out
        return subprocess.CompletedProcess(words, done.code, done.out, "")

    monkeypatch.setattr(subprocess, "run", run)
    return started


def _forked(function: Callable[[], None], log: Path, environment: dict) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    with open(log, "a", buffering=1) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        try:
            function()
        except SystemExit as stopped:
            code, last = _exit_code(stopped)
            file.write(last)
            sys.exit(code)
        except BaseException:  # before the log is closed
            traceback.print_exc(file=file)
            sys.exit(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def write_token_set():
    return _write_token_set


@pytest.fixture
def trained_twice(tmp_path):
    """(config, names of weights) -> a run of 10 steps, after it was compared, to the last bit, with one that was cut
    after 4 and continued."""
    import dataclasses

    from mutor_vision.storage import checkpoint
    from mutor_vision.training.loop import train

    def run(config, *names: str) -> Path:
        train(config, tmp_path / "whole")
        for steps in (4, 10):
            train(dataclasses.replace(config, steps=steps), tmp_path / "halves")
        whole, halves = (checkpoint.newest(tmp_path / half) for half in ("whole", "halves"))
        for name in names:
            one, other = checkpoint.read_weights(whole, name), checkpoint.read_weights(halves, name)
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        return tmp_path / "whole"

    return run
