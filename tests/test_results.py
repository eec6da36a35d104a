"""docs/first-grid.md is what its JSON says, and the rules by which the page chooses its words."""

import dataclasses
import importlib
import math
import sys

import numpy as np
import pytest

from mutor_vision.config import ParallelHeadsConfig, RegisterConfig, TransformerConfig
from mutor_vision.errors import MismatchError
from mutor_vision.settings import from_dict
from mutor_vision.storage.files import read_json, write_json


@pytest.fixture(scope="module")
def experiments():
    """The modules of experiments/, which is a folder of commands and on pytest's path."""
    return {name: importlib.import_module(name) for name in ("grid", "run", "results", "comparison")}


def invented(run, compute, effect) -> dict:
    """A result as run.py writes it, of a run that never was: loss = 6 - log(steps) / 5 + effect + a seed's own part."""
    config, noise = run.config, 0.01 * run.config.seed
    model = dataclasses.replace(config.model, vocab_size=512, num_classes=20, grid=(8, 8))
    config = dataclasses.replace(config, model=model)
    loss = lambda step: round(6 - math.log(step) / 5 + noise + (0 if run.method == "next-token" else effect), 4)  # noqa: E731  # fmt: skip
    validation = {step: loss(step) for step in range(40, config.steps + 1, 40)}
    score = {"fd": 3.0 + noise, "accuracy": 0.2 + noise, "loss_by_position": [4.0] * 64}
    result = {
        "block": run.block, "method": run.method, "seed": config.seed, "per_class": run.per_class,
        "dropout": model.ffn_dropout, "batch_size": 16, "lr": 3e-3, "steps": config.steps,
        "registers": dataclasses.asdict(config.registers), "parallel_heads": config.parallel_heads.count,
        "model": dataclasses.asdict(model), "relative_compute": compute(config), "seconds": 60, "parameters": 543648,
        "best": config.steps, "validation": validation,
        "scores": {step: {"loss": loss(step), **score} for step in {config.steps, *run.also_score}},
        "command": "none",
    }  # fmt: skip
    if run.drafts:
        names = [f"{h},{w}" for h in range(1, 5) for w in range(1, 5) if h > 1 or w > 1]
        heads = range(2, config.parallel_heads.count + 1)
        names = [f"head {k}" for k in heads] or names
        draft = {"acceptance": 0.5, "acceptance_guided": 0.4, "loss": 5.0, "next_token_loss": 4.5}
        result["drafts"] = {name: draft for name in names}
    return result


SETUP = {
    "classes": 20, "train_images": 10000, "views": 2, "validation_images": 200, "test_images": 800, "image_size": 64,
    "grid": [8, 8], "codebook_size": 512, "tokenizer": {"val/ema/psnr": 17.3}, "samples": 500, "draft_images": 100,
    "features": {"architecture": "resnet10t", "image_size": 32, "held_out_accuracy": 0.3}, "cfg_scale": 2.0,
    "reconstructions": {"fd": 1.3, "accuracy": 0.27}, "torch": "2.14.1", "machine": "none",
}  # fmt: skip


def write(folder, experiments, effect, keep=lambda run: True):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "setup.json", SETUP)
    for run in filter(keep, experiments["grid"].GRIDS["main"]):
        write_json(folder / f"{run.name}.json",
                              invented(run, experiments["comparison"].relative_compute, effect))  # fmt: skip
    return experiments["results"].page(*experiments["comparison"].read(folder), "results")


def test_the_committed_page_is_what_the_committed_json_says(root, experiments):
    results = experiments["results"]
    expected = results.page(*experiments["comparison"].read(root / "experiments/first_grid"), "first-grid")
    assert (root / "docs/first-grid.md").read_text() == expected, "run experiments/results.py"
    for name in ("curves", "longer", "regimes", "offsets", "positions", "samples"):
        if f"(first-grid/{name}.png)" in expected:
            assert (root / f"docs/first-grid/{name}.png").stat().st_size < 700_000


