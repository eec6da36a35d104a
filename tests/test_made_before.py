"""Checkpoints, token sets and results that an older revision wrote (fixtures/made_before/README.md) go on working: by
commands alone, as the person who made them would, and with the numbers that they had then."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

FIXTURE = Path(__file__).parent / "fixtures" / "made_before"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
TINY = """--codes codes --set model.layers=1 --set model.heads=1 --set model.dim=4 --set batch_size=8 --set lr=0.03
    --set warmup_steps=0 --set val_fraction=0.2 --set val_every=30 --set log_every=20 --set save_every=60
    --set precision=float32"""
TRAINING = {
    "tokenizer": """tokenizers/train_vq.py --preset digits --data images --set model.image_size=16
        --set model.channels=2,2,2 --set model.latent_channels=4 --set model.code_dim=4 --set model.codebook_size=16
        --set model.norm_groups=2 --set batch_size=4 --set lr=0.01 --set schedule=constant --set warmup_steps=0
        --set val_fraction=0.2 --set val_every=100 --set sample_every=200 --set save_every=200 --set log_every=50
        --set dead_code_steps=10 --set ema_decay=0.9 --set workers=0 --set precision=float32""",
    "next-token": f"train/imagenet.py --preset digits-next-token {TINY}",
    "mutor-2d": f"train/imagenet.py --preset digits-mutor-2d-15 {TINY} --set registers.count=4 --set ema_decay=0",
    "parallel-heads": f"train/imagenet.py --preset digits-next-token {TINY} --set parallel_heads=2 --set ema_decay=0",
    "lora": f"""train/imagenet.py --preset digits-next-token {TINY} --init next-token --set lora_rank=1
        --set ema_decay=0""",
}
KINDS = {"tokenizer": "tokenizer", "next-token": "transformer", "mutor-2d": "transformer",
         "parallel-heads": "transformer", "lora": "adapter"}  # fmt: skip
MODELS = {"next-token": "next-token", "mutor-2d": "mutor-2d", "parallel-heads": "parallel-heads",
          "lora": "next-token --adapter lora"}  # fmt: skip
DRAWING = {"plain": "--cfg-scale 1", "guided": "--cfg-scale 4", "greedy": "--temperature 0"}
FID = "--reference reference.npz --features features --num-images 24 --precision float32 --device cpu"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The folder as it was left, which is also where commands run."""
    shutil.unpack_archive(FIXTURE / "made_before.tar.xz", tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture(autouse=True)
def older_draw(monkeypatch):
    """The fixture's images were drawn from the same bits by the distribution function, not by Gumbel-max."""

    def draw(probabilities, keys):
        bits = keys.contiguous().numpy().view(np.uint64)[:, 0]
        uniform = torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        cumulative = probabilities.double().cumsum(-1)
        return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]

    monkeypatch.setattr("mutor_vision.sampling.decode.draw", draw)


@pytest.fixture
def command(command):
    """Run 'SCRIPT WORD ...' or 'mutor WORD ...' -> what it printed; fails unless it ends with the exit code."""

    def run(text: str, code: int = 0) -> str:
        done = command(*text.split())
        assert done.code == code, done.out + done.err
        return done.out + done.err

    return run


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_close(found: dict, expected: dict) -> None:
    """Other processors and releases of PyTorch round differently."""
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)


def assert_samples(path: Path, name: str) -> None:
    """The same codes: the pixels of another code differ by 15 and more, those of another rounding by 1."""
    expected = np.load(FIXTURE / "samples.npz")[name].astype(int)
    assert np.abs(np.load(path)["arr_0"] - expected).max() <= 2


@pytest.mark.parametrize("run", TRAINING)
def test_info_tells_what_a_run_is(made, command, run):
    step = 200 if run == "tokenizer" else 60
    printed = command(f"mutor info {run}")
    assert printed.startswith(f"{KINDS[run]} {run}, written by") and f"done at step {step}" in printed
    assert f"step-{step:07d}/model.safetensors" in printed and "precision = float32" in printed


@pytest.mark.parametrize("run", TRAINING)
def test_a_run_goes_on_from_its_last_step(made, command, run):
    before, expected = log_of(made / run), EXPECTED["next step"][run]
    command(f"{TRAINING[run]} --steps {expected['step']} --out {run}")
    log = log_of(made / run)
    assert log[: len(before)] == before and before[-1]["step"] == expected["step"] - 1
    assert_close(log[len(before)], expected)
    assert json.loads((made / run / "status.json").read_text())["state"] == "done"
    assert f"step-{expected['step']:07d}/model.safetensors" in command(f"mutor info {run}")


