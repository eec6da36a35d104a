import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mutor_vision.config import ParallelHeadsConfig, RegisterConfig, TrainConfig
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.objectives.heads import ParallelHeads
from mutor_vision.objectives.objective import Objective, total_loss
from mutor_vision.objectives.sequence import next_token_sequence
from mutor_vision.settings import from_dict, override, to_dict
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.training.loop import train


@pytest.fixture
def heads(tiny_config):
    torch.manual_seed(1)
    own = ParallelHeadsConfig(3, weight=1.0)
    heads = ParallelHeads(own, TrainConfig(model=tiny_config, parallel_heads=own))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return heads


def batch(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.vocab_size, (3, *config.grid), generator=generator)
    labels = torch.randint(config.num_classes, (3,), generator=generator)
    return codes, labels, next_token_sequence(codes)


def test_heads_predict_tokens_further_ahead_as_a_walk_over_slots_says(random_model, heads):
    """Slot t (0: the class) and head k: the cross-entropy of the token k ahead, where there is one."""
    codes, labels, sequence = batch(random_model.config)
    sums = Objective(random_model, [heads])(labels, sequence)
    tokens = codes.flatten(1)  # x_1 .. x_16 at 0 .. 15
    hidden = random_model.hidden(tokens[:, :-1], labels, torch.arange(16)[None])
    expected, count = 0.0, 0
    for k, ahead in enumerate(heads.ahead(hidden, random_model.rope), start=2):
        for t in range(16):
            if t + k <= 16:
                logits = random_model.logits(ahead[:, t])
                expected += F.cross_entropy(logits, tokens[:, t + k - 1], reduction="sum").item()
                count += len(codes)
    assert sums["heads"].item() == pytest.approx(expected, rel=1e-5)
    assert heads.count(sequence) == count == 3 * (15 + 14)
    assert torch.equal(sums["next_token"], Objective(random_model)(labels, sequence)["next_token"])


def test_no_head_sees_what_it_predicts(random_model, heads):
    codes, labels, _ = batch(random_model.config)
    tokens = codes.flatten(1)[:, :-1]
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 32  # x_8, the input of slot 8
    with torch.no_grad():
        before, after = (heads.ahead(random_model.hidden(t, labels, torch.arange(16)[None]), random_model.rope)
                         for t in (tokens, changed))  # fmt: skip
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :8], other[:, :8])
        assert (one[:, 8:] != other[:, 8:]).any(dim=(0, 2)).all()


def test_the_trunk_learns_from_the_heads(random_model, heads):
    _, labels, sequence = batch(random_model.config)
    objective = Objective(random_model, [heads])
    assert objective.weights(0) == {"next_token": 0.0, "heads": 1.0}
    counts = {name: torch.tensor(count) for name, count in objective.counts(sequence).items()}
    total_loss(objective(labels, sequence), counts, objective.weights(0)).backward()
    for parameter in (*random_model.blocks.parameters(), random_model.head.weight, *heads.parameters()):
        assert parameter.grad.abs().sum() > 0


def test_a_run_resumes_with_its_heads_and_its_transformer_is_a_plain_one(tmp_path, train_config, trained_twice):
    config = dataclasses.replace(train_config, registers=RegisterConfig(), parallel_heads=ParallelHeadsConfig(3))
    whole = checkpoint.newest(trained_twice(config, "model", "ema", "heads"))
    lines = [line for line in read_log(tmp_path / "whole") if "heads" in line]
    assert len(lines) == 10 and lines[-1]["heads"] < lines[0]["heads"]
    for line in lines:
        assert line["loss"] == pytest.approx((line["next_token"] + line["heads"]) / 2)
    plain = dataclasses.replace(config, parallel_heads=ParallelHeadsConfig())
    train(plain, tmp_path / "plain")
    assert checkpoint.read_weights(whole, "model").keys() == checkpoint.read_weights(
        checkpoint.newest(tmp_path / "plain"), "model").keys()  # fmt: skip
    with pytest.raises(MismatchError, match="parallel_heads.count: 3 -> 1"):
        train(plain, tmp_path / "whole")


@pytest.mark.parametrize(
    "settings, named",
    [
        (["parallel_heads=0"], "parallel_heads.count is 0"),
        (["parallel_heads=2", "init=run", "lora_rank=2"], "parallel_heads has weights of its own and lora_rank is 2"),
        (["parallel_heads=2", "registers.weight=0.3"], "no registers; the weight of parallel heads"),
        (["parallel_heads=2", "registers.kind=2d", "registers.count=4", "registers.weight=0.6"], "are 0.6 and 0.5"),
    ],
)
@pytest.mark.bad_input("settings")
def test_heads_are_refused_where_they_make_no_sense(settings, named):
    with pytest.raises(UserError, match=named):
        override(TrainConfig(codes="codes"), settings)


def test_heads_and_registers_train_together(tmp_path, train_config):
    """Each loss is reported, the next token keeps the rest of the weight, and the heads do not see the registers."""
    heads = ParallelHeadsConfig(2, weight=0.25)
    config = dataclasses.replace(train_config, registers=RegisterConfig("2d", 6), parallel_heads=heads, steps=3)
    train(config, tmp_path / "run")
    line = [line for line in read_log(tmp_path / "run") if "loss" in line][0]
    expected = 0.25 * line["next_token"] + 0.5 * line["register"] + 0.25 * line["heads"]
    assert line["loss"] == pytest.approx(expected)
    scores = [line for line in read_log(tmp_path / "run") if "val_loss" in line][-1]
    assert "val_register" in scores and "val_heads" not in scores


def test_a_setting_or_a_file_may_still_call_the_number_of_heads_parallel_heads(train_config):
    """So did files of format 2, in which the registers' weight was the heads' as well."""
    assert (
        override(train_config, ["registers.kind=none", "registers.count=0", "parallel_heads=3"]).parallel_heads.count
        == 3
    )
    values = to_dict(dataclasses.replace(train_config, registers=RegisterConfig(weight=0.3, weight_schedule="linear")))
    found = from_dict(TrainConfig, values | {"parallel_heads": 4}, format=2)
    assert found.parallel_heads == ParallelHeadsConfig(4, 0.3, "linear") and found.registers == RegisterConfig()
    plain = from_dict(TrainConfig, values | {"parallel_heads": 1}, format=2)
    assert plain.parallel_heads == ParallelHeadsConfig() and plain.registers.weight == 0.3


def test_the_weight_of_registers_falls_to_zero_at_the_last_step(tmp_path, train_config):
    registers = RegisterConfig("2d", 6, weight_schedule="linear")
    assert [registers.weight_at(step, 5) for step in range(5)] == [0.5, 0.375, 0.25, 0.125, 0.0]
    assert RegisterConfig("2d", 6).weight_at(4, 5) == 0.5
    config = dataclasses.replace(train_config, registers=registers, steps=5)
    train(config, tmp_path / "run")
    last = [line for line in read_log(tmp_path / "run") if "loss" in line][-1]
    assert last["loss"] == last["next_token"] != last["register"]
    with pytest.raises(MismatchError, match="steps: 5 -> 6"):
        train(dataclasses.replace(config, steps=6), tmp_path / "run")
