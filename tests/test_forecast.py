"""Forecast and check draws the very codes that one token after another draws, in fewer passes."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from mutor_vision.config import RegisterConfig, TrainConfig, TransformerConfig
from mutor_vision.errors import UserError
from mutor_vision.model.transformer import Transformer
from mutor_vision.runtime import Runtime
from mutor_vision.sampling.decode import Plain
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.forecast import Either, Forecast, most_drafts
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.load import Decoding, load

LABELS = torch.arange(16) % 5
SETTINGS = {
    "unguided": {"cfg_scale": 1.0},
    "guided": {},
    "power-cosine": {"cfg_schedule": "power-cosine"},
    "an interval": {"cfg_scale": 3.0, "cfg_interval": (2, 7)},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "greedy": {"temperature": 0},
}


def codes(model, settings, decoder=None, rows=slice(None), **options):
    return generate(model, LABELS[rows], SampleSettings(**settings), seed=0, indices=np.arange(16)[rows],
                    decoder=decoder, **options)  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_codes_are_those_of_one_token_after_another(random_model, settings):
    """In float64, to the last one, whatever the window, the number of registers and the batch."""
    model = random_model.double()
    expected = codes(model, settings)
    for window, drafts, batch in itertools.product((1, 4, 16), (0, 2, 3), (1, 3, 16)):
        forecast = Forecast(window, drafts)
        got = codes(model, settings, forecast, slice(batch))
        assert torch.equal(got, expected[:batch]), (window, drafts, batch)
        assert forecast.tokens == 16 * batch and batch * -(-15 // window + -1) <= forecast.passes <= 16 * batch
    if settings != SETTINGS["greedy"]:
        assert forecast.tokens / forecast.passes > 1.3


def test_guesses_behind_the_grid_and_wider_than_it_do_no_harm():
    """Grids that are no square, windows longer than a row and than the image."""
    torch.manual_seed(0)
    for grid in ((2, 5), (5, 2), (1, 3), (1, 1)):
        model = Transformer(TransformerConfig(2, 4, 64, 32, 5, grid, 0.0, 0.0, 0.0)).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        expected = codes(model, {})
        for window, drafts in ((3, 0), (7, 2), (20, 3)):
            assert torch.equal(codes(model, {}, Forecast(window, drafts)), expected), (grid, window, drafts)
        assert torch.equal(codes(model, {}, Forecast(3, 2), num_tokens=1), expected.flatten(1)[:, :1])


def test_the_passes_of_a_batch_are_those_of_its_images(random_model):
    """An image takes part in as many passes as alone, whatever leaves the batch before it."""
    model, together, alone = random_model.double(), Forecast(4, 0), Forecast(4, 0)
    codes(model, {}, together)
    for i in range(16):
        codes(model, {}, alone, slice(i, i + 1))
    assert together.passes == alone.passes and together.tokens == alone.tokens == 16 * 16


def test_recorded_steps_serve_later_batches(random_model, monkeypatch):
    """As on a GPU: memory and steps stay for batches as large or smaller, and other settings replace them."""
    monkeypatch.setattr(Forecast, "REACH", 4)
    made = []
    forecast, model = Forecast(4, 2, record=lambda step: made.append(step) or step), random_model.double()
    for settings in ({}, {"cfg_scale": 3.0, "cfg_interval": (2, 7)}):
        expected, before = codes(model, settings), len(made)
        for size in (5, 16, 3, 16):
            assert torch.equal(codes(model, settings, forecast, slice(size)), expected[:size])
            if size == 16 and before:
                assert len(made) == before, "recorded again"
            before = len(made) if size == 16 else 0


def test_a_perfect_forecast_takes_one_pass_a_window():
    """Codes that do not depend on the ones before them: after a first pass every guess is right."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(1, 2, 32, 8, 5, (4, 4), 0.0, 0.0, 0.0)).eval()
    torch.nn.init.normal_(model.head.weight, std=1.0)
    torch.nn.init.zeros_(model.token_embedding.weight)
    torch.nn.init.zeros_(model.class_embedding.weight)
    forecast = Forecast(5, 0)
    assert torch.equal(codes(model, {}, forecast), codes(model, {}))
    # One pass of the class token; then a window that is found and confirmed at once moves on by five tokens a pass.
    assert forecast.passes <= 16 * (1 + 1 + 2 * 3)


