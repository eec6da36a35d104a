import json
import shutil

import numpy as np
import pytest
import torch

from mutor_vision.data.token_set import TokenSet, code_dtype, load_array, save_array
from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.storage.seal import write_sealed
from mutor_vision.tokenizer.model import load_tokenizer, tokenizer_identity


@pytest.fixture
def path(token_set_path, tmp_path):
    """A copy that a test may damage: 60 images of 5 classes, 2 views, 4x4 codes of 32, two shards of 30."""
    return shutil.copytree(token_set_path, tmp_path / "set")


def edit_manifest(path, **values):
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["seal"]
    write_sealed(path / "manifest.json", {**manifest, **values})


def test_facts_come_from_the_manifest(path):
    tokens = TokenSet.open(path)
    assert (tokens.num_images, tokens.num_views, tokens.grid, tokens.codebook_size) == (60, 2, (4, 4), 32)
    assert tokens.class_names == ["ant", "bee", "cat", "dog", "eel"] and tokens.views == ["center", "center-flip"]
    assert tokens.labels.dtype == torch.int64 and np.bincount(tokens.labels).tolist() == [20, 4, 12, 8, 16]
    assert tokens.labels.tolist() == sorted(tokens.labels.tolist())  # class by class, as real sets are
    assert tokenizer_identity(load_tokenizer(tokens.tokenizer_path)) == tokens.tokenizer_identity


def test_codes_are_taken_by_image_and_view_across_shards(path):
    tokens = TokenSet.open(path)
    everything = np.concatenate([np.load(path / f"codes-0000{i}.npy") for i in range(2)]).astype(np.int64)
    indices, views = torch.tensor([59, 0, 29, 30, 30, 7]), torch.tensor([0, 1, 1, 0, 1, 0])
    codes = tokens.take(indices, views)
    assert codes.shape == (6, 4, 4) and codes.dtype == torch.int64
    assert np.array_equal(codes.flatten(1), everything[indices, views])
    assert np.array_equal(tokens.codes(), everything) and tokens.codes().dtype == torch.int16


def test_the_identity_is_of_the_content(path):
    identity = TokenSet.open(path).identity
    moved = path.rename(path.with_name("moved"))
    assert TokenSet.open(moved).identity == identity
    edit_manifest(moved, image_size=8)
    assert TokenSet.open(moved).identity != identity


def test_large_codebooks_take_four_bytes():
    assert code_dtype(2**16) is np.uint16 and code_dtype(2**16 + 1) is np.uint32


def test_what_is_no_token_set_is_refused(path, tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        TokenSet.open(tmp_path / "none")
    with pytest.raises(UserError, match="no manifest.json"):
        TokenSet.open(path / "tokenizer")
    (path / "manifest.json").write_text('{"format": 3}')
    with pytest.raises(MismatchError, match="format 3, this version reads up to 2"):
        TokenSet.open(path)


@pytest.mark.parametrize("name", ["../codes-00000.npy", "/etc/passwd", "codes-00001.npy", ""])
def test_a_manifest_names_no_file_elsewhere(path, name):
    shards = json.loads((path / "manifest.json").read_text())["shards"]
    shards[0]["file"] = name
    edit_manifest(path, shards=shards)
    with pytest.raises(IntegrityError, match="expected codes-00000.npy and labels-00000.npy; it is refused"):
        TokenSet.open(path)


def test_a_manifest_or_tokenizer_that_was_changed_is_refused(path):
    manifest = path / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(before.replace("center-flip", "center-flap"))
    with pytest.raises(IntegrityError, match="was changed after it was written"):
        TokenSet.open(path)
    manifest.write_text(before)
    shutil.rmtree(path / "tokenizer")
    with pytest.raises(UserError, match="tokenizer does not exist"):
        TokenSet.open(path)


def test_an_unfinished_set_says_how_much_there_is(path):
    (path / "manifest.json").unlink()
    (path / "plan.json").write_text(json.dumps({"num_shards": 7}))
    with pytest.raises(IntegrityError, match="incomplete: 2 of 7 shards; run encode.py again to continue"):
        TokenSet.open(path)


@pytest.mark.parametrize("name", ["codes-00001.npy", "labels-00000.npy"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(path, name, damage):
    content = bytearray((path / name).read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        (path / name).write_bytes(content)
    elif damage == "truncate":
        (path / name).write_bytes(content[:-4])
    else:
        (path / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        TokenSet.open(path)


@pytest.mark.parametrize("change, message", [
    ({"codebook_size": 20}, "holds code .*, expected 0 to 19"),
    ({"class_names": ["ant", "bee"]}, "holds label 2, expected 0 to 1"),
    ({"grid": [4, 5]}, "expected uint16 .30, 2, 20."),
    ({"views": ["center"]}, "expected uint16 .30, 1, 16."),
])  # fmt: skip
@pytest.mark.bad_input("weights and codes of others")
def test_codes_that_do_not_fit_the_manifest_are_refused(path, change, message):
    edit_manifest(path, **change)
    with pytest.raises(IntegrityError, match=message):
        TokenSet.open(path)


def test_a_pickle_in_an_npy_is_never_opened(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(IntegrityError, match="evil.npy"):
        load_array(tmp_path / "evil.npy", np.uint16, (1,))


def test_an_array_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    save_array(tmp_path / "a.npy", np.arange(3))
    assert load_array(tmp_path / "a.npy", np.int64, (3,)).tolist() == [0, 1, 2]

    def full_disk(file, array, **settings):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError):
        save_array(tmp_path / "b.npy", np.arange(3))
    assert not (tmp_path / "b.npy").exists()


def test_codes_kept_on_a_device_are_the_codes_of_the_files(token_set_path):
    token_set = TokenSet.open(token_set_path)
    images, views = torch.tensor([59, 0, 31, 30, 0]), torch.tensor([1, 0, 0, 1, 1])
    from_files = token_set.take(images, views)
    token_set.keep_on(torch.device("cpu"))
    assert torch.equal(token_set.take(images, views), from_files) and from_files.dtype == torch.int64
    assert token_set.nbytes == token_set.codes().nbytes
