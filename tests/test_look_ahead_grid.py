"""experiments/look_ahead.py and its page, at toy size."""

import dataclasses
import math
import shutil
import sys

import look_ahead as module
import look_ahead_page as page
import numpy as np
import pytest

from mutor_vision.data.token_set import TokenSet, features_name, save_array, write_features
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.storage.files import read_json, write_json


@pytest.fixture
def look_ahead(monkeypatch):
    """The module with a tiny model, 4 steps, one seed and one learning rate."""
    training = module.SCALES["cpu"].training
    training = dataclasses.replace(
        training, model=dataclasses.replace(training.model, heads=2, dim=32), batch_size=12, steps=4, warmup_steps=1,
        ema_decay=0.5, more_ema_decays=(0.1,), log_every=2, val_every=2, save_every=4, val_images=8,
        precision="float32",
    )  # fmt: skip
    methods = {
        name: {key: dataclasses.replace(own, count=5) if key == "registers" else own for key, own in losses.items()}
        for name, losses in module.METHODS.items()
    }
    tiny = module.Scale(training, (1e-3,), {"vocab_size": 32, "num_classes": 5, "grid": (4, 4)}, 24, 10, (0,))
    monkeypatch.setattr(module, "METHODS", methods)
    monkeypatch.setattr(module, "SCALES", {"gpu": tiny})
    return module


@pytest.fixture
def enter_grid(look_ahead, monkeypatch, capsys):
    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["look_ahead.py", *map(str, words)])
        look_ahead.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def with_features(token_set_path, tmp_path):
    path = shutil.copytree(token_set_path, tmp_path / "codes")
    for number, shard in enumerate(TokenSet.open(path).manifest["shards"]):
        array = np.random.default_rng(number).normal(size=(shard["images"], 2, 16, 24))
        save_array(path / features_name(number), array.astype(np.float16))
    write_features(path, {"name": "timm:none", "width": 24})
    return path


def test_every_method_leaves_its_result_and_a_stopped_grid_goes_on(
    enter_grid, look_ahead, with_features, token_set_path, tmp_path
):
    words = ["--codes", with_features, "--val-codes", token_set_path, "--work", tmp_path / "work"]
    assert "run again to continue" in enter_grid(*words, "--seconds", 0)
    assert not list((tmp_path / "work").glob("json/lr*"))
    enter_grid(*words)
    results = {path.stem: read_json(path) for path in (tmp_path / "work/json").glob("lr*.json")}
    assert {result["method"] for result in results.values()} == set(look_ahead.METHODS) and len(results) == 9
    for result in results.values():
        last = str(result["steps"])
        for average in ("ema", "ema-0.1"):
            curve = result[f"val_next_token_{average}"]
            assert {"2", "4", last} <= result["val_next_token"].keys() == curve.keys()
        assert result["relative_compute"] > 1 or result["method"] == "next-token"
        assert result["steps"] == 4 or result["method"] == "next-token"
    by_method = {result["method"]: result for result in results.values()}
    assert by_method["next-token"]["steps"] >= 4 * by_method["registers and aligned states"]["relative_compute"]
    assert {"val_register 0,1", "val_register 1,0"} <= by_method["registers"].keys(), "the loss of each offset"
    assert by_method["encoder states"]["losses"]["encoder_states"]["features_width"] == 24
    assert by_method["aligned states"]["losses"]["aligned_states"]["decay"] == 0.5, "the teacher's, of the model's EMA"
    assert by_method["private blocks"]["losses"]["private_blocks"]["blocks"] == 1
    assert by_method["heads on the state"]["losses"]["private_blocks"]["blocks"] == 0
    setup, runs = page.read(tmp_path / "work/json")
    text = page.page(setup, runs, "results")
    assert all(f"| {name} | " in text for name in look_ahead.METHODS if name != "next-token")
    (lost,) = (tmp_path / "work/json").glob("lr-0.001-aligned-states-*seed-0.json")
    before = read_json(lost)
    lost.unlink()
    enter_grid(*words)
    assert read_json(lost) | {"seconds": 0} == before | {"seconds": 0}


