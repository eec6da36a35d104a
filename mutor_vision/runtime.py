"""Device, ranks and precision. Every call is harmless with one process and no GPU; the only other modules that touch
torch.distributed are `sharding`, for the transformer, and the tokenizer's training loop, which wraps its model in
DistributedDataParallel."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import mutor_vision
from mutor_vision.errors import UserError
from mutor_vision.settings import flat, shown

PRECISIONS = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda", "mps")
TIMEOUT = "MUTOR_TIMEOUT"  # environment variable: seconds that a process waits for another one
ANSWER = 5  # seconds in which the others have to say that they wait, too
# What gloo says when another process ended, or does not answer. nccl's errors are of a class of their own.
_OF_PEERS = re.compile(r"Timed out waiting|timeout caused pair closure|Connection (closed|reset)|Broken pipe")


class PeerError(UserError):
    """Another process of the job ended, or does not answer."""

    exit_code = 1


@dataclass(frozen=True)
class Runtime:
    """Where this process runs. `autocast_dtype` None means float32 throughout."""

    rank: int
    world_size: int
    device: torch.device
    autocast_dtype: torch.dtype | None

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of long sums on the device: float64 where it has that."""
        return torch.float64 if float64_device(self.device) == self.device else torch.float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        """Context in which forward passes run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Same-shaped tensors (n, ...) of all ranks -> (world_size * n, ...), on every rank, in rank order."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def raise_together(self, error: Exception | None) -> None:
        """Collective: if any rank has an error, every rank raises one, so that none waits for a dead peer."""
        failed = self.all_reduce(torch.tensor([int(error is not None)], device=self.device)).item()
        if error is not None:
            raise error
        if failed:
            raise UserError(f"rank {self.rank} stops because {failed} other rank(s) failed; see their message")

    def check_same(self, values: dict[str, Any]) -> None:
        """Collective: raise UserError, on every rank, for the first value that not all ranks have; together they would
        compute what none was asked for. values: JSON-ready, by name, without the paths, which may differ between
        machines."""
        if self.world_size == 1:
            return
        values = flat(values)
        for part in ({"the version, or what is set,": [mutor_vision.__version__, *values]}, values):
            here = torch.tensor([[_number_of(value) for value in part.values()]], device=self.device)
            everywhere = self.gather(here)
            same = (everywhere == everywhere[0]).all(0).tolist()
            if differing := [name for name, is_same in zip(part, same, strict=True) if not is_same][:5]:
                verb, own = "is" if len(differing) == 1 else "are", ", ".join(shown(part[name]) for name in differing)
                raise UserError(
                    f"{', '.join(differing)} {verb} not the same in all {self.world_size} processes; rank {self.rank} "
                    f"has {own}. Start all with equal commands and files"
                )


def _number_of(value: Any) -> int:
    """The same for equal values, an int64."""
    return int.from_bytes(hashlib.sha256(json.dumps(value, default=str).encode()).digest()[:7])


def float64_device(device: torch.device) -> torch.device:
    """Where float64 numbers that belong to `device` are kept: Apple's GPUs have none, so theirs stay on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, without waiting for what the device is doing; itself where it is there already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def start(precision: str = "auto", device: str = "auto") -> Runtime:
    """Join the process group that torchrun describes in the environment, or run alone.

    precision: 'auto' (bfloat16 autocast on CUDA cards that have it, float32 elsewhere), 'float32' or 'bfloat16'.
    device: 'auto' (CUDA or else Apple's MPS when present, else the CPU), 'cpu', 'cuda' or 'mps'.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is '{precision}', expected one of {', '.join(PRECISIONS)}")
    if device not in DEVICES:
        raise UserError(f"device is '{device}', expected one of {', '.join(DEVICES)}")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device != "auto" and not present[device]:
        raise UserError(f"device is '{device}', but no {device.upper()} device is visible; use cpu or auto")
    kind = device if device != "auto" else next(kind for kind in present if present[kind])
    world_size, rank, local_rank = _place()
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} on this machine has no GPU of its own: {torch.cuda.device_count()} visible; "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    if kind == "mps" and world_size > 1:
        raise UserError(f"{world_size} processes on one MPS device; start one process, or use --device cpu")
    where = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if world_size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=patience())
        except (dist.DistError, ValueError) as error:  # an address in use, a variable that is missing, nobody there
            raise UserError(
                f"the {world_size} processes cannot meet ({str(error).splitlines()[0]}); start them with torchrun: "
                "--standalone on one machine, or the same --rdzv-endpoint HOST:PORT on all"
            ) from None
    # Cards before Ampere emulate bfloat16, slower than they compute in float32.
    has_bfloat16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and has_bfloat16) else None
    return Runtime(rank=rank, world_size=world_size, device=where, autocast_dtype=dtype)


def _place() -> tuple[int, int, int]:
    """(processes, rank of this one, its number on this machine), as torchrun says them in the environment."""
    given = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    given |= {name: os.environ[name] for name in given if name in os.environ}
    for name, text in given.items():
        if not re.fullmatch("[0-9]{1,9}", text):
            raise UserError(f"{name} is '{text}', expected a number of 0 or more; start with torchrun, or unset it")
    world_size, rank, local_rank = map(int, given.values())
    if world_size > 1 and "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set but RANK is not; start with torchrun, or unset WORLD_SIZE")
    if not max(rank, local_rank) < world_size:
        raise UserError(
            f"RANK is {rank} and LOCAL_RANK {local_rank}, expected less than WORLD_SIZE, which is {world_size}; start "
            "with torchrun, or unset them"
        )
    return world_size, rank, local_rank


def patience() -> timedelta:
    """How long a process waits for another one before it says which, and ends: TIMEOUT, or half an hour."""
    text = os.environ.get(TIMEOUT, "1800")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"{TIMEOUT} is '{text}', expected seconds above 0 (1800 by default)")
    return timedelta(seconds=seconds)


def blamed(error: BaseException, where: str = "") -> BaseException:
    """An error of a collective, whose text knows of addresses alone -> a PeerError that names the ranks; any other
    error as it is. where: such as 'step 7'. Whoever waits for a rank says so to the others; the ranks that say nothing
    for ANSWER seconds are the cause. Meanwhile torchrun sees the one that ended first, and shows it as root cause."""
    known = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _OF_PEERS.search(str(error)))
    if not known or not dist.is_initialized() or dist.get_world_size() == 1:
        return error
    ranks, silent = dist.get_world_size(), []
    try:
        store, key = dist.distributed_c10d._get_default_store(), "mutor_vision/waits/{}".format
        store.set(key(dist.get_rank()), "1")
        until = time.monotonic() + ANSWER
        while (silent := [rank for rank in range(ranks) if not store.check([key(rank)])]) and time.monotonic() < until:
            time.sleep(0.1)
    except RuntimeError:  # the machine that kept the store is gone
        pass
    who = f"rank {', '.join(map(str, silent))}" if silent else "one"
    return PeerError(
        f"{who} of the {ranks} processes ended or hangs{where and f', at {where}'}; its own message, or torchrun's "
        f"summary, says why. The same command goes on; {TIMEOUT}=SECONDS makes them wait for longer than "
        f"{patience().total_seconds():g} s"
    )


def finish() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions and products in IEEE float32, restored afterwards; may be nested. cuDNN uses TF32 by default, which
    makes features depend on the batch size (torch-fidelity issue 43)."""
    convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # set when torch is imported
    product = torch.backends.cuda.matmul
    before = convolution.fp32_precision, product.fp32_precision
    convolution.fp32_precision = product.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision, product.fp32_precision = before


@contextmanager
def fixed_convolutions() -> Iterator[None]:
    """cuDNN chooses the same deterministic kernel for the same shapes every time; restored afterwards."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
