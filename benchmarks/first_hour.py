"""The first hour on a GPU, most telling first: the tests that need one, the speed of training, sampling, encoding and
scoring, and a small training from photographs to a grid. Every result is written as soon as it is there.

    python benchmarks/first_hour.py --out gpu [--minutes 60] [--images PHOTOGRAPHS] [--stages train,sample]
    python benchmarks/first_hour.py --out gpu --table        # docs/performance.md's GPU table from gpu/results.json

Each stage is a process of its own: one that fails or takes too long leaves a reason, and the next one runs.
PHOTOGRAPHS has one sub-folder a class; without it the last stage takes scikit-learn's digits. --tiny runs every stage
at sizes that say nothing, to see that it runs.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- GPU table: begin -->", "<!-- GPU table: end -->"
# Seconds that a stage may take; one that has less left than a third of it is left out.
STAGES = {"tests": 600, "train": 420, "sample": 420, "encode": 180, "score": 240, "photographs": 900}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, logs and pictures")
    parser.add_argument("--minutes", type=float, default=60, help="for all stages together (default 60)")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--images", type=Path, help="folder of photographs for the last stage")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to see that everything runs")
    parser.add_argument("--table", action="store_true", help="print the table of --out and write it into the docs")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # this process is that stage
    options = parser.parse_args()
    if options.table:
        write_table(json.loads((options.out / "results.json").read_text()))
        return
    if options.stage:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        import first_hour_stages

        result = getattr(first_hour_stages, options.stage)(options)
        (options.out / f"{options.stage}.json").write_text(json.dumps(result, indent=1) + "\n")
        return
    wanted = options.stages.split(",")
    if unknown := set(wanted) - set(STAGES):
        sys.exit(f"error: --stages has {', '.join(sorted(unknown))}, expected some of {', '.join(STAGES)}")
    failed = run_stages(options, [stage for stage in STAGES if stage in wanted])
    sys.exit(1 if failed else 0)


def run_stages(options, wanted: list[str]) -> list[str]:
    """Run them one after another within the time; results.json grows with each. Returns those without a result."""
    options.out.mkdir(parents=True, exist_ok=True)
    path, end, failed = options.out / "results.json", time.monotonic() + 60 * options.minutes, []
    results = json.loads(path.read_text()) if path.is_file() else {}
    for stage in wanted:
        left = end - time.monotonic()
        if left < STAGES[stage] / 3:
            results[stage] = {"error": f"left out: {left:.0f} s left"}
        else:
            results[stage] = run_stage(options, stage, min(left, STAGES[stage]))
        path.write_text(json.dumps(results, indent=1) + "\n")
        failed += [stage] if "error" in results[stage] else []
        print(f"{stage}: {summary(stage, results[stage])}", flush=True)
    return failed


def run_stage(options, stage: str, seconds: float) -> dict:
    begun, log, result = time.monotonic(), options.out / f"{stage}.log", options.out / f"{stage}.json"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--stage", stage], stdout=file, stderr=file, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"no end after {seconds:.0f} s"
        finally:
            # With all that it started: a training left over would slow the next stage down.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not result.is_file():
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        return {"error": f"{code}: {last[:300]}; see {log.name}", "seconds": time.monotonic() - begun}
    return json.loads(result.read_text()) | {"seconds": round(time.monotonic() - begun, 1)}


def summary(stage: str, result: dict) -> str:
    if "error" in result:
        return result["error"]
    rows = result.get("rows", [])
    short = [", ".join(f"{key} {_short(value)}" for key, value in row.items()) for row in rows]
    return f"{result['seconds']:.0f} s" + "".join(f"\n    {line}" for line in short)


def write_table(results: dict) -> None:
    """Every stage's rows as one table between the marks in docs/performance.md."""
    done = {stage: result for stage, result in results.items() if result.get("rows")}
    if not (machines := [result["machine"] for result in done.values() if "machine" in result]):
        sys.exit(f"error: no machine named in the results of {', '.join(results)}; run train, sample, encode or score")
    device = machines[0]
    lines = [BEGIN, f"{device['device']}, torch {device['torch']}; `python benchmarks/first_hour.py`.", ""]
    lines += ["| what | figures |", "|---|---|"]
    for result in done.values():
        for row in result["rows"]:
            (_, name), *figures = row.items()
            lines.append(f"| {name} | {', '.join(f'{_short(value)} {key}' for key, value in figures)} |")
    text = "\n".join([*lines, END])
    print(text)
    docs = ROOT / "docs" / "performance.md"
    page = docs.read_text()
    before, _, rest = page.partition(BEGIN)
    docs.write_text(f"{before}{text}{rest.partition(END)[2]}" if rest else f"{page.rstrip()}\n\n{text}\n")


def _short(value) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}" if isinstance(
        value, float
    ) else str(value)  # fmt: skip


if __name__ == "__main__":
    main()
