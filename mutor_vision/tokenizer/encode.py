"""Images -> token set. Shard s belongs to rank s % world_size and no batch crosses a shard boundary, so the files do
not depend on the number of processes or on interruptions: a second call keeps finished shards and makes the others."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from mutor_vision.data.folder import batched, check_apart
from mutor_vision.data.images import to_float, views_named
from mutor_vision.data.reading import Views, open_source, read_batches
from mutor_vision.data.source import Source
from mutor_vision.data.token_set import (
    FORMAT,
    PLAN,
    TokenSet,
    code_dtype,
    load_array,
    save_array,
    shard_names,
    write_manifest,
)
from mutor_vision.errors import ImageError, MismatchError, UserError
from mutor_vision.keyed_random import choose
from mutor_vision.progress import progress
from mutor_vision.runtime import Runtime, exact_float32, fixed_convolutions
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json, write_json
from mutor_vision.storage.outputs import check_out_folder
from mutor_vision.tokenizer.model import VQTokenizer, load_tokenizer, tokenizer_folder, tokenizer_identity
from mutor_vision.tokenizer.repairs import forget_bad, listed, only_repaired, recall_bad, record_bad, without_bad

_CORNERS = ["top-left", "top-right", "bottom-left", "bottom-right", "center"]
VIEW_NAMES = {
    "center": ["center"],
    "center-flip": ["center", "center-flip"],
    "ten-crop": _CORNERS + [f"{name}-flip" for name in _CORNERS],
}
PRECISIONS = ("float32", "bfloat16")
# Entries of a plan that follow from the images. The others are settings.
_OF_IMAGES = ("num_images", "num_shards", "files_sha256", "files_of_classes", "files_of_shards", "images_per_class",
              "left_out", "ignored", "skipped", "repaired")  # fmt: skip
_PLAN = {"num_images": int, "num_shards": int, "files_sha256": str}
_COMPARED = 32  # crops that are also encoded in float32, to measure how many codes another precision changes


@dataclass(frozen=True)
class EncodeSettings:
    """What decides the bytes of a token set."""

    views: str = "center-flip"  # a plan of images.VIEWS
    image_size: int = 0  # pixels, square; 0 = the size that the tokenizer was trained on
    batch_size: int = 0  # crops per forward pass, 0 = by device and image size; rounding may depend on it
    precision: str = "float32"  # of the encoder: float32 | bfloat16, which is faster and changes some per cent of codes
    shard_size: int = 10_000  # images per file
    weights: str = "best"  # of the tokenizer: best | ema | model

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise UserError(f"batch_size is {self.batch_size}, expected 1 or more, or 0 to choose by device")
        if self.shard_size < 1:
            raise UserError(f"shard_size is {self.shard_size}, expected 1 or more")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision is '{self.precision}', expected one of {', '.join(PRECISIONS)}")
        views_named(self.views)


def encode_folder(
    tokenizer_path: str | Path, data: str | Path, out: str | Path, settings: EncodeSettings, runtime: Runtime,
    workers: int = 2, skip_bad: int = 0, verify: bool = False,
) -> TokenSet:  # fmt: skip
    """Encode every image of `data` (a folder, or another source that reading.open_source knows) into the token set
    `out`, and return it opened and verified.

    The same call continues an encoding that was interrupted. Settings, tokenizer and images must be the same as before
    (else MismatchError), except for bad images that were replaced or removed since: finished shards with unchanged
    images are kept, and the manifest lists the repaired images.

    Every image is checked before the first is encoded (Source.check; verify: decoded); one ImageError names all that
    cannot be used. Up to skip_bad of them are left out instead, and stand in the manifest with the reason.
    Damage that only shows in decoding raises ImageError at that image; finished shards stay, no manifest is written."""
    out = Path(out)
    check_apart(data, out)
    check_out_folder(out)
    if skip_bad < 0:
        raise UserError(f"skip_bad is {skip_bad}, expected 0 or more")
    source = open_source(data)
    begun = read_json(out / PLAN, _PLAN) if (out / PLAN).is_file() else {}
    suspects = recall_bad(out) + list(begun.get("skipped", {}))
    runtime.check_same({"images": len(source), "skip_bad": skip_bad, "verify": verify})
    source = without_bad(source, out, skip_bad, verify, suspects, runtime)
    tokenizer = load_tokenizer(tokenizer_path, runtime.device, settings.weights)
    plan = _plan(tokenizer, source, settings, runtime)
    runtime.check_same({name: plan[name] for name in plan if name != "skipped"})  # which the first process alone knows
    plan = _begin(out, plan, source, tokenizer_path, settings.weights, runtime)
    if not (out / "manifest.json").is_file():
        views = Views(source, plan["image_size"], views_named(settings.views))
        if runtime.device.type == "cpu":
            tokenizer.to(memory_format=torch.channels_last)  # a tenth faster on VQ-16; not measured on CUDA
        try:
            measured = _agreement(tokenizer, views, plan, runtime) if runtime.is_main else {}
            _encode_shards(tokenizer, views, out, plan, runtime, workers)
        except ImageError as error:
            record_bad(out, source, error, runtime.rank)
            raise
        runtime.barrier()
        if runtime.is_main:
            write_manifest(out, plan | measured, [len(_images_of(shard, plan)) for shard in range(plan["num_shards"])])
        runtime.barrier()
    return TokenSet.open(out)


def _encode_shards(
    tokenizer: VQTokenizer, views: Views, out: Path, plan: dict[str, Any], runtime: Runtime, workers: int
) -> None:
    mine = range(runtime.rank, plan["num_shards"], runtime.world_size)
    missing = [shard for shard in mine if not _has_shard(out, shard, plan)]
    batches = {shard: list(batched(_images_of(shard, plan), plan["batch_size"])) for shard in missing}
    stream = read_batches(views, [batch for shard in missing for batch in batches[shard]], workers)
    total = sum(len(_images_of(shard, plan)) for shard in missing)
    title = "encode" if runtime.world_size == 1 else f"encode (process 1 of {runtime.world_size})"
    with progress(total=total, unit="image", desc=title) as bar:
        stream = _waiting_shown(stream, bar)
        for shard in missing:
            count, done = len(_images_of(shard, plan)), 0
            # At once. A small array for each batch, kept between the large ones that the encoder takes and gives back,
            # stopped malloc from using their memory again: 0.3 MB an image were lost.
            codes = np.empty((count, len(plan["views"]), math.prod(plan["grid"])), code_dtype(plan["codebook_size"]))
            for images in islice(stream, len(batches[shard])):
                parts = rearrange(images, "image view c h w -> (image view) c h w").split(plan["batch_size"])
                encoded = [_encode(tokenizer, part, plan["precision"], runtime) for part in parts]
                of_images = rearrange(torch.cat(encoded), "(image view) n -> image view n", image=len(images))
                codes[done : done + len(images)] = of_images.cpu().numpy()
                done += len(images)
                bar.update(len(images))
            codes_name, labels_name = shard_names(shard)
            save_array(out / codes_name, codes)
            # Labels last: a shard counts as finished when both files exist.
            assert views.source.labels is not None
            labels = [views.source.labels[i] for i in _images_of(shard, plan)]
            save_array(out / labels_name, np.array(labels, dtype=np.int64))


def _waiting_shown(stream: Iterator[Tensor], bar: tqdm) -> Iterator[Tensor]:
    """The same batches. The bar shows which share of time is spent waiting for them; more --workers lower it."""
    begun, waited = time.perf_counter(), 0.0
    while True:
        asked = time.perf_counter()
        images = next(stream, None)
        now = time.perf_counter()
        waited += now - asked
        bar.set_postfix_str(f"waiting for images {waited / (now - begun):.0%}", refresh=False)
        if images is None:
            return
        yield images


def _encode(tokenizer: VQTokenizer, crops: Tensor, precision: str, runtime: Runtime) -> Tensor:
    """uint8 (B, 3, H, W) on the CPU -> codes (B, N) on the device."""
    images = to_float(crops.to(runtime.device, non_blocking=True))
    if runtime.device.type == "cpu":
        images = images.contiguous(memory_format=torch.channels_last)
    # Deterministic kernels, and no TF32: other rounding moves a latent to another code.
    autocast = torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with exact_float32(), fixed_convolutions(), autocast:
        return tokenizer.encode(images).flatten(1)


def _agreement(tokenizer: VQTokenizer, views: Views, plan: dict[str, Any], runtime: Runtime) -> dict[str, float]:
    """For the manifest: the share of codes that are the same in float32, measured on some crops. Returns {} when the
    encoding is in float32."""
    if plan["precision"] == "float32":
        return {}
    drawn = choose(0, "agreement", plan["num_images"], -(-_COMPARED // len(plan["views"])))
    crops = torch.cat([views[i] for i in drawn.tolist()])[:_COMPARED]
    codes, expected = (
        torch.cat([_encode(tokenizer, part, precision, runtime) for part in crops.split(plan["batch_size"])])
        for precision in (plan["precision"], "float32")
    )
    share = (codes == expected).double().mean().item()
    said = f"{share:.1%} of the codes of {len(crops)} crops, drawn from all images, are those of float32"
    print(f"{plan['precision']}: {said}")
    return {"float32_agreement": round(share, 4)}


def _images_of(shard: int, plan: dict[str, Any]) -> range:
    return range(shard * plan["shard_size"], min((shard + 1) * plan["shard_size"], plan["num_images"]))


def _plan(tokenizer: VQTokenizer, source: Source, settings: EncodeSettings, runtime: Runtime) -> dict[str, Any]:
    image_size = settings.image_size or tokenizer.config.image_size
    side = tokenizer.config.downsample
    if image_size < side or image_size % side:
        raise UserError(f"image_size is {image_size}, expected a multiple of {side}, the tokenizer's pixels per code")
    shards = -(-len(source) // settings.shard_size)
    plan = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer_identity(tokenizer),
        "codebook_size": tokenizer.config.codebook_size,
        "image_size": image_size,
        "grid": [image_size // side, image_size // side],
        "view_plan": settings.views,
        "views": VIEW_NAMES[settings.views],
        "batch_size": settings.batch_size or _default_batch_size(image_size, runtime),
        "precision": settings.precision,
        "num_images": len(source),
        "num_shards": shards,
        "shard_size": settings.shard_size,
        "source": source.name,
        "files_sha256": source.fingerprint(),
        "class_names": list(source.class_names),
        "images_per_class": source.counts(),
        "left_out": source.left_out,
        "ignored": source.ignored,
        "skipped": source.skipped,
        "files_of_classes": source.fingerprints_of_classes(),
    }
    return plan | {"files_of_shards": [source.fingerprint(_images_of(shard, plan))[:16] for shard in range(shards)]}


def _default_batch_size(image_size: int, runtime: Runtime) -> int:
    """On a CPU at most 64 x 64 pixels, because more do not fit its cache: 64-pixel crops take 1.4 times as long in
    batches of 8 as one by one (measured), while 28-pixel crops are faster in batches."""
    return 32 if runtime.device.type == "cuda" else max(1, min(32, 64 * 64 // image_size**2))


def _begin(
    out: Path, plan: dict[str, Any], source: Source, tokenizer_path: str | Path, weights: str, runtime: Runtime
) -> dict[str, Any]:
    """Collective. Check every image that is still to be encoded; then create the folder and its plan, or check that an
    existing plan is the same and remove the shards whose images were repaired. Returns the plan."""
    error = None
    if runtime.is_main:
        try:
            begun = read_json(out / PLAN, _PLAN) if (out / PLAN).is_file() else {}
            if not begun and out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
                raise UserError(f"{out} is not empty and no token set; give a new folder")
            stale, repaired = _compare(out, begun, plan)
            plan = plan | ({"repaired": repaired} if repaired else {})
            if not (out / "manifest.json").is_file():
                _look_at_images(out, plan, source, stale)
            # Shards that no longer fit are removed before the new plan is written, so that a kill between the two
            # leaves no shard under a plan that it does not belong to.
            for name in (name for shard in stale for name in reversed(shard_names(shard))):
                (out / name).unlink(missing_ok=True)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / PLAN, plan)
            forget_bad(out)
            if not (out / "tokenizer").is_dir():
                checkpoint.export(tokenizer_folder(tokenizer_path), out / "tokenizer", weights)
        except UserError as raised:
            error = raised
    runtime.raise_together(error)
    return plan if runtime.is_main else read_json(out / PLAN)


def _look_at_images(out: Path, plan: dict[str, Any], source: Source, stale: list[int]) -> None:
    done = {shard for shard in range(plan["num_shards"]) if _is_there(out, shard)} - set(stale)
    numbers = [i for shard in range(plan["num_shards"]) if shard not in done for i in _images_of(shard, plan)]
    try:
        source.check(numbers)
    except ImageError as error:
        if (out / PLAN).is_file():
            record_bad(out, source, error)
        raise listed(error, out) from None


def _compare(out: Path, begun: dict[str, Any], plan: dict[str, Any]) -> tuple[list[int], list[str]]:
    """(finished shards whose images have changed, images that were repaired) of an encoding that has begun. Raises
    MismatchError when it was begun with other settings, or when shards are finished and images differ by more than
    repairs."""
    changed = [key for key in plan if key not in _OF_IMAGES and begun and begun.get(key) != plan[key]]
    if changed:
        shown = [f"{key}: {_short(begun.get(key))} -> {_short(plan[key])}" for key in changed]
        raise MismatchError(
            f"{out} was begun with other settings ({'; '.join(shown)}); repeat those, or give a new folder"
        )
    if not begun or begun["files_sha256"] == plan["files_sha256"]:
        return [], begun.get("repaired", [])
    finished = [shard for shard in range(begun["num_shards"]) if _is_there(out, shard)]
    bad, before = sorted({*recall_bad(out), *begun.get("skipped", {})}), begun.get("files_of_classes", [])
    may_continue = only_repaired(bad, before, plan["files_of_classes"], plan["class_names"])
    if finished and ((out / "manifest.json").is_file() or not may_continue):
        raise MismatchError(
            f"{out} was begun with other images ({begun['num_images']:,} of them, now {plan['num_images']:,}); restore "
            "them, or give a new folder"
        )
    before, now = begun.get("files_of_shards", []), plan["files_of_shards"]
    stale = [shard for shard in finished if shard >= len(now) or before[shard] != now[shard]]
    return stale, sorted({*begun.get("repaired", []), *bad} - {*plan.get("skipped", {})}) if may_continue else []


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _is_there(out: Path, shard: int) -> bool:
    return all((out / name).is_file() for name in shard_names(shard))


def _has_shard(out: Path, shard: int, plan: dict[str, Any]) -> bool:
    images = len(_images_of(shard, plan))
    codes, labels = (out / name for name in shard_names(shard))
    if not _is_there(out, shard):
        return False
    shape = (images, len(plan["views"]), plan["grid"][0] * plan["grid"][1])
    load_array(codes, code_dtype(plan["codebook_size"]), shape)
    load_array(labels, np.int64, (images,))
    return True
