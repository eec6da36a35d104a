"""Bad settings, command lines and surroundings, as a user may meet them: the command ends with the exit code, in one
line that says what is wrong. What the catalogue names and is no mistake here is done as its row says."""

import errno
import json
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from faults.rows import nothing, numbers, png, resealed, text, tried, weights, without, words_of
from faults.score import record

from mutor_vision.storage.seal import write_sealed
from mutor_vision.tokenizer.model import tokenizer_identity

RANK = re.compile(r"^error \[rank -?\w+\]")
PROMISE = "Bad settings and arguments are told"
LAST, BEFORE = "checkpoints/step-0000010", "checkpoints/step-0000005"
DRY = "train --preset own --codes {codes} --out {out} --dry-run "
TRAIN = "train --preset own --codes {codes} --out {out} "
RESUME = "train --preset own --codes {codes} --out {run} "
TOKENIZER = "train-tokenizer --preset digits --data {data} --out {out} "
GRID = "sample {run} --per-class 1 --classes 0 --out {out}.png "
SET = "sample {run} --num 10 --out {out}.npz "
ENCODE = "encode --tokenizer {tokenizer} --data {data} --out {out} --workers 0 "


def config(content):
    """Another config.json in the one checkpoint of a run, which is whole. content: bytes or text, or a function of what
    the old one holds."""

    def damage(folder):
        run = folder / "run"
        without(BEFORE)(run)
        new = content(json.loads((run / LAST / "config.json").read_text())) if callable(content) else content
        text("config.json", new if isinstance(new, str | bytes) else json.dumps(new))(run / LAST)
        resealed(run / LAST)

    return damage


def setting(**changes):
    return config(lambda values: values | {"config": values["config"] | changes})


def twice(values):
    """The settings, of which one stands there twice."""
    return json.dumps(values).replace('"steps": 10', '"steps": 10, "steps": 20')


def crlf(values):
    return json.dumps(values, indent="\t").replace("\n", "\r\n")


# Row -> config.json of a checkpoint, exit code, what the line says.
FILES = {
    "D1 no config.json": (without("run/config.json"), "info {run}", 2, "is no run, checkpoint or"),
    "D2 not JSON": (config('{"format": 4, oops}'), GRID, 4, "is not complete JSON (Expecting property name enclosed i"),
    "D3 empty": (config(""), GRID, 4, "is not complete JSON"),
    "D4 a list": (config("[]"), GRID, 4, "holds [], expected an object"),
    "D5 an unknown name in a file": (setting(leraning_rate=1), GRID, 4, "unknown setting 'leraning_rate'"),
    "D6 a name twice": (config(twice), GRID, 4, "'steps' stands there twice"),
    "D7 a number as text": (setting(lr="1e-4"), GRID, 4, "lr is '1e-4', expected a finite number"),
    "D8 NaN in a file": (setting(lr=float("nan")), GRID, 4, "lr is nan, expected a finite number"),
    "D12 a truth value as text": (setting(activation_checkpointing="False"), GRID, 4, "is 'False', expected true or f"),
    "D13 a tag of Python": (config("!!python/object/apply:os.system ['touch x']"), GRID, 4, "is not complete JSON"),
    "D14 anchors of YAML": (config('a: &a ["x"]\nb: &b [*a, *a, *a]\n'), GRID, 4, "is not complete JSON"),
    "D15 nested": (config("[" * 200_000), GRID, 4, "nested too deeply"),
    "D16 50 MB": (text("run/config.json", b" " * 50_000_000), "info {run}", 4, "is not complete JSON"),
    "D19 a mark of UTF-8": (config(b"\xef\xbb\xbf{}"), GRID, 4, "is not complete JSON (Unexpected UTF-8 BOM"),
    "D19 tabs and CRLF": (config(crlf), GRID, 0, "1 images"),
}  # fmt: skip

