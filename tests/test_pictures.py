"""experiments/pictures.py from a folder to its scores, at a size of nothing."""

import json

import numpy as np
import pictures
import pytest
from PIL import Image

from mutor_vision.storage.run_log import held_out_losses


@pytest.mark.slow
def test_one_command_from_a_folder_to_scores_which_goes_on(tmp_path, monkeypatch, starts_are_forked, capsys):
    import timm  # noqa: F401

    generator = np.random.default_rng(0)
    for split, number in (("train", 18), ("val", 3)):
        for wnid in ("n01443537", "n01917289", "n02165456"):  # the third is not asked for
            folder = tmp_path / "tiny" / split / wnid
            folder.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(generator.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.JPEG")
    monkeypatch.setattr(pictures, "CLASSES", {"n01443537": "goldfish", "n01917289": "brain coral"})
    monkeypatch.setattr(pictures, "TOKENIZER", ("steps=2", "warmup_steps=0", "batch_size=4", "dead_code_steps=0",
                                                "model.channels=8,8,8,8", "model.latent_channels=8", "val_every=0",
                                                "sample_every=0", "perceptual_weight=0", "workers=0"))  # fmt: skip
    monkeypatch.setattr(pictures, "SCALES", "1.5,3")
    out = tmp_path / "out"
    words = ["pictures.py", "--data", tmp_path / "tiny", "--out", out, "--steps", 2, "--samples", 12, "--judge",
             "timm:test_efficientnet@32", "--judge-weights", "random", "--perceptual-weights", "", "--set",
             "val_every=1", "--set", "model.layers=1", "--set", "model.dim=32", "--set", "batch_size=8"]  # fmt: skip
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    pictures.main()
    for name in pictures.OBJECTIVES:
        assert Image.open(out / f"samples-{name}.png").height == 2 * (128 + 4) + 4
        assert json.loads((out / f"metrics-{name}.json").read_text())["protocol"]
        step, losses = held_out_losses(out / name)
        assert step == 2 and {"ema", "ema-0.99", "ema-0.9995"} < losses.keys()
        drawn = [words for words in starts_are_forked if words[1] == "sample" and str(out / name) in words]
        scored = next(words for words in starts_are_forked if words[1] == "fid" and str(out / name) in words)
        points = json.loads((out / f"sweep-{name}" / "sweep.json").read_text())["points"]
        best = min(points, key=lambda point: point["value"])["cfg_scale"]
        assert len(points) == 2 and {words[words.index("--cfg-scale") + 1] for words in (*drawn, scored)} == {str(best)}
        del losses["model"]
        assert drawn[0][drawn[0].index("--weights") + 1] == min(losses, key=losses.get)
    assert sorted(path.name for path in (out / "images" / "train").iterdir()) == ["n01443537", "n01917289"]
    before = len(starts_are_forked)
    (out / "metrics-mutor-2d.json").unlink()
    pictures.main()  # finds what is done, and scores once more
    assert [words[1] for words in starts_are_forked[before:]].count("fid") == 1
