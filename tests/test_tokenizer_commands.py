"""tokenizers/train_vq.py, encode.py and reconstruct.py, as a person calls them."""

import dataclasses
import gc
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_vision.data.reading import Views
from mutor_vision.data.token_set import TokenSet
from mutor_vision.errors import ImageError, IntegrityError, MismatchError, UserError
from mutor_vision.runtime import Runtime
from mutor_vision.storage import checkpoint
from mutor_vision.tokenizer import encode
from mutor_vision.tokenizer.model import tokenizer_identity

SMALL = {
    "model.image_size": 16, "model.channels": "8,8,8", "model.latent_channels": 8, "model.code_dim": 4,
    "model.codebook_size": 32, "model.norm_groups": 4, "model.attention": "false", "batch_size": 4, "workers": 0,
    "min_crop_scale": 0.8, "dead_code_steps": 2, "save_every": 3, "log_every": 1, "val_every": 3, "sample_every": 3,
    "schedule": "constant", "warmup_steps": 2, "quantize_after": 2,
}  # fmt: skip


@pytest.fixture
def command(command):
    """Run tokenizers/NAME with flags -> (exit code, stdout, stderr)."""

    def run(name, **arguments):
        flags = [part for key, value in arguments.items() if key != "set" for part in
                 ([f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)]))]  # fmt: skip
        flags += [part for key, value in arguments.get("set", {}).items() for part in ("--set", f"{key}={value}")]
        return dataclasses.astuple(command(f"tokenizers/{name}", *flags))

    return run


