"""experiments/look_ahead.py at toy size on a CPU: what it would do on a GPU."""

import dataclasses
import importlib
import shutil
import sys

import numpy as np
import pytest

from mutor_vision.config import TransformerConfig
from mutor_vision.data.token_set import TokenSet, features_name, save_array, write_features
from mutor_vision.errors import UserError
from mutor_vision.storage.files import read_json


@pytest.fixture
def look_ahead(monkeypatch):
    """The module with a tiny model, 4 steps, one seed and one learning rate."""
    module = importlib.import_module("look_ahead")
    training = dataclasses.replace(
        module.TRAINING, model=TransformerConfig(2, 2, 32), batch_size=12, steps=4, warmup_steps=1, ema_decay=0.5,
        log_every=2, val_every=2, save_every=4, val_images=8,
    )  # fmt: skip
    methods = {
        name: {key: dataclasses.replace(own, count=5) if key == "registers" else own for key, own in losses.items()}
        for name, losses in module.METHODS.items()
    }
    for name, value in (("TRAINING", training), ("METHODS", methods), ("SEEDS", (0,)), ("LEARNING_RATES", (1e-3,)),
                        ("PLANNED", {"vocab_size": 32, "num_classes": 5, "grid": (4, 4)})):  # fmt: skip
        monkeypatch.setattr(module, name, value)
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
    assert not list((tmp_path / "work").glob("json/*"))
    enter_grid(*words)
    results = {path.stem: read_json(path) for path in (tmp_path / "work/json").glob("*.json")}
    assert {result["method"] for result in results.values()} == set(look_ahead.METHODS) and len(results) == 9
    for result in results.values():
        last = str(result["steps"])
        assert {"2", "4", last} <= result["val_next_token"].keys() == result["val_next_token_ema"].keys()
        assert result["relative_compute"] > 1 or result["method"] == "next-token"
        assert result["steps"] == 4 or result["method"] == "next-token"
    by_method = {result["method"]: result for result in results.values()}
    assert by_method["next-token"]["steps"] >= 4 * by_method["registers and aligned states"]["relative_compute"]
    assert {"val_register 0,1", "val_register 1,0"} <= by_method["registers"].keys(), "the loss of each offset"
    assert by_method["encoder states"]["losses"]["encoder_states"]["features_width"] == 24
    summary = (tmp_path / "work/summary.md").read_text()
    assert all(f"| 0.001 | {name} | 1 |" in summary for name in look_ahead.METHODS if name != "next-token")
    (lost,) = (tmp_path / "work/json").glob("lr-0.001-aligned-states-*seed-0.json")
    before = read_json(lost)
    lost.unlink()
    enter_grid(*words)
    assert read_json(lost) | {"seconds": 0} == before | {"seconds": 0}
    assert (tmp_path / "work/summary.md").read_text() == summary


def test_the_summary_compares_at_equal_steps_and_at_equal_compute(look_ahead, tmp_path):
    """Of invented results: at 1.5 times the compute, the baseline's validation at step 6."""
    from mutor_vision.storage.files import write_json

    for seed in range(3):
        curve = {step: round(3 - 0.1 * step + seed, 4) for step in (2, 4, 6, 8)}
        write_json(tmp_path / f"json/a{seed}.json", {"method": "next-token", "lr": 1e-3, "seed": seed, "steps": 8,
                                                     "relative_compute": 1.0, "val_next_token_ema": curve})  # fmt: skip
        curve = {2: 3.0, 4: round(2.5 + seed + 0.01 * (seed - 1), 4)}
        write_json(tmp_path / f"json/b{seed}.json", {"method": "MuToR-2D", "lr": 1e-3, "seed": seed, "steps": 4,
                                                     "relative_compute": 1.5, "val_next_token_ema": curve})  # fmt: skip
    look_ahead.summarise(tmp_path)
    row = (tmp_path / "summary.md").read_text().splitlines()[-1]
    assert row.startswith("| 0.001 | MuToR-2D | 3 | **-0.1000 [") and "| **+0.1000 [" in row


def test_without_features_encoder_states_are_left_out(enter_grid, token_set_path, tmp_path):
    words = ["--codes", token_set_path, "--val-codes", token_set_path, "--work", tmp_path / "work", "--seconds", 0]
    assert "has no features: encoder states are left out" in enter_grid(*words)


def test_the_grid_fits_an_h100_in_forty_minutes():
    """By the plan, at a fifth of the peak; every run has 30 million parameters, a seed of three, one of two rates."""
    module = importlib.import_module("look_ahead")
    runs = module.runs_of()
    assert len(runs) == len({run.name for run in runs}) == 9 * 3 * 2
    assert [run.config.seed for run in runs[:27]] == [0] * 9 + [1] * 9 + [2] * 9, "the first rate first"
    from mutor_vision.training.cost import parameters

    for run in runs:
        model = dataclasses.replace(run.config.model, **module.PLANNED)
        assert 28e6 < parameters(model).total < 34e6
        assert run.config.steps == 2000 or run.method == "next-token"
    lines = module.planned(runs, "h100", 0.2).splitlines()
    assert len(lines) == 55 and 30 < float(lines[-1].split()[0]) < 40


def test_what_is_missing_is_said(enter_grid):
    with pytest.raises(UserError, match="--codes, --val-codes or --work is missing"):
        enter_grid("--seconds", 3)
    assert "minutes on one h100" in enter_grid("--plan")
