import os
import re

import pytest

from mutor_vision.errors import UserError
from mutor_vision.storage import outputs
from mutor_vision.storage.files import written, written_folder
from mutor_vision.storage.outputs import check_out_file, check_out_folder


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
@pytest.mark.bad_input("command line")
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
        with written_folder(folder) as new:
            for name in names:
                (new / name).touch()
        assert sorted(os.listdir(folder)) == names and os.listdir(tmp_path) == ["set"]
    with pytest.raises(KeyboardInterrupt), written_folder(folder) as new:
        (new / "d").touch()
        raise KeyboardInterrupt
    assert os.listdir(folder) == ["c"] and os.listdir(tmp_path) == ["set"]


def test_a_file_takes_its_name_when_it_is_complete_and_on_the_disk(tmp_path, monkeypatch):
    """Its content first, then its name, then the folder that lists it: the order in which a power cut may come."""
    path, events = tmp_path / "new" / "file", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    rename = type(path).replace
    monkeypatch.setattr(type(path), "replace", lambda self, to: events.append("renamed") or rename(self, to))
    with written(path) as partial:
        partial.write_text("whole")
        assert not path.exists() and partial.parent == path.parent
    assert path.read_text() == "whole" and os.listdir(path.parent) == ["file"] and replace is os.replace
    assert events == [str(partial), "renamed", str(path.parent)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
def test_after_an_error_the_old_file_is_as_it_was_and_nothing_is_left(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error) if isinstance(error, Exception) else error), written(path) as partial:
        partial.write_text("half of the ne")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_every_artefact_goes_through_the_one_writer(root):
    """A checkpoint, a set of images that all ranks fill, and the streamed npz have ways of their own; nothing else
    renames a file into its place."""
    own = {"checkpoint.py", "files.py", "npz_writer.py", "sample.py", "sharding.py"}
    for path in (root / "mutor_vision").rglob("*.py"):
        found = re.search(r"\.partial|os\.replace|fsync", path.read_text())
        assert path.name in own or not found, f"{path}: {found[0]}"
