"""What holds for every loss that looks ahead, alone and together."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mutor_vision.config import (
    AlignedStatesConfig,
    EncoderStatesConfig,
    ParallelHeadsConfig,
    PrivateBlocksConfig,
    RegisterConfig,
    TrainConfig,
    TransformerConfig,
)
from mutor_vision.data.token_set import TokenSet, features_name, save_array, write_features
from mutor_vision.model.transformer import Transformer, num_parameters
from mutor_vision.objectives.auxiliary import auxiliaries_of
from mutor_vision.objectives.objective import Objective, total_loss
from mutor_vision.runtime import finish
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.training.cost import auxiliary_cost, flops, memory
from mutor_vision.training.loop import train

LOSSES = {
    "registers": RegisterConfig("2d", 15, offsets="below", weight=1.0, class_slot=False),
    "private_blocks": PrivateBlocksConfig(1.0),
    "private_blocks, linear": PrivateBlocksConfig(1.0, blocks=0),
    "aligned_states": AlignedStatesConfig(1.0, offsets="below", depth=0.5),
    "encoder_states": EncoderStatesConfig(1.0, offsets="below", depth=0.5, features_width=24),
}
WITH_WEIGHTS = {name: own for name, own in LOSSES.items() if name != "registers"}
TOGETHER = {
    "registers": RegisterConfig("2d", 16, weight=0.2, offset_per="register"),
    "parallel_heads": ParallelHeadsConfig(2, weight=0.2),
    "private_blocks": PrivateBlocksConfig(0.1, offsets="below 1,1", blocks=1),
    "aligned_states": AlignedStatesConfig(0.5, "0:0,3:1", decay=0.9),
    "encoder_states": EncoderStatesConfig(0.5, "~5:0"),
}
NAMES = ["next_token", "register", "heads", "private_blocks", "aligned_states", "encoder_states"]


def config_of(name, own, model):
    return dataclasses.replace(TrainConfig(model=model), **{name.split(",")[0]: own})


def batch(size, seed):
    """Two-dimensional structure: the first row is noise, and below a code is the code that follows it (of 16). So what
    is below can be known and what is right of it cannot. Features are a vector for each code."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(16, (size, 1, 4), generator=generator)
    codes = (first + torch.arange(4)[None, :, None]) % 16
    vectors = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (size,), generator=generator)
    return codes, labels, vectors[codes.flatten(1)].half()


