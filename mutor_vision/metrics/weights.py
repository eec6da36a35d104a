"""Extractor weights from files of strangers: read without unpickling, and named by what they hold."""

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mutor_vision.errors import IntegrityError


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from .pth / .pt by torch.load(weights_only=True). Raises IntegrityError."""
    path = Path(path)
    if not path.is_file():
        raise IntegrityError(f"weights {path} do not exist; expected a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise IntegrityError(f"{path} holds no weights that load safely ({reason}); expected a state dict") from None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise IntegrityError(f"{path} is not a plain state dict of tensors; extract it and save it as .safetensors")
    return state


def state_sha256(state: dict[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes: the same for the same weights in whatever file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
