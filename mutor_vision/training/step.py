"""One optimizer step of the transformer, the steady path of training: nothing in it waits for the device."""

import torch
from torch import Tensor, nn

from mutor_vision.config import TrainConfig
from mutor_vision.data.order import Batch
from mutor_vision.objectives.objective import Objective, register_weight, total_loss
from mutor_vision.objectives.registers import add_registers
from mutor_vision.runtime import Runtime, to_device
from mutor_vision.schedule import learning_rate
from mutor_vision.training import sharding


def train_step(
    parallel: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainConfig,
    runtime: Runtime, *, step: int, sums: Tensor,
) -> tuple[Tensor, float]:  # fmt: skip
    """Collective: forward and backward passes over this rank's batch in parts of `forward_batch`, clipping, AdamW.

    parallel: what sharding.parallelize made of objective. step: 0-based. sums (4,): the summed cross-entropies of next
    tokens and of other targets, each followed by its number of targets on this rank, are added. Returns the norm of the
    gradients before clipping, a scalar on the device, and the learning rate."""
    size = forward_batch(config, runtime)
    parts = [slice(i, i + size) for i in range(0, len(batch.labels), size)]
    sequences = [
        add_registers(batch.codes[part], config.registers, register_token=objective.transformer.register_token,
                      seed=config.seed, sample_index=batch.sample_index[part], step=step)
        for part in parts
    ]  # fmt: skip
    # Ranks have different numbers of targets: the counts are summed before anything is divided by them.
    counts = [sum(s.num_next_token_targets for s in sequences), sum(map(objective.num_other_targets, sequences))]
    num_next_token, num_other = runtime.all_reduce(to_device(torch.tensor(counts), runtime.device))
    weight = other_weight(objective, config, step)
    for part, sequence in zip(parts, sequences, strict=True):
        with sharding.gradients_of(parallel, last_part=part is parts[-1]):
            with runtime.autocast():
                terms = parallel(batch.labels[part], sequence)
            loss = total_loss(terms, num_next_token, None if weight is None else num_other, weight)
            (loss * runtime.world_size).backward()  # data parallelism averages over processes
        sums[0] += terms.next_token.detach()
        sums[2] += terms.register.detach()
    sums[1] += num_next_token / runtime.world_size
    sums[3] += num_other / runtime.world_size
    gradient_norm = sharding.clip_gradients(objective, config.clip or float("inf"))
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


def other_weight(objective: Objective, config: TrainConfig, step: int) -> float | None:
    """The share of the loss of other targets than the next token at a 0-based step; None = there are none."""
    has_others = config.registers.count > 0 or objective.heads is not None
    return register_weight(config.registers, step, config.steps) if has_others else None
