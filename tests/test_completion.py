"""An image is completed from its first rows, by every decoder, as the model itself would have gone on."""

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_vision.errors import UserError
from mutor_vision.sampling.completion import Completing
from mutor_vision.sampling.decode import Plain
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.forecast import Forecast
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.static import StaticSteps

DECODERS = {"plain": Plain, "static": StaticSteps, "forecast": lambda: Forecast(4), "drafts": lambda: Forecast(3, 2)}
KEPT = 8  # two rows of four


def drawn(model, decoder, drawing, seed, labels=(1,), indices=(7,)):
    return generate(model, torch.tensor(labels), SampleSettings(**drawing), seed=seed, indices=np.array(indices),
                    decoder=DECODERS[decoder]())  # fmt: skip


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_the_model_drew_itself_comes_again_bit_for_bit(decoder, random_model, drawing):
    model, codes = random_model.eval(), drawn(random_model.eval(), decoder, drawing, 3)
    completing = Completing(model, codes.flatten()[:KEPT])
    assert torch.equal(drawn(completing, decoder, drawing, 3), codes)


@pytest.mark.parametrize("decoder", DECODERS)
def test_other_noise_keeps_the_rows_and_goes_on_in_its_own_way(decoder, random_model, drawing):
    model = random_model.eval()
    kept = torch.tensor([5, 31, 0, 17, 17, 2, 9, 30])
    found = drawn(Completing(model, kept), decoder, drawing, 4, (1, 3, 1, 0), range(4))
    assert (found.flatten(1)[:, :KEPT] == kept).all()
    expected = drawn(Completing(model, kept), "plain", drawing, 4, (1, 3, 1, 0), range(4))
    assert torch.equal(found, expected)
    if drawing.get("temperature", 1):
        assert len(found.flatten(1)[:, KEPT:].unique(dim=0)) == 4


@pytest.mark.parametrize("count", [0, 16, 20])
def test_an_image_is_kept_in_part(count, random_model):
    with pytest.raises(UserError, match=f"{count} codes are kept, expected 1 to 15"):
        Completing(random_model, torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("decode", ["plain", "forecast"])
def test_the_command_shows_the_original_and_its_continuations(decode, command, trained_run, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    words = ["mutor", "sample", trained_run, "--image", tmp_path / "photo.png", "--classes", "cat,dog",
             "--per-class", 3, "--decode", decode, "--out"]  # fmt: skip
    for rows in (1, 3):
        done = command(*words, tmp_path / f"{rows}.png", "--keep-rows", rows)
        assert done.code == 0, done.err
    with Image.open(tmp_path / "1.png") as one, Image.open(tmp_path / "3.png") as three:
        one, three = np.asarray(one)[:, -(4 * 132 + 4) :], np.asarray(three)[:, -(4 * 132 + 4) :]
    assert one.shape == (2 * 132 + 4, 4 * 132 + 4, 3)  # four columns, pixels enlarged to 128
    cells = [x[4 : 4 + 128 : 8, 4 + 132 * column :][:, :128:8] for x in (one, three) for column in range(4)]
    crop = np.asarray(photo.crop((5, 0, 25, 20)).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(cells[0].astype(int) - crop).max() < 80 and (cells[0] == cells[4]).all()
    apart = [len({cell.tobytes() for cell in cells[first : first + 4]}) for first in (0, 4)]
    assert apart[0] == 4


@pytest.mark.parametrize("words, message", [
    (["--keep-rows", 2], "--keep-rows needs --image"), (["--image", "PHOTO", "--keep-rows", 4], "expected 1 to 3"),
    (["--image", "PHOTO", "--resize", 8], "drop --num and --resize"), (["--image", "absent.png"], "no such file"),
])  # fmt: skip
@pytest.mark.bad_input("command line")
def test_mistakes_are_one_line(words, message, command, trained_run, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    words = [tmp_path / "photo.png" if word == "PHOTO" else word for word in words]
    done = command("mutor", "sample", trained_run, "--out", tmp_path / "out.png", *words)
    assert done.code in (2, 3) and message in done.err and done.err.count("\n") == 1
