"""One optimizer step of the transformer, the steady path of training: nothing in it waits for the device."""

import torch
from torch import Tensor, nn

from mutor_vision.config import TrainConfig
from mutor_vision.data.order import Batch
from mutor_vision.objectives.objective import Objective, total_loss
from mutor_vision.runtime import Runtime, to_device
from mutor_vision.schedule import learning_rate
from mutor_vision.training import sharding


def train_step(
    parallel: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainConfig,
    runtime: Runtime, *, step: int, sums: Tensor, skipped: Tensor,
) -> tuple[Tensor, float]:  # fmt: skip
    """Collective: forward and backward passes over this rank's batch in parts of `forward_batch`, clipping, AdamW.

    parallel: what sharding.parallelize made of objective. step: 0-based. sums (2, losses), as `zero_sums` makes it:
    this rank's sums of losses, and their numbers of targets, are added. skipped (2,): steps that changed nothing
    because a gradient was not finite, in all and in a row, are counted. Returns the norm of the gradients before
    clipping, a scalar on the device, and the learning rate."""
    parts = batch.split(forward_batch(config, runtime))
    sequences = [
        objective.sequence(part.codes, seed=config.seed, sample_index=part.sample_index, step=step,
                           labels=part.classes, features=part.features)
        for part in parts
    ]  # fmt: skip
    # Ranks have different numbers of targets: the counts are summed before anything is divided by them.
    counts = torch.tensor([list(objective.counts(sequence).values()) for sequence in sequences]).sum(0)
    counts = runtime.all_reduce(to_device(counts, runtime.device))
    counted, weights = dict(zip(objective.names, counts, strict=True)), objective.weights(step)
    losses = torch.zeros_like(sums[0])
    for part, sequence in zip(parts, sequences, strict=True):
        with sharding.gradients_of(parallel, last_part=part is parts[-1]):
            with runtime.autocast():
                terms = parallel(part.labels, sequence)
            loss = total_loss(terms, counted, weights)
            (loss * runtime.world_size).backward()  # data parallelism averages over processes
        losses += torch.stack(list(terms.values())).detach()
    gradient_norm = sharding.clip_gradients(objective, config.clip or float("inf"))
    # The norm is over all gradients of all ranks, so they agree; AdamW leaves everything as it is where found_inf is 1.
    finite = torch.isfinite(gradient_norm)
    sharding.set_found_inf(optimizer, 1.0 - finite.float())
    sums += torch.where(finite, torch.stack([losses, (counts / runtime.world_size).to(losses.dtype)]), 0.0)
    skipped[0] += ~finite
    skipped[1] = (skipped[1] + 1) * ~finite
    lr = learning_rate(step, schedule=config.schedule, lr=config.lr, steps=config.steps,
                       warmup_steps=config.warmup_steps, min_lr=config.min_lr)  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return gradient_norm, lr


def forward_batch(config: TrainConfig, runtime: Runtime) -> int:
    """Images in one forward pass of one process."""
    return config.micro_batch or config.batch_size // runtime.world_size


def zero_sums(objective: Objective, runtime: Runtime) -> Tensor:
    """(2, losses): sums of losses, and their numbers of targets."""
    return torch.zeros(2, len(objective.names), dtype=runtime.sum_dtype, device=runtime.device)


def means_of(sums: Tensor, weights: dict[str, float]) -> dict[str, float]:
    """sums as in `zero_sums`, over all ranks, and the weight of each loss -> 'loss', and each loss's mean, without
    losses of no weight and no targets. Waits for the device."""
    means = {name: total / max(1.0, count) for name, total, count in zip(weights, *sums.tolist(), strict=True)
             if count or weights[name]}  # fmt: skip
    return {"loss": sum(weights[name] * means[name] for name in means), **means}