# Row -> words after those of a dry run, exit code, what is said.
SETTINGS = {
    "D5 an unknown name": ("--set leraning_rate=1", 2, "unknown setting 'leraning_rate'"),
    "D5 a name that is nearly right": ("--set ema_decy=0", 2, "did you mean 'ema_decay'?"),
    "D6 the same name twice": ("--set lr=1 --set lr=2", 0, '"lr": 2.0'),
    "D7 text for a number": ("--set lr=fast", 2, "lr is 'fast', expected a finite number"),
    "D8 more than a number holds": ("--set lr=1e400", 2, "lr is inf, expected a finite number"),
    "D8 NaN": ("--set lr=NaN", 2, "lr is nan, expected a finite number"),
    "D9 lr 0": ("--set lr=0", 2, "lr is 0.0, expected more than 0"),
    "D9 lr negative": ("--set lr=-1e-4", 2, "lr is -0.0001, expected more than 0"),
    "D10 batch 0": ("--set batch_size=0", 2, "batch_size is 0, expected more than 0"),
    "D10 batch -1": ("--set batch_size=-1", 2, "batch_size is -1, expected more than 0"),
    "D10 batch 2.5": ("--set batch_size=2.5", 2, "batch_size is '2.5', expected a whole number"),
    "D10 batch true": ("--set batch_size=true", 2, "batch_size is 'true', expected a whole number"),
    "D11 no steps": ("--steps 0", 2, "steps is 0, expected more than 0"),
    "D12 False": ("--set activation_checkpointing=False", 0, '"activation_checkpointing": false'),
    "D12 no": ("--set activation_checkpointing=no", 2, "is 'no', expected true or false"),
    "D17 include": ("--set include=../../etc/passwd", 2, "unknown setting 'include'"),
    "D18 a variable": ("--set val_codes=${{env:HOME}}", 0, '"val_codes": "${env:HOME}"'),
    "D23 a width without heads": ("--set model.heads=5", 2, "model.dim 32 over model.heads 5 is 6.4 a head, expected"),
    "D23 an odd part of the rotation": ("--set model.heads=16", 2, "expected a multiple of 4 (2D rotary embedding)"),
    "D24 another codebook than the set's": ("--set model.vocab_size=1", 5, "model.vocab_size is 1, but the token set"),
    "D24 a negative codebook": ("--set model.vocab_size=-1", 2, "model.vocab_size is -1, expected 0 or more"),
    "D27 min_lr above lr": ("--set schedule=cosine --set min_lr=1", 2, "min_lr is 1, expected at most lr, 0.003"),
    "D28 EMA 1": ("--set ema_decay=1.0", 2, "ema_decay is 1.0, expected at least 0 and below 1"),
    "D28 EMA 1.5": ("--set ema_decay=1.5", 2, "ema_decay is 1.5, expected at least 0 and below 1"),
    "D28 EMA negative": ("--set ema_decay=-0.1", 2, "ema_decay is -0.1, expected at least 0 and below 1"),
    "D29 dropout 1": ("--set model.token_dropout=1.0", 2, "model.token_dropout is 1.0, expected at least 0 and below"),
    "D30 betas": ("--set betas=0.9,1.0", 2, "betas is (0.9, 1.0), expected two numbers of at least 0, below 1"),
    "D31 clip 0": ("--set clip=0", 0, '"clip": 0.0'),
    "D31 clip negative": ("--set clip=-1", 2, "clip is -1.0, expected 0 or more"),
    "D32 fp16": ("--set precision=float16", 2, "precision is 'float16', expected auto, float32 or bfloat16"),
    "D35 one checkpoint": ("--set keep=1", 2, "keep is 1, expected 2 or more"),
    "E2 an unknown option": ("--step 3", 2, "unrecognized arguments: --step 3; see"),
    "E3 an abbreviated option": ("--val {codes}", 2, "unrecognized arguments: --val"),
    "E4 an option twice": ("--steps 3 --steps 4", 0, '"steps": 4'),
    "E4 an option and a setting": ("--steps 3 --set steps=4", 2, "--steps 3 and --set steps=4 contradict each other"),
    "E2 an unknown preset": ("--preset owm", 2, "unknown preset 'owm'; did you mean 'own'?"),
    "E16 -1, of a training": ("--set seed=-1", 2, "seed is -1, expected 0 to 2^63 - 1"),
    "E16 2^64, of a training": ("--set seed=18446744073709551616", 2, "seed is 18446744073709551616, expected 0 to"),
    "E14 -1, of the pictures of a training": ("--set sample_cfg_scale=-1", 2, "sample_cfg_scale is -1.0, expected 0 t"),
}  # fmt: skip


def bare(folder):
    (folder / "bare").mkdir()
    os.chdir(folder / "bare")


