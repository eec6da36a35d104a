"""Losses on held-out images."""

import numpy as np
import torch

from mutor_vision.config import TrainConfig
from mutor_vision.data.token_set import TokenSet
from mutor_vision.keyed_random import derived_seed
from mutor_vision.objectives.objective import Objective
from mutor_vision.runtime import Runtime, to_device
from mutor_vision.training.step import forward_batch, means_of, zero_sums


@torch.no_grad()
def validate(
    objective: Objective, token_set: TokenSet, images: np.ndarray, config: TrainConfig, runtime: Runtime
) -> dict[str, float]:
    """Collective: means in nats per target on the first view of `images`, with the same draws every time and the
    weights of the first step, so that values compare over a training. objective: of Objective.on_held_out."""
    model = objective.transformer
    training = model.training
    model.eval()
    sums = zero_sums(objective, runtime)
    mine, batch = images[runtime.rank :: runtime.world_size], forward_batch(config, runtime)
    for i in range(0, len(mine), batch):
        ids = mine[i : i + batch]
        first_view = torch.zeros(len(ids), dtype=torch.int64)
        codes = to_device(token_set.take(torch.from_numpy(ids), first_view), runtime.device)
        labels = to_device(token_set.labels[torch.from_numpy(ids)], runtime.device)
        sequence = objective.sequence(codes, seed=derived_seed(0, "validation"), sample_index=ids)
        with runtime.autocast():
            terms = objective(labels, sequence)
        sums[0] += torch.stack(list(terms.values()))
        sums[1] += to_device(torch.tensor(list(objective.counts(sequence).values())), runtime.device)
    model.train(training)
    return means_of(runtime.all_reduce(sums), objective.weights(0))
