"""The command `mutor plan`: what a training run costs, before one pays."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from mutor_vision.config import TrainConfig
from mutor_vision.data.token_set import code_dtype
from mutor_vision.errors import UserError
from mutor_vision.presets import TOKENIZERS, TRANSFORMERS
from mutor_vision.settings import override, preset
from mutor_vision.storage.files import write_json
from mutor_vision.storage.outputs import check_out_file
from mutor_vision.training.cost import (
    ACCELERATORS,
    CPU_CORE,
    GIB,
    RESERVED,
    Accelerator,
    autocast,
    flops,
    memory,
    parameters,
)

# Where a preset leaves the codes to the token set: the tokenizer preset that makes them, and a number of classes.
TOKEN_SETS = {"own": ("vq-16", 1000), "tiny-imagenet": ("tiny-imagenet", 200), "pictures": ("tiny-imagenet-8x8", 12),
              "photographs": ("photographs", 100), "digits": ("digits", 10)}  # fmt: skip


def plan(name: str, config: TrainConfig, gpu: str, gpus: int, mfu: float) -> dict:
    """All of it, JSON-ready: bytes, FLOPs, seconds. Raises UserError for what cannot be planned."""
    if gpu not in [*ACCELERATORS, "cpu"]:
        raise UserError(f"gpu is '{gpu}', expected one of {', '.join(ACCELERATORS)}, cpu")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu is {mfu}, expected a share of the peak: more than 0, at most 1")
    if gpus < 1 or config.batch_size % gpus:
        raise UserError(f"batch_size {config.batch_size} cannot be split over {gpus} GPUs; use a multiple")
    if config.lora_rank or config.lora_inputs != "all":
        name = "lora_rank" if config.lora_rank else "lora_inputs"
        raise UserError(f"{name} is set: a plan counts the training of all weights, not of adapters")
    on_cpu = gpu == "cpu"
    local = config.batch_size // gpus
    micro_batch = config.micro_batch or local
    if not 0 < micro_batch <= local:
        raise UserError(f"micro_batch is {config.micro_batch}, expected 0 to batch_size / GPUs, {local}")
    accelerator = this_machine(gpus) if on_cpu else ACCELERATORS[gpu]
    peak = 1e12 * (accelerator.bfloat16 if autocast(config, on_cpu) else accelerator.float32)
    losses, needed = config.auxiliaries, flops(config)
    inputs = {"tokens": config.model.num_tokens} | {name: own.cost(config.model).inputs for name, own in losses.items()}
    off: dict[str, Any] = {name: type(own)() for name, own in losses.items()}
    next_token = flops(dataclasses.replace(config, **off))
    computed = needed.training + (needed.blocks + needed.attention) * config.activation_checkpointing
    images, images_per_second = config.steps * config.batch_size, gpus * mfu * peak / computed
    usable = (1 - RESERVED) * accelerator.memory * GIB
    fits = [n for n in range(1, local + 1) if local % n == 0 and memory(config, gpus, n, on_cpu).total <= usable]
    parts = memory(config, gpus, micro_batch, on_cpu)
    return {
        "preset": name, "gpu": gpu, "gpus": gpus, "parallel": config.parallel,
        "precision": "bfloat16" if autocast(config, on_cpu) else "float32",
        "parameters": {**dataclasses.asdict(count := parameters(config.model)), "total": count.total},
        "inputs": inputs, "losses": {name: _cost_of(name, config) for name, own in losses.items() if own.active},
        "flops_per_image": {
            **dataclasses.asdict(needed), "forward": needed.forward, "training": needed.training,
            "with_recomputation": computed, "relative_to_next_token": needed.training / next_token.training,
        },
        "micro_batch": micro_batch, "micro_batches_per_step": -(-local // micro_batch),
        "memory": {**dataclasses.asdict(parts), "total": parts.total, "usable": usable},
        "all_logits_at_once": 4 * micro_batch * sum(inputs.values()) * config.model.vocab_size,
        "fits": parts.total <= usable, "largest_micro_batch": max(fits, default=0),
        "time": {
            "mfu": mfu, "peak_flops": peak, "steps": config.steps, "batch_size": config.batch_size, "images": images,
            "tokens": images * config.model.num_tokens, "images_per_second": images_per_second,
            "seconds": images / images_per_second, "gpu_hours": gpus * images / images_per_second / 3600,
        },
    }  # fmt: skip


def _cost_of(name: str, config: TrainConfig) -> dict[str, int]:
    """What one loss adds to an image's FLOPs, its teacher's among them, and how many parameters."""
    model, without = config.model, dataclasses.replace(config, **{name: type(getattr(config, name))()})
    more = getattr(config, name).cost(model)
    of_blocks = more.blocks * (model.block_parameters + 2 * model.dim)
    return {
        "training": flops(config).training - flops(without).training,
        "teacher": flops(config).teachers - flops(without).teachers,
        "parameters": of_blocks + more.parameters + more.teacher_parameters,
    }


def data(config: TrainConfig, images: int, views: int) -> dict:
    """Bytes of a token set of so many images, and of what training keeps of each in every process."""
    if images < 1 or views < 1:
        raise UserError(f"images is {images} and views {views}, expected 1 or more of both")
    codes = images * views * config.model.num_tokens * np.dtype(code_dtype(config.model.vocab_size)).itemsize
    return {
        "images": images, "views": views, "disk": codes + 8 * images,
        "memory": (8 + 8 + 2 * 8) * images,  # its label, its number, and its place in the orders of two epochs
        "epochs": config.steps * config.batch_size / images,
    }  # fmt: skip


def this_machine(processes: int) -> Accelerator:
    """One process's part of the CPU cores and memory of this machine."""
    speed = CPU_CORE * (os.cpu_count() or 1) / processes
    return Accelerator(speed, speed, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB / processes)


