"""docs/adding-a-data-source.md, run as it is written."""

import csv
import importlib
import json
import re
import sys

import numpy as np
import pytest

from mutor_vision.data import reading


@pytest.fixture
def table(root, tmp_path, monkeypatch, images):
    """The page's code block as the module `table`, and a table of the images of a folder, in another order."""
    code = re.search(r"```python\n(.*?)```", (root / "docs/adding-a-data-source.md").read_text(), re.DOTALL)[1]
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "table.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "module")
    monkeypatch.setattr(reading, "SOURCES", list(reading.SOURCES))
    paths = sorted((path.relative_to(images).as_posix() for path in images.rglob("*.png")), reverse=True)
    with (tmp_path / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("class", "path"), *((path.partition("/")[0], f"images/{path}") for path in paths)])
    (tmp_path / "images").symlink_to(images)
    importlib.import_module("table")
    yield tmp_path / "images.csv"
    del sys.modules["table"]


def test_a_table_gives_the_codes_of_the_folder(table, images, tiny_tokenizer_path, command, tmp_path):
    for name, data in (("folder", images), ("table", table)):
        done = command("mutor", "encode", "--tokenizer", tiny_tokenizer_path, "--data", data, "--workers", 0,
                       "--out", tmp_path / name)  # fmt: skip
        assert done.code == 0, done.err
    one, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("folder", "table"))
    assert one["class_names"] == other["class_names"] and one["shards"] == other["shards"]
    assert np.load(tmp_path / "table" / "codes-00000.npy").shape[0] == 11


def test_its_bad_images_are_named(table, images, tiny_tokenizer_path, command, tmp_path):
    with table.open("a") as file:
        file.write("ant,nothing.png\n")
    done = command("mutor", "encode", "--tokenizer", tiny_tokenizer_path, "--data", table, "--out", tmp_path / "out")
    assert done.code == 3 and "nothing.png" in done.err and "Traceback" not in done.err
    assert command("mutor", "encode", "--tokenizer", tiny_tokenizer_path, "--data", tmp_path / "no.csv", "--out",
                   tmp_path / "out").code == 3  # fmt: skip
