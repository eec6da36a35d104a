"""Weights from strangers' files. A .pt file is a pickle, which can run code when it is loaded. So it is opened by
torch's weights_only loader, with argparse.Namespace as the only other permitted class, because LlamaGen's training
scripts store one. A file that this loader refuses is not opened in any other way, and no setting changes that.

Opening a file reads names and shapes only. Values are read one tensor at a time, so that neither a large model nor
optimizer state in the same file has to fit into memory."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.storage.files import read_json, read_tensors
from mutor_vision.storage.npz import DAMAGE

# Entries of a file that may hold its weights: those of LlamaGen, DDP, DeepSpeed, Lightning, timm, BasicSR, Fabric.
ENTRIES = (
    "model", "module", "state_dict", "ema", "model_state_dict", "model_state", "model_ema", "ema_state_dict",
    "state_dict_ema", "params", "params_ema", "weights", "net",
)  # fmt: skip
_INDEX = "model.safetensors.index.json"  # Hugging Face's, of weights in several files
# File names in a folder: those of FSDP's trainer and Hugging Face.
FILES = ("consolidated.pth", "model.safetensors", "pytorch_model.bin", _INDEX)
_PART = re.compile(r".*-\d+-of-(?!0*1\.)\d+\.\w+")

# Parts that wrappers add anywhere in tensor names: DDP, torch.compile, FSDP, activation checkpointing, DeepSpeed, ...
_WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module",
}  # fmt: skip
# Last parts of names of single numbers that weight averaging (torch, lucidrains, LitEma) and thop save with weights.
_COUNTERS = {"n_averaged", "num_updates", "initted", "step", "decay", "total_ops", "total_params"}
MOST_VALUES = 250_000  # of a file, in all its dicts and lists
_POSITIONS = {"freqs_cis", "causal_mask"}  # tables that can be computed from the sizes; some forks save them
_CACHE = "kv_cache"  # LlamaGen's sampler adds it to a model


@dataclass(frozen=True)
class ForeignCheckpoint:
    """The tensors of a file's network, and what the file says about itself."""

    path: Path
    tensors: dict[str, Tensor]  # names, shapes and types; `load` reads the values
    layout: str  # where in the file they were, as text for the user
    arguments: dict[str, Any]  # the training script's settings, {} when the file has none

    def load(self, name: str) -> Tensor:
        """The tensor with its values. Raises IntegrityError when the file ends before them."""
        tensor = self.tensors[name]
        if not isinstance(tensor, FakeTensor):
            return tensor
        storage = tensor.untyped_storage()
        data = bytearray(storage.nbytes())
        with open(self.path, "rb") as file:
            assert storage._checkpoint_offset is not None  # torch.load sets it under FakeTensorMode
            file.seek(storage._checkpoint_offset)
            if file.readinto(data) != len(data):
                raise IntegrityError(f"{self.path} ends before the numbers of '{name}'; download it again")
        flat = torch.frombuffer(data, dtype=tensor.dtype) if data else torch.empty(0, dtype=tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def read(path: str | Path, weights: str = "") -> ForeignCheckpoint:
    """Open a .pt, .pth or .ckpt file, a .safetensors file or an index of several, or a folder that holds one of FILES.

    weights: the entry to take ('model', 'module', 'state_dict' or 'ema') from a file with several. Raises UserError
    when there is no such file or a choice is needed, IntegrityError when it is damaged or would run code."""
    path = Path(path)
    if path.is_dir():
        if (path / ".metadata").exists():
            raise IntegrityError(f"{path} is a distributed checkpoint, whose index is a pickle; give consolidated.pth")
        path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a checkpoint file, or a folder with {' or '.join(FILES)}")
    if _PART.fullmatch(path.name):
        raise UserError(f"{path} is one of several parts; give its folder, or {_INDEX}")
    if path.name.endswith(".safetensors.index.json"):
        content = _read_parts(path)
    else:
        with open(path, "rb") as file:
            _check_start(path, file.read(512))
        content = read_tensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors, layout, weights = _choose(path, content, weights)
    arguments: Any = content.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    tensors, taken_off = _unwrapped(path, tensors, weights, layout)
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    return ForeignCheckpoint(path, tensors, layout + taken_off, arguments)


def _read_parts(index: Path) -> dict[str, Tensor]:
    names = sorted(set(read_json(index, {"weight_map": {str: str}})["weight_map"].values()))
    if not all(Path(name).name == name for name in names):
        raise IntegrityError(f"{index} names files outside of its folder; it is refused")
    tensors: dict[str, Tensor] = {}
    for path in (index.parent / name for name in names):
        if not path.is_file():
            raise IntegrityError(f"{path}, which {index.name} names, does not exist; download it")
        part = read_tensors(path)
        if twice := sorted(tensors.keys() & part.keys()):
            raise MismatchError(f"{path}: '{twice[0]}' stands in another part as well; it is ambiguous")
        tensors |= part
    return tensors


def _read_pickle(path: Path) -> dict[str, Any]:
    _check_zip(path)
    try:
        # Fake tensors have a shape and their values' offset in the file (torch's notes on serialization).
        with (
            warnings.catch_warnings(action="ignore"), FakeTensorMode(),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):  # fmt: skip
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # a malicious file can make the loader raise anything
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise IntegrityError(
                f"{path} is refused: its pickle asks for {found[1]}, and may hold nothing but tensors, plain values "
                "and argparse.Namespace; nothing in it was run. Where you trust it, save its state dict alone"
            ) from None
        reason = str(error).rpartition("WeightsUnpickler error:")[2]  # cuts torch's advice to turn weights_only off
        raise IntegrityError(f"{path} is refused: {_short(ValueError(reason))}; nothing in it was run") from None
    for _ in _values(path, content):  # counted before anything walks through them
        pass
    if not isinstance(content, dict):
        raise MismatchError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _check_start(path: Path, start: bytes, old: bool = False) -> None:
    """Raise IntegrityError for what is no file of weights by its first bytes. old: PyTorch's older format is one."""
    if not start:
        raise IntegrityError(f"{path} is empty (0 bytes); download it again")
    if start.startswith(b"version https://git-lfs"):
        raise IntegrityError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise IntegrityError(f"{path} looks like a web page: the download failed; download it again")
    if not old and path.suffix != ".safetensors" and not start.startswith(b"PK\x03\x04"):
        raise IntegrityError(
            f"{path} is not the zip file that PyTorch 1.6 and later write; older and bare pickles are never opened. "
            "Where you trust it, load it and torch.save its state dict again"
        )


def _check_zip(path: Path) -> None:
    # torch.load ignores the zip's checksums, so a flipped bit would become a wrong weight. They are checked here.
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename.partition("/")[2] for entry in entries}
            if "constants.pkl" in names or any(name.startswith("code/") for name in names):
                raise IntegrityError(f"{path} is a TorchScript program; expected a file of weights")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise IntegrityError(f"{path} has compressed entries, which torch.save does not write; it is refused")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise IntegrityError(f"{path} claims more bytes than it has; it is refused")
            for entry in entries:
                if entry.filename.endswith("/byteorder") and archive.read(entry).strip() != b"little":
                    raise IntegrityError(f"{path} was written by a big-endian machine; save it again on another")
            damaged = archive.testzip()
    except DAMAGE as error:
        if isinstance(error, UserError):  # which is a ValueError
            raise
        raise IntegrityError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged ({_short(error)}); download it again"
        ) from None
    if damaged:
        raise IntegrityError(f"{path} is damaged: the checksum of its entry '{damaged}' is wrong; download it again")