def table(values: dict) -> str:
    """plan() for a person."""
    count, work, time, parts = (values[name] for name in ("parameters", "flops_per_image", "time", "memory"))
    inputs = ", ".join(f"{number} {name}" for name, number in values["inputs"].items() if number)
    lines = [
        (f"{values['preset']} on {values['gpus']} x {values['gpu']}, {values['parallel']}, {values['precision']}",),
        ("parameters", f"{count['total']:,}", f"blocks {count['blocks']:,}, head {count['head']:,}"),
        ("inputs an image", f"{sum(values['inputs'].values()):,}", inputs),
        ("GFLOP an image", f"{work['training'] / 1e9:,.1f}",
         f"forward {work['forward'] / 1e9:,.1f}, backward twice that; "
         f"{work['relative_to_next_token']:.2f} x next-token prediction"),
    ]  # fmt: skip
    for name, loss in values["losses"].items():
        of_its_own = f"{loss['parameters']:,} parameters in training only" if loss["parameters"] else ""
        of_its_own += f"; teacher {loss['teacher'] / 1e9:,.1f}, forward only" if loss["teacher"] else ""
        lines.append((f"  {name.replace('_', ' ')}", f"{loss['training'] / 1e9:+,.1f}", of_its_own))
    if work["with_recomputation"] > work["training"]:
        lines.append(("  with recomputation", f"{work['with_recomputation'] / 1e9:,.1f}", "activation checkpointing"))
    lines.append((f"memory of each, at {values['micro_batch']} images a forward pass",))
    notes = {
        "moments": "AdamW's two",
        "gathered": "from other GPUs, while it is needed" if parts["gathered"] else "",
        "cast_weights": "bfloat16 copies",
        "activations": "recomputed, but for each block's input"
        if work["with_recomputation"] > work["training"]
        else "",
        "workspace": f"a chunk of logits; all of them would be {_bytes(values['all_logits_at_once'])}",
        "usable": "expected to be free for it",
    }
    lines += [(f"  {name.replace('_', ' ')}", f"{_bytes(size)}", notes.get(name, "")) for name, size in parts.items()]
    best = values["largest_micro_batch"]
    verdict = "fits" if values["fits"] else "does not fit"
    largest = f"the largest that fits is micro_batch={best}" if best else "not even one image does; try parallel=fsdp"
    lines += [
        (f"{verdict}; {largest}",),
        (f"time, assuming that {time['mfu']:.0%} of {time['peak_flops'] / 1e12:,.4g} TFLOP/s is reached",),
        ("  images a second", f"{time['images_per_second']:,.0f}"),
        ("  images seen", f"{time['images']:,}", f"{time['steps']:,} steps of {time['batch_size']:,}"),
        ("  tokens seen", f"{time['tokens']:,}"),
        ("  days", f"{time['seconds'] / 86400:,.2f}", f"{time['seconds'] / 3600:,.2f} hours"),
        ("  GPU-hours", f"{time['gpu_hours']:,.1f}"),
    ]
    if found := values.get("data"):
        lines += [
            (f"a token set of {found['images']:,} images, {found['views']} views",),
            ("  on disk", _bytes(found["disk"]), "memory-mapped, never loaded as a whole"),
            ("  in each process", _bytes(found["memory"]), "labels and orders"),
            ("  epochs", f"{found['epochs']:,.1f}"),
        ]
    return "\n".join(
        line[0] if len(line) == 1 else f"{line[0]:<22}{line[1]:>16}   {''.join(line[2:])}".rstrip() for line in lines
    )