def test_every_committed_run_is_declared_and_says_how_to_repeat_it(root, experiments):
    declared = {run.name: run for run in experiments["grid"].GRIDS["main"]}
    for path in (root / "experiments/first_grid").glob("*-seed-*.json"):
        found, run = read_json(path), declared[path.stem]
        assert (found["method"], found["seed"], found["steps"]) == (run.method, run.config.seed, run.config.steps)
        assert from_dict(RegisterConfig, found["registers"], format=3) == run.config.registers
        assert path.stem in found["command"]
        assert path.stat().st_size < 20_000


def test_names_of_runs_are_their_own(experiments):
    for runs in experiments["grid"].GRIDS.values():
        assert len({run.name for run in runs}) == len(runs)


@pytest.mark.parametrize("effect, word", [(-0.1, "held-out loss better (-0.100"), (0.2, "held-out loss worse (+0.200")])
def test_a_clear_effect_is_told_in_the_first_lines(tmp_path, experiments, effect, word):
    text = write(tmp_path / "json", experiments, effect)
    first = next(line for line in text.splitlines() if line.startswith("- "))
    assert "MuToR-2D, 31 %, against next-token at equal compute" in first and "At equal steps" in first
    assert word in first.split("At equal steps")[1]


def test_an_absent_effect_is_told_as_such_and_noise_is_not_called_an_effect(experiments):
    results, comparison = experiments["results"], experiments["comparison"]
    above, noise = [0.09, 0.1, 0.11], [0.0, 0.1, -0.1]
    assert comparison.said({"loss": noise, "fd": above}).startswith("FD worse (+0.10")
    assert "not told apart: held-out loss (+0.000" in comparison.said({"loss": noise, "fd": above})
    assert comparison.said({"accuracy": above}).startswith("class accuracy better")
    assert "one seed" in comparison.said({"loss": [0.1]}) and not comparison.judged([0.1], "loss")
    assert not comparison.judged([0.4, 0.4], "accuracy") and "**" not in comparison.interval([0.4, 0.4], 1)
    assert results.opening_line({"loss": [0.4, 0.4]}, "here").startswith("**2 of the 3 seeds")
    for fair, word in ((noise, "**No effect"), (above, "**No: "), ([-x for x in above], "**Yes: ")):
        assert results.opening_line({"loss": fair, "fd": noise}, "here").startswith(word)
    assert results.opening_line({"loss": above, "fd": [-x for x in above]}, "here").startswith("**Mixed: ")


@pytest.mark.parametrize("block", ["headline", "longest", "regimes", "ablations"])
def test_a_grid_that_was_stopped_early_still_makes_a_page(tmp_path, experiments, block):
    for name, keep in (("block", lambda run: run.block == block), ("seed", lambda run: run.config.seed == 0),
                       ("one", lambda run: run.block == block and run.config.seed == 0)):  # fmt: skip
        assert "## Repeat it" in write(tmp_path / name, experiments, 0.0, keep)


def test_check_fails_on_a_page_that_was_edited(tmp_path, experiments, monkeypatch):
    results = experiments["results"]
    write(tmp_path / "json", experiments, 0.0)
    arguments = ["results.py", "--results", str(tmp_path / "json"), "--page", str(tmp_path / "results.md")]
    monkeypatch.setattr(sys, "argv", arguments)
    results.main()
    drawn = {"curves", "longer", "regimes", "offsets", "positions"}
    assert {path.stem for path in (tmp_path / "results").glob("*.png")} == drawn
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    results.main()
    page = tmp_path / "results.md"
    page.write_text(page.read_text().replace("compute 1 is 640", "compute 1 is 641"))
    with pytest.raises(MismatchError, match="is not what"):
        results.main()


def test_the_interval_is_students(experiments):
    from scipy import stats

    values = np.random.default_rng(0).normal(size=(9, 10))
    for count in range(2, 11):
        mean, half = experiments["comparison"].t_interval(values[count - 2, :count].tolist())
        low, high = stats.t.interval(0.95, count - 1, np.mean(values[count - 2, :count]),
                                     stats.sem(values[count - 2, :count]))  # fmt: skip
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)


