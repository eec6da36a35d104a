"""Data parallelism in two ways. DDP: every process holds all weights, and gradients are averaged. FSDP: each process
holds its share of the rows of every tensor (weights, gradients, moments, EMA) as a DTensor, a block's weights are
gathered when they are needed, and gradients are scattered. The mathematics is the same.

Weights and EMA must fit on one device before they are sharded, and again, as copies, while a sharded model is validated
or sampled from. Checkpoints hold whole weights in either way, gathered in the first process's memory, so whatever reads
weights reads both; FSDP's optimizer state is a folder of safetensors shards, which any number of processes reads.
"""

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mutor_vision.model.layers import Block
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.objective import Objective
from mutor_vision.runtime import Runtime
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import clear

_MOMENTS = ("exp_avg", "exp_avg_sq")


def parallelize(
    objective: Objective, averages: Iterable[Transformer], kind: str, runtime: Runtime
) -> nn.Module:
    """What to call instead of `objective`, whose transformer `averages` average; kind 'ddp' or 'fsdp'. FSDP shards
    all in place, so the optimizer is built afterwards."""
    if runtime.world_size == 1:
        return objective
    if kind == "ddp":
        devices = [runtime.device.index] if runtime.device.index is not None else None
        # No second copy of the gradients; and the buffers, rotary tables, are constants that need no broadcast.
        return DistributedDataParallel(
            objective, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    _shard(objective, runtime)
    for average in averages:
        _shard(Objective(average), runtime)
    return objective


def _shard(objective: Objective, runtime: Runtime) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    # Blocks are gathered in the type in which they compute. The rest stays float32, and with it the residual stream.
    precision = MixedPrecisionPolicy(
        param_dtype=runtime.autocast_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in cast(Iterable[Block], objective.transformer.blocks):
        # As under autocast, norms keep float32 weights. In bfloat16 they would be rounded, and with float32 inputs the
        # fused kernel refuses them.
        fully_shard([block.attention_norm, block.ffn_norm], mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(objective, mesh=mesh)


def gradients_of(parallel: nn.Module, last_part: bool) -> AbstractContextManager:
    """Around the forward and backward pass of one micro-batch: processes exchange gradients after the last one only."""
    if isinstance(parallel, DistributedDataParallel):
        return nullcontext() if last_part else parallel.no_sync()
    if _is_sharded(parallel):
        cast(Any, parallel).set_requires_gradient_sync(last_part)
    return nullcontext()


def clip_gradients(module: nn.Module, limit: float) -> Tensor:
    """Scale gradients to a norm of at most `limit`; returns the norm over all of them before, a scalar."""
    return _full(torch.nn.utils.clip_grad_norm_(module.parameters(), limit))


def set_found_inf(optimizer: torch.optim.Optimizer, found: Tensor) -> None:
    """Have the fused AdamW leave weights and moments as they are where `found`, a scalar, is 1, as GradScaler does."""
    first = optimizer.param_groups[0]["params"][0]
    if isinstance(first, DTensor):
        found = DTensor.from_local(found, first.device_mesh, [Replicate()] * first.device_mesh.ndim, run_check=False)
    optimizer.found_inf = found  # type: ignore[attr-defined]


def gather(tensors: dict[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """Shards -> whole tensors on the CPU, one after the other; whole tensors stay as they are. Collective; processes
    that do not want them get an empty dict."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = _full(tensor)
        if wanted:
            gathered[name] = whole.cpu() if isinstance(tensor, DTensor) else whole
    return gathered


def whole(model: Transformer) -> Transformer:
    """The model with all of its weights in every process, for sampling and validation: itself, or a copy of one that is
    sharded. Collective."""
    if not _is_sharded(model):
        return model
    with torch.device("meta"):
        copy = Transformer(model.config)
    copy.register_buffer("rope", model.rope, persistent=False)
    copy.load_state_dict({name: _full(tensor) for name, tensor in model.state_dict().items()}, assign=True)
    return copy.train(model.training).requires_grad_(False)


def save_optimizer(
    optimizer: torch.optim.Optimizer, trained: dict[str, nn.Module], run: Path, runtime: Runtime
) -> Path | None:
    """Write the moments of sharded modules, every process its own, to a folder for checkpoint.save to move; None when
    they are not sharded. trained: file stem -> module, the transformer under 'model'. Collective."""
    if not _is_sharded(trained["model"]):
        return None
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    folder = run / "checkpoints" / f".{checkpoint.OPTIMIZER}.partial"
    if runtime.is_main:
        clear(folder)
        folder.mkdir(parents=True)
    runtime.barrier()
    save(_moments(optimizer, trained), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    return folder


def load_optimizer(
    optimizer: torch.optim.Optimizer, trained: dict[str, nn.Module], folder: Path, runtime: Runtime
) -> int:
    """The optimizer state of a verified checkpoint, whichever way of parallelism and number of processes wrote it.
    Returns that number, 0 where an older version did not record it."""
    state = checkpoint.read_training_state(folder)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if (folder / checkpoint.OPTIMIZER).is_dir():
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load

        for parameter in parameters:
            step = torch.tensor(float(state["step"]), device=parameter.device)
            optimizer.state[parameter] = {"step": step} | {name: torch.zeros_like(parameter) for name in _MOMENTS}
        reader = HuggingFaceStorageReader(str(folder / checkpoint.OPTIMIZER))  # safetensors and JSON, no pickle
        with warnings.catch_warnings(action="ignore"):  # it warns of a single process
            load(_moments(optimizer, trained), storage_reader=reader, no_dist=runtime.world_size == 1)
        return state.get("processes", 0)
    for number, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor):
            saved = state["optimizer"]
            for name in _MOMENTS:
                tensor = saved["state"][number][name].to(parameter.device)
                saved["state"][number][name] = distribute_tensor(
                    tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
    checkpoint.load_optimizer(optimizer, state, "optimizer", folder)
    return state.get("processes", 0)


def _moments(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{'' if stem == 'model' else f'{stem}.'}{name}.{moment}": optimizer.state[parameter][moment]
            for stem, module in trained.items()
            for name, parameter in module.named_parameters() if parameter in optimizer.state
            for moment in _MOMENTS}  # fmt: skip


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
