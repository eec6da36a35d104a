"""Mirai-I: features beside the codes, and the loss that reads them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mutor_vision.config import EncoderStatesConfig, RegisterConfig, TrainConfig
from mutor_vision.data.images import center_crop, mirror, read_image, to_tensor
from mutor_vision.data.token_set import TokenSet
from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.objectives.encoder_states import EncoderStates
from mutor_vision.objectives.objective import Objective
from mutor_vision.settings import override
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.tokenizer.features import CellFeatures
from mutor_vision.training.loop import train

VIT = "timm:vit_tiny_patch16_224@64"  # a 4x4 grid, as the codes have
CNN = "timm:resnet10t@64"  # 2x2


@pytest.fixture(scope="module")
def encoded(forked, pictures, tiny_tokenizer_path, tmp_path_factory):
    """The pictures in shards of 5 with features of a random network, by two processes."""
    out = tmp_path_factory.mktemp("codes") / "set"
    result = forked("tokenizers/encode.py", *flags(tiny_tokenizer_path, pictures, out), "--features", VIT, ranks=2)
    assert result.code == 0 and "features of timm:vit_tiny" in result.out, result.out
    return out


def flags(tokenizer, pictures, out):
    return ["--tokenizer", tokenizer, "--data", pictures, "--out", out, "--shard-size", 5, "--batch-size", 4,
            "--workers", 0, "--features-weights", "random"]  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_each_view_has_its_own_features_and_they_are_the_networks(encoded, pictures):
    tokens = TokenSet.open(encoded)
    name, width = tokens.features["name"], tokens.features["width"]
    assert (name, width, tokens.features["dtype"]) == ("timm:vit_tiny_patch16_224", 192, "float16")
    network = CellFeatures(VIT, "random", (4, 4))
    found = tokens.take_features(torch.tensor([8, 8, 0]), torch.tensor([0, 1, 1]))
    assert found.shape == (3, 16, 192) and found.dtype == torch.float16
    paths = sorted(pictures.glob("*/*.png"))
    crops = [center_crop(read_image(paths[i]), 16) for i in (8, 0)]
    images = torch.stack([to_tensor(each) for each in (crops[0], mirror(crops[0]), mirror(crops[1]))])
    torch.testing.assert_close(found.float(), network(images), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(found[0].float(), found[1].float(), atol=0.05)
    resized = F.interpolate(images.float() / 255, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    patches = network.network.forward_features((resized - network.mean) / network.std)[:, 1:]  # without the class's
    torch.testing.assert_close(network(images), patches)


def test_a_map_of_another_size_is_resampled_to_the_grid_of_the_codes():
    network = CellFeatures(CNN, "random", (4, 4))
    image = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    map_ = network.network.forward_features((image / 255 - network.mean) / network.std)
    assert map_.shape == (2, 512, 2, 2) and "resampled from 2x2" in network.identity["cells"]
    found = network(image).unflatten(1, (4, 4))
    for row, column in ((0, 0), (0, 3), (3, 0), (3, 3)):  # a corner is nearest to its own cell alone
        torch.testing.assert_close(found[:, row, column], map_[:, :, row // 2, column // 2])


def test_networks_without_a_map_are_refused():
    with pytest.raises(UserError, match="expected timm:NAME"):
        CellFeatures("inception", "", (4, 4))


def test_one_process_and_two_give_the_same_bytes_and_an_interrupted_one_goes_on(
    command, pictures, tiny_tokenizer_path, encoded, tmp_path, monkeypatch
):
    words = flags(tiny_tokenizer_path, pictures, tmp_path / "set")
    assert command("tokenizers/encode.py", *words).code == 0
    plain = contents(tmp_path / "set")
    forward, calls = CellFeatures.forward, []

    def interrupted(self, images):
        calls.append(len(images))
        if len(calls) == 3:  # in the second shard
            raise RuntimeError("the power is gone")
        return forward(self, images)

    monkeypatch.setattr(CellFeatures, "forward", interrupted)
    with pytest.raises(RuntimeError, match="power is gone"):
        command("tokenizers/encode.py", *words, "--features", VIT)
    assert TokenSet.open(tmp_path / "set").features is None, "a whole set without features"
    other = command("tokenizers/encode.py", *words, "--features", CNN)
    assert other.code == 5 and "has other features (name: timm:vit_tiny" in other.err
    monkeypatch.setattr(CellFeatures, "forward", forward)
    assert command("tokenizers/encode.py", *words, "--features", VIT).code == 0
    assert contents(tmp_path / "set") == contents(encoded)
    after = contents(tmp_path / "set")
    assert all(after[name] == plain[name] for name in plain if name.endswith(".npy")), "codes stay as they are"
    assert command("tokenizers/encode.py", *words, "--features", VIT).code == 0  # nothing left to do
    assert contents(tmp_path / "set") == after
    assert command("tokenizers/encode.py", *words).code == 0 and TokenSet.open(tmp_path / "set").features
    other = command("tokenizers/encode.py", *words, "--features", CNN)
    assert other.code == 5 and "give the same, or a new folder" in other.err


def test_weights_come_from_a_file_and_fit_or_are_refused(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = timm.create_model("resnet10t", pretrained=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    network = CellFeatures(CNN, str(tmp_path / "weights.safetensors"), (4, 4))
    assert torch.equal(network.network.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
    assert len(network.identity["weights_sha256"]) == 64
    save_file({"conv1.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="lacks"):
        CellFeatures(CNN, str(tmp_path / "other.safetensors"), (4, 4))


def test_damaged_features_are_named(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "set")
    path = tmp_path / "set" / "features-00001.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="features-00001.npy is damaged"):
        TokenSet.open(tmp_path / "set")


def test_other_images_are_refused(command, pictures, tiny_tokenizer_path, encoded, tmp_path):
    from mutor_vision.runtime import start
    from mutor_vision.tokenizer.features import encode_features

    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures/class0/00.png").unlink()
    with pytest.raises(MismatchError, match="was made of other images"):
        encode_features(tmp_path / "pictures", encoded, VIT, "random", start())


@pytest.mark.parametrize("offsets, edge", [("same", "wrap"), ("same right below 1,-1", "wrap"), ("right", "ignore")])
def test_the_loss_is_that_of_a_walk_over_the_grid(random_model, offsets, edge):
    """The state of each cell's token with the features of the cell at the offset: minus the mean cosine, by offset."""
    own = EncoderStatesConfig(2.0, offsets=offsets, edge=edge, features_width=24, depth=0.5)
    auxiliary = EncoderStates(own, TrainConfig(model=random_model.config, encoder_states=own))
    for parameter in auxiliary.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    generator = torch.Generator().manual_seed(0)
    codes, labels = torch.randint(32, (3, 4, 4), generator=generator), torch.tensor([0, 1, 4])
    features = torch.randn(3, 16, 24, generator=generator).half()
    objective = Objective(random_model, [auxiliary])
    sequence = objective.sequence(codes, seed=0, sample_index=np.arange(3), labels=labels, features=features)
    states = random_model.states(sequence.tokens, labels, sequence.positions, taps=["blocks.0"])["blocks.0"]
    expected = 0.0
    pairs = {"same": (0, 0), "right": (0, 1), "below": (1, 0), "1,-1": (1, -1)}
    for projector, (rows, columns) in zip(auxiliary.projectors, map(pairs.get, offsets.split()), strict=True):
        cosines = []
        for row in range(4):
            for column in range(4):
                there = row + rows, column + columns
                there = divmod(4 * there[0] + there[1], 4) if edge == "wrap" else there
                if (row, column) != (3, 3) and there[0] < 4 and there[1] < 4:
                    x, y = projector(states[:, 4 * row + column + 1]), features[:, 4 * there[0] + there[1]].float()
                    cosines.append((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)))
        expected -= torch.stack(cosines).mean(0).sum().item()
    assert objective(labels, sequence)["encoder_states"].item() == pytest.approx(expected, rel=1e-5)
    assert objective.counts(sequence)["encoder_states"] == 3


