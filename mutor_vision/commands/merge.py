"""The command `mutor merge`: a base and its LoRA adapter -> a plain run."""

import argparse

from mutor_vision.model.lora import merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="run or checkpoint that the adapter was trained on")
    parser.add_argument("adapter", help="run or checkpoint of the adapter")
    parser.add_argument("out", help="run directory to write; must not exist")
    parser.add_argument("--weights", default="best", help="of the adapter: best (EMA where there is one), ema or model")


def main(arguments: argparse.Namespace) -> None:
    merge(arguments.base, arguments.adapter, arguments.out, arguments.weights)
    print(f"{arguments.out}: {arguments.adapter} merged into {arguments.base}, a plain run")
