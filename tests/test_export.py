"""`mutor export`: diffusers loads the folder without this package, and it draws what `mutor sample` draws."""

import hashlib
import importlib.abc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mutor_vision.errors import UserError
from mutor_vision.interop.export import MutorPipeline, export, pipeline_of, vq_model
from mutor_vision.model.layers import DropPath
from mutor_vision.runtime import Runtime
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.load import load
from mutor_vision.sampling.stream import sample_images
from mutor_vision.tokenizer.model import load_tokenizer

ALONE = Runtime(0, 1, torch.device("cpu"), None)
CLASSES = ["cat", 0, "eel"]
LABELS = torch.tensor([2, 2, 0, 0, 4, 4])
SETTINGS = {"cfg_scale": 1.7, "temperature": 0.9, "top_k": 20}


class _Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mutor_vision", "timm", "einops"):
            raise ImportError(f"{name} is not there")
        return None


@pytest.fixture
def without_the_package(monkeypatch, tmp_path):
    """In this process, as in an environment of torch and diffusers alone."""
    modules = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(modules))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("mutor_vision", "timm", "einops", "diffusers_modules"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Refused(), *sys.meta_path])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained_run):
    target = tmp_path_factory.mktemp("hub") / "exported"
    export(trained_run, target, licence="mit")
    return target


@pytest.fixture(scope="module")
def expected(trained_run):
    """(codes, uint8 pixels) of `mutor sample --seed 5`."""
    loaded = load(trained_run, ALONE)
    settings, indices = SampleSettings(**SETTINGS), range(len(LABELS))
    codes = generate(loaded.transformer, LABELS, settings, seed=5, indices=indices)
    return codes, sample_images(loaded, LABELS, indices, settings, 5)


def drawn(pipeline, **more):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(CLASSES, 2, generator=torch.Generator().manual_seed(5), **SETTINGS, **more).images


def check(pipeline, expected):
    codes, pixels = expected
    assert torch.equal(drawn(pipeline, output_type="codes"), codes)
    found = drawn(pipeline, output_type="pt")
    assert found.shape == pixels.shape and ((found * 255).round() - pixels).abs().max() <= 1


def test_diffusers_alone_draws_the_same_codes_and_pixels(folder, expected, without_the_package, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    check(pipeline, expected)
    assert "mutor_vision" not in sys.modules
    pipeline.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    check(again, expected)
    assert sorted(path.name for path in folder.glob("*.py")) == sorted(
        p.name for p in (tmp_path / "again").glob("*.py")
    )


def test_the_package_saves_and_loads_its_pipeline(trained_run, expected, tmp_path):
    pipeline = pipeline_of(trained_run)
    check(pipeline, expected)
    pipeline.save_pretrained(tmp_path / "saved")
    check(MutorPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True), expected)


def test_the_code_is_named_by_its_content_and_stands_where_it_is_looked_for(folder):
    (code,) = folder.glob("*.py")
    assert code.stem == f"mutor_{hashlib.sha256(code.read_bytes()).hexdigest()[:12]}"
    assert (folder / "transformer" / code.name).read_bytes() == code.read_bytes()
    text = code.read_text()
    assert not any(
        f"{word} {name}" in text for word in ("import", "from") for name in ("mutor_vision.", "timm", "einops")
    )
    assert not list(folder.rglob("*.bin")) and len(list(folder.rglob("*.safetensors"))) == 2


def test_the_tokenizer_is_a_plain_vq_model(tiny_tokenizer_path):
    ours = load_tokenizer(tiny_tokenizer_path)
    theirs = vq_model(ours)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = ours.encode(images)
    found = theirs.quantize(theirs.encode(images).latents)[2][2].view(codes.shape)
    assert torch.equal(codes, found) and len(codes.unique()) > 3


def test_generators(trained_run):
    pipeline = pipeline_of(trained_run)
    pipeline.set_progress_bar_config(disable=True)

    def codes(generator, count=2):
        return pipeline(1, count, generator=generator, output_type="codes").images

    used = torch.Generator().manual_seed(3)
    first, second = codes(used), codes(used)
    assert torch.equal(first, codes(torch.Generator().manual_seed(3))) and not torch.equal(first, second)
    each = codes([torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)])
    assert torch.equal(each[0], first[0]) and torch.equal(each[1], codes(torch.Generator().manual_seed(4))[0])
    with pytest.raises(UserError, match="1 generators, expected one for each of 2"):
        codes([used])


