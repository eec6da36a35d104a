"""Which kernels CUDA may choose, for results that must not depend on the batch or on the run. Only `fp32_precision` is
used: torch has an older switch for TF32 as well (allow_tf32), and reading it raises once the newer one has been set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions and products in IEEE float32, restored afterwards; may be nested. cuDNN uses TF32 by default, which
    makes features depend on the batch size (torch-fidelity issue 43)."""
    convolution, product = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolution.fp32_precision, product.fp32_precision
    convolution.fp32_precision = product.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision, product.fp32_precision = before


@contextmanager
def fixed_convolutions() -> Iterator[None]:
    """cuDNN chooses the same deterministic kernel for the same shapes every time; restored afterwards."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