def trained(name, own, wrong: bool) -> float:
    """The auxiliary loss after a short training for it alone; wrong: with the targets of other images."""
    torch.manual_seed(0)
    model = TransformerConfig(2, 2, 32, 16, 5, (4, 4), token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
    (auxiliary,) = auxiliaries_of(config_of(name, own, model))
    objective = Objective(Transformer(model), [auxiliary])
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=8e-3)
    if wrong and isinstance(own, AlignedStatesConfig):
        states = auxiliary.teacher_states
        auxiliary.teacher_states = lambda sequence: states(sequence).roll(1, 0)
    losses = []
    for step in range(120):
        codes, labels, features = batch(24, step)
        sequence = objective.sequence(codes, seed=0, sample_index=np.arange(24) + 24 * step, labels=labels,
                                      features=features.roll(1, 0) if wrong else features)  # fmt: skip
        if wrong:
            sequence = dataclasses.replace(sequence, targets=sequence.targets.roll(1, 0))
        loss = objective(labels, sequence)[auxiliary.name] / objective.counts(sequence)[auxiliary.name]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses[-10:]))


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_right_targets_of_two_dimensions_lower_the_loss(name):
    """Of the cell below; not those of another image, and not those of the cell to the right of it."""
    own = LOSSES[name]
    right, shuffled = trained(name, own, wrong=False), trained(name, own, wrong=True)
    beside = trained(name, dataclasses.replace(own, offsets="1,1"), wrong=False)
    if isinstance(own, AlignedStatesConfig | EncoderStatesConfig):
        assert right < -0.85 and min(shuffled, beside) > right + 0.15
    else:
        # Columns that were seen in the row above are known: 3 of the 11 cells to the right below are of others.
        assert right < 0.2 and shuffled > 0.95 * math.log(16) and beside > 0.9 * 3 / 11 * math.log(16)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weight_0_gives_the_next_token_gradients_and_no_parameter_more(random_model, name):
    model = random_model.double()
    own = dataclasses.replace(LOSSES[name], weight=0.0)
    codes, labels, features = batch(4, 0)
    gradients = []
    for losses in ([], [own]):
        auxiliaries = []
        for each in losses:
            (auxiliary,) = auxiliaries_of(config_of(name, LOSSES[name], model.config))
            auxiliary.own = each
            auxiliaries.append(auxiliary.double())
        objective = Objective(model, auxiliaries)
        sequence = objective.sequence(codes, seed=0, sample_index=np.arange(4), labels=labels, features=features)
        counts = {key: torch.tensor(count) for key, count in objective.counts(sequence).items()}
        model.zero_grad()
        total_loss(objective(labels, sequence), counts, objective.weights(0)).backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys() == model.state_dict().keys()
    for key in gradients[0]:
        assert torch.allclose(gradients[1][key], gradients[0][key], rtol=1e-12, atol=1e-14), key


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_the_plan_counts_what_is_computed_and_what_is_kept(name):
    """Products of a real forward pass, and parameters, of the loss and of its teacher."""
    model = TransformerConfig(2, 2, 64, 128, 5, (4, 4))
    config = config_of(name, LOSSES[name], model)
    (auxiliary,) = auxiliaries_of(config)
    objective = Objective(Transformer(model), [auxiliary])
    codes, labels, features = batch(5, 0)
    sequence = objective.sequence(codes, seed=0, sample_index=np.arange(5), labels=labels, features=features)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        objective(labels, sequence)
    matrices = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    counted, more = flops(config), auxiliary_cost(config)
    teacher = 2 * 16 * more.teacher_blocks * model.block_parameters
    assert 5 * (counted.blocks + counted.head + counted.own_layers + teacher) == pytest.approx(matrices, rel=1e-6)
    alone = flops(TrainConfig(model=model))
    assert counted.teachers - teacher == more.teacher_blocks * alone.attention / model.layers
    frozen = sum(parameter.numel() for parameter in auxiliary.parameters() if not parameter.requires_grad)
    own = more.parameters + more.blocks * (model.block_parameters + 2 * model.dim)
    assert (own, more.teacher_parameters) == (num_parameters(auxiliary) - frozen, frozen)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["private_blocks", "aligned_states", "encoder_states"])
def test_the_plan_of_memory_is_a_near_bound_of_what_autograd_keeps(name, precision):
    """For the backward pass, without weights and their casts, which the plan counts by themselves."""
    model = TransformerConfig(2, 2, 64, 128, 5, (4, 4))
    codes, labels, features = batch(3, 0)
    kept, planned = [], []
    for config in (TrainConfig(model=model), config_of(name, LOSSES[name], model)):
        objective = Objective(Transformer(model), auxiliaries_of(config))
        weights = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
        shapes = {shape for p in objective.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)}
        found = {}

        def keep(tensor, weights=weights, shapes=shapes, found=found):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and tensor.shape not in shapes:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
            return tensor

        sequence = objective.sequence(codes, seed=0, sample_index=np.arange(3), labels=labels, features=features)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            objective(labels, sequence)
        kept.append(sum(size for size, _ in found.values()))
        config = dataclasses.replace(config, precision=precision, compile="off", batch_size=3)
        planned.append(memory(config, 1, 3, on_cpu=True).activations)
    assert 1 <= (planned[1] - planned[0]) / (kept[1] - kept[0]) < 1.25


def test_mirai_costs_what_was_derived_from_its_code():
    """1.42 times next-token prediction for size B: a teacher of 19 % and projectors of 23 %, of 22 million parameters;
    here they run only where there is something to align with, 751 states of 768."""
    model = TransformerConfig(vocab_size=16384, num_classes=1000, grid=(16, 16))
    config = config_of("aligned_states", AlignedStatesConfig(2.0), model)
    counted, alone = flops(config), flops(TrainConfig(model=model)).training
    assert counted.training / alone == pytest.approx(1.42, abs=0.02)
    assert counted.teachers / alone == pytest.approx(0.19, abs=0.01)
    assert 3 * counted.own_layers / alone == pytest.approx(0.23, abs=0.015)
    assert auxiliary_cost(config).parameters == pytest.approx(22e6, rel=0.02)


