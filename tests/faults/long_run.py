"""A long run of a tiny model, twice: left alone, and killed every few minutes. Half an hour on two quiet cores.

    python tests/faults/long_run.py FOLDER [--steps 200000] [--minutes 2]

FOLDER is new. Memory and open files of the run left alone are noted every second. Printed, and added to the file that
MUTOR_SCORE names: whether they stay as they are (the last quarter of the run against the second), whether a file is
left over, and whether the killed run ends with the same files.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import _write_token_set, write_tiny_tokenizer  # noqa: E402

from faults.crash_points import tree  # noqa: E402
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
    while alone.poll() is None:
        try:
            seen.append(state(alone.pid))
        except (OSError, StopIteration):  # it has just ended
            break
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

    kills = 0
    while True:
        job = start(codes, folder / "killed", steps)
        try:
            code = job.wait(arguments.minutes * 60)
            break
        except subprocess.TimeoutExpired:  # on a busy machine more time is needed to get to the next checkpoint
            job.kill()
            job.wait()
            kills += 1
    expected, found = tree(folder / "alone"), tree(folder / "killed")
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    print(f"{kills} kills, exit code {code}, {len(found)} files; that differ or are left over: {differing or 'none'}")
    record(PROMISE, f"the same files after {kills} kills", int(not code and not differing), 1)


if __name__ == "__main__":
    main()
