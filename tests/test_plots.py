"""`mutor plot`: logs as kills leave them, and legends that tell runs apart."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from mutor_vision.commands.plot import shortest_names
from mutor_vision.storage.run_log import read_log

pytest.importorskip("matplotlib")


@pytest.fixture
def plot(command):
    """Exit code and what it printed."""
    return lambda *words: dataclasses.astuple(command("mutor", "plot", *words))


def write_log(run, key="next_token", behind="", steps=10):
    run.mkdir(parents=True)
    lines = [json.dumps({"step": step, key: 3 - 0.1 * step}) for step in range(1, steps + 1)]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n" + behind)
    return run


@pytest.mark.parametrize(
    "behind", ['{"step": 11, "next_t', "\0\0\0\0", "7\n", '{"loss": 1}\n', "[" * 100_000, "{}\ntext\n"]
)
def test_cut_lines_are_left_out_and_said(tmp_path, behind, capsys):
    assert len(read_log(write_log(tmp_path / "run", behind=behind))) == 10
    assert "cut or damaged, and left out" in capsys.readouterr().out
    assert len(read_log(write_log(tmp_path / "whole"))) == 10 and capsys.readouterr().out == ""


def test_bytes_that_are_no_text_do_not_hide_the_other_lines(tmp_path):
    run = write_log(tmp_path / "run")
    with open(run / "log.jsonl", "ab") as file:
        file.write(b'{"step": 11, "a\xff')
    assert len(read_log(run)) == 10


def test_a_picture_of_two_runs_of_one_name_tells_them_apart(plot, tmp_path):
    runs = [write_log(tmp_path / parent / "run", behind='{"st') for parent in ("first", "second")]
    code, out, _ = plot(*runs, "--out", tmp_path / "p.svg")
    assert code == 0 and "1 line(s) cut" in out
    picture = (tmp_path / "p.svg").read_text()
    assert "first/run" in picture and "second/run" in picture


@pytest.mark.parametrize("key", ["train_loss", "val/ema/psnr"])
def test_other_curves_are_drawn_where_the_known_ones_are_missing(plot, tmp_path, key):
    code, _, error = plot(write_log(tmp_path / "run", key), "--out", tmp_path / "p.png")
    assert code == 0 and (tmp_path / "p.png").stat().st_size > 1000, error


@pytest.mark.parametrize("name, message", [
    ("p.xyz", "expected the ending .* .png,"), ("p", "expected the ending"), ("", "expected the ending"),
    ("file/p.png", "cannot be written"), ("folder.png", "is a folder"),
])  # fmt: skip
def test_outputs_are_checked_before_anything_is_drawn(plot, tmp_path, name, message):
    write_log(tmp_path / "run")
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    code, _, error = plot(tmp_path / "run", "--out", tmp_path / name)
    assert code == 2 and len(error.splitlines()) == 1
    assert re.search(message, error)


def test_names_that_matplotlib_would_read_otherwise_are_drawn(plot, tmp_path):
    runs = [write_log(tmp_path / name) for name in ("_hidden", "lr$1_x$^^$", "new\nline")]
    code, _, error = plot(*runs, "--out", tmp_path / "p.svg")
    assert code == 0, error
    picture = (tmp_path / "p.svg").read_text()
    assert "_hidden" in picture and "$1_x$^^$" in picture


def test_a_legend_has_the_shortest_ends_that_differ():
    def names(*paths):
        return list(shortest_names([Path(path) for path in paths]))

    assert names("/a/x/run", "/b/x/run", "/b/y") == ["a/x/run", "b/x/run", "y"]
    assert names("/run", "/a/run") == ["/run", "a/run"]
    assert names("/a/run", "/a/../a/run") == ["run"]
