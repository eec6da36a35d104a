"""What a training run costs, before one pays: the command `mutor plan`. Arithmetic on the configuration; no model is
built and nothing is measured.

FLOPs. A product of (m, k) and (k, n) counts 2 m n k. Counted are the linear layers, the head at every input, and the
two products of attention over the pairs that are computed: N (N + 1) / 2 of the causal inputs, and N + 1 for each
register, for which the product with all N causal inputs is computed and those after its slot are masked (with a
register at every slot a CPU skips half of that). A parallel head counts a block over the causal inputs, and the
unembedding of its own targets. The backward pass counts twice the forward pass. Not counted are norms, rotary
embedding, softmax, dropout, losses and the optimizer, which together are some 1 % of it. Activation checkpointing runs
each block's forward pass once more. The experiments count with the same function.

Memory. Weights, gradients, AdamW's two moments and EMA are float32, with autocast too. Activations are what autograd
keeps of one micro-batch for the backward pass, tensor by tensor (`saved_per_layer`), and what the peak needs on top of
it. Logits exist for one chunk of inputs at a time. The sum is an upper bound: gradients grow while activations shrink.
Not counted is a token set that is kept on the GPU (1.2 GiB for two views of ImageNet's images).

Time is FLOPs over the assumed share (MFU) of the accelerator's dense peak.

Legend: N = h * w causal inputs, R registers, T = N + R, C width, F width of the feed-forward, V codebook size.
"""

import argparse
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from mutor_vision.config import TrainConfig, TransformerConfig, override, preset
from mutor_vision.errors import UserError
from mutor_vision.presets import TOKENIZERS, TRANSFORMERS

GIB = 2**30
RESERVED = 0.08  # share of the memory left to the CUDA context, libraries' workspaces and fragmentation


@dataclass(frozen=True)
class Accelerator:
    """Peaks of dense products from the makers' data sheets."""

    bfloat16: float  # TFLOP/s
    float32: float  # TFLOP/s, without TF32
    memory: float  # GiB


ACCELERATORS = {
    "a100": Accelerator(312, 19.5, 80),
    "h100": Accelerator(989, 67, 80),
    "h200": Accelerator(989, 67, 141),
    "b200": Accelerator(2250, 75, 180),
    "rtx4090": Accelerator(165, 82.6, 24),
    "l40s": Accelerator(362, 91.6, 48),
}
CPU_CORE = 0.1  # TFLOP/s: two 256-bit multiply-adds a cycle at 3 GHz

# Where a preset leaves the codes to the token set: the tokenizer preset that makes them, and a number of classes.
TOKEN_SETS = {"own": ("vq-16", 1000), "tiny-imagenet": ("tiny-imagenet", 200), "digits": ("digits", 10)}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    blocks: int  # matrices of all blocks
    head: int
    embeddings: int  # tokens, the register and classes
    norms: int

    @property
    def total(self) -> int:
        return self.blocks + self.head + self.embeddings + self.norms


