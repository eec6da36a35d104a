"""Private operators of torch that make a CPU faster. Another torch, processor or system may lack them, so each is
looked up when it is first needed and tried once against plain torch; where it fails, plain torch is used instead.

MUTOR_NO_FAST_PATHS=1 uses plain torch everywhere, to test that path or to rule this file out as a cause.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_products(dtype: torch.dtype) -> bool:
    """Whether `pack` and `packed_product` work on this machine's CPU for weights of this type."""
    return _allowed() and _tried(_try_packed_product, dtype)


def pack(weight: Tensor) -> Tensor:
    """(out, in) on the CPU -> the same in oneDNN's blocked layout, for `packed_product` only."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # 32 rows: a hint, any number is right


def packed_product(rows: Tensor, packed: Tensor) -> Tensor:
    """rows (M, in) @ weight.T -> (M, out)."""
    return torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


@cache
def fewest_rows() -> int:
    """Rows to fill up to before a packed product. A single row takes another kernel, which rounds differently. With
    AVX-512 two rows are slow: reading a model's float32 matrices takes 17 ms for two rows and 11 for four; without it
    every row costs its own."""
    return 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2


@cache
def rows_at_once(dtype: torch.dtype) -> int:
    """Rows of every packed product, 0 = any number. With AMX's tiles oneDNN chooses a kernel for bfloat16 by the number
    of rows, and kernels round differently; where torch cannot tell whether there are tiles, there may be."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    return 32 if dtype == torch.bfloat16 and tiles() else 0


def prefix_attention() -> bool:
    """Whether `prefix_attention_forward` and `..._backward` work on this machine's CPU."""
    return _allowed() and _tried(_try_prefix_attention, torch.float32)


def prefix_attention_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None):
    """Attention on the CPU that also gives the log-sum-exp of each row's logits: (output, log-sum-exp)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)


def prefix_attention_backward(grad, q, k, v, out, log_sum_exp, causal: bool, mask: Tensor | None = None):
    """Gradients of q, k, v."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, log_sum_exp, 0.0, causal, attn_mask=mask
    )


def _allowed() -> bool:
    return os.environ.get("MUTOR_NO_FAST_PATHS") != "1"


@cache
def _tried(attempt: Callable[[torch.dtype], bool], dtype: torch.dtype) -> bool:
    try:  # whatever the caller computes in, autocast or without gradients, must not decide
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return attempt(dtype)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):  # absent, refused, of another signature
        return False


def _try_packed_product(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator).to(dtype)
    rows = torch.randn(5, 40, generator=generator).to(dtype)
    expected = F.linear(rows.float(), weight.float())
    return torch.allclose(packed_product(rows, pack(weight)).float(), expected, atol=1e-4 + 20 * torch.finfo(dtype).eps)


def _try_prefix_attention(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected_grads = torch.autograd.grad(expected.sum(), (q, k, v))
    with torch.no_grad():
        out, log_sum_exp = prefix_attention_forward(q, k, v, True)
        grads = prefix_attention_backward(torch.ones_like(out), q, k, v, out, log_sum_exp, True)
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    return all(torch.allclose(got, wanted, atol=1e-5) for got, wanted in pairs)
