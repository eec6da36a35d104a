import json
import shutil

import pytest
import torch

from mutor_vision.config import TrainConfig
from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.settings import FORMAT
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import sha256, write_json
from mutor_vision.storage.seal import write_sealed

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


def damage(folder, file="model.safetensors"):
    path = folder / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def steps_of(run):
    return sorted(checkpoint.step_of(path) for path in (run / "checkpoints").iterdir())


def test_pruning_keeps_the_newest_that_verify(tmp_path):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    save(tmp_path, 3)
    assert steps_of(tmp_path) == [1, 2, 3]  # 2 does not stand for 1
    save(tmp_path, 4)
    assert steps_of(tmp_path) == [3, 4]


def test_damaged_checkpoints_of_later_steps_do_not_push_out_new_ones(tmp_path):
    for step in (10, 11):
        damage(save(tmp_path, step), "training.pt")
    for step in (1, 2, 3):
        assert save(tmp_path, step).is_dir()
        assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / f"step-{step:07d}"
    assert steps_of(tmp_path) == [2, 3, 10, 11]


def test_a_run_whose_checkpoints_are_all_damaged_is_no_new_run(tmp_path):
    damage(save(tmp_path, 1), "config.json")
    damage(save(tmp_path, 2))
    for look in (checkpoint.newest, checkpoint.resolve, lambda run: checkpoint.open_run(run, "transformer")):
        with pytest.raises(IntegrityError, match="no checkpoint is whole, 2 damaged"):
            look(tmp_path)


def test_a_process_killed_while_it_deletes_leaves_no_part_of_a_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def killed(path):
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3)
    monkeypatch.undo()
    for path in (tmp_path / "checkpoints").glob("step-???????"):
        checkpoint.verify(path)
    save(tmp_path, 4)
    assert steps_of(tmp_path) == [3, 4]


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"files": []}', '{"files": {"model.safetensors": 3}}', "{", "[" * 9999]
)
def test_a_manifest_of_another_form_is_damage(tmp_path, content):
    folder = save(tmp_path, 1)
    (folder / "MANIFEST.json").write_text(content)
    with pytest.raises(IntegrityError, match="MANIFEST.json"):
        checkpoint.verify(folder)


def test_a_checkpoint_has_no_other_files_and_no_other_step(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "ema.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(IntegrityError, match="ema.safetensors is not listed in MANIFEST.json"):
        checkpoint.verify(folder)
    (folder / "ema.safetensors").unlink()
    checkpoint.verify(folder)
    with pytest.raises(IntegrityError, match="is the checkpoint of step 1, renamed"):
        checkpoint.verify(folder.rename(folder.with_name("step-0000004")))


def test_a_manifest_names_no_file_elsewhere(tmp_path):
    folder = save(tmp_path, 1)
    outside = tmp_path / "outside"
    outside.write_text("x")
    entry = {"bytes": 1, "sha256": sha256(outside)}
    for files in ({"../../outside": entry}, {str(outside): entry}):
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        del manifest["seal"]
        write_sealed(folder / "MANIFEST.json", {**manifest, "files": manifest["files"] | files})
        with pytest.raises(IntegrityError, match="outside is missing"):
            checkpoint.verify(folder)


class Ranks:
    """A runtime of two ranks, of which the other has `damaged` tensors."""

    def __init__(self, damaged=0):
        self.damaged, self.reductions = damaged, 0

    def all_reduce(self, tensor):
        self.reductions += 1
        return tensor + self.damaged


def test_what_is_not_finite_is_named_and_refused_on_every_rank():
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    good = {"model": layer.state_dict(), "ema": {"w": torch.ones(2), "count": torch.ones(1, dtype=torch.int64)}}
    ranks = Ranks()
    checkpoint.check_finite(good, [optimizer], 7, ranks)
    assert ranks.reductions == 1
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="'ema: w' .*is not finite at step 7"):
            checkpoint.check_finite(good | {"ema": {"w": torch.tensor([1.0, bad])}}, [], 7, Ranks())
    with pytest.raises(UserError, match="a tensor of another rank is not finite"):
        checkpoint.check_finite(good, [optimizer], 7, Ranks(damaged=1))
    optimizer.state[layer.weight]["exp_avg_sq"][0, 0] = float("inf")
    with pytest.raises(UserError, match="'exp_avg_sq of the optimizer, parameter 0'"):
        checkpoint.check_finite(good, [optimizer], 7, Ranks())


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
    write_json(folder / "config.json", {"format": FORMAT + 1, "kind": "transformer", "config": {}})
    with pytest.raises(MismatchError, match="upgrade"):
        checkpoint.read_config(folder, "transformer", TrainConfig)
    (folder / "config.json").write_text('{"format": ')
    with pytest.raises(IntegrityError, match="not complete JSON"):
        checkpoint.read_config(folder, "transformer", TrainConfig)


def test_asking_for_weights_that_are_not_there_names_those_that_are(tmp_path):
    with pytest.raises(UserError, match="no 'ema' weights; it has model"):
        checkpoint.read_weights(save(tmp_path, 1), "ema")
