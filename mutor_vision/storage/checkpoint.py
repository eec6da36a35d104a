"""How runs and checkpoints are saved and read.

    RUN/config.json                     kind, version and the whole resolved configuration
    RUN/checkpoints/step-0000420/       config.json, model.safetensors, ema.safetensors, training.pt, MANIFEST.json
                                        and, of a sharded training, optimizer/ with the shards of its moments
    RUN/tokenizer/                      a copy of the tokenizer, so that a run samples by itself

A checkpoint is written under a temporary name, hashed into its MANIFEST.json, flushed to the disk and then renamed, so
a folder named like a checkpoint is complete. For the same reason an old one is renamed before it is deleted. It is
deleted only after `keep` newer ones have been read again and verified. Weights are safetensors; training.pt holds
tensors and numbers only and is read with weights_only=True.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import mutor_vision
from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.names import printable
from mutor_vision.runtime import Runtime
from mutor_vision.settings import FORMAT, from_dict, to_dict
from mutor_vision.storage import seal
from mutor_vision.storage.files import check_form, clear, flush, read_json, read_tensors, write_json, written_folder
from mutor_vision.storage.foreign import read_pickle

OPTIMIZER = "optimizer"  # folder of a checkpoint: the shards of a sharded training's moments
_STEP = re.compile(r"^step-(\d{7})$")


def write_config(folder: Path, kind: str, config: Any) -> None:
    """config.json of a run, checkpoint or exported model. kind: 'tokenizer' or 'transformer'."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"format": FORMAT, "kind": kind, "mutor_vision": mutor_vision.__version__, "config": to_dict(config)}
    write_json(folder / "config.json", values)


def read_config(folder: Path, kind: str, config_type: type) -> Any:
    """The configuration in folder/config.json, which must be of `kind`; older formats are migrated."""
    path = folder / "config.json"
    values = _read_kind(folder, kind)
    written: Any = values.get("format")
    if written not in range(1, FORMAT + 1):
        raise MismatchError(f"{path} has format {written}, this version reads up to {FORMAT}; upgrade mutor_vision")
    try:
        return from_dict(config_type, values.get("config"), written)
    except UserError as error:
        raise IntegrityError(f"{path}: {error}") from None


def _read_kind(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; expected a {kind} run, or one of its checkpoints")
    values = read_json(path, dict)
    if "kind" not in values:
        raise UserError(f"{path} names no kind of model; expected a {kind} run, or one of its checkpoints")
    if values["kind"] != kind:
        raise MismatchError(f"{folder} holds a {values['kind']}, expected a {kind}")
    return values


def open_run(out: Path, kind: str) -> Path | None:
    """The checkpoint from which training in the run directory `out` continues; None when training begins, which it may
    in an empty folder or in a run of this kind that has saved nothing yet.

    Raises UserError for a path that is something else, MismatchError for a run of another kind, and IntegrityError for
    a run whose checkpoints are all damaged or gone."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out} is a file, expected a run directory, new or to be continued")
    found = newest(out)
    if found is not None:
        _read_kind(found, kind)
        return found
    if all(path.name.startswith(".") for path in out.iterdir()):  # empty, or with files of a process killed early
        return None
    if not (out / "config.json").is_file():
        raise UserError(f"{out} is not empty and no {kind} run; give a new --out")
    _read_kind(out, kind)
    if (out / "model.safetensors").is_file():
        raise UserError(f"{out} is a checkpoint or an exported model, expected a run directory; give a new --out")
    status = read_json(out / "status.json") if (out / "status.json").is_file() else {}
    if isinstance(status, dict) and status.get("state") in ("running", "done", "preempted") and status.get("step"):
        raise IntegrityError(f"{out} had a checkpoint of step {status['step']} and has none now; restore "
                             f"{out / 'checkpoints'}, or give a new --out")  # fmt: skip
    return None


Weights = Mapping[str, dict[str, Tensor] | Path]  # see save


def save(
    run: Path, step: int, kind: str, config: Any, weights: Weights, state: dict, keep: int,
    shards: Path | None = None,
) -> Path:  # fmt: skip
    """Save RUN/checkpoints/step-<step>, then remove checkpoints older than the newest `keep` that verify. Call on one
    rank.

    weights: file stem ('model', 'ema', ...) -> state dict, or the path of a safetensors file, which is moved; state:
    tensors, numbers, strings, lists and dicts; shards: folder of optimizer shards, which is moved.
    Returns the checkpoint's path. Raises UserError before anything is written when the disk has too little space; after
    any other error nothing of it is left, and the older checkpoints are.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    needed, free = bytes_of(weights) + bytes_of(state), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"the checkpoint of step {step} needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free at "
                        f"{folder}; make space, then repeat the command")  # fmt: skip
    final = folder / f"step-{step:07d}"
    partial = folder / f"{final.name}.partial"
    partial.mkdir()
    try:
        _fill(partial, step, kind, config, weights, state, shards)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk it is what stands in the way
        raise
    if final.exists():  # the same step was saved before but failed verification; replace it
        _remove(final)
    partial.rename(final)
    flush(folder)
    _prune(run, final, keep)
    return final


