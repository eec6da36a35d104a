"""The command `mutor info`: what is this folder? One screen on a run, a checkpoint or a token set."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from mutor_vision.errors import UserError
from mutor_vision.names import printable
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path")


def main(arguments: argparse.Namespace) -> None:
    print(describe(arguments.path))


def describe(path: str | Path) -> str:
    """A few lines for a person. Raises UserError when `path` is nothing of ours, IntegrityError when it is damaged."""
    path = Path(path)
    if (path / "manifest.json").is_file() and not (path / "config.json").is_file():
        return _describe_token_set(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no run, checkpoint or token set: it has neither config.json nor manifest.json")
    return _describe_model(path)


def _describe_token_set(path: Path) -> str:
    from mutor_vision.data.token_set import TokenSet

    codes = TokenSet.open(path)
    return _text([
        f"token set {path}, complete and verified",
        f"  {codes.num_images:,} images of {len(codes.class_names)} classes, {codes.image_size} pixels square",
        f"  {codes.grid[0]}x{codes.grid[1]} codes in [0, {codes.codebook_size}), views {', '.join(codes.views)}",
        f"  tokenizer {codes.tokenizer_identity[:16]}",
    ])  # fmt: skip


def _describe_model(path: Path) -> str:
    values = read_json(path / "config.json", {"kind": str, "mutor_vision": str, "config": dict})
    lines = [f"{values['kind']} {path}, written by mutor_vision {values['mutor_vision']}"]
    status = path / "status.json"
    if status.is_file():
        state = read_json(status, {"state": str, "step": int, "reason": str})
        lines.append(f"  {state['state']} at step {state['step']}{': ' + state['reason'] if state['reason'] else ''}")
    try:
        folder = checkpoint.resolve(path)
    except UserError as error:
        return _text([*lines, f"  no weights: {error}"])
    for name in checkpoint.weight_names(folder):
        shapes = [tensor.shape for tensor in checkpoint.read_weights(folder, name).values()]  # mapped, not read
        count = sum(_product(shape) for shape in shapes)
        lines.append(f"  {folder.name}/{name}.safetensors: {count:,} numbers in {len(shapes)} tensors")
    lines.append("  settings:")
    lines += [f"    {name} = {value}" for name, value in _flat(values["config"])]
    return _text(lines)


def _text(lines: list[str]) -> str:
    # A run may be a stranger's: what it says of itself is text, and no line of its own.
    return "\n".join(map(printable, lines))


def _flat(values: dict, prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _product(shape: Iterable[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
