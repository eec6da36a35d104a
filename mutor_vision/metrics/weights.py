"""Extractor weights: from files of strangers, read without unpickling and named by what they hold, and from the net,
without a wait where no host answers."""

import hashlib
import pickle
import socket
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from mutor_vision import foreign_checkpoint
from mutor_vision.errors import IntegrityError, UserError

FILE_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")  # in folders of the hub
CONNECT_SECONDS = 3.0  # for a host to answer
STALLED_SECONDS = 60.0  # without a byte, after which a download is given up


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors, .pth, .pt, .ckpt or .bin file, or a folder that holds one under the hub's name.
    Wrapping ({'state_dict': ...}, 'module.' before the names) is taken off. Raises IntegrityError and MismatchError."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise IntegrityError(f"weights {path} is a folder without {', '.join(FILE_NAMES)}; give the file itself")
        path = found[0]
    if not path.is_file():
        raise IntegrityError(f"weights {path} do not exist; expected a .safetensors, .pth, .pt, .ckpt or .bin file")
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip or path.suffix == ".safetensors":
        try:
            content = foreign_checkpoint.read(path)
        except UserError as error:
            if type(error) is not UserError:
                raise
            # Several sets of weights; the flag that the message proposes belongs to another command.
            raise IntegrityError(f"{str(error).partition(';')[0]}; save the one to use alone") from None
        return {name: content.load(name) for name in content.tensors}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # as torch before 1.6 wrote it
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise IntegrityError(f"{path} holds no weights that load safely ({reason}); expected a state dict") from None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise IntegrityError(f"{path} is not a plain state dict of tensors; extract it and save it as .safetensors")
    for name, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise IntegrityError(f"{path}: '{name}' claims {value.numel():,} numbers, more than are stored")
    return state


def state_sha256(state: dict[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes: the same for the same weights in whatever file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def host_answers(url: str) -> bool:
    """Can a connection be made to the host of a URL, or to the proxy that the environment names for it? Found out in
    seconds, where the clients of the net try again and again for minutes."""
    try:
        parts = urlsplit(url)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        if proxy and not urllib.request.proxy_bypass(parts.hostname):
            parts = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
        port = parts.port or {"https": 443, "socks5": 1080, "socks5h": 1080}.get(parts.scheme, 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
        return True
    except (OSError, ValueError):  # ValueError: a name or port that is none
        return False


@contextmanager
def ending_downloads() -> Iterator[None]:
    """Within it, a connection of urllib's (torch.hub's) that has stalled is an error instead of a wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def check_cache(folder: Path, variable: str) -> None:
    """UserError when downloaded weights cannot be kept in `folder`, which the environment's `variable` moves."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}, where downloaded weights are kept, cannot be written ({error.strerror}); set {variable} to a "
            "folder that can, or pass --weights FILE"
        ) from None
