"""A long run of a tiny model, twice at the same time: left alone, and killed every few minutes. Forty minutes on two
cores.

    python tests/faults/long_run.py FOLDER [--steps 200000] [--minutes 2]

FOLDER is new. Memory and open files of the run left alone are noted every second. Printed, and added to the file that
MUTOR_SCORE names: whether they stay as they are (the last quarter of the run against the second), whether a file is
left over, and whether the killed run ends with the same files.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import _write_token_set, write_tiny_tokenizer  # noqa: E402

from faults.crash_points import differing, tree  # noqa: E402
from faults.score import record  # noqa: E402

PROMISE = "A long run stays as it is"
TRAIN = """--preset digits-mutor-2d-15 --set registers.count=5 --set model.layers=1 --set model.heads=2
    --set model.dim=16 --set batch_size=4 --set val_every=5000 --set log_every=100 --set save_every=1000
    --set sample_every=20000 --set warmup_steps=0""".split()


def start(codes: Path, out: Path, steps: int) -> subprocess.Popen:
    words = [sys.executable, "-m", "mutor_vision", "train", "--codes", codes, *TRAIN, "--steps", steps, "--out", out]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [str(word) for word in words], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )


def state(pid: int) -> tuple[float, int]:
    """(MB of memory that belong to this process alone, open files)"""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    memory = int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
    return memory, len(os.listdir(f"/proc/{pid}/fd"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=2, help="between kills")
    arguments = parser.parse_args()
    folder, steps = arguments.folder.resolve(), arguments.steps
    folder.mkdir(parents=True)
    write_tiny_tokenizer(folder / "tokenizer")
    codes = _write_token_set(folder / "codes", folder / "tokenizer", 60, 0)

    alone, seen = start(codes, folder / "alone", steps), []
    killed, kills = start(codes, folder / "killed", steps), 0
    since = time.monotonic()
    while alone.poll() is None or killed.poll() is None:
        with contextlib.suppress(OSError, StopIteration):  # it has just ended
            seen.append(state(alone.pid))
        if time.monotonic() - since > arguments.minutes * 60 and killed.poll() is None:
            killed.kill()
            killed.wait()
            kills, killed, since = kills + 1, start(codes, folder / "killed", steps), time.monotonic()
        time.sleep(1)
    assert alone.wait() == 0, f"see {folder}/alone.log"
    quarter = len(seen) // 4
    second, last = seen[quarter : 2 * quarter], seen[-quarter - 2 : -2]  # without its end, when it tidies up
    memory = [statistics.median(each[0] for each in part) for part in (second, last)]
    files = [max(each[1] for each in part) for part in (second, last)]
    grown = memory[1] / memory[0] - 1
    print(f"{len(seen)} s: memory {memory[0]:.1f} MB, then {memory[1]:.1f} MB ({grown:+.2%}); open files {files}")
    record(PROMISE, f"memory within 2 % ({grown:+.1%} over {steps:,} steps)", int(abs(grown) < 0.02), 1)
    record(PROMISE, "open files", int(files[1] <= files[0]), 1)
    expected, found = tree(folder / "alone"), tree(folder / "killed")
    wrong = differing(expected, found)
    what = f"{len(found)} files; that differ or are left over: {wrong or 'none'}"
    print(f"{kills} kills, exit code {killed.returncode}, {what}")
    record(PROMISE, f"the same files after {kills} kills", int(not killed.returncode and not wrong), 1)


if __name__ == "__main__":
    main()
