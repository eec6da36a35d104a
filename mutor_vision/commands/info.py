"""The command `mutor info`: what is this folder? One screen on a run, a checkpoint or a token set."""

import argparse
import math
from pathlib import Path
from typing import Any

from mutor_vision.errors import UserError
from mutor_vision.names import printable
from mutor_vision.settings import flat
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json, write_json
from mutor_vision.storage.outputs import check_out_file
from mutor_vision.storage.run_log import held_out_losses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is printed here, too")


def main(arguments: argparse.Namespace) -> None:
    if arguments.json:
        check_out_file(arguments.json)
    found = facts(arguments.path)
    if arguments.json:
        write_json(arguments.json, found)
    print(describe(arguments.path, found))


def facts(path: str | Path) -> dict[str, Any]:
    """What a folder says of itself, JSON-ready. Raises UserError when `path` is nothing of ours, IntegrityError when it
    is damaged."""
    path = Path(path)
    if (path / "manifest.json").is_file() and not (path / "config.json").is_file():
        return _of_token_set(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no run, checkpoint or token set: it has neither config.json nor manifest.json")
    return _of_model(path)


def describe(path: str | Path, found: dict[str, Any]) -> str:
    """A few lines for a person, of the facts."""
    if found["kind"] == "token set":
        return _text([
            f"token set {path}, complete and verified",
            f"  {found['images']:,} images of {found['classes']} classes, {found['image_size']} pixels square",
            f"  {'x'.join(map(str, found['grid']))} codes in [0, {found['codebook_size']}), views "
            + ", ".join(found["views"]),
            f"  tokenizer {found['tokenizer_sha256'][:16]}",
        ])  # fmt: skip
    lines = [f"{found['kind']} {path}, written by mutor_vision {found['mutor_vision']}"]
    if status := found["status"]:
        reason = f": {status['reason']}" if status["reason"] else ""
        lines.append(f"  {status['state']} at step {status['step']}{reason}")
    if found["without_weights"]:
        return _text([*lines, f"  no weights: {found['without_weights']}"])
    for name, weights in found["weights"].items():
        what = f"{weights['numbers']:,} numbers in {weights['tensors']} tensors"
        lines.append(f"  {found['checkpoint']}/{name}.safetensors: {what}")
    if losses := found["held_out"]:
        lowest = min(losses, key=losses.__getitem__)
        which = f", lowest with --weights {lowest}" if len(losses) > 1 else ""
        said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        lines.append(f"  held-out loss at step {found['held_out_step']}: {said}{which}")
    return _text([*lines, "  settings:", *(f"    {name} = {value}" for name, value in flat(found["config"]).items())])


def _of_token_set(path: Path) -> dict[str, Any]:
    from mutor_vision.data.token_set import TokenSet

    codes = TokenSet.open(path)
    return {
        "kind": "token set", "images": codes.num_images, "classes": len(codes.class_names),
        "image_size": codes.image_size, "grid": list(codes.grid), "codebook_size": codes.codebook_size,
        "views": list(codes.views), "tokenizer_sha256": codes.tokenizer_identity,
    }  # fmt: skip


def _of_model(path: Path) -> dict[str, Any]:
    values = read_json(path / "config.json", {"kind": str, "mutor_vision": str, "config": dict})
    found = {name: values[name] for name in ("kind", "mutor_vision", "config")}
    found |= {"status": None, "checkpoint": None, "weights": {}, "without_weights": "", "held_out": {}}
    if (path / "status.json").is_file():
        found["status"] = read_json(path / "status.json", {"state": str, "step": int, "reason": str})
    try:
        folder = checkpoint.resolve(path)
    except UserError as error:
        return found | {"without_weights": str(error)}
    found["checkpoint"] = folder.name
    for name in checkpoint.weight_names(folder):
        shapes = [tensor.shape for tensor in checkpoint.read_weights(folder, name).values()]  # mapped, not read
        found["weights"][name] = {"numbers": sum(math.prod(shape) for shape in shapes), "tensors": len(shapes)}
    if (path / "log.jsonl").is_file() and (losses := held_out_losses(path)):
        found["held_out_step"], found["held_out"] = losses
    return found


def _text(lines: list[str]) -> str:
    # A run may be a stranger's: what it says of itself is text, and no line of its own.
    return "\n".join(map(printable, lines))
