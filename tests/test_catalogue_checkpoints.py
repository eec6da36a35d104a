"""Bad runs and files of weights, as a user may meet them: the command ends with the exit code, in one line that says
what is wrong."""

import argparse
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from faults.rows import cut, flip, nothing, numbers, png, resealed, swap, text, tried, weights, without, words_of

from mutor_vision.interop.convert import convert_back

LAST, BEFORE = "checkpoints/step-0000010", "checkpoints/step-0000005"


def both(damage_of):
    """The same damage to both checkpoints, so that none is left."""
    return lambda run: [damage_of(step)(run) for step in (LAST, BEFORE)]


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


CHECKPOINTS = {
    "C2 no checkpoint": (without("checkpoints"), 2, "holds no checkpoint"),
    "C3 empty weights": (both(lambda step: text(f"{step}/model.safetensors", "")), 4, "no checkpoint is whole"),
    "C6 cut": (both(lambda step: cut(f"{step}/model.safetensors")), 4, "bytes, expected"),
    "C7 bit flipped": (both(lambda step: flip(f"{step}/ema.safetensors")), 4, "is damaged: sha256"),
    "C7 the newest flipped": (flip(f"{LAST}/ema.safetensors"), 0, "stepping over a damaged checkpoint"),
    "C8 a pickle": (both(lambda step: lambda run: torch.save(Harmful(), run / step / "training.pt")), 4, "training.pt"),
    "C36 no MANIFEST": (both(lambda step: without(f"{step}/MANIFEST.json")), 4, "has no MANIFEST.json"),
    "C36 a file missing": (both(lambda step: without(f"{step}/training.pt")), 4, "training.pt is missing"),
    "C36 a file too many": (both(lambda step: text(f"{step}/other.safetensors", "x")), 4, "is not listed"),
    "C37 files of different steps": (swap(f"{LAST}/ema.safetensors", f"{BEFORE}/ema.safetensors"), 4, "is damaged"),
    "C39 a partial one alone": (lambda run: (without(LAST)(run), (run / BEFORE).rename(run / f"{BEFORE}.partial")), 2,
                                "holds no checkpoint"),
    "C40 other names": (lambda run: [(run / f"checkpoints/{name}").mkdir() for name in ("step-1.bak", "step-1e2", "x")],
                        0, "images of"),
    "C41 renamed": (lambda run: (without(BEFORE)(run), (run / LAST).rename(run / "checkpoints/step-0000020")), 4,
                    "is the checkpoint of step 10, renamed"),
    "MANIFEST odd": (both(lambda step: text(f"{step}/MANIFEST.json", "[]")), 4, "expected an object"),
    "MANIFEST of later format": (both(lambda step: text(f"{step}/MANIFEST.json", '{"format": 3}')), 5, "has format 3"),
    "config odd": (both(lambda step: text(f"{step}/config.json", "{}")), 4, "config.json has 2 bytes"),
    "tokenizer gone": (without("tokenizer"), 2, "has no tokenizer"),
    "tokenizer flipped": (flip("tokenizer/model.safetensors"), 4, "is damaged: sha256"),
    "token_set.json changed": (flip("token_set.json", 40), 4, "token_set.json"),
    "token_set.json gone": (without("token_set.json"), 2, "has no token_set.json"),
}  # fmt: skip


def last(damage):
    return lambda run: damage(run / LAST)


def config_of(**changes):
    """Another configuration in the newest checkpoint, which is whole; the older one is gone."""

    def damage(run):
        without(BEFORE)(run)
        values = json.loads((run / LAST / "config.json").read_text())
        text("config.json", json.dumps(values | changes))(run / LAST)
        resealed(run / LAST)

    return damage


def state_of(change):
    """Another training.pt in the newest checkpoint, which is whole."""

    def damage(run):
        torch.save(change(torch.load(run / LAST / "training.pt", weights_only=True)), run / LAST / "training.pt")
        resealed(run / LAST)

    return damage


def put_in(name, value):
    def change(tensors):
        tensors[name].view(-1)[0] = value
        return tensors

    return weights(change, "ema.safetensors")


def moved(run):
    run.rename(run.with_name("elsewhere"))
    run.symlink_to(run.with_name("elsewhere"))


