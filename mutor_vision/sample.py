"""A trained run -> images: the command `mutor sample`, and the functions behind it that evaluation uses as well.

Image i of a sampling run depends on the weights, the seed, i, its label and the settings, and on nothing else: not on
the batch size, the order, or the number of processes.
"""

import argparse
import dataclasses
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import mutor_vision
from mutor_vision import checkpoint, images
from mutor_vision.config import TrainConfig
from mutor_vision.errors import UserError
from mutor_vision.generate import CFG_SCHEDULES, SampleSettings, generate
from mutor_vision.inference import QUANTIZATIONS, prepare
from mutor_vision.keyed_random import permutation, uniforms
from mutor_vision.names import match_class, parse_classes
from mutor_vision.outputs import check_out_file
from mutor_vision.runtime import Runtime, finish, start, to_device
from mutor_vision.static_steps import StaticSteps
from mutor_vision.tokenizer.model import VQTokenizer, load_tokenizer
from mutor_vision.transformer import Transformer

LABEL_PLANS = ("balanced", "random")
COMPILE = ("auto", "on", "off")
# Images in one call of the tokenizer's decoder, whose activations are what takes memory. One on a CPU, where the last
# bit of a pixel depends on their number, and an image of a set must not.
DECODED_AT_ONCE = {"cpu": 1, "cuda": 16}
LARGEST_BATCH = {"cuda": 256, "cpu": 32}  # images; by then the matrix products are as fast as they get


@dataclass(frozen=True)
class LoadedModel:
    """Everything that sampling needs, in evaluation mode on one device."""

    transformer: Transformer
    tokenizer: VQTokenizer
    config: TrainConfig
    class_names: list[str]
    runtime: Runtime
    identity: dict  # where the weights come from, for the protocol of a result
    resize: int = 0  # pixels square to resize decoded images to, 0 = as decoded
    static: StaticSteps | None = None  # steps of static shape for this transformer; None = shapes that grow

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images it makes."""
        if self.resize:
            return self.resize, self.resize
        height, width = (side * self.tokenizer.config.downsample for side in self.config.model.grid)
        return height, width


def load(
    path: str | Path, runtime: Runtime, weights: str = "best", adapter: str | Path = "", quantize: str = "none",
    compile: str = "auto",
) -> LoadedModel:  # fmt: skip
    """A run or one of its checkpoints -> LoadedModel. weights: 'model', 'ema', or 'best' (EMA where there is one).
    adapter: a LoRA run trained on it, whose classes, tokenizer and `weights` then count. quantize: 'none' or 'int8',
    see inference.prepare. compile: 'off'; 'auto' records steps as CUDA graphs where there is CUDA; 'on' compiles them
    by torch.compile as well, on any device."""
    if compile not in COMPILE:
        raise UserError(f"compile is '{compile}', expected one of {', '.join(COMPILE)}")
    if adapter:
        from mutor_vision.lora import load_merged

        merged = load_merged(path, adapter, weights)
        folder, root, config, weights = merged.folder, merged.root, merged.config, merged.weights
        transformer, base = merged.transformer, {"base": merged.base}
    else:
        folder = checkpoint.resolve(path)
        config = checkpoint.read_config(folder, "transformer", TrainConfig)
        root = folder if (folder / "tokenizer").is_dir() else folder.parent.parent
        weights = checkpoint.weights_named(folder, weights)
        transformer, base = Transformer(config.model), {}
        checkpoint.load_strictly(transformer, checkpoint.read_weights(folder, weights), folder)
    for name in ("tokenizer", "token_set.json"):
        if not (root / name).exists():
            raise UserError(f"{root} has no {name}; give a run of train/imagenet.py, or `mutor convert --tokenizer` it")
    token_set = checkpoint.read_json(root / "token_set.json")
    identity = {
        "run": root.name,
        "checkpoint": folder.name,
        "weights": weights,
        "weights_sha256": checkpoint.sha256(folder / f"{weights}.safetensors"),
        "tokenizer_sha256": token_set["tokenizer_sha256"],
    } | base
    if quantize != "none":
        identity["quantize"] = quantize
    transformer = transformer.to(runtime.device).eval().requires_grad_(False)
    static = compile == "on" or (compile == "auto" and runtime.device.type == "cuda")
    return LoadedModel(
        transformer=prepare(transformer, runtime.autocast_dtype, quantize),
        tokenizer=load_tokenizer(root / "tokenizer", runtime.device),
        config=config,
        class_names=token_set["class_names"],
        runtime=runtime,
        identity=identity,
        static=StaticSteps("inductor" if compile == "on" else "") if static else None,
    )


def label_plan(num: int, num_classes: int, plan: str = "balanced", seed: int = 0) -> Tensor:
    """(num,) int64 labels in a seeded, shuffled order. 'balanced': as equal numbers of each class as `num` allows;
    'random': uniform draws, LlamaGen's protocol. The order matters: Inception Score is taken over consecutive parts."""
    if plan == "random":
        draws = uniforms(seed, "label", np.arange(num), 1)[:, 0]
        return torch.from_numpy((draws * num_classes).astype(np.int64))
    if plan == "balanced":
        return torch.from_numpy(permutation(seed, "label", 0, num) % num_classes)
    raise UserError(f"labels is '{plan}', expected one of {', '.join(LABEL_PLANS)}")