@pytest.fixture
def config(encoded, train_config):
    return dataclasses.replace(train_config, registers=RegisterConfig(), codes=str(encoded), batch_size=4,
                               encoder_states=EncoderStatesConfig(0.5))  # fmt: skip


def test_a_run_learns_from_features_resumes_and_samples_without_them(config, trained_twice, tmp_path):
    run = trained_twice(config, "model", "ema", "encoder_states")
    lines = [line for line in read_log(run) if "encoder_states" in line]
    assert lines[-1]["encoder_states"] < lines[0]["encoder_states"] < 0.1
    written = json.loads((run / "config.json").read_text())["config"]["encoder_states"]
    assert (written["network"], written["features_width"]) == ("timm:vit_tiny_patch16_224", 192)
    plain = dataclasses.replace(config, encoder_states=EncoderStatesConfig())
    train(plain, tmp_path / "plain")
    assert checkpoint.read_weights(checkpoint.newest(run), "model").keys() == checkpoint.read_weights(
        checkpoint.newest(tmp_path / "plain"), "model").keys()  # fmt: skip


def test_a_token_set_without_features_or_with_others_is_refused(config, token_set_path, tmp_path):
    with pytest.raises(UserError, match="the token set has none; make them: mutor encode --features"):
        train(dataclasses.replace(config, codes=str(token_set_path)), tmp_path / "run")
    for setting, message in (("network=timm:vit_base", "network is timm:vit_base, the token set has timm:vit_tiny"),
                             ("features_width=768", "features_width is 768, the token set has 192")):  # fmt: skip
        with pytest.raises(MismatchError, match=message):
            train(override(config, [f"encoder_states.{setting}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