def _fill(
    partial: Path, step: int, kind: str, config: Any, weights: Weights, state: dict,
    shards: Path | None,
) -> None:  # fmt: skip
    write_config(partial, kind, config)
    for name, tensors in weights.items():
        if isinstance(tensors, Path):
            tensors.rename(partial / f"{name}.safetensors")
            continue
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(tensors, partial / f"{name}.safetensors")
    with open(partial / "training.pt", "wb") as file:  # given a path, torch hides that the disk is full
        torch.save(state, file)
    if shards:
        shards.rename(partial / OPTIMIZER)
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in paths:
        shutil.copymode(partial / "config.json", path)  # safetensors writes files that only the owner may read
    seal.write_manifest(partial, step=step)
    for path in partial.rglob("*"):
        flush(path)
    flush(partial)


def bytes_of(value: Any) -> int:
    """Bytes of the tensors in dicts and lists; what else they hold is small, and a path is there already."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(bytes_of, inner))


def tidy(run: Path, verified: Path, keep: int) -> None:
    """Do what a save that was killed had left to do: remove what it wrote or was removing, and checkpoints older than
    the newest `keep` that verify. verified: the newest of these, which was just hashed. Call on one rank."""
    _clear_leftovers(run / "checkpoints")
    _prune(run, verified, keep)


def _clear_leftovers(folder: Path) -> None:
    for leftover in [*folder.glob("step-*.partial"), *folder.glob("step-*.removed")]:
        clear(leftover)


def _prune(run: Path, written: Path, keep: int) -> None:
    """Remove checkpoints older than the newest `keep` that verify. `written` counts as verified: it was just hashed."""
    steps, whole = _steps(run), 0
    if len(steps) <= keep:
        return  # nothing to remove, so nothing has to be verified
    for _, path in sorted(steps.items(), reverse=True):
        if whole >= keep and path != written:
            _remove(path)
        elif path == written or _verifies(path):
            whole += 1


def _remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a kill in the middle leaves no incomplete checkpoint."""
    removed = folder.with_name(f"{folder.name}.removed")
    folder.rename(removed)
    shutil.rmtree(removed)


def check_finite(
    weights: dict[str, dict[str, Tensor]], optimizers: list[torch.optim.Optimizer], step: int, runtime: Runtime
) -> None:
    """Collective: raise UserError on every rank if a weight or an optimizer's moment on any rank is not finite. Called
    before saving and sampling. Costs one reduction and one synchronisation. weights: as for save; every rank gives the
    tensors that it holds, of a sharded model its shards."""
    tensors = {f"{name}: {key}": tensor for name, state in weights.items() for key, tensor in state.items()}
    for optimizer in optimizers:
        tensors |= {f"{name} of the optimizer, parameter {number}": tensor
                    for number, state in enumerate(optimizer.state.values()) for name, tensor in state.items()
                    if isinstance(tensor, Tensor) and tensor.dim()}  # fmt: skip
    local = {name: tensor.to_local() if hasattr(tensor, "to_local") else tensor  # DTensor takes long to import
             for name, tensor in tensors.items() if tensor.is_floating_point()}  # fmt: skip
    damaged = torch.stack([~torch.isfinite(tensor.detach()).all() for tensor in local.values()])
    if runtime.all_reduce(damaged.any().long()).item():
        named = [name for name, bad in zip(local, damaged.tolist(), strict=True) if bad]
        where = f"'{named[0]}' ({len(named)} tensor(s))" if named else "a tensor of another rank"
        raise UserError(f"{where} is not finite at step {step} and was not saved, older checkpoints are as they were; "
                        "start again with a lower lr, or with clip above 0")  # fmt: skip


