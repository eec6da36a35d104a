"""The Fréchet distance while a model trains: the same seeds and labels every time, so that its values compare with
each other and with nothing else."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mutor_vision.config import TrainConfig
from mutor_vision.errors import MismatchError
from mutor_vision.features import extractors
from mutor_vision.features.extractors import Extractor
from mutor_vision.features.moments import Moments, read_protocol, read_statistics
from mutor_vision.metrics import frechet
from mutor_vision.metrics.evaluate import to_device
from mutor_vision.metrics.guards import recorded_extractor
from mutor_vision.model.transformer import Transformer
from mutor_vision.runtime import Runtime, exact_float32
from mutor_vision.sampling.load import training_model
from mutor_vision.sampling.stream import default_batch_size, label_plan, sample_stream, settings_in_training
from mutor_vision.storage.npz import Npz


def distance_measure(config: TrainConfig, runtime: Runtime) -> Callable[[Transformer, Path], dict[str, float]]:
    """Collective (model, run) -> {'fd', 'fd_images'} of samples with fixed seeds and labels, guided like the sample
    grids. Everything that can be wrong with the reference or the extractor is raised here, before training."""
    extractor = extractors.load_extractor(config.eval_features, config.eval_weights or None).to(runtime.device)
    reference = load_reference(config.eval_reference, extractor, runtime)
    labels = label_plan(config.eval_images, config.model.num_classes)

    def measure(transformer: Transformer, run: Path) -> dict[str, float]:
        loaded = training_model(transformer, run, config, runtime)
        stream = sample_stream(loaded, labels, settings_in_training(config), 0, default_batch_size(loaded))
        return distance(extractor, reference, (images for _, images in stream), runtime)

    return measure


def load_reference(path, extractor: Extractor, runtime: Runtime) -> frechet.Root:
    """Statistics made by eval/reference.py with this extractor, or ADM's for Inception, ready for `distance`."""
    npz = Npz(path)
    npz.check_crc()
    recorded_extractor(read_protocol(npz), extractor, path)
    found = read_statistics(npz, {"pool": extractor.layers["pool"]})
    if "pool" not in found:
        raise MismatchError(f"{path} holds no statistics (mu, sigma); make them with eval/reference.py")
    return frechet.root(to_device(found["pool"], runtime))


@torch.no_grad()
def distance(
    extractor: Extractor, reference: frechet.Root, batches: Iterable[Tensor], runtime: Runtime
) -> dict[str, float]:
    """Collective. uint8 batches (B, 3, H, W), each rank its own share (a batch may be empty) -> {'fd': distance,
    'fd_images': how many images of all ranks it is from}. The extractor is on runtime.device."""
    moments = Moments(extractor.layers["pool"], device=runtime.device)
    for images in batches:
        if len(images):
            with exact_float32():
                moments.update(extractor(images.to(runtime.device))["pool"])
    moments.all_reduce(runtime)
    statistics = moments.total()
    return {"fd": frechet.distance(statistics, reference), "fd_images": cast(int, statistics.n)}