def _choose(path: Path, content: dict[str, Any], weights: str) -> tuple[dict[str, Any], str, str]:
    """(entry of a file that holds its weights, its description, `weights` or '' when that has named the entry)."""
    found = [name for name in ENTRIES if _holds_tensors(content.get(name))]
    if not found:
        if not any(isinstance(value, Tensor) for value in content.values()):
            raise MismatchError(f"{path} holds no weights: its entries are {', '.join(map(str, list(content)[:6]))}")
        return content, "bare tensors", weights
    if len(found) > 1 and weights not in found:
        if weights:
            raise UserError(f"{path} has no '{weights}' weights; it has {', '.join(found)}")
        raise UserError(
            f"{path} holds the weights {' and '.join(found)}; choose one, such as --weights {found[0]}"
            + (", which LlamaGen's samplers load" if found[0] == "model" else "")
        )
    name = weights if weights in found else found[0]
    inner, weights = content[name], weights if weights != name else ""
    if not any(isinstance(value, Tensor) for value in inner.values()):  # an entry within an entry
        inner, layout, weights = _choose(path, inner, weights)
        return inner, f"entry '{name}', {layout}", weights
    return inner, f"entry '{name}'", weights


def _holds_tensors(entry: Any, depth: int = 3) -> bool:
    if not isinstance(entry, dict):
        return False
    return any(isinstance(value, Tensor) or (depth and _holds_tensors(value, depth - 1)) for value in entry.values())


