"""The commands of eval/ from end to end, with tiny extractors."""

import ast
import html.parser
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_vision.errors import IntegrityError
from mutor_vision.features.extract import CHUNK, extract
from mutor_vision.features.extractors import load_extractor
from mutor_vision.features.sources import RunImages
from mutor_vision.metrics import report, sweep
from mutor_vision.metrics.evaluate import ImageSet, Options, evaluate, open_set
from mutor_vision.runtime import Runtime
from mutor_vision.sampling import stream as sample
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.load import load
from mutor_vision.storage.npz import Npz
from mutor_vision.storage.npz_writer import NpzImageWriter, write_arrays
from mutor_vision.training import distance as in_training

ROOT = Path(__file__).resolve().parents[1]
ALONE = Runtime(0, 1, torch.device("cpu"), None)
TINY = ("--features", "timm:test_resnet@32", "--weights", "random")
EVERY = {"fd", "precision", "recall", "kid", "mind", "density", "coverage", "copies", "nearest_distance"}
CLASSES = ("ant", "bee", "cat")


def pictures(count: int, seed: int, size: int = 16) -> np.ndarray:
    """uint8 (count, size, size, 3); image i is tinted by class i % 3."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    coarse[torch.arange(count), torch.arange(count) % 3] += 1.0
    smooth = torch.nn.functional.interpolate(coarse / 2, size=(size, size), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def write_classes(folder: Path, images: np.ndarray) -> Path:
    for index, image in enumerate(images):
        (folder / CLASSES[index % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / CLASSES[index % 3] / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """samples.npz with 600 images (three chunks) and reference.npz with 200; folders with classes."""
    folder = tmp_path_factory.mktemp("sets")
    np.savez(folder / "samples.npz", pictures(600, 1))
    np.savez(folder / "reference.npz", pictures(200, 2))
    write_classes(folder / "samples", pictures(60, 1))
    write_classes(folder / "reference", pictures(90, 2))
    return folder


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("timm:test_resnet@32", "random")


@pytest.fixture
def run_eval(command):
    """Run eval/NAME.py -> (exit code, output)."""

    def run(name: str, *arguments) -> tuple[int, str]:
        done = command(f"eval/{name}.py", *arguments)
        return done.code, done.out + done.err

    return run


def values(path: Path) -> dict[str, float]:
    return {name: entry["value"] for name, entry in json.loads(path.read_text())["metrics"].items()}


# ---- the numbers do not depend on how they were computed


def test_batches_folders_and_order_do_not_matter(sets, tmp_path, extractor):
    images = pictures(60, 1)
    ordered = [images[number::3] for number in range(3)]  # the folder is sorted by class
    np.savez(tmp_path / "sorted.npz", np.concatenate(ordered))
    reference = open_set(sets / "reference")
    found = [
        evaluate(open_set(path), reference, extractor, ALONE, Options(metrics=("fid",), batch=batch, groups=0))
        for path, batch in ((sets / "samples", 50), (tmp_path / "sorted.npz", 1), (tmp_path / "sorted.npz", 7))
    ]
    hashes = {result["protocol"]["samples"]["images_sha256"] for result in found}
    assert len(hashes) == 1, "the folder and the npz hold the same pixels"
    for result in found[1:]:
        assert result["metrics"]["fd"]["value"] == pytest.approx(found[0]["metrics"]["fd"]["value"], rel=1e-6)


def test_jpeg_copies_shift_the_distance(sets, tmp_path, extractor):
    """Why lossy files are refused."""
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for index, image in enumerate(pictures(60, 1)):
        Image.fromarray(image).save(folder / f"{index:06d}.jpg", quality=95)
    options = Options(metrics=("fid",), groups=0)
    reference = open_set(sets / "reference")
    png = evaluate(open_set(sets / "samples"), reference, extractor, ALONE, options)
    jpeg = evaluate(open_set(folder, allow_lossy=True), reference, extractor, ALONE, options)
    assert abs(jpeg["metrics"]["fd"]["value"] / png["metrics"]["fd"]["value"] - 1) > 1e-4
    assert "lossy-samples" in jpeg["marks"] and jpeg["protocol"]["samples"]["files"] == "lossy"


# ---- what stands in the result


def test_every_number_has_its_protocol(sets, tmp_path, run_eval):
    code, printed = run_eval(
        "fid", "--samples", sets / "samples.npz", "--reference", sets / "reference.npz", *TINY,
        "--num-images", 600, "--json", tmp_path / "m.json",
    )  # fmt: skip
    assert code == 0 and "| FD-timm:test_resnet@600" in printed
    result = json.loads((tmp_path / "m.json").read_text())
    for entry in result["metrics"].values():
        protocol = entry["protocol"]
        assert protocol["n"] == 600 and protocol["extractor"] == "timm:test_resnet"
        assert len(protocol["extractor_sha256"]) == len(protocol["reference_sha256"]) == 64
    fd = result["metrics"]["fd"]
    assert fd["interval_95"][0] < fd["bias_corrected"] < fd["interval_95"][1] and fd["jackknife_groups"] == 20
    assert fd["bias_corrected"] < fd["value"]
    assert result["protocol"]["extractor"]["resize"] == "bicubic to 32x32, antialias, on uint8"
    assert {"random-weights", "smoke-only"} <= set(result["marks"]) and result["protocol"]["protocol"] == "custom"
    assert not (tmp_path / "m.json.work").exists(), "features of a finished evaluation are removed"


# ---- samples straight from a model


def test_sampling_on_the_fly_measures_the_images_that_the_sampler_writes(trained_run, tmp_path, command, extractor):
    done = command("mutor", "sample", trained_run, "--num", 12, "--cfg-scale", 1.5, "--out", tmp_path / "set.npz")
    assert done.code == 0, done.err
    written = open_set(tmp_path / "set.npz")
    source = RunImages(load(trained_run, ALONE), 12, SampleSettings(cfg_scale=1.5))
    assert torch.equal(written.images.labels, source.labels), "labels come from the record beside the set"
    ours, theirs = (extract(images, extractor, ALONE, batch=5) for images in (source, written.images))
    assert ours.images_sha256 == theirs.images_sha256
    smaller = RunImages(source.loaded, 12, SampleSettings(cfg_scale=1.5), image_size=8)
    assert (smaller.height, smaller.width) == smaller.read(0, 2).shape[-2:] == (8, 8)
    assert smaller.describe()["resized_to"] == 8 and smaller.key() != source.key()
    assert written.record["settings"]["cfg_scale"] == 1.5 and written.record["labels"] == "balanced"


def test_two_processes_give_the_numbers_of_one(trained_run, sets, tmp_path, run_eval, forked):
    """Samples from a model in two chunks, a reference npz in three, and every metric on both."""
    arguments = ("--model", trained_run, "--num-images", 300, "--reference", sets / "samples.npz", *TINY)
    arguments += ("--cfg-scale", 1.5)
    code, printed = run_eval("fid", *arguments, "--json", tmp_path / "one.json", "--report", tmp_path / "page.html")
    assert code == 0, printed
    done = forked("eval/fid.py", *arguments, "--json", tmp_path / "two.json", ranks=2)
    assert done.code == 0, done.out[-2000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["metrics"].keys() == two["metrics"].keys()
    assert one["metrics"].keys() == EVERY
    for name, entry in one["metrics"].items():
        assert two["metrics"][name]["value"] == pytest.approx(entry["value"], rel=1e-9), name
    # The jackknife multiplies rounding by the number of groups; its errors need no more digits than this.
    assert two["metrics"]["fd"]["standard_error"] == pytest.approx(one["metrics"]["fd"]["standard_error"], rel=1e-4)
    protocol = one["protocol"]
    assert protocol["samples"]["images_sha256"] == two["protocol"]["samples"]["images_sha256"]
    assert protocol["labels"] == "balanced" and protocol["sampler"]["cfg_scale"] == 1.5
    assert len(protocol["samples"]["model"]["weights_sha256"]) == 64
    assert "<b>ant</b>" not in (tmp_path / "page.html").read_text(), "without labels of the reference, no class is best"


def test_static_steps_survive_the_evaluation_and_draw_the_report(trained_run, sets, tmp_path, run_eval, monkeypatch):
    """Their buffers are made while features are extracted and written again when the report samples its pictures."""
    monkeypatch.setattr(torch, "compile", lambda step, **settings: step)
    arguments = ("--model", trained_run, "--num-images", 20, "--reference", sets / "reference", *TINY, "--groups", 0)
    arguments += ("--metrics", "fid", "--cfg-scale", 1.5)
    arguments += ("--json", tmp_path / "m.json", "--report", tmp_path / "page.html")
    code, printed = run_eval("fid", *arguments, "--compile", "on")
    assert code == 0, printed
    assert Tags((tmp_path / "page.html").read_text()).found.count("img") >= 6, "strips of samples and of the reference"
    static = values(tmp_path / "m.json")
    assert run_eval("fid", *arguments, "--compile", "off")[0] == 0
    assert static == values(tmp_path / "m.json")


def test_no_module_uses_inference_mode():
    """A tensor made under it can never be written outside of it, and buffers outlive the call that makes them."""
    for path in (ROOT / "mutor_vision").rglob("*.py"):
        tree = ast.parse(path.read_text())
        left = [
            ast.unparse(node) == "torch.inference_mode(False)" for node in ast.walk(tree) if isinstance(node, ast.Call)
        ]
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "inference_mode"]
        assert len(used) == sum(left), path  # leaving it is right


def test_images_of_a_run_are_sampled_once_and_in_the_samplers_own_batches(trained_run, sets, extractor, monkeypatch):
    launched = []
    launch = sample._launch
    monkeypatch.setattr(sample, "_launch", lambda *all: launched.append(all[2].tolist()) or launch(*all))
    monkeypatch.setattr("mutor_vision.features.extract.CHUNK", 24)
    loaded = load(trained_run, ALONE)
    monkeypatch.setattr(sample, "default_batch_size", lambda loaded: 16)
    source = RunImages(loaded, 60, SampleSettings(cfg_scale=1.5))
    assert (source.height, source.width) == (16, 16) and not launched, "no image is sampled to learn its size"
    found = extract(source, extractor, ALONE, batch=5, keep=("pool",))
    assert [len(batch) for batch in launched] == [16, 16, 16, 12] and sum(launched, []) == list(range(60))
    other = RunImages(loaded, 60, SampleSettings(cfg_scale=1.5), batch=7)
    again = extract(other, extractor, ALONE, batch=5, keep=("pool",))
    assert torch.equal(found.rows["pool"], again.rows["pool"]) and found.images_sha256 == again.images_sha256

    samples = ImageSet(source, None, {"path": "run"})
    result = evaluate(samples, open_set(sets / "reference"), extractor, ALONE, Options(metrics=("fid",), groups=0))
    launched.clear()
    report.page(result, source, open_set(sets / "reference").images)
    assert len(launched) == 2, "24 pictures of the page are made together, not one by one"


def test_a_batch_is_launched_before_the_last_one_is_waited_for(monkeypatch):
    """On CUDA, where launching does not wait: the device has work while the host measures images."""
    events = []

    class Loaded:
        runtime = Runtime(0, 1, torch.device("cuda"), None)

    monkeypatch.setattr(sample, "_launch", lambda *all: (events.append(("launched", *all[2])), None))
    monkeypatch.setattr(sample, "_arrived", lambda *all: None)
    for indices, _ in sample.sample_batches(Loaded, torch.zeros(4), [np.array([i]) for i in range(4)], None, 0):
        events.append(("measured", *indices))
    order = [("launched", 0), ("launched", 1), ("measured", 0), ("launched", 2), ("measured", 1), ("launched", 3)]
    assert events == [*order, ("measured", 2), ("measured", 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_is_evaluated_on_cuda_as_on_the_cpu(trained_run, sets, tmp_path, run_eval):
    for device in ("cuda", "cpu"):
        code, printed = run_eval(
            "fid", "--model", trained_run, "--num-images", 300, "--reference", sets / "reference", *TINY,
            "--cfg-scale", 1.5, "--precision", "float32", "--device", device, "--json", tmp_path / f"{device}.json",
            "--report", tmp_path / f"{device}.html",
        )  # fmt: skip
        assert code == 0, printed
    ours, theirs = values(tmp_path / "cuda.json"), values(tmp_path / "cpu.json")
    assert ours.keys() == theirs.keys()
    # A token that lies on a border between two may differ, and with it an image.
    assert ours["fd"] == pytest.approx(theirs["fd"], rel=0.05)


# ---- survival


class Interrupted:
    """A source that fails, as a killed process would, when it is asked for image `until`."""

    prefetch = False

    def __init__(self, source, until: int):
        self.source, self.until, self.asked = source, until, []
        self.count, self.key = source.count, source.key

    def read(self, start, stop):
        if start >= self.until:
            raise KeyboardInterrupt
        self.asked.append(start)
        return self.source.read(start, stop)


def test_features_of_finished_chunks_survive_a_kill(sets, tmp_path, extractor):
    source = open_set(sets / "samples.npz").images
    expected = extract(source, extractor, ALONE, keep=("pool",))
    with pytest.raises(KeyboardInterrupt):
        extract(Interrupted(source, CHUNK + 60), extractor, ALONE, work=tmp_path, keep=("pool",))
    again = Interrupted(open_set(sets / "samples.npz").images, 10**9)
    found = extract(again, extractor, ALONE, work=tmp_path, keep=("pool",))
    assert min(again.asked) == CHUNK, "the first chunk was not computed again"
    assert torch.equal(found.rows["pool"], expected.rows["pool"])
    assert torch.equal(found.moments["pool"].total().sigma, expected.moments["pool"].total().sigma)

    chunk = sorted(tmp_path.rglob("chunk-*.safetensors"))[1]
    chunk.write_bytes(chunk.read_bytes()[:1000])
    found = extract(source, extractor, ALONE, work=tmp_path, keep=("pool",))
    assert torch.equal(found.rows["pool"], expected.rows["pool"]), "a torn file is computed again"


def test_features_are_never_taken_for_those_of_other_images_or_networks(sets, tmp_path, extractor):
    extract(open_set(sets / "samples").images, extractor, ALONE, work=tmp_path)
    other = load_extractor("timm:test_resnet@48", "random")
    for images, network in (
        (open_set(sets / "reference").images, extractor),
        (open_set(sets / "samples").images, other),
    ):
        counted = Interrupted(images, 10**9)
        extract(counted, network, ALONE, work=tmp_path)
        assert counted.asked, "nothing was reused"


# ---- reference statistics


def test_a_reference_serves_in_place_of_its_images(sets, tmp_path, run_eval):
    code, printed = run_eval("reference", "--data", sets / "reference", "--out", tmp_path / "r.npz", *TINY,
                             "--keep-images", 50)  # fmt: skip
    assert code == 0 and "fewer images than the 96 features" in printed
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        assert file["mu"].shape == (96,) and file["sigma"].shape == (96, 96) and file["sigma"].dtype == np.float64
        assert file["arr_0"].shape == (50, 16, 16, 3) and file["arr_1"].shape == (50,)
    samples = ("--samples", sets / "samples", "--groups", 0, *TINY)
    assert run_eval("fid", *samples, "--reference", tmp_path / "r.npz", "--json", tmp_path / "npz.json")[0] == 0
    assert run_eval("fid", *samples, "--reference", sets / "reference", "--json", tmp_path / "folder.json")[0] == 0
    ours, theirs = values(tmp_path / "npz.json"), values(tmp_path / "folder.json")
    assert ours["fd"] == pytest.approx(theirs["fd"], rel=1e-9)
    assert json.loads((tmp_path / "npz.json").read_text())["protocol"]["n_reference"] == 90

    other = ("--samples", sets / "samples", "--features", "timm:test_resnet@48", "--weights", "random")
    code, printed = run_eval("fid", *other, "--reference", tmp_path / "r.npz")
    assert code == 5 and "was made with resize" in printed


def test_a_reference_goes_on_after_a_kill(sets, tmp_path, extractor, monkeypatch):
    from mutor_vision.features import reference

    monkeypatch.setattr(reference, "SNAPSHOT_EVERY", 1)
    monkeypatch.setattr("mutor_vision.features.extract.CHUNK", 40)
    monkeypatch.setattr(reference, "CHUNK", 40)
    source = open_set(sets / "reference").images
    expected = reference.write_reference(source, extractor, ALONE, tmp_path / "a.npz", keep_images=0)
    interrupted = Interrupted(source, 80)
    with pytest.raises(KeyboardInterrupt):
        reference.write_reference(interrupted, extractor, ALONE, tmp_path / "b.npz", keep_images=0, work=tmp_path / "w")
    assert not (tmp_path / "b.npz").exists()
    counted = open_set(sets / "reference").images
    asked, read = [], counted.read
    counted.read = lambda start, stop: asked.append(start) or read(start, stop)
    found = reference.write_reference(counted, extractor, ALONE, tmp_path / "b.npz", keep_images=0, work=tmp_path / "w")
    assert asked == [80] and found == expected
    ours, theirs = (Npz(tmp_path / f"{name}.npz").read("sigma") for name in "ab")
    assert np.allclose(ours, theirs, rtol=0, atol=1e-15)


# ---- features trained on one's own images


def test_trained_features_know_their_accuracy(sets, tmp_path, run_eval):
    code, printed = run_eval(
        "train_features", "--data", sets / "reference", "--val-data", sets / "samples", "--out", tmp_path / "features",
        "--image-size", 16, "--epochs", 20, "--batch-size", 16, "--workers", 0,
    )  # fmt: skip
    assert code == 0 and "chance 33.3%" in printed, printed
    config = json.loads((tmp_path / "features" / "config.json").read_text())
    assert config["held_out_accuracy"] > 0.9 and config["class_names"] == list(CLASSES)
    arguments = ("--samples", sets / "samples", "--reference", sets / "reference", "--features", tmp_path / "features")
    code, printed = run_eval("fid", *arguments, "--groups", 0, "--json", tmp_path / "m.json")
    assert code == 0 and "held-out accuracy" in printed
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["protocol"]["extractor"]["held_out_accuracy"] == config["held_out_accuracy"]
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(config["held_out_accuracy"])
    assert result["classes"]["class_accuracy"] is not None and len(result["classes"]["distance"]) == 3

    weights = tmp_path / "features" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\1")
    code, printed = run_eval("fid", *arguments)
    assert code == 4 and "not the file that config.json names" in printed


# ---- the page of classes


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.attributes += [name for name, _ in attributes]


def test_the_page_shows_the_worst_classes_and_runs_no_script(sets, tmp_path, extractor):
    hostile = '<img src=x onerror=alert(1)>"'
    samples_folder, reference_folder = tmp_path / "samples", tmp_path / "reference"
    write_classes(samples_folder, pictures(60, 1))
    write_classes(reference_folder, pictures(60, 2))
    for folder in (samples_folder, reference_folder):
        (folder / "bee").rename(folder / hostile)
    for path in (samples_folder / "cat").iterdir():  # a class that went wrong
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    samples, reference = open_set(samples_folder), open_set(reference_folder)
    result = evaluate(samples, reference, extractor, ALONE, Options(groups=0))
    distances = dict(zip(result["classes"]["names"], result["classes"]["distance"], strict=True))
    assert max(distances, key=distances.get) == "cat"
    page = report.page(result, samples.images, reference.images, shown=1)
    tags = Tags(page)
    assert "script" not in tags.found and "onerror" not in tags.attributes
    assert tags.found.count("img") == 4, "two strips of the worst class and two of the best"
    assert page.index("Worst classes") < page.index("<b>cat</b>") < page.index("Best classes")
    assert "default-src 'none'" in page


# ---- guidance


def test_golden_section_finds_the_minimum_with_few_evaluations():
    asked = []

    def value(scale):
        asked.append(scale)
        return (scale - 1.83) ** 2

    sweep.golden_section(value, 1.0, 4.0, 0.05)
    points = [{"cfg_scale": scale, "value": value(scale)} for scale in list(asked)]
    assert sweep.best_of(points)["cfg_scale"] == pytest.approx(1.83, abs=0.05)
    assert len(points) <= 12 and len(set(asked)) == len(points)


def test_a_sweep_goes_on_and_draws_its_curve(trained_run, sets, tmp_path, run_eval):
    arguments = ("--run", trained_run, "--reference", sets / "reference.npz", *TINY, "--num-images", 12, "--groups", 0)
    code, printed = run_eval("cfg_sweep", *arguments, "--scales", "1,2", "--out", tmp_path / "sweep")
    assert code == 0 and "best cfg scale" in printed, printed
    assert Image.open(tmp_path / "sweep" / "sweep.png").width > 400
    points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    assert [point["cfg_scale"] for point in points] == [1.0, 2.0] and not (tmp_path / "sweep" / "work").exists()

    code, printed = run_eval("cfg_sweep", *arguments, "--scales", "1,2,3", "--out", tmp_path / "sweep")
    assert code == 0 and printed.count("cfg scale 3: ") == 1 and "cfg scale 2: " not in printed
    code, printed = run_eval("cfg_sweep", *arguments, "--scales", "1", "--seed", 1, "--out", tmp_path / "sweep")
    assert code == 5 and "another model, reference or settings" in printed


def test_a_sweep_is_bound_to_what_decides_its_numbers(trained_run, sets, tmp_path, run_eval):
    """Another reference under the same name, another precision, error bars of other groups: each is another sweep."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "a" / "reference.npz", pictures(40, 2))
    np.savez(tmp_path / "b" / "reference.npz", pictures(40, 3))
    arguments = ("--model", trained_run, *TINY, "--num-images", 12, "--scales", "1.5", "--out", tmp_path / "sweep")
    first = (*arguments, "--reference", tmp_path / "a" / "reference.npz")
    assert run_eval("cfg_sweep", *first, "--groups", 0)[0] == 0
    other = ("--model", trained_run, "--features", "timm:test_resnet@48", "--weights", "random", "--num-images", 12)
    for changed, flags in (
        ("reference_sha256", (*arguments, "--groups", 0, "--reference", tmp_path / "b" / "reference.npz")),
        ("groups", (*first, "--groups", 5)),
        ("extractor", (*other, *arguments[-4:], "--groups", 0, "--reference", tmp_path / "a" / "reference.npz")),
    ):
        code, printed = run_eval("cfg_sweep", *flags)
        assert code == 5 and f"({changed})" in printed, printed
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert record["binding"]["precision"] == "torch.float32"
    for text in ("[]", "{}", '{"binding": {}, "points": [1]}', '{"points": {}}'):
        (tmp_path / "sweep" / "sweep.json").write_text(text)
        code, printed = run_eval("cfg_sweep", *first, "--groups", 0)
        assert code == 4 and "is no record of a sweep" in printed


