import os

import pytest

from mutor_vision.errors import UserError
from mutor_vision.storage import outputs
from mutor_vision.storage.outputs import check_out_file, check_out_folder, replaced_folder


def test_what_can_be_written_passes_and_leaves_nothing(tmp_path):
    for check in (check_out_file, check_out_folder):
        check(tmp_path / "new" / "deeper" / "x")
    check_out_folder(tmp_path)
    (tmp_path / "there.png").touch()
    check_out_file(tmp_path / "there.png")
    assert os.listdir(tmp_path) == ["there.png"]


@pytest.mark.parametrize("check, name, message", [
    (check_out_file, "folder", "is a folder, expected the name of a file"),
    (check_out_folder, "file", "is a file, expected a folder"),
    (check_out_folder, "dangling", "is a file, expected a folder"),
    (check_out_file, "file/x.png", "cannot be written .Not a directory"),
    (check_out_folder, "file/x/y", "cannot be written .Not a directory"),
    (check_out_folder, "x" * 300, "cannot be written .File name too long"),
])  # fmt: skip
def test_what_cannot_be_written_is_one_line(tmp_path, check, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=message):
        check(tmp_path / name)


@pytest.mark.parametrize("number, reason", [(30, "Read-only file system"), (28, "No space left"), (13, "Permission")])
def test_rights_are_tried_and_not_read(tmp_path, monkeypatch, number, reason):
    def refused(**settings):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refused)
    for check in (check_out_file, check_out_folder):
        with pytest.raises(UserError, match=f"x cannot be written .{reason}"):
            check(tmp_path / "x")


def test_a_new_set_takes_the_old_ones_place_when_it_is_complete(tmp_path):
    folder = tmp_path / "set"
    for names in (["a", "b"], ["c"]):
        with replaced_folder(folder) as new:
            for name in names:
                (new / name).touch()
        assert sorted(os.listdir(folder)) == names and os.listdir(tmp_path) == ["set"]
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as new:
        (new / "d").touch()
        raise KeyboardInterrupt
    assert os.listdir(folder) == ["c"] and os.listdir(tmp_path) == ["set"]