def test_kinds_of_output(trained_run):
    pipeline = pipeline_of(trained_run)
    pil, np_, pt = (drawn(pipeline, output_type=kind) for kind in ("pil", "np", "pt"))
    assert len(pil) == 6 and pil[0].size == (16, 16) and pil[0].mode == "RGB"
    assert np_.shape == (6, 16, 16, 3) and torch.equal(torch.from_numpy(np_).permute(0, 3, 1, 2), pt)
    assert 0 <= pt.min() < pt.max() <= 1


@pytest.mark.parametrize("given, message", [
    ({"class_labels": 5}, "class 5 does not exist"), ({"class_labels": "cow"}, "class 'cow' does not exist"),
    ({"class_labels": 0, "output_type": "png"}, "output_type is 'png', expected pil"),
    ({"class_labels": 0, "top_p": 0}, "top_p is 0, expected more than 0"),
])  # fmt: skip
def test_mistakes(trained_run, given, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of(trained_run)(**given)


def test_bfloat16_keeps_its_angles(trained_run):
    pipeline = pipeline_of(trained_run).to(dtype=torch.bfloat16)
    model = pipeline._drawing_model()
    assert model.rope.dtype == torch.float32 and pipeline.transformer.model.rope.dtype == torch.bfloat16
    assert drawn(pipeline, output_type="codes").shape == (6, 4, 4)


def test_the_card_says_what_the_run_knows(command, trained_run, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"fid": 12.5, "protocol": {"num": 7}}))
    done = command("mutor", "export", trained_run, tmp_path / "out", "--metrics", tmp_path / "metrics.json",
                   "--license", "cc-by-4.0")  # fmt: skip
    assert done.code == 0, done.err
    card = (tmp_path / "out" / "README.md").read_text()
    head, body = card.split("---")[1:3]
    assert json.loads(head)["license"] == "cc-by-4.0"
    for part in ("10 steps of 12 images", "`registers`", '"fid": 12.5', "samples.png", "trust_remote_code=True"):
        assert part in body
    assert (tmp_path / "out" / "samples.png").is_file()
    again = command("mutor", "export", trained_run, tmp_path / "out")
    assert again.code == 2 and "exists already" in again.err


def test_llamagens_file_becomes_a_folder_in_two_commands(command, shared, tmp_path):
    golden = shared / "golden"
    gpt, vq = golden / "llamagen_gpt_tiny.pt", golden / "llamagen_vq_tiny.pt"
    done = command("mutor", "convert", gpt, tmp_path / "run", "--tokenizer", vq, "--heads", 4, "--grid", "4,4")
    assert done.code == 0, done.err
    done = command("mutor", "export", tmp_path / "run", tmp_path / "hub", "--no-samples")
    assert done.code == 0, done.err
    pipeline = MutorPipeline.from_pretrained(tmp_path / "hub", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(0, 3, generator=torch.Generator().manual_seed(1), output_type="codes").images
    loaded = load(tmp_path / "run", ALONE)
    labels = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(found, generate(loaded.transformer, labels, SampleSettings(), seed=1, indices=range(3)))


def test_the_lines_of_the_card_run(folder, monkeypatch):
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    found = {}
    exec(lines, found)
    assert len(found["images"]) == 4


def test_without_drop_path_a_branch_keeps_its_bits_and_with_it_its_mean():
    x = torch.ones(4000, 2, 3)
    assert DropPath(0.5).eval()(x) is x and DropPath(0.0)(x) is x
    kept = DropPath(0.25).train()(x)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3]) and abs(kept.mean() - 1) < 0.05
    assert (kept.flatten(1).amin(1) == kept.flatten(1).amax(1)).all()  # a whole sample at once


@pytest.mark.slow
def test_an_environment_without_the_package(folder, expected, tmp_path):
    """MUTOR_HUB_PYTHON: an interpreter with torch and diffusers alone; else this one, isolated from this checkout."""
    python = os.environ.get("MUTOR_HUB_PYTHON", sys.executable)
    code = f"""
import sys, torch
sys.path[:] = [p for p in sys.path if p and not __import__("pathlib").Path(p, "mutor_vision").is_dir()]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
from diffusers import DiffusionPipeline
p = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
torch.set_num_threads(1)
images = p({CLASSES!r}, 2, generator=torch.Generator().manual_seed(5), output_type="codes", **{SETTINGS!r}).images
assert "mutor_vision" not in sys.modules
torch.save(images, {str(tmp_path / "codes.pt")!r})
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-I", "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(Path(tmp_path / "codes.pt"), weights_only=True), expected[0])
