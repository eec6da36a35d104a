"""How the cost of a training step grows: with the sequence, and with the model. Prints seconds and the exponent b of
seconds ~ x^b fitted to them (least squares of the logarithms).

    python benchmarks/scaling.py            # 8x8 to 32x32 tokens; 1.5 M to 50 M parameters at 16x16 tokens

What to expect: between 1 (matrix products with weights) and 2 (attention) in the tokens, 1 in the parameters.
"""

import numpy as np
import torch
from report import machine, measure, medians, table, write
from train_step import our_step, parse_arguments

from mutor_vision.config import TransformerConfig
from mutor_vision.model.transformer import Transformer, num_parameters

GRIDS = (8, 12, 16, 24, 32)
SIZES = ((2, 2, 128), (4, 4, 256), (6, 6, 384), (8, 8, 512), (10, 10, 640))  # layers, heads, width


def main() -> None:
    parser = parse_arguments(__doc__)
    parser.set_defaults(size=(4, 4, 256), vocab=4096, batch=4, repeats=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"machine": machine(options.device), "batch": options.batch, "vocab": options.vocab}
    for registers in (0, 0.3125):  # none; 80 of 256
        name = "next-token" if not registers else "registers at 31 % of the slots"
        rows = []
        for grid in GRIDS:
            options.grid = grid
            rows.append({"tokens": grid * grid, "seconds": _seconds(options, round(registers * grid * grid))})
        _print(f"{name}, size {options.size}", "tokens", rows, result)
    options.grid, rows = 16, []
    for options.size in SIZES:
        layers, heads, dim = options.size
        with torch.device("meta"):
            model = Transformer(TransformerConfig(layers, heads, dim, options.vocab, 1000, (16, 16)))
        # Of embeddings only a row is read for each token.
        multiplied = num_parameters(model.blocks) + num_parameters(model.head)
        rows.append({"multiplied parameters": multiplied, "size": str(options.size), "seconds": _seconds(options, 0)})
    _print("next-token, 256 tokens", "multiplied parameters", rows, result)
    if options.json:
        write(options.json, result)


def _seconds(options, registers: int) -> float:
    return medians(measure({"step": our_step(options, registers)}, options.repeats, options.device))["step"]


def _print(title: str, axis: str, rows: list[dict], result: dict) -> None:
    x, y = (np.log([row[key] for row in rows]) for key in (axis, "seconds"))
    exponent = round(float(np.polyfit(x, y, 1)[0]), 2)
    print(f"\n{title}\n{table(rows)}\nexponent in {axis}: {exponent}", flush=True)
    result[title] = {"rows": rows, "exponent": exponent}


if __name__ == "__main__":
    main()
