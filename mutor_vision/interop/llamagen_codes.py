"""LlamaGen's extracted codes -> a token set. LlamaGen keeps two files an image, {set}_codes/{i}.npy int64
(1, views, N) and {set}_labels/{i}.npy int64 (1,); view order and file i are those of its extract_codes_c2i.py."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mutor_vision.data.token_set import FORMAT, PLAN, TokenSet, code_dtype, save_array, shard_names, write_manifest
from mutor_vision.errors import DataError, IntegrityError, MismatchError, UserError
from mutor_vision.interop.convert import write_tokenizer_copy
from mutor_vision.progress import progress
from mutor_vision.storage.files import map_array, read_json, write_json
from mutor_vision.storage.outputs import check_out_folder
from mutor_vision.tokenizer.encode import VIEW_NAMES
from mutor_vision.tokenizer.model import tokenizer_identity

SHARD_SIZE = 10_000  # images
_TOKENIZER = {"config": {"model": {"codebook_size": int, "channels": list}}}


def is_codes_folder(path: Path) -> bool:
    """Whether `path` holds a *_codes and a *_labels folder."""
    return path.is_dir() and any(path.glob("*_codes")) and any(path.glob("*_labels"))


def import_codes(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path,
    class_names: list[str],
    further: str | Path | None = None,
) -> TokenSet:
    """LlamaGen's folder -> the token set `out`; run again to continue after an interruption.

    tokenizer: the one that made the codes, ours or a VQ file. further: a second folder with more views of the same
    images, LlamaGen's ten_crop_105, which training there takes half of its views from, as uniform draws over the 20
    do. Raises UserError, DataError naming the first file that is missing or wrong, or MismatchError when `out` was
    begun with something else."""
    out = Path(out)
    check_out_folder(out)
    folders = [_folders(Path(path)) for path in (source, further) if path]
    num_images = _count(folders)
    _begin_tokenizer(out, tokenizer)
    config = read_json(out / "tokenizer" / "config.json", _TOKENIZER)["config"]["model"]
    plan = _plan(folders, num_images, out / "tokenizer", config, class_names)
    if (out / PLAN).is_file():
        before = read_json(out / PLAN, dict)
        if changed := [name for name in plan if before.get(name) != plan[name]]:
            raise MismatchError(f"{out} was begun with another {', '.join(changed)}; repeat it, or give a new folder")
    write_json(out / PLAN, plan)
    shards = [range(i, min(i + SHARD_SIZE, num_images)) for i in range(0, num_images, SHARD_SIZE)]
    if not (out / "manifest.json").is_file():
        _write_shards(out, folders, shards, plan)
        write_manifest(out, plan, [len(shard) for shard in shards])
    return TokenSet.open(out)


def _write_shards(out: Path, folders: list[tuple[Path, Path]], shards: list[range], plan: dict[str, Any]) -> None:
    tokens = plan["grid"][0] * plan["grid"][1]
    with progress(total=plan["num_images"], unit=" images", desc="import") as bar:
        for number, shard in enumerate(shards):
            codes_path, labels_path = (out / name for name in shard_names(number))
            if not (codes_path.is_file() and labels_path.is_file()):
                codes = np.empty((len(shard), len(plan["views"]), tokens), dtype=code_dtype(plan["codebook_size"]))
                labels = np.empty(len(shard), dtype=np.int64)
                for row, i in enumerate(shard):
                    first = 0
                    for (codes_folder, labels_folder), views in zip(folders, plan["views_of_folders"], strict=True):
                        shape, limit = (1, views, tokens), plan["codebook_size"]
                        codes[row, first : first + views] = _read(codes_folder / f"{i}.npy", shape, limit)
                        label = _read(labels_folder / f"{i}.npy", (1,), len(plan["class_names"]))[0]
                        if first and label != labels[row]:
                            raise DataError(f"{labels_folder / f'{i}.npy'} is {label}, but {labels[row]} in the first "
                                            "folder; they are of different images")  # fmt: skip
                        labels[row], first = label, first + views
                    bar.update()
                save_array(codes_path, codes)
                save_array(labels_path, labels)  # second: a shard is done when both are there
            else:
                bar.update(len(shard))


def _plan(folders, num_images: int, tokenizer: Path, config: dict, class_names: list[str]) -> dict[str, Any]:
    shapes = [_load(codes / "0.npy").shape for codes, _ in folders]
    side = round(shapes[0][-1] ** 0.5) if shapes[0] else 0
    for shape, (codes, _) in zip(shapes, folders, strict=True):
        if len(shape) != 3 or shape[0] != 1 or shape[2] != side * side:
            raise DataError(f"{codes / '0.npy'} has shape {shape}, expected (1, views, tokens) of a square grid")
    views = [name for index, shape in enumerate(shapes) for name in _view_names(shape[1], "@1.05" if index else "")]
    return {
        "format": FORMAT, "tokenizer_sha256": tokenizer_identity(tokenizer), "codebook_size": config["codebook_size"],
        "image_size": side * 2 ** (len(config["channels"]) - 1), "grid": [side, side], "view_plan": "llamagen",
        "views": views, "views_of_folders": [shape[1] for shape in shapes], "num_images": num_images,
        "num_shards": -(-num_images // SHARD_SIZE), "shard_size": SHARD_SIZE, "class_names": class_names,
    }  # fmt: skip


def _view_names(count: int, suffix: str) -> list[str]:
    known = {len(names): names for names in VIEW_NAMES.values()}
    return [name + suffix for name in known.get(count, [f"view-{i}" for i in range(count)])]


def _begin_tokenizer(out: Path, tokenizer: str | Path) -> None:
    others = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if others and not (out / "tokenizer").is_dir():
        raise UserError(f"{out} is not empty and no token set; give a new folder")
    if not (out / "tokenizer").is_dir():
        out.mkdir(parents=True, exist_ok=True)
        write_tokenizer_copy(tokenizer, out / "tokenizer", print)


def _folders(path: Path) -> tuple[Path, Path]:
    found = [sorted(path.glob(pattern)) for pattern in ("*_codes", "*_labels")]
    if [len(folders) for folders in found] != [1, 1]:
        raise UserError(
            f"{path} has {len(found[0])} *_codes and {len(found[1])} *_labels folders, expected one of each"
        )
    return found[0][0], found[1][0]


def _count(folders: list[tuple[Path, Path]]) -> int:
    """The number of images n; every folder must hold exactly 0.npy to (n - 1).npy."""
    counts = {}
    for folder in (folder for pair in folders for folder in pair):
        ids = {int(name[:-4]) for name in os.listdir(folder) if name.endswith(".npy") and name[:-4].isdigit()}
        if missing := set(range(max(ids, default=0) + 1)) - ids:
            raise DataError(f"{folder} lacks {min(missing)}.npy ({len(missing)} file(s)); copy it again")
        counts[folder] = len(ids)
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count:,} files in {folder}" for folder, count in counts.items())
        raise DataError(f"the folders do not belong together: {text}; expected equal numbers")
    return next(iter(counts.values()))


def _load(path: Path) -> np.ndarray:
    try:
        return map_array(path)
    except IntegrityError as error:
        raise DataError(str(error)) from None


def _read(path: Path, shape: tuple[int, ...], limit: int) -> np.ndarray:
    array = _load(path)
    if array.shape != shape or array.dtype.kind not in "iu":
        raise DataError(f"{path} holds {array.dtype} {array.shape}, expected whole numbers {shape}")
    if array.min() < 0 or array.max() >= limit:
        raise DataError(f"{path} holds {array.min()} to {array.max()}, expected 0 to {limit - 1}")
    return array
