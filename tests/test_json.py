"""Two readers: of JSON, which asks for a form, and of weights. What is not so is one line."""

import pickle

import pytest
import torch

from mutor_vision.errors import IntegrityError, MismatchError
from mutor_vision.storage.files import read_json, read_tensors, write_json, write_tensors
from mutor_vision.storage.foreign import read_pickle
from mutor_vision.storage.seal import read_sealed, write_sealed

FORM = {"format": int, "names": [str], "files": {str: {"bytes": int}}, "by": (str, None), "share": float}
GOOD = {"format": 1, "names": ["a"], "files": {"x": {"bytes": 3}}, "by": None, "share": 1}


def test_what_has_the_form_is_read(tmp_path):
    write_json(tmp_path / "x", GOOD)
    assert read_json(tmp_path / "x", FORM) == GOOD


@pytest.mark.parametrize("change, message", [
    ({"format": "1"}, "'format' is 1, expected a whole number"),
    ({"format": True}, "'format' is True, expected a whole number"),
    ({"names": "ab"}, "'names' is ab, expected a list"),
    ({"names": ["a", 3]}, "'names.1' is 3, expected text"),
    ({"files": []}, "'files' is .., expected an object"),
    ({"files": {"x": {}}}, "lacks 'files.x.bytes'"),
    ({"files": {"x": {"bytes": 1.5}}}, "'files.x.bytes' is 1.5"),
    ({"by": 3}, "'by' is 3, expected text or null"),
    ({"share": "half"}, "'share' is half, expected a number"),
])  # fmt: skip
def test_another_form_is_named(tmp_path, change, message):
    write_json(tmp_path / "x", GOOD | change)
    with pytest.raises(IntegrityError, match=message):
        read_json(tmp_path / "x", FORM)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 200_000, b'"\xff"', b"[]", b"3", b"null", b'{"names": []}'])
@pytest.mark.bad_input("weights and codes of others")
def test_odd_json_is_one_line(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(IntegrityError, match="make it anew") as caught:
        read_json(tmp_path / "x", FORM)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(IntegrityError, match="No such file"):
        read_json(tmp_path / "x")


def test_every_change_of_a_byte_of_a_sealed_file_is_seen_or_harmless(tmp_path):
    path = tmp_path / "x"
    write_sealed(path, {"names": ["é", "b"], "share": 0.1, "views": 2})
    content, expected = path.read_bytes(), read_sealed(path)
    seen = 0
    for place in range(len(content)):
        for flip in (1, 2, 32, 128):
            path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            try:
                assert read_sealed(path) == expected
            except (IntegrityError, MismatchError):
                seen += 1
    assert seen > 3 * len(content)


def test_a_file_from_before_there_were_seals_is_read(tmp_path):
    write_json(tmp_path / "x", GOOD)
    assert read_sealed(tmp_path / "x", FORM) == GOOD


def test_a_damaged_number_in_written_tensors_is_seen(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": torch.arange(5.0), "n": torch.tensor(3)})
    assert read_tensors(path)["w"].tolist() == [0, 1, 2, 3, 4]
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="its tensors are not those that were written"):
        read_tensors(path)
    path.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match="no complete safetensors file"):
        read_tensors(path)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


@pytest.mark.parametrize("write", [
    lambda path: torch.save({"w": Harmful()}, path),
    lambda path: torch.save({"w": Harmful()}, path, _use_new_zipfile_serialization=False),
    lambda path: path.write_bytes(pickle.dumps(Harmful())),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"<html>"),
], ids=["zip", "older", "bare pickle", "empty", "page"])  # fmt: skip
@pytest.mark.bad_input("weights and codes of others")
def test_a_pickle_is_refused_and_not_run(tmp_path, write):
    write(tmp_path / "training.pt")
    with pytest.raises(IntegrityError, match="nothing in it was run") as caught:
        read_pickle(tmp_path / "training.pt")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
