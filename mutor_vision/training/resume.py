"""A run directory is begun, or continued from its newest checkpoint."""

import os
import shutil
from pathlib import Path

from mutor_vision.errors import MismatchError
from mutor_vision.model.base import RECORD
from mutor_vision.settings import differences
from mutor_vision.storage import checkpoint, lock
from mutor_vision.storage.files import read_json, sha256, write_json
from mutor_vision.training.inputs import Inputs
from mutor_vision.training.state import State

# What may change when a run is continued: how long it lasts and what it reports. The rest would be another experiment.
RESUMABLE = {"steps", "log_every", "val_every", "val_images", "sample_every", "sample_classes", "sample_cfg_scale",
             "save_every", "keep", "micro_batch", "activation_checkpointing", "parallel", "codes", "val_codes", "init",
             "eval_every", "eval_reference", "eval_features", "eval_weights", "eval_images", "compile",
             "max_skipped"}  # fmt: skip


def resume(out: Path, inputs: Inputs, state: State) -> Path | None:
    """Collective: load the weights of the newest checkpoint of `out` and return it, or begin the run directory and
    return None.

    Raises MismatchError when the run was started with other settings, another token set or another base, and what
    checkpoint.open_run raises."""
    config, base, runtime = state.config, inputs.base, state.runtime
    found = checkpoint.open_run(out, state.kind)
    lock.hold(out, runtime)  # not before: what is no run of ours gets no file
    record = base.record if base else None
    if found is not None:
        # A schedule that ends at a share of `steps` makes another run of another number of them.
        fixed = config.schedule != "constant" or "%" in config.schedule_units
        allowed = RESUMABLE - ({"steps"} if fixed else set())
        checkpoint.resolve(out / "tokenizer")  # verifies it: found now, not when the trained model is to sample
        before = checkpoint.read_config(found, state.kind, type(config))
        changed = [d for d in differences(before, config) if d.split(":")[0] not in allowed]
        if sha256(out / "token_set.json") != inputs.token_set.identity:
            changed.append(f"token set: {config.codes} is another one")
        if bool(before.init) != bool(base) or (base and read_json(out / RECORD) != record):
            changed.append(f"init: '{config.init}' holds other weights than '{before.init}' did")
        if changed:
            raise MismatchError(f"{out} was trained with other settings ({'; '.join(changed)}); use another --out")
        state.load(found)
    runtime.barrier()  # every rank has looked at the folder before rank 0 writes to it
    if runtime.is_main:
        checkpoint.write_config(out, state.kind, config)
        if found is not None:
            checkpoint.tidy(out, found, config.keep)
        else:
            if base:
                write_json(out / RECORD, record)
            shutil.copyfile(Path(config.codes) / "manifest.json", out / "token_set.json")
            shutil.copytree(inputs.token_set.tokenizer_path, out / "tokenizer", copy_function=_link, dirs_exist_ok=True)
    runtime.barrier()
    return found


def _link(source: str, target: str) -> None:
    # A hard link costs no space; another file system takes a copy.
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
