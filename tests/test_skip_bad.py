"""--skip-bad and --verify of encode and tokenizer training: every image is used, or recorded with its reason."""

import numpy as np
import pytest
from faults.score import record
from PIL import Image

from mutor_vision.data.folder import ImageFolder
from mutor_vision.data.source import Without
from mutor_vision.data.token_set import TokenSet
from mutor_vision.errors import ImageError
from mutor_vision.storage import checkpoint


def spoil(path):
    """Damage that only decoding shows: the end of the file is there, its pixels' checksum is wrong."""
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT")
    data[place + (len(data) - place) // 2] ^= 0xFF
    path.write_bytes(data)


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.fixture
def pictures(tmp_path):
    """12 of 14 images, in two classes, are good; one shows that in its header, one in decoding."""
    root, generator = tmp_path / "pictures", np.random.default_rng(0)
    for number in range(14):
        path = root / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(255, size=(20, 20, 3), dtype=np.uint8)).save(path)
    (root / "class0" / "04.png").write_text("no image")
    spoil(root / "class1" / "09.png")
    return root


@pytest.fixture
def encode(command, pictures, tiny_tokenizer_path, tmp_path):
    def run(*flags, out="set"):
        return command("mutor", "encode", "--tokenizer", tiny_tokenizer_path, "--data", pictures, "--out",
                       tmp_path / out, "--shard-size", 3, "--workers", 0, *flags)  # fmt: skip

    return run


def test_verify_finds_all_at_once_and_writes_nothing(encode, tmp_path):
    done = encode("--verify")
    assert done.code == 3 and "2 of 14 images cannot be used" in done.err and "04.png" in done.err
    assert "09.png" in done.err and not (tmp_path / "set").exists()


def test_more_than_allowed_are_refused(encode, tmp_path):
    done = encode("--verify", "--skip-bad", 1)
    assert done.code == 3 and "2 of 14 images" in done.err and not (tmp_path / "set").exists()
    done = encode("--skip-bad", -1)
    assert done.code == 2 and "expected 0 or more" in done.err


def test_skipped_images_are_in_the_manifest_and_all_others_in_the_set(encode, pictures, tmp_path):
    assert encode("--verify", "--skip-bad", 2).code == 0
    manifest = TokenSet.open(tmp_path / "set").manifest
    assert list(manifest["skipped"]) == ["class0/04.png", "class1/09.png"]
    assert manifest["skipped"]["class0/04.png"].startswith("not a complete image (it begins with b'no image'")
    accounted = manifest["num_images"] + len(manifest["skipped"])
    record("Every image is accounted for", "mutor encode", accounted, 14)
    assert accounted == 14 and manifest["images_per_class"] == [6, 6]
    for name in manifest["skipped"]:
        (pictures / name).unlink()
    assert encode(out="removed").code == 0
    for path in (tmp_path / "removed").glob("*.npy"):  # the same images with the same labels
        assert path.read_bytes() == (tmp_path / "set" / path.name).read_bytes(), path.name
    assert TokenSet.open(tmp_path / "removed").manifest["skipped"] == {}


def test_damage_that_shows_in_decoding_is_skipped_by_the_next_call(encode, tmp_path, monkeypatch):
    """Also where that call is killed: what was skipped is looked at again by decoding."""
    done = encode("--skip-bad", 2)
    assert done.code == 3 and "09.png" in done.err and "04.png" not in done.err.rpartition("error")[2]
    before = (tmp_path / "set" / "codes-00000.npy").stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr("mutor_vision.tokenizer.encode._encode_shards", interrupted)
        assert encode("--skip-bad", 2).code == 130
    assert encode("--skip-bad", 2).code == 0
    manifest = TokenSet.open(tmp_path / "set").manifest
    assert list(manifest["skipped"]) == ["class0/04.png", "class1/09.png"] and manifest["num_images"] == 12
    assert "repaired" not in manifest or not manifest["repaired"]
    assert (tmp_path / "set" / "codes-00000.npy").stat().st_ino == before, "finished shards stay"


def test_processes_skip_the_same_images(encode, forked, enter, pictures, tiny_tokenizer_path, tmp_path):
    assert encode("--verify", "--skip-bad", 2).code == 0
    done = forked("mutor", "encode", "--tokenizer", tiny_tokenizer_path, "--data", pictures, "--out", tmp_path / "two",
                  "--shard-size", 3, "--workers", 0, "--verify", "--skip-bad", 2, ranks=2)  # fmt: skip
    assert done.code == 0, done.out
    for path in (tmp_path / "set").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert TokenSet.open(tmp_path / "two").manifest == TokenSet.open(tmp_path / "set").manifest


def test_a_long_list_is_whole_in_a_file(encode, pictures, tmp_path):
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"")
    done = encode()
    assert "14 of 14 images" in done.err and "and 4 more" in done.err
    assert f"all of them: {tmp_path / 'set.bad-images.txt'}" in done.err
    lines = (tmp_path / "set.bad-images.txt").read_text().splitlines()
    assert len(lines) == 14 and all("it is empty" in line for line in lines)


def test_a_class_is_never_skipped_as_a_whole(pictures):
    source = ImageFolder(pictures)
    found = {number: ImageError(f"{number}") for number in range(7)}
    with pytest.raises(ImageError, match="no image of class 'class0'"):
        Without(source, found)
    one = Without(source, {number: found[number] for number in range(6)})
    assert one.labels == [0] + 7 * [1] and one.shown(0) == source.shown(6) and one.shown(7) == source.shown(13)
    assert one.fingerprint([0]) == source.fingerprint([6])


SMALL = {
    "model.image_size": 16, "model.channels": "8,8,8", "model.latent_channels": 8, "model.code_dim": 4,
    "model.codebook_size": 32, "model.norm_groups": 4, "model.attention": "false", "batch_size": 4, "workers": 0,
    "save_every": 1, "val_every": 0, "sample_every": 0, "schedule": "constant", "warmup_steps": 0, "val_fraction": 0,
}  # fmt: skip


def test_tokenizer_training_skips_and_records_them_and_goes_on(command, pictures, tmp_path):
    def train(steps, **more):
        flags = [part for key, value in (SMALL | more).items() for part in ("--set", f"{key}={value}")]
        return command("mutor", "train-tokenizer", "--preset", "digits", "--data", pictures, "--out", tmp_path / "run",
                       "--steps", steps, *flags)  # fmt: skip

    done = train(2, skip_bad=1, verify="true")
    assert done.code == 3 and "2 of 14 images cannot be used" in done.err and not (tmp_path / "run").exists()
    assert train(2, skip_bad=2, verify="true").code == 0
    state = checkpoint.read_training_state(checkpoint.newest(tmp_path / "run"))
    assert list(state["skipped"]) == ["class0/04.png", "class1/09.png"] and state["files"].endswith(" 12")
    done = train(4, skip_bad=2)  # which decodes what was skipped, and nothing else
    assert done.code == 0, done.err
    state = checkpoint.read_training_state(checkpoint.newest(tmp_path / "run"))
    assert state["step"] == 4 and state["files"].endswith(" 12") and len(state["skipped"]) == 2
    assert state["repaired"] == []
    record("Every image is accounted for", "mutor train-tokenizer", 12 + len(state["skipped"]), 14)
