"""A part of a token set as a token set of its own, which the studies of scarce data train on."""

from pathlib import Path

import numpy as np

from mutor_vision.data.token_set import TokenSet, save_array, shard_names, write_manifest
from mutor_vision.storage import checkpoint


def subset(source: Path, of_each_class: slice, out: Path) -> None:
    """The token set of these images of every class, where it is not there yet."""
    if (out / "manifest.json").exists():
        return
    tokens = TokenSet.open(source)
    labels = tokens.labels.numpy()
    chosen = np.concatenate(
        [np.flatnonzero(labels == label)[of_each_class] for label in range(len(tokens.class_names))]
    )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer").exists():
        checkpoint.export(tokens.tokenizer_path, out / "tokenizer")
    codes_name, labels_name = shard_names(0)
    save_array(out / codes_name, tokens.codes().numpy()[chosen].astype(np.uint16))
    save_array(out / labels_name, labels[chosen])
    plan = {name: value for name, value in tokens.manifest.items() if name not in ("shards", "images_per_class")}
    write_manifest(out, {**plan, "num_images": len(chosen)}, [len(chosen)])