def _bytes(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size * 1024 / GIB:,.1f} MiB"


def with_token_set(name: str, config: TrainConfig) -> tuple[TrainConfig, str]:
    """Fill the sizes that a preset leaves to the token set, by TOKEN_SETS; also returns what was assumed, in words."""
    model, data = config.model, next((key for key in TOKEN_SETS if name.startswith(f"{key}-")), None)
    if data is None or (model.vocab_size and model.num_classes and model.num_tokens):
        return config, ""
    tokenizer, classes = TOKENIZERS[TOKEN_SETS[data][0]].model, TOKEN_SETS[data][1]
    model = dataclasses.replace(
        model,
        vocab_size=model.vocab_size or tokenizer.codebook_size,
        num_classes=model.num_classes or classes,
        grid=model.grid if model.num_tokens else tokenizer.grid,
    )
    assumed = f"{model.grid[0]}x{model.grid[1]} codes of {model.vocab_size:,} and {model.num_classes:,} classes"
    return dataclasses.replace(config, model=model), assumed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", required=True, metavar="NAME", help="as train/imagenet.py takes")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(ACCELERATORS)} or cpu (this machine); default h100")
    parser.add_argument("--gpus", type=int, help="processes, one on each GPU; default 8, and 1 for cpu")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak assumed to be reached; default 0.4")
    parser.add_argument("--images", type=int, metavar="N", help="also what a token set of N images takes")
    parser.add_argument("--views", type=int, default=2, help="of each image in it (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too: bytes, FLOPs, seconds")


def main(arguments: argparse.Namespace) -> None:
    if arguments.json:
        check_out_file(arguments.json)
    config = override(preset(TRANSFORMERS, arguments.preset), arguments.set)
    config, assumed = with_token_set(arguments.preset, config)
    gpus = (1 if arguments.gpu == "cpu" else 8) if arguments.gpus is None else arguments.gpus
    values = plan(arguments.preset, config, arguments.gpu, gpus, arguments.mfu)
    if arguments.images is not None:
        values["data"] = data(config, arguments.images, arguments.views)
    print(table(values))
    if assumed:
        print(f"assumed: {assumed}; --set model.grid, model.vocab_size or model.num_classes for others")
    if arguments.json:
        write_json(arguments.json, values)
