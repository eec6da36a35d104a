"""Starting from a checkpoint: everything trained, or a LoRA adapter."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from mutor_vision.config import RegisterConfig, TrainConfig, TransformerConfig
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.model import base as fine_tuning
from mutor_vision.model import lora
from mutor_vision.model.transformer import Transformer
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.storage.seal import write_sealed
from mutor_vision.training.loop import train

SIZES = TransformerConfig(2, 2, 32, 32, 5, (4, 4))


def write_base(run, config=SIZES, drop_register_row=False, tokenizer_sha256=None):
    """A run with random weights, none of them zero."""
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = model.state_dict()
    if drop_register_row:
        weights["token_embedding.weight"] = weights["token_embedding.weight"][:-1].clone()
    checkpoint.save(run, 0, "transformer", TrainConfig(model=config, ema_decay=0.0), {"model": weights}, {}, keep=2)
    if tokenizer_sha256:
        write_sealed(run / "token_set.json", {"tokenizer_sha256": tokenizer_sha256, "class_names": []})
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "run")


def weights_of(run, name="model"):
    return checkpoint.read_weights(checkpoint.resolve(run), name)


def logits_of(model):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(33, (3, 15), generator=generator)  # 32 is the register
    with torch.no_grad():
        return model.eval()(tokens, torch.tensor([0, 4, 5]), torch.arange(16)[None])


def load_base(run, config=SIZES):
    torch.manual_seed(1)
    model, lines = Transformer(config), []
    own = model.state_dict()["class_embedding.weight"].clone()
    fine_tuning.load_base(model, fine_tuning.open_base(run), lines.append)
    return model, own, " ".join(lines)


# --- the base ---------------------------------------------------------------------------------------------------


def test_every_weight_of_the_base_is_taken(base):
    model, _, said = load_base(base)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights_of(base).items())
    assert "class table" not in said and "register" not in said


def test_a_register_row_is_added_where_there_is_none(tmp_path, base):
    model, _, said = load_base(write_base(tmp_path / "bare", drop_register_row=True))
    table = model.state_dict()["token_embedding.weight"]
    assert torch.equal(table[:-1], weights_of(base)["token_embedding.weight"][:-1])
    assert len(table) == 33 and 0.005 < table[-1].std() < 0.04 and "register's row is added" in said


def test_the_class_table_is_new_where_the_number_of_classes_is_another(tmp_path):
    run = write_base(tmp_path / "seven", dataclasses.replace(SIZES, num_classes=7))
    model, own, said = load_base(run)
    assert torch.equal(model.state_dict()["class_embedding.weight"], own)
    assert "class table is new" in said and "7 classes" in said
    assert torch.equal(model.state_dict()["norm.weight"], weights_of(run)["norm.weight"])


def test_another_grid_is_said(tmp_path):
    _, _, said = load_base(write_base(tmp_path / "run"), dataclasses.replace(SIZES, grid=(6, 6)))
    assert "(4, 4) tokens, the token set has (6, 6)" in said


def test_training_starts_at_the_base_and_takes_its_sizes(tmp_path, base, train_config):
    config = dataclasses.replace(train_config, init=str(base), steps=1, lr=1e-12, save_every=0,
                                 model=TransformerConfig(5, 4, 128))  # fmt: skip
    train(config, tmp_path / "run")
    written = checkpoint.read_config(tmp_path / "run", "transformer", TrainConfig)
    assert (written.model.layers, written.model.heads, written.model.dim) == (2, 2, 32)
    got, expected = weights_of(tmp_path / "run"), weights_of(base)
    assert all(torch.allclose(got[name], expected[name], atol=1e-9) for name in expected)
    record = json.loads((tmp_path / "run" / "base.json").read_text())
    assert record["checkpoint"] == "run/step-0000000" and len(record["weights_sha256"]) == 64


def test_fine_tuning_beats_its_base(tmp_path, base, train_config):
    config = dataclasses.replace(train_config, init=str(base), steps=20, val_every=10)
    train(config, tmp_path / "run")
    scores = [line["val_next_token"] for line in read_log(tmp_path / "run") if "val_next_token" in line]
    assert scores[1] < scores[0]


def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, base, train_config):
    for rank in (0, 4):
        config = dataclasses.replace(train_config, init=str(base), lora_rank=rank)
        train(config, tmp_path / f"whole-{rank}")
        train(dataclasses.replace(config, steps=5), tmp_path / f"halves-{rank}")
        train(config, tmp_path / f"halves-{rank}")
        for name in ("model", "ema"):
            whole, halves = (weights_of(tmp_path / f"{run}-{rank}", name) for run in ("whole", "halves"))
            assert whole.keys() == halves.keys() and all(torch.equal(whole[key], halves[key]) for key in whole)


def test_a_run_does_not_continue_from_another_base(tmp_path, base, train_config):
    config = dataclasses.replace(train_config, init=str(base), steps=1)
    train(config, tmp_path / "run")
    other = write_base(tmp_path / "other", drop_register_row=True)
    for init in (str(other), ""):
        changed = dataclasses.replace(config, init=init, steps=2, model=TransformerConfig(2, 2, 32))
        with pytest.raises(MismatchError, match="other weights than"):
            train(changed, tmp_path / "run")


def test_codes_of_another_tokenizer_are_refused(tmp_path, train_config):
    run = write_base(tmp_path / "base", tokenizer_sha256="ab" * 32)
    with pytest.raises(MismatchError, match="encode the images with the base's tokenizer"):
        train(dataclasses.replace(train_config, init=str(run)), tmp_path / "run")
    run = write_base(tmp_path / "64", dataclasses.replace(SIZES, vocab_size=64))
    with pytest.raises(MismatchError, match="model.vocab_size is 64, but the token set"):
        train(dataclasses.replace(train_config, init=str(run)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- LoRA -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base, train_config):
    """10 steps of an adapter, with registers."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    train(dataclasses.replace(train_config, init=str(base), lora_rank=4), out)
    return out


