"""Several averages of the weights in one training: each is what it would be alone, is kept, and can be drawn from."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mutor_vision.errors import UserError
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json
from mutor_vision.storage.run_log import held_out_losses, read_log
from mutor_vision.training.cost import memory
from mutor_vision.training.loop import train


def test_each_average_is_what_it_is_alone_and_resume_loses_none(trained_twice, train_config, tmp_path):
    several = dataclasses.replace(train_config, more_ema_decays=(0.1, 0.3))
    run = trained_twice(several, "model", "ema", "ema-0.1", "ema-0.3")
    train(dataclasses.replace(train_config, ema_decay=0.1), tmp_path / "alone")
    ours, alone = (checkpoint.newest(folder) for folder in (run, tmp_path / "alone"))
    kept, expected = checkpoint.read_weights(ours, "ema-0.1"), checkpoint.read_weights(alone, "ema")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert not torch.equal(kept["head.weight"], checkpoint.read_weights(ours, "ema-0.3")["head.weight"])
    of = lambda run, name: [line[name] for line in read_log(run) if name in line]  # noqa: E731
    assert of(run, "val_next_token_ema-0.1") == of(tmp_path / "alone", "val_next_token_ema") != []
    assert of(run, "val_next_token_ema") != of(run, "val_next_token_ema-0.1")


def test_info_says_which_average_has_the_lowest_loss_and_it_can_be_drawn_from(command, train_config, tmp_path):
    run = tmp_path / "run"
    train(dataclasses.replace(train_config, more_ema_decays=(0.001,)), run)
    step, losses = held_out_losses(run)
    assert step == 10 and list(losses) == ["model", "ema", "ema-0.001"]
    lowest = min(losses, key=losses.get)
    assert f"ema-0.001 {losses['ema-0.001']:.4f}, lowest with --weights {lowest}" in command("mutor", "info", run).out
    command("mutor", "info", run, "--json", tmp_path / "facts.json")
    assert read_json(tmp_path / "facts.json")["held_out"] == losses
    draw = ["mutor", "sample", run, "--num", 2, "--out", tmp_path / "two.npz", "--weights"]
    assert command(*draw, "ema-0.5").code == 2
    assert command(*draw, "ema-0.001").code == 0
    assert read_json(tmp_path / "two.npz.json")["model"]["weights"] == "ema-0.001"


@pytest.mark.parametrize("ema, more", [(0.9, (0.9,)), (0.9, (0.5, 0.5)), (0.0, (0.5,)), (0.9, (1.0,)), (0.9, (0.0,))])
def test_decays_that_cannot_be_are_refused(train_config, ema, more):
    with pytest.raises(UserError, match="more_ema_decays is"):
        dataclasses.replace(train_config, ema_decay=ema, more_ema_decays=more)


def test_the_plan_counts_every_average(train_config):
    model = dataclasses.replace(train_config.model, vocab_size=32, num_classes=5, grid=(4, 4))
    one, three = (memory(dataclasses.replace(train_config, model=model, more_ema_decays=more), 1, 4)
                  for more in ((), (0.5, 0.75)))  # fmt: skip
    assert three.ema == 3 * one.ema and three.buffers == 2 * one.buffers


def test_a_log_without_validation_has_no_losses(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert held_out_losses(tmp_path) is None
