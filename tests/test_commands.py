"""The commands as a person types them."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from mutor_vision.cli import run_command
from mutor_vision.errors import DataError, UserError
from mutor_vision.model import lora


@pytest.mark.parametrize(
    "words, message, code",
    [
        (["--preset", "digits-mutor2d"], "unknown preset 'digits-mutor2d'; did you mean 'digits-mutor-2d'?", 2),
        (["--preset", "digits-mutor-2d", "--set", "leraning=1"], "unknown setting 'leraning'", 2),
        (["--preset", "digits-mutor-2d", "--set", "registers.cont=9"], "did you mean 'registers.count'?", 2),
        (["--preset", "digits-mutor-2d", "--set", "registers.count=-3"], "registers.count -3", 2),
        (["--preset", "digits-mutor-2d", "--step", "3"], "unrecognized arguments: --step", 2),
        (["--preset", "digits-mutor-2d", "--codes", "/nowhere"], "/nowhere is not a folder", 2),
        (["--preset", "imagenet256-B-next-token"], "model.vocab_size is 16384, but the token set", 5),
        (["--preset", "digits-mutor-2d", "--set", "batch_size=12"], "a 4x4 grid has 16 slots", 2),
    ],
)
@pytest.mark.bad_input("command line")
def test_train_imagenet_refuses_in_one_line_and_writes_nothing(command, tmp_path, token_set_path, words, message, code):
    if "--codes" not in words:
        words = [*words, "--codes", token_set_path]
    result = command("train/imagenet.py", *words, "--out", tmp_path / "run")
    assert result.code == code
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1 and result.err.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out, message", [
    ("file", "is a file, expected a folder"), ("file/run", "cannot be written (Not a directory"),
])  # fmt: skip
def test_outputs_of_training_and_merging_are_tried_before_the_work(command, tmp_path, out, message):
    """Inputs that do not exist: whoever speaks of them has begun to work."""
    (tmp_path / "file").touch()
    words = ("--preset", "digits-mutor-2d", "--codes", "/nowhere", "--out", tmp_path / out)
    result = command("train/imagenet.py", *words)
    assert result.code == 2 and message in result.err
    with pytest.raises(UserError, match="cannot be written .Not a directory|exists already"):
        lora.merge("/nowhere", "/nowhere", tmp_path / out)


def test_dry_run_prints_the_resolved_configuration(command, tmp_path, token_set_path):
    words = ("--preset", "digits-mutor-2d-15", "--codes", token_set_path, "--set", "registers.count=5", "--steps", 7)
    config = json.loads(command("train/imagenet.py", *words, "--out", tmp_path / "run", "--dry-run").out)
    assert config["steps"] == 7 and config["registers"]["count"] == 5 and config["model"]["vocab_size"] == 32
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, data, held_out", [("train/imagenet.py", "codes", "val_codes"),
                                                  ("tokenizers/train_vq.py", "data", "val_data")])  # fmt: skip
def test_both_training_commands_take_set_and_flags_alike(command, token_set_path, name, data, held_out):
    def run(*words):
        preset = "digits-mutor-2d-15" if data == "codes" else "digits"
        done = command(name, "--preset", preset, f"--{data}", token_set_path, "--out", "none", *words)
        return done.code, json.loads(done.out) if done.code == 0 else {}, done.err

    flag = f"--{held_out.replace('_', '-')}"
    code, values, _ = run("--set", f"{held_out}=a", "--dry-run")
    assert code == 0 and values[held_out] == "a" and values[data] == str(token_set_path)
    code, values, error = run(flag, "b", "--steps", 3, "--dry-run")
    assert (code, values[held_out], values["steps"], values["warmup_steps"]) == (0, "b", 3, 3)
    assert "warm-up shortened" in error and error.count("\n") == 1
    for words in ((flag, "b", "--set", f"{held_out}=a"), ("--set", f"{data}=a"), ("--steps", 3, "--set", "steps=4")):
        code, _, error = run(*words, "--dry-run")
        assert code == 2 and "contradict each other" in error and error.count("\n") == 1


def test_torchruns_summary_shows_the_root_cause_in_one_line(tmp_path, monkeypatch, capsys):
    """From the file that a process leaves for torchrun, as torchrun prints it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def main():
        raise DataError("a.jpg is no image;\n  replace or remove it")

    path = tmp_path / "error.json"
    for name, value in {
        "TORCHELASTIC_RUN_ID": "1",
        "TORCHELASTIC_ERROR_FILE": path,
        "RANK": 1,
        "WORLD_SIZE": 2,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    line = "error [rank 1]: a.jpg is no image; replace or remove it"
    assert stopped.value.code == 3 and capsys.readouterr().err.strip() == line
    summary = ChildFailedError("train", {1: ProcessFailure(local_rank=1, pid=1, exitcode=3, error_file=str(path))})
    shown = summary.format_msg().split("Root Cause")[1].splitlines()
    assert [text for text in shown if "traceback" in text] == [f"  traceback : {line}"]
    assert not [text for text in shown if 'File "' in text]


@pytest.mark.parametrize("error, line", [
    (OSError(28, os.strerror(28), "runs/x.png"), "No space left on device (runs/x.png); make space"),
    (OSError(30, os.strerror(30)), "Read-only file system; make space or mend the disk"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device; make space"),
    (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), "No space left on device; make space"),
])  # fmt: skip
def test_a_disk_that_fails_during_the_work_is_one_line(error, line, capsys, monkeypatch):
    monkeypatch.delenv("MUTOR_DEBUG", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and line in said and said.count("\n") == 1


@pytest.mark.parametrize("error, line", [
    (RuntimeError("unexpected pos 3840 vs 3792"), "No space left on device; make space"),
    (UserError("/dev/shm is full; use --workers 0"), "error: /dev/shm is full; use --workers 0"),
])  # fmt: skip
def test_a_full_disk_behind_another_error_is_told_but_not_instead_of_it(error, line, capsys, monkeypatch):
    monkeypatch.delenv("MUTOR_DEBUG", raising=False)

    def main():
        try:
            raise OSError(28, os.strerror(28))
        except OSError:
            raise error from None

    with pytest.raises(SystemExit):
        run_command(main)
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ("sample", "RUN", "--per-class", "4", "--out", "OUT.png"),
    ("sample", "RUN", "--num-images", "64", "--out", "OUT.npz"),
    ("convert", "--to", "llamagen", "RUN", "OUT.pt"),
])  # fmt: skip
def test_results_that_do_not_fit_are_one_line_and_leave_nothing(enter, forked, trained_run, tmp_path, words):
    """Files of 8 kB at most stand for a disk that is full; it takes the file that tries it."""
    words = [word.replace("RUN", str(trained_run)).replace("OUT", str(tmp_path / "out")) for word in words]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        enter("mutor", *words)

    done = forked(limited)
    assert done.code == 2 and "results cannot be written: File too large" in done.out, done.out
    assert "Traceback" not in done.out and not list(tmp_path.iterdir())