def test_an_untrained_adapter_changes_nothing(base):
    model, _, _ = load_base(base)
    before = logits_of(model)
    lora.add_adapter(model, 4, 16.0)
    assert torch.equal(logits_of(model), before)


def test_only_the_adapter_is_kept(adapter, base):
    weights = weights_of(adapter)
    assert all("lora_" in name for name in weights if name.startswith("blocks."))
    assert sum("lora_A" in name for name in weights) == 2 * 5  # five linear layers a block
    assert weights["class_embedding.modules_to_save.default.weight"].shape == (6, 32)
    assert weights["token_embedding.token_adapter.trainable_tokens_delta.default"].shape == (1, 32)
    assert len(weights) == 2 * 5 * 2 + 2
    assert json.loads((adapter / "config.json").read_text())["kind"] == "adapter"


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_adapter_and_merged_weights_give_the_same_logits(tmp_path, base, adapter, weights):
    model, _, _ = load_base(base)
    untouched = logits_of(model)
    lora.add_adapter(model, 4, 16.0)
    lora.load_adapter(model, weights_of(adapter, weights), adapter)
    with_adapter = logits_of(model)
    lora.merge(base, adapter, tmp_path / "merged", weights)
    plain = Transformer(SIZES)
    checkpoint.load_strictly(plain, weights_of(tmp_path / "merged"), tmp_path)
    assert (logits_of(plain) - with_adapter).abs().max() < 1e-5
    assert (with_adapter - untouched).abs().max() > 1e-3


def test_merging_changes_linear_layers_the_class_table_and_the_register_row_alone(tmp_path, base, adapter):
    lora.merge(base, adapter, tmp_path / "merged")
    before, after = weights_of(base), weights_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if any(f".{layer}." in name for layer in lora.LINEAR_LAYERS)}
    assert changed == linear | {"class_embedding.weight", "token_embedding.weight"}
    rows = (before["token_embedding.weight"] != after["token_embedding.weight"]).any(dim=1).nonzero().flatten()
    assert rows.tolist() == [32]


def test_a_base_samples_with_its_adapter_as_the_merged_run_does(tmp_path, base, adapter):
    from mutor_vision.runtime import start
    from mutor_vision.sampling.draw import SampleSettings
    from mutor_vision.sampling.load import load
    from mutor_vision.sampling.stream import sample_images

    lora.merge(base, adapter, tmp_path / "merged")
    runtime = start("float32", "cpu")
    both = load(base, runtime, adapter=adapter), load(tmp_path / "merged", runtime)
    made = [sample_images(m, torch.tensor([0, 3]), np.arange(2), SampleSettings(), 0) for m in both]
    assert torch.equal(*made) and both[0].class_names == both[1].class_names == ["ant", "bee", "cat", "dog", "eel"]
    assert both[0].identity["base"]["checkpoint"] == "run/step-0000000"


def test_an_adapter_belongs_to_its_base(tmp_path, base, adapter, trained_run):
    with pytest.raises(MismatchError, match="give that base"):
        lora.merge(trained_run, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(MismatchError, match="holds a adapter, expected a transformer"):
        fine_tuning.open_base(adapter)
    with pytest.raises(MismatchError, match="holds a transformer, expected a adapter"):
        lora.load_merged(base, trained_run)


def test_an_adapter_needs_a_base(tmp_path, train_config):
    with pytest.raises(UserError, match="--init RUN"):
        train(dataclasses.replace(train_config, lora_rank=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_with_an_adapter_gets_the_same_validation_loss_in_both_modes(base, adapter):
    model, _, _ = load_base(base, dataclasses.replace(SIZES, token_dropout=0, residual_dropout=0, ffn_dropout=0))
    lora.add_adapter(model, 4, 16.0)
    lora.load_adapter(model, weights_of(adapter), adapter)
    tokens, labels, slots = torch.arange(15)[None], torch.tensor([2]), torch.arange(16)[None]
    assert torch.equal(model.train()(tokens, labels, slots), model.eval()(tokens, labels, slots))


def test_registers_need_no_base_that_knows_them(tmp_path, base, train_config):
    """A base of next-token prediction, trained on with registers and without: the regular path is the same."""
    config = dataclasses.replace(train_config, init=str(base), lora_rank=4, steps=2, registers=RegisterConfig())
    train(config, tmp_path / "run")
    assert "register" not in read_log(tmp_path / "run")[-1]


def test_the_head_that_stays_as_it_is_gets_no_gradient(base):
    """Nor the product that would make one, which costs as much as the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from mutor_vision.objectives.cross_entropy import linear_cross_entropy

    class Products(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            self.number += "mm" in str(function)
            return function(*arguments, **(named or {}))

    model, _, _ = load_base(base)
    hidden, targets = torch.randn(50, 32, requires_grad=True), torch.arange(50) % 32

    def products() -> int:
        with Products() as counter:
            linear_cross_entropy(hidden, model.head.weight, targets).backward()
        return counter.number

    assert products() == 3 and model.head.weight.grad is not None
    model.head.weight.grad = None
    lora.add_adapter(model, 4, 16.0)
    assert products() == 2 and model.head.weight.grad is None
