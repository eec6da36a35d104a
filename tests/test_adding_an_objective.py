"""docs/adding-an-objective.md, run as it is written, and what the contract promises."""

import dataclasses
import importlib
import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from mutor_vision.commands.plan import plan
from mutor_vision.config import PrivateBlocksConfig, RegisterConfig, TrainConfig
from mutor_vision.objectives.auxiliary import Auxiliary, auxiliaries_of
from mutor_vision.objectives.objective import Objective, total_loss
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log


@pytest.fixture
def below(root, tmp_path, monkeypatch):
    """The page's code block as the module `below`."""
    code = re.search(r"```python\n(.*?)```", (root / "docs/adding-an-objective.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) < 60
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "below.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "module")
    yield importlib.import_module("below")
    del sys.modules["below"]


@pytest.fixture
def config(below, train_config):
    values = {each.name: getattr(train_config, each.name) for each in dataclasses.fields(train_config)}
    return below.BelowTrainConfig(**values | {"registers": RegisterConfig()}, below=below.BelowConfig(weight=0.5))


def test_the_example_trains_resumes_and_its_transformer_is_a_plain_one(config, trained_twice):
    run = trained_twice(config, "model", "ema", "below")
    lines = [line for line in read_log(run) if "below" in line]
    assert lines[-1]["below"] < lines[0]["below"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["next_token"] + 0.5 * line["below"])
    assert not any("below" in name for name in checkpoint.read_weights(checkpoint.newest(run), "model"))


def test_the_example_predicts_the_token_below(below, config, random_model):
    """A walk over cells: the state of token t, and the token in the next row of the same column."""
    config = dataclasses.replace(config, model=random_model.config)
    auxiliary = auxiliaries_of(config)[0]
    objective = Objective(random_model, [auxiliary])
    codes = torch.randint(32, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 4])
    sequence = objective.sequence(codes, seed=0, sample_index=None)
    hidden = random_model.hidden(codes.flatten(1)[:, :-1], labels, torch.arange(16)[None])
    expected, count = 0.0, 0
    for row in range(3):
        for column in range(4):
            logits = random_model.logits(auxiliary.mix(hidden[:, 4 * row + column + 1]))
            expected += F.cross_entropy(logits, codes[:, row + 1, column], reduction="sum").item()
            count += 3
    assert objective(labels, sequence)["below"].item() == pytest.approx(expected, rel=1e-5)
    assert objective.counts(sequence)["below"] == count
    values = plan("", dataclasses.replace(config, batch_size=8), "h100", 8, 0.4)
    alone = plan("", dataclasses.replace(config, batch_size=8, below=below.BelowConfig()), "h100", 8, 0.4)
    assert values["flops_per_image"]["head"] == alone["flops_per_image"]["head"] * (16 + 12) / 16


def test_the_pages_own_run(below, token_set_path, tmp_path, monkeypatch):
    presets = dict(below.TRANSFORMERS)
    small = dataclasses.replace(presets["digits-next-token"], batch_size=8, val_every=0)
    monkeypatch.setitem(below.TRANSFORMERS, "digits-next-token", small)
    below.run(str(token_set_path), tmp_path / "run", steps=3)
    assert (checkpoint.newest(tmp_path / "run") / "below.safetensors").is_file()
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["config"]["below"] == {"weight": 0.5, "weight_schedule": "constant"}


class Difference(Auxiliary):
    """A loss of two layers' states."""

    name, taps = "difference", ("blocks.0",)

    def count(self, sequence):
        return sequence.num_next_token_targets

    def forward(self, states, sequence, transformer):
        return (transformer.norm(states["blocks.0"]) - states["last"]).square().mean(-1).sum()


def test_taps_are_what_blocks_put_out_and_change_nothing_else(random_model):
    codes = torch.randint(32, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    labels, out = torch.tensor([0, 1, 4]), []
    random_model.blocks[0].register_forward_hook(lambda module, inputs, output: out.append(output))
    objective = Objective(random_model, [Difference(PrivateBlocksConfig(0.5), TrainConfig(model=random_model.config))])
    sequence = objective.sequence(codes, seed=0, sample_index=None)
    sums = objective(labels, sequence)
    plain = Objective(random_model)(labels, sequence)
    assert torch.equal(sums["next_token"], plain["next_token"])
    hidden = random_model.hidden(sequence.tokens, labels, sequence.positions)
    assert torch.equal(sums["difference"], (random_model.norm(out[0]) - hidden).square().mean(-1).sum())
    with pytest.raises(AssertionError, match="no such taps.*blocks.7"):
        random_model.states(sequence.tokens, labels, sequence.positions, taps=["blocks.7"])


def test_an_added_loss_leaves_the_next_tokens_weight_alone(random_model):
    objective = Objective(random_model, [Difference(PrivateBlocksConfig(0.5), TrainConfig(model=random_model.config))])
    assert objective.weights(0) == {"next_token": 1.0, "difference": 0.5}
    sums = {"next_token": torch.tensor(6.0), "difference": torch.tensor(8.0)}
    counts = {"next_token": torch.tensor(3), "difference": torch.tensor(4)}
    assert total_loss(sums, counts, objective.weights(0)) == 6 / 3 + 0.5 * 8 / 4