def parameters(model: TransformerConfig) -> Parameters:
    c = model.dim
    return Parameters(
        blocks=model.layers * (4 * c * c + 3 * c * model.ffn_dim),
        head=c * model.vocab_size,
        embeddings=c * (model.vocab_size + 1 + model.num_classes + 1),
        norms=c * (2 * model.layers + 1),
    )


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the forward pass of one image."""

    blocks: int  # linear layers
    attention: int
    head: int

    @property
    def forward(self) -> int:
        return self.blocks + self.attention + self.head

    @property
    def training(self) -> int:
        """Forward and backward."""
        return 3 * self.forward


def flops(config: TrainConfig) -> Flops:
    """Of the transformer with its registers or parallel heads; what is compared by compute is compared by this."""
    model, n, registers, count = config.model, config.model.num_tokens, config.registers.count, parameters(config.model)
    heads = range(2, config.parallel_heads + 1)  # head k predicts k tokens ahead
    causal = n * (n + 1) // 2
    pairs = model.layers * (causal + registers * (n + 1)) + len(heads) * causal
    return Flops(
        blocks=2 * ((n + registers) * count.blocks + len(heads) * n * (count.blocks // model.layers)),
        attention=2 * (2 * model.dim * pairs),
        head=2 * (n + registers + sum(n - k + 1 for k in heads)) * count.head,
    )


def saved_per_layer(config: TrainConfig, width: int, on_cpu: bool, compiled: bool) -> dict[str, float]:
    """Bytes that one block keeps of one image for the backward pass, by tensor. width: bytes of the compute type, 4 or
    2. The residual stream and the norms are float32 throughout. Compiled blocks compute anew what is cheap."""
    model, r = config.model, config.registers.count
    inputs = model.num_tokens + r
    c, f = inputs * model.dim, inputs * model.ffn_dim
    # Autocast casts the feed-forward's input for each of two layers; compiled blocks compute norms anew, casts not.
    outputs = (0 if width == 4 else 2) if compiled else (2 if width == 4 else 3)
    return {
        "inputs of both norms": (4 + width) * c if compiled else 2 * 4 * c,  # the second is the first and a sum
        "inputs of qkv and of the feed-forward": outputs * width * c,
        "values": width * c,
        "rotated queries and keys": 2 * width * c,
        "output of attention": width * c,
        "sums of its softmax": 4 * model.heads * (inputs + (r if on_cpu else 0)),
        "its two parts before they are joined": width * c if r and not on_cpu else 0,  # a CPU merges them in place
        "mask of the registers": 0 if on_cpu else width * r * inputs,
        "masks of dropout": c * ((model.residual_dropout > 0) + (model.ffn_dropout > 0)),
        "gate, value and product": 3 * width * f,
    }


@dataclass(frozen=True)
class Memory:
    """Bytes on one accelerator, by what they are for."""

    weights: float
    gradients: float
    moments: float
    ema: float
    gathered: float  # FSDP: weights and gradients in full, of the block that is being computed and what is in none
    buffers: float  # rotary tables, EMA's too
    cast_weights: float  # in the compute type, from the forward pass to the end of the backward pass
    activations: float  # kept from the forward to the backward pass
    workspace: float  # on top of them in the loss or in a block's backward pass, whichever needs more

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def memory(config: TrainConfig, gpus: int, micro_batch: int, on_cpu: bool = False) -> Memory:
    """micro_batch: images in one forward pass of one process."""
    from mutor_vision.loss import chunk_rows

    model, count, sharded = config.model, parameters(config.model), config.parallel == "fsdp" and gpus > 1
    width = 2 if autocast(config, on_cpu) else 4
    state = 4 * count.total / (gpus if sharded else 1)
    inputs = model.num_tokens + config.registers.count
    gathered, cast_weights = 0.0, 2.0 * (count.blocks + count.head) if width == 2 else 0.0
    if sharded:  # weights of a block and of the one being fetched; gradients as computed and, to be summed, in float32
        block, rest = count.blocks / model.layers, count.total - count.blocks
        gathered = 2 * width * block + 4 * rest + max((width + 4) * block, 8 * rest)
        cast_weights = 2.0 * count.head if width == 2 else 0.0
    compiled = config.compile == "on" or (config.compile == "auto" and not on_cpu)
    layer = sum(saved_per_layer(config, width, on_cpu, compiled).values())
    residual = 4 * inputs * model.dim  # bytes of the residual stream of one image
    kept = model.layers * (residual if config.activation_checkpointing else layer)
    kept += inputs * model.dim * (model.token_dropout > 0)  # its mask
    if r := config.registers.count:  # rotary rows, and the mask that all layers share
        kept += 2 * 4 * inputs * model.head_dim + (4 * r * model.num_tokens if on_cpu and r < model.num_tokens else 0)
    # The loss: the last norm's input, output and gradient, with registers a copy of those that have a target; logits
    # and log-probabilities of a chunk; the head's gradient, of the chunk and of each cross-entropy.
    images = (3 + on_cpu + (r > 0)) * residual * micro_batch
    rows = min(micro_batch * model.num_tokens, chunk_rows(model.vocab_size, model.dim))
    in_loss = images + 8 * rows * model.vocab_size + 4 * count.head * (3 if r else 2)
    # A block's backward pass: gradients of two tensors in the feed-forward and of the residual stream.
    in_block = 2 * width * inputs * model.ffn_dim + 2 * residual + layer * config.activation_checkpointing
    return Memory(
        weights=state,
        gradients=state,
        moments=2 * state,
        ema=state if config.ema_decay else 0.0,
        gathered=gathered,
        buffers=2 * 4 * (model.num_tokens + 1) * model.head_dim * (2 if config.ema_decay else 1),
        cast_weights=cast_weights,
        activations=micro_batch * kept,
        workspace=max(in_loss, micro_batch * in_block),
    )


def autocast(config: TrainConfig, on_cpu: bool) -> bool:
    """Whether products are computed in bfloat16, as runtime.start decides."""
    return config.precision == "bfloat16" or (config.precision == "auto" and not on_cpu)


def plan(name: str, config: TrainConfig, gpu: str, gpus: int, mfu: float) -> dict:
    """All of it, JSON-ready: bytes, FLOPs, seconds. Raises UserError for what cannot be planned."""
    if gpu not in [*ACCELERATORS, "cpu"]:
        raise UserError(f"gpu is '{gpu}', expected one of {', '.join(ACCELERATORS)}, cpu")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu is {mfu}, expected a share of the peak: more than 0, at most 1")
    if gpus < 1 or config.batch_size % gpus:
        raise UserError(f"batch_size {config.batch_size} cannot be split over {gpus} GPUs; use a multiple")
    if config.lora_rank:
        raise UserError("lora_rank is set: a plan counts the training of all weights only; set lora_rank=0")
    if config.parallel_heads > 1:
        raise UserError(f"parallel_heads is {config.parallel_heads}: a plan counts the transformer alone; set it to 1")
    on_cpu = gpu == "cpu"
    local = config.batch_size // gpus
    micro_batch = config.micro_batch or local
    if not 0 < micro_batch <= local:
        raise UserError(f"micro_batch is {config.micro_batch}, expected 0 to batch_size / GPUs, {local}")
    accelerator = this_machine(gpus) if on_cpu else ACCELERATORS[gpu]
    peak = 1e12 * (accelerator.bfloat16 if autocast(config, on_cpu) else accelerator.float32)
    needed, inputs = flops(config), config.model.num_tokens + config.registers.count
    next_token = flops(dataclasses.replace(config, registers=type(config.registers)()))
    computed = needed.training + (needed.blocks + needed.attention) * config.activation_checkpointing
    images, images_per_second = config.steps * config.batch_size, gpus * mfu * peak / computed
    usable = (1 - RESERVED) * accelerator.memory * GIB
    fits = [n for n in range(1, local + 1) if local % n == 0 and memory(config, gpus, n, on_cpu).total <= usable]
    parts = memory(config, gpus, micro_batch, on_cpu)
    return {
        "preset": name, "gpu": gpu, "gpus": gpus, "parallel": config.parallel,
        "precision": "bfloat16" if autocast(config, on_cpu) else "float32",
        "parameters": {**dataclasses.asdict(count := parameters(config.model)), "total": count.total},
        "inputs": {"tokens": config.model.num_tokens, "registers": config.registers.count},
        "flops_per_image": {
            **dataclasses.asdict(needed), "forward": needed.forward, "training": needed.training,
            "with_recomputation": computed, "relative_to_next_token": needed.training / next_token.training,
        },
        "micro_batch": micro_batch, "micro_batches_per_step": -(-local // micro_batch),
        "memory": {**dataclasses.asdict(parts), "total": parts.total, "usable": usable},
        "all_logits_at_once": 4 * micro_batch * inputs * config.model.vocab_size,
        "fits": parts.total <= usable, "largest_micro_batch": max(fits, default=0),
        "time": {
            "mfu": mfu, "peak_flops": peak, "steps": config.steps, "batch_size": config.batch_size, "images": images,
            "tokens": images * config.model.num_tokens, "images_per_second": images_per_second,
            "seconds": images / images_per_second, "gpu_hours": gpus * images / images_per_second / 3600,
        },
    }  # fmt: skip


def this_machine(processes: int) -> Accelerator:
    """One process's part of the CPU cores and memory of this machine."""
    speed = CPU_CORE * (os.cpu_count() or 1) / processes
    return Accelerator(speed, speed, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB / processes)


