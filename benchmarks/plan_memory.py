"""Peak memory of training against what `mutor plan` says, on a CPU, for three sizes with and without registers.

    python benchmarks/plan_memory.py [--quick] [--json FILE]

Each size trains two steps (the second has AdamW's moments) with training.loop.train itself, on random codes, in a
process
of its own. Measured is the peak of the resident memory less what it was after the imports. glibc is told to give large
tensors back to the system when they are freed, so that the resident memory is that of the tensors that live; torch's
own count of its allocations would leave out what libraries take. The --quick size is too small for its ratios to mean
anything: libraries take some 20 MB.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from report import machine, table, write

from mutor_vision.cli import Parser, run_command
from mutor_vision.commands.plan import plan
from mutor_vision.config import (
    AlignedStatesConfig,
    ParallelHeadsConfig,
    PrivateBlocksConfig,
    RegisterConfig,
    TrainConfig,
    TransformerConfig,
)
from mutor_vision.settings import from_dict, to_dict
from mutor_vision.training.cost import GIB

SIZES = {  # layers, heads, width, codebook, batch
    "4x256": (4, 4, 256, 4096, 16),
    "6x384": (6, 6, 384, 8192, 16),
    "8x512": (8, 8, 512, 16384, 16),
}
QUICK = {"2x128": (2, 2, 128, 1024, 8)}
VARIANTS = {
    "next-token": {},
    "64 registers": {"registers": RegisterConfig("2d", 64)},
    "256 registers": {"registers": RegisterConfig("2d", 256)},
    "bfloat16, 64 registers": {"registers": RegisterConfig("2d", 64), "precision": "bfloat16"},
    "recomputed, 64 registers": {"registers": RegisterConfig("2d", 64), "activation_checkpointing": True},
    "micro_batch a quarter": {"micro_batch": 4},
    "3 parallel heads": {"parallel_heads": ParallelHeadsConfig(3)},
    "private blocks": {"private_blocks": PrivateBlocksConfig(0.1)},
    "aligned states": {"aligned_states": AlignedStatesConfig(2.0)},
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tiny size, to see that it runs")
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--config", help="measure this configuration (JSON) in this process")
    arguments = parser.parse_args()
    if arguments.config:
        print(json.dumps(measure(from_dict(TrainConfig, json.loads(arguments.config)))))
        return
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    rows = []
    for size, (layers, heads, width, codes, batch) in (QUICK if arguments.quick else SIZES).items():
        for variant, changes in VARIANTS.items():
            model = TransformerConfig(layers, heads, width, codes, 10, (16, 16))
            config = dataclasses.replace(TrainConfig(), model=model, batch_size=batch, steps=2, log_every=0,
                                         val_every=0, sample_every=0, save_every=0, **changes)  # fmt: skip
            command = [sys.executable, __file__, "--config", json.dumps(to_dict(config))]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{size}, {variant} failed: {done.stderr[-800:]}")
            measured = json.loads(done.stdout.splitlines()[-1])
            planned = plan(size, config, "cpu", 1, 0.4)["memory"]["total"]
            rows.append({"size": size, "training": variant, "planned GiB": planned / GIB,
                         "measured GiB": measured / GIB, "planned / measured": planned / measured})  # fmt: skip
    print(table(rows))
    if arguments.json:
        write(arguments.json, {"command": " ".join(["python", *sys.argv]), "machine": machine(), "rows": rows})


def measure(config: TrainConfig) -> int:
    """Bytes."""
    import resource

    import torch

    from mutor_vision.data.token_set import TokenSet
    from mutor_vision.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        write_random_codes(Path(folder) / "codes", config)
        config = dataclasses.replace(config, codes=str(Path(folder) / "codes"))
        TokenSet.open(config.codes)
        torch.nn.Linear(64, 64)(torch.zeros(64, 64)).sum().backward()  # what the first product loads
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        train(config, Path(folder) / "run")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * resource.getpagesize()


def write_random_codes(path: Path, config: TrainConfig) -> None:
    import numpy as np

    from mutor_vision.data.token_set import code_dtype, save_array, shard_names, write_manifest

    model, images = config.model, 4 * config.batch_size
    (path / "tokenizer").mkdir(parents=True)
    codes, labels = shard_names(0)
    generator = np.random.default_rng(0)
    random = generator.integers(model.vocab_size, size=(images, 1, model.num_tokens))
    save_array(path / codes, random.astype(code_dtype(model.vocab_size)))
    save_array(path / labels, generator.integers(model.num_classes, size=images))
    made = {
        "format": 1, "tokenizer_sha256": "", "codebook_size": model.vocab_size, "image_size": 256,
        "grid": list(model.grid), "views": ["center"], "class_names": [str(n) for n in range(model.num_classes)],
    }  # fmt: skip
    write_manifest(path, made, [images])


if __name__ == "__main__":
    run_command(main)
