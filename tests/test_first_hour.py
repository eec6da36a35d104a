"""benchmarks/first_hour.py has one chance when a GPU is at hand: every stage runs here at sizes that say nothing."""

import json
import subprocess
import sys

import pytest

STAGES = ["train", "sample", "encode", "score", "photographs"]


@pytest.fixture(scope="module")
def first_hour(root):
    """words -> the finished process."""

    def run(*words):
        command = [sys.executable, root / "benchmarks" / "first_hour.py", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=root)

    return run


@pytest.mark.slow
def test_every_stage_runs_and_leaves_its_figures(first_hour, tmp_path, root):
    """All but the tests marked gpu, which are themselves collected below."""
    done = first_hour("--out", tmp_path / "out", "--tiny", "--device", "cpu", "--stages", ",".join(STAGES))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == STAGES
    for stage, result in results.items():
        assert result["rows"] and "error" not in result, stage
        assert all(value > 0 for row in result["rows"] for name, value in row.items()
                   if isinstance(value, float) and name not in ("MFU", "GB")), stage  # fmt: skip
    assert (tmp_path / "out" / "photographs" / "grid.png").is_file()
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