@pytest.mark.slow
def test_the_law_is_the_models():
    """Codes of 200,000 images of two tokens, with guidance, against what the model says of every pair."""
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(1, 2, 16, 5, 2, (1, 2), 0.0, 0.0, 0.0)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    slots = torch.arange(2)[None]

    def probabilities(tokens):
        logits = [model(tokens, torch.full((len(tokens),), label), slots[:, : tokens.shape[1] + 1])[:, -1]
                  for label in (1, 2)]  # fmt: skip
        return (logits[1] + 2 * (logits[0] - logits[1])).double().softmax(-1)

    with torch.no_grad():
        first = probabilities(torch.empty(1, 0, dtype=torch.int64))[0]
        law = (first[:, None] * probabilities(torch.arange(5)[:, None])).flatten()
    count = 200_000
    drawn = generate(model, torch.ones(count, dtype=torch.int64), SampleSettings(), seed=0, indices=np.arange(count),
                     decoder=Forecast(2, 1))  # fmt: skip
    counts = (drawn.flatten(1) * torch.tensor([5, 1])).sum(1).bincount(minlength=25).double()
    from scipy.stats import chisquare

    assert chisquare(counts.numpy(), (law * count).numpy()).pvalue > 1e-3


def test_how_many_drafts_a_model_can_make():
    def most(registers):
        model = TransformerConfig(2, 2, 32, 32, 5, (4, 4))
        return most_drafts(TrainConfig(model=model, registers=registers))

    assert most(RegisterConfig()) == 0
    assert most(RegisterConfig("1d", 4, max_offset=4)) == 3
    assert most(RegisterConfig("2d", 4, max_offset=3)) == 1  # (1, 3); in a grid 4 wide (2, 1) is offset 4, not 3
    assert most(RegisterConfig("2d", 4, max_offset=4)) == 14  # rows follow without a gap


def test_the_command_draws_the_same_images_and_says_how(trained_run, tmp_path, monkeypatch):
    from mutor_vision.cli import main

    def sample(name, *arguments):
        monkeypatch.setattr("sys.argv", ["mutor", "sample", str(trained_run), "--num", "8", "--out",
                                         str(tmp_path / name), *arguments])  # fmt: skip
        main()
        return json.loads((tmp_path / f"{name}.json").read_text())["decoding"]

    assert sample("plain.npz", "--decode", "plain") == {"draw": "gumbel-max 1", "decode": "plain"}
    made = sample("forecast.npz", "--decode", "forecast", "--window", "4")
    assert made == {"draw": "gumbel-max 1", "decode": "forecast", "window": 4, "drafts": 2}
    assert 1 < json.loads((tmp_path / "forecast.npz.json").read_text())["tokens_per_pass"] <= 4
    images = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("plain", "forecast")]
    assert (images[0] == images[1]).mean() > 0.95, "float32: a near-tie may fall the other way"


def test_auto_forecasts_for_few_images_and_not_for_many(random_model):
    forecast, model = Forecast(4, 0), random_model.double()
    either = Either(forecast, Plain(), up_to=2)
    expected = codes(model, {})
    assert torch.equal(codes(model, {}, either), expected) and forecast.passes == 0
    assert torch.equal(codes(model, {}, either, slice(2)), expected[:2]) and forecast.passes > 0


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(window=0), "window is 0"), (dict(drafts=-2), "drafts -2"), (dict(decode="guess"), "decode is 'guess'"),
        (dict(compile="maybe"), "compile is 'maybe'"), (dict(decode="forecast", drafts=15), "expected at most 14"),
    ],
)  # fmt: skip
@pytest.mark.bad_input("settings")
def test_decodings_that_cannot_be_are_refused(trained_run, changes, named):
    with pytest.raises(UserError, match=named):
        load(trained_run, Runtime(0, 1, torch.device("cpu"), None), decoding=dataclasses.replace(Decoding(), **changes))