def sample_images(
    loaded: LoadedModel, labels: Tensor, indices: np.ndarray, settings: SampleSettings, seed: int
) -> Tensor:
    """labels (B,) in [0, num_classes), indices (B,) -> uint8 images (B, 3, H, W) on the CPU."""
    return _arrived(*_launch(loaded, labels, indices, settings, seed))


@torch.no_grad()
def _launch(loaded, labels, indices, settings, seed) -> tuple[Tensor, torch.cuda.Event | None]:
    """As sample_images, but on CUDA the host does not wait: the images are there once the event has happened."""
    device = loaded.runtime.device
    with loaded.runtime.autocast():
        codes = generate(
            loaded.transformer, to_device(labels, device), settings, seed=seed, indices=np.asarray(indices),
            static=loaded.static,
        )  # fmt: skip
    decoded = torch.cat([_decode(loaded, part) for part in codes.split(DECODED_AT_ONCE[device.type])])
    if device.type != "cuda":
        return decoded, None
    host = torch.empty(decoded.shape, dtype=decoded.dtype, pin_memory=True)
    host.copy_(decoded, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _arrived(images: Tensor, event: torch.cuda.Event | None) -> Tensor:
    if event is not None:
        event.synchronize()
    return images


def _decode(loaded: LoadedModel, codes: Tensor) -> Tensor:
    """codes (B, h, w) -> uint8 (B, 3, H, W) on their device."""
    tokenizer = loaded.tokenizer
    if not loaded.resize:
        return images.to_uint8(tokenizer.decode(codes))
    # LlamaGen's protocol for its 384-pixel models: bicubic without antialiasing, on pixels that are not yet clamped.
    pixels = tokenizer.decoder(tokenizer.post_quant_conv(tokenizer.quantizer.lookup(codes))).float()
    return images.to_uint8(F.interpolate(pixels, size=loaded.image_size, mode="bicubic"))


def sample_stream(
    loaded: LoadedModel, labels: Tensor, settings: SampleSettings, seed: int, batch_size: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Images 0..len(labels)-1, shared among the processes: yields this process's (indices (b,), uint8 (b, 3, H, W)).

    Round r covers the indices from r * batch_size * world_size; every process has the same number of rounds, the last
    of which may be empty for some.
    """
    runtime, count = loaded.runtime, len(labels)
    firsts = range(runtime.rank * batch_size, count + runtime.rank * batch_size, batch_size * runtime.world_size)
    rounds = (np.arange(first, max(first, min(first + batch_size, count))) for first in firsts)
    return sample_batches(loaded, labels, rounds, settings, seed)


def sample_batches(
    loaded: LoadedModel, labels: Tensor, batches: Iterable[np.ndarray], settings: SampleSettings, seed: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Each batch of image indices (b,), into labels -> (indices, uint8 (b, 3, H, W) on the CPU); b may be 0.

    On CUDA a batch is yielded when the next one has been launched, so that the device goes on while its images are
    fetched, measured or written."""
    ahead = 1 if loaded.runtime.device.type == "cuda" else 0
    waiting = deque()
    for indices in batches:
        if len(indices):
            launched = _launch(loaded, labels[torch.from_numpy(indices)], indices, settings, seed)
        else:
            launched = torch.empty(0, 3, *loaded.image_size, dtype=torch.uint8), None
        waiting.append((indices, launched))
        if len(waiting) > ahead:
            indices, launched = waiting.popleft()
            yield indices, _arrived(*launched)
    for indices, launched in waiting:
        yield indices, _arrived(*launched)


def sample_in_order(
    loaded: LoadedModel, labels: Tensor, settings: SampleSettings, seed: int, batch_size: int
) -> Iterator[Tensor]:
    """The same, gathered: every process sees all images (b, 3, H, W) uint8 in the order of their indices."""
    runtime = loaded.runtime
    done = 0
    for _, part in sample_stream(loaded, labels, settings, seed, batch_size):
        padded = torch.zeros(batch_size, *part.shape[1:], dtype=torch.uint8)
        padded[: len(part)] = part
        gathered = runtime.gather(padded.to(runtime.device)).cpu()
        count = min(batch_size * runtime.world_size, len(labels) - done)
        done += count
        yield gathered[:count]


def default_batch_size(loaded: LoadedModel) -> int:
    """Collective: images at once and process, the same on all: what half of the free memory holds, a power of two."""
    runtime = loaded.runtime
    memory = free_bytes(runtime.device) / 2 - DECODED_AT_ONCE[runtime.device.type] * decoder_bytes(loaded)
    fitting = max(1, int(memory / bytes_per_image(loaded)))
    fitting = runtime.gather(torch.tensor([fitting], device=runtime.device)).min().item()
    return min(LARGEST_BATCH[runtime.device.type], 2 ** (fitting.bit_length() - 1))


def bytes_per_image(loaded: LoadedModel) -> int:
    """Memory of one image while its codes are drawn: cache and logits of two streams."""
    config, dtype = loaded.config.model, loaded.runtime.autocast_dtype or torch.float32
    cache = 2 * config.layers * 2 * config.num_tokens * config.dim * dtype.itemsize
    # Logits of both streams, guided, filtered, as probabilities (float32), and summed up (float64) with a copy.
    return cache + config.vocab_size * (5 * 4 + 2 * 8)


def decoder_bytes(loaded: LoadedModel) -> int:
    """Memory of one image in the tokenizer's decoder: six of the widest float32 activation at full size, of which a
    residual block holds five (its input, normalised, convolved, normalised, convolved) and a convolution the rest."""
    height, width = (side * loaded.tokenizer.config.downsample for side in loaded.config.model.grid)
    return 6 * max(loaded.tokenizer.config.channels[:2]) * height * width * 4


def free_bytes(device: torch.device) -> int:
    """Memory that this process may take: the GPU's, or its share of what the machine has left."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: less exact, as it leaves out what the system would give back
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def training_model(transformer: Transformer, run: Path, config: TrainConfig, runtime: Runtime) -> LoadedModel:
    """A model in training, put into evaluation mode, that samples like a finished run."""
    return LoadedModel(
        transformer=transformer.eval(),
        tokenizer=load_tokenizer(run / "tokenizer", runtime.device),
        config=config,
        class_names=checkpoint.read_json(run / "token_set.json")["class_names"],
        runtime=runtime,
        identity={},
    )


def settings_in_training(config: TrainConfig) -> SampleSettings:
    return SampleSettings(cfg_scale=config.sample_cfg_scale if config.label_dropout else 1.0)


def save_training_grid(transformer: Transformer, run: Path, step: int, config: TrainConfig, runtime: Runtime) -> None:
    """samples/step-<step>.png of a run in training: classes spread over all, the same seeds every time. Call on one
    rank."""
    loaded = training_model(transformer, run, config, dataclasses.replace(runtime, rank=0, world_size=1))
    columns = 8
    classes = _spread_classes(config.model.num_classes, config.sample_classes)
    labels = torch.tensor(classes).repeat_interleave(columns)
    batches = list(sample_in_order(loaded, labels, settings_in_training(config), 0, default_batch_size(loaded)))
    names = [loaded.class_names[c] for c in classes]
    images.save_png(images.grid(torch.cat(batches), columns, names), run / "samples" / f"step-{step:07d}.png")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of SampleSettings."""
    group = parser.add_argument_group("drawing")
    defaults = SampleSettings()
    group.add_argument("--cfg-scale", type=float, default=defaults.cfg_scale, help="guidance, 1 = none (default 2)")
    group.add_argument("--cfg-schedule", default=defaults.cfg_schedule, help=", ".join(CFG_SCHEDULES))
    group.add_argument("--cfg-power", type=float, default=defaults.cfg_power, help="exponent of power-cosine")
    group.add_argument("--cfg-interval", default="0,0", help="guided tokens first,end; end 0 = to the last")
    group.add_argument("--temperature", type=float, default=defaults.temperature, help="0 = greedy")
    group.add_argument("--top-k", type=int, default=defaults.top_k, help="0 = all")
    group.add_argument("--top-p", type=float, default=defaults.top_p, help="1 = all")


def add_execution(parser) -> None:
    """The flags of `load` that say how to compute. parser: an argparse parser, or a group of one."""
    parser.add_argument(
        "--compile", default="auto", help="auto (CUDA graphs on CUDA), on (torch.compile too: for long runs) or off"
    )
    parser.add_argument("--quantize", default="none", help=f"{' or '.join(QUANTIZATIONS)} (weights; recorded)")


def settings_from(arguments: argparse.Namespace) -> SampleSettings:
    """SampleSettings from parsed flags; raises UserError for values out of range."""
    try:
        interval = tuple(int(part) for part in arguments.cfg_interval.split(","))
    except ValueError:
        raise UserError(f"--cfg-interval is '{arguments.cfg_interval}', expected first,end such as 0,64") from None
    names = [f.name for f in dataclasses.fields(SampleSettings) if f.name != "cfg_interval"]
    return SampleSettings(cfg_interval=interval, **{name: getattr(arguments, name) for name in names})


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
    parser.add_argument("--adapter", default="", help="LoRA run trained on the model; its classes then count")
    parser.add_argument("--resize", type=int, default=0, help="pixels (LlamaGen: 256 for 384 models), 0 = as decoded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="best", help="best (default: EMA where there is one), ema or model")
    parser.add_argument("--batch-size", type=int, default=0, help="images at once per process, 0 = by free memory")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_execution(parser)
    add_settings(parser)


def main(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments)
    out = Path(arguments.out)
    if arguments.per_class < 1:
        raise UserError(f"--per-class is {arguments.per_class}, expected 1 or more")
    if arguments.batch_size < 0:
        raise UserError(f"--batch-size is {arguments.batch_size}, expected 1 or more, or 0 to choose by free memory")
    if arguments.resize < 0:
        raise UserError(f"--resize is {arguments.resize}, expected pixels, or 0 for images as decoded")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}, expected 0 to 2^63 - 1")
    if arguments.num is not None:
        if arguments.num < 1:
            raise UserError(f"--num is {arguments.num}, expected 1 or more")
        if arguments.classes is not None or arguments.named:
            raise UserError("--num makes a set over all classes; drop --classes, or drop --num for a grid")
        if out.suffix == ".png":
            raise UserError(f"--num makes a set, but --out is {out}; use FILE.npz or a folder")
        if out.exists():
            raise UserError(f"{out} exists already; remove it or give another --out")
    elif out.suffix != ".png":
        raise UserError(f"--out is {out}, expected FILE.png for a grid; use --num for a set of images")
    check_out_file(out)
    runtime = start(arguments.precision, arguments.device)
    loaded = load(arguments.model, runtime, arguments.weights, arguments.adapter, arguments.quantize, arguments.compile)
    loaded = dataclasses.replace(loaded, resize=arguments.resize)
    if settings.cfg_scale != 1 and not loaded.config.label_dropout:
        raise UserError("the model was trained with label_dropout 0 and has no null class; use --cfg-scale 1")
    vocab_size = loaded.config.model.vocab_size
    if settings.top_k > vocab_size:
        raise UserError(f"--top-k is {settings.top_k}, expected at most the codebook's {vocab_size}")
    batch_size = arguments.batch_size or default_batch_size(loaded)
    if arguments.num is None:
        _write_grid(loaded, settings, arguments, out, batch_size)
    else:
        _write_set(loaded, settings, arguments, out, batch_size)
    finish()


def _write_grid(loaded, settings, arguments, out: Path, batch_size: int) -> None:
    num_classes = len(loaded.class_names)
    classes = parse_classes(arguments.classes, loaded.class_names) if arguments.classes is not None else []
    classes += [match_class(name, loaded.class_names) for name in arguments.named]
    classes = classes or _spread_classes(num_classes, 8)
    labels = torch.tensor(classes).repeat_interleave(arguments.per_class)
    stream = sample_in_order(loaded, labels, settings, arguments.seed, min(batch_size, len(labels)))
    parts = list(_progress(stream, len(labels), loaded.runtime))
    if loaded.runtime.is_main:
        names = [loaded.class_names[c] for c in classes]
        images.save_png(images.grid(torch.cat(parts), arguments.per_class, names), out)
        identity = loaded.identity
        print(f"{out}: {len(labels)} images of {len(classes)} classes from {identity['run']}/{identity['checkpoint']} "
              f"({identity['weights']} weights), cfg {settings.cfg_scale:g}, seed {arguments.seed}")  # fmt: skip


def _write_set(loaded, settings, arguments, out: Path, batch_size: int) -> None:
    runtime, num = loaded.runtime, arguments.num
    labels = label_plan(num, len(loaded.class_names), arguments.labels, arguments.seed)
    record = {
        "num": num, "labels": arguments.labels, "seed": arguments.seed, "sampler": dataclasses.asdict(settings),
        "resize": loaded.resize, "model": loaded.identity, "mutor_vision": mutor_vision.__version__,
        "torch": torch.__version__,
    }  # fmt: skip
    if out.suffix == ".npz":
        from mutor_vision.metrics.npz import NpzImageWriter

        stream = sample_in_order(loaded, labels, settings, arguments.seed, batch_size)
        if runtime.is_main:
            out.parent.mkdir(parents=True, exist_ok=True)
            with NpzImageWriter(out, num, *loaded.image_size) as writer:
                for part in _progress(stream, num, runtime):
                    writer.write(part)
        else:
            for _ in stream:
                pass
    else:
        partial = out.with_name(f".{out.name}.partial")
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        runtime.barrier()
        bar = tqdm(total=num, unit=" images", disable=not runtime.is_main, dynamic_ncols=True)
        for indices, part in sample_stream(loaded, labels, settings, arguments.seed, batch_size):
            for index, image in zip(indices, part, strict=True):
                images.save_png(images.to_pil(image), partial / f"{index:06d}.png")
            bar.update(min(len(part) * runtime.world_size, num - bar.n))
        bar.close()
        runtime.barrier()
        if runtime.is_main:
            os.replace(partial, out)
    if runtime.is_main:
        # Beside the set rather than in it, so that the set is images and nothing else.
        record["labels_of_images"] = labels.tolist()
        out.with_name(out.name + ".json").write_text(json.dumps(record) + "\n")
        print(f"{out}: {num} images, {arguments.labels} labels, seed {arguments.seed}; how they were made: {out}.json")


def _progress(parts: Iterator[Tensor], total: int, runtime: Runtime) -> Iterator[Tensor]:
    with tqdm(total=total, unit=" images", disable=not runtime.is_main, dynamic_ncols=True) as bar:
        for part in parts:
            bar.update(len(part))
            yield part


def _spread_classes(num_classes: int, count: int) -> list[int]:
    count = min(count, num_classes)
    return [i * num_classes // count for i in range(count)]
