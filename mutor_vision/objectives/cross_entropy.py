"""Cross-entropies of hidden states without all of their logits at once.

Legend: M rows, C width, V codebook size."""

import torch
from torch import Tensor

CHUNK = 2**22  # logits at a time, at least: 16 MB in float32


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
