"""What registers must not change, and what they must."""

import dataclasses

import numpy as np
import torch

from mutor_vision.config import RegisterConfig
from mutor_vision.loss import loss_sums, total_loss
from mutor_vision.registers import NO_TARGET, TrainingSequence, add_registers

GENERATOR = torch.Generator().manual_seed(0)
CODES = torch.randint(32, (4, 4, 4), generator=GENERATOR)
LABELS = torch.tensor([0, 1, 4, 5])


def sequence_of(config, codes=CODES, seed=0):
    return add_registers(codes, config, register_token=32, seed=seed, sample_index=np.arange(len(codes)))


def forward(model, sequence):
    return model(sequence.tokens, LABELS, sequence.positions, sequence.pattern)


def objective(model, sequence, weight):
    sums = loss_sums(forward(model, sequence), sequence)
    return total_loss(sums, sequence.num_next_token_targets, sequence.num_register_targets, weight)


def test_registers_leave_regular_logits_bit_equal(random_model, registers):
    plain = forward(random_model, sequence_of(RegisterConfig()))
    assert torch.equal(forward(random_model, sequence_of(registers))[:, :16], plain)


def test_registers_leave_regular_logits_bit_equal_on_a_trained_model(random_model, registers):
    optimizer = torch.optim.AdamW(random_model.parameters(), lr=1e-2)
    for step in range(5):
        objective(random_model, sequence_of(registers, seed=step), 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
    test_registers_leave_regular_logits_bit_equal(random_model, registers)


def test_a_perturbed_register_changes_no_other_output(random_model, registers):
    sequence = sequence_of(registers)
    before = forward(random_model, sequence)
    perturbed = sequence.tokens.clone()
    perturbed[:, 15 + 2] = 7  # the third register becomes another input
    after = forward(random_model, dataclasses.replace(sequence, tokens=perturbed))
    changed = (before != after).any(-1)
    expected = torch.zeros_like(changed)
    expected[:, 16 + 2] = registers.self_attention  # its own input reaches its output through the residual stream
    if registers.self_attention:
        assert torch.equal(changed, expected)
    else:
        assert not changed[:, :18].any() and not changed[:, 19:].any()


def test_a_perturbed_token_changes_only_outputs_that_may_see_it(random_model, registers):
    sequence = sequence_of(registers)
    before = forward(random_model, sequence)
    perturbed = sequence.tokens.clone()
    perturbed[:, 6] = (perturbed[:, 6] + 1) % 32  # the token in slot 7
    after = forward(random_model, dataclasses.replace(sequence, tokens=perturbed))
    changed = (before != after).any(-1)
    may_see = torch.cat([torch.arange(16).expand(4, -1) >= 7, sequence.pattern.last_visible >= 7], dim=1)
    assert torch.equal(changed, may_see)


def test_weight_zero_gives_the_next_token_gradients(random_model, registers):
    model = random_model.double()
    plain = sequence_of(RegisterConfig())
    sums = loss_sums(forward(model, plain), plain)
    total_loss(sums, plain.num_next_token_targets, None, 0.5).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    objective(model, sequence_of(registers), 0.0).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-12, atol=1e-14), name


def test_the_loss_equals_a_walk_over_every_input(random_model, registers):
    sequence = sequence_of(registers)
    logits = forward(random_model, sequence).double()
    regular, register = [], []
    for b in range(4):
        for i, target in enumerate(sequence.targets[b].tolist()):
            if target != NO_TARGET:
                (regular if i < 16 else register).append(-logits[b, i].log_softmax(-1)[target])
    expected = 0.3 * torch.stack(regular).mean() + 0.7 * torch.stack(register).mean()
    assert torch.allclose(objective(random_model, sequence, 0.7).double(), expected, rtol=1e-5)


def test_a_batch_without_any_register_target_has_a_finite_loss(random_model):
    sequence = sequence_of(RegisterConfig("2d", 4))
    targets = sequence.targets.clone()
    targets[:, 16:] = NO_TARGET
    empty = TrainingSequence(sequence.tokens, sequence.positions, sequence.pattern, targets, 16)
    assert torch.isfinite(objective(random_model, empty, 0.5))