def test_other_failures_keep_their_traceback():
    def main():
        open("/nowhere/x")

    with pytest.raises(FileNotFoundError):
        run_command(main)


def test_blanks_in_a_name_are_printed_as_they_are(capsys, monkeypatch):
    monkeypatch.delenv("MUTOR_DEBUG", raising=False)

    def main():
        raise DataError("my  photos/a.jpg is no image;\n  remove it")

    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr().err == "error: my  photos/a.jpg is no image; remove it\n"


def test_a_closed_pipe_is_no_error(root, tmp_path):
    """The command goes on to its end, and what comes after the printing is done."""
    code = f"""
import pathlib, sys
from mutor_vision.cli import run_command
def main():
    for i in range(100000):
        print(i)
    print("a word", file=sys.stderr)
    pathlib.Path({str(tmp_path / "result")!r}).write_text("done")
run_command(main)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b"a word\n"
    assert process.wait(timeout=60) == 0 and (tmp_path / "result").read_text() == "done"


@pytest.mark.slow
def test_the_demo_goes_through_every_stage(command, starts_are_forked, tmp_path, monkeypatch):
    """The whole pipeline with few images and steps: numbers mean nothing, every command and file is real. Commands are
    forked instead of started; how they are started is what test_doors does."""
    from sklearn import datasets

    few = datasets.load_digits()
    few.images, few.target = few.images[:400], few.target[:400]
    monkeypatch.setattr(datasets, "load_digits", lambda: few)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # two ranks
    result = command("train/demo.py", "--out", tmp_path, "--tokenizer-steps", 3, "--steps", 20, "--samples", 40)
    assert result.code == 0, result.out[-2000:] + result.err[-2000:]
    assert len(starts_are_forked) == 12
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in result.out
    for picture in (
        "inputs.png",
        "reconstructions.png",
        "losses.png",
        "samples-next-token.png",
        "samples-MuToR-2D.png",
    ):
        assert f'src="{picture}"' in page and (tmp_path / picture).stat().st_size > 1000
    results = json.loads((tmp_path / "demo.json").read_text())["results"]
    assert results.keys() == {"next-token", "MuToR-2D"}
    assert all(isinstance(value, float) for column in results.values() for value in column.values())


def test_info_says_the_same_to_programs(command, tmp_path, trained_run, token_set_path):
    printed = command("mutor", "info", trained_run, "--json", tmp_path / "run.json").out
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["kind"] == "transformer" and found["status"]["state"] == "done"
    assert f"done at step {found['status']['step']}" in printed
    for name, weights in found["weights"].items():
        assert f"{found['checkpoint']}/{name}.safetensors: {weights['numbers']:,} numbers" in printed
    assert f"    batch_size = {found['config']['batch_size']}\n" in printed

    printed = command("mutor", "info", token_set_path, "--json", tmp_path / "set.json").out
    found = json.loads((tmp_path / "set.json").read_text())
    assert f"{found['images']} images of {found['classes']} classes" in printed and found["grid"] == [4, 4]


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("tr", {"train", "train-tokenizer"}),
        ("train --cod", {"--codes"}),
        ("train --preset digits-mutor-2d", {"digits-mutor-2d", "digits-mutor-2d-15"}),
        ("train-tokenizer --preset dig", {"digits"}),
        ("sample runs/x --classes gold", set()),  # a class or a file: bash's own completion
    ],
)
def test_bash_completes(command, typed, expected):
    if not (bash := shutil.which("bash")):
        pytest.skip("needs bash")
    words = f"mutor {typed}".split()
    script = f"{command('mutor', 'shell-completion').out}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
    done = subprocess.run([bash, "-c", script + '\n_mutor; echo "${COMPREPLY[@]}"'], capture_output=True, text=True)
    assert not done.stderr and set(done.stdout.split()) == expected
