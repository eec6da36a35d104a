"""experiments/diary.py from a folder to its pictures, at a size of nothing."""

import json

import diary
import numpy as np
import pytest
from PIL import Image

CLASSES = {"n01443537": "goldfish", "n01917289": "brain coral"}


@pytest.mark.slow
def test_a_diary_has_every_share_and_every_failure_and_goes_on(tmp_path, monkeypatch, starts_are_forked, capsys):
    generator = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 3)):
        for wnid in CLASSES:
            folder = tmp_path / "tiny" / split / wnid
            folder.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(generator.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.JPEG")
    monkeypatch.setattr(diary, "CLASSES", CLASSES)
    monkeypatch.setattr("pictures.CLASSES", CLASSES)
    monkeypatch.setattr(diary, "SHARES", (10, 100))
    for name in ("BAD_TOKENIZERS", "BAD_TRANSFORMERS", "DRAWN"):
        monkeypatch.setattr(diary, name, dict(list(getattr(diary, name).items())[-1:]))
    small = {"batch_size": 4, "model.channels": "8,8,8,8", "model.latent_channels": 8, "workers": 0}
    monkeypatch.setattr(diary, "TOKENIZER", diary.TOKENIZER | small)
    out = tmp_path / "out"
    words = ["diary.py", "--data", tmp_path / "tiny", "--out", out, "--tokenizer-steps", 20, "--steps", 20, "--set",
             "model.layers=1", "--set", "model.dim=32", "--set", "batch_size=8"]  # fmt: skip
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    diary.main()
    told = json.loads((out / "told.json").read_text())
    shares = [f"{share} %" for share in diary.SHARES]
    assert list(told) == [*shares, *diary.BAD_TOKENIZERS, *(f"transformer, {name}" for name in
                          (*shares, *diary.BAD_TRANSFORMERS))]  # fmt: skip
    assert [told[share]["steps"] for share in shares] == [2, 20] and told["100 %"]["psnr"] > 0
    for name, rows in (("tokenizer", 4), ("transformer", 3), ("drawn", 1)):
        assert Image.open(out / f"{name}.png").size == (2 * 64 + 8, rows * (64 + 18) + 4)
    before = len(starts_are_forked)
    diary.main()  # finds what is done
    assert [words[1] for words in starts_are_forked[before:]] == ["encode"]
