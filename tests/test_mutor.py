"""What registers must not change, and what they must."""

import dataclasses

import numpy as np
import pytest
import torch

from mutor_vision.config import RegisterConfig, TrainConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.cross_entropy import linear_cross_entropy
from mutor_vision.objectives.objective import Objective, total_loss
from mutor_vision.objectives.register_loss import RegisterLoss
from mutor_vision.objectives.registers import add_registers
from mutor_vision.objectives.sequence import NO_TARGET, next_token_sequence

GENERATOR = torch.Generator().manual_seed(0)
CODES = torch.randint(32, (4, 4, 4), generator=GENERATOR)
LABELS = torch.tensor([0, 1, 4, 5])


def sequence_of(config, codes=CODES, seed=0):
    plain = next_token_sequence(codes)
    if not config.active:
        return plain
    return add_registers(plain, codes, config, register_token=32, seed=seed, sample_index=np.arange(len(codes)))


def forward(model, sequence):
    return model(sequence.tokens, LABELS, sequence.positions, sequence.pattern)


def objective_of(model, weight=0.5):
    registers = RegisterConfig("2d", 4, weight=weight)  # the sequence says where they are
    return Objective(model, [RegisterLoss(registers, TrainConfig(model=model.config, registers=registers))])


def loss(objective, sequence):
    counts = {name: torch.tensor(count) for name, count in objective.counts(sequence).items()}
    return total_loss(objective(LABELS, sequence), counts, objective.weights(0))


def objective(model, sequence, weight):
    return loss(objective_of(model, weight), sequence)


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
    loss(Objective(model), plain).backward()
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
    empty = dataclasses.replace(sequence, with_target=sequence.with_target[:0])
    assert torch.isfinite(objective(random_model, empty, 0.5))


def test_registers_with_a_target_are_those_whose_target_is_given(registers):
    sequence = sequence_of(registers)
    given = (sequence.targets[:, 16:] != NO_TARGET).flatten().nonzero()[:, 0]
    assert torch.equal(sequence.with_target, given)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("chunk", [1, 7 * 11, 10**9], ids=["6 rows", "7 rows", "at once"])
def test_the_chunked_cross_entropy_equals_torchs_in_value_and_gradients(monkeypatch, chunk, dtype, tolerance):
    monkeypatch.setattr("mutor_vision.objectives.cross_entropy.CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 6, dtype=dtype, generator=generator, requires_grad=True)
    head = torch.randn(11, 6, dtype=dtype, generator=generator, requires_grad=True)
    targets = torch.randint(11, (20,), generator=generator)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    got = linear_cross_entropy(hidden, head, targets)
    assert torch.allclose(got, expected, rtol=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(3 * got, (hidden, head)), torch.autograd.grad(3 * expected, (hidden, head)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_cross_entropy_is_float32_under_bfloat16_autocast():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(300, 16, generator=generator).bfloat16().requires_grad_()
    head = torch.randn(40, 16, generator=generator).requires_grad_()
    targets = torch.randint(40, (300,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(hidden, head, targets)
    exact = torch.nn.functional.cross_entropy(hidden.float() @ head.T, targets, reduction="sum")
    assert total.dtype == torch.float32 and torch.allclose(total, exact, rtol=2e-3)
    for ours, theirs in zip(
        torch.autograd.grad(total, (hidden, head)), torch.autograd.grad(exact, (hidden, head)), strict=True
    ):
        assert ours.dtype == theirs.dtype and torch.allclose(ours.float(), theirs.float(), rtol=0.05, atol=0.1)


def test_a_loss_that_is_only_looked_at_makes_no_gradient(random_model):
    with torch.no_grad():
        assert not objective(random_model, sequence_of(RegisterConfig("2d", 4)), 0.5).requires_grad


def test_recomputing_blocks_changes_no_gradient(tiny_config, registers):
    """With dropout, whose draws come twice. And that it recomputes: the blocks run again in the backward pass."""
    config = dataclasses.replace(tiny_config, token_dropout=0.2, residual_dropout=0.2, ffn_dropout=0.2)
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    losses, gradients, runs = [], [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(model.recompute))
    for model.recompute in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        losses.append(sum(objective_of(model)(LABELS, sequence_of(registers)).values()))
        losses[-1].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert torch.equal(*losses) and runs == [False, True, True]
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.any() and torch.equal(plain, recomputed)