_Named = dict[tuple[str, ...], tuple[str, Any]]  # parts of a name -> (the name in the file, the tensor)


def _unwrapped(path: Path, tensors: dict[str, Any], weights: str, layout: str) -> tuple[dict[str, Any], str]:
    """The network's tensors without what training frameworks add: parts of names, and tensors of their own. Also
    returns a text that says what was removed.

    weights: which of several networks to take, by the first part of its names; '' when there is one. Raises
    MismatchError when two tensors get the same name."""
    named: _Named = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or "" in name.split("."):
            raise MismatchError(f"{path}: {name!r} is a {type(name).__name__}, expected the name of a network's tensor")
        parts = tuple(part for part in name.split(".") if part not in _WRAPPERS)
        if parts and not _is_beside(parts, tensor, tensors):
            _put(path, named, parts, name, tensor)
    prefix: tuple[str, ...] = ()
    while named:
        groups: dict[str, _Named] = {}
        for parts, (name, tensor) in named.items():
            groups.setdefault(parts[0], {})[parts[1:]] = (name, tensor)
        if () in set().union(*groups.values()) and weights not in groups:
            break  # a name of one part: no prefix is left
        if len(groups) > 1 and weights not in groups:
            same = len({frozenset(group) for group in groups.values()}) == 1
            if not same or all(len(parts) == 1 for parts in groups[next(iter(groups))]):
                break  # the parts of one network, not several networks
            if "ema" not in layout or "ema_model" not in groups:
                raise UserError(f"{path} holds the weights {' and '.join(groups)}; choose one, such as --weights "
                                f"{next(iter(groups))}")  # fmt: skip
            weights = "ema_model"  # an entry of averaged weights was chosen, so the average is wanted
        root, weights = (weights, "") if weights in groups else (next(iter(groups)), weights)
        prefix, named = (*prefix, root), groups[root]
    if weights:
        raise UserError(f"{path} has no '{weights}' weights, and one set only; drop --weights")
    if any(parts[-1] == "SCB" for parts in named):
        raise MismatchError(f"{path} holds weights in int8 with their scales (SCB); give the file before quantisation")
    removed = sorted({part for name in tensors for part in name.split(".") if part in _WRAPPERS})
    said = [f"prefix '{'.'.join(prefix)}.'"] if prefix else []
    said += [f"'{part}'" for part in removed]
    said += [f"{count} tensors beside the network"] if (count := len(tensors) - len(named)) and not removed else []
    return {".".join(parts): tensor for parts, (_, tensor) in named.items()}, (
        f", {', '.join(said)} taken off" if said else ""
    )


def _put(path: Path, named: dict, parts: tuple[str, ...], name: str, tensor: Any) -> None:
    if parts in named:
        raise MismatchError(f"{path}: '{named[parts][0]}' and '{name}' both name {'.'.join(parts)}; it is ambiguous")
    named[parts] = (name, tensor)


