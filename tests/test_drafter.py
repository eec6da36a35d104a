"""An adapter that is active at registers alone: the model stays as it is, and its images come in fewer passes."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from mutor_vision.cli import main
from mutor_vision.config import RegisterConfig, TrainConfig, TransformerConfig
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.model import lora
from mutor_vision.model.drafter import Gate, GatedLinear, add_drafter
from mutor_vision.model.prepare import prepare
from mutor_vision.model.transformer import Transformer, num_parameters
from mutor_vision.objectives.registers import add_registers
from mutor_vision.objectives.sequence import next_token_sequence
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.forecast import Forecast
from mutor_vision.sampling.generate import generate
from mutor_vision.storage import checkpoint
from mutor_vision.training.loop import train

REGISTERS = RegisterConfig("1d", 16, max_offset=3, next_token=False, offset_per="register", weight=1.0)
CODES = torch.randint(32, (3, 4, 4), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 4, 5])


def with_drafter(model, seed=1):
    """The same weights with a drafter whose numbers are random, so that it does something."""
    drafted = Transformer(model.config).to(next(model.parameters()).dtype)
    drafted.load_state_dict(model.state_dict())
    add_drafter(drafted, 2, 16.0)
    torch.manual_seed(seed)
    for parameter in drafted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return drafted.eval()


def logits_of(model):
    """(3, 32, V): 16 regular inputs and 16 registers."""
    indices = np.arange(3)
    sequence = add_registers(next_token_sequence(CODES), CODES, REGISTERS, register_token=32, seed=0,
                             sample_index=indices)  # fmt: skip
    with torch.no_grad():
        return model.eval()(sequence.tokens, LABELS, sequence.positions, sequence.pattern)


def test_regular_logits_keep_their_bits_and_registers_do_not(random_model):
    before, after = logits_of(random_model), logits_of(with_drafter(random_model))
    assert torch.equal(before[:, :16], after[:, :16])
    assert (before[:, 16:] != after[:, 16:]).float().mean() > 0.99


def test_an_untrained_drafter_changes_nothing_at_all(random_model):
    before = logits_of(random_model)
    add_drafter(random_model, 2, 16.0)
    assert torch.equal(before, logits_of(random_model))


def test_registers_see_the_matrix_with_its_low_rank_part():
    torch.manual_seed(0)
    base, gate = torch.nn.Linear(6, 5, bias=False), Gate()
    layer, x = GatedLinear(base, 2, 3.0, gate), torch.randn(2, 7, 6)
    torch.nn.init.normal_(layer.draft_up.weight)
    gate.registers = 3
    whole = base.weight + 3.0 * layer.draft_up.weight @ layer.draft_down.weight
    assert torch.equal(layer(x)[:, :4], base(x)[:, :4]) and torch.allclose(
        layer(x)[:, 4:], x[:, 4:] @ whole.T, atol=1e-6
    )


def test_the_codes_are_the_models_own(random_model):
    """Plain and forecast decoding with the drafter, in float64 to the last code."""
    model = random_model.double()
    drafted = with_drafter(model)
    for settings in ({}, {"cfg_scale": 1.0}, {"cfg_scale": 3.0, "cfg_interval": (2, 7)}):
        expected = generate(model, LABELS % 5, SampleSettings(**settings), seed=0, indices=np.arange(3))
        for decoder in (None, Forecast(4, 2), Forecast(1, 2)):
            got = generate(
                drafted, LABELS % 5, SampleSettings(**settings), seed=0, indices=np.arange(3), decoder=decoder
            )
            assert torch.equal(got, expected)


def test_it_is_packed_like_the_model(random_model):
    drafted = with_drafter(random_model)
    expected = logits_of(drafted)
    assert torch.allclose(logits_of(prepare(drafted, None)), expected, atol=1e-4)


def test_it_is_under_two_percent_of_gpt_b():
    with torch.device("meta"):
        model = Transformer(TransformerConfig(vocab_size=16384, num_classes=1000, grid=(16, 16)))
    whole = num_parameters(model)
    add_drafter(model, 8, 16.0)
    own = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0.005 < own / whole < 0.02


@pytest.fixture(scope="module")
def config(train_config, trained_run):
    """For a drafter of trained_run: 10 steps."""
    return dataclasses.replace(
        train_config, init=str(trained_run), lora_rank=2, lora_inputs="registers", registers=REGISTERS
    )


@pytest.fixture(scope="module")
def drafter(tmp_path_factory, config):
    out = tmp_path_factory.mktemp("drafter") / "run"
    train(config, out)
    return out


def test_training_leaves_the_base_as_it_is_and_keeps_only_the_drafter(trained_run, drafter, config):
    merged = lora.load_merged(trained_run, drafter)
    base = checkpoint.read_weights(checkpoint.resolve(trained_run), "ema")
    frozen = {name.replace(".base", ""): tensor for name, tensor in merged.transformer.state_dict().items()
              if ".draft_" not in name}  # fmt: skip
    assert frozen.keys() == base.keys()
    assert all(frozen[name].numpy().tobytes() == base[name].numpy().tobytes() for name in base)
    kept = checkpoint.read_weights(checkpoint.resolve(drafter), "ema")
    assert kept and all(".draft_" in name for name in kept)
    assert any(tensor.abs().max() > 0 for name, tensor in kept.items() if "draft_up" in name), "it learnt something"


def test_a_run_continues_to_the_same_bits(tmp_path, drafter, config):
    train(dataclasses.replace(config, steps=5), tmp_path / "run")
    train(config, tmp_path / "run")
    whole, halves = (checkpoint.read_weights(checkpoint.resolve(run), "ema") for run in (drafter, tmp_path / "run"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_command_samples_with_it_the_images_of_the_base(trained_run, drafter, tmp_path, monkeypatch):
    def sample(name, *arguments):
        monkeypatch.setattr("sys.argv", ["mutor", "sample", str(trained_run), "--num", "6", "--out",
                                         str(tmp_path / name), *arguments])  # fmt: skip
        main()
        return np.load(tmp_path / name)["arr_0"], json.loads((tmp_path / f"{name}.json").read_text())

    plain, _ = sample("plain.npz", "--decode", "plain")
    drafted, record = sample("drafted.npz", "--adapter", str(drafter), "--decode", "forecast")
    assert (plain == drafted).mean() > 0.95, "float32: a near-tie may fall the other way"
    assert record["decoding"]["drafts"] == 2 and "base" in record["model"]


@pytest.mark.bad_input("settings")
def test_what_makes_no_drafter_is_refused(trained_run, drafter, config, tmp_path):
    with pytest.raises(UserError, match="cannot become part of the model"):
        lora.merge(trained_run, drafter, tmp_path / "merged")
    with pytest.raises(UserError, match="lora_inputs is 'registers' and there are none"):
        dataclasses.replace(config, registers=RegisterConfig())
    with pytest.raises(UserError, match="give --init RUN --set lora_rank=8"):
        train(dataclasses.replace(config, lora_rank=0), tmp_path / "run")
    other = TransformerConfig(2, 2, 32, 32, 7, (4, 4))
    weights = {"model": Transformer(other).state_dict()}
    checkpoint.save(tmp_path / "seven", 0, "transformer", TrainConfig(model=other, ema_decay=0.0), weights, {}, keep=2)
    with pytest.raises(MismatchError, match="has 7 classes, the token set 5"):
        train(dataclasses.replace(config, init=str(tmp_path / "seven")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