A_FILE = text("out", "x")
# Row -> what is done to a folder, a command's words, exit code, what the line says.
WORDS = {
    "D20 a batch over GPUs": (nothing, "plan --preset own-mutor-2d-80 --gpus 7", 2, "cannot be split over 7 GPUs; use"),
    "D21 parts that do not divide": (nothing, TRAIN + "--set micro_batch=5", 0, "1 process(es)"),
    "D21 parts above the batch": (nothing, TRAIN + "--set micro_batch=13", 2, "micro_batch is 13, expected 0 to batch"),
    "D22 pixels and levels": (nothing, TOKENIZER + "--set model.image_size=27", 2, "model.image_size is 27, expected "),
    "D24 no codes": (nothing, TOKENIZER + "--set model.codebook_size=0", 2, "model.codebook_size is 0, expected 2 to"),
    "D24 one code": (nothing, TOKENIZER + "--set model.codebook_size=1", 2, "model.codebook_size is 1, expected 2 to"),
    "D24 too many codes": (nothing, TOKENIZER + "--set model.codebook_size=8589934592", 2, "expected 2 to 2^32, the m"),
    "D25 more than the codes": (nothing, GRID + "--top-k 33", 2, "--top-k is 33, expected at most the codebook's 32"),
    "D26 a warm-up that never ends": (nothing, TRAIN + "--set warmup_steps=11", 2, "warmup_steps is 11, expected 0 to"),
    "D33 shards of one process": (nothing, TRAIN + "--set parallel=fsdp", 0, "1 process(es)"),
    "D34 saved at the end alone": (nothing, TRAIN + "--set save_every=1000", 0, "1 process(es)"),
    "D36 a run in its data": (nothing, TOKENIZER.replace("{out}", "{data}/run"), 2, "lie in one another; give folders"),
    "D36 a token set in its data": (nothing, ENCODE.replace("{out}", "{data}/codes"), 2, "lie in one another; give fo"),
    "D36 a run in a token set": (nothing, TRAIN.replace("{codes}", "{set}").replace("{out}", "{set}/run"), 0, "1 proc"),
    "E1 no command": (nothing, "", 2, "the following arguments are required: COMMAND"),
    "E2 an unknown command": (nothing, "sampel {run}", 2, "invalid choice: 'sampel' (choose from "),
    "E5 none": (nothing, SET + "--num 0", 2, "--num is 0, expected 1 or more"),
    "E5 negative": (nothing, SET + "--num -1", 2, "--num is -1, expected 1 or more"),
    "E5 1e3": (nothing, SET + "--num 1e3", 2, "invalid int value: '1e3'"),
    "E5 1_0": (nothing, SET + "--num 1_0", 0, "10 images"),
    "E5 blanks": (nothing, SET + "--num {blank}10{blank}", 0, "10 images"),
    "E6 as many of each class": (nothing, SET, 0, "10 images, balanced labels"),
    "E6 nearly as many of each": (nothing, SET + "--num 11", 0, "11 images, balanced labels"),
    "E7 the null class": (nothing, GRID + "--classes 5", 2, "class 5 does not exist; this model has classes 0 to 4"),
    "E8 -1": (nothing, GRID + "--classes -1", 2, "class -1 does not exist; this model has classes 0 to 4"),
    "E8 a": (nothing, GRID + "--classes a", 2, "class 'a' does not exist; did you mean 'cat'?"),
    "E8 3-1": (nothing, GRID + "--classes 3-1", 2, "class '3-1' does not exist; give ids 0 to 4, or names"),
    "E8 1,,2": (nothing, GRID + "--classes 1,,2", 2, "class '' does not exist; give ids 0 to 4, or names"),
    "E8 1,1": (nothing, GRID + "--classes 1,1", 0, "2 images of 2 classes"),
    "E9 a file": (nothing, GRID + "--classes @missing.txt", 2, "class '@missing.txt' does not exist"),
    "E10 greedy": (nothing, GRID + "--temperature 0", 0, "1 images"),
    "E11 -1": (nothing, GRID + "--temperature -1", 2, "temperature is -1.0, expected 0 (greedy), or 1e-6 to 1e6"),
    "E11 nan": (nothing, GRID + "--temperature nan", 2, "temperature is nan, expected 0 (greedy), or 1e-6 to 1e6"),
    "E11 inf": (nothing, GRID + "--temperature inf", 2, "temperature is inf, expected 0 (greedy), or 1e-6 to 1e6"),
    "E11 nearly 0": (nothing, GRID + "--temperature 1e-300", 2, "temperature is 1e-300, expected 0 (greedy), or 1e-6"),
    "E12 0": (nothing, GRID + "--top-p 0", 2, "top_p is 0.0, expected more than 0 and at most 1 (1 = all)"),
    "E12 1.5": (nothing, GRID + "--top-p 1.5", 2, "top_p is 1.5, expected more than 0 and at most 1"),
    "E12 nan": (nothing, GRID + "--top-p nan", 2, "top_p is nan, expected more than 0 and at most 1"),
    "E13 -1": (nothing, GRID + "--top-k -1", 2, "top_k is -1, expected 0 or more (0 = all)"),
    "E13 more than the codes": (nothing, GRID + "--top-k 33", 2, "--top-k is 33, expected at most the codebook's 32"),
    "E14 nan": (nothing, GRID + "--cfg-scale nan", 2, "cfg_scale is nan, expected 0 to 1e6 (1 = no guidance)"),
    "E14 -1": (nothing, GRID + "--cfg-scale -1", 2, "cfg_scale is -1.0, expected 0 to 1e6 (1 = no guidance)"),
    "E14 1e300": (nothing, GRID + "--cfg-scale 1e300", 2, "cfg_scale is 1e+300, expected 0 to 1e6 (1 = no guidance)"),
    "E14 below 1": (nothing, GRID + "--cfg-scale 0.5", 0, "cfg 0.5"),
    "E15 no null class": (
        setting(label_dropout=0.0), GRID, 2, "trained with label_dropout 0 and has no null class; use --cfg-"),
    "E16 -1": (nothing, GRID + "--seed -1", 2, "--seed is -1, expected 0 to 2^63 - 1"),
    "E16 2^64": (nothing, GRID + "--seed 18446744073709551616", 2, "expected 0 to 2^63 - 1"),
    "E16 -1, of a tokenizer": (nothing, TOKENIZER + "--set seed=-1", 2, "seed is -1, expected 0 to 2^63 - 1"),
    "E16 -1, of reconstructions": (nothing, "reconstruct --tokenizer {tokenizer} --data {data} --out {out} --seed -1",
                                   2, "--seed is -1, expected 0 to 2^63 - 1"),
    "E16 2^64, of features": (nothing, "features --data {data} --out {out} --seed 18446744073709551616", 2, "0 to 2^6"),
    "D8 NaN, of features": (nothing, "features --data {data} --out {out} --lr nan", 2, "--lr a number of more than 0"),
    "E17 no seed": (nothing, GRID, 0, "seed 0"),
    "E21 float8": (nothing, GRID + "--precision float8", 2, "precision is 'float8', expected one of auto, float32, bf"),
    "E21 half": (nothing, GRID + "--precision half", 2, "precision is 'half', expected one of auto, float32, bfloat16"),
    "E23 a folder": (nothing, GRID.replace("{out}.png", "{data}.png"), 2, "is a folder, expected the name of a file"),
    "E23 a file": (A_FILE, TRAIN, 2, "is a file, expected a folder; give another"),
    "E23 no parent": (nothing, GRID.replace("{out}", "{out}/deeper/x"), 0, "1 images"),
    "E23 read-only": (nothing, GRID.replace("{out}", "/proc/x"), 2, "/proc/x.png cannot be written ("),
    "E23 a bucket": (nothing, GRID.replace("{out}", "s3://bucket/x"), 2, "begins with 's3:/', expected a path on this"),
    "E23 read-only, for figures": (
        nothing, "plan --preset own-mutor-2d-80 --json /proc/x.json", 2, "/proc/x.json cannot be written ("),
    "E23 a file as a folder": (A_FILE, TRAIN.replace("{out}", "{out}/run"), 2, "cannot be written (Not a directo"),
    "E23 up from nowhere": (nothing, TRAIN.replace("{out}", "{out}/samples/.."), 2, "goes up from a folder that does "),
    "E24 nothing": (nothing, TRAIN.replace("{out}", "{nothing}"), 2, "out is '', expected a path; give one"),
    "E24 nothing, for a set": (nothing, SET.replace("{out}.npz", "{nothing}"), 2, "out is '', expected a path; give o"),
    "E24 nothing, for a folder of features": (
        nothing, "features --data {data} --out {nothing}", 2, "argument --out: '' is given, expected a path; give one"),
    "E24 this folder, for a set": (nothing, SET.replace("{out}.npz", "."), 2, "--out is .; use FILE.npz or a folder"),
    "E24 the root, for a set": (nothing, SET.replace("{out}.npz", "/"), 2, "--out is /; use FILE.npz or a folder"),
    "E24 the root": (nothing, TRAIN.replace("{out}", "/"), 2, "/ is not empty and no transformer run; give a new --ou"),
    "E24 the root, for codes": (nothing, ENCODE.replace("{out}", "/"), 2, "lie in one another; give folders apart"),
    "E24 this folder": (nothing, TRAIN.replace("{out}", "."), 2, ". is not empty and no transformer run; give a new"),
    "E25 a token set for a run": (nothing, TRAIN.replace("{out}", "{set}"), 2, "is not empty and no transformer run;"),
    "E25 its base for a run": (nothing, RESUME + "--init {run}", 5, "init: '"),
    "E31 a base, where a run is": (nothing, RESUME + "--init {run}", 5, "holds other weights than '' did); use anothe"),
    "E25 images for codes": (nothing, ENCODE.replace("{out}", "{data}"), 2, "lie in one another; give folders"),
    "E25 a tokenizer for codes": (nothing, ENCODE.replace("{out}", "{tokenizer}"), 2, "is not empty and no token set;"),
    "E25 a run exported into itself": (nothing, "export {run} {run}", 2, "exists already; remove it or give another n"),
    "E25 a run merged into itself": (nothing, "merge {run} {run} {run}", 2, "exists already"),
    "E25 weights converted into themselves": (nothing, "convert --to llamagen {run} {run}", 2, "exists already; r"),
    "E25 images scored into themselves": (
        nothing, "reference --data {data} --image-size 16 --weights random --out {data}/ant/0.png", 2,
        "0.png, expected FILE.npz"),
    "E47 -1": (nothing, ENCODE + "--workers -1", 2, "workers is -1, expected 0 or more"),
    "E47 0": (nothing, ENCODE, 0, "4 images of 2 classes"),
    "E47 more than cores": (nothing, ENCODE + f"--workers {os.cpu_count() + 1}", 0, "4 images of 2 classes"),
    "E51 abc": (nothing, ENCODE + "--skip-bad abc", 2, "argument --skip-bad: invalid int value: 'abc'"),
    "E51 negative": (nothing, ENCODE + "--skip-bad -1", 2, "skip_bad is -1, expected 0 or more"),
    "E51 a share": (nothing, ENCODE + "--skip-bad 5%", 2, "argument --skip-bad: invalid int value: '5%'"),
}  # fmt: skip
WORDS["E45 control codes in a name"] = (
    nothing, ["sample", "{run}", "--class", "\x1b[31mant", "--out", "{out}.png"], 2, "class '\\x1b[31mant' does not ex"
)  # fmt: skip
for _name, _word in {"blanks": "a b/c d", "Unicode": "é/雪", "a line end": "a\nb", "a dash": "-x"}.items():
    WORDS[f"E27 {_name}"] = (bare, ["sample", "{run}", "--per-class", "1", "--classes", "0", f"--out={_word}.png"], 0,
                             "1 images")  # fmt: skip