def test_a_page_of_runs_whose_compute_was_counted_otherwise_says_so(tmp_path, experiments):
    """And a page of runs that are counted as `mutor plan` counts says nothing."""
    assert "Equal compute is not quite equal" not in write(tmp_path, experiments, 0.0)
    for path in tmp_path.glob("headline-MuToR-2D-31*.json"):
        write_json(path, read_json(path) | {"relative_compute": 1.313})
    setup, runs = experiments["comparison"].read(tmp_path)
    text = experiments["results"].page(setup, runs, "results")
    assert "MuToR-2D, 31 %: 1.328 instead of 1.313 (+1.1%) next-token steps" in text


def test_the_page_and_the_plan_count_the_same(experiments):
    from mutor_vision.commands.plan import plan

    for run in experiments["grid"].GRIDS["main"][:5]:
        model = dataclasses.replace(run.config.model, vocab_size=512, num_classes=20, grid=(8, 8))
        config = dataclasses.replace(run.config, model=model)
        planned = plan("", config, "h100", 1, 0.4)["flops_per_image"]["relative_to_next_token"]
        assert experiments["comparison"].relative_compute(config) == pytest.approx(planned, abs=1e-4)
    assert experiments["comparison"].relative_compute(
        dataclasses.replace(config, registers=RegisterConfig("2d", 20), parallel_heads=ParallelHeadsConfig())
    ) == pytest.approx(1.3276, abs=1e-4)


@pytest.mark.slow
def test_a_folder_of_images_becomes_a_page_and_a_killed_grid_goes_on(
    tmp_path, experiments, starts_are_forked, monkeypatch
):
    """The whole way at toy size: tokenizer, codes, features, two objectives, page; then again, with one result lost."""
    from PIL import Image

    from mutor_vision.config import TokenizerConfig

    grid, run = experiments["grid"], experiments["run"]
    for split, count in (("train", 12), ("val", 6)):
        for index, name in enumerate(("ant", "bee")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                generator = np.random.default_rng([index, i, count])
                picture = generator.integers(128 * index, 128 * index + 128, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / f"{i}.png")
    tokenizer = TokenizerConfig(
        image_size=16, channels=(8, 8, 8), layers_per_block=1, latent_channels=8, code_dim=4, codebook_size=32,
        attention=False, norm_groups=4,
    )  # fmt: skip
    training = {"model": TransformerConfig(2, 2, 32), "batch_size": 4, "val_every": 2, "save_every": 2, "log_every": 2}
    tiny = {"next-token": (8, {"also_score": (4,)}), "MuToR-2D, 31 %": (4, {"also_score": (), "drafts": True})}
    runs = []
    for one in [one for one in grid.GRIDS["small"] if one.config.seed == 0]:
        steps, measured = tiny[one.method]
        registers = RegisterConfig("2d", 5) if one.drafts else RegisterConfig()
        config = dataclasses.replace(one.config, **training, registers=registers, steps=steps, warmup_steps=1)
        runs.append(dataclasses.replace(one, **measured, config=config))
    small = dataclasses.replace(grid.TOKENIZER, model=tokenizer, steps=2, batch_size=4, save_every=0, val_every=2,
                                warmup_steps=0, quantize_after=0)  # fmt: skip
    for name, value in (("TOKENIZER", small), ("FEATURE_SIZE", 16), ("FEATURE_EPOCHS", 1), ("TEST_SAMPLES", 8),
                        ("DRAFT_IMAGES", 4), ("GRIDS", {"small": runs})):  # fmt: skip
        monkeypatch.setattr(run, name, value)
    arguments = ["run.py", "--grid", "small", "--images", str(tmp_path / "images"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", arguments)
    run.main()
    page = tmp_path / "work/results.md"
    text = page.read_text()
    assert "2 classes, 24 training images" in text and "## Registers as drafts" in text
    assert {"samples", "curves", "offsets"} <= {path.stem for path in (tmp_path / "work/results").glob("*.png")}
    lost = tmp_path / "work/json" / f"{runs[0].name}.json"
    before = read_json(lost)
    lost.unlink()
    run.main()
    assert read_json(lost) == before and page.read_text() == text