SAMPLE = "sample {run} --per-class 1 --classes 0 --out {out}.png"
RESUME = "train --preset own --codes {codes} --out {run} "
# Row -> damage to a run, the command's words, exit code, what the line says.
OF_RUNS = {name: (damage, SAMPLE, code, says) for name, (damage, code, says) in CHECKPOINTS.items()} | {
    "C1 no path": (nothing, SAMPLE.replace("{run}", "{folder}/runs"), 2, "does not exist; expected a run directory"),
    "C21 a tensor missing": (last(weights(lambda all: {name: all[name] for name in all if "norm" not in name},
                                          "ema.safetensors")), SAMPLE, 5, "key(s)); it is of another architecture"),
    "C22 a tensor too many": (last(weights(lambda all: all | {"gate": torch.ones(2)}, "ema.safetensors")), SAMPLE, 5,
                              "has unexpected 'gate' (1 key(s))"),
    "C23 another shape": (last(weights(lambda all: all | {"head.weight": torch.ones(31, 32)}, "ema.safetensors")),
                          SAMPLE, 5, "'head.weight' has shape (31, 32), expected (32, 32)"),
    "C24 whole numbers": (last(weights(lambda all: all | {"head.weight": torch.ones(32, 32).int()}, "ema.safetensors")),
                          SAMPLE, 5, "'head.weight' is torch.int32, expected torch.float32"),
    "C25 NaN": (last(put_in("head.weight", float("nan"))), SAMPLE, 4, "'head.weight' holds"),
    "C29 no EMA": (last(lambda step: (without("ema.safetensors")(step), resealed(step))), SAMPLE + " --weights ema", 2,
                   "has no 'ema' weights; it has model"),
    "C32 a tokenizer": (nothing, SAMPLE.replace("{run}", "{tokenizer}"), 5, "holds a tokenizer, expected a transforme"),
    "C32 a transformer for a tokenizer": (nothing, "encode --tokenizer {run} --data {folder}/images --out {out}", 5,
                                          "holds a transformer, expected a tokenizer"),
    "C34 another grid": (nothing, RESUME + "--set model.grid=24,24", 5, "model.grid is (24, 24), but"),
    "C35 heads of equal shapes": (nothing, RESUME + "--set model.heads=4", 5, "model.heads: 2 -> 4"),
    "C42 other files beside a run's": (text("notes.txt", "x"), RESUME, 0, "continuing after step 10"),
    "C42 other files alone": (text("../out/notes.txt", "x"), RESUME.replace("{run}", "{out}"), 2,
                              "is not empty and no transformer run; give a new --out"),
    "C42 a run of another kind": (nothing, RESUME.replace("{run}", "{tokenizer}"), 5,
                                  "holds a tokenizer, expected a transformer"),
    "C43 weights alone": (last(lambda step: (without("training.pt")(step), resealed(step))), RESUME, 2,
                          "holds weights only, no training state; it cannot be resumed"),
    "C44 another optimizer": (state_of(lambda state: state | {"optimizer": {"state": {}, "param_groups": []}}), RESUME,
                              4, "holds no 'optimizer' of this model"),
    "C45 finished": (nothing, RESUME, 0, "continuing after step 10"),
    "C46 a later format": (config_of(format=9), SAMPLE, 5, "has format 9, this version reads up to"),
    "C48 a place that cannot be written": (nothing, RESUME.replace("{run}", "/proc/run"), 2, "cannot be written ("),
    "C50 a link": (moved, SAMPLE, 0, "images of"),
    "C51 a name of the hub": (nothing, SAMPLE.replace("{run}", "someone/model"), 2, "someone/model does not exist"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_preset(monkeypatch, train_config):
    """`mutor train --preset own` has the settings of the tests' run."""
    from mutor_vision.presets import TRANSFORMERS

    monkeypatch.setitem(TRANSFORMERS, "own", train_config)


@pytest.fixture
def called(command, tmp_path, token_set_path, tiny_tokenizer_path):
    def call(row, words, code, says):
        places = {"run": tmp_path / "run", "out": tmp_path / "out", "folder": tmp_path,
                  "codes": token_set_path, "tokenizer": tiny_tokenizer_path}  # fmt: skip
        tried("Bad checkpoints are told", row, command, ["mutor", *words_of(words, **places)], code, says)

    return call


@pytest.mark.parametrize("row", OF_RUNS)
def test_a_bad_run(called, trained_run, tmp_path, row):
    damage, words, code, says = OF_RUNS[row]
    text("images/ant/0.png", png(0))(tmp_path)
    damage(Path(shutil.copytree(trained_run, tmp_path / "run")))
    called(row, words, code, says)


def saved(change, **settings):
    return lambda path, all: torch.save(change(all), path, **settings)


def holding(content):
    return lambda path, all: path.write_bytes(content)


def spoilt(damage):
    """A whole file, damaged by a function of its folder and its name."""

    def build(path, all):
        torch.save({"model": all}, path)
        damage(path.name)(path.parent)

    return build


def tensors(header, data=bytes(16), size=None):
    """A .safetensors file of this header, which may claim another size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return holding((len(text) if size is None else size).to_bytes(8, "little") + text + data)


def one(shape, begin, end, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def index(*names):
    def build(path, all):
        text(path.name, json.dumps({"weight_map": {str(number): name for number, name in enumerate(names)}}))(
            path.parent
        )

    return build


def distributed(path, all):
    text(f"{path.name}/.metadata", b"\x80\x04.")(path.parent)


def program(path, all):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/archive_format", "pt2")


def script(path, all):
    with zipfile.ZipFile(path, "w") as file:
        for name in ("model/data.pkl", "model/constants.pkl", "model/code/__torch__.py"):
            file.writestr(name, b"x")


CONVERT = "convert {folder}/FILE {out} --tokenizer {tokenizer} --heads 2 --image-size 16 "
SAFE = "x.safetensors"
# Row -> name of a file of weights, how it is made of LlamaGen's tensors, exit code, what is said; further words.
WEIGHTS = {
    "C3 empty": ("x.pt", holding(b""), 4, "is empty (0 bytes); download it again"),
    "C4 a web page": ("x.pt", holding(b"<!DOCTYPE html><html>404</html>"), 4, "looks like a web page: the download fa"),
    "C5 a Git LFS pointer": ("x.pt", holding(b"version https://git-lfs.github.com/spec/v1\n"), 4, "run git lfs pull"),
    "C6 cut": ("x.pt", spoilt(cut), 4, "is truncated or damaged"),
    "C7 bit flipped": ("x.pt", spoilt(lambda name: flip(name, 20_000)), 4, "is damaged: the checksum of its entry"),
    "C8 a pickle": ("x.pt", saved(lambda all: {"model": all, "x": Harmful()}), 4, "its pickle asks for exec"),
    "C8 a pickle, old format": ("x.pt", saved(lambda all: Harmful(), _use_new_zipfile_serialization=False), 4,
                                "older and bare pickles are never opened"),
    "C8 a bare pickle": ("x.pt", holding(b"cos\nsystem\n(S'touch x'\ntR."), 4, "older and bare pickles are never open"),
    "C9 LlamaGen's arguments": ("x.pt", saved(lambda all: {"model": all, "args": argparse.Namespace(epochs=3)}), 0,
                                "a transformer run"),
    "C10 a pickle among the arguments": ("x.pt", saved(lambda all: {
        "model": all, "args": argparse.Namespace(x=Harmful())}), 4, "its pickle asks for exec"),
    "C11 a TorchScript program": ("x.pt", script, 4, "is a TorchScript program; expected a file of weights"),
    "C12 a whole module": ("x.pt", saved(lambda all: torch.nn.Linear(2, 2)), 4, "asks for torch.nn.modules.linear.Lin"),
    "C13 an exported program": ("x.pt2", program, 4, "is refused"),
    "C14 the format of old PyTorch": ("x.pt", saved(lambda all: {"model": all}, _use_new_zipfile_serialization=False),
                                          4, "older and bare pickles are never opened"),
    "C15 a distributed checkpoint": ("folder", distributed, 4, "is a distributed checkpoint, whose index is a pickle"),
    "C16 a pickle named safetensors": (SAFE, saved(lambda all: {"model": all}), 4, "is no complete safetensors file"),
    "C17 a header behind the end": (SAFE, tensors(b"{}", size=2**20), 4, "is no complete safetensors file"),
    "C17 a header of 2^60 bytes": (SAFE, tensors(b"{}", size=2**60), 4, "is no complete safetensors file"),
    "C17 a header that is no JSON": (SAFE, tensors(b"{\xff"), 4, "is no complete safetensors file"),
    "C17 entries that overlap": (SAFE, tensors({"a": one([4], 0, 16), "b": one([4], 0, 16)}), 4, "is no complete safe"),
    "C17 a hole between entries": (SAFE, tensors({"a": one([1], 0, 4), "b": one([1], 8, 12)}), 4, "is no complete saf"),
    "C17 bytes behind the last": (SAFE, tensors({"a": one([1], 0, 4)}), 4, "is no complete safetensors file"),
    "C17 shape and bytes differ": (SAFE, tensors({"a": one([5], 0, 16)}), 4, "is no complete safetensors file"),
    "C17 2^62 numbers": (SAFE, tensors({"a": one([2**31, 2**31], 0, 16)}), 4, "is no complete safetensors file"),
    "C17 an unknown type": (SAFE, tensors({"a": one([4], 0, 16, "Q9")}), 4, "is no complete safetensors file"),
    "C17 a name twice": (SAFE, tensors(b'{"a":%s,"a":%s}' % ((json.dumps(one([4], 0, 16)).encode(),) * 2)), 5, "is no"),
    "C17 metadata that is no text": (SAFE, tensors({"__metadata__": {"a": 3}}), 4, "is no complete safetensors file"),
    "C18 20,000 tensors": (SAFE, tensors({str(n): one([0], 0, 0) for n in range(20_000)}, b""), 5, "is no LlamaGen"),
    "C19 stride 0": ("x.pt", saved(lambda all: all | {"x": torch.ones(1).expand(10**10)}), 4, "claims 10,000,000,000"),
    "C20 sparse": ("x.pt", saved(lambda all: all | {"x": torch.eye(3).to_sparse()}), 4, "is refused"),
    "C20 without data": ("x.pt", saved(lambda all: all | {"x": torch.ones(3, device="meta")}), 5, "without data"),
    "C21 a tensor missing": ("x.pt", saved(lambda all: {name: all[name] for name in all if name != "norm.weight"}), 5,
                             "lacks norm.weight (1 in all); it is of another architecture"),
    "C22 a tensor too many": ("x.pt", saved(lambda all: all | {"gate.weight": torch.ones(2)}), 5, "also has gate.weig"),
    "C22 tables that can be computed": ("x.pt", saved(lambda all: all | {"freqs_cis": torch.ones(2)}), 0, "a transfor"),
    "C23 another shape": ("x.pt", saved(lambda all: all | {"norm.weight": torch.ones(31)}), 5, "has shape (31,), expe"),
    "C24 half the width": ("x.pt", saved(lambda all: {name: all[name].bfloat16() for name in all}), 0, "a transformer"),
    "C24 whole numbers": ("x.pt", saved(lambda all: all | {"norm.weight": torch.ones(32).long()}), 5, "is torch.int64"),
    "C25 NaN": ("x.pt", saved(lambda all: all | {"norm.weight": torch.ones(32) * float("nan")}), 4, "'norm.weight' ho"),
    "C27 prefixes of wrappers": ("x.pt", saved(lambda all: {f"module._orig_mod.{name}": all[name] for name in all}), 0,
                                 "'_orig_mod', 'module' taken off"),
    "C28 two sets of weights": ("x.pt", saved(lambda all: {"model": all, "ema": all}), 2, "model and ema; choose one"),
    "C28 one chosen": ("x.pt", saved(lambda all: {"model": all, "ema": all}), 0, "entry 'ema'", "--weights ema"),
    "C29 no EMA": ("x.pt", saved(lambda all: {"model": all}), 2, "has no 'ema' weights", "--weights ema"),
    "C30 names for other classes": ("x.pt", saved(lambda all: all), 5, "3 class names for a model of 5 classes",
                                    "--class-names {folder}/names.txt"),
    "C31 another codebook": ("x.pt", saved(lambda all: all | {name: all[name][:31] for name in (
        "output.weight", "tok_embeddings.weight")}), 5, "the transformer has 31 codes, the tokenizer 32"),
    "C33 a discriminator": ("x.pt", saved(lambda all: {"main.0.weight": torch.ones(64, 3, 4, 4)}), 5, "is no LlamaGen"),
    "C35 a width without heads": ("x.pt", saved(lambda all: all), 2, "give --heads", "--heads 0"),
    "C52 a part above": ("model.safetensors.index.json", index("../x.safetensors"), 4, "names files outside"),
    "C52 a part missing": ("model.safetensors.index.json", index("y.safetensors"), 4, "does not exist; download it"),
}  # fmt: skip


@pytest.fixture(scope="module")
def llamagen(tmp_path_factory, trained_run):
    """LlamaGen's tensors of the tests' run."""
    path = tmp_path_factory.mktemp("llamagen") / "x.pt"
    convert_back(trained_run, path, say=lambda line: None)
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("row", WEIGHTS)
def test_bad_weights(called, llamagen, tmp_path, monkeypatch, row):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # asks torch to run what it reads
    name, build, code, says, *more = WEIGHTS[row]
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    build(tmp_path / name, dict(llamagen))
    words = CONVERT.replace("FILE", name) + " ".join(more)
    called(f"{row}, of others", words, code, says)
    assert (tmp_path / "out").exists() == (code == 0)


NO_CHECKPOINTS = {
    "C26": "a layer of zeros is how some layers begin; what a model draws shows more",
    "C38": "shards of an optimizer are files of the checkpoint as the others are: C36",
    "C47": "nothing in a checkpoint is run, whoever owns it",
    "C49": "the file system says how long it waits; an error of it is one line",
}


def test_every_number_of_checkpoints_is_tried_or_none_of_ours():
    assert numbers("C", [*OF_RUNS, *WEIGHTS], NO_CHECKPOINTS) == []