def another(*damages):
    """Another token set beside the one that the run learnt."""

    def build(folder):
        shutil.copytree(folder / "set", folder / "other")
        for damage in damages:
            damage(folder / "other")

    return build


def manifest(**changes):
    """Another manifest, sealed as one that was made so. A function is asked for its value in the folder."""

    def damage(folder):
        values = json.loads((folder / "manifest.json").read_text())
        del values["seal"]
        new = {name: value(folder) if callable(value) else value for name, value in changes.items()}
        write_sealed(folder / "manifest.json", values | new)

    return damage


def other_tokenizer(folder):
    weights(lambda all: {name: all[name] + 1 for name in all})(folder / "tokenizer")
    manifest(tokenizer_sha256=lambda folder: tokenizer_identity(folder / "tokenizer"))(folder)


def fewer_tensors(folder):
    weights(lambda all: dict(list(all.items())[1:]))(folder / "run" / LAST)


OTHER = RESUME.replace("{codes}", "{other}")
# Row -> what is done beside a run that goes on, words, exit code, what the line says.
RESUMED = {
    "D37 another tokenizer": (another(other_tokenizer), OTHER, 5, "is another one); use another --out"),
    "D38 another codebook": (nothing, RESUME + "--set model.vocab_size=64", 5, "model.vocab_size is 64, but the token"),
    "D39 other classes": (another(manifest(class_names=list("abcde"))), OTHER, 5, "is another one); use another --out"),
    "D40 another token set": (another(manifest(views=["center", "center"])), OTHER, 5, "is another one); use another "),
    "D40 the same, elsewhere": (another(), OTHER, 0, "continuing after step 10"),
    "D41 another batch": (nothing, RESUME + "--set batch_size=24", 5, "batch_size: 12 -> 24); use another --out"),
    "D42 another seed": (nothing, RESUME + "--set seed=1", 5, "seed: 0 -> 1); use another --out"),
    "D43 another lr": (nothing, RESUME + "--set lr=1", 5, "lr: 0.003 -> 1.0); use another --out"),
    "D43 another schedule": (nothing, RESUME + "--set schedule=cosine", 5, "schedule: constant -> cosine); use anothe"),
    "D43 more steps": (nothing, RESUME + "--steps 11", 0, "continuing after step 10"),
    "D44 another dropout": (nothing, RESUME + "--set model.token_dropout=0.3", 5, "model.token_dropout: 0.1 -> 0.3);"),
    "D44 another precision": (nothing, RESUME + "--set precision=bfloat16", 5, "precision: auto -> bfloat16); use ano"),
    "D44 in parts": (nothing, RESUME + "--set micro_batch=4", 0, "continuing after step 10"),
    "D44 compiled": (nothing, RESUME + "--set compile=off", 0, "continuing after step 10"),
    "D47 other reports": (nothing, RESUME + "--set log_every=3 --set save_every=2", 0, "continuing after step 10"),
    "D48 another model": (fewer_tensors, RESUME, 5, "(1 key(s)); it is of another architecture"),
    "D49 EMA off": (nothing, RESUME + "--set ema_decay=0", 5, "ema_decay: 0.9 -> 0.0); use another --out"),
}  # fmt: skip


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


