import shutil

import pytest
import torch

from mutor_vision import checkpoint
from mutor_vision.config import TrainConfig
from mutor_vision.errors import IntegrityError, MismatchError, UserError

CONFIG = TrainConfig()


def save(run, step, keep=2):
    weights = {"model": {"w": torch.full((3,), float(step))}}
    return checkpoint.save(run, step, "transformer", CONFIG, weights, {"step": step, "list": [1.5, "a"]}, keep)


def test_what_is_saved_is_read_back(tmp_path):
    folder = save(tmp_path, 420)
    assert folder.name == "step-0000420" and checkpoint.step_of(folder) == 420
    assert checkpoint.resolve(tmp_path) == folder == checkpoint.resolve(folder)
    assert checkpoint.read_config(folder, "transformer", TrainConfig) == CONFIG
    assert checkpoint.read_weights(folder, "best")["w"].tolist() == [420.0] * 3
    assert checkpoint.read_training_state(folder) == {"step": 420, "list": [1.5, "a"]}


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000009", "step-0000010"]


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_stepped_over(tmp_path, file, damage, capsys):
    older, folder = save(tmp_path, 1), save(tmp_path, 2)
    path = folder / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-7])
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match=file):
        checkpoint.verify(folder)
    assert checkpoint.newest(tmp_path) == older
    assert file in capsys.readouterr().out


def test_an_unfinished_checkpoint_is_never_chosen(tmp_path):
    folder = save(tmp_path, 1)
    shutil.copytree(folder, folder.with_name("step-0000005.partial"))
    shutil.copytree(folder, folder.with_name("step-7"))
    shutil.copytree(folder, folder.with_name("xstep-0000007"))
    (tmp_path / "checkpoints" / "step-0000008").mkdir()
    assert checkpoint.newest(tmp_path) == folder
    assert save(tmp_path, 5).is_dir()
    assert not folder.with_name("step-0000005.partial").exists()


def test_weights_of_another_shape_or_name_are_refused_by_name():
    module = torch.nn.Linear(2, 3)
    good = module.state_dict()
    for weights, message in (
        ({"weight": good["weight"]}, "lacks 'bias'"),
        (good | {"extra": torch.zeros(1)}, "unexpected 'extra'"),
        (good | {"bias": torch.zeros(4)}, r"'bias' has shape \(4,\), expected \(3,\)"),
    ):
        with pytest.raises(MismatchError, match=message):
            checkpoint.load_strictly(module, weights, "file")


def test_training_state_is_not_unpickled(tmp_path):
    """A state that holds code is refused by torch's weights-only reader."""
    folder = save(tmp_path, 1)
    torch.save({"step": print}, folder / "training.pt")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        checkpoint.read_training_state(folder)


def test_another_kind_or_format_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    with pytest.raises(MismatchError, match="holds a transformer, expected a tokenizer"):
        checkpoint.read_config(folder, "tokenizer", TrainConfig)
    checkpoint.write_json(folder / "config.json", {"format": 2, "kind": "transformer", "config": {}})
    with pytest.raises(MismatchError, match="upgrade"):
        checkpoint.read_config(folder, "transformer", TrainConfig)
    (folder / "config.json").write_text('{"format": ')
    with pytest.raises(IntegrityError, match="not complete JSON"):
        checkpoint.read_config(folder, "transformer", TrainConfig)


def test_asking_for_weights_that_are_not_there_names_those_that_are(tmp_path):
    with pytest.raises(UserError, match="no 'ema' weights; it has model"):
        checkpoint.read_weights(save(tmp_path, 1), "ema")