def _is_beside(parts: tuple[str, ...], tensor: Any, tensors: dict[str, Any]) -> bool:
    """Whether a tensor is not the network's own: a counter, a table of positions, a cache, or LitEma's copy of the
    weights, which latent-diffusion's models hold under names without dots."""
    single = not isinstance(tensor, Tensor) or tensor.numel() == 1
    is_copy = parts[0] == "model_ema" and len(parts) == 2 and "model_ema.num_updates" in tensors
    return (parts[-1] in _COUNTERS and single) or parts[-1] in _POSITIONS or _CACHE in parts or is_copy


def _check_tensor(path: Path, name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise MismatchError(f"{path}: '{name}' is a {type(tensor).__name__}, expected a tensor")
    plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)
    if not plain or (isinstance(tensor, FakeTensor) and not hasattr(tensor.untyped_storage(), "_checkpoint_offset")):
        raise MismatchError(f"{path}: '{name}' is sparse, quantised or without data, expected a plain tensor")
    storage = tensor.untyped_storage()
    begins: Any = storage._checkpoint_offset
    stored = path.stat().st_size - begins if isinstance(tensor, FakeTensor) else storage.nbytes()
    if max(tensor.numel() * tensor.element_size(), storage.nbytes()) > max(stored, 0):
        raise IntegrityError(f"{path}: '{name}' claims {tensor.numel():,} numbers, more than are stored; it is refused")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."


def read_pickle(path: Path) -> Any:
    """Tensors and plain values of a file of torch.save, however deep in dicts and lists. Raises IntegrityError or
    MismatchError for anything else; none of it is run."""
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a malicious file can make the loader raise anything
        reason = str(error).rpartition("WeightsUnpickler error:")[2]  # cuts torch's advice to turn weights_only off
        reason = re.split(r"\s*(?:Please|Check the doc)", reason)[0]
        raise IntegrityError(
            f"{path} holds no weights that load safely ({_short(ValueError(reason))}); nothing in it was run"
        ) from None
    for name, value in _values(path, content):
        if isinstance(value, Tensor):
            _check_tensor(path, name, value)
    return content


def _values(path: Path, content: Any) -> Iterator[tuple[str, Any]]:
    """Everything in dicts, lists and tuples, with its last name. Raises IntegrityError for more than MOST_VALUES: a
    list may hold itself, or another one a thousand times, and whoever walks through it would not come to an end."""
    waiting, seen = [("", content)], 0
    while waiting:
        name, value = waiting.pop()
        yield name, value
        if isinstance(value, (dict, list, tuple)):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(str(key)[:200], each) for key, each in inner]
        seen += 1
        if seen + len(waiting) > MOST_VALUES:
            raise IntegrityError(f"{path} holds more than {MOST_VALUES:,} values, or lists that hold each other; save "
                                 "its state dict alone")  # fmt: skip


FILE_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")  # in folders of the hub


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors, .pth, .pt, .ckpt or .bin file, or a folder with a file of FILE_NAMES. Wrapping
    ({'state_dict': ...}, 'module.' before names) is removed. Raises IntegrityError and MismatchError."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise IntegrityError(f"weights {path} is a folder without {', '.join(FILE_NAMES)}; give the file itself")
        path = found[0]
    if not path.is_file():
        raise IntegrityError(f"weights {path} do not exist; expected a .safetensors, .pth, .pt, .ckpt or .bin file")
    with open(path, "rb") as file:
        start = file.read(512)
    _check_start(path, start, old=True)
    if start.startswith(b"PK\x03\x04") or path.suffix == ".safetensors":
        try:
            content = read(path)
        except UserError as error:
            if type(error) is not UserError:
                raise
            # The file holds several sets of weights. The message proposes a flag that callers of this do not have.
            raise IntegrityError(f"{str(error).partition(';')[0]}; save the one to use alone") from None
        return {name: content.load(name) for name in content.tensors}
    state = read_pickle(path)  # as torch before 1.6 wrote it
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise IntegrityError(f"{path} is not a plain state dict of tensors; extract it and save it as .safetensors")
    return state
