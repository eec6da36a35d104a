import json

import pytest

from mutor_vision.config import TrainConfig, differences, from_dict, override, preset, to_dict
from mutor_vision.errors import UserError
from mutor_vision.presets import TOKENIZERS, TRANSFORMERS


@pytest.mark.parametrize("config", [*TRANSFORMERS.values(), *TOKENIZERS.values()])
def test_every_preset_survives_json(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_settings_are_read_by_their_field():
    config = override(TrainConfig(), ["lr=1e-3", "betas=0.8,0.9", "model.grid=8,4", "steps=7"])
    assert (config.lr, config.betas, config.model.grid, config.steps) == (1e-3, (0.8, 0.9), (8, 4), 7)
    config = override(TRANSFORMERS["digits-mutor-2d"], ["registers.self_attention=false", "registers.count=12"])
    assert config.registers.self_attention is False and config.registers.count == 12


@pytest.mark.parametrize(
    "setting, message",
    [
        ("leraning_rate=1", "unknown setting 'leraning_rate'"),
        ("ema_decy=1", "did you mean 'ema_decay'?"),
        ("registers.cuont=1", "did you mean 'registers.count'?"),
        ("max_ofset=1", "did you mean 'registers.max_offset'?"),
        ("steps", "has no '='"),
        ("steps=2.5", "steps is '2.5', expected a whole number"),
        ("steps=true", "expected a whole number"),
        ("lr=fast", "expected a finite number"),
        ("lr=nan", "expected a finite number"),
        ("lr=1e400", "expected a finite number"),
        ("betas=", "expected numbers with commas"),
        ("registers.self_attention=no", "expected true or false"),
        ("model=3", "unknown setting 'model'"),
    ],
)
def test_wrong_settings_name_what_is_right(setting, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?").replace(".", r"\.")):
        override(TrainConfig(), [setting])


def test_a_file_with_an_unknown_setting_is_refused():
    with pytest.raises(UserError, match="unknown setting 'model.rope'"):
        from_dict(TrainConfig, {"model": {"rope": 1}})


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'imagenet256-B-mutor-2d-80'"):
        preset(TRANSFORMERS, "imagenet256-B-mutor2d-80")


def test_differences_name_the_field_and_both_values():
    changed = override(TrainConfig(), ["lr=1e-3", "model.dim=384"])
    assert differences(TrainConfig(), changed) == ["model.dim: 768 -> 384", "lr: 0.0004 -> 0.001"]


def test_the_presets_are_the_published_recipes():
    paper = TRANSFORMERS["imagenet256-B-mutor-2d-80"]
    assert (paper.batch_size, paper.lr, paper.weight_decay, paper.betas, paper.steps) == (
        1024,
        4e-4,
        0.05,
        (0.9, 0.95),
        360_000,
    )
    assert (paper.registers.kind, paper.registers.count, paper.registers.max_offset, paper.registers.weight) == (
        "2d",
        80,
        4,
        0.5,
    )
    assert (paper.label_dropout, paper.clip, paper.schedule, paper.warmup_steps) == (0.1, 1.0, "constant", 0)
    llamagen = TRANSFORMERS["imagenet256-B-next-token-llamagen"]
    assert (llamagen.batch_size, llamagen.lr, llamagen.steps * 256 // 1_281_167) == (256, 1e-4, 299)
