"""benchmarks/first_hour.py has one chance when a GPU is at hand: every stage runs here at sizes that say nothing."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

STAGES = ["tests", "train", "sample", "encode", "score", "photographs"]


@pytest.fixture(scope="module")
def first_hour(root):
    """words -> the finished process."""

    def run(*words):
        command = [sys.executable, root / "benchmarks" / "first_hour.py", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=root)

    return run


@pytest.mark.slow
def test_every_stage_runs_and_leaves_its_figures(first_hour, tmp_path, root):
    """Of the tests marked gpu one file, whose tests are skipped here."""
    earlier = tmp_path / "out" / "photographs" / "run" / "of-an-earlier-try"
    earlier.mkdir(parents=True)
    done = first_hour("--out", tmp_path / "out", "--tiny", "--device", "cpu", "--stages", ",".join(STAGES))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == STAGES
    for stage, result in results.items():
        assert result["rows"] and "error" not in result, stage
        assert all(value > 0 for row in result["rows"] for name, value in row.items()
                   if isinstance(value, float) and name not in ("MFU", "GB")), stage  # fmt: skip
    assert " skipped" in results["tests"]["rows"][0]["outcome"] and not results["tests"]["failures"]
    assert (tmp_path / "out" / "photographs" / "grid.png").is_file() and not earlier.exists()
    # The table goes into the docs of a copy.
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs" / "performance.md").write_text("# Performance\n")
    script = tmp_path / "benchmarks" / "first_hour.py"
    script.write_text((root / "benchmarks" / "first_hour.py").read_text())
    table = subprocess.run(
        [sys.executable, script, "--out", tmp_path / "out", "--table"], capture_output=True, text=True
    )
    assert table.returncode == 0, table.stderr
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert page.startswith("# Performance\n") and table.stdout.strip() in page
    for what in ("16 registers", "graphs", "Inception features", "from photographs to grid: grid"):
        assert what in page


@pytest.mark.slow
def test_a_stage_that_fails_leaves_its_reason_and_the_next_one_runs(first_hour, tmp_path):
    (tmp_path / "no-images").write_text("")
    done = first_hour("--out", tmp_path / "out", "--tiny", "--device", "cpu", "--stages", "encode,photographs",
                      "--images", tmp_path / "no-images")  # fmt: skip
    assert done.returncode == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["encode"]["rows"] and "is a file, expected a folder" in results["photographs"]["error"]


def test_stages_that_do_not_exist_are_refused(first_hour, tmp_path):
    done = first_hour("--out", tmp_path / "out", "--stages", "encode,paint")
    assert done.returncode == 1 and "--stages has paint, expected some of tests, train" in done.stderr


STAND_INS = """
import subprocess, time

def train(options):
    with open(options.out / "pipe", "w") as pipe:
        subprocess.Popen(["sh", "-c", "echo begun; exec sleep 60"], stdout=pipe)
    time.sleep(60)

def sample(options):
    return {"rows": [{"what": "results so far", "text": (options.out / "results.json").read_text()}]}
"""


def test_a_stage_out_of_time_ends_with_all_that_it_started(tmp_path, root, monkeypatch):
    """Its reason is in results.json before the next stage begins; a table needs a machine's name."""
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "first_hour.py"
    script.write_text((root / "benchmarks" / "first_hour.py").read_text())
    (script.parent / "first_hour_stages.py").write_text(STAND_INS)
    spec = importlib.util.spec_from_file_location("first_hour_copy", script)
    first_hour = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(first_hour)
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setitem(first_hour.STAGES, "train", 4)
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, "argv", ["", "--out", tmp_path.name, "--stages", "train,sample"])
    with pytest.raises(SystemExit, match="1"):
        first_hour.main()
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
        first_hour.main()
