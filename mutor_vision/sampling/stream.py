"""A loaded run -> images, by process and in order: for `mutor sample`, evaluation and the grids of training.

Image i of a sampling run depends on the weights, the seed, i, its label and the settings, and on nothing else: not on
the batch size, the order, or the number of processes.
"""

import dataclasses
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mutor_vision.config import TrainConfig
from mutor_vision.data import images
from mutor_vision.errors import UserError
from mutor_vision.keyed_random import permutation, uniforms
from mutor_vision.model.transformer import Transformer
from mutor_vision.names import title
from mutor_vision.runtime import Runtime, to_device
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.load import LoadedModel, training_model

LABEL_PLANS = ("balanced", "random")
# Images in one call of the tokenizer's decoder, whose activations take the memory. 1 on a CPU: convolution kernels
# round differently per batch size, and image i must not depend on it.
DECODED_AT_ONCE = {"cpu": 1, "cuda": 16}
LARGEST_BATCH = {"cuda": 256, "cpu": 32}  # images; by then the matrix products are as fast as they get


def label_plan(num: int, num_classes: int, plan: str = "balanced", seed: int = 0) -> Tensor:
    """(num,) int64 labels in a seeded, shuffled order. 'balanced': as equal numbers of each class as `num` allows;
    'random': uniform draws, LlamaGen's protocol. The order matters: Inception Score is taken over consecutive parts."""
    if plan == "random":
        draws = uniforms(seed, "label", np.arange(num), 1)[:, 0]
        return torch.from_numpy((draws * num_classes).astype(np.int64))
    if plan == "balanced":
        return torch.from_numpy(permutation(seed, "label", 0, num) % num_classes)
    raise UserError(f"labels is '{plan}', expected one of {', '.join(LABEL_PLANS)}")


def sample_images(
    loaded: LoadedModel, labels: Tensor, indices: np.ndarray, settings: SampleSettings, seed: int
) -> Tensor:
    """labels (B,) in [0, num_classes), indices (B,) -> uint8 images (B, 3, H, W) on the CPU."""
    return _arrived(*_launch(loaded, labels, indices, settings, seed))


