"""Cross-entropies on held-out images."""

import numpy as np
import torch
from torch import Tensor

from mutor_vision.config import TrainConfig
from mutor_vision.data.token_set import TokenSet
from mutor_vision.keyed_random import derived_seed
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.objective import Objective
from mutor_vision.objectives.registers import add_registers
from mutor_vision.runtime import Runtime, to_device
from mutor_vision.training.step import forward_batch


@torch.no_grad()
def validate(
    model: Transformer, token_set: TokenSet, images: np.ndarray, config: TrainConfig, runtime: Runtime
) -> dict[str, float]:
    """Mean cross-entropies in nats per token on the first view of `images`, with the same registers every time."""
    training = model.training
    objective = Objective(model.eval())
    sums = torch.zeros(4, dtype=runtime.sum_dtype, device=runtime.device)
    mine, batch = images[runtime.rank :: runtime.world_size], forward_batch(config, runtime)
    for i in range(0, len(mine), batch):
        ids = mine[i : i + batch]
        first_view = torch.zeros(len(ids), dtype=torch.int64)
        codes = to_device(token_set.take(torch.from_numpy(ids), first_view), runtime.device)
        labels = to_device(token_set.labels[torch.from_numpy(ids)], runtime.device)
        sequence = add_registers(codes, config.registers, register_token=model.register_token,
                                 seed=derived_seed(0, "validation"), sample_index=ids)  # fmt: skip
        with runtime.autocast():
            terms = objective(labels, sequence)
        sums[0] += terms.next_token
        sums[1] += sequence.num_next_token_targets
        sums[2] += terms.register
        sums[3] += sequence.num_register_targets
    model.train(training)
    return means_of(runtime.all_reduce(sums), "register", config.registers.weight if config.registers.count else None)


def means_of(sums: Tensor, other: str, weight: float | None) -> dict[str, float]:
    """Means of the sums; other: name of the second loss; weight: its share, None = there is none."""
    next_token_sum, num_next_token, other_sum, num_other = sums.tolist()
    next_token = next_token_sum / num_next_token
    if weight is None:
        return {"loss": next_token, "next_token": next_token}
    mean = other_sum / max(1.0, num_other)
    return {"loss": (1 - weight) * next_token + weight * mean, "next_token": next_token, other: mean}
