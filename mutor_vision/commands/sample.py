"""The command `mutor sample`: an image grid, or a set of images for evaluation."""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import mutor_vision
from mutor_vision.commands.flags import add_execution, add_settings, decoding_from, settings_from
from mutor_vision.data import images
from mutor_vision.errors import UserError
from mutor_vision.keyed_random import check_seed
from mutor_vision.names import known_as, match_class, parse_classes, title
from mutor_vision.progress import progress
from mutor_vision.runtime import finish, start
from mutor_vision.sampling.completion import completing
from mutor_vision.sampling.load import LoadedModel, load
from mutor_vision.sampling.stream import default_batch_size, label_plan, sample_in_order, sample_stream, spread_classes
from mutor_vision.storage.files import clear, read_json, written
from mutor_vision.storage.outputs import check_out_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run directory or checkpoint")
    parser.add_argument("--classes", help="ids or names with commas; default: eight spread over all classes")
    parser.add_argument("--class", action="append", default=[], dest="named", metavar="NAME",
                        help="a class by its name, which may hold commas or be a number; may be repeated")  # fmt: skip
    parser.add_argument("--per-class", type=int, default=4, help="images of each class in the grid (default 4)")
    # torchrun takes a bare --num for an abbreviation of its own options, so the flag has a longer name as well.
    parser.add_argument("--num-images", "--num", type=int, dest="num", help="make a set of N images, not a grid")
    parser.add_argument("--labels", default="balanced", help="classes of a set: balanced (default) or random")
    parser.add_argument("--out", required=True, help="grid: FILE.png; set: FILE.npz, or a folder of PNGs")
    parser.add_argument("--image", help="complete this image from its first rows of codes; a grid with it in front")
    parser.add_argument("--keep-rows", type=int, default=0, help="of --image: rows of codes to keep, 0 = half")
    parser.add_argument("--adapter", default="", help="LoRA run trained on the model; its classes then count")
    parser.add_argument("--resize", type=int, default=0, help="pixels (LlamaGen: 256 for 384 models), 0 = as decoded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="best", help="best (default: EMA where there is one), ema, model, or "
                        "another that `mutor info` lists")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=0, help="images at once per process, 0 = by free memory")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_execution(parser)
    add_settings(parser)


def main(arguments: argparse.Namespace) -> None:
    settings, decoding = settings_from(arguments), decoding_from(arguments)
    out = Path(arguments.out)
    if arguments.per_class < 1:
        raise UserError(f"--per-class is {arguments.per_class}, expected 1 or more")
    if arguments.batch_size < 0:
        raise UserError(f"--batch-size is {arguments.batch_size}, expected 1 or more, or 0 to choose by free memory")
    if arguments.resize < 0:
        raise UserError(f"--resize is {arguments.resize}, expected pixels, or 0 for images as decoded")
    check_seed(arguments.seed)
    if arguments.keep_rows and not arguments.image:
        raise UserError("--keep-rows needs --image FILE, the image whose rows are kept")
    if arguments.image and (arguments.num is not None or arguments.resize):
        raise UserError("--image makes a grid of images as decoded; drop --num and --resize")
    if arguments.num is not None:
        if arguments.num < 1:
            raise UserError(f"--num is {arguments.num}, expected 1 or more")
        if arguments.classes is not None or arguments.named:
            raise UserError("--num makes a set over all classes; drop --classes, or drop --num for a grid")
        if out.suffix == ".png" or not out.name:
            raise UserError(f"--num makes a set, but --out is {out}; use FILE.npz or a folder")
        if out.exists() and not _record_of(out).exists():
            raise UserError(f"{out} exists already; remove it or give another --out")
    elif out.suffix != ".png":
        raise UserError(f"--out is {out}, expected FILE.png for a grid; use --num for a set of images")
    check_out_file(out)
    runtime = start(arguments.precision, arguments.device)
    loaded = load(arguments.model, runtime, arguments.weights, arguments.adapter, arguments.quantize, decoding)
    loaded = dataclasses.replace(loaded, resize=arguments.resize)
    if settings.cfg_scale != 1 and not loaded.config.label_dropout:
        raise UserError("the model was trained with label_dropout 0 and has no null class; use --cfg-scale 1")
    vocab_size = loaded.config.model.vocab_size
    if settings.top_k > vocab_size:
        raise UserError(f"--top-k is {settings.top_k}, expected at most the codebook's {vocab_size}")
    asked = {name: getattr(arguments, name) for name in ("seed", "num", "labels", "classes", "per_class", "batch_size")}
    runtime.check_same(asked | dataclasses.asdict(settings) | {"model": loaded.identity, "decoding": loaded.decoding})
    batch_size = arguments.batch_size or default_batch_size(loaded)
    if arguments.num is None:
        _write_grid(loaded, settings, arguments, out, batch_size)
    else:
        _write_set(loaded, settings, arguments, out, batch_size)
    finish()


