import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_vision.config import TrainConfig
from mutor_vision.features.sources import RunImages
from mutor_vision.runtime import Runtime
from mutor_vision.sampling import stream as sample
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.load import load
from mutor_vision.sampling.static import StaticSteps
from mutor_vision.sampling.stream import label_plan
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json
from mutor_vision.storage.seal import write_sealed

ALONE = Runtime(0, 1, torch.device("cpu"), None)


@pytest.fixture
def mutor(command):
    """Run `mutor WORD ...`: exit code and what it printed."""
    return lambda *words: dataclasses.astuple(command("mutor", *words))


def test_a_grid_has_a_row_per_class(mutor, trained_run, tmp_path):
    code, out, _ = mutor("sample", trained_run, "--classes", "bee,4", "--per-class", 3, "--out", tmp_path / "grid.png")
    assert code == 0 and "6 images of 2 classes" in out
    grid = Image.open(tmp_path / "grid.png")
    assert grid.height == 2 * (128 + 4) + 4 and 3 * 132 < grid.width < 3 * 132 + 100


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_set_is_the_same_for_every_batch_size(mutor, trained_run, tmp_path, batch_size):
    for size in (16, batch_size):
        code, _, err = mutor(
            "sample", trained_run, "--num", 16, "--batch-size", size, "--out", tmp_path / f"{size}.npz"
        )
        assert code == 0, err
    assert (tmp_path / "16.npz").read_bytes() == (tmp_path / f"{batch_size}.npz").read_bytes()


def test_a_set_is_the_same_for_two_processes_and_as_png(mutor, trained_run, tmp_path, forked):
    mutor("sample", trained_run, "--num", 7, "--batch-size", 2, "--out", tmp_path / "one.npz")
    arguments = ["sample", trained_run, "--num-images", "7", "--batch-size", "2", "--out", tmp_path / "two.npz"]
    result = forked("mutor", *arguments, ranks=2)
    assert result.code == 0, result.out[-2000:]
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()

    images = np.load(tmp_path / "one.npz", allow_pickle=False)["arr_0"]
    assert images.shape == (7, 16, 16, 3) and images.dtype == np.uint8
    mutor("sample", trained_run, "--num", 7, "--out", tmp_path / "folder")
    for i in range(7):
        assert (np.array(Image.open(tmp_path / "folder" / f"{i:06d}.png")) == images[i]).all()
    record = json.loads((tmp_path / "folder.json").read_text())
    assert record["sampler"]["cfg_scale"] == 2.0 and len(record["labels_of_images"]) == 7
    assert record["model"]["weights"] == "ema" and len(record["model"]["weights_sha256"]) == 64


def test_raw_and_ema_weights_differ(mutor, trained_run, tmp_path):
    for weights in ("model", "ema"):
        mutor("sample", trained_run, "--weights", weights, "--num", 4, "--out", tmp_path / f"{weights}.npz")
    assert (tmp_path / "model.npz").read_bytes() != (tmp_path / "ema.npz").read_bytes()


def test_quantized_weights_are_recorded(mutor, trained_run, tmp_path):
    pytest.importorskip("torchao")
    code, _, err = mutor("sample", trained_run, "--quantize", "int8", "--num", 4, "--out", tmp_path / "int8.npz")
    assert code == 0, err
    assert json.loads((tmp_path / "int8.npz.json").read_text())["model"]["quantize"] == "int8"
    loaded = load(trained_run, ALONE, quantize="int8")
    assert RunImages(loaded, 2, SampleSettings()).describe()["model"]["quantize"] == "int8"
    assert "quantize" not in load(trained_run, ALONE).identity


def test_static_steps_draw_the_same_images(trained_run):
    loaded, labels = load(trained_run, ALONE), label_plan(5, 5)
    static = dataclasses.replace(loaded, decoder=StaticSteps())
    images = [torch.cat([part for _, part in sample.sample_stream(each, labels, SampleSettings(), 0, 2)])
              for each in (loaded, static)]  # fmt: skip
    assert torch.equal(*images)


