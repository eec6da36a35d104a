"""Mirai-E's loss against a reference that is written out, and what its teacher sees."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mutor_vision.config import AlignedStatesConfig, RegisterConfig, TrainConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.aligned_states import AlignedStates
from mutor_vision.objectives.objective import Objective, total_loss
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.training.loop import train

LABELS, SEEN = torch.tensor([0, 1, 4]), torch.tensor([0, 5, 4])  # the classes; 5 is the null class
THREE = "same right below"
NINE = " ".join(f"{r},{c}" for r in range(3) for c in range(3))
OFFSETS = {THREE: [(0, 0), (0, 1), (1, 0)], NINE: [(r, c) for r in range(3) for c in range(3)]}


def codes(seed=0):
    return torch.randint(32, (3, 4, 4), generator=torch.Generator().manual_seed(seed))


def objective_of(model, **settings):
    """With a teacher that differs from the model and projectors whose outputs are not small."""
    own = AlignedStatesConfig(2.0, **{"offsets": THREE, "depth": 0.5, "decay": 0.5} | settings)
    torch.manual_seed(1)
    auxiliary = AlignedStates(own, TrainConfig(model=model.config, aligned_states=own))
    objective = Objective(model, [auxiliary.to(next(model.parameters()).dtype)])
    for parameter in auxiliary.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return objective


def loss(objective, seen=SEEN, **changes):
    sequence = objective.sequence(codes(), seed=0, sample_index=np.arange(3), labels=LABELS)
    sequence = dataclasses.replace(sequence, **changes)
    counts = {name: torch.tensor(count) for name, count in objective.counts(sequence).items()}
    return total_loss(objective(seen, sequence), counts, objective.weights(0))


def reference(model, auxiliary, seen, offsets, reduction):
    """The total, by the words of the method: cross-entropy, and 2 times minus each head's mean cosine."""
    tokens, (sin, cos) = codes().flatten(1), model.rope[:, None, None, :16]

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def after_block_1_of(network, labels):
        classes, embedded = network.class_embedding.weight[labels], network.token_embedding.weight[tokens[:, :15]]
        return network.blocks[0](torch.cat([classes[:, None], embedded], 1), sin, cos, attend)

    with torch.no_grad():
        teacher = after_block_1_of(auxiliary.teacher, LABELS)
    student = after_block_1_of(model, seen)
    terms = []
    for projector, (rows, columns) in zip(auxiliary.projectors, offsets, strict=True):
        cosines = []
        for image in range(3):
            for t in range(16):
                other = 0 if t == 0 else t + 4 * rows + columns
                if other <= 15:
                    x = student[image, t]
                    for number in (0, 2, 4):
                        x = x @ projector[number].weight.T + projector[number].bias
                        x = x * torch.sigmoid(x) if number < 4 else x
                    y = teacher[image, other]
                    cosines.append((x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt()))
        terms.append(-torch.stack(cosines).mean())
    aligned = torch.stack(terms).sum() if reduction == "sum" else torch.stack(terms).mean()
    logits = model.head(model.norm(model.blocks[1](student, sin, cos, attend)))
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + 2 * aligned


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("offsets", [THREE, NINE], ids=["K = 3", "K = 9"])
def test_loss_and_gradients_are_those_of_a_written_out_reference(random_model, offsets, reduction):
    model = random_model.double()
    objective = objective_of(model, offsets=offsets, reduction=reduction)
    auxiliary = objective.auxiliaries["aligned_states"]
    trained = [*model.parameters(), *auxiliary.projectors.parameters()]
    got = loss(objective)
    expected = reference(model, auxiliary, SEEN, OFFSETS[offsets], reduction)
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)
    for ours, theirs in zip(torch.autograd.grad(got, trained), torch.autograd.grad(expected, trained), strict=True):
        assert theirs.any() and torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_with_weight_0_the_model_has_the_gradients_of_next_token_prediction(random_model):
    model = random_model.double()
    plain = Objective(model)
    loss(plain).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    objective = objective_of(model)
    objective.auxiliaries["aligned_states"].own = AlignedStatesConfig(0.0)
    loss(objective).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-12, atol=1e-14), name


def test_the_teacher_has_no_dropout_and_sees_the_class_that_the_model_may_not(tiny_config):
    """Whatever mode it is put in, whatever label the model is given."""
    config = dataclasses.replace(tiny_config, token_dropout=0.3, residual_dropout=0.3, ffn_dropout=0.3, drop_path=0.3)
    torch.manual_seed(0)
    objective = objective_of(Transformer(config).train())
    auxiliary = objective.auxiliaries["aligned_states"].train()
    given = []
    auxiliary.teacher.class_embedding.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    sequence = objective.sequence(codes(), seed=0, sample_index=np.arange(3), labels=LABELS)
    objective(SEEN, sequence)
    assert torch.equal(given[0], LABELS) and not torch.equal(LABELS, SEEN)
    first, second = (auxiliary.teacher_states(sequence) for _ in range(2))
    assert torch.equal(first, second)
    states = [objective.transformer.states(sequence.tokens, SEEN, sequence.positions, taps=["blocks.0"]) for _ in "ab"]
    assert not torch.equal(*(each["blocks.0"] for each in states)), "the model has dropout"
    nulled = dataclasses.replace(sequence, labels=SEEN)
    assert (auxiliary.teacher_states(nulled) != first).any(dim=(1, 2)).tolist() == [False, True, False]


