import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch

from mutor_vision.config import RegisterConfig, TransformerConfig
from mutor_vision.data.order import SampleOrder, read_batch, split
from mutor_vision.data.token_set import TokenSet
from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.schedule import due, learning_rate
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.training.loop import train

NO_DROPOUT = TransformerConfig(layers=2, heads=2, dim=32, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)


def losses(run):
    return [line["loss"] for line in read_log(run) if "loss" in line]


def state_of(run):
    """Every tensor of the newest checkpoint: weights, EMA, optimizer moments."""
    folder = checkpoint.newest(run)
    tensors = {f"{name}/{key}": value for name in checkpoint.weight_names(folder)
               for key, value in checkpoint.read_weights(folder, name).items()}  # fmt: skip
    moments = checkpoint.read_training_state(folder)["optimizer"]["state"]
    return tensors | {f"{i}/{k}": v for i, state in moments.items() for k, v in state.items()}


def assert_same_state(run, other):
    first, second = state_of(run), state_of(other)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("registers", [RegisterConfig(), RegisterConfig("1d", 16), RegisterConfig("2d", 16)])
def test_every_objective_learns(tmp_path, train_config, registers):
    train(dataclasses.replace(train_config, registers=registers, steps=60, lr=1e-2), tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert curve[0] == pytest.approx(math.log(32), rel=1e-3)
    assert np.mean(curve[-5:]) < 0.8 * curve[0]
    scores = [line for line in read_log(tmp_path / "run") if "val_next_token" in line][-1]
    assert scores["val_next_token"] < math.log(32)
    assert ("val_register" in scores) == (registers.count > 0)


@pytest.mark.parametrize("cuts", [[1], [5], [7], [3, 6, 8]], ids=str)
def test_resume_equals_uninterrupted_bit_for_bit(tmp_path, train_config, trained_run, cuts):
    for steps in [*cuts, 10]:
        train(dataclasses.replace(train_config, steps=steps), tmp_path / "run")
    assert [line["step"] for line in read_log(tmp_path / "run") if "loss" in line] == list(range(1, 11))
    assert losses(tmp_path / "run") == losses(trained_run)
    assert_same_state(tmp_path / "run", trained_run)


def test_lines_beyond_the_checkpoint_are_written_once(tmp_path, train_config, trained_run):
    """A process killed after step 7 with its last checkpoint at step 5 leaves two lines that the next one repeats."""
    train(dataclasses.replace(train_config, steps=5), tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write(
            json.dumps({"step": 6, "loss": 9.0}) + "\n" + json.dumps({"step": 7, "loss": 9.0}) + '\n{"step": 8, "lo'
        )
    train(train_config, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(trained_run)


def test_a_finished_run_is_left_as_it_is(tmp_path, train_config):
    train(dataclasses.replace(train_config, steps=2), tmp_path / "run")
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    train(dataclasses.replace(train_config, steps=2), tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_accumulation_equals_the_large_batch(tmp_path, train_config):
    config = dataclasses.replace(train_config, model=NO_DROPOUT)
    train(config, tmp_path / "whole")
    for micro_batch in (4, 5):
        train(dataclasses.replace(config, micro_batch=micro_batch), tmp_path / f"{micro_batch}")
        assert losses(tmp_path / f"{micro_batch}") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize("registers", [RegisterConfig(), RegisterConfig("2d", 16)], ids=["next-token", "mutor-2d"])
def test_two_processes_train_to_the_loss_curve_of_one(tmp_path, forked, train_config, registers):
    """With a register at every slot the two processes have different numbers of targets in each batch."""
    config = dataclasses.replace(train_config, model=NO_DROPOUT, registers=registers)
    train(config, tmp_path / "one")
    preset = "digits-mutor-2d" if registers.count else "digits-next-token"
    values = {f"model.{name}": value for name, value in dataclasses.asdict(NO_DROPOUT).items() if value}
    values |= {f"model.{name}_dropout": 0.0 for name in ("token", "residual", "ffn")}
    values |= {"registers.count": 16} if registers.count else {}
    values |= {name: getattr(config, name) for name in (
        "val_fraction", "val_images", "batch_size", "lr", "ema_decay", "log_every", "val_every", "save_every",
        "sample_every", "warmup_steps", "schedule")}  # fmt: skip
    settings = [f"{name}={value}" for name, value in values.items()]
    words = ["--preset", preset, "--codes", config.codes, "--out", tmp_path / "two", "--steps", 10]
    result = forked(
        "train/imagenet.py", *words, *(part for setting in settings for part in ("--set", setting)), ranks=2
    )
    assert result.code == 0, result.out[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for name in ("val_next_token", "val_next_token_ema"):
        one, two = ([line[name] for line in read_log(tmp_path / run) if name in line] for run in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5)


def test_label_dropout_hits_its_share_and_depends_on_the_sample_alone(token_set_path):
    token_set = TokenSet.open(token_set_path)
    order = SampleOrder(np.arange(60), seed=0)

    def batch(step, rank=0, world_size=1):
        return read_batch(token_set, order, step=step, batch_size=60, rank=rank, world_size=world_size,
                          label_dropout=0.1, device=torch.device("cpu"))  # fmt: skip

    dropped = np.mean([(batch(step).labels == 5).float().mean() for step in range(100)])
    assert 0.08 < dropped < 0.12
    halves = [batch(3, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.stack([half.codes for half in halves], dim=1).flatten(0, 1), batch(3).codes)
    assert torch.equal(torch.stack([half.labels for half in halves], dim=1).flatten(), batch(3).labels)


def test_every_image_once_per_epoch_in_another_order():
    order = SampleOrder(np.arange(100, 130), seed=0)
    epochs = [order.image_of(np.arange(30 * e, 30 * e + 30)).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(100, 130)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    across = order.image_of(np.arange(25, 35)).tolist()
    assert across == epochs[0][25:] + epochs[1][:5]


def test_held_out_images_are_never_trained_on(token_set_path):
    training, held_out = split(TokenSet.open(token_set_path), 0.2)
    assert len(held_out) == 12 and not set(training) & set(held_out) and len(training) == 48


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_is_of_all_classes_and_the_same_for_every_seed(tmp_path, train_config, token_set_path, monkeypatch,
                                                                  seed):  # fmt: skip
    """Real sets are listed class by class: the first images would be of the first class."""
    from mutor_vision.training import loop as train_loop

    scored = []
    monkeypatch.setattr(train_loop, "validate", lambda model, codes, images, *rest: scored.append(images) or {})
    config = dataclasses.replace(train_config, val_codes=str(token_set_path), val_fraction=0.0, val_images=30, steps=1,
                                 seed=seed)  # fmt: skip
    train(config, tmp_path / "run")
    labels = TokenSet.open(token_set_path).labels.numpy()
    assert len(np.unique(scored[0])) == 30 and np.array_equal(scored[0], scored[1])
    share = np.bincount(labels[scored[0]], minlength=5) / np.bincount(labels)
    assert (share > 0.2).all() and (share < 0.8).all()
    train(dataclasses.replace(config, seed=7), tmp_path / "another seed")
    assert np.array_equal(scored[0], scored[2])


def test_due_is_every_so_many_steps_and_the_last_and_0_is_never():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, 20, 10)] == [10]
    assert not any(due(step, 0, 10) for step in range(1, 11))


def test_learning_rate_schedules():
    constant = [learning_rate(s, schedule="constant", lr=1.0, steps=10, warmup_steps=4) for s in range(6)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = [learning_rate(s, schedule="cosine", lr=1.0, steps=4, min_lr=0.2) for s in range(5)]
    assert cosine == pytest.approx(
        [1.0, 0.6 + 0.4 * math.cos(math.pi / 4), 0.6, 0.6 - 0.4 * math.cos(math.pi / 4), 0.2]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lr=1e-4), "lr: 0.003 -> 0.0001"),
        (dict(seed=1), "seed: 0 -> 1"),
        (dict(registers=RegisterConfig("2d", 7)), "registers.count: 6 -> 7"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(tmp_path, train_config, trained_run, change, message):
    with pytest.raises(MismatchError, match=message):
        train(dataclasses.replace(train_config, **change), trained_run)


def test_a_run_is_not_continued_on_another_token_set(
    tmp_path, train_config, trained_run, tiny_tokenizer_path, write_token_set
):
    other = write_token_set(tmp_path / "other", tiny_tokenizer_path, 60, seed=1)
    with pytest.raises(MismatchError, match="token set"):
        train(dataclasses.replace(train_config, codes=str(other)), trained_run)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(batch_size=1000), "48 training images"),
        (dict(steps=0), "steps is 0"),
        (dict(lr=-1.0), "lr is -1"),
        (dict(schedule="step"), "constant or cosine"),
        (dict(keep=1), "keep is 1"),
        (dict(warmup_steps=11), "warmup_steps is 11"),
        (dict(micro_batch=13), "micro_batch is 13"),
        (dict(label_dropout=1.0), "label_dropout"),
        (dict(precision="float8"), "float8"),
        (dict(parallel="zero"), "parallel is 'zero', expected ddp or fsdp"),
        (dict(parallel="fsdp", lora_rank=4), "do not go together"),
        (dict(registers=RegisterConfig("2d", 17)), "4x4 grid has 16 slots"),
        (dict(model=TransformerConfig(2, 2, 32, vocab_size=64)), "model.vocab_size is 64, but the token set"),
        (dict(model=TransformerConfig(2, 2, 32, grid=(8, 8))), "model.grid"),
    ],
)
@pytest.mark.bad_input("settings")
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, train_config, change, message):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(train_config, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_stepped_over(tmp_path, train_config, trained_run, capsys):
    """One flipped bit in the newest checkpoint: the run continues from the one before, to the same end."""
    train(train_config, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-0000010" / "ema.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="is damaged"):
        checkpoint.verify(path.parent)
    train(train_config, tmp_path / "run")
    assert "stepping over" in capsys.readouterr().out
    assert_same_state(tmp_path / "run", trained_run)


def test_a_diverging_run_stops_and_says_so(tmp_path, train_config):
    with pytest.raises(UserError, match="diverged.*lower lr"):
        train(dataclasses.replace(train_config, lr=1e30, clip=0.0), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert checkpoint.newest(tmp_path / "run") is None


def test_weights_that_are_not_finite_are_never_saved(tmp_path, train_config, monkeypatch):
    """Nothing is logged, so that nothing but the check before saving can see it."""
    from mutor_vision.training import step as train_step

    rate = train_step.learning_rate
    monkeypatch.setattr(train_step, "learning_rate", lambda step, **k: 1e38 if step >= 4 else rate(step, **k))
    config = dataclasses.replace(train_config, save_every=1, log_every=0, val_every=0, clip=0.0)
    with pytest.raises(UserError, match="not finite.*lower lr"):
        train(config, tmp_path / "run")
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) == 2 and all(tensor.isfinite().all() for tensor in state_of(tmp_path / "run").values())
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == checkpoint.step_of(kept[-1]) + 1


def test_whatever_ends_a_run_is_in_its_status(tmp_path, train_config, monkeypatch):
    from mutor_vision.training import loop as train_loop

    def broken(*arguments, **settings):
        raise RuntimeError("the cable\nwas pulled")

    monkeypatch.setattr(train_loop, "validate", broken)
    with pytest.raises(RuntimeError):
        train(train_config, tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 5)
    assert status["reason"] == "RuntimeError: the cable was pulled"


def files_of(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_keeps_its_log(tmp_path, train_config, trained_run):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    for path in run.glob("checkpoints/*/ema.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    before = files_of(run)
    with pytest.raises(IntegrityError, match="no checkpoint is whole, 2 damaged"):
        train(train_config, run)
    assert files_of(run) == before
    shutil.rmtree(run / "checkpoints")
    before = files_of(run)
    with pytest.raises(IntegrityError, match="had a checkpoint of step 10 and has none now"):
        train(train_config, run)
    assert files_of(run) == before


def test_training_does_not_begin_in_what_is_no_run(tmp_path, train_config, trained_run, token_set_path,
                                                   tiny_tokenizer_path):  # fmt: skip
    (tmp_path / "file").write_text("")
    (tmp_path / "pictures" / "ant").mkdir(parents=True)
    (tmp_path / "pictures" / "ant" / "0.png").write_text("")
    checkpoint.export(trained_run, tmp_path / "exported")
    shutil.copytree(checkpoint.newest(trained_run), tmp_path / "step-0000010")
    for out, message in (
        (token_set_path, "not empty and no transformer run"),
        (tiny_tokenizer_path, "holds a tokenizer, expected a transformer"),
        (token_set_path / "tokenizer", "holds a tokenizer, expected a transformer"),
        (tmp_path / "pictures", "not empty and no transformer run"),
        (tmp_path / "exported", "an exported model, expected a run directory"),
        (tmp_path / "step-0000010", "a checkpoint or an exported model"),
        (tmp_path / "file", "is a file, expected a folder"),
    ):
        before = files_of(out)
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(train_config, steps=1), out)
        assert files_of(out) == before and out.exists()


def test_a_start_that_was_killed_is_started_again(tmp_path, train_config):
    """A process killed in its first moments leaves an empty folder, a half-written file, or a configuration."""
    for name, file in (("empty", None), ("partial", ".config.json.partial"), ("begun", "config.json")):
        out = tmp_path / name
        out.mkdir()
        if name == "begun":
            checkpoint.write_config(out, "transformer", train_config)
        elif file:
            (out / file).write_text("{")
        train(dataclasses.replace(train_config, steps=1), out)
        assert checkpoint.newest(out).name == "step-0000001"


def test_two_checkpoints_are_kept(tmp_path, train_config):
    train(dataclasses.replace(train_config, save_every=2), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-0000008", "step-0000010"]


def test_training_writes_sample_grids(tmp_path, train_config):
    from PIL import Image

    train(dataclasses.replace(train_config, steps=2, sample_every=2, sample_classes=3), tmp_path / "run")
    grid = Image.open(tmp_path / "run" / "samples" / "step-0000002.png")
    assert grid.height == 3 * (128 + 4) + 4 and grid.width > 8 * 132


def test_the_distance_in_training_is_that_of_the_finished_run(tmp_path, train_config, trained_run):
    """The metric changes nothing in the training, and its value is eval's on the same samples."""
    from mutor_vision.features import extractors as features
    from mutor_vision.features import moments
    from mutor_vision.metrics import frechet
    from mutor_vision.runtime import start
    from mutor_vision.sampling.load import load
    from mutor_vision.sampling.stream import label_plan, sample_images, settings_in_training

    extractor = features.load_extractor("timm:test_resnet.r160_in1k@32", "random")
    statistics = tmp_path / "reference.npz"
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    width = extractor.layers["pool"]
    total = moments.Moments(width)
    total.update(extractor(real)["pool"])
    total = total.total()
    np.savez(statistics, mu=total.mu.numpy(), sigma=total.sigma.numpy())

    config = dataclasses.replace(train_config, eval_every=5, eval_reference=str(statistics), eval_images=24,
                                 eval_features="timm:test_resnet.r160_in1k@32", eval_weights="random")  # fmt: skip
    train(config, tmp_path / "run")
    assert_same_state(tmp_path / "run", trained_run)
    curve = [line for line in read_log(tmp_path / "run") if "fd" in line]
    assert [line["step"] for line in curve] == [5, 10] and curve[-1]["fd_images"] == 24

    loaded = load(trained_run, start())
    images = sample_images(loaded, label_plan(24, 5), np.arange(24), settings_in_training(config), 0)
    ours = moments.Moments(width)
    ours.update(extractor(images)["pool"])
    assert curve[-1]["fd"] == pytest.approx(frechet.distance(ours.total(), frechet.root(total)), rel=1e-6)


def test_a_distance_without_a_reference_is_refused(tmp_path, train_config):
    with pytest.raises(UserError, match="eval_every needs eval_reference"):
        train(dataclasses.replace(train_config, eval_every=5), tmp_path / "run")


def test_curves_are_plotted(tmp_path, trained_run):
    from PIL import Image

    from mutor_vision.commands.plot import plot_runs

    plot_runs({"a run": trained_run}, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_curve(tmp_path, train_config):
    config = dataclasses.replace(train_config, model=NO_DROPOUT, steps=4, val_every=0, save_every=0)
    train(config, tmp_path / "eager")
    train(dataclasses.replace(config, compile="on"), tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
