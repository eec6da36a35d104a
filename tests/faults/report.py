"""docs/reliability.md from what the tests found.

    make test-slow                                  # writes build/scores.jsonl; hours on two cores
    python tests/faults/report.py build/scores.jsonl

The figures are kept in tests/faults/scores.json; a test makes the page of them again and compares.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCORES, PAGE = ROOT / "tests" / "faults" / "scores.json", ROOT / "docs" / "reliability.md"
# Title of a promise -> what it says, and where it is tried.
PROMISES = {
    "A killed job is started again by the same command": (
        "SIGKILL before every change of a file, then the same command: the files of a job that was never killed",
        "test_crash_points.py",
    ),
    "A job of several processes survives kills": (
        "one or both of two processes under torchrun killed at random moments, again and again, then the same command: "
        "the files of a job that was never killed", "test_killed_jobs.py",
    ),
    "A long run stays as it is": (
        "200,000 steps of a tiny model: memory, open files and the folder, left alone and killed every two minutes",
        "faults/long_run.py",
    ),
    "A full disk is told, and space mends it": (
        "on disks from 8 kB to nearly what the job needs: one line, no wreck, the last checkpoint whole; then, with "
        "space, the same command ends as it would have", "test_crash_points.py",
    ),
    "A training that is asked to stop saves first": (
        "SIGTERM, SIGUSR1, Ctrl-C: all save the same step and go on to the bit ([clusters](clusters.md))",
        "test_preemption.py",
    ),
    "A gradient that is not finite changes nothing": (
        "on any rank, in any micro-batch: weights, moments and their counts stay as they are", "test_nonfinite.py",
    ),
    "What is not restored is noticed": (
        "each part of a checkpoint left out in turn: the continued run differs", "test_resume.py",
    ),
    "Damage to files is found": (
        "a flipped bit, zeros, a cut, an empty, missing or foreign file: refused in a line, stepped over, harmless",
        "test_damage.py",
    ),
    "Bytes changed at random": (
        "in configurations, manifests, npz, safetensors, training state: the same, or refused in one line",
        "test_fuzz.py",
    ),
    "Bad token sets are told": (
        "what was got, what was expected, what to do; its exit code; no traceback", "test_catalogue.py",
    ),
    "Bad checkpoints are told": (
        "what was got, what was expected, what to do; its exit code; no traceback", "test_catalogue_checkpoints.py",
    ),
    "Bad image folders are told": (
        "what was got, what was expected, what to do; its exit code; no traceback", "test_catalogue_images.py",
    ),
    "Bad settings and arguments are told": (
        "what was got, what was expected, what to do; its exit code; no traceback", "test_catalogue_settings.py",
    ),
    "Bad inputs of the evaluation are told": (
        "what was got, what was expected, what to do; its exit code; no traceback", "test_catalogue_scores.py",
    ),
    "Hostile files are refused": (
        "files and names from strangers, by every command that reads them: nothing runs, nothing is written outside of "
        "--out, memory stays small, and a line says why", "test_hostile.py",
    ),
    "Bad inputs are told": (
        "images, settings, command lines, files of the evaluation and of others, each refused by name in one line: the "
        "tests marked `bad_input`", "conftest.py",
    ),
    "A process that ends or hangs is named": (
        "the others end within the timeout and say which rank, at which step", "test_lost_process.py",
    ),
    "Every image is accounted for": (
        "images put in = images encoded + images left out by name", "test_skip_bad.py",
    ),
}  # fmt: skip
HEAD = """# Reliability: what was broken on purpose, and what held

Trainings last for days on machines that are taken away, and files come from strangers. Each row is a promise, the
test that tries it, and what that test counted; `make test-slow` tries all cases, `make test` a sample of them at
every commit. The table is written by `tests/faults/report.py`.

"""
LIMITS = """
## Limits

- A kill leaves what was written in the system's cache; a power failure does not. That files are flushed before they
  are renamed is tested by the order of the calls, not by pulling a plug.
- To the bit means: on the CPU, with the same number of threads, and with one or two processes. Among more, sums of
  gradients are rounded in an order that a restart changes (1e-8 in a weight after 8 steps of four processes). CUDA's
  kernels were not held to it.
- At another number of processes a run goes on with the same images at each step; dropout draws other noise.
- Renaming is atomic on local disks and NFS, not on object stores. Locks are those of the file system.
- Crash points are all of a job's changes of files, but for TensorBoard's, whose thread writes when it likes.
- The long run takes three quarters of an hour: its memory is compared between quarters of that, not between hours.
- A hash shows an accident or an exchange, not who made a file.
- Loss spikes are logged and not acted upon: what a spike is depends on the run.
"""


def page(scores: dict[str, dict[str, list[int]]]) -> str:
    """scores: promise -> case -> [held, tried]."""
    if unknown := scores.keys() - PROMISES.keys():
        raise SystemExit(f"'{min(unknown)}' is no promise of tests/faults/report.py; add it there")
    lines = ["| promise | held / tried | by | cases |", "|---|---|---|---|"]
    for title, (text, test) in PROMISES.items():
        if found := scores.get(title):
            held, tried = (sum(case[i] for case in found.values()) for i in (0, 1))
            cases = ", ".join(f"{name} {case[0]}/{case[1]}" for name, case in sorted(found.items()))
            if len(found) > 15:
                cases = f"{len(found)}; those that failed: " + (
                    ", ".join(name for name, case in sorted(found.items()) if case[0] < case[1]) or "none"
                )
            lines.append(f"| **{title}**: {text} | {held:,} / {tried:,} | tests/{test} | {cases} |")
    return HEAD + "\n".join(lines) + "\n" + LIMITS


def collected(lines: list[str]) -> dict[str, dict[str, list[int]]]:
    """Lines of score.record -> scores; of a case that occurs twice the numbers are added."""
    scores: dict[str, dict[str, list[int]]] = {}
    for line in map(json.loads, lines):
        case = scores.setdefault(line["promise"], {}).setdefault(line["what"], [0, 0])
        case[0] += line["held"]
        case[1] += line["tried"]
    return {title: scores[title] for title in PROMISES if title in scores} | scores


if __name__ == "__main__":
    found = collected(Path(sys.argv[1]).read_text().splitlines())
    PAGE.write_text(page(found))
    lines = (f"{json.dumps(title)}: {json.dumps(cases)}" for title, cases in found.items())
    SCORES.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line for each promise
    print(f"{PAGE}: {len(found)} promises")