def test_a_run_measures_itself_by_the_reference_while_it_goes_on(made, command):
    command(f"{TRAINING['next-token']} --steps 61 --out next-token --set eval_every=61 --set eval_images=24 "
            "--set eval_reference=reference.npz --set eval_features=features")  # fmt: skip
    (line,) = [line for line in log_of(made / "next-token") if "fd" in line]
    assert line["step"] == 61 and line["fd_images"] == 24 and 0 < line["fd"] < 1


@pytest.mark.parametrize("drawing", DRAWING)
@pytest.mark.parametrize("run", MODELS)
def test_a_run_samples_the_same_codes(made, command, run, drawing):
    command(f"mutor sample {MODELS[run]} --num 6 {DRAWING[drawing]} --precision float32 --device cpu --out set.npz")
    assert_samples(made / "set.npz", f"{run} {drawing}")


def test_an_adapter_is_merged(made, command):
    command("mutor merge next-token lora merged")
    command("mutor sample merged --num 6 --cfg-scale 4 --precision float32 --device cpu --out set.npz")
    assert_samples(made / "set.npz", "lora guided")


def test_the_token_set_verifies_and_is_what_encoding_gives(made, command):
    before = {path.name: path.read_bytes() for path in (made / "codes").glob("*.npy")}
    assert "complete and verified" in command("mutor info codes")
    command("tokenizers/encode.py --tokenizer tokenizer --data images --out codes --workers 0")
    assert {path.name: path.read_bytes() for path in (made / "codes").glob("*.npy")} == before, "left alone"
    command("tokenizers/encode.py --tokenizer codes/tokenizer --data images --out again --workers 0")
    old, new = (np.load(made / name / "codes-00000.npy") for name in ("codes", "again"))
    assert old.shape == new.shape and (old == new).mean() > 0.99, "rounding may move a code across a border"
    manifests = [json.loads((made / name / "manifest.json").read_text()) for name in ("codes", "again")]
    for name in ("tokenizer_sha256", "files_sha256", "class_names", "views", "grid", "codebook_size"):
        assert manifests[0][name] == manifests[1][name], name


def test_a_damaged_token_set_is_still_refused(made, command):
    data = bytearray((made / "codes/codes-00000.npy").read_bytes())
    data[-2] ^= 1
    (made / "codes/codes-00000.npy").write_bytes(data)
    assert "is damaged" in command("mutor info codes", code=4)


def test_reconstructions_score_the_same(made, command):
    before = json.loads((made / "reconstructed/metrics.json").read_text())
    command("tokenizers/reconstruct.py --tokenizer tokenizer --data images --out reconstructed --workers 0")
    after = json.loads((made / "reconstructed/metrics.json").read_text())
    assert_close(after, {name: before[name] for name in ("psnr", "ssim", "usage", "perplexity", "images")})
    for name in ("tokenizer_sha256", "files_sha256"):
        assert after["protocol"][name] == before["protocol"][name]


def test_the_reference_gives_the_distance_that_it_gave(made, command):
    before = json.loads((made / "metrics.json").read_text())
    command(f"eval/fid.py --model next-token {FID} --json again.json")
    after = json.loads((made / "again.json").read_text())
    values = [{name: entry["value"] for name, entry in found["metrics"].items()} for found in (before, after)]
    assert_close(values[1], values[0])
    for name in ("extractor_sha256", "reference_sha256"):
        assert after["metrics"]["fd"]["protocol"][name] == before["metrics"]["fd"]["protocol"][name], name


def test_the_reference_is_what_its_images_give(made, command):
    command("eval/reference.py --data images --features features --out again.npz --device cpu")
    old, new = np.load(made / "reference.npz"), np.load(made / "again.npz")
    for name in ("mu", "sigma", "arr_0", "arr_1"):
        np.testing.assert_allclose(new[name], old[name], rtol=1e-4, atol=1e-6)


def test_a_sweep_that_recorded_too_little_is_refused_and_left_as_it_is(made, command):
    """It did not record the device, the precision and the extractor, so new scales may not compare with its own."""
    before = (made / "sweep/sweep.json").read_bytes()
    line = f"eval/cfg_sweep.py --model next-token {FID} --scales 1,2,3 --groups 6 --out"
    printed = command(f"{line} sweep", code=5)
    assert "(decoding, device, extractor, groups, precision, reference_sha256)" in printed and printed.count("\n") == 1
    assert (made / "sweep/sweep.json").read_bytes() == before
    command(f"{line} again")
    points = [json.loads((made / name / "sweep.json").read_text())["points"] for name in ("sweep", "again")]
    for old, new in zip(*points, strict=False):
        assert_close(new, {name: old[name] for name in ("cfg_scale", "value", "standard_error")})


def test_runs_are_plotted(made, command):
    command("mutor plot next-token mutor-2d parallel-heads lora --out curves.png")
    assert (made / "curves.png").stat().st_size > 1000


def test_the_results_of_experiments_are_read(command):
    assert "is what" in command("experiments/results.py --check")
