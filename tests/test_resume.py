"""The tests of resuming can fail: each part of a checkpoint in turn is taken from an earlier one, as if its restore had
been forgotten, and the run that goes on must end elsewhere. The parts are what the checkpoint holds, so a new one is
covered without being named here."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults.score import record

from mutor_vision.config import ParallelHeadsConfig
from mutor_vision.presets import TOKENIZERS
from mutor_vision.settings import override
from mutor_vision.storage import checkpoint
from mutor_vision.tokenizer.train import train_tokenizer
from mutor_vision.training.loop import train
from mutor_vision.training.state import State

EARLIER, CUT, END = 1, 3, 6


def moments(state: dict) -> Iterator[tuple[str, str]]:
    """(key of training.pt, moment) of every optimizer in it."""
    for key, value in state.items():
        if isinstance(value, dict) and "state" in value:
            yield from ((key, moment) for moment in next(iter(value["state"].values())))


def parts_of(folder: Path) -> list[tuple[str, str]]:
    """('weights' | key of training.pt, file stem | moment | '') of everything in a checkpoint."""
    state = checkpoint.read_training_state(folder)
    split = list(moments(state))
    whole = [(key, "") for key in state if key not in dict(split)]
    return [("weights", name) for name in checkpoint.weight_names(folder)] + split + whole


def read(folder: Path, part: tuple[str, str]) -> object:
    kind, name = part
    if kind == "weights":
        return checkpoint.read_weights(folder, name)
    value = checkpoint.read_training_state(folder)[kind]
    return {number: each[name] for number, each in value["state"].items()} if name else value


def same(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def left_out(monkeypatch, folder: Path, part: tuple[str, str]) -> None:
    """From here on, readers find this part as it is in `folder`."""
    kind, name = part
    weights, training = checkpoint.read_weights, checkpoint.read_training_state
    old = read(folder, part)

    def read_training_state(newest):
        state = training(newest)
        if name:
            for number, value in old.items():
                state[kind]["state"][number][name] = value
        else:
            state[kind] = old
        return state

    if kind == "weights":
        monkeypatch.setattr(
            checkpoint, "read_weights", lambda newest, asked: old if asked == name else weights(newest, asked)
        )
    else:
        monkeypatch.setattr(checkpoint, "read_training_state", read_training_state)
    if kind == "step":
        load = State.load  # a transformer takes its step from the name of the folder
        monkeypatch.setattr(State, "load", lambda self, newest: (load(self, newest), setattr(self, "step", old)))


@pytest.fixture(scope="module")
def trainings(train_config, pictures):
    """Name -> (steps, folder) -> None. Everything that a checkpoint may hold is in one of them."""
    transformer = dataclasses.replace(
        train_config, parallel_heads=ParallelHeadsConfig(2), val_every=0, save_every=1, keep=9
    )
    small = {
        "model.image_size": 24, "model.channels": "8,8,8", "model.latent_channels": 8, "model.code_dim": 4,
        "model.codebook_size": 32, "model.norm_groups": 4, "model.attention": "false", "batch_size": 4, "workers": 0,
        "dead_code_steps": 4, "save_every": 1, "keep": 9, "log_every": 1, "val_every": 0, "sample_every": 0,
        "schedule": "constant", "warmup_steps": 0, "quantize_after": 0, "val_fraction": 0, "data": pictures,
        "adversarial_weight": 0.5, "adversarial_start": 0, "ema_decay": 0.9,
    }  # fmt: skip
    tokenizer = override(TOKENIZERS["digits"], [f"{key}={value}" for key, value in small.items()])
    return {
        "transformer": lambda steps, out: train(dataclasses.replace(transformer, steps=steps), out),
        "tokenizer": lambda steps, out: train_tokenizer(dataclasses.replace(tokenizer, steps=steps), out),
    }


@pytest.mark.parametrize("name, expected", [
    ("transformer", {("weights", "heads"), ("weights", "ema"), ("optimizer", "exp_avg"), ("step", "")}),
    ("tokenizer", {("weights", "discriminator"), ("optimizer_d", "exp_avg_sq"), ("idle_steps", "")}),
])  # fmt: skip
def test_every_part_of_a_checkpoint_that_is_not_restored_is_noticed(tmp_path, monkeypatch, trainings, name, expected):
    run = trainings[name]
    run(END, tmp_path / "whole")
    whole = checkpoint.newest(tmp_path / "whole")
    run(CUT, tmp_path / "cut")
    cut = checkpoint.newest(tmp_path / "cut")
    earlier = cut.with_name(f"step-{EARLIER:07d}")
    # What is the same at both steps, such as the list of images, is no state of the training.
    parts = [part for part in parts_of(cut) if not same(read(cut, part), read(earlier, part))]
    assert expected <= set(parts)

    def as_whole(part: tuple[str, str] | None) -> bool:
        out = shutil.copytree(tmp_path / "cut", tmp_path / "again")
        with monkeypatch.context() as patch:
            if part:
                left_out(patch, earlier, part)
            run(END, out)
        newest = checkpoint.newest(out)
        equal = all(same(read(newest, each), read(whole, each)) for each in parts)
        shutil.rmtree(out)
        return equal

    assert as_whole(None)
    unnoticed = [part for part in parts if as_whole(part)]
    record("What is not restored is noticed", name, len(parts) - len(unnoticed), len(parts))
    assert unnoticed == []
