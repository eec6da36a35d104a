"""Images -> features, in one pass. Chunks of images are divided among ranks. Features go into moments as they come, and
are gathered where a metric needs every row. On request finished chunks are saved, so that a killed run can continue."""

import hashlib
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from mutor_vision.errors import IntegrityError
from mutor_vision.features.extractors import Extractor, identity_text
from mutor_vision.features.moments import LAYER_KEYS, Moments
from mutor_vision.features.sources import in_order
from mutor_vision.progress import progress
from mutor_vision.runtime import Runtime, exact_float32, to_device
from mutor_vision.storage.files import read_tensors, write_json, write_tensors

CHUNK = 250  # images: a rank works on one chunk at a time, and a kill loses at most that
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Extracted:
    """Features of a whole source, the same on every rank."""

    moments: dict[str, Moments]  # per layer
    rows: dict[str, Tensor]  # kept layers (N, D) float32 on the CPU
    digests: Tensor  # (N, 16) uint8, a hash of each image's pixels
    mean_rgb: Tensor  # (N, 3) float32, 0..255
    constant: Tensor  # (N,) uint8, 1 where all pixels of an image are equal

    @property
    def images_sha256(self) -> str:
        """Of all pixels in order, so a folder and an npz of the same images have the same."""
        return hashlib.sha256(self.digests.numpy().tobytes()).hexdigest()


def extract(
    source,
    extractor: Extractor,
    runtime: Runtime,
    *,
    batch: int = 50,
    groups: int = 1,
    keep: tuple[str, ...] = (),
    work: Path | None = None,
    title: str = "images",
) -> Extracted:
    """Collective. Run every image of a source through an extractor (on runtime.device).

    batch: images per forward pass. groups: of the moments. keep: layers whose rows are gathered. work: a folder for
    the features of finished chunks, with which the same call continues after a kill."""
    layers = [layer for layer in extractor.layers if layer in LAYER_KEYS]
    moments = {layer: Moments(extractor.layers[layer], groups, runtime.device) for layer in layers}
    kept_names = (*keep, "digests", "mean_rgb", "constant")
    kept: dict[str, list[Tensor]] = {name: [] for name in kept_names}
    error = None
    try:
        for start, chunk in chunks(source, extractor, runtime, batch=batch, work=work, title=title):
            for layer in layers:
                moments[layer].update(chunk[layer], start)
            for name in kept_names:
                kept[name].append(chunk[name].clone())  # a chunk's own memory is pinned on CUDA, and used again
    except Exception as caught:  # raised on every rank below, else the others would wait for this one for ever
        error = caught
    runtime.raise_together(error)
    for layer in layers:
        moments[layer].all_reduce(runtime)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    shapes = {layer: ((width,), torch.float32) for layer, width in extractor.layers.items()}
    shapes |= {"digests": ((DIGEST_BYTES,), torch.uint8), "mean_rgb": ((3,), torch.float32)}
    shapes |= {"constant": ((), torch.uint8)}
    rows = {name: gather_chunks(kept[name], source.count, *shapes[name], runtime) for name in kept_names}
    return Extracted(moments, {name: rows[name] for name in keep}, rows["digests"], rows["mean_rgb"], rows["constant"])


