import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mutor_vision.config import PrivateBlocksConfig, RegisterConfig, TrainConfig
from mutor_vision.objectives.objective import Objective
from mutor_vision.objectives.private_blocks import PrivateBlocks
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.training.loop import train

LABELS = torch.tensor([0, 1, 4])


def auxiliary_of(model_config, **settings):
    own = PrivateBlocksConfig(0.1, **settings)
    torch.manual_seed(1)
    return PrivateBlocks(own, TrainConfig(model=model_config, private_blocks=own))


def codes(seed=0):
    return torch.randint(32, (3, 4, 4), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("edge", ["wrap", "ignore"])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_each_head_predicts_its_cell_as_a_walk_over_the_grid_says(random_model, blocks, edge):
    """Rows and columns, an edge that is crossed or not, cells below the last row; the class's state is not used."""
    auxiliary = auxiliary_of(random_model.config, offsets="below 1,2", blocks=blocks, edge=edge)
    for parameter in auxiliary.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    objective = Objective(random_model, [auxiliary])
    sequence = objective.sequence(codes(), seed=0, sample_index=np.arange(3))
    last = random_model.hidden(codes().flatten(1)[:, :-1], LABELS, torch.arange(16)[None])
    sin, cos = random_model.rope[:, None, None, :16]
    expected, count = 0.0, 0
    for number, (rows, columns) in enumerate([(1, 0), (1, 2)]):
        x = last
        for block in auxiliary.blocks[number]:
            x = block(x, sin, cos, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        for row in range(4):
            for column in range(4):
                there = row + rows, column + columns
                if edge == "wrap":
                    there = divmod((row + rows) * 4 + column + columns, 4)
                if (row, column) != (3, 3) and there[0] < 4 and there[1] < 4:
                    logits = auxiliary.heads[number](x[:, 4 * row + column + 1])
                    expected += F.cross_entropy(logits, codes()[:, there[0], there[1]], reduction="sum").item()
                    count += 3
    assert objective(LABELS, sequence)["private_blocks"].item() == pytest.approx(expected, rel=1e-5)
    assert objective.counts(sequence)["private_blocks"] == count
    assert count == 3 * (12 + (10 if edge == "wrap" else 6))


def test_the_first_loss_is_that_of_a_guess(tiny_config, random_model):
    """Its unembedding is zero, whatever the model's is."""
    auxiliary = auxiliary_of(tiny_config)
    objective = Objective(random_model, [auxiliary])
    sequence = objective.sequence(codes(), seed=0, sample_index=np.arange(3))
    loss = objective(LABELS, sequence)["private_blocks"] / objective.counts(sequence)["private_blocks"]
    assert loss.item() == pytest.approx(np.log(32), rel=1e-6)
    assert not any("norm" in name for name in auxiliary.state_dict() if not name.startswith("blocks"))
    assert len(auxiliary.blocks[0]) == 2


def test_no_head_sees_what_it_predicts(random_model):
    auxiliary = auxiliary_of(random_model.config)
    inputs = codes().flatten(1)[:, :-1]
    changed = inputs.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 32  # x_8, the input of slot 8
    sin, cos = random_model.rope[:, None, None, :16]
    found = []
    from mutor_vision.model.attention import causal_attention

    with torch.no_grad():
        for tokens in (inputs, changed):
            x = random_model.hidden(tokens, LABELS, torch.arange(16)[None])
            for block in auxiliary.blocks[0]:
                x = block(x, sin, cos, causal_attention)
            found.append(x)
    assert torch.equal(found[0][:, :8], found[1][:, :8]) and (found[0][:, 8] != found[1][:, 8]).any()


def test_a_run_resumes_with_its_blocks_and_its_transformer_is_a_plain_one(tmp_path, train_config, trained_twice):
    config = dataclasses.replace(
        train_config, registers=RegisterConfig(), private_blocks=PrivateBlocksConfig(0.1, offsets="below right")
    )
    run = trained_twice(config, "model", "ema", "private_blocks")
    lines = [line for line in read_log(run) if "private_blocks" in line]
    assert lines[-1]["private_blocks"] < lines[0]["private_blocks"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["next_token"] + 0.1 * line["private_blocks"])
    plain = dataclasses.replace(config, private_blocks=PrivateBlocksConfig())
    train(plain, tmp_path / "plain")
    assert checkpoint.read_weights(checkpoint.newest(run), "model").keys() == checkpoint.read_weights(
        checkpoint.newest(tmp_path / "plain"), "model").keys()  # fmt: skip