# ---- in training, and the npz writer


def test_the_distance_in_training_is_that_of_the_command(sets, tmp_path, extractor, run_eval):
    assert run_eval("reference", "--data", sets / "reference", "--out", tmp_path / "r.npz", *TINY)[0] == 0
    root = in_training.load_reference(tmp_path / "r.npz", extractor, ALONE)
    images = open_set(sets / "samples").images
    batches = [images.read(0, 25), images.read(25, 60), torch.empty(0, 3, 16, 16, dtype=torch.uint8)]
    found = in_training.distance(extractor, root, batches, ALONE)
    expected = evaluate(ImageSet(images, None, {"path": "samples"}), open_set(tmp_path / "r.npz"), extractor, ALONE,
                        Options(metrics=("fid",), groups=0))  # fmt: skip
    assert found == {"fd": pytest.approx(expected["metrics"]["fd"]["value"], rel=1e-6), "fd_images": 60}


def test_an_npz_is_streamed_and_appears_only_when_complete(tmp_path):
    images = torch.from_numpy(pictures(10, 1)).permute(0, 3, 1, 2)
    for name in ("a.npz", "b.npz"):
        with NpzImageWriter(tmp_path / name, 10, 16, 16) as writer:
            writer.write(images[:4])
            assert not (tmp_path / name).exists()
            writer.write(images[4:])
    assert (np.load(tmp_path / "a.npz", allow_pickle=False)["arr_0"] == pictures(10, 1)).all()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with pytest.raises(IntegrityError, match="4 images written, expected 10"):
        with NpzImageWriter(tmp_path / "c.npz", 10, 16, 16) as writer:
            writer.write(images[:4])
    with pytest.raises(KeyboardInterrupt):
        with NpzImageWriter(tmp_path / "c.npz", 10, 16, 16) as writer:
            writer.write(images)
            raise KeyboardInterrupt
    with pytest.raises(IntegrityError, match="more than the 2"):
        with NpzImageWriter(tmp_path / "c.npz", 2, 16, 16) as writer:
            writer.write(images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_a_full_disk_leaves_no_half_npz(tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), NpzImageWriter(tmp_path / "c.npz", 1, 16, 16) as writer:
        writer.write(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
        monkeypatch.setattr(writer._zip, "_write_end_record", full)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_arrays_are_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mutor_vision.storage.npz_writer._write_member", full)
    with pytest.raises(OSError, match="No space"):
        write_arrays(tmp_path / "c.npz", {"mu": np.zeros(3)})
    with pytest.raises(OSError, match="No space"), NpzImageWriter(tmp_path / "c.npz", 1, 16, 16, {"mu": np.zeros(3)}):
        pass
    assert not list(tmp_path.iterdir())