def _write_grid(loaded, settings, arguments, out: Path, batch_size: int) -> None:
    num_classes = len(loaded.class_names)
    choices = known_as(loaded.class_names) if arguments.classes is not None or arguments.named else []
    classes = parse_classes(arguments.classes, choices) if arguments.classes is not None else []
    classes += [match_class(name, choices) for name in arguments.named]
    classes = classes or spread_classes(num_classes, 8)
    labels = torch.tensor(classes).repeat_interleave(arguments.per_class)
    original = None
    if arguments.image:
        loaded, original = completing(loaded, images.read_image(arguments.image), arguments.keep_rows)
    stream = sample_in_order(loaded, labels, settings, arguments.seed, min(batch_size, len(labels)))
    pixels, columns = torch.cat(list(_progress(stream, len(labels), loaded))), arguments.per_class
    if original is not None:
        rows = pixels.unflatten(0, (len(classes), columns))
        pixels, columns = torch.cat([original.expand(len(classes), 1, -1, -1, -1), rows], 1).flatten(0, 1), columns + 1
    if loaded.runtime.is_main:
        names = [title(loaded.class_names[c]) for c in classes]
        images.save_png(images.grid(pixels, columns, names), out)
        identity = loaded.identity
        print(f"{out}: {len(labels)} images of {len(classes)} classes from {identity['run']}/{identity['checkpoint']} "
              f"({identity['weights']} weights), cfg {settings.cfg_scale:g}, seed {arguments.seed}")  # fmt: skip


def _write_set(loaded, settings, arguments, out: Path, batch_size: int) -> None:
    runtime, num = loaded.runtime, arguments.num
    labels = label_plan(num, len(loaded.class_names), arguments.labels, arguments.seed)
    record = {
        "num": num, "labels": arguments.labels, "seed": arguments.seed, "sampler": dataclasses.asdict(settings),
        "decoding": loaded.decoding, "resize": loaded.resize, "model": loaded.identity,
        "mutor_vision": mutor_vision.__version__, "torch": torch.__version__, "labels_of_images": labels.tolist(),
    }  # fmt: skip
    if out.exists():
        found = read_json(_record_of(out))
        record = json.loads(json.dumps(record))
        if not isinstance(found, dict) or any(found.get(key) != record[key] for key in record):
            raise UserError(f"{out} exists already, and {_record_of(out)} says that it was made in another way; remove "
                            "it or give another --out")  # fmt: skip
        if runtime.is_main:
            print(f"{out} is there already, made in this very way")
        return
    if out.suffix == ".npz":
        from mutor_vision.storage.npz_writer import NpzImageWriter

        stream = sample_in_order(loaded, labels, settings, arguments.seed, batch_size)
        if runtime.is_main:
            out.parent.mkdir(parents=True, exist_ok=True)
            with NpzImageWriter(out, num, *loaded.image_size) as writer:
                for part in _progress(stream, num, loaded):
                    writer.write(part)
                _write_record(out, record, loaded)
        else:
            for _ in stream:
                pass
    else:
        partial = out.with_name(f".{out.name}.partial")
        if runtime.is_main:
            clear(partial)
            partial.mkdir(parents=True)
        runtime.barrier()
        try:
            _write_images(loaded, labels, settings, arguments.seed, batch_size, partial)
            runtime.barrier()
            if runtime.is_main:
                _write_record(out, record, loaded)
                os.replace(partial, out)
        except BaseException:
            if runtime.world_size == 1:  # others may still write to it; the next try removes it then
                clear(partial)
            raise
    if runtime.is_main:
        print(f"{out}: {num} images, {arguments.labels} labels, seed {arguments.seed}; how they were made: "
              f"{_record_of(out)}")  # fmt: skip


def _write_images(loaded, labels, settings, seed: int, batch_size: int, folder: Path) -> None:
    """This process's images of a set, each under its number."""
    with progress(total=len(labels), unit=" images") as bar:
        for indices, part in sample_stream(loaded, labels, settings, seed, batch_size):
            for index, image in zip(indices, part, strict=True):
                images.to_pil(image).save(folder / f"{index:06d}.png")
            bar.update(min(len(part) * loaded.runtime.world_size, len(labels) - bar.n))
            bar.set_postfix_str(_pace(loaded))


def _record_of(out: Path) -> Path:
    """Beside the set rather than in it, so that the set is images and nothing else."""
    return out.with_name(out.name + ".json")


def _write_record(out: Path, record: dict, loaded: LoadedModel) -> None:
    """Before the set appears under its name, so that none is ever without its record."""
    if loaded.decoder.tokens_per_pass != 1:
        record = record | {"tokens_per_pass": round(loaded.decoder.tokens_per_pass, 3)}  # of this process's images
    with written(_record_of(out)) as partial:
        partial.write_text(json.dumps(record) + "\n")


def _pace(loaded: LoadedModel) -> str:
    rate = loaded.decoder.tokens_per_pass
    return "" if rate == 1 else f"{rate:.2f} tokens a pass"


def _progress(parts: Iterator[Tensor], total: int, loaded: LoadedModel) -> Iterator[Tensor]:
    with progress(total=total, unit=" images") as bar:
        for part in parts:
            bar.update(len(part))
            bar.set_postfix_str(_pace(loaded))
            yield part