def harmful_state(place, patch):
    patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # asks torch to run what it reads
    without(BEFORE)(place / "run")
    torch.save(Harmful(), place / "run" / LAST / "training.pt")
    resealed(place / "run" / LAST)


def environment(**values):
    return lambda place, patch: [patch.setenv(name, str(value)) for name, value in values.items()]


def cards(count, **values):
    """So many CUDA devices are seen."""

    def pretend(place, patch):
        patch.setattr(torch.cuda, "is_available", lambda: count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        environment(**values)(place, patch)

    return pretend


def raising(name, error):
    def refuse(*_, **__):
        raise error

    return lambda place, patch: patch.setattr(name, refuse)


def small_disk(place, patch):
    usage = shutil.disk_usage(place)
    patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))


def clock_that_stands(place, patch):
    patch.setattr(time, "time", lambda: 1.0)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SHARED = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# Row -> how the surroundings are made, of a folder and a monkeypatch; words, exit code, what the line says.
SURROUNDINGS = {
    "E18 a card that is too small": (
        raising("mutor_vision.sampling.stream.generate", CUDA), GRID, 2, "memory is short (CUDA out of memory. Tried"),
    "E18 memory that is too small": (
        environment(), "sample {run} --num 9999999999999999 --out {out}.npz", 2, "memory is short (Unab"),
    "E19 no CUDA": (cards(0), GRID + "--device cuda", 2, "device is 'cuda', but no CUDA device is visible; use cpu or"),
    "E20 a tenth card": (cards(1), GRID + "--device cuda:9", 2, "device is 'cuda:9', expected one of auto, cpu, cuda"),
    "E26 full for a checkpoint": (small_disk, TRAIN, 2, "MB are free at "),
    "E26 full": (raising("tempfile.TemporaryFile", SHARED), TRAIN, 2, "cannot be written (No space left on device"),
    "E32 no RANK": (environment(WORLD_SIZE=2), TRAIN, 2, "WORLD_SIZE is set but RANK is not; start with torchrun"),
    "E33 RANK too large": (environment(RANK=2, WORLD_SIZE=2), TRAIN, 2, "RANK is 2 and LOCAL_RANK 0, expected le"),
    "E33 RANK negative": (environment(RANK=-1, WORLD_SIZE=2), TRAIN, 2, "RANK is '-1', expected a number of 0 or"),
    "E33 RANK no number": (environment(RANK="a", WORLD_SIZE=2), TRAIN, 2, "RANK is 'a', expected a number of 0 or"),
    "E33 WORLD_SIZE no number": (environment(RANK=0, WORLD_SIZE="two"), TRAIN, 2, "WORLD_SIZE is 'two', expected"),
    "E33 LOCAL_RANK no number": (environment(RANK=0, WORLD_SIZE=2, LOCAL_RANK="x"), TRAIN, 2, "LOCAL_RANK is"),
    "E33 no MASTER_ADDR": (environment(RANK=0, WORLD_SIZE=2), TRAIN, 2, "MASTER_ADDR expected, but not set"),
    "E34 a port that is taken": (
        environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT="a listener's"), TRAIN, 2, "--standalo"),
    "E35 more processes than cards": (cards(1, RANK=1, LOCAL_RANK=1, WORLD_SIZE=2), TRAIN, 2, "lower --nproc-per-node"),
    "E38 weights that may run": (harmful_state, RESUME, 4, "training.pt"),
    "E43 nobody to ask": (lambda place, patch: patch.setattr(sys, "stdin", None), GRID, 0, "1 images"),
    "E48 no shared memory": (raising("torch.Tensor.share_memory_", SHARED), ENCODE + "--workers 1", 0, "4 images of"),
    "E50 a clock that stands": (clock_that_stands, TRAIN, 0, "1 process(es)"),
    "E52 no home": (environment(HOME="/proc/x", XDG_CACHE_HOME="/proc/x", TORCH_HOME="/proc/x"), GRID, 0, "1 images"),
}  # fmt: skip