def table(values: dict) -> str:
    """plan() for a person."""
    count, work, time, parts = (values[name] for name in ("parameters", "flops_per_image", "time", "memory"))
    tokens, registers = values["inputs"].values()
    lines = [
        (f"{values['preset']} on {values['gpus']} x {values['gpu']}, {values['parallel']}, {values['precision']}",),
        ("parameters", f"{count['total']:,}", f"blocks {count['blocks']:,}, head {count['head']:,}"),
        ("inputs an image", f"{tokens + registers:,}", f"{tokens} tokens, {registers} registers"),
        ("GFLOP an image", f"{work['training'] / 1e9:,.1f}",
         f"forward {work['forward'] / 1e9:,.1f}, backward twice that; "
         f"{work['relative_to_next_token']:.2f} x next-token prediction"),
    ]  # fmt: skip
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too: bytes, FLOPs, seconds")


def main(arguments: argparse.Namespace) -> None:
    config = override(preset(TRANSFORMERS, arguments.preset), arguments.set)
    config, assumed = with_token_set(arguments.preset, config)
    gpus = (1 if arguments.gpu == "cpu" else 8) if arguments.gpus is None else arguments.gpus
    values = plan(arguments.preset, config, arguments.gpu, gpus, arguments.mfu)
    print(table(values))
    if assumed:
        print(f"assumed: {assumed}; --set model.grid, model.vocab_size or model.num_classes for others")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(values, indent=1) + "\n")