@pytest.fixture(scope="module")
def everything(token_set_path, train_config, tmp_path_factory):
    """Every loss at once, without dropout, on a token set with features."""
    path = shutil.copytree(token_set_path, tmp_path_factory.mktemp("codes") / "set")
    generator, tokens = np.random.default_rng(0), TokenSet.open(path)
    for number, shard in enumerate(tokens.manifest["shards"]):
        array = generator.normal(size=(shard["images"], 2, 16, 24)).astype(np.float16)
        save_array(path / features_name(number), array)
    write_features(path, {"name": "timm:none", "width": 24})
    model = TransformerConfig(2, 2, 32, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
    return dataclasses.replace(train_config, model=model, codes=str(path), **TOGETHER)


def curves(run):
    log = read_log(run)
    return {name: [line[name] for line in log if name in line] for name in ["loss", *NAMES]}


def test_all_losses_train_together_resume_to_the_last_bit_and_leave_a_plain_transformer(
    everything, trained_twice, tmp_path
):
    """With dropout, the teacher and every head among what is compared."""
    config = dataclasses.replace(everything, model=TransformerConfig(2, 2, 32))
    run = trained_twice(config, "model", "ema", "heads", "private_blocks", "aligned_states", "encoder_states")
    found = curves(run)
    for step in range(10):
        weights = {"next_token": 0.6, "register": 0.2, "heads": 0.2, "private_blocks": 0.1,
                   "aligned_states": 0.5 * (step >= 3), "encoder_states": 0.5 * max(0, 1 - step / 5)}  # fmt: skip
        expected = sum(weights[name] * found[name][step] for name in NAMES)
        assert found["loss"][step] == pytest.approx(expected, rel=1e-5)
    checkpoint.export(run, tmp_path / "exported")
    model = checkpoint.read_config(tmp_path / "exported", "transformer", TrainConfig).model
    shapes = {name: parameter.shape for name, parameter in Transformer(model).named_parameters()}
    exported = checkpoint.read_weights(tmp_path / "exported", "model")
    assert {name: tensor.shape for name, tensor in exported.items()} == shapes


def test_two_processes_and_small_parts_train_to_the_curves_of_one(everything, tmp_path, forked):
    train(everything, tmp_path / "one")

    def work():
        train(dataclasses.replace(everything, micro_batch=2), tmp_path / "two")
        finish()

    result = forked(work, ranks=2)
    assert result.code == 0, result.out[-3000:]
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    for name in ["loss", *NAMES]:
        assert len(one[name]) == 10 and two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    teachers = [checkpoint.read_weights(checkpoint.newest(tmp_path / run), "aligned_states") for run in ("one", "two")]
    for name, tensor in teachers[0].items():
        torch.testing.assert_close(teachers[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_fsdp_trains_to_the_curves_of_one_process_and_resumes_to_the_last_bit(everything, tmp_path, forked):
    """Teachers are sharded as the model is, and follow it shard by shard."""
    sharded = dataclasses.replace(everything, parallel="fsdp")
    train(everything, tmp_path / "one")

    def work():
        for steps, out in ((10, "two"), (5, "cut"), (10, "cut")):
            train(dataclasses.replace(sharded, steps=steps), tmp_path / out)
        train(dataclasses.replace(sharded, precision="bfloat16"), tmp_path / "bfloat16")
        finish()

    result = forked(work, ranks=2)
    assert result.code == 0, result.out[-3000:]
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    for name in ["loss", *NAMES]:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert curves(tmp_path / "cut") == two
    assert curves(tmp_path / "bfloat16")["aligned_states"] == pytest.approx(one["aligned_states"], rel=0.05, abs=0.02)
    folders = [checkpoint.newest(tmp_path / run) for run in ("two", "cut")]
    for name in ("model", "ema", "aligned_states", "private_blocks", "encoder_states", "heads"):
        first, second = (checkpoint.read_weights(folder, name) for folder in folders)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
