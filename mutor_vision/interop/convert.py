"""LlamaGen's checkpoints and codes in, our checkpoints back out to LlamaGen's file."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mutor_vision.config import RegisterConfig, TokenizerConfig, TokenizerTrainConfig, TrainConfig
from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.interop import llamagen
from mutor_vision.keyed_random import derived_seed
from mutor_vision.model.transformer import Transformer
from mutor_vision.names import printable
from mutor_vision.progress import progress
from mutor_vision.storage import checkpoint
from mutor_vision.storage import foreign as foreign_checkpoint
from mutor_vision.storage.files import read_json, write_json, written, written_folder
from mutor_vision.storage.foreign import ForeignCheckpoint
from mutor_vision.storage.outputs import check_new
from mutor_vision.storage.seal import write_sealed
from mutor_vision.tokenizer.model import VQTokenizer, load_tokenizer, tokenizer_folder, tokenizer_identity

_SAFETENSORS_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def _print(line: str) -> None:
    print(printable(line, 1000))  # with names from a stranger's file


def convert(
    source: str | Path,
    target: str | Path,
    *,
    tokenizer: str | Path | None = None,
    weights: str = "",
    heads: int = 0,
    image_size: int = 0,
    grid: tuple[int, int] | None = None,
    class_names: list[str] | None = None,
    say: Callable[[str], None] = _print,
) -> None:
    """A LlamaGen transformer, LlamaGen VQ model or taming VQGAN -> the run directory `target`, which must not exist.

    tokenizer: of a transformer, ours or a VQ file. 0 and None mean: from the file where it says, else LlamaGen's own
    (heads by width, 256 pixels, ids as class names). Raises UserError, MismatchError or IntegrityError, and then
    leaves nothing behind."""
    target = Path(target)
    check_new(target)
    foreign = foreign_checkpoint.read(source, weights)
    say(f"{foreign.path}: {foreign.layout}, {len(foreign.tensors)} tensors")
    kind = _kind_of(foreign)
    with written_folder(target) as partial:
        if kind == "transformer":
            _write_transformer(foreign, partial, tokenizer, heads, image_size, grid, class_names, say)
        elif tokenizer:
            raise UserError(f"{foreign.path} is a VQ model itself; drop --tokenizer")
        else:
            config, ours = _read_tokenizer(foreign, kind, image_size, say)
            train_config = TokenizerTrainConfig(model=config, ema_decay=0.0)
            checkpoint.save(partial, 0, "tokenizer", train_config, {"model": ours}, {"step": 0}, keep=2)
            _finish_run(partial, "tokenizer", train_config, foreign.path)
    say(f"{target}: a {'transformer' if kind == 'transformer' else 'tokenizer'} run")


def convert_back(
    run: str | Path, target: str | Path, weights: str = "best", say: Callable[[str], None] = _print
) -> None:
    """A run or checkpoint of ours -> a .pt file {'model': state dict} that LlamaGen's own scripts load. Raises
    UserError when `target` exists or `run` is none."""
    target = Path(target)
    check_new(target)
    folder = checkpoint.resolve(run)
    kind = read_json(folder / "config.json", dict).get("kind")
    if kind not in ("transformer", "tokenizer"):
        raise MismatchError(
            f"{run} holds a {kind}, expected a transformer or tokenizer; `mutor merge` an adapter first"
        )
    ours = checkpoint.read_weights(folder, weights)
    if kind == "transformer":
        theirs = llamagen.llamagen_transformer_state_dict(ours)
        say("the register's row is left out: LlamaGen's code has no register, and sampling does not use it")
    else:
        model = checkpoint.read_config(folder, "tokenizer", TokenizerTrainConfig).model
        if model.quantizer != "vq":
            raise MismatchError(f"{run} has the quantizer '{model.quantizer}'; LlamaGen's VQ model is of 'vq' alone")
        if not model.l2_norm:
            raise MismatchError(f"{run} was trained without l2_norm, which LlamaGen's VQ model always uses")
        theirs = llamagen.llamagen_tokenizer_state_dict(ours)
        say(f"{llamagen.USAGE_BUFFER}, a statistic, is written as zeros")
    del ours
    with written(target) as partial, open(partial, "wb") as file:  # given a name, torch hides that the disk is full
        torch.save({"model": {name: tensor.contiguous() for name, tensor in theirs.items()}}, file)
    say(f"{target}: {len(theirs)} tensors under 'model'")


def _write_transformer(foreign, partial, tokenizer, heads, image_size, grid, class_names, say) -> None:
    vq = write_tokenizer_copy(tokenizer, partial / "tokenizer", say) if tokenizer else None
    downsample = vq.downsample if vq else _setting(foreign, "downsample_size") or 16
    if grid is None:
        pixels = image_size or _setting(foreign, "image_size")
        say(f"{pixels or 256} pixels" + ("" if pixels else ", assumed: no tensor tells; else give --image-size 384"))
        grid = ((pixels or 256) // downsample,) * 2
        if (pixels or 256) % downsample or not grid[0]:
            raise UserError(
                f"image size {pixels} is no multiple of {downsample}, the pixels per token; give --image-size"
            )
    model = llamagen.transformer_config(foreign.tensors, grid, heads)
    shapes = _meta_state(lambda: Transformer(model))
    _check(foreign, llamagen.llamagen_transformer_state_dict(shapes))
    if vq and vq.codebook_size != model.vocab_size:
        raise MismatchError(f"the transformer has {model.vocab_size} codes, the tokenizer {vq.codebook_size}")
    names = class_names or [str(i) for i in range(model.num_classes)]
    if len(names) != model.num_classes:
        raise MismatchError(f"{len(names)} class names for a model of {model.num_classes} classes")
    count = sum(tensor.numel() for tensor in foreign.tensors.values())
    size = f"LlamaGen's size {llamagen.SIZES[model.dim]}" if model.dim in llamagen.SIZES else "no published size"
    say(f"transformer: {model.layers} layers, {model.heads} heads, {model.dim} wide ({size}), {model.vocab_size} "
        f"codes, {model.num_classes} classes, {grid[0]}x{grid[1]} tokens; {count:,} parameters")  # fmt: skip
    generator = torch.Generator().manual_seed(derived_seed(0, "register row"))
    register = torch.randn(model.dim, generator=generator) * 0.02
    say(f"a register's row of {model.dim} numbers from N(0, 0.02) is added to the token embedding")
    file = partial / ".model.safetensors"
    _stream(foreign, register, shapes, file)
    config = TrainConfig(model=model, registers=RegisterConfig(), ema_decay=0.0)
    checkpoint.save(partial, 0, "transformer", config, {"model": file}, {"step": 0}, keep=2)
    write_sealed(partial / "token_set.json", {
        "tokenizer_sha256": tokenizer_identity(partial / "tokenizer") if vq else None,
        "codebook_size": model.vocab_size, "image_size": grid[0] * downsample, "grid": list(grid), "views": [],
        "class_names": names, "shards": [],
    })  # fmt: skip
    _finish_run(partial, "transformer", config, foreign.path)
    if not vq:
        say("no --tokenizer: the run can be trained on, but not sampled from")


def write_tokenizer_copy(source: str | Path, folder: Path, say) -> TokenizerConfig:
    """Our tokenizer or a VQ file -> an exported tokenizer in `folder`."""
    if Path(source).is_file() and Path(source).name != "model.safetensors":
        foreign = foreign_checkpoint.read(source)
        config, ours = _read_tokenizer(foreign, _kind_of(foreign), 0, say)
        stem = folder.with_name(f".{folder.name}.run")
        shutil.rmtree(stem, ignore_errors=True)
        train_config = TokenizerTrainConfig(model=config, ema_decay=0.0)
        checkpoint.save(stem, 0, "tokenizer", train_config, {"model": ours}, {"step": 0}, keep=2)
        checkpoint.export(stem, folder)
        shutil.rmtree(stem)
        return config
    checkpoint.export(tokenizer_folder(source), folder)
    return load_tokenizer(folder).config


def _read_tokenizer(foreign: ForeignCheckpoint, kind: str, image_size: int, say):
    """The configuration and our state dict of a foreign VQ model, checked."""
    if kind == "transformer":
        raise MismatchError(f"{foreign.path} is a transformer, expected a VQ model")
    tensors = llamagen.taming_state_dict(foreign.tensors) if kind == "taming" else dict(foreign.tensors)
    tensors.pop(llamagen.USAGE_BUFFER, None)
    foreign = dataclasses.replace(foreign, tensors=tensors)
    config = llamagen.tokenizer_config(tensors, image_size or 256, l2_norm=kind != "taming")
    expected = llamagen.llamagen_tokenizer_state_dict(_meta_state(lambda: VQTokenizer(config)))
    expected.pop(llamagen.USAGE_BUFFER)
    _check(foreign, expected)
    count = sum(tensor.numel() for tensor in tensors.values())
    say(f"{'taming VQGAN, plain codes' if kind == 'taming' else 'LlamaGen VQ model, unit codes'}: "
        f"{config.downsample} pixels a code, {config.codebook_size} codes of {config.code_dim}, channels "
        f"{', '.join(map(str, config.channels))}; {count:,} parameters")  # fmt: skip
    return config, llamagen.tokenizer_state_dict({name: _load(foreign, name) for name in tensors})


def _kind_of(foreign: ForeignCheckpoint) -> str:
    try:
        return llamagen.kind_of(set(foreign.tensors))
    except MismatchError as error:
        raise MismatchError(f"{foreign.path} is {error}") from None


def _setting(foreign: ForeignCheckpoint, name: str) -> int:
    # From a stranger's file: anything but a sensible number of pixels counts as absent.
    value = foreign.arguments.get(name)
    return value if isinstance(value, int) and 0 < value <= 4096 else 0


def _meta_state(build: Callable[[], torch.nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):  # names and shapes only
        return build().state_dict()


def _check(foreign: ForeignCheckpoint, expected: dict[str, Tensor]) -> None:
    """Names, shapes and types as expected; the error names the first tensor that is not."""
    tensors, path = foreign.tensors, foreign.path
    for problem, names in (("lacks", expected.keys() - tensors.keys()), ("also has", tensors.keys() - expected.keys())):
        if names:
            raise MismatchError(f"{path} {problem} {', '.join(sorted(names)[:3])} ({len(names)} in all); "
                                "it is of another architecture")  # fmt: skip
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise MismatchError(f"{path}: '{name}' has shape {tuple(tensor.shape)}, expected "
                                f"{tuple(expected[name].shape)} from the other tensors")  # fmt: skip
        if tensor.dtype not in _SAFETENSORS_TYPES:
            raise MismatchError(f"{path}: '{name}' is {tensor.dtype}, expected floating point")


def _load(foreign: ForeignCheckpoint, name: str) -> Tensor:
    tensor = foreign.load(name)
    if not torch.isfinite(tensor).all():
        raise IntegrityError(f"{foreign.path}: '{name}' holds numbers that are not finite; use an earlier checkpoint")
    return tensor


def _stream(foreign: ForeignCheckpoint, register: Tensor, shapes: dict[str, Tensor], file: Path) -> None:
    """A checked transformer -> a safetensors file, one tensor in memory at a time. shapes: of our state dict."""
    header, end = {}, 0
    for name, tensor in foreign.tensors.items():
        ((ours, _),) = llamagen.transformer_state_dict({name: torch.empty(0, 1)}, torch.empty(1)).items()
        begin, end = end, end + shapes[ours].numel() * tensor.element_size()
        header[ours] = {"dtype": _SAFETENSORS_TYPES[tensor.dtype], "shape": list(shapes[ours].shape),
                        "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in progress(foreign.tensors, unit=" tensors", desc="convert"):
            (tensor,) = llamagen.transformer_state_dict({name: _load(foreign, name)}, register).values()
            out.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _finish_run(run: Path, kind: str, config, source: Path) -> None:
    checkpoint.write_config(run, kind, config)
    write_json(run / "status.json", {"state": "done", "step": 0, "reason": f"converted from {source.name}"})