def ended(code, out, err):
    """What a command left, as the fixture `command` tells it."""
    return SimpleNamespace(code=code, out=out, err=err)


@pytest.fixture(autouse=True)
def own_preset(monkeypatch, train_config):
    """`mutor train --preset own` has the settings of the tests' run."""
    from mutor_vision.presets import TRANSFORMERS

    monkeypatch.setitem(TRANSFORMERS, "own", train_config)


@pytest.fixture
def place(tmp_path, monkeypatch, trained_run, token_set_path):
    """Its own copies of a run and a token set, four images of two classes; the folder where one is."""
    shutil.copytree(trained_run, tmp_path / "run")
    shutil.copytree(token_set_path, tmp_path / "set")
    for number in range(4):
        text(f"data/{('ant', 'bee')[number % 2]}/{number}.png", png(number))(tmp_path)
    (tmp_path / "data.png").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def called(command, place, token_set_path, tiny_tokenizer_path):
    def call(row, words, code, says, by=command):
        places = {"run": place / "run", "set": place / "set", "out": place / "out", "data": place / "data",
                  "other": place / "other", "codes": token_set_path, "tokenizer": tiny_tokenizer_path, "blank": " ",
                  "nothing": ""}  # fmt: skip
        words = words_of(words, **places) if isinstance(words, str) else [word.format(**places) for word in words]
        return tried(PROMISE, row, by, ["mutor", *words], code, says)

    return call


