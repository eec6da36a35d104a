"""How much memory and time `mutor convert` takes, on a synthetic LlamaGen file with random weights.

    python benchmarks/convert_memory.py --size XL [--out FOLDER]

Prints the parameters, the file's size, the converting process's peak resident memory and their ratio.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mutor_vision.cli import Parser, run_command
from mutor_vision.config import TransformerConfig
from mutor_vision.interop import llamagen
from mutor_vision.model.transformer import Transformer

LAYERS = {"B": 12, "L": 24, "XL": 36, "XXL": 48, "3B": 24}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--size", default="XL", help=", ".join(LAYERS))
    parser.add_argument("--out", help="folder for the file and the run; default: a temporary one")
    parser.add_argument("--write", type=Path, help="only write the synthetic file")
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write, arguments.size)
        return
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        file = Path(folder) / "gpt.pt"
        # In a process of its own: on Linux a child's peak starts at the size of the parent that started it.
        subprocess.run([sys.executable, __file__, "--size", arguments.size, "--write", file], check=True)
        converting = """
import resource, sys
from mutor_vision.interop.convert import convert
convert(sys.argv[1], sys.argv[2], image_size=384)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # Linux counts in KiB
"""
        begun = time.perf_counter()
        command = [sys.executable, "-c", converting, str(file), str(Path(folder) / "run")]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds, size = time.perf_counter() - begun, file.stat().st_size
    print(printed)
    peak = int(printed.split()[-1])
    print(json.dumps({"size": arguments.size, "file_bytes": size, "peak_bytes": peak,
                      "peak_over_file": round(peak / size, 3), "seconds": round(seconds, 1)}))  # fmt: skip


def write(file: Path, size: str) -> None:
    """LlamaGen's layout with random weights."""
    width = next(width for width, name in llamagen.SIZES.items() if name == size)
    config = TransformerConfig(LAYERS[size], llamagen.HEADS[width], width, 16384, 1000, (24, 24))
    with torch.device("meta"):
        shapes = llamagen.llamagen_transformer_state_dict(Transformer(config).state_dict())
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.empty(shape.shape).uniform_(-0.05, 0.05, generator=generator)
               for name, shape in shapes.items()}  # fmt: skip
    torch.save({"model": weights, "steps": 0}, file)


if __name__ == "__main__":
    run_command(main)
