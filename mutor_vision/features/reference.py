"""Reference statistics of one's own images. One pass that keeps moments and no features, so 1.28 million images need no
more memory than a thousand."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import IntegrityError, UserError
from mutor_vision.features.extract import CHUNK, chunks, gather_chunks
from mutor_vision.features.extractors import Extractor, identity_text
from mutor_vision.features.moments import LAYER_KEYS, Moments, statistics_arrays
from mutor_vision.features.sources import SourceImages
from mutor_vision.keyed_random import permutation
from mutor_vision.runtime import Runtime
from mutor_vision.storage.files import read_tensors, write_tensors
from mutor_vision.storage.npz_writer import NpzImageWriter, write_arrays

SNAPSHOT_EVERY = 40  # chunks of a rank between two snapshots; a kill loses at most these


@dataclass
class Progress:
    """What one rank has measured of the chunks before chunk number `next_chunk`."""

    moments: dict[str, Moments]
    digests: list[Tensor]
    next_chunk: int


def write_reference(
    source: SourceImages,
    extractor: Extractor,
    runtime: Runtime,
    out: Path,
    *,
    batch: int = 50,
    keep_images: int = 10_000,
    work: Path | None = None,
) -> dict:
    """Collective. Measure a folder and write an npz in ADM's keys: mu, sigma (and mu_s, sigma_s for Inception),
    `arr_0` with `keep_images` images drawn at random for precision and recall (0 = none), `arr_1` with their labels.
    work: folder for snapshots, with which the same call continues after a kill. Returns the recorded protocol."""
    if keep_images < 0 or keep_images == 1:
        raise UserError(f"kept images are {keep_images}, expected 2 or more, or 0 for none")
    if source.count < 2:
        raise IntegrityError(f"{source.path} has {source.count} image(s), expected 2 or more; a covariance needs them")
    extractor.to(runtime.device)
    state = _resume(work, source, extractor, runtime)
    error = None
    try:
        since = 0
        for start, chunk in chunks(
            source, extractor, runtime, batch=batch, work=None, title="reference", first=state.next_chunk
        ):
            for layer, moments in state.moments.items():
                moments.update(chunk[layer], start)
            state.digests.append(chunk["digests"])
            state.next_chunk = start // CHUNK + 1
            since += 1
            if work is not None and since % SNAPSHOT_EVERY == 0:
                _save(state, _snapshot_path(work, source, extractor, runtime))
    except Exception as caught:  # raised on every rank below, else the others would wait for this one for ever
        error = caught
    runtime.raise_together(error)
    for moments in state.moments.values():
        moments.all_reduce(runtime)
    digests = gather_chunks(state.digests, source.count, (16,), torch.uint8, runtime)
    protocol = {
        "n": source.count,
        "image_size": [source.height, source.width],
        "extractor": extractor.identity,
        "source": source.describe(),
        "images_sha256": hashlib.sha256(digests.numpy().tobytes()).hexdigest(),
        "class_names": list(source.class_names),
    }
    if runtime.is_main:
        statistics = {layer: moments.total() for layer, moments in state.moments.items()}
        _write(out, source, statistics_arrays(statistics, protocol), keep_images)
    if work is not None:
        _snapshot_path(work, source, extractor, runtime).unlink(missing_ok=True)
    runtime.barrier()
    return protocol


def _write(out: Path, source: SourceImages, arrays: dict[str, np.ndarray], keep_images: int) -> None:
    if not keep_images:
        write_arrays(out, arrays)
        return
    count = min(keep_images, source.count)
    chosen = np.sort(permutation(0, "reference images", 0, source.count)[:count])
    if source.labels is not None:
        arrays = arrays | {"arr_1": source.labels.numpy()[chosen]}
    with NpzImageWriter(out, count, source.height, source.width, arrays) as writer:
        for index in chosen.tolist():
            writer.write(source.read(index, index + 1))


def _resume(work: Path | None, source, extractor: Extractor, runtime: Runtime) -> Progress:
    layers = [layer for layer in extractor.layers if layer in LAYER_KEYS]
    state = Progress({name: Moments(extractor.layers[name], device=runtime.device) for name in layers}, [], 0)
    path = _snapshot_path(work, source, extractor, runtime) if work is not None else None
    if path is None or not path.is_file():
        return state
    try:
        saved = read_tensors(path)
    except IntegrityError:
        return state  # an incomplete snapshot, as a crash of the machine leaves it: begin again
    for layer, moments in state.moments.items():
        for part in ("n", "mean", "scatter"):
            getattr(moments, part).copy_(saved[f"{layer}.{part}"])
    state.digests = list(saved["digests"].split(CHUNK))
    state.next_chunk = int(saved["next_chunk"])
    print(f"rank {runtime.rank}: going on at image {state.next_chunk * CHUNK:,}", flush=True)
    return state


def _save(state: Progress, path: Path) -> None:
    tensors = {"digests": torch.cat(state.digests), "next_chunk": torch.tensor(state.next_chunk)}
    for layer, moments in state.moments.items():
        moments.flush()
        tensors |= {f"{layer}.{part}": getattr(moments, part).cpu() for part in ("n", "mean", "scatter")}
    write_tensors(path, tensors)


def _snapshot_path(work: Path, source, extractor: Extractor, runtime: Runtime) -> Path:
    """Named after images, extractor, rank and number of ranks, so that a snapshot of others is never taken for it."""
    key = hashlib.sha256(f"{source.key()} {identity_text(extractor)} {CHUNK}".encode()).hexdigest()
    work.mkdir(parents=True, exist_ok=True)
    return work / f"moments-{key[:16]}-{runtime.rank}-of-{runtime.world_size}.safetensors"
