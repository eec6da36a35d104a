"""A trained transformer -> one that only samples: its matrices in the type that they are multiplied in, packed for the
CPU's kernels, or as int8. In place; it cannot be trained or saved afterwards."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutor_vision.errors import UserError
from mutor_vision.model import fast_paths
from mutor_vision.model.transformer import Transformer

QUANTIZATIONS = ("none", "int8")


class PackedLinear(nn.Module):
    """x @ weight.T on a CPU with the weight in oneDNN's blocked layout, which `F.linear` makes of it at every call: a
    step of decoding has few rows, so that is half of its time. Also, a row gets the same bits in any batch."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.packed = fast_paths.pack(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the weight's type."""
        rows = x.to(self.dtype).reshape(-1, self.in_features)
        size = fast_paths.rows_at_once(self.dtype) or max(len(rows), fast_paths.fewest_rows())
        if missing := -len(rows) % size:
            rows = F.pad(rows, (0, 0, 0, missing))
        parts = [fast_paths.packed_product(part, self.packed) for part in rows.split(size)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)  # cat copies even one
        return y[: x.numel() // self.in_features].view(*x.shape[:-1], self.out_features)


def prepare(model: Transformer, dtype: torch.dtype | None, quantize: str = "none") -> Transformer:
    """dtype: what matrices are multiplied in, None = as they are. Under autocast the logits keep their bits, without a
    cast of every matrix at every step. quantize 'int8' rounds each row of the blocks' matrices to 255 levels (weights
    only, by torchao); the head stays as it is. Raises UserError when torchao is missing."""
    if quantize not in QUANTIZATIONS:
        raise UserError(f"quantize is '{quantize}', expected one of {', '.join(QUANTIZATIONS)}")
    if dtype is not None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
    if quantize == "int8":
        _quantize(model.blocks)
    if model.head.weight.device.type == "cpu":
        _pack(model)
    return model


def _pack(module: nn.Module) -> None:
    for name, child in module.named_children():
        weight = child.weight if type(child) is nn.Linear and child.bias is None else None
        if type(weight) is nn.Parameter and fast_paths.packed_products(weight.dtype):
            setattr(module, name, PackedLinear(weight.detach()))
        else:
            _pack(child)


def _quantize(module: nn.Module) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError("int8 weights need torchao; pip install 'mutor-vision[quant]'") from None
    quantize_(module, Int8WeightOnlyConfig(set_inductor_config=False))
