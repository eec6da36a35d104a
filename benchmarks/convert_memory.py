"""How much memory and time `mutor convert` takes, on a synthetic LlamaGen file with random weights.

    python benchmarks/convert_memory.py --size XL [--out FOLDER]

Prints the parameters, the file's size, the converting process's peak resident memory and their ratio.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mutor_vision import llamagen
from mutor_vision.cli import Parser, run_command
from mutor_vision.config import TransformerConfig
from mutor_vision.transformer import Transformer

LAYERS = {"B": 12, "L": 24, "XL": 36, "XXL": 48, "3B": 24}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--size", default="XL", help=", ".join(LAYERS))
    parser.add_argument("--out", help="folder for the file and the run; default: a temporary one")
    arguments = parser.parse_args()
    width = next(width for width, size in llamagen.SIZES.items() if size == arguments.size)
    config = TransformerConfig(LAYERS[arguments.size], llamagen.HEADS[width], width, 16384, 1000, (24, 24))
    with torch.device("meta"):
        shapes = llamagen.llamagen_transformer_state_dict(Transformer(config).state_dict())
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        file = Path(folder) / "gpt.pt"
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.empty(shape.shape).uniform_(-0.05, 0.05, generator=generator)
                   for name, shape in shapes.items()}  # fmt: skip
        count = sum(tensor.numel() for tensor in weights.values())
        torch.save({"model": weights, "steps": 0}, file)
        del weights
        command = [
            sys.executable,
            "-m",
            "mutor_vision",
            "convert",
            str(file),
            str(Path(folder) / "run"),
            "--image-size",
            "384",
        ]  # noqa: E501
        begun = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # Linux counts in KiB
        size = file.stat().st_size
    print(json.dumps({
        "size": arguments.size, "parameters": count, "file_bytes": size, "peak_bytes": peak,
        "peak_over_file": round(peak / size, 3), "seconds": round(seconds, 1), "torch": torch.__version__,
    }))  # fmt: skip


if __name__ == "__main__":
    run_command(main)