def test_the_teacher_is_the_average_of_the_model_from_the_first_step_on(random_model):
    """Step by step: begun as a copy, then decay times itself and the rest of the model; its gradient is none."""
    own = AlignedStatesConfig(2.0, decay=0.75)
    auxiliary = AlignedStates(own, TrainConfig(model=random_model.config))
    objective = Objective(random_model, [auxiliary])
    name = "blocks.0.ffn.fc2.weight"
    teacher, student = auxiliary.teacher.get_parameter(name), random_model.get_parameter(name)
    expected = student.detach().clone()
    assert torch.equal(teacher, expected)
    for _ in range(3):
        loss(objective).backward()
        with torch.no_grad():
            for parameter in random_model.parameters():
                parameter -= 0.1 * parameter.grad
        objective.after_step()
        expected = 0.75 * expected + 0.25 * student.detach()
        torch.testing.assert_close(teacher, expected)
    assert all(parameter.grad is None for parameter in auxiliary.teacher.parameters())
    assert not any(name.startswith(("head", "norm")) for name in auxiliary.teacher.state_dict())


@pytest.mark.parametrize("layers, blocks", [(12, 8), (36, 24), (24, 16), (3, 2), (1, 1)])
def test_the_layer_keeps_its_relative_depth(tiny_config, layers, blocks):
    own = AlignedStatesConfig(2.0)
    with torch.device("meta"):
        config = TrainConfig(model=dataclasses.replace(tiny_config, layers=layers))
        auxiliary = AlignedStates(own, config)
    assert auxiliary.taps == (f"blocks.{blocks - 1}",) and len(auxiliary.teacher.blocks) == blocks


def test_registers_leave_the_loss_as_it_is(random_model):
    """States of a middle layer, with and without registers behind them."""
    both = dataclasses.replace(TrainConfig(model=random_model.config), registers=RegisterConfig("2d", 5))
    from mutor_vision.objectives.register_loss import RegisterLoss

    auxiliary = objective_of(random_model).auxiliaries["aligned_states"]
    sums = []
    for others in ([], [RegisterLoss(both.registers, both)]):
        objective = Objective(random_model, [*others, auxiliary])
        with torch.no_grad():
            for parameter in auxiliary.teacher.parameters():
                parameter.mul_(1.5)  # the objective begins with a copy of the model
        sequence = objective.sequence(codes(), seed=0, sample_index=np.arange(3), labels=LABELS)
        sums.append(objective(SEEN, sequence)["aligned_states"])
    torch.testing.assert_close(*sums)


def test_a_run_resumes_with_its_teacher_and_its_transformer_is_a_plain_one(train_config, trained_twice):
    own = AlignedStatesConfig(0.5, "0:0,3:1", decay=0.9)
    config = dataclasses.replace(train_config, registers=RegisterConfig(), aligned_states=own)
    run = trained_twice(config, "model", "ema", "aligned_states")
    lines = [line for line in read_log(run) if "aligned_states" in line]
    assert lines[-1]["aligned_states"] < lines[0]["aligned_states"]
    for line in lines:
        weight = 0.5 if line["step"] > 3 else 0.0
        assert line["loss"] == pytest.approx(line["next_token"] + weight * line["aligned_states"])


def test_in_a_run_the_teacher_follows_every_step_and_is_given_the_classes(tmp_path, train_config, monkeypatch):
    """Checkpoint by checkpoint; nine tenths of the labels are dropped."""
    own = AlignedStatesConfig(0.5, decay=0.75)
    config = dataclasses.replace(train_config, registers=RegisterConfig(), aligned_states=own, steps=4, save_every=1,
                                 keep=10, label_dropout=0.9, micro_batch=6)  # fmt: skip
    seen, given = [], []
    teacher_states, states = AlignedStates.teacher_states, Transformer.states

    def watched(self, sequence):
        given.append(sequence.labels)
        return teacher_states(self, sequence)

    def watched_too(self, tokens, labels, *arguments, **more):
        if more.get("taps"):
            seen.append(labels)
        return states(self, tokens, labels, *arguments, **more)

    monkeypatch.setattr(AlignedStates, "teacher_states", watched)
    monkeypatch.setattr(Transformer, "states", watched_too)
    train(config, tmp_path / "run")
    seen, given = torch.cat(seen), torch.cat(given)
    dropped = seen == 5
    assert 0.7 < dropped.float().mean() < 1 and given.max() < 5 and torch.equal(seen[~dropped], given[~dropped])

    name, expected = "blocks.0.attention.qkv.weight", None
    for step in range(1, 5):
        folder = tmp_path / "run/checkpoints" / f"step-{step:07d}"
        student = checkpoint.read_weights(folder, "model")[name]
        teacher = checkpoint.read_weights(folder, "aligned_states")[f"teacher.{name}"]
        if expected is not None:
            torch.testing.assert_close(teacher, 0.75 * expected + 0.25 * student)
            assert not torch.allclose(teacher, student, rtol=1e-4) and not torch.allclose(teacher, expected, rtol=1e-5)
        expected = teacher
