"""The objective (arXiv 2505.10518, equation 4): L = (1 - a) L_next + a L_reg, each a mean of cross-entropies over its
own valid targets, pooled over the batch.

Legend: B batch, N slots, R registers, M rows, C width, V codebook size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mutor_vision.config import RegisterConfig
from mutor_vision.parallel_heads import ParallelHeads
from mutor_vision.registers import TrainingSequence
from mutor_vision.transformer import Transformer

CHUNK = 2**22  # logits at a time, at least: 16 MB in float32


class LossSums(NamedTuple):
    """Summed cross-entropies in nats, scalars. Sums, so that means can be pooled over micro-batches and processes,
    whose numbers of register targets differ."""

    next_token: Tensor
    register: Tensor  # or of the parallel heads, which come in registers' place


class Objective(nn.Module):
    """Transformer and cross-entropies as one module, so that data parallelism has one forward to wrap."""

    def __init__(self, transformer: Transformer, heads: ParallelHeads | None = None):
        super().__init__()
        self.transformer = transformer
        self.heads = heads

    def forward(self, labels: Tensor, sequence: TrainingSequence) -> LossSums:
        """labels (B,) int64 in [0, num_classes] -> the two sums. The head sees only inputs that have a target."""
        hidden = self.transformer.hidden(sequence.tokens, labels, sequence.positions, sequence.pattern)
        n, head = sequence.num_regular, self.transformer.head.weight
        next_token = linear_cross_entropy(hidden[:, :n].flatten(0, 1), head, sequence.targets[:, :n].flatten())
        if self.heads is not None:
            terms = [
                linear_cross_entropy(ahead.flatten(0, 1), head, sequence.targets[:, -ahead.shape[1] :].flatten())
                for ahead in self.heads(hidden, self.transformer.rope)
            ]
            return LossSums(next_token, torch.stack(terms).sum())
        if sequence.pattern is None:
            return LossSums(next_token, next_token.new_zeros(()))
        rows = sequence.with_target
        registers, targets = hidden[:, n:].flatten(0, 1)[rows], sequence.targets[:, n:].flatten()[rows]
        return LossSums(next_token, linear_cross_entropy(registers, head, targets))

    def num_other_targets(self, sequence: TrainingSequence) -> int:
        """Targets behind LossSums.register."""
        if self.heads is None:
            return sequence.num_register_targets
        return len(sequence.targets) * self.heads.num_targets(sequence.num_regular)


def register_weight(config: RegisterConfig, step: int, steps: int) -> float:
    """a at optimizer step `step` (0-based) of `steps`."""
    if config.weight_schedule == "constant":
        return config.weight
    return config.weight * (1 - step / max(1, steps - 1))


def total_loss(sums: LossSums, num_next_token: Tensor, num_register: Tensor | None, weight: float | None) -> Tensor:
    """Weigh sums by the numbers of targets of the whole batch; num_register None = next-token only, weight unused."""
    if num_register is None:
        return sums.next_token / num_next_token
    return (1 - weight) * sums.next_token / num_next_token + weight * sums.register / num_register.clamp(min=1)


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """hidden (M, C), head (V, C), targets (M,) int64 in [0, V) -> sum of the cross-entropies of hidden @ head.T, in
    float32 (float64 for float64).

    All M x V logits never exist: a batch of 1024 with 80 registers and V = 16384 would need 22 GB for them. What is
    kept for the backward pass is the gradient of the sum, of the size of the arguments.
    """
    return _LinearCrossEntropy.apply(hidden, head, targets, torch.is_grad_enabled())


def chunk_rows(vocab_size: int, width: int) -> int:
    """How many rows of logits exist at a time: enough to outweigh the head's gradient, to which every chunk adds."""
    return max(width, CHUNK // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    # torch's F.linear_cross_entropy (2.13) chunks in the same way, but its sum of bfloat16 inputs is bfloat16, of
    # three digits, and under autocast it multiplies in float32.

    @staticmethod
    def forward(ctx, hidden, head, targets, needs_gradient):
        needs_head_gradient = needs_gradient and ctx.needs_input_grad[1]  # an adapter leaves the head as it is
        device, wide = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        total = torch.zeros((), dtype=wide, device=device)
        if needs_gradient:
            grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=wide) if needs_head_gradient else None
        with torch.autocast(device.type, enabled=False):
            x, weight = hidden.to(dtype), head.to(dtype)
            rows = chunk_rows(*head.shape)
            # The same memory for every chunk: on a CPU new pages take longer than the product that fills them.
            all_logits = x.new_empty(min(rows, len(x)), len(head))
            all_log_p = torch.empty_like(all_logits, dtype=wide)
            for start in range(0, len(x), rows):
                part = x[start : start + rows]
                target = targets[start : start + rows, None]
                logits = torch.mm(part, weight.t(), out=all_logits[: len(part)])
                log_p = torch.log_softmax(logits, -1, dtype=wide, out=all_log_p[: len(part)])
                total -= log_p.gather(1, target).sum()
                if needs_gradient:
                    p = log_p.exp_()
                    p.scatter_add_(1, target, p.new_full((), -1.0).expand(target.shape))
                    p = p.to(dtype)
                    grad_hidden[start : start + rows] = torch.mm(p, weight)
                    if grad_head is None:
                        continue
                    if dtype == wide:
                        grad_head.addmm_(p.t(), part)  # without a second matrix of its size
                    else:
                        grad_head += torch.mm(p.t(), part)
        if needs_gradient:
            ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_head is not None:
            grad_head.mul_(upstream)
        return grad_hidden.mul_(upstream), grad_head, None, None