@pytest.mark.parametrize("row", SETTINGS)
def test_bad_settings(called, row):
    words, code, says = SETTINGS[row]
    called(row, DRY + words, code, says)


@pytest.mark.parametrize("row", FILES | WORDS | RESUMED)
def test_files_and_words(called, place, row):
    make, words, code, says = (FILES | WORDS | RESUMED)[row]
    make(place)
    called(row, words, code, says)


@pytest.mark.parametrize("row", SURROUNDINGS)
def test_other_surroundings(called, command, place, monkeypatch, row):
    make, words, code, says = SURROUNDINGS[row]
    make(place, monkeypatch)
    if "MASTER_PORT" in os.environ:
        listener = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))

    def of_a_rank(*words):
        done = command(*words)
        return ended(done.code, done.out, RANK.sub("error", done.err))

    called(row, words, code, says, by=of_a_rank)


# Row -> words, further words of each process, exit code, what all say.
TWO = {
    "D20 a batch over processes": (TRAIN + "--set batch_size=13", ([], []), 2, "batch_size 13 cannot be split over 2 "),
    "D45 another number of processes": (RESUME, ([], []), 0, "continuing after step 10"),
    "D50 another setting in one": (TRAIN, ([], ["--set", "seed=1"]), 2, "seed is not the same in all 2 processes; ran"),
    "E36 another option in one": (TRAIN, ([], ["--steps", "11"]), 2, "steps is not the same in all 2 processes; rank"),
}  # fmt: skip


