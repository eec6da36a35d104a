import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mutor_vision.config import RegisterConfig
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.objectives.heads import ParallelHeads
from mutor_vision.objectives.objective import Objective, register_weight, total_loss
from mutor_vision.objectives.registers import add_registers
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.training.loop import train


@pytest.fixture
def heads(tiny_config):
    torch.manual_seed(1)
    heads = ParallelHeads(tiny_config, 3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return heads


def batch(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.vocab_size, (3, *config.grid), generator=generator)
    labels = torch.randint(config.num_classes, (3,), generator=generator)
    return codes, labels, add_registers(codes, RegisterConfig(), register_token=32, seed=0, sample_index=None)


def test_heads_predict_tokens_further_ahead_as_a_walk_over_slots_says(random_model, heads):
    """Slot t (0: the class) and head k: the cross-entropy of the token k ahead, where there is one."""
    codes, labels, sequence = batch(random_model.config)
    sums = Objective(random_model, heads)(labels, sequence)
    tokens = codes.flatten(1)  # x_1 .. x_16 at 0 .. 15
    hidden = random_model.hidden(tokens[:, :-1], labels, torch.arange(16)[None])
    expected, count = 0.0, 0
    for k, ahead in enumerate(heads(hidden, random_model.rope), start=2):
        for t in range(16):
            if t + k <= 16:
                logits = random_model.logits(ahead[:, t])
                expected += F.cross_entropy(logits, tokens[:, t + k - 1], reduction="sum").item()
                count += len(codes)
    assert sums.register.item() == pytest.approx(expected, rel=1e-5)
    assert Objective(random_model, heads).num_other_targets(sequence) == count == 3 * (15 + 14)
    plain = Objective(random_model)(labels, sequence)
    assert torch.equal(sums.next_token, plain.next_token) and plain.register == 0


def test_no_head_sees_what_it_predicts(random_model, heads):
    codes, labels, _ = batch(random_model.config)
    tokens = codes.flatten(1)[:, :-1]
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 32  # x_8, the input of slot 8
    with torch.no_grad():
        before, after = (heads(random_model.hidden(t, labels, torch.arange(16)[None]), random_model.rope)
                         for t in (tokens, changed))  # fmt: skip
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :8], other[:, :8])
        assert (one[:, 8:] != other[:, 8:]).any(dim=(0, 2)).all()


def test_the_trunk_learns_from_the_heads(random_model, heads):
    _, labels, sequence = batch(random_model.config)
    sums = Objective(random_model, heads)(labels, sequence)
    total_loss(sums, torch.tensor(48), torch.tensor(87), weight=1.0).backward()  # the heads' loss alone
    for parameter in (*random_model.blocks.parameters(), random_model.head.weight, *heads.parameters()):
        assert parameter.grad.abs().sum() > 0


def test_a_run_resumes_with_its_heads_to_the_last_bit_and_samples_as_a_plain_transformer(tmp_path, train_config):
    config = dataclasses.replace(train_config, registers=RegisterConfig(), parallel_heads=3)
    train(config, tmp_path / "whole")
    for steps in (4, 10):
        train(dataclasses.replace(config, steps=steps), tmp_path / "halves")
    whole, halves = (checkpoint.newest(tmp_path / run) for run in ("whole", "halves"))
    for name in ("model", "ema", "heads"):
        one, other = checkpoint.read_weights(whole, name), checkpoint.read_weights(halves, name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    lines = [line for line in read_log(tmp_path / "whole") if "heads" in line]
    assert len(lines) == 10 and lines[-1]["heads"] < lines[0]["heads"]
    for line in lines:
        assert line["loss"] == pytest.approx((line["next_token"] + line["heads"]) / 2)
    plain = dataclasses.replace(config, parallel_heads=1)
    train(plain, tmp_path / "plain")
    assert checkpoint.read_weights(whole, "model").keys() == checkpoint.read_weights(
        checkpoint.newest(tmp_path / "plain"), "model").keys()  # fmt: skip
    with pytest.raises(MismatchError, match="parallel_heads: 3 -> 1"):
        train(plain, tmp_path / "whole")


@pytest.mark.parametrize("change", [dict(parallel_heads=0), dict(parallel_heads=2)], ids=["none", "with registers"])
def test_heads_are_refused_where_they_make_no_sense(tmp_path, train_config, change):
    with pytest.raises(UserError, match="parallel_heads is"):
        train(dataclasses.replace(train_config, **change), tmp_path / "run")


def test_the_weight_of_registers_falls_to_zero_at_the_last_step(tmp_path, train_config):
    registers = RegisterConfig("2d", 6, weight_schedule="linear")
    assert [register_weight(registers, step, 5) for step in range(5)] == [0.5, 0.375, 0.25, 0.125, 0.0]
    assert register_weight(RegisterConfig("2d", 6), 4, 5) == 0.5
    config = dataclasses.replace(train_config, registers=registers, steps=5)
    train(config, tmp_path / "run")
    last = [line for line in read_log(tmp_path / "run") if "loss" in line][-1]
    assert last["loss"] == last["next_token"] != last["register"]
    with pytest.raises(MismatchError, match="steps: 5 -> 6"):
        train(dataclasses.replace(config, steps=6), tmp_path / "run")
