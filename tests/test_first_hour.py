"""benchmarks/first_hour.py has one chance when a GPU is at hand: every stage runs here at sizes that say nothing."""

import importlib.util
import json
import os
import sys
import time

import pytest

SCRIPT = "benchmarks/first_hour.py"
STAGES = ["train", "sample", "encode", "score", "photographs"]  # "tests" needs the log that the driver gives it


@pytest.fixture
def copied(root, tmp_path):
    """The script in a tree of its own, as a module: it writes into the docs beside it."""
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "first_hour.py"
    script.write_text((root / SCRIPT).read_text())
    spec = importlib.util.spec_from_file_location("first_hour_copy", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_stage_runs_and_leaves_its_figures(forked, starts_are_forked, copied, tmp_path, monkeypatch):
    out = tmp_path / "out"
    earlier = out / "photographs" / "run" / "of-an-earlier-try"
    earlier.mkdir(parents=True)
    results = {}
    for stage in STAGES:
        done = forked(SCRIPT, "--out", out, "--tiny", "--device", "cpu", "--stage", stage)
        assert done.code == 0, f"{stage}: {done.out}"
        results[stage] = json.loads((out / f"{stage}.json").read_text())
        assert results[stage]["rows"], stage
        assert all(value > 0 for row in results[stage]["rows"] for name, value in row.items()
                   if isinstance(value, float) and name not in ("MFU", "GB")), stage  # fmt: skip
    assert (out / "photographs" / "grid.png").is_file() and not earlier.exists()
    # The table goes into the docs of the copy.
    (out / "results.json").write_text(json.dumps(results))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text("# Performance\n")
    monkeypatch.setattr(sys, "argv", ["", "--out", str(out), "--table"])
    copied.main()
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert page.startswith("# Performance\n") and copied.BEGIN in page and copied.END in page
    for what in ("16 registers", "graphs", "Inception features", "from photographs to grid: grid"):
        assert what in page


@pytest.mark.slow
def test_a_stage_that_fails_leaves_its_reason_and_the_others_run(command, tmp_path):
    """In processes of their own. Of the tests marked gpu one file, whose tests are skipped here."""
    (tmp_path / "no-images").write_text("")
    done = command(SCRIPT, "--out", tmp_path / "out", "--tiny", "--device", "cpu", "--stages",
                   "tests,encode,photographs", "--images", tmp_path / "no-images")  # fmt: skip
    assert done.code == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["tests", "encode", "photographs"]
    assert " skipped" in results["tests"]["rows"][0]["outcome"] and not results["tests"]["failures"]
    assert results["encode"]["rows"] and "is a file, expected a folder" in results["photographs"]["error"]


def test_stages_that_do_not_exist_are_refused(command, tmp_path):
    done = command(SCRIPT, "--out", tmp_path / "out", "--stages", "encode,paint")
    assert done.code == 1 and "--stages has paint, expected some of tests, train" in done.err


STAND_INS = """
import subprocess, time

def train(options):
    with open(options.out / "pipe", "w") as pipe:
        subprocess.Popen(["sh", "-c", "echo begun; exec sleep 60"], stdout=pipe)
    time.sleep(60)

def sample(options):
    return {"rows": [{"what": "results so far", "text": (options.out / "results.json").read_text()}]}
"""


def test_a_stage_out_of_time_ends_with_all_that_it_started(copied, tmp_path, monkeypatch):
    """Its reason is in results.json before the next stage begins; a table needs a machine's name."""
    (tmp_path / "benchmarks" / "first_hour_stages.py").write_text(STAND_INS)
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setitem(copied.STAGES, "train", 4)
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, "argv", ["", "--out", tmp_path.name, "--stages", "train,sample"])
    with pytest.raises(SystemExit, match="1"):
        copied.main()
    os.set_blocking(pipe, True)
    begun = time.monotonic()
    assert os.read(pipe, 100) == b"begun\n" and os.read(pipe, 100) == b"", "written by what the stage started"
    assert time.monotonic() - begun < 30
    os.close(pipe)
    results = json.loads((tmp_path / "results.json").read_text())
    assert "no end after 4 s" in results["train"]["error"]
    assert results["train"]["error"] in results["sample"]["rows"][0]["text"]
    monkeypatch.setattr(sys, "argv", ["", "--out", tmp_path.name, "--table"])
    with pytest.raises(SystemExit, match="error: no machine named in the results of train, sample; run"):
        copied.main()
