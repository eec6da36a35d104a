"""Half a minute before a long run: is it what was meant, does it learn, will it fit, how long will it take?"""

import dataclasses
import gc
import math
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mutor_vision.config import TrainConfig
from mutor_vision.data.images import grid, save_png, to_uint8
from mutor_vision.data.order import read_batch
from mutor_vision.errors import UserError
from mutor_vision.keyed_random import permutation
from mutor_vision.names import printable, title
from mutor_vision.runtime import Runtime
from mutor_vision.storage import checkpoint
from mutor_vision.storage.outputs import existing
from mutor_vision.tokenizer.model import load_tokenizer
from mutor_vision.training.inputs import Inputs, open_inputs
from mutor_vision.training.state import State
from mutor_vision.training.step import means_of, train_step, zero_sums

LONG = 5000  # optimizer steps from which a new run is tried first
STEPS = 12  # on one batch, and
SECONDS = 20.0  # no longer than this, once four are done
GIB = 1024**3


def preflight(config: TrainConfig, out: Path, runtime: Runtime) -> None:
    """Collective: look at the data, train a model of its own on one batch, and print what was found; a picture of
    training images decoded from their codes is written beside `out`. Nothing that training does depends on it.

    Raises UserError when the run cannot work: a loss that is not finite or does not fall, or a disk that will not hold
    the checkpoints."""
    begun = time.perf_counter()
    inputs = open_inputs(config, runtime)
    config = inputs.config
    picture = out.with_name(f"{out.name}-preflight.png")
    first, losses, seconds, bytes_kept = _overfit(inputs, runtime)
    needed = bytes_kept * (config.keep + 1)  # one more while the newest is being written
    disk = existing(out.absolute())
    free = shutil.disk_usage(disk).free
    if runtime.is_main:
        _save_picture(inputs, picture)
        uniform, hours = math.log(config.model.vocab_size), config.steps * seconds / 3600
        compiled = " and before compilation" if config.compile != "off" and runtime.device.type == "cuda" else ""
        lines = [
            ("images", f"{len(inputs.train_images):,} to train on, {len(inputs.val_images):,} held out"),
            ("classes", _classes(inputs)),
            ("pictures", f"{picture}: training images from their codes, with their classes; look at them"),
            ("first loss", f"{first:.3f} nats a token; all of {config.model.vocab_size:,} codes alike are {uniform:.3f}"
                           + _surprise(first, uniform, bool(config.init))),
            ("one batch", f"loss {losses[0]:.3f} -> {losses[-1]:.3f} after {len(losses) - 1} steps on it"),
            ("memory", f"{_memory(runtime) / GIB:.1f} GiB in this process at most"),
            ("disk", f"{needed / GIB:.2f} GiB for {config.keep} checkpoints and the next; {free / GIB:.1f} GiB free"),
            ("time", f"{seconds:.3f} s a step, {hours:,.1f} hours for {config.steps:,}, without validation{compiled}"),
        ]  # fmt: skip
        print(f"preflight of {out} ({time.perf_counter() - begun:.0f} s; --skip-preflight leaves it out)")
        print("\n".join(f"  {name:<11}{text}" for name, text in lines), flush=True)
    error, tried = None, f"in {len(losses) - 1} steps on one batch at lr {config.lr:g}"
    if not all(map(math.isfinite, losses)):
        error = UserError(f"the loss becomes {losses[-1]} {tried}; lower lr")
    elif losses[-1] >= losses[0]:
        error = UserError(f"the loss does not fall: {losses[0]:.3f} -> {losses[-1]:.3f} {tried}; change lr, or pass "
                          "--skip-preflight if that is meant")  # fmt: skip
    elif needed > free:
        error = UserError(f"checkpoints need {needed / GIB:.2f} GiB, {free / GIB:.2f} GiB are free at "
                          f"{disk}; make space, lower keep, or give another --out")  # fmt: skip
    runtime.raise_together(error)


