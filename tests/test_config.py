import dataclasses
import json
import math

import pytest

from mutor_vision.cli import choose_settings
from mutor_vision.config import RegisterConfig, TokenizerConfig, TokenizerTrainConfig, TrainConfig, TransformerConfig
from mutor_vision.errors import UserError
from mutor_vision.presets import TOKENIZERS, TRANSFORMERS
from mutor_vision.settings import differences, flat, from_dict, override, preset, to_dict


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
@pytest.mark.bad_input("settings")
def test_wrong_settings_name_what_is_right(setting, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?").replace(".", r"\.")):
        override(TrainConfig(), [setting])


def test_a_file_with_an_unknown_setting_is_refused():
    with pytest.raises(UserError, match="unknown setting 'model.rope'"):
        from_dict(TrainConfig, {"model": {"rope": 1}})


WRONG = [  # configuration, dotted name, value, what the message ends with
    (TrainConfig, "steps", "abc", "steps is 'abc', expected a whole number"),
    (TrainConfig, "steps", 2.5, "steps is 2.5, expected a whole number"),
    (TrainConfig, "steps", True, "steps is True, expected a whole number"),
    (TrainConfig, "steps", None, "steps is None, expected a whole number"),
    (TrainConfig, "steps", 0, "steps is 0, expected more than 0"),
    (TrainConfig, "lr", "fast", "lr is 'fast', expected a finite number"),
    (TrainConfig, "lr", math.nan, "lr is nan, expected a finite number"),
    (TrainConfig, "lr", math.inf, "lr is inf, expected a finite number"),
    (TrainConfig, "lr", False, "lr is False, expected a finite number"),
    (TrainConfig, "lr", 10**400, "expected a finite number"),
    (TrainConfig, "betas", 0.9, "betas is 0.9, expected numbers with commas, 2 of them"),
    (TrainConfig, "betas", (0.9,), "betas is (0.9,), expected numbers with commas, 2 of them"),
    (TrainConfig, "betas", (0.9, 1.0), "betas is (0.9, 1.0), expected two numbers of at least 0, below 1"),
    (TrainConfig, "codes", 3, "codes is 3, expected text"),
    (TrainConfig, "keep", 1, "keep is 1, expected 2 or more"),
    (TrainConfig, "schedule", "step", "schedule is 'step', expected constant or cosine"),
    (TrainConfig, "compile", "maybe", "compile is 'maybe', expected auto, on or off"),
    (TrainConfig, "micro_batch", -1, "micro_batch is -1, expected 0 or more"),
    (TrainConfig, "activation_checkpointing", 1, "activation_checkpointing is 1, expected true or false"),
    (TrainConfig, "model.grid", 16, "model.grid is 16, expected whole numbers with commas, 2 of them"),
    (TrainConfig, "model.grid", (16, 16, 16), "model.grid is (16, 16, 16), expected whole numbers"),
    (TrainConfig, "model.grid", (16, 0), "model.grid is (16, 0), expected two positive numbers, or 0,0"),
    (TrainConfig, "model.heads", 0, "model.heads is 0, expected more than 0"),
    (TrainConfig, "model.layers", -2, "model.layers is -2, expected more than 0"),
    (TrainConfig, "model.ffn_dropout", 1.0, "model.ffn_dropout is 1.0, expected at least 0 and below 1"),
    (TrainConfig, "registers.edge", "cut", "registers.edge is 'cut', expected wrap or ignore"),
    (TrainConfig, "registers.weight", "half", "registers.weight is 'half', expected a finite number"),
    (TokenizerTrainConfig, "model.channels", (), "model.channels is (), expected whole numbers with commas"),
    (TokenizerTrainConfig, "model.channels", (64, 100), "model.channels has 100, expected multiples of"),
    (TokenizerTrainConfig, "model.l2_norm", "yes", "model.l2_norm is 'yes', expected true or false"),
    (TokenizerTrainConfig, "min_crop_scale", 0.0, "min_crop_scale is 0.0, expected 0.05 to 1"),
    (TokenizerTrainConfig, "val_every", -5, "val_every is -5, expected 0 or more"),
]  # fmt: skip


@pytest.mark.parametrize("kind, name, value, message", WRONG, ids=lambda x: x if isinstance(x, str) else None)
@pytest.mark.bad_input("settings")
def test_a_wrong_value_is_refused_whichever_way_it_comes(kind, name, value, message):
    values = to_dict(kind())
    *path, leaf = name.split(".")
    parent = values[path[0]] if path else values
    parent[leaf] = list(value) if isinstance(value, tuple) else value
    part = {("model", TrainConfig): TransformerConfig, ("registers", TrainConfig): RegisterConfig,
            ("model", TokenizerTrainConfig): TokenizerConfig}[path[0], kind] if path else kind  # fmt: skip
    for way in (lambda: part(**{leaf: value}), lambda: dataclasses.replace(part(), **{leaf: value}),
                lambda: from_dict(kind, values)):  # fmt: skip
        with pytest.raises(UserError) as raised:
            way()
        assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("setting", ["steps=abc", "steps=2.5", "steps=True", "steps=0", "lr=inf", "betas=0.9", "keep=1",
                                     "betas=0.9,1.0", "schedule=step", "model.grid=16", "model.grid=16,0",
                                     "model.grid=16,16,16", "model.heads=0", "model.ffn_dropout=1.0",
                                     "registers.edge=cut", "registers.weight=half",
                                     "activation_checkpointing=1"])  # fmt: skip
@pytest.mark.bad_input("settings")
def test_set_refuses_the_same(setting):
    name, _, text = setting.partition("=")
    with pytest.raises(UserError, match=f"^{name} is .*{text.replace(',', '.*')}.*, expected "):
        override(TrainConfig(), [setting])


def test_settings_that_belong_together_may_come_in_any_order():
    base = TRANSFORMERS["imagenet256-B-next-token"]
    for settings in (["registers.kind=2d", "registers.count=80"], ["registers.count=80", "registers.kind=2d"]):
        assert override(base, settings).registers == RegisterConfig("2d", 80)
    assert override(base, ["model.dim=100", "model.heads=5"]).model.head_dim == 20
    assert override(base, ["lora_rank=8"], init="base").lora_rank == 8


def test_a_missing_setting_is_an_error():
    for name in ("steps", "model.rope_base", "registers.kind", "parallel_heads.count"):
        values = to_dict(TrainConfig())
        *path, leaf = name.split(".")
        del (values[path[0]] if path else values)[leaf]
        with pytest.raises(UserError, match=f"setting '{name}' is missing"):
            from_dict(TrainConfig, values)
    for values in (None, [], "text", 3):
        with pytest.raises(UserError, match="expected an object"):
            from_dict(TrainConfig, values)


@pytest.mark.parametrize("kind", [TrainConfig, TokenizerTrainConfig])
def test_what_a_file_of_format_1_lacks_keeps_the_meaning_it_had(kind):
    """It comes from a table of then, not from the defaults of today."""
    values, absent = (
        to_dict(kind()),
        {name: value for absent in kind._absent_in.values() for name, value in absent.items()},
    )
    for name in absent:
        *path, leaf = name.split(".")
        del (values[path[0]] if path else values)[leaf]
    found = flat(to_dict(from_dict(kind, values, format=1)))
    assert {name: found[name] for name in absent} == absent
    with pytest.raises(UserError, match="is missing"):
        from_dict(kind, values)
    del values["lr"]  # every file of format 1 has it
    with pytest.raises(UserError, match="setting 'lr' is missing"):
        from_dict(kind, values, format=1)


def test_a_file_of_format_1_with_every_field_is_read_as_it_is():
    for config in (TRANSFORMERS["own-mutor-2d-80"], TOKENIZERS["digits"]):
        assert from_dict(type(config), to_dict(config), format=1) == config


def test_flags_and_set_have_one_precedence():
    choose = lambda *settings, **flags: choose_settings(TRANSFORMERS, "digits-mutor-2d", settings, **flags)  # noqa: E731
    assert choose("val_codes=a", codes="c", val_codes=None).val_codes == "a"
    assert choose(codes="c", val_codes="b").val_codes == "b"
    assert choose("steps=30", "codes=c", codes="c", steps=30).steps == 30  # the same twice is no contradiction
    for settings, flags, message in (
        (["codes=a"], {"codes": "b"}, "--codes b and --set codes=a contradict each other"),
        (["steps=30"], {"steps": 40}, "--steps 40 and --set steps=30 contradict"),
        (["val_codes="], {"val_codes": "b"}, "--val-codes b and --set val_codes= contradict"),
    ):
        with pytest.raises(UserError, match=message):
            choose(*settings, **flags)


def test_a_run_shorter_than_the_presets_warm_up_shortens_it_and_says_so(capsys):
    for presets, name in ((TRANSFORMERS, "tiny-imagenet-mutor-2d"), (TOKENIZERS, "tiny-imagenet")):
        config = choose_settings(presets, name, [], steps=3)
        assert (config.steps, config.warmup_steps) == (3, 3)
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and "warm-up shortened" in printed.err
        assert choose_settings(presets, name, ["steps=1000"]).warmup_steps == presets[name].warmup_steps
        assert choose_settings(presets, name, ["warmup_steps=9"], steps=3).warmup_steps == 9  # training refuses it
        assert capsys.readouterr().err == ""


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