def chunks(
    source, extractor: Extractor, runtime: Runtime, *, batch: int, work: Path | None, title: str, first: int = 0
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(index of its first image, tensors) of each of this rank's chunks from chunk number `first` on: chunk c belongs
    to rank c % world_size. Tensors are on the CPU: every layer of the extractor, and what Extracted has per image.

    On CUDA a chunk is yielded after the next one has been launched, so that the device is never idle meanwhile."""

    folder = _work_folder(work, source, extractor) if work is not None else None
    if folder and runtime.is_main:
        write_json(folder / "README.json", {"extractor": extractor.identity, "images": source.count})
    starts = list(range(0, source.count, CHUNK))[first:]
    mine = [start for start in starts if start // CHUNK % runtime.world_size == runtime.rank]
    stops = {start: min(start + CHUNK, source.count) for start in mine}
    paths = {start: folder / f"chunk-{start // CHUNK:06d}.safetensors" if folder else None for start in mine}
    missing = {start for start in mine if not _is_whole(paths[start], stops[start] - start)}
    spans = {start: [(i, min(i + batch, stops[start])) for i in range(start, stops[start], batch)] for start in missing}
    pictures = in_order(source, [span for start in mine if start in missing for span in spans[start]])
    ahead = 1 if runtime.device.type == "cuda" else 0
    waiting: deque[tuple[int, _Launched | _Kept]] = deque()
    with progress(total=sum(stops[start] - start for start in mine), desc=title, unit="img") as bar:
        for start in mine:
            if start in missing:
                batches = _counted(islice(pictures, len(spans[start])), bar)
                waiting.append((start, _Launched(batches, extractor, runtime, paths[start])))
            else:
                waiting.append((start, _Kept(cast(Path, paths[start]))))
                bar.update(stops[start] - start)
            if len(waiting) > ahead:
                start, chunk = waiting.popleft()
                yield start, chunk.tensors()
        for start, chunk in waiting:
            yield start, chunk.tensors()


def gather_chunks(
    parts: list[Tensor], count: int, shape: tuple[int, ...], dtype: torch.dtype, runtime: Runtime
) -> Tensor:
    """Collective. Each rank's chunks, in order -> all rows (count, *shape) in index order."""
    if runtime.world_size == 1:
        return torch.cat(parts)
    per_rank = -(-count // (CHUNK * runtime.world_size))
    here = torch.zeros(per_rank, CHUNK, *shape, dtype=dtype, device=runtime.device)
    for index, part in enumerate(parts):
        here[index, : len(part)] = part.to(runtime.device)
    # Chunk c is the (c // world_size)-th of rank c % world_size; what a short chunk lacks lies behind the last image.
    gathered = runtime.gather(here).cpu()
    rows = rearrange(gathered, "(rank chunk) row ... -> (chunk rank row) ...", rank=runtime.world_size)
    return rows[:count].contiguous()


class _Launched:
    """A chunk whose features are being computed. On CUDA its constructor does not synchronise."""

    # Not inference_mode: the batches may come from the sampler, whose buffers are made in here and written again
    # outside, which inference mode forbids.
    @torch.no_grad()
    def __init__(self, batches: Iterator[Tensor], extractor: Extractor, runtime: Runtime, path: Path | None):
        self.path, self.event = path, None
        features, facts = [], []
        for images in batches:
            with exact_float32():  # for the extractor alone: the iterator may be the sampler, which has its own rule
                features.append(extractor(to_device(images, runtime.device)))
            facts.append(_facts(images))
        found = {name: torch.cat([part[name] for part in features]) for name in features[0]}
        if runtime.device.type == "cuda":
            pinned = {name: torch.empty(value.shape, pin_memory=True) for name, value in found.items()}
            found = {name: pinned[name].copy_(value, non_blocking=True) for name, value in found.items()}
            self.event = torch.cuda.Event()
            self.event.record()
        self.found = found | {name: torch.cat([part[name] for part in facts]) for name in facts[0]}

    def tensors(self) -> dict[str, Tensor]:
        if self.event is not None:
            self.event.synchronize()
        if self.path is not None:
            write_tensors(self.path, self.found)
        return self.found


@dataclass(frozen=True)
class _Kept:
    """A chunk whose features an earlier run has saved."""

    path: Path

    def tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.path)


def _counted(batches: Iterator[Tensor], bar) -> Iterator[Tensor]:
    """The same batches, counted by the progress bar."""
    for images in batches:
        yield images
        bar.update(len(images))


def _facts(batch_images: Tensor) -> dict[str, Tensor]:
    """What Extracted has of each image beside features."""
    flat = batch_images.flatten(1)
    hashes = (hashlib.blake2b(image.numpy().data, digest_size=DIGEST_BYTES).digest() for image in flat.contiguous())
    return {
        "digests": torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.uint8).view(-1, DIGEST_BYTES),
        "mean_rgb": batch_images.float().mean((2, 3)),
        "constant": (flat == flat[:, :1]).all(1).to(torch.uint8),
    }


def forget(work: Path, source, extractor: Extractor) -> None:
    """Remove the saved features of a source."""
    shutil.rmtree(_work_folder(work, source, extractor), ignore_errors=True)


def _work_folder(work: Path, source, extractor: Extractor) -> Path:
    """A folder named after images and extractor, so that features of others are never taken for theirs."""
    key = hashlib.sha256(f"{source.key()} {identity_text(extractor)} {CHUNK}".encode()).hexdigest()
    folder = work / f"features-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_whole(path: Path | None, count: int) -> bool:
    """Whether a file has features of `count` images, as they were written. Another is computed again."""
    if path is None or not path.is_file():
        return False
    try:
        return all(len(value) == count for value in read_tensors(path).values())
    except IntegrityError:
        return False