@pytest.mark.parametrize("row", TWO)
def test_two_processes(called, enter, forked, row):
    words, further, code, says = TWO[row]

    def both(*words):
        done = forked(lambda: enter(*words, *further[int(os.environ["RANK"])]), ranks=2, seconds=30)
        lines = [line for line in done.out.splitlines() if not line.startswith("[")]  # those are torch's
        if done.code and all(line.startswith("error [rank ") for line in lines):
            return ended(done.code, "", RANK.sub("error", lines[0]) + "\n")
        return ended(done.code, done.out, "")

    called(row, words, code, says, by=both)


def test_a_set_that_is_there_already(called):
    called("E22 a set", SET, 0, "10 images")
    called("E22 the same again", SET, 0, "is there already, made in this very way")
    called("E22 of another seed", SET + "--seed 1", 2, "says that it was made in another way; remove it")


def test_few_open_files(called, enter, forked):
    def limited(*words):
        def run():
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            enter(*words)

        return forked(run)

    called("E49 64 open files", ENCODE + "--workers 1", 0, "4 images of 2 classes", by=limited)


def test_ctrl_c(command, place, monkeypatch):
    raising("mutor_vision.commands.sample.start", KeyboardInterrupt())(place, monkeypatch)
    done = command("mutor", *words_of(GRID, run=place / "run", out=place / "out"))
    held = done.code == 130 and done.err.startswith("stopped by Ctrl-C; ") and done.err.count("\n") == 1
    record(PROMISE, "E46 Ctrl-C", int(held), 1)
    assert held, done


# Row -> words, environment, words of Python before them, exit code, what is said: in a process of its own.
STARTED = {
    "E37 threads that are no number": (GRID, {"OMP_NUM_THREADS": "abc", "PYTHONHASHSEED": "7"}, [], 0, "1 images"),
    "E41 without asserts": ("train --preset owm --codes x --out {out}", {}, ["-O"], 2, "unknown preset 'owm'"),
    "E44 a terminal without characters": (
        "train --preset é --codes x --out {out}", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, [], 2,
        "unknown preset '\\udcc3\\udca9'; "),
}  # fmt: skip


# Those that import torch take seconds; of the others Python is all that starts.
@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] * (row[:3] == "E37")) for row in STARTED])
def test_a_process_of_its_own(called, place, root, row):
    words, environment, of_python, code, says = STARTED[row]

    def started(_, *words):
        done = subprocess.run(
            [sys.executable, *of_python, "-m", "mutor_vision", *words], capture_output=True, encoding="utf-8",
            env=os.environ | {"PYTHONPATH": str(root)} | environment,
        )  # fmt: skip
        own = [line for line in done.stderr.splitlines(True) if not line.startswith("libgomp: ") and line.strip()]
        return ended(done.returncode, done.stdout, "".join(own))

    called(row, words, code, says, by=started)
    if row.startswith("E37"):
        picture = (place / "out.png").read_bytes()
        called("E39 another order of sets", words, code, says)
        assert (place / "out.png").read_bytes() == picture


def test_nobody_reads_what_is_printed(called, root):
    def headed(_, *words):
        line = shlex.join([sys.executable, "-m", "mutor_vision", *words]) + " | head -1"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(root)})  # fmt: skip
        return ended(done.returncode, done.stdout, done.stderr)

    called("E42 head", "train --help", 0, "usage: mutor train", by=headed)


NOT_OURS = {
    "D46": "the libraries' versions are no part of a run; a continued run on others is the same but for rounding",
    "D51": "no setting holds a secret, and none of the environment is written (test_hostile.py)",
    "E28": "there is no --resume: the same command begins a run or goes on with it",
    "E29": "for the same reason",
    "E30": "a run goes on from its newest whole checkpoint; an older one is chosen by its path, with --init",
    "E40": "there is no --deterministic; what is promised to the bit is promised on the CPU",
}  # fmt: skip


def test_every_number_of_settings_and_surroundings_is_tried_or_none_of_ours():
    rows = [*FILES, *SETTINGS, *WORDS, *RESUMED, *SURROUNDINGS, *TWO, *STARTED, "E22 ", "E39 ", "E42 ", "E46 ", "E49 "]
    for stage in "DE":
        assert numbers(stage, rows, [name for name in NOT_OURS if name[0] == stage]) == []