@torch.no_grad()
def _launch(
    loaded: LoadedModel, labels: Tensor, indices: np.ndarray, settings: SampleSettings, seed: int
) -> tuple[Tensor, torch.cuda.Event | None]:
    """As sample_images, but on CUDA the host does not wait: the images are there once the event has happened."""
    device = loaded.runtime.device
    with loaded.runtime.autocast():
        codes = generate(
            loaded.transformer, to_device(labels, device), settings, seed=seed, indices=np.asarray(indices),
            decoder=loaded.decoder,
        )  # fmt: skip
    decoded = decode_images(loaded, codes)
    if device.type != "cuda":
        return decoded, None
    host = torch.empty(decoded.shape, dtype=decoded.dtype, pin_memory=True)
    host.copy_(decoded, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _arrived(images: Tensor, event: torch.cuda.Event | None) -> Tensor:
    if event is not None:
        event.synchronize()
    return images


def decode_images(loaded: LoadedModel, codes: Tensor) -> Tensor:
    """codes (B, h, w) -> uint8 (B, 3, H, W) on their device."""
    at_once = DECODED_AT_ONCE[codes.device.type]
    return torch.cat([_decoded(loaded, part) for part in codes.split(at_once)])


def _decoded(loaded: LoadedModel, codes: Tensor) -> Tensor:
    tokenizer = loaded.tokenizer
    if not loaded.resize:
        return images.to_uint8(tokenizer.decode(codes))
    # LlamaGen's protocol for its 384-pixel models: bicubic without antialiasing, on pixels that are not yet clamped.
    pixels = tokenizer.decoder(tokenizer.post_quant_conv(tokenizer.quantizer.lookup(codes))).float()
    return images.to_uint8(F.interpolate(pixels, size=loaded.image_size, mode="bicubic"))


def sample_stream(
    loaded: LoadedModel, labels: Tensor, settings: SampleSettings, seed: int, batch_size: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Images 0..len(labels)-1, shared among the processes: yields this process's (indices (b,), uint8 (b, 3, H, W)).

    Round r covers the indices from r * batch_size * world_size; every process has the same number of rounds, the last
    of which may be empty for some.
    """
    runtime, count = loaded.runtime, len(labels)
    firsts = range(runtime.rank * batch_size, count + runtime.rank * batch_size, batch_size * runtime.world_size)
    rounds = (np.arange(first, max(first, min(first + batch_size, count))) for first in firsts)
    return sample_batches(loaded, labels, rounds, settings, seed)


def sample_batches(
    loaded: LoadedModel, labels: Tensor, batches: Iterable[np.ndarray], settings: SampleSettings, seed: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Each batch of image indices (b,), into labels -> (indices, uint8 (b, 3, H, W) on the CPU); b may be 0.

    On CUDA a batch is yielded when the next one has been launched, so that the device goes on while its images are
    fetched, measured or written."""
    ahead = 1 if loaded.runtime.device.type == "cuda" else 0
    waiting: deque[Any] = deque()
    for indices in batches:
        if len(indices):
            launched = _launch(loaded, labels[torch.from_numpy(indices)], indices, settings, seed)
        else:
            launched = torch.empty(0, 3, *loaded.image_size, dtype=torch.uint8), None
        waiting.append((indices, launched))
        if len(waiting) > ahead:
            indices, launched = waiting.popleft()
            yield indices, _arrived(*launched)
    for indices, launched in waiting:
        yield indices, _arrived(*launched)


def sample_in_order(
    loaded: LoadedModel, labels: Tensor, settings: SampleSettings, seed: int, batch_size: int
) -> Iterator[Tensor]:
    """The same, gathered: every process sees all images (b, 3, H, W) uint8 in the order of their indices."""
    runtime = loaded.runtime
    done = 0
    for _, part in sample_stream(loaded, labels, settings, seed, batch_size):
        padded = torch.zeros(batch_size, *part.shape[1:], dtype=torch.uint8)
        padded[: len(part)] = part
        gathered = runtime.gather(padded.to(runtime.device)).cpu()
        count = min(batch_size * runtime.world_size, len(labels) - done)
        done += count
        yield gathered[:count]


def default_batch_size(loaded: LoadedModel) -> int:
    """Collective: images at once and process, the same on all: what half of the free memory holds, a power of two."""
    runtime = loaded.runtime
    memory = free_bytes(runtime.device) / 2 - DECODED_AT_ONCE[runtime.device.type] * decoder_bytes(loaded)
    fitting = max(1, int(memory / bytes_per_image(loaded)))
    fitting = int(runtime.gather(torch.tensor([fitting], device=runtime.device)).min())
    return min(LARGEST_BATCH[runtime.device.type], 2 ** (fitting.bit_length() - 1))


def bytes_per_image(loaded: LoadedModel) -> int:
    """Memory of one image while its codes are drawn: cache and logits of two streams."""
    config, dtype = loaded.config.model, loaded.runtime.autocast_dtype or torch.float32
    cache = 2 * config.layers * 2 * config.num_tokens * config.dim * dtype.itemsize
    # Logits of both streams, guided, filtered, as probabilities, and four buffers of noise, all of four bytes; a
    # forecast has them for every input of a pass.
    made = loaded.decoding
    inputs = made["window"] + made["drafts"] if made["decode"] == "forecast" else 1
    return cache + inputs * config.vocab_size * (5 + 4) * 4


def decoder_bytes(loaded: LoadedModel) -> int:
    """Memory of one image in the tokenizer's decoder: six of the widest float32 activation at full size, of which a
    residual block holds five (its input, normalised, convolved, normalised, convolved) and a convolution the rest."""
    height, width = (side * loaded.tokenizer.config.downsample for side in loaded.config.model.grid)
    return 6 * max(loaded.tokenizer.config.channels[:2]) * height * width * 4


def free_bytes(device: torch.device) -> int:
    """Memory that this process may take: the GPU's, or its share of what the machine has left."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: less exact, as it leaves out what the system would give back
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def settings_in_training(config: TrainConfig) -> SampleSettings:
    return SampleSettings(cfg_scale=config.sample_cfg_scale if config.label_dropout else 1.0)


def save_training_grid(transformer: Transformer, run: Path, step: int, config: TrainConfig, runtime: Runtime) -> Path:
    """samples/step-<step>.png of a run in training: classes spread over all, the same seeds every time. Call on one
    rank."""
    loaded = training_model(transformer, run, config, dataclasses.replace(runtime, rank=0, world_size=1))
    columns = 8
    classes = spread_classes(config.model.num_classes, config.sample_classes)
    labels = torch.tensor(classes).repeat_interleave(columns)
    batches = list(sample_in_order(loaded, labels, settings_in_training(config), 0, default_batch_size(loaded)))
    names = [title(loaded.class_names[c]) for c in classes]
    path = run / "samples" / f"step-{step:07d}.png"
    images.save_png(images.grid(torch.cat(batches), columns, names), path)
    return path


def spread_classes(num_classes: int, count: int) -> list[int]:
    count = min(count, num_classes)
    return [i * num_classes // count for i in range(count)]
