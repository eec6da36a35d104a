"""What is kept of a run, and how it is read back.

    RUN/config.json                     kind, version and the whole resolved configuration
    RUN/checkpoints/step-0000420/       config.json, model.safetensors, ema.safetensors, training.pt, MANIFEST.json
                                        and, of a sharded training, optimizer/ with the shards of its moments
    RUN/tokenizer/                      a copy of the tokenizer, so that a run samples by itself

A checkpoint is written under another name, hashed into its MANIFEST.json, flushed to the disk and then renamed, so
one that can be seen is whole. Weights are safetensors; training.pt holds tensors and numbers only and is read with
weights_only=True.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mutor_vision
from mutor_vision.config import from_dict, to_dict
from mutor_vision.errors import IntegrityError, MismatchError, UserError

OPTIMIZER = "optimizer"  # folder of a checkpoint: the shards of a sharded training's moments
_STEP = re.compile(r"^step-(\d{7})$")


def write_json(path: Path, value: Any) -> None:
    """Write JSON that appears under its name only when it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} is not complete JSON ({error}); restore it or make it anew") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_config(folder: Path, kind: str, config: Any) -> None:
    """config.json of a run, checkpoint or exported model. kind: 'tokenizer' or 'transformer'."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"format": 1, "kind": kind, "mutor_vision": mutor_vision.__version__, "config": to_dict(config)}
    write_json(folder / "config.json", values)


def read_config(folder: Path, kind: str, config_type: type) -> Any:
    """The configuration in folder/config.json, which must be of `kind`."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; expected a {kind} run, or one of its checkpoints")
    values = read_json(path)
    if values.get("kind") != kind:
        raise MismatchError(f"{folder} holds a {values.get('kind')}, expected a {kind}")
    if values.get("format") != 1:
        raise MismatchError(f"{path} has format {values.get('format')}, this version reads 1; upgrade mutor_vision")
    return from_dict(config_type, values["config"])


def save(
    run: Path, step: int, kind: str, config: Any, weights: dict[str, dict[str, Tensor] | Path], state: dict, keep: int,
    shards: Path | None = None,
) -> Path:  # fmt: skip
    """Commit RUN/checkpoints/step-<step> and remove all but the newest `keep`. Call on one rank.

    weights: file stem ('model', 'ema', ...) -> state dict, or a finished safetensors file, which is moved; state:
    tensors, numbers, strings, lists and dicts; shards: finished folder of optimizer shards, which is moved.
    Returns the checkpoint's path.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*.partial"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:07d}"
    partial = folder / f"{final.name}.partial"
    partial.mkdir()
    write_config(partial, kind, config)
    for name, tensors in weights.items():
        if isinstance(tensors, Path):
            tensors.rename(partial / f"{name}.safetensors")
            continue
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(tensors, partial / f"{name}.safetensors")
    torch.save(state, partial / "training.pt")
    if shards:
        shards.rename(partial / OPTIMIZER)
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in paths:
        shutil.copymode(partial / "config.json", path)  # safetensors writes files that only the owner may read
    files = {path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
             for path in paths}  # fmt: skip
    write_json(partial / "MANIFEST.json", {"format": 1, "step": step, "files": files})
    for path in partial.rglob("*"):
        _fsync(path)
    _fsync(partial)
    if final.exists():  # this very step again, after a resume that fell back: the new one is verified, the old was not
        shutil.rmtree(final)
    partial.rename(final)
    _fsync(folder)
    for old in sorted(_steps(run))[:-keep]:
        shutil.rmtree(_steps(run)[old])
    return final


def verify(checkpoint: Path) -> None:
    """Raise IntegrityError, naming the file, unless every file is what MANIFEST.json says."""
    manifest = checkpoint / "MANIFEST.json"
    if not manifest.is_file():
        raise IntegrityError(f"{checkpoint} has no MANIFEST.json; it is not a complete checkpoint")
    for name, expected in read_json(manifest)["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; use an older checkpoint")
        if path.stat().st_size != expected["bytes"]:
            raise IntegrityError(f"{path} has {path.stat().st_size} bytes, expected {expected['bytes']}")
        if (got := sha256(path)) != expected["sha256"]:
            raise IntegrityError(f"{path} is damaged: sha256 {got[:12]}, expected {expected['sha256'][:12]}")


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, or None; a damaged one is stepped over with a warning."""
    for _, path in sorted(_steps(run).items(), reverse=True):
        try:
            verify(path)
            return path
        except IntegrityError as error:
            print(f"warning: stepping over a damaged checkpoint: {error}", flush=True)
    return None


def resolve(path: str | Path) -> Path:
    """A run (its newest verified checkpoint), a checkpoint, or an exported model -> the folder with the weights."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a run directory or a checkpoint")
    if (path / "model.safetensors").is_file():
        if (path / "MANIFEST.json").is_file():
            verify(path)
        return path
    found = newest(path) if path.is_dir() else None
    if found is None:
        raise UserError(f"{path} holds no checkpoint; expected a run with checkpoints/step-*, or a checkpoint")
    return found


def step_of(checkpoint: Path) -> int | None:
    """Optimizer step of a checkpoint folder, None for an exported model."""
    match = _STEP.match(checkpoint.name)
    return int(match[1]) if match else None


def read_weights(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """A state dict of a resolved checkpoint. name 'best' is EMA where there is one, else the model."""
    name = weights_named(checkpoint, name)
    path = checkpoint / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"{checkpoint} has no '{name}' weights; it has {', '.join(weight_names(checkpoint))}")
    return load_file(path)


def weights_named(checkpoint: Path, name: str) -> str:
    """'best' -> 'ema' where the checkpoint has it, else 'model'; any other name stays."""
    if name != "best":
        return name
    return "ema" if (checkpoint / "ema.safetensors").is_file() else "model"


def weight_names(checkpoint: Path) -> list[str]:
    return sorted(path.stem for path in checkpoint.glob("*.safetensors"))


def read_training_state(checkpoint: Path) -> dict:
    path = checkpoint / "training.pt"
    if not path.is_file():
        raise UserError(f"{checkpoint} holds weights only, no training state; it cannot be resumed")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_strictly(module: torch.nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """load_state_dict that names the first key that is missing, unexpected, of another shape, or not finite."""
    own = module.state_dict()
    for problem, keys in (("lacks", own.keys() - weights.keys()), ("has unexpected", weights.keys() - own.keys())):
        if keys:
            raise MismatchError(f"{source} {problem} '{min(keys)}' ({len(keys)} key(s)); it is of another architecture")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise MismatchError(f"{source}: '{key}' has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise IntegrityError(f"{source}: '{key}' holds values that are not finite; use an older checkpoint")
    module.load_state_dict(weights)


def export(source: Path, target: Path, weights: str = "best") -> None:
    """Copy a checkpoint's configuration and one set of weights to target/ as a model that stands on its own."""
    checkpoint = resolve(source)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copy2(checkpoint / "config.json", partial / "config.json")
    name = weights_named(checkpoint, weights)
    shutil.copy2(checkpoint / f"{name}.safetensors", partial / "model.safetensors")
    partial.rename(target)


def _steps(run: Path) -> dict[int, Path]:
    folder = run / "checkpoints"
    found = [(_STEP.match(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return {int(match[1]): path for match, path in found if match and path.is_dir()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
