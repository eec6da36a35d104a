"""The command `mutor convert`."""

import argparse
from pathlib import Path

from mutor_vision.errors import UserError
from mutor_vision.interop.convert import convert, convert_back
from mutor_vision.names import read_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="LlamaGen's .pt or folder, or a folder of its codes; with --to llamagen our run")
    parser.add_argument("target", help="run directory, token set or .pt file to write; must not exist")
    parser.add_argument("--to", default="run", help="run (default) or llamagen")
    parser.add_argument("--tokenizer", help="of a transformer or of codes: our tokenizer, or a VQ file")
    parser.add_argument("--weights", default="", help="which of several sets: model, ema, ...")
    parser.add_argument("--heads", type=int, default=0, help="attention heads, for widths LlamaGen has not published")
    parser.add_argument("--image-size", type=int, default=0, help="pixels (default: what the file says, else 256)")
    parser.add_argument("--grid", help="tokens h,w (default: image size / pixels per token)")
    parser.add_argument("--class-names", help="text file with a class name a line (default: the ids)")
    parser.add_argument("--num-classes", type=int, default=1000, help="of a folder of codes (default 1000)")
    parser.add_argument("--codes-105", help="folder of the same images' codes cropped at 1.05, used as further views")


def main(arguments: argparse.Namespace) -> None:
    source = Path(arguments.source)
    if arguments.to not in ("run", "llamagen"):
        raise UserError(f"--to is '{arguments.to}', expected run or llamagen")
    if arguments.to == "llamagen":
        convert_back(source, arguments.target, arguments.weights or "best")
        return
    names = read_names(arguments.class_names) if arguments.class_names else None
    from mutor_vision.interop.llamagen_codes import import_codes, is_codes_folder

    if is_codes_folder(source):
        if not arguments.tokenizer:
            raise UserError("codes mean nothing without their tokenizer; give --tokenizer")
        names = names or [str(i) for i in range(arguments.num_classes)]
        import_codes(source, arguments.target, arguments.tokenizer, names, arguments.codes_105)
        return
    convert(
        source, arguments.target, tokenizer=arguments.tokenizer, weights=arguments.weights, heads=arguments.heads,
        image_size=arguments.image_size, grid=parse_grid(arguments.grid), class_names=names,
    )  # fmt: skip


def parse_grid(text: str | None) -> tuple[int, int] | None:
    """'16,16' -> (16, 16). Raises UserError."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--grid is '{text}', expected rows,columns such as 16,16")
    return int(parts[0]), int(parts[1])
