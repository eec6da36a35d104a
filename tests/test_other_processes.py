"""Runs that are continued by another number of processes."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from mutor_vision.config import ParallelHeadsConfig, TransformerConfig
from mutor_vision.presets import TOKENIZERS
from mutor_vision.runtime import finish
from mutor_vision.settings import override
from mutor_vision.storage.run_log import read_log
from mutor_vision.tokenizer.train import train_tokenizer
from mutor_vision.training.loop import train

NO_DROPOUT = TransformerConfig(2, 2, 32, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)


def losses(run):
    return [line["loss"] for line in read_log(run) if "loss" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_config, forked):
    """Folder of runs by name, and what two processes printed."""
    folder = tmp_path_factory.mktemp("processes")
    plain = dataclasses.replace(
        train_config, model=NO_DROPOUT, parallel_heads=ParallelHeadsConfig(2, weight=0.25), steps=8, save_every=4,
        val_every=0,
    )  # fmt: skip
    for number in range(12):
        path = folder / "pictures" / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(255, size=(20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    small = {
        "model.image_size": 16, "model.channels": "8,8,8", "model.latent_channels": 8, "model.code_dim": 4,
        "model.codebook_size": 32, "model.norm_groups": 4, "model.attention": "false", "batch_size": 4, "workers": 0,
        "dead_code_steps": 2, "save_every": 4, "log_every": 1, "val_every": 0, "sample_every": 0, "steps": 8,
        "schedule": "constant", "warmup_steps": 0, "val_fraction": 0, "data": folder / "pictures", "ema_decay": 0.9,
    }  # fmt: skip
    tokenizer = override(TOKENIZERS["digits"], [f"{key}={value}" for key, value in small.items()])
    half = {"steps": 4}

    train(plain, folder / "one")
    train(dataclasses.replace(plain, **half), folder / "one, then two")
    train(dataclasses.replace(train_config, **half), folder / "dropout")
    train_tokenizer(tokenizer, folder / "tokenizer one")
    train_tokenizer(dataclasses.replace(tokenizer, **half), folder / "tokenizer one, then two")

    def work():
        train(plain, folder / "one, then two")
        train(dataclasses.replace(plain, **half), folder / "two, then one")
        train(dataclasses.replace(train_config, steps=6), folder / "dropout")
        train_tokenizer(tokenizer, folder / "tokenizer one, then two")
        train_tokenizer(dataclasses.replace(tokenizer, **half), folder / "tokenizer two, then one")
        finish()

    result = forked(work, ranks=2, seconds=300)
    assert result.code == 0, result.out[-3000:]
    train(plain, folder / "two, then one")
    train_tokenizer(tokenizer, folder / "tokenizer two, then one")
    (folder / "printed").write_text(result.out)
    return folder


@pytest.mark.parametrize(
    "run", ["one, then two", "two, then one", "tokenizer one, then two", "tokenizer two, then one"]
)
def test_a_run_goes_on_at_another_number_of_processes(runs, run):
    """The same images in the same order, moments, heads, dead codes and EMA: the same losses, but for rounding."""
    whole = losses(runs / ("tokenizer one" if run.startswith("tokenizer") else "one"))
    assert len(whole) == 8 and losses(runs / run) == pytest.approx(whole, rel=1e-5)


def test_it_is_said_where_dropout_draws_otherwise(runs, train_config, capsys):
    said = "continuing after step 4, with other draws of dropout, since 1 process(es) came before"
    printed = (runs / "printed").read_text()
    assert printed.count(said) == 1 and printed.count("other draws") == 1  # the run without dropout says nothing
    shutil.copytree(runs / "dropout", runs / "dropout again")
    train(dataclasses.replace(train_config, steps=7), runs / "dropout again")
    assert "since 2 process(es) came before" in capsys.readouterr().out
    train(dataclasses.replace(train_config, steps=8), runs / "dropout again")
    assert "other draws" not in capsys.readouterr().out