def test_without_features_encoder_states_are_left_out(enter_grid, token_set_path, tmp_path):
    words = ["--codes", token_set_path, "--val-codes", token_set_path, "--work", tmp_path / "work", "--seconds", 0]
    assert "has no features: encoder states are left out" in enter_grid(*words)


def test_the_grid_fits_an_h100_in_forty_minutes():
    """By the plan, at a fifth of the peak; every run has 30 million parameters, a seed of three, one of two rates."""
    scale = module.SCALES["gpu"]
    runs = module.runs_of(scale)
    assert len(runs) == len({run.name for run in runs}) == 9 * 3 * 2
    assert [run.config.seed for run in runs[:27]] == [0] * 6 + [1] * 6 + [2] * 6 + [0, 1, 2] * 3, "the first rate first"
    from mutor_vision.training.cost import parameters

    for run in runs:
        model = dataclasses.replace(run.config.model, **scale.planned)
        assert 28e6 < parameters(model).total < 34e6
        assert run.config.steps == 2000 or run.method == "next-token"
    lines = module.planned(scale, "h100", 0.2).splitlines()
    assert len(lines) == 55 and 30 < float(lines[-1].split()[0]) < 40


def test_what_is_missing_is_said(enter_grid, token_set_path, tmp_path):
    with pytest.raises(UserError, match="--codes, --val-codes or --work is missing"):
        enter_grid("--seconds", 3)
    with pytest.raises(UserError, match="--reference and --held-out go together"):
        enter_grid("--codes", token_set_path, "--val-codes", token_set_path, "--work", tmp_path, "--reference", "x")
    assert "minutes on one h100" in enter_grid("--plan")


