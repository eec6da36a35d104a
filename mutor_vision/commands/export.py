"""A run -> a folder that diffusers loads without this package, with a model card: what can be put on a hub.

mutor export runs/mutor-2d my-model --license cc-by-nc-4.0 --metrics metrics.json

DiffusionPipeline.from_pretrained("my-model", trust_remote_code=True)(["tench"]).images
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run directory or checkpoint")
    parser.add_argument("folder", help="folder to write; must not exist")
    parser.add_argument("--weights", default="best", help="best (default: EMA where there is one), ema, model, or "
                        "another that `mutor info` lists")  # fmt: skip
    parser.add_argument("--adapter", default="", help="LoRA run trained on the model, to be merged into it")
    parser.add_argument("--metrics", default="", help="result of `mutor fid --json`, for the model card")
    parser.add_argument("--license", default="", help="identifier for the card, such as mit; default: none stated")
    parser.add_argument("--no-samples", action="store_true", help="draw no grid of samples for the card")


def main(arguments: argparse.Namespace) -> None:
    from mutor_vision.interop.export import export  # here: diffusers takes seconds to import

    export(
        arguments.run, Path(arguments.folder), weights=arguments.weights, adapter=arguments.adapter,
        metrics=arguments.metrics, licence=arguments.license, samples=not arguments.no_samples,
    )  # fmt: skip
    print(f"{arguments.folder}: load it with DiffusionPipeline.from_pretrained({arguments.folder!r}, "
          "trust_remote_code=True); read its README.md before you publish it")  # fmt: skip
