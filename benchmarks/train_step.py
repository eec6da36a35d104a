"""One training step: forward, backward, clipping, AdamW. Registers beside next-token prediction, both beside the
project's own naive form (a dense mask, all logits in float32), and optionally LlamaGen's, all in one run.

    python benchmarks/train_step.py                                        # 6 layers, 384 wide, batch 16, V = 16384
    python benchmarks/train_step.py --size 12,12,768 --batch 8 --registers 0 --llamagen CHECKOUT
    python benchmarks/train_step.py --device cuda --size 12,12,768 --batch 256

Sides take turns; the table gives medians, ratios in this run, and each side's peak memory beyond what it began with,
measured in a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from report import machine, measure, medians, table, write

from mutor_vision.config import RegisterConfig, TrainConfig, TransformerConfig
from mutor_vision.data.order import Batch
from mutor_vision.model.attention import dense_attention
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.auxiliary import auxiliaries_of
from mutor_vision.objectives.objective import Objective
from mutor_vision.runtime import start
from mutor_vision.training.optim import build_optimizer
from mutor_vision.training.step import train_step, zero_sums


class NaiveObjective(Objective):
    """Every input under one dense mask, every logit in float32 at once: how the method is written down."""

    def forward(self, labels, sequence):
        n = sequence.num_regular
        with patch(
            "mutor_vision.model.transformer.SplitAttention",
            lambda p, dtype: partial(dense_attention, mask=p.dense_mask()),
        ):
            logits = self.transformer(sequence.tokens, labels, sequence.positions, sequence.pattern)
        both = [(logits[:, :n], sequence.targets[:, :n]), (logits[:, n:], sequence.targets[:, n:])]
        terms = [F.cross_entropy(x.flatten(0, 1), t.flatten(), reduction="sum") for x, t in both]
        return dict(zip(self.names, terms, strict=False))


def our_step(options, registers: int, naive: bool = False) -> Callable[[], None]:
    """A function that trains one step on random codes, with new registers each time."""
    runtime = start(options.precision, options.device)
    layers, heads, dim = options.size
    config = TrainConfig(
        model=TransformerConfig(
            layers, heads, dim, options.vocab, 1000, (options.grid, options.grid), *[options.dropout] * 3
        ),
        registers=RegisterConfig("2d", registers) if registers else RegisterConfig(), batch_size=options.batch,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config.model).to(runtime.device)
    objective = (NaiveObjective if naive else Objective)(model, auxiliaries_of(config))
    if options.compile and not naive:
        for block in model.blocks:
            block.compile(dynamic=False)
    optimizer = build_optimizer(model, config)
    codes, labels = _data(options)
    sums = zero_sums(objective, runtime)
    skipped = torch.zeros(2, dtype=torch.int64, device=runtime.device)
    number = count()

    def step() -> None:
        batch = Batch(codes, labels, next(number) * options.batch + np.arange(options.batch))
        train_step(objective, objective, optimizer, batch, config, runtime, step=0, sums=sums, skipped=skipped)

    return step


def llamagen_step(options) -> Callable[[], None]:
    """The same work by the official code, as its train_c2i.py does it: its model and loss, clipping, fused AdamW."""
    sys.path.insert(0, options.llamagen)
    from autoregressive.models.gpt import ModelArgs
    from autoregressive.models.gpt import Transformer as Peer

    layers, heads, dim = options.size
    runtime = start(options.precision, options.device)
    torch.manual_seed(0)
    model = Peer(ModelArgs(
        dim=dim, n_layer=layers, n_head=heads, vocab_size=options.vocab, block_size=options.grid**2, num_classes=1000,
        token_dropout_p=options.dropout, resid_dropout_p=options.dropout, ffn_dropout_p=options.dropout,
    )).to(runtime.device)  # fmt: skip
    if options.compile:
        model = torch.compile(model)
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.05},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=4e-4, betas=(0.9, 0.95), fused=True)
    codes, labels = _data(options)
    codes = codes.flatten(1)
    model.train()

    def step() -> None:
        with runtime.autocast():
            _, loss = model(cond_idx=labels, idx=codes[:, :-1], targets=codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def _data(options):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(options.vocab, (options.batch, options.grid, options.grid), generator=generator)
    labels = torch.randint(1000, (options.batch,), generator=generator)
    return codes.to(options.device), labels.to(options.device)


def sides(options) -> dict[str, Callable[[], Callable[[], None]]]:
    found = {"next-token": lambda: our_step(options, 0)}
    for number in filter(None, options.registers):
        found[f"{number} registers"] = lambda number=number: our_step(options, number)
        if options.naive:
            found[f"{number} registers, naive"] = lambda number=number: our_step(options, number, naive=True)
    if options.llamagen:
        found["next-token, LlamaGen"] = lambda: llamagen_step(options)
    return found


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Beyond what the process held before the model was built; the step is taken twice, so the moments exist."""
    step()
    step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse_arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default=(6, 6, 384), type=lambda text: tuple(map(int, text.split(","))),
                        help="layers,heads,width (default 6,6,384; GPT-B is 12,12,768)")  # fmt: skip
    parser.add_argument("--grid", type=int, default=16, help="codes along a side")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--registers", default=[0, 80, 256], type=lambda text: list(map(int, text.split(","))))
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="compile ours and LlamaGen's, not the naive form")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--llamagen", default="", metavar="DIR", help="a checkout to be timed on the same work")
    parser.add_argument("--no-naive", dest="naive", action="store_false")
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # peak memory of one side, in a process of its own
    return parser


def main() -> None:
    options = parse_arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        before = 0 if options.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(peak_bytes(sides(options)[options.side](), options.device) - before))
        return
    # Large blocks go back to the system when they are freed, so that the peak is what was in use at once.
    memory = {}
    for name in sides(options):
        done = subprocess.run([sys.executable, *sys.argv, "--side", name], capture_output=True, text=True,
                              env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})  # fmt: skip
        if done.returncode:
            sys.exit(f"{name} failed: {done.stderr[-800:]}")
        memory[name] = json.loads(done.stdout.splitlines()[-1])
    seconds = measure({name: make() for name, make in sides(options).items()}, options.repeats, options.device)
    found = medians(seconds)
    rows = []
    for name in found:
        naive = f"{name}, naive"
        rows.append({
            "step": name, "seconds": found[name], "images/s": options.batch / found[name],
            "to next-token": found[name] / found["next-token"], "peak MB": memory[name] / 1e6,
            "naive takes": found[naive] / found[name] if naive in found else None,
            "of naive memory": memory[name] / memory[naive] if naive in memory else None,
        })  # fmt: skip
    sizes = {name: getattr(options, name) for name in ("size", "grid", "vocab", "batch", "dropout", "precision",
                                                       "compile", "repeats")}  # fmt: skip
    about = machine(options.device)
    print(f"{about['device']}, {about['cpu']}, {about['threads']} threads, torch {about['torch']}; {sizes}")
    print(table(rows))
    if options.json:
        write(options.json, {"command": " ".join(["python", *sys.argv]), "machine": about, "sizes": sizes,
                             "seconds": seconds, "medians": found, "peak_bytes": memory})  # fmt: skip


if __name__ == "__main__":
    main()
