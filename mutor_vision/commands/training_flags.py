"""Flags of both trainings."""

import argparse
from collections.abc import Iterable


def add_training(parser: argparse.ArgumentParser, presets: Iterable[str]) -> None:
    parser.add_argument("--preset", required=True, metavar="NAME", help=", ".join(presets))
    parser.add_argument("--out", required=True, help="run directory, new or to be continued")
    parser.add_argument("--steps", type=int, help="optimizer steps in all, instead of the preset's")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change any other setting")
    parser.add_argument("--track", action="append", default=[], metavar="NAME",
                        help="show the run in wandb or trackio, too; TensorBoard needs no flag")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration as JSON and stop")
