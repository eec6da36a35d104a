"""The features column of a token set: what a timm network has of each cell of each view, once and for all, so that
training with objectives/encoder_states.py needs no network. A second pass over the images, after the codes are made: it
leaves their files as they are, and writes one file for each shard.

Legend: B images, h x w grid, N = h * w, F width of the features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutor_vision.data.folder import batched
from mutor_vision.data.images import views_named
from mutor_vision.data.reading import Views, open_source, read_batches
from mutor_vision.data.source import Without
from mutor_vision.data.token_set import TokenSet, features_name, load_array, save_array, write_features
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.progress import progress
from mutor_vision.runtime import Runtime, exact_float32, fixed_convolutions
from mutor_vision.storage.files import read_json, write_json
from mutor_vision.storage.timm_networks import timm_network

PLAN = "features.json"  # what makes the features that have been begun


class CellFeatures(nn.Module):
    """A timm network's features of an image's cells.

    name: 'timm:NAME[@SIZE]', images being resized to SIZE x SIZE pixels, or to the network's own size; weights: a file
    with timm's names for its tensors, '' = timm's own, downloaded. Raises UserError, DataError, IntegrityError or
    MismatchError."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str, grid: tuple[int, int]):
        super().__init__()
        if not name.startswith("timm:"):
            raise UserError(f"features is '{name}', expected timm:NAME or timm:NAME@SIZE")
        network = timm_network(name.removeprefix("timm:"), weights or None)
        self.network, self.size, self.grid = network.model, network.size, grid
        for name, values in (("mean", network.mean), ("std", network.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        own = self._map(torch.zeros(1, 3, self.size, self.size))
        resampled = f"resampled from {own.shape[2]}x{own.shape[3]}" if own.shape[2:] != grid else "as they are"
        self.identity: dict[str, Any] = network.identity | {
            "size": self.size, "width": own.shape[1], "cells": f"{grid[0]}x{grid[1]}, {resampled}", "dtype": "float16",
        }  # fmt: skip

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, N, F), in raster order. Images and, where its grid is another than the
        codes', the network's features are resized with antialias."""
        images = images.float() / 255
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        features = self._map((images - self.mean) / self.std)
        if features.shape[2:] != self.grid:
            features = F.interpolate(features, self.grid, mode="bilinear", antialias=True)
        return features.flatten(2).transpose(1, 2)

    def _map(self, images: Tensor) -> Tensor:
        """The last features (B, F, rows, columns): of patch tokens without those of class and registers."""
        found = self.network.forward_features(images).float()
        if found.dim() == 3:
            found = found[:, getattr(self.network, "num_prefix_tokens", 0) :]
            rows = round(found.shape[1] ** 0.5)
            if rows**2 != found.shape[1]:
                raise UserError(f"the network's {found.shape[1]} patches are no square; give another network")
            return found.transpose(1, 2).unflatten(2, (rows, rows))
        if found.dim() != 4:
            raise UserError(f"the network's features are {tuple(found.shape)}, expected a map; give another network")
        last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
        return found.permute(0, 3, 1, 2) if last else found


def encode_features(
    data: str | Path, out: str | Path, name: str, weights: str, runtime: Runtime, batch_size: int = 0, workers: int = 2
) -> TokenSet:
    """Add the features to the token set `out`, which was made of `data`, and return it opened and verified. The same
    call goes on after an interruption, and does nothing for a set that has them.

    Raises MismatchError for other images or other features than those that the set has or has begun."""
    out, source = Path(out), open_source(data)
    tokens = TokenSet.open(out)
    if skipped := source.bad(source.numbers_of(list(tokens.manifest.get("skipped", {}))), decode=True):
        source = Without(source, skipped)
    if tokens.manifest["files_sha256"] != source.fingerprint():
        raise MismatchError(f"{out} was made of other images than {data} has; give those that it was made of")
    network = CellFeatures(name, weights, tokens.grid).to(runtime.device)
    _begin(out, tokens, network.identity, runtime)
    if tokens.features:
        return tokens
    views = Views(source, tokens.image_size, views_named(tokens.manifest["view_plan"]))
    sizes = [shard["images"] for shard in tokens.manifest["shards"]]
    shape = (tokens.num_views, tokens.grid[0] * tokens.grid[1], network.identity["width"])
    for shard in range(runtime.rank, len(sizes), runtime.world_size):
        path, begin = out / features_name(shard), sum(sizes[:shard])
        if path.is_file():
            load_array(path, np.float16, (sizes[shard], *shape))
            continue
        batches = list(batched(range(begin, begin + sizes[shard]), batch_size or 8))
        found, done = np.empty((sizes[shard], *shape), np.float16), 0
        with progress(total=sizes[shard], unit="image", desc=f"features, file {shard}") as bar:
            for images in read_batches(views, batches, workers):
                with exact_float32(), fixed_convolutions():
                    part = network(images.flatten(0, 1).to(runtime.device)).half().cpu()
                if not torch.isfinite(part).all():
                    raise UserError(f"features of {name} are not finite in float16; give another network")
                found[done : done + len(images)] = part.unflatten(0, (len(images), tokens.num_views)).numpy()
                done += len(images)
                bar.update(len(images))
        save_array(path, found)
    runtime.barrier()
    if runtime.is_main:
        write_features(out, network.identity)
        (out / PLAN).unlink()
    runtime.barrier()
    return TokenSet.open(out)


def _begin(out: Path, tokens: TokenSet, identity: dict[str, Any], runtime: Runtime) -> None:
    """Collective: record what makes the features, or raise MismatchError where others are made or begun."""
    error = None
    if runtime.is_main:
        begun = tokens.features or (read_json(out / PLAN) if (out / PLAN).is_file() else identity)
        if changed := [key for key in identity if begun.get(key) != identity[key]]:
            shown = "; ".join(f"{key}: {begun.get(key)} -> {identity[key]}" for key in changed)
            error = MismatchError(f"{out} has other features ({shown}); give the same, or a new folder")
        elif not tokens.features:
            write_json(out / PLAN, identity)
    runtime.raise_together(error)