def test_on_a_gpu_the_next_batch_is_launched_before_the_last_is_fetched(trained_run, monkeypatch):
    """The order of calls; the images themselves stay on the CPU."""
    calls = []
    monkeypatch.setattr(sample, "_launch", lambda loaded, labels, indices, *_: calls.append(indices[0]) or (indices, 0))
    monkeypatch.setattr(sample, "_arrived", lambda images, event: calls.append(f"fetched {images[0]}") or images)
    loaded = load(trained_run, ALONE)
    loaded = dataclasses.replace(loaded, runtime=dataclasses.replace(ALONE, device=torch.device("cuda")))
    yielded = [indices.tolist() for indices, _ in sample.sample_stream(loaded, label_plan(5, 5), None, 0, 2)]
    assert yielded == [[0, 1], [2, 3], [4]]
    assert calls == [0, 2, "fetched 0", 4, "fetched 2", "fetched 4"]


def test_the_batch_follows_from_free_memory(trained_run, monkeypatch):
    loaded = load(trained_run, ALONE)
    decoder, image = sample.DECODED_AT_ONCE["cpu"] * sample.decoder_bytes(loaded), sample.bytes_per_image(loaded)
    # 2 layers of 32, 16 tokens, keys and values of two streams; 36 bytes for each of 32 codes. Six activations.
    assert image == 2 * 2 * 2 * 16 * 32 * 4 + 32 * 36 and decoder == 6 * 8 * 16 * 16 * 4
    for free, expected in ((0, 1), (2 * (decoder + 9 * image), 8), (2**60, 32)):
        monkeypatch.setattr(sample, "free_bytes", lambda device, free=free: free)
        assert sample.default_batch_size(loaded) == expected
    monkeypatch.undo()
    assert sample.free_bytes(torch.device("cpu")) > 2**20


