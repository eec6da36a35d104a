"""Every kind of damage to every file of a run, a token set, features and statistics is refused in a line, or harmless:
docs/reliability.md. Here with few places in each file; `make test-slow` tries many."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from faults.damage import copied, damage_all
from faults.score import everything, record
from safetensors.torch import save_file

from mutor_vision.data.token_set import TokenSet
from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.features.extractors import identity_text, load_trained
from mutor_vision.features.moments import Statistics, read_protocol, read_statistics, statistics_arrays
from mutor_vision.features.train import FeatureTraining, train
from mutor_vision.runtime import start
from mutor_vision.sampling.load import load
from mutor_vision.storage import checkpoint, foreign
from mutor_vision.storage.files import state_sha256
from mutor_vision.storage.npz import Npz
from mutor_vision.storage.npz_writer import write_arrays
from mutor_vision.storage.run_log import read_log
from mutor_vision.tokenizer.model import load_tokenizer
from mutor_vision.training import loop

FLIPS = 60 if everything() else 8


def check(name, tally):
    record("Damage to files is found", name, tally.held, tally.tried)
    assert not tally.wrong, f"{len(tally.wrong)} of {tally.tried}:\n" + "\n".join(tally.wrong[:20])
    assert tally.refused > tally.tried / 2


def test_a_run(trained_run, train_config, tmp_path):
    other = tmp_path / "other"
    loop.train(dataclasses.replace(train_config, seed=7), other)
    run, runtime = copied(trained_run, tmp_path / "run"), start("float32", "cpu")
    newest = max((run / "checkpoints").iterdir())
    for path in (run / "checkpoints").iterdir():
        if path != newest:  # else a damaged one is stepped over, which test_checkpoint tests
            shutil.rmtree(path)

    def read(folder):
        checkpoint.open_run(folder, "transformer")
        loaded = load(folder, runtime)
        found = checkpoint.resolve(folder)
        weights = [state_sha256(checkpoint.read_weights(found, name)) for name in checkpoint.weight_names(found)]
        return (loaded.identity | {"run": ""}, loaded.class_names, state_sha256(loaded.tokenizer.state_dict()),
                loaded.tokenizer.config, loaded.config, weights,
                state_sha256(checkpoint.read_training_state(found)["optimizer"]["state"][0]))  # fmt: skip

    # config.json and status.json beside the checkpoints are for people, and log.jsonl is repaired: see below.
    check("a run", damage_all(run, other, read, flips=FLIPS, skip={"log.jsonl", "status.json"}))


def test_a_token_set(token_set_path, tiny_tokenizer_path, write_token_set, tmp_path):
    codes = copied(token_set_path, tmp_path / "codes")
    other = write_token_set(tmp_path / "other", tiny_tokenizer_path, 60, seed=1)

    def read(folder):
        tokens = TokenSet.open(folder)
        tokenizer = load_tokenizer(tokens.tokenizer_path)
        return (tokens.manifest, tokens.codes().tolist(), tokens.labels.tolist(), tokenizer.config,
                state_sha256(tokenizer.state_dict()))  # fmt: skip

    check("a token set", damage_all(codes, other, read, flips=FLIPS))


def make_features(folder, seed):
    torch.manual_seed(seed)
    images, labels = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8), torch.arange(24) % 2
    config = FeatureTraining(architecture="resnet10t", epochs=1, batch_size=8, seed=seed, channels=(8, 8, 8, 8),
                             stem_width=8)  # fmt: skip
    train(images, labels, images, labels, ["ant", "bee"], config, folder, device=torch.device("cpu"), data="images")
    return folder


def test_features(tmp_path):
    folder, other = (make_features(tmp_path / name, seed) for seed, name in enumerate(("one", "other")))

    def read(folder):
        extractor = load_trained(folder)
        return identity_text(extractor), extractor.class_names, state_sha256(extractor.state_dict()), extractor.size

    check("features", damage_all(folder, other, read, flips=FLIPS))


def make_statistics(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    protocol = {"n": 40, "extractor": {"name": "toy"}, "image_size": [16, 16], "class_names": ["ant", "bee"]}
    found = {"pool": Statistics(rows.mean(0), rows.T.cov(), 40)}
    folder.mkdir()
    write_arrays(folder / "reference.npz", statistics_arrays(found, protocol))
    return folder


def test_statistics(tmp_path):
    folder, other = (make_statistics(tmp_path / name, seed) for seed, name in enumerate(("one", "other")))

    def read(folder):
        npz = Npz(folder / "reference.npz")
        found = read_statistics(npz, {"pool": 6})
        if "pool" not in found:
            raise UserError("no statistics of this extractor")
        return read_protocol(npz), found["pool"].mu.tolist(), found["pool"].sigma.tolist()

    tally = damage_all(folder, folder, read, flips=10 * FLIPS)
    check("statistics", tally)
    assert read(other) != read(folder)  # another's statistics are a good file: results have the hash of theirs


def test_a_log_is_repaired(trained_run, tmp_path, capsys):
    """Complete lines are kept; what is left out is said."""
    run = copied(trained_run, tmp_path / "run")
    lines = (run / "log.jsonl").read_text().splitlines()
    generator, said = np.random.default_rng(0), 0
    for number in range(10 * FLIPS):
        content = bytearray("\n".join(lines).encode())
        place = int(generator.integers(len(content)))
        content[place] = int(generator.integers(256))
        (run / "log.jsonl").write_bytes(content)
        found = read_log(run)
        told = "left out" in capsys.readouterr().out
        said += told
        assert len(found) >= len(lines) - 2, number
        whole = sum(json.dumps(json.loads(line)) in map(json.dumps, found) for line in lines)
        assert whole >= len(lines) - 2
    assert said


def test_a_member_that_a_wrong_length_hides_is_missed(tmp_path):
    """zipfile reads the directory of an archive until a length leads out of it, and takes that for the end."""
    path = make_statistics(tmp_path / "one", 0) / "reference.npz"
    content = path.read_bytes()
    place = content.rfind(b"PK\x01\x02", 0, content.rfind(b"PK\x01\x02")) + 33  # of a comment that the entry has not
    path.write_bytes(content[:place] + b"\x80" + content[place + 1 :])
    with pytest.raises(IntegrityError, match="the zip's directory is damaged"):
        Npz(path)


@pytest.mark.parametrize("name", [".", ".w", "a..w", ""])
def test_a_tensor_without_a_name_is_refused(tmp_path, name):
    save_file({name: torch.ones(2), "w": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(MismatchError, match="expected the name of a network"):
        foreign.read(tmp_path / "x.safetensors")


def test_a_pt_file_whose_entry_says_that_it_is_encrypted_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.rfind(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(IntegrityError, match="is truncated or damaged"):
        foreign.read(tmp_path / "x.pt")