def set_flags(**changes):
    return [part for key, value in {**SMALL, **changes}.items() for part in ("--set", f"{key}={value}")]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(root, pictures, tmp_path_factory):
    """Six uninterrupted steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(root, pictures, out, 6)
    return out


def train(root, data, out, steps, **changes):
    from mutor_vision.presets import TOKENIZERS
    from mutor_vision.settings import override
    from mutor_vision.tokenizer.train import train_tokenizer

    settings = [f"{key}={value}" for key, value in {**SMALL, "val_fraction": 0.2, **changes}.items()]
    config = override(TOKENIZERS["digits"], [*settings, f"data={data}", f"steps={steps}"])
    return train_tokenizer(config, out)


# Training.


def test_training_writes_a_run_that_explains_itself(trained):
    assert json.loads((trained / "status.json").read_text())["state"] == "done"
    lines = [line for line in log_of(trained) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "l2", "codebook", "commitment", "psnr", "usage", "perplexity", "images_per_s"} <= lines[0].keys()
    scores = {key for line in log_of(trained) for key in line if key.startswith("val/")}
    assert {"val/model/psnr", "val/ema/psnr", "val/ema/l1", "val/ema/usage"} <= scores
    assert [path.name for path in sorted((trained / "samples").iterdir())] == ["step-0000003.png", "step-0000006.png"]
    newest = checkpoint.newest(trained)
    assert newest.name == "step-0000006" and checkpoint.weight_names(newest) == ["ema", "model"]


def weights_of(run, step):
    folder = run / "checkpoints" / f"step-{step:07d}"
    return {name: checkpoint.read_weights(folder, name) for name in checkpoint.weight_names(folder)}


def assert_equal_weights(left, right):
    assert left.keys() == right.keys()
    for name in left:
        for key in left[name]:
            assert torch.equal(left[name][key], right[name][key]), f"{name}: {key}"


def test_a_continued_run_equals_an_uninterrupted_one_bit_for_bit(root, pictures, trained, tmp_path):
    """Killed after step 4, that is one step after the checkpoint at step 3, with a line of log too many."""
    train(root, pictures, tmp_path / "run", 3)
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 7.0}\n{"step": 5, "lo')
    train(root, pictures, tmp_path / "run", 6)
    assert_equal_weights(weights_of(tmp_path / "run", 6), weights_of(trained, 6))
    logged = [[(line["step"], line["loss"]) for line in log_of(run) if "loss" in line] for run in
              (tmp_path / "run", trained)]  # fmt: skip
    assert logged[0] == logged[1]


def test_the_discriminator_is_continued_too(root, pictures, tmp_path):
    settings = {
        "model.image_size": 24,
        "adversarial_weight": 0.5,
        "adversarial_start": 1,
        "entropy_weight": 0.1,
        "val_every": 0,
    }
    train(root, pictures, tmp_path / "whole", 4, **settings, save_every=2)
    train(root, pictures, tmp_path / "run", 2, **settings, save_every=2)
    train(root, pictures, tmp_path / "run", 4, **settings, save_every=2)
    assert "discriminator" in weights_of(tmp_path / "run", 4)
    assert_equal_weights(weights_of(tmp_path / "run", 4), weights_of(tmp_path / "whole", 4))
    lines = log_of(tmp_path / "whole")
    assert "adversarial" not in lines[0] and {"adversarial", "discriminator", "entropy"} <= lines[1].keys()


def test_a_finished_run_is_left_alone(root, pictures, trained, capsys):
    before = contents(trained / "checkpoints")
    train(root, pictures, trained, 6)
    assert "6 of 6 steps already" in capsys.readouterr().out
    assert contents(trained / "checkpoints") == before


def test_other_settings_or_images_are_refused_and_listed(root, pictures, trained, command, tmp_path):
    def again(data=pictures, **changes):
        settings = {**SMALL, "val_fraction": 0.2, **changes}
        return command("train_vq.py", preset="digits", data=data, out=trained, steps=9, set=settings)

    code, _, error = again(lr=0.5, batch_size=2)
    assert code == 5 and "batch_size: 4 -> 2" in error and "lr: 0.002 -> 0.5" in error and error.count("\n") == 1
    (tmp_path / "other" / "a").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "other" / "a" / "0.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "other" / "a" / "1.png")
    code, _, error = again(data=tmp_path / "other")
    assert code == 5 and "other images" in error


def test_a_run_whose_learning_rate_ends_at_steps_is_not_continued_to_others(root, pictures, tmp_path):
    """With a cosine, step 4 of 8 has another learning rate than step 4 of 4."""
    train(root, pictures, tmp_path / "run", 4, schedule="cosine", save_every=2)
    before = contents(tmp_path / "run")
    with pytest.raises(MismatchError, match="steps: 4 -> 8"):
        train(root, pictures, tmp_path / "run", 8, schedule="cosine", save_every=2)
    assert contents(tmp_path / "run") == before


def test_every_0_means_never_and_the_last_step_is_saved(root, pictures, tmp_path):
    never = {"log_every": 0, "val_every": 0, "sample_every": 0, "save_every": 0}
    train(root, pictures, tmp_path / "run", 2, **never)
    assert log_of(tmp_path / "run") == [] and not (tmp_path / "run" / "samples").exists()
    assert checkpoint.newest(tmp_path / "run").name == "step-0000002"


def test_weights_that_are_not_finite_are_never_saved(root, pictures, tmp_path, monkeypatch):
    """Nothing is logged, so that nothing but the check before saving can see it."""
    from mutor_vision.tokenizer import train as train_loop

    rate = train_loop.learning_rate
    monkeypatch.setattr(train_loop, "learning_rate", lambda step, **k: 1e38 if step >= 3 else rate(step, **k))
    settings = {"log_every": 0, "val_every": 0, "save_every": 1, "clip": 0}
    with pytest.raises(UserError, match="not finite at step 5.*lower lr"):
        train(root, pictures, tmp_path / "run", 6, **settings)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-0000003", "step-0000004"]
    assert all(tensor.isfinite().all() for weights in weights_of(tmp_path / "run", 4).values()
               for tensor in weights.values())  # fmt: skip
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_training_does_not_begin_in_what_is_no_tokenizer_run(root, pictures, trained_run, token_set_path, trained,
                                                             tmp_path):  # fmt: skip
    """Nor anew where every checkpoint is damaged. Nothing there is touched."""
    (tmp_path / "file").write_text("")
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    for path in damaged.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    for out, message in (
        (trained_run, "holds a transformer, expected a tokenizer"),
        (token_set_path, "not empty and no tokenizer run"),
        (token_set_path / "tokenizer", "an exported model, expected a run directory"),
        (tmp_path / "file", "is a file, expected a folder"),
        (damaged, "no checkpoint is whole, 2 damaged"),
    ):
        before = contents(out)
        with pytest.raises(UserError, match=message):
            train(root, pictures, out, 6)
        assert contents(out) == before


def test_a_start_that_was_killed_is_started_again(root, pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.partial").write_text("{")
    train(root, pictures, tmp_path / "run", 2)
    assert checkpoint.newest(tmp_path / "run").name == "step-0000002"


def test_two_processes_train_as_one(forked, pictures, trained, tmp_path):
    flags = ["--preset", "digits", "--data", str(pictures), "--out", str(tmp_path / "run"), "--steps", "3"]
    result = forked("tokenizers/train_vq.py", *flags, *set_flags(val_fraction=0.2), ranks=2)
    assert result.code == 0, result.out
    pairs = list(zip(log_of(tmp_path / "run"), log_of(trained), strict=False))
    assert len(pairs) >= 3
    for one, other in pairs:
        for key in one.keys() - {"images_per_s"}:
            rel = 1e-2 if key.startswith("val/") else 1e-4  # scores step by whole grey levels and codes
            assert one[key] == pytest.approx(other[key], rel=rel), key


@pytest.mark.parametrize("arguments, code, message", [
    ({"preset": "digit"}, 2, "did you mean 'digits'"),
    ({"set": {"batchsize": 3}}, 2, "did you mean 'batch_size'"),
    ({"set": {"model.codebok_size": 3}}, 2, "did you mean 'model.codebook_size'"),
    ({"set": {"lr": "fast"}}, 2, "expected a finite number"),
    ({"set": {"lpips_weight": 1}}, 2, "needs the file lpips_weights"),
    ({"set": {"schedule": "sine"}}, 2, "expected constant or cosine"),
    ({"set": {"min_crop_scale": 0}}, 2, "min_crop_scale is 0.0, expected"),
    ({"steps": 0}, 2, "steps is 0"),
    ({"data": "gone"}, 3, "does not exist"),
    ({"colour": "red"}, 2, "unrecognized arguments"),
])  # fmt: skip
@pytest.mark.bad_input("command line")
def test_mistakes_are_one_line_and_leave_nothing(command, pictures, tmp_path, arguments, code, message):
    given = {"preset": "digits", "data": pictures, "out": tmp_path / "run", **arguments}
    got, _, error = command("train_vq.py", **given)
    assert got == code and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_resolved_configuration(command, tmp_path):
    code, printed, _ = command(
        "train_vq.py", preset="vq-8", data="d", out=tmp_path / "run", steps=7, dry_run=True, set={"lr": 0.5}
    )
    values = json.loads(printed)
    assert code == 0 and (values["steps"], values["lr"], values["model"]["channels"][0]) == (7, 0.5, 128)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_loss_is_not_finite_stops_and_says_so(root, pictures, tmp_path, command):
    code, _, error = command("train_vq.py", preset="digits", data=pictures, out=tmp_path / "run", steps=6,
                             set={**SMALL, "lr": 1e30, "clip": 0, "warmup_steps": 0})  # fmt: skip
    assert code == 2 and "lower lr" in error
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert checkpoint.newest(tmp_path / "run") is None


# Encoding.


@pytest.fixture(scope="module")
def encoded(forked, pictures, tiny_tokenizer_path, tmp_path_factory):
    """The pictures in shards of 5, by two processes."""
    out = tmp_path_factory.mktemp("codes") / "set"
    flags = ["--tokenizer", tiny_tokenizer_path, "--data", pictures, "--out", out, "--shard-size", 5]
    result = forked("tokenizers/encode.py", *flags, "--batch-size", 4, "--workers", 1, ranks=2)
    assert result.code == 0, result.out
    return out


def test_one_process_and_two_give_the_same_bytes(command, pictures, tiny_tokenizer_path, encoded, tmp_path):
    code, printed, _ = command("encode.py", tokenizer=tiny_tokenizer_path, data=pictures, out=tmp_path / "set",
                               shard_size=5, batch_size=4, workers=0)  # fmt: skip
    assert code == 0 and "14 images of 2 classes, 2 views, 4x4 codes of 32" in printed
    assert contents(tmp_path / "set") == contents(encoded)
    tokens = TokenSet.open(encoded)
    assert tokens.labels.tolist() == [0] * 7 + [1] * 7 and tokens.class_names == ["class0", "class1"]
    assert tokens.manifest["images_per_class"] == [7, 7]
    assert tokens.tokenizer_identity == tokenizer_identity(tiny_tokenizer_path)


def test_an_interrupted_encoding_continues_to_the_same_bytes(
    command, pictures, tiny_tokenizer_path, encoded, tmp_path, monkeypatch
):
    arguments = {"tokenizer": tiny_tokenizer_path, "data": pictures, "out": tmp_path / "set", "shard_size": 5,
                 "batch_size": 4, "workers": 0}  # fmt: skip
    read = Views.__getitem__

    def interrupted(self, i):
        if i == 7:
            raise KeyboardInterrupt
        return read(self, i)

    monkeypatch.setattr(Views, "__getitem__", interrupted)
    assert command("encode.py", **arguments)[0] == 130
    with pytest.raises(IntegrityError, match="incomplete: 1 of 3 shards; run encode.py again"):
        TokenSet.open(tmp_path / "set")
    monkeypatch.setattr(Views, "__getitem__", read)
    code, _, error = command("encode.py", **{**arguments, "batch_size": 2})
    assert code == 5 and "batch_size: 4 -> 2" in error
    assert command("encode.py", **arguments)[0] == 0
    assert contents(tmp_path / "set") == contents(encoded)
    assert command("encode.py", **arguments)[0] == 0  # nothing left to do


def test_bfloat16_is_recorded_with_its_agreement(command, pictures, tiny_tokenizer_path, encoded, tmp_path):
    arguments = {"tokenizer": tiny_tokenizer_path, "data": pictures, "out": tmp_path / "set", "shard_size": 5,
                 "batch_size": 28, "workers": 0}  # fmt: skip
    code, printed, _ = command("encode.py", **arguments, precision="bfloat16")
    assert code == 0 and "of the codes of 28 crops, drawn from all images, are those of float32" in printed
    found, exact = TokenSet.open(tmp_path / "set"), TokenSet.open(encoded)
    # All 28 crops are in that first batch, so the share can be counted in the two sets.
    share = (found.codes() == exact.codes()).double().mean().item()
    assert found.manifest["precision"] == "bfloat16" and 0.5 < share < 1
    assert found.manifest["float32_agreement"] == pytest.approx(share, abs=0.01)
    assert exact.manifest["precision"] == "float32" and "float32_agreement" not in exact.manifest
    (tmp_path / "set" / "manifest.json").unlink()
    code, _, error = command("encode.py", **arguments)
    assert code == 5 and "precision: bfloat16 -> float32" in error


def test_ten_crops_and_other_sizes(command, pictures, tiny_tokenizer_path, tmp_path):
    code, *_ = command("encode.py", tokenizer=tiny_tokenizer_path, data=pictures, out=tmp_path / "set",
                       views="ten-crop", image_size=24, workers=0)  # fmt: skip
    tokens = TokenSet.open(tmp_path / "set")
    assert code == 0 and (tokens.grid, tokens.num_views, tokens.image_size) == ((6, 6), 10, 24)
    assert tokens.views[0] == "top-left" and tokens.views[9] == "center-flip"


def bad_image(folder, kind):
    Image.fromarray(np.random.default_rng(0).integers(255, size=(64, 64, 3), dtype=np.uint8)).save(folder / "whole.png")
    path = folder / "zz.jpg"
    if kind == "truncated":
        Image.open(folder / "whole.png").save(path)
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "text":
        path.write_text("no image")
    else:
        Image.fromarray(np.zeros((20, 20), dtype=np.uint16)).save(folder / "zz.png")


@pytest.mark.parametrize("kind, code, message", [
    ("truncated", 3, "zz.jpg: not a complete"), ("text", 3, "zz.jpg: not a complete"), ("16 bits", 3, "16-bit PNG"),
])  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_with_its_name_and_leaves_nothing_that_looks_finished(
    command, tiny_tokenizer_path, tmp_path, kind, code, message, workers
):
    (tmp_path / "data" / "a").mkdir(parents=True)
    bad_image(tmp_path / "data" / "a", kind)
    got, _, error = command("encode.py", tokenizer=tiny_tokenizer_path, data=tmp_path / "data", out=tmp_path / "set",
                            workers=workers)  # fmt: skip
    lines = [line for line in error.splitlines() if line.startswith("error")]
    assert got == code and len(lines) == 1 and message in lines[0] and "Traceback" not in error
    assert not (tmp_path / "set").exists(), "bad files are found before anything is written"


# Repairing.


def spoil(path):
    """Damage that only decoding shows: the end of the file is there, its pixels' checksum is wrong."""
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT")
    data[place + (len(data) - place) // 2] ^= 0xFF
    path.write_bytes(data)


def repairs(path):
    """name -> how a person repairs a bad file, of which whole.png beside the folder is a whole copy."""
    whole = path.parents[2] / "whole.png"
    return {
        "replaced": lambda: shutil.copy(whole, path),
        "replaced by another kind of file": lambda: (path.unlink(), Image.open(whole).save(path.with_suffix(".jpg"))),
        "removed": path.unlink,
    }  # fmt: skip


@pytest.fixture
def spoilt(pictures, tmp_path):
    """A copy of the pictures whose image 11 of 14 is bad; the classes are of 7 images, the shards of 3."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    path = folder / "class1" / "09.png"
    Image.open(path).resize((31, 22)).save(tmp_path / "whole.png")  # of another size in bytes
    spoil(path)
    return path


# Of this seed, image 11 is in none of the first two batches.
UNTIL_LATE = {"seed": 1, "save_every": 1, "val_every": 0, "sample_every": 0, "val_fraction": 0}
REPAIRS = ("replaced", "replaced by another kind of file", "removed")


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_encoding_goes_on_after_a_bad_image_was_repaired(
    command, spoilt, tiny_tokenizer_path, tmp_path, repair, workers
):
    folder, arguments = spoilt.parents[1], {"tokenizer": tiny_tokenizer_path, "batch_size": 2, "shard_size": 3}
    arguments |= {"data": folder, "out": tmp_path / "set", "workers": workers}
    code, _, error = command("encode.py", **arguments)
    assert code == 3 and "09.png: not a complete image" in error
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.npy")}
    assert len(done) == 6, "three shards, of codes and labels"
    assert command("encode.py", **arguments)[0] == 3, "nothing was repaired yet"
    repairs(spoilt)[repair]()
    code, _, error = command("encode.py", **arguments)
    assert code == 0, error
    assert all((tmp_path / "set" / name).stat().st_mtime_ns == when for name, when in done.items())
    found = TokenSet.open(tmp_path / "set")
    assert found.manifest["repaired"] == ["class1/09.png"] and found.manifest["images_per_class"][0] == 7
    command("encode.py", **{**arguments, "out": tmp_path / "fresh"})
    fresh = TokenSet.open(tmp_path / "fresh")
    assert torch.equal(found.codes(), fresh.codes()) and torch.equal(found.labels, fresh.labels)
    assert not list((tmp_path / "set").glob("bad-images*"))
    assert command("encode.py", **arguments)[0] == 0, "a finished set stays finished"


def test_shards_behind_a_removed_image_are_made_again(command, spoilt, tiny_tokenizer_path, tmp_path):
    """As when another process had finished the last shard before the bad image was reached."""
    folder, arguments = spoilt.parents[1], {"tokenizer": tiny_tokenizer_path, "batch_size": 2, "shard_size": 3}
    arguments |= {"data": folder, "workers": 0}
    whole = shutil.copytree(folder, tmp_path / "whole")
    bad = (folder / "class1" / "09.png").read_bytes()
    Image.open(tmp_path / "whole.png").save(whole / "class1" / "09.png")
    command("encode.py", **{**arguments, "data": whole, "out": tmp_path / "other"})
    command("encode.py", **arguments, out=tmp_path / "set")
    assert spoilt.read_bytes() == bad
    for name in ("codes-00004.npy", "labels-00004.npy"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "set")
    spoilt.unlink()
    assert command("encode.py", **arguments, out=tmp_path / "set")[0] == 0
    command("encode.py", **arguments, out=tmp_path / "fresh")
    assert torch.equal(TokenSet.open(tmp_path / "set").codes(), TokenSet.open(tmp_path / "fresh").codes())


def test_other_changes_than_repairs_are_refused_and_keep_what_is_done(command, spoilt, tiny_tokenizer_path, tmp_path):
    folder, out = spoilt.parents[1], tmp_path / "set"
    arguments = {
        "tokenizer": tiny_tokenizer_path,
        "batch_size": 2,
        "shard_size": 3,
        "data": folder,
        "out": out,
        "workers": 0,
    }
    command("encode.py", **arguments)
    shutil.copy(tmp_path / "whole.png", spoilt)
    Image.new("RGB", (20, 20), "red").save(folder / "class0" / "added.png")
    before = contents(out)
    code, _, error = command("encode.py", **arguments)
    assert code == 5 and "begun with other images (14 of them, now 15)" in error and contents(out) == before
    (folder / "class0" / "added.png").unlink()
    assert command("encode.py", **arguments)[0] == 0
    spoilt.unlink()
    code, _, error = command("encode.py", **arguments)
    assert code == 5 and "other images" in error, "a finished set is of its images"


def test_nothing_is_lost_by_other_images_before_the_first_shard(command, spoilt, tiny_tokenizer_path, tmp_path):
    folder, out = spoilt.parents[1], tmp_path / "set"
    assert command("encode.py", tokenizer=tiny_tokenizer_path, data=folder, out=out, workers=0)[0] == 3
    spoilt.unlink()
    Image.new("RGB", (20, 20), "red").save(folder / "class0" / "added.png")
    assert command("encode.py", tokenizer=tiny_tokenizer_path, data=folder, out=out, workers=0)[0] == 0
    assert "repaired" not in TokenSet.open(out).manifest


def test_an_encoding_killed_in_its_first_moments_can_be_begun_again(
    command, pictures, tiny_tokenizer_path, tmp_path, monkeypatch
):
    out, arguments = tmp_path / "set", {"tokenizer": tiny_tokenizer_path, "data": pictures, "workers": 0}
    for module, name in ((encode, "write_json"), (checkpoint, "export")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert command("encode.py", **arguments, out=out)[0] == 130
    assert command("encode.py", **arguments, out=out)[0] == 0


@pytest.mark.parametrize("repair", REPAIRS)
def test_tokenizer_training_goes_on_after_a_bad_image_was_repaired(root, spoilt, tmp_path, capsys, repair):
    folder, out = spoilt.parents[1], tmp_path / "run"
    with pytest.raises(ImageError, match="09.png"):
        train(root, folder, out, 9, **UNTIL_LATE)
    stopped = checkpoint.newest(out)
    assert stopped is not None, "the bad image is not in the first batch"
    repairs(spoilt)[repair]()
    last = train(root, folder, out, 9, **UNTIL_LATE)
    assert "goes on with 1 image(s) replaced or removed" in capsys.readouterr().out
    assert checkpoint.step_of(last) == 9 and log_of(out)[checkpoint.step_of(stopped) - 1]["step"] <= 9
    assert checkpoint.read_training_state(last)["repaired"] == ["class1/09.png"]
    assert not list(out.glob("bad-images*"))


def test_other_images_are_refused_by_tokenizer_training_also_after_a_bad_one(root, spoilt, tmp_path):
    folder, out = spoilt.parents[1], tmp_path / "run"
    with pytest.raises(ImageError):
        train(root, folder, out, 9, **UNTIL_LATE)
    shutil.copy(tmp_path / "whole.png", spoilt)
    Image.new("RGB", (20, 20), "red").save(folder / "class0" / "added.png")
    with pytest.raises(MismatchError, match="other images"):
        train(root, folder, out, 9, **UNTIL_LATE)


def test_bad_files_are_found_before_the_first_step_all_at_once(root, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    for name in ("class0/00.png", "class1/09.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-300])
    with pytest.raises(ImageError, match="2 of 14 images cannot be used: .*00.png.*09.png"):
        train(root, folder, tmp_path / "run", 3)
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_is_in_the_manifest(command, pictures, tiny_tokenizer_path, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / "class0" / "x.avif").touch()
    (folder / "__MACOSX").mkdir()
    code, out, _ = command("encode.py", tokenizer=tiny_tokenizer_path, data=folder, out=tmp_path / "set", workers=0)
    manifest = TokenSet.open(tmp_path / "set").manifest
    assert code == 0 and manifest["left_out"] == {".avif": 1} and manifest["ignored"] == {"__MACOSX": 1}
    assert "1 file(s) left out" in out and "__MACOSX" in out


def test_crops_that_say_how_another_precision_agrees_are_of_all_classes(
    command, tiny_tokenizer_path, tmp_path, monkeypatch
):
    from mutor_vision.tokenizer import encode

    for number in range(60):
        path = tmp_path / "data" / "ab"[number // 30] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(path)
    taken = []
    read = Views.__getitem__
    monkeypatch.setattr(Views, "__getitem__", lambda self, i: taken.append(i) or read(self, i))
    monkeypatch.setattr(encode, "_encode_shards", lambda *_: pytest.skip.Exception)
    monkeypatch.setattr(encode, "write_manifest", lambda *_: None)
    monkeypatch.setattr(encode.TokenSet, "open", lambda path: pytest.fail("done"))
    with pytest.raises(pytest.fail.Exception, match="done"):
        command("encode.py", tokenizer=tiny_tokenizer_path, data=tmp_path / "data", out=tmp_path / "set", workers=0,
                precision="bfloat16")  # fmt: skip
    assert len(taken) == 16 and 3 <= sum(i < 30 for i in taken) <= 13


def test_greyscale_and_small_images_are_encoded(command, tiny_tokenizer_path, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.new("L", (5, 3), 90).save(tmp_path / "data" / "a" / "0.png")
    Image.new("CMYK", (40, 30)).save(tmp_path / "data" / "a" / "1.jpg")
    code, *_ = command("encode.py", tokenizer=tiny_tokenizer_path, data=tmp_path / "data", out=tmp_path / "set")
    assert code == 0 and TokenSet.open(tmp_path / "set").num_images == 2


@pytest.mark.parametrize("arguments, code, message", [
    ({"tokenizer": "gone"}, 2, "does not exist"),
    ({"views": "nine-crop"}, 2, "expected one of"),
    ({"image_size": 18}, 2, "expected a multiple of 4"),
    ({"batch_size": -1}, 2, "batch_size is -1"),
    ({"shard_size": 0}, 2, "shard_size is 0"),
    ({"weights": "worst"}, 2, "no 'worst' weights"),
    ({"precision": "float16"}, 2, "expected one of float32, bfloat16"),
])  # fmt: skip
@pytest.mark.bad_input("command line")
def test_wrong_arguments_of_encode(command, pictures, tiny_tokenizer_path, tmp_path, arguments, code, message):
    given = {"tokenizer": tiny_tokenizer_path, "data": pictures, "out": tmp_path / "set", **arguments}
    got, _, error = command("encode.py", **given)
    assert got == code and message in error and not (tmp_path / "set").exists()


# Reconstructing.


def test_reconstruct_scores_and_shows(command, pictures, tiny_tokenizer_path, tmp_path):
    code, printed, _ = command("reconstruct.py", tokenizer=tiny_tokenizer_path, data=pictures, out=tmp_path / "out",
                               num=5, workers=0, save_images=True)  # fmt: skip
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert code == 0 and scores["images"] == 5 and "PSNR" in printed
    assert 0 < scores["psnr"] < 40 and -1 <= scores["ssim"] <= 1 and 1 <= scores["perplexity"] <= 32
    assert scores["protocol"]["tokenizer_sha256"] == tokenizer_identity(tiny_tokenizer_path)
    assert Image.open(tmp_path / "out" / "grid.png").width > 8 * 128
    folders = [tmp_path / "out" / name for name in ("originals", "reconstructions")]
    names = [sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) for folder in folders]
    assert len(names[0]) == 5 and names[0] == names[1]
    assert {name.split("/")[0] for name in names[0]} <= {path.name for path in pictures.iterdir()}
    assert Image.open(tmp_path / "out" / "originals" / names[0][0]).size == (16, 16)


def test_a_second_set_of_reconstructions_takes_the_place_of_the_first(command, pictures, tiny_tokenizer_path, tmp_path):
    arguments = {"tokenizer": tiny_tokenizer_path, "out": tmp_path / "out", "workers": 0, "save_images": True}
    assert command("reconstruct.py", data=pictures, **arguments)[0] == 0
    few = tmp_path / "few" / "a"
    few.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 9, 9)).save(few / f"{number}.png")
    assert command("reconstruct.py", data=few.parent, **arguments)[0] == 0
    for name in ("originals", "reconstructions"):
        assert sorted(os.listdir(tmp_path / "out" / name / "a")) == [f"{number:08d}.png" for number in range(3)]
    assert Image.open(tmp_path / "out" / "originals" / "a" / "00000002.png").getpixel((5, 5)) == (160, 9, 9)
    before = contents(tmp_path / "out")
    spoil(shutil.copy(pictures / "class0" / "00.png", few / "zz.png"))
    assert command("reconstruct.py", data=few.parent, **arguments)[0] == 3
    assert contents(tmp_path / "out") == before, "an unfinished set replaces nothing"


def test_reconstructions_replace_nothing_that_is_not_theirs(command, pictures, tiny_tokenizer_path, tmp_path):
    arguments = {"tokenizer": tiny_tokenizer_path, "data": pictures, "workers": 0, "save_images": True}
    (tmp_path / "out" / "originals").mkdir(parents=True)
    (tmp_path / "out" / "originals" / "holiday.png").touch()
    code, _, error = command("reconstruct.py", **arguments, out=tmp_path / "out")
    assert code == 2 and "originals holds something else (holiday.png)" in error
    code, _, error = command("reconstruct.py", **arguments, out=pictures / "new")
    assert code == 2 and "lie in one another" in error and not (pictures / "new").exists()


@pytest.mark.parametrize("name", ["encode.py", "reconstruct.py"])
def test_outputs_are_tried_before_the_work(command, pictures, tmp_path, name):
    (tmp_path / "file").touch()
    for out in ("file", "file/deeper"):
        code, _, error = command(name, tokenizer="gone", data=pictures, out=tmp_path / out)
        assert code == 2 and ("is a file" in error or "cannot be written" in error)


def test_no_codes_are_kept_for_a_batch(pictures, tiny_tokenizer_path, tmp_path, monkeypatch):
    """Small arrays between the encoder's large ones would keep malloc from using their memory again."""
    counts, encode_crops = [], encode._encode

    def watched(*arguments):
        counts.append(sum(type(one) is torch.Tensor for one in gc.get_objects()))
        return encode_crops(*arguments)

    monkeypatch.setattr(encode, "_encode", watched)
    alone, settings = Runtime(0, 1, torch.device("cpu"), None), encode.EncodeSettings(batch_size=1)
    encode.encode_folder(tiny_tokenizer_path, pictures, tmp_path / "codes", settings, alone, workers=0)
    last = counts[-20:]  # of 28 crops, one by one
    assert len(counts) >= 28 and last[-1] <= last[1] + 1, counts