def test_classes_are_chosen_by_names_with_commas_and_one_by_one(mutor, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    token_set = read_json(tmp_path / "run" / "token_set.json")
    token_set["class_names"] = ["tench, Tinca tinca", " padded ", "3", "new\nline \udcff\x1b[31m", "dog"]
    del token_set["seal"]
    write_sealed(tmp_path / "run" / "token_set.json", token_set)
    seen = []
    for arguments in (
        ["--classes", "tench, Tinca tinca"], ["--classes", "tench,padded"], ["--classes", "3"], ["--class", "3"],
        ["--class", "Tinca tinca", "--class", " padded ", "--classes", "4"], ["--class", token_set["class_names"][3]],
    ):  # fmt: skip
        code, out, err = mutor("sample", tmp_path / "run", *arguments, "--per-class", 1, "--out", tmp_path / "grid.png")
        assert code == 0, err
        seen.append(int(out.split(" of ")[1].split()[0]))
    assert seen == [1, 2, 1, 1, 3, 1]
    code, _, err = mutor("sample", tmp_path / "run", "--class", "hound", "--num", 3, "--out", tmp_path / "set")
    assert code == 2 and "drop --classes" in err


def test_a_sample_is_not_begun_where_it_cannot_be_written(mutor, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = mutor("sample", "gone", "--out", tmp_path / "file" / "grid.png")
    assert code == 2 and "cannot be written" in err


def test_a_checkpoint_may_be_given_instead_of_its_run(mutor, trained_run, tmp_path):
    code, out, _ = mutor("sample", trained_run / "checkpoints" / "step-0000005", "--out", tmp_path / "grid.png")
    assert code == 0 and "step-0000005" in out


def test_a_balanced_plan_has_every_class_equally_often_in_mixed_order():
    labels = label_plan(1000, 5, "balanced", seed=0)
    assert labels.bincount().tolist() == [200] * 5
    assert (labels[:-1] <= labels[1:]).float().mean() < 0.8, "not sorted by class"
    assert label_plan(1000, 5, "random", seed=0).bincount().tolist() != [200] * 5
    assert not torch.equal(labels, label_plan(1000, 5, "balanced", seed=1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", "5"], "class 5 does not exist; this model has classes 0 to 4"),
        (["--classes", "-1"], "class -1 does not exist"),
        (["--classes", "cta"], "did you mean 'cat'?"),
        (["--per-class", "0"], "--per-class is 0"),
        (["--num", "0"], "--num is 0"),
        (["--num", "4", "--classes", "1"], "drop --classes"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "0"], "top_p is 0"),
        (["--top-k", "33"], "codebook's 32"),
        (["--cfg-scale", "nan"], "cfg_scale is nan"),
        (["--cfg-schedule", "cubic"], "constant, linear, power-cosine"),
        (["--cfg-interval", "5"], "cfg_interval is (5,)"),
        (["--cfg-interval", "a,b"], "expected first,end"),
        (["--seed", "-1"], "--seed is -1"),
        (["--weights", "best-ever"], "it has ema, model"),
        (["--batch-size", "-4"], "--batch-size is -4"),
        (["--device", "cuda:9"], "expected one of auto, cpu, cuda"),
        (["--cfg", "2"], "unrecognized arguments: --cfg"),
        (["--quantize", "int3"], "quantize is 'int3', expected one of none, int8"),
        (["--compile", "maybe"], "compile is 'maybe', expected one of auto, on, off"),
    ],
)
@pytest.mark.bad_input("command line")
def test_bad_arguments_are_one_line_and_leave_nothing(mutor, trained_run, tmp_path, arguments, message):
    code, out, err = mutor("sample", trained_run, "--out", tmp_path / "grid.png", *arguments)
    assert code not in (0, None) and message in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_sampled_are_refused(mutor, trained_run, tmp_path, tiny_tokenizer_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (tmp_path / "absent", "does not exist"),
        (empty, "holds no checkpoint"),
        (tiny_tokenizer_path, "holds a tokenizer, expected a transformer"),
    ):
        code, _, err = mutor("sample", path, "--out", tmp_path / "grid.png")
        assert code not in (0, None) and message in err and len(err.strip().splitlines()) == 1


def test_a_run_whose_tokenizer_is_gone_says_so(mutor, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    code, _, err = mutor("sample", tmp_path / "run", "--out", tmp_path / "grid.png")
    assert code == 2 and "has no tokenizer" in err


def test_weights_that_are_not_finite_are_refused(mutor, trained_run, tmp_path):
    folder = checkpoint.newest(trained_run)
    weights = checkpoint.read_weights(folder, "model")
    weights["norm.weight"][3] = float("nan")
    config = checkpoint.read_config(folder, "transformer", TrainConfig)
    checkpoint.save(tmp_path / "run", 1, "transformer", config, {"model": weights}, {}, keep=2)
    shutil.copytree(trained_run / "tokenizer", tmp_path / "run" / "tokenizer")
    shutil.copy(trained_run / "token_set.json", tmp_path / "run")
    code, _, err = mutor("sample", tmp_path / "run", "--out", tmp_path / "grid.png")
    assert code == 4 and "'norm.weight' holds values that are not finite" in err


def test_info_describes_runs_and_token_sets(mutor, trained_run, token_set_path, tmp_path):
    code, out, _ = mutor("info", trained_run)
    assert code == 0 and "done at step 10" in out and "registers.count = 6" in out
    code, out, _ = mutor("info", token_set_path)
    assert code == 0 and "60 images of 5 classes" in out
    code, _, err = mutor("info", tmp_path)
    assert code == 2 and "neither config.json nor manifest.json" in err


def test_no_command_or_a_wrong_one_is_one_line(mutor):
    for arguments in ([], ["smaple"]):
        code, _, err = mutor(*arguments)
        assert code == 2 and len(err.strip().splitlines()) == 1


def test_pixels_do_not_depend_on_how_many_images_are_drawn_with_them(trained_run, monkeypatch):
    """With many images and the codes given: a pixel near a half shows the last bit of a decoder's kernel."""
    loaded = load(trained_run, ALONE)
    config = loaded.transformer.config
    codes = torch.randint(config.vocab_size, (400, *config.grid), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sample, "generate", lambda model, labels, settings, *, seed, indices, decoder: codes[indices])

    def drawn(size):
        parts = np.split(np.arange(400), range(size, 400, size))
        return torch.cat([sample.sample_images(loaded, torch.zeros(len(part), dtype=torch.int64), part,
                                               SampleSettings(), 0) for part in parts])  # fmt: skip

    assert torch.equal(drawn(400), drawn(3))


def test_a_set_that_is_there_is_recognised(mutor, trained_run, tmp_path):
    """The same command again has nothing to do; another one does not write over it; nor is a set without a record."""
    words = ["sample", trained_run, "--num", 4, "--out", tmp_path / "set.npz"]
    assert mutor(*words)[0] == 0
    made = (tmp_path / "set.npz").read_bytes()
    code, out, _ = mutor(*words)
    assert code == 0 and "is there already" in out
    code, _, err = mutor(*words, "--seed", 1)
    assert code == 2 and "made in another way" in err
    (tmp_path / "set.npz.json").unlink()
    code, _, err = mutor(*words)
    assert code == 2 and "exists already" in err and (tmp_path / "set.npz").read_bytes() == made