def _overfit(inputs: Inputs, runtime: Runtime) -> tuple[float, list[float], float, int]:
    """Collective: train on the run's first batch again and again -> next-token loss before the first step, the loss
    that is trained before each, seconds of a step, bytes of a checkpoint."""
    # Without warm-up, which would not move it; without compilation, which would take longer than the trial.
    config = dataclasses.replace(inputs.config, compile="off", warmup_steps=0)
    state = State(config, inputs.base, runtime)
    trained = sum(each.numel() for each in state.objective.parameters() if each.requires_grad)
    bytes_kept = checkpoint.bytes_of(state.weights()) + 8 * trained
    state.parallelize(None)
    state.model.train()
    batch = read_batch(
        inputs.token_set, inputs.order, step=0, batch_size=config.batch_size, rank=runtime.rank,
        world_size=runtime.world_size, label_dropout=config.label_dropout, device=runtime.device,
        features=config.reads_features,
    )  # fmt: skip
    means: list[Any] = []
    seconds, begun = [], time.perf_counter()
    while len(means) <= STEPS and (len(means) < 4 or not _late(begun, runtime)):
        started, sums = time.perf_counter(), zero_sums(state.objective, runtime)
        train_step(state.parallel, state.objective, state.optimizer, batch, config, runtime, step=0, sums=sums,
                   skipped=state.skipped)  # fmt: skip
        means.append(means_of(runtime.all_reduce(sums), state.objective.weights(0)))
        seconds.append(time.perf_counter() - started)
    losses = [each["loss"] for each in means]
    if state.skipped[0]:
        losses[-1] = math.nan
    del state, batch, sums
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return means[0]["next_token"], losses, sorted(seconds[1:])[len(seconds[1:]) // 2], bytes_kept


def _late(begun: float, runtime: Runtime) -> bool:
    """Collective: whether any process has used its time, so that all stop at the same step."""
    late = torch.tensor([int(time.perf_counter() - begun > SECONDS)], device=runtime.device)
    return bool(runtime.all_reduce(late).item())


def _save_picture(inputs: Inputs, path: Path) -> None:
    """Four images of each of up to six classes, from their codes."""
    tokens, columns = inputs.token_set, 4
    labels = tokens.labels[inputs.train_images].numpy()
    counts = np.bincount(labels, minlength=len(tokens.class_names))
    order = permutation(0, "preflight", 0, len(labels))
    classes = [label for label in np.argsort(-counts, kind="stable") if counts[label] >= columns][:6]
    if not classes:
        return
    chosen = np.concatenate([order[labels[order] == label][:columns] for label in classes])
    images = torch.from_numpy(inputs.train_images[chosen])
    codes = tokens.take(images, torch.zeros_like(images)).cpu()
    tokenizer = load_tokenizer(tokens.tokenizer_path)
    pictures = torch.cat([to_uint8(tokenizer.decode(part)) for part in codes.split(1)])
    save_png(grid(pictures, columns, [title(tokens.class_names[label]) for label in classes]), path)


def _classes(inputs: Inputs) -> str:
    names = inputs.token_set.class_names
    counts = np.bincount(inputs.token_set.labels[inputs.train_images].numpy(), minlength=len(names))
    text = f"{len(names):,} with {counts.min():,} to {counts.max():,} images, {int(np.median(counts)):,} in the middle"
    empty = [printable(names[label], limit=40) for label in np.flatnonzero(counts == 0)]
    return text + (f"; none in {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}" if empty else "")


def _surprise(loss: float, uniform: float, begun_from_weights: bool) -> str:
    if not begun_from_weights and abs(loss - uniform) > 0.1 * uniform:
        return "; a new model should start there"
    if begun_from_weights and loss > uniform:
        return "; weights that know these codes should start below that: were they trained with this tokenizer?"
    return ""


def _memory(runtime: Runtime) -> int:
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