@pytest.mark.slow
def test_samples_are_scored_and_passes_counted(
    enter_grid, look_ahead, with_features, token_set_path, tmp_path, starts_are_forked, monkeypatch
):
    """Two methods with random networks: the way of the numbers from samples to the page and its picture."""
    from PIL import Image

    reference, held_out = tmp_path / "train/reconstructions", tmp_path / "shown/reconstructions"
    generator = np.random.default_rng(0)
    for folder in (reference, held_out):
        for name in TokenSet.open(token_set_path).class_names:
            (folder / name).mkdir(parents=True)
            for i in range(4):
                picture = generator.integers(256, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / name / f"{i:08d}.png")
    write_json(tmp_path / "shown/metrics.json", {"psnr": 12.5})
    methods = {name: look_ahead.METHODS[name] for name in ("next-token", "registers")}
    monkeypatch.setattr(look_ahead, "METHODS", methods)
    monkeypatch.setattr(look_ahead, "NETWORKS", ("timm:test_efficientnet@32", "timm:test_vit@32"))
    monkeypatch.setattr(look_ahead, "FORECAST_IMAGES", 2)
    enter_grid("--codes", with_features, "--val-codes", token_set_path, "--work", tmp_path / "work", "--reference",
               reference, "--held-out", held_out, "--weights", "random")  # fmt: skip
    setup, runs = page.read(tmp_path / "work/json")
    assert setup["psnr"] == 12.5 and setup["real"]["fd"] > 0
    by_method = {run["method"]: run for run in runs}
    assert list(by_method["registers"]["scores"]) == ["4"]
    assert list(by_method["next-token"]["scores"]) == ["4", "6"], "at equal steps and at equal compute"
    for run in runs:
        assert 1 <= run["tokens_per_pass"]["0"] <= 16
        for step, score in run["scores"].items():
            assert {"fd", "fd timm:test_vit", "mind", "density", "coverage", "copies"} <= score.keys()
            assert score["weights"] == look_ahead.lowest(run, int(step))
    left = list((tmp_path / "work/runs").glob("*next-token*/checkpoints/*"))
    assert len(left) == 1, "the others were needed for scoring alone"
    page.draw(runs, tmp_path / "curves.png")
    page.draw_panel(runs, tmp_path / "work/panel", tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").height > 3 * 64


def invented(method: str, seed: int, effect: float, noise: float, *, lr=2e-3, compute=1.5, steps=800) -> dict:
    """A result as look_ahead.py writes it, of a run that never was: loss 4 - step / 1000 + effect + noise."""
    last = steps if method != "next-token" else int(steps * 1.5)
    curve = {step: 4 - step / 1000 + effect + noise for step in range(50, last + 1, 50)}
    return {
        "method": method, "lr": lr, "seed": seed, "steps": last, "losses": {}, "batch_size": 32, "val_images": 600,
        "model": {"layers": 4, "heads": 4, "dim": 128}, "averages": ["ema", "ema-0.95"],
        "relative_compute": 1.0 if method == "next-token" else compute, "seconds": 60, "val_next_token": curve,
        "val_next_token_ema": curve, "val_next_token_ema-0.95": {step: loss + 0.01 for step, loss in curve.items()},
        "scores": {}, "tokens_per_pass": {},
    }  # fmt: skip


SETUP = {
    "classes": 12, "names": ["goldfish"], "images": 6000, "views": 2, "held_out": 600, "image_size": 64,
    "grid": [8, 8], "codebook_size": 1024, "parameters": 1313664, "psnr": 18.0, "samples": 2000, "cfg_scale": 2.0,
    "encoder": "timm:none", "real": {}, "torch": "2.14.1", "machine": "none",
}  # fmt: skip


def some_runs(effects: dict[str, float], seeds=3, spread=0.01) -> list[dict]:
    noise = np.random.default_rng(0).normal(size=(len(effects) + 1, seeds)) * spread
    rows = [("next-token", 0.0), *effects.items()]
    return [
        invented(name, seed, effect, noise[i, seed] + seed) for i, (name, effect) in enumerate(rows)
        for seed in range(seeds)
    ]  # fmt: skip


def test_what_is_told_apart_is_told_in_the_first_lines_and_noise_is_not():
    """A seed's own part of the loss, a hundred times the noise, cancels; at equal compute next-token has half as many
    steps more, which is 0.4 here."""
    text = page.page(SETUP, some_runs({"MuToR-2D": -0.1, "aligned states": 0.2, "registers": 0.001}), "results")
    first, second = text.splitlines()[2:4]
    assert "At equal steps (4.3 passes" in first
    assert "lower held-out loss than next-token prediction: MuToR-2D (-0.1" in first
    assert "higher held-out loss than next-token prediction: aligned states (+0.2" in first
    assert "not told apart: registers (" in first
    assert "At equal compute**: higher held-out loss" in second and "lower" not in second
    assert "registers (+0.3" in second
    assert "no setup.json" not in text and "Not measured." in text


def test_two_seeds_tell_nothing():
    text = page.page(SETUP, some_runs({"MuToR-2D": -0.1, "registers": 0.3}, seeds=2), "results")
    assert "not told apart: MuToR-2D (-0.0" in text and "lower held-out loss than" not in text


def test_samples_are_compared_at_equal_compute_where_next_tokens_were_scored():
    """At 1.5 times the compute there is a checkpoint, at 1.25 times there is none; a difference of 5 points is told
    apart by three seeds with noise of a hundredth, and the class accuracy is the better for being higher."""
    runs = []
    for name, compute, right in (("next-token", 1.0, 0.2), ("MuToR-2D", 1.5, 0.25), ("registers", 1.25, 0.2)):
        for seed in range(3):
            run = invented(name, seed, 0.0, 0.001 * seed * compute, compute=compute)
            steps = ("800", "1200") if name == "next-token" else ("800",)
            score = {"class_accuracy": right + 0.0001 * (seed + 1) * compute, "fd": 100.0 + seed**2 * compute}
            runs.append(run | {"scores": {step: score for step in steps}})
    found = page.samples_found(runs, 2e-3)
    assert {key[:2] for key in found} == {("MuToR-2D", "steps"), ("MuToR-2D", "compute"), ("registers", "steps")}
    assert found["MuToR-2D", "steps", "class_accuracy"].mean == pytest.approx(5.01, abs=0.001)
    said = page.said_of_samples(found)
    assert "MuToR-2D: better at equal steps in class accuracy (%) (+5.0)" in said
    assert "registers" not in said and "FD" not in said
    setup = SETUP | {"real": {"class_accuracy": 0.55, "fd": 180.0}}
    text = "\n".join(page.samples(setup, runs, 2e-3, "results"))
    assert "| next-token, step 1200 |" in text and "| 600 held-out images | 180.0 | 55.0 |" in text


def test_the_noise_is_the_residual_of_a_table_of_two_ways():
    """Against least squares with an effect for each row and each column, and scipy's t."""
    from scipy import stats

    generator = np.random.default_rng(1)
    cells = generator.normal(size=(5, 4)) + generator.normal(size=(1, 4)) * 10
    values = {f"m{i}": {seed: cells[i, seed] for seed in range(4)} for i in range(5)}
    rows, columns = np.indices(cells.shape)
    design = np.concatenate([np.eye(5)[rows.ravel()], np.eye(4)[columns.ravel()][:, 1:]], 1)
    residuals = cells.ravel() - design @ np.linalg.lstsq(design, cells.ravel(), rcond=None)[0]
    deviation, freedom = page.noise(values)
    assert freedom == 12 and deviation == pytest.approx(math.sqrt((residuals**2).sum() / 12), rel=1e-10)
    found = page.Difference(values["m1"], values["m0"], deviation, freedom)
    error = deviation * math.sqrt(2 / 4)
    assert found.half == pytest.approx(stats.t.ppf(0.975, 12) * error, rel=1e-10)
    assert found.p == pytest.approx(2 * stats.t.sf(abs((cells[1] - cells[0]).mean()) / error, 12), rel=1e-8)
    assert page.noise({"a": {0: 1.0}, "b": {0: 2.0}})[1] == 0
    assert page.noise(values | {"with one seed": {0: 3.0}}) == (deviation, freedom)


def test_holms_correction():
    """Sorted, the smallest p is held against 0.05 / 4, the next against 0.05 / 3, until one fails: 0.005 and 0.01 pass,
    0.03 fails against 0.025, and with it 0.04, which would pass alone."""

    class Found:
        def __init__(self, p):
            self.p = p

    found = {name: Found(p) for name, p in zip("abcd", (0.01, 0.04, 0.03, 0.005), strict=True)}
    assert page.clear_ones(found) == {"a", "d"}
    assert page.clear_ones({"a": Found(0.06)}) == set()
    assert page.clear_ones(found | {"of one seed": Found(math.nan)}) == {"a", "d"}


def test_check_fails_on_a_page_that_was_edited(tmp_path, monkeypatch):
    results, out = tmp_path / "json", tmp_path / "results.md"
    results.mkdir()
    write_json(results / "setup.json", SETUP)
    for run in some_runs({"MuToR-2D": -0.1}):
        write_json(results / f"lr-{run['method']}-{run['seed']}.json", run)
    monkeypatch.setattr(sys, "argv", ["look_ahead_page.py", "--results", str(results), "--page", str(out)])
    page.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--check"])
    page.main()
    out.write_text(out.read_text().replace("0.05", "0.06").replace("MuToR-2D (", "MuToR-3D ("))
    with pytest.raises(MismatchError, match="is not what"):
        page.main()


def test_the_committed_page_is_what_the_committed_json_says(root):
    folder, committed = root / "experiments/look_ahead_results", root / "docs/results.md"
    setup, runs = page.read(folder)
    assert committed.read_text() == page.page(setup, runs, "results"), "run experiments/look_ahead_page.py"
    for name in ("curves", "samples"):
        assert (root / f"docs/results/{name}.png").stat().st_size < 700_000
    first = [run for run in runs if run["lr"] == page.rates(runs)[0]]
    assert all(len(page.of(first, run["lr"], run["method"])) == 3 for run in first), "three seeds for every row"


def test_every_committed_run_is_declared(root):
    declared = {run.name: run for run in module.runs_of(module.SCALES["cpu"])}
    for path in (root / "experiments/look_ahead_results").glob("lr-*.json"):
        found, run = read_json(path), declared[path.stem]
        assert (found["method"], found["seed"], found["steps"]) == (run.method, run.config.seed, run.config.steps)
        for name, own in found["losses"].items():
            assert own | {"network": ""} == dataclasses.asdict(getattr(run.config, name)) | {"network": ""}
        assert path.stat().st_size < 20_000