def verify(checkpoint: Path) -> None:
    """Raise IntegrityError, naming the file, unless every file, and the folder's step, is what MANIFEST.json says."""
    if not (checkpoint / seal.MANIFEST).is_file():
        raise IntegrityError(f"{checkpoint} has no {seal.MANIFEST}; it is not a complete checkpoint")
    manifest, step = seal.check_manifest(checkpoint), step_of(checkpoint)
    if step is not None and manifest.get("step") != step:
        raise IntegrityError(f"{checkpoint} is the checkpoint of step {manifest.get('step')}, renamed; name it so")


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run that verifies; None when the run has no checkpoint. Damaged ones are skipped with
    a warning; raises IntegrityError when all are damaged."""
    steps = sorted(_steps(run).items(), reverse=True)
    for _, path in steps:
        if _verifies(path):
            return path
    if steps:
        raise IntegrityError(f"{run}: no checkpoint is whole, {len(steps)} damaged (the warnings name the files); "
                             "restore one of them, or begin again in another run directory")  # fmt: skip
    return None


def _verifies(checkpoint: Path) -> bool:
    """Whether verify succeeds; prints its error as a warning."""
    try:
        verify(checkpoint)
    except IntegrityError as error:
        print(f"warning: stepping over a damaged checkpoint: {printable(str(error), 1000)}", flush=True)
        return False
    return True


def resolve(path: str | Path) -> Path:
    """A run (its newest verified checkpoint), a checkpoint, or an exported model -> the folder with the weights."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a run directory or a checkpoint")
    if (path / "model.safetensors").is_file():
        if (path / seal.MANIFEST).is_file():
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
    return read_tensors(path)


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
    state = read_pickle(path)
    check_form(path, state, {"step": int})
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, name: str, checkpoint: Path) -> None:
    """load_state_dict that refuses moments of other parameters. state: of read_training_state; name: its entry. Raises
    IntegrityError."""
    try:
        optimizer.load_state_dict(state[name])
        fits = all(moment.shape == parameter.shape for parameter, moments in optimizer.state.items()
                   for moment in moments.values() if isinstance(moment, Tensor) and moment.dim())  # fmt: skip
    except (LookupError, TypeError, ValueError, AttributeError):  # what torch raises for another structure
        fits = False
    if not fits:
        raise IntegrityError(f"{checkpoint / 'training.pt'} holds no '{name}' of this model; use an older checkpoint")


def load_strictly(module: torch.nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """load_state_dict that refuses values which are not finite, and names the first key that does not fit.
    Raises MismatchError and IntegrityError."""
    own = module.state_dict()
    for problem, keys in (("lacks", own.keys() - weights.keys()), ("has unexpected", weights.keys() - own.keys())):
        if keys:
            raise MismatchError(f"{source} {problem} '{min(keys)}' ({len(keys)} key(s)); it is of another architecture")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise MismatchError(f"{source}: '{key}' has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}")
        if value.is_floating_point() != own[key].is_floating_point():  # torch would convert it without a word
            raise MismatchError(f"{source}: '{key}' is {value.dtype}, expected {own[key].dtype}; use another file")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise IntegrityError(
                f"{source}: '{key}' holds values that are not finite; use another file, or an older checkpoint"
            )
    module.load_state_dict(weights)


def export(source: Path, target: Path, weights: str = "best") -> None:
    """Copy a checkpoint's configuration and one set of weights to target/ as a model that stands on its own, sealed."""
    checkpoint = resolve(source)
    with written_folder(target) as partial:
        shutil.copy2(checkpoint / "config.json", partial / "config.json")
        name = weights_named(checkpoint, weights)
        shutil.copy2(checkpoint / f"{name}.safetensors", partial / "model.safetensors")
        seal.write_manifest(partial)


def _steps(run: Path) -> dict[int, Path]:
    folder = run / "checkpoints"
    found = [(_STEP.match(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return {int(match[1]): path for match, path in found if match and path.is_dir()}
