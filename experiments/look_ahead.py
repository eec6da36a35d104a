"""Look-ahead side by side: the same offsets as registers, as heads on the same state, as private blocks, as aligned
states and as encoder states, against next-token prediction at equal steps and at equal compute.

    python experiments/look_ahead.py --plan                                            # what it costs, before it runs
    python experiments/look_ahead.py --codes CODES --val-codes VAL --work W --seconds 2400
    python experiments/look_ahead.py --scale cpu ... --reference TRAIN --held-out VAL_IMAGES    # docs/results.md

Runs go from the most important on; each leaves a JSON file in --results when it is done. Run it again to go on, or
several times at once to share the runs out; experiments/look_ahead_page.py makes the page. CODES has features (mutor
encode --features), else the runs that read them are left out. With --reference and --held-out, images as the tokenizer
shows them, samples are drawn and scored, too, and passes of forecast decoding are counted.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from comparison import relative_compute
from grid import Run
from run import ROOT, lock

from mutor_vision.auxiliary_config import AlignedStatesConfig, EncoderStatesConfig, PrivateBlocksConfig, RegisterConfig
from mutor_vision.cli import Parser, run_command
from mutor_vision.commands.plan import plan
from mutor_vision.config import TrainConfig, TransformerConfig
from mutor_vision.errors import UserError
from mutor_vision.settings import preset
from mutor_vision.storage.files import read_json, write_json
from mutor_vision.training.cost import flops


@dataclass(frozen=True)
class Scale:
    """How large, and how often."""

    training: TrainConfig  # of every method; next-token goes on to the compute of the dearest
    learning_rates: tuple[float, ...]  # two, so that no method is hurt by what suits another; samples of the first
    planned: dict  # of the token set that --plan assumes
    features_width: int  # and of its features
    samples: int  # of each model
    seeds: tuple[int, ...] = (0, 1, 2)


SCALES = {
    # 31 M parameters on 64 codes of 4096; 100 classes of 500 images are 50,000, of which 512,000 are seen.
    "gpu": Scale(
        TrainConfig(
            model=TransformerConfig(8, 8, 512), batch_size=256, steps=2000, warmup_steps=100, ema_decay=0.999,
            more_ema_decays=(0.99,), log_every=50, val_every=100, val_images=5000, sample_every=0, save_every=500,
        ), (4e-4, 1e-3), {"vocab_size": 4096, "num_classes": 100, "grid": (8, 8)}, 768, 5000,
    ),
    # 1.3 M parameters on 64 codes of 1024; 12 classes of 500 images, of which 15,360 are seen.
    "cpu": Scale(
        TrainConfig(
            model=TransformerConfig(4, 4, 128, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0), batch_size=32,
            steps=480, warmup_steps=50, ema_decay=0.99, more_ema_decays=(0.95,), log_every=50, val_every=40,
            val_images=600, sample_every=0, save_every=240, precision="bfloat16",
        ), (3e-3, 1e-3), {"vocab_size": 1024, "num_classes": 12, "grid": (8, 8)}, 1280, 1000,
    ),
}  # fmt: skip

# What each method is given is right and below, and the cell itself where that is something to align with: the token of
# a cell is no target, since it has been read. Registers are 20 at 64 slots, the paper's 31 %.
TOKENS, STATES = "right below", "same right below"
_MUTOR = RegisterConfig("2d", 20)
_ALIGNED = AlignedStatesConfig(2.0, "0:0,5%:1,27%:0.5", STATES)
METHODS = {  # from the most important on
    "next-token": {},
    "MuToR-2D": {"registers": _MUTOR},
    "aligned states": {"aligned_states": _ALIGNED},
    "private blocks": {"private_blocks": PrivateBlocksConfig(0.1, offsets=TOKENS)},
    "registers": {"registers": replace(_MUTOR, offsets=TOKENS)},
    "encoder states": {"encoder_states": EncoderStatesConfig(2.0, offsets=STATES)},
    "heads on the state": {"private_blocks": PrivateBlocksConfig(0.1, offsets=TOKENS, blocks=0)},
    "MuToR-2D, m = 2, a from 0.25 to 0": {
        "registers": replace(_MUTOR, max_offset=2, weight=0.25, weight_schedule="~75%:0")
    },
    "registers and aligned states": {"registers": _MUTOR, "aligned_states": _ALIGNED},
}
BASELINE = "next-token"
CFG_SCALE = 2.0  # guidance of samples
NETWORKS = ("timm:tf_efficientnet_lite2@128", "timm:tf_efficientnet_lite0@128")  # weights of installed packages
FORECAST_IMAGES, WINDOW = 24, 8
PANEL = 12  # samples of each method in the picture, one of a class


def runs_of(scale: Scale) -> list[Run]:
    """Every method but the last three with one seed, then the other seeds, then each of those three with all seeds;
    then the same at the other learning rate."""
    training = scale.training
    dearest = max(compute_of(scale, losses) for losses in METHODS.values())
    longer = -(-training.steps * dearest // training.val_every) * training.val_every
    names = list(METHODS)
    order = [(seed, name) for seed in scale.seeds for name in names[:-3]]
    order += [(seed, name) for name in names[-3:] for seed in scale.seeds]
    return [
        Run(f"lr {lr:g}", name, replace(training, **adapted(METHODS[name], scale), lr=lr, seed=seed,
                                        steps=training.steps if METHODS[name] else int(longer)))
        for lr in scale.learning_rates for seed, name in order
    ]  # fmt: skip


def adapted(losses: dict, scale: Scale) -> dict:
    """Teachers average as many steps as the model that is sampled does, and private blocks are a quarter of the model's
    (MTAR has 2 at 12)."""
    changes = {
        "aligned_states": {"decay": scale.training.ema_decay},
        "private_blocks": {"blocks": scale.training.model.layers // 4},
        "encoder_states": {"features_width": scale.features_width},
    }
    return {name: replace(own, **changes[name]) if name in changes and getattr(own, "blocks", 1) else own
            for name, own in losses.items()}  # fmt: skip


def compute_of(scale: Scale, losses: dict) -> float:
    """FLOPs of a step, in those of a next-token step."""
    return relative_compute(replace(scale.training, model=replace(scale.training.model, **scale.planned),
                                    **adapted(losses, scale)))  # fmt: skip


def scored_steps(scale: Scale) -> list[int]:
    """Validated steps of next-token whose samples are scored: those of all, and the compute of the method after it and
    of the last. Losses are compared at every method's compute; samples of as many checkpoints would cost more than
    the training."""
    steps, every = scale.training.steps, scale.training.val_every
    computes = [compute_of(scale, losses) for losses in METHODS.values()]
    return sorted({round(steps * compute / every) * every for compute in (*computes[:2], computes[-1])})


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--scale", default="gpu", help=f"{' or '.join(SCALES)}; default gpu")
    parser.add_argument("--codes", help="token set to train on")
    parser.add_argument("--val-codes", help="token set of held-out images")
    parser.add_argument("--work", type=Path, help="folder for runs")
    parser.add_argument("--results", type=Path, help="folder of JSON; default WORK/json")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no run that would end after this long"
    )
    parser.add_argument("--reference", help="training images as the tokenizer shows them; default: losses alone")
    parser.add_argument("--held-out", help="held-out images, too: the folder reconstructions of mutor reconstruct")
    parser.add_argument("--weights", default="package", help="of the networks: package (default), or random for a test")
    parser.add_argument("--plan", action="store_true", help="say what the runs cost, and start none")
    parser.add_argument("--gpu", default="h100", help="of --plan; default h100")
    parser.add_argument("--mfu", type=float, default=0.2, help="of --plan: share of its peak; default 0.2")
    arguments = parser.parse_args()
    scale = preset(SCALES, arguments.scale)
    if arguments.plan:
        print(planned(scale, arguments.gpu, arguments.mfu))
        return
    if not (arguments.codes and arguments.val_codes and arguments.work):
        raise UserError("--codes, --val-codes or --work is missing; give all three, or --plan")
    if (arguments.reference is None) != (arguments.held_out is None):
        raise UserError("--reference and --held-out go together; give both, or none for losses alone")
    results = arguments.results or arguments.work / "json"
    begun, done = time.monotonic(), 0.0
    with lock(arguments.work / "locks/setup", wait=True):
        if not (results / "setup.json").exists():
            write_json(results / "setup.json", describe(scale, arguments))
    for run in readable(runs_of(scale), arguments.codes):
        path = results / f"{run.name}.json"
        spent = time.monotonic() - begun
        expected = run_flops(run) * spent / done if done else 0.0  # at the speed so far
        if spent + expected > arguments.seconds:
            print(
                f"{spent:.0f} s spent, {run.name} would take {expected:.0f} s more; run again to continue", flush=True
            )
            break
        with lock(arguments.work / "locks" / run.name, wait=False) as mine:
            if mine and not path.exists():
                write_json(path, measure(run, scale, arguments))
                done += run_flops(run)
                print(f"{run.name}: done", flush=True)


def describe(scale: Scale, arguments) -> dict:
    """What a reader of the results must know, and what held-out images score."""
    import torch

    from mutor_vision.data.token_set import TokenSet
    from mutor_vision.names import title
    from mutor_vision.training.cost import parameters

    tokens, held_out = TokenSet.open(arguments.codes), TokenSet.open(arguments.val_codes)
    model = replace(scale.training.model, vocab_size=tokens.codebook_size, num_classes=len(tokens.class_names),
                    grid=tokens.grid)  # fmt: skip
    real, psnr = {}, None
    if arguments.reference:
        psnr = read_json(Path(arguments.held_out).parent / "metrics.json")["psnr"]
        path = arguments.work / "real.json"
        fid(arguments.held_out, path, arguments)
        real = _numbers(read_json(path)["metrics"])
    return {
        "classes": len(tokens.class_names), "names": [title(name) for name in tokens.class_names],
        "images": tokens.num_images, "views": len(tokens.views), "held_out": held_out.num_images,
        "image_size": tokens.image_size, "grid": list(tokens.grid), "codebook_size": tokens.codebook_size,
        "parameters": parameters(model).total, "psnr": psnr, "samples": scale.samples,
        "cfg_scale": CFG_SCALE, "encoder": (tokens.features or {}).get("name", ""), "real": real,
        "torch": torch.__version__.split("+")[0], "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip


def readable(runs: list[Run], codes: str) -> list[Run]:
    """Those that the token set has everything for, with its sizes."""
    from mutor_vision.data.token_set import TokenSet
    from mutor_vision.training.inputs import resolve

    tokens = TokenSet.open(codes)
    if not tokens.features:
        print(f"{codes} has no features: encoder states are left out", flush=True)
        runs = [run for run in runs if not run.config.reads_features]
    return [replace(run, config=resolve(run.config, tokens)) for run in runs]


def run_flops(run: Run) -> float:
    return float(flops(run.config).training * run.config.steps * run.config.batch_size)


def measure(run: Run, scale: Scale, arguments) -> dict:
    """Train, or go on; what the log says, and what samples are worth."""
    from mutor_vision.storage.run_log import read_log
    from mutor_vision.training.loop import train

    config = replace(run.config, codes=arguments.codes, val_codes=arguments.val_codes)
    scored = arguments.reference is not None and config.lr == scale.learning_rates[0]
    steps = (scored_steps(scale) if run.method == BASELINE else [config.steps]) if scored else []
    if run.method == BASELINE and scored:
        config = replace(config, save_every=config.val_every, keep=config.steps // config.val_every + 1)
    out, begun = arguments.work / "runs" / run.name, time.monotonic()
    train(config, out)
    seconds = round(time.monotonic() - begun)
    log = read_log(out)
    curve = lambda name: {line["step"]: round(line[name], 5) for line in log if name in line}  # noqa: E731
    losses = {name: dataclasses.asdict(own) for name, own in config.auxiliaries.items() if own.active}
    names = sorted({name for line in log for name in line if name.startswith("val_")})
    result = {
        "method": run.method, "lr": config.lr, "seed": config.seed, "steps": config.steps, "losses": losses,
        "batch_size": config.batch_size, "val_images": config.val_images, "model": dataclasses.asdict(config.model),
        "averages": list(config.ema_decays),
        "flops_per_image": flops(config).training, "relative_compute": relative_compute(config),
        "seconds": seconds, "train": curve("next_token"),
        **{name: curve(name) for name in names}, "scores": {},
    }  # fmt: skip
    for step in steps:
        result["scores"][step] = score(out, step, lowest(result, step), scale, arguments, run)
    if scored:
        result["tokens_per_pass"] = passes(out, arguments.work)
        if run.method == BASELINE:
            for folder in (out / "checkpoints").iterdir():
                if folder.name != f"step-{config.steps:07d}":
                    shutil.rmtree(folder)
    return result


def lowest(result: dict, step: float) -> str:
    """The average of the weights with the lowest held-out loss at the validation nearest to a step."""
    return min(result["averages"], key=lambda name: at(result, step, name))


def at(result: dict, step: float, average: str) -> float:
    """The held-out loss of an average at the validation nearest to a step."""
    curve = result[f"val_next_token_{average}"]
    return curve[min(curve, key=lambda known: abs(int(known) - step))]


def command(*words: object) -> None:
    """One of mutor's, in a process of its own, quiet unless it fails."""
    done = subprocess.run([sys.executable, "-m", "mutor_vision", *map(str, words)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    if done.returncode:
        raise UserError(f"mutor {' '.join(map(str, words))}: {done.stdout.strip().splitlines()[-1]}")


def score(run: Path, step: int, weights: str, scale: Scale, arguments, of: Run) -> dict:
    """Samples of a checkpoint, in the features of two networks. Every checkpoint draws the same classes with the same
    random numbers."""
    work = arguments.work / "scoring" / f"{of.name}-{step}"
    work.mkdir(parents=True, exist_ok=True)
    samples, page = work / "samples.npz", work / "metrics.json"
    command("sample", run / "checkpoints" / f"step-{step:07d}", "--num-images", scale.samples, "--cfg-scale", CFG_SCALE,
            "--weights", weights, "--decode", "plain", "--out", samples)  # fmt: skip
    fid(samples, page, arguments)
    found = read_json(page)["metrics"]
    if of.config.seed == 0:
        _keep_strip(samples, arguments.work / "panel" / f"{of.name}-{step}.npy")
    shutil.rmtree(work)
    return {"weights": weights, **_numbers(found)}


def fid(samples: Path | str, page: Path, arguments) -> None:
    """Everything that the page shows of images. Features of the reference are kept for the next."""
    first, *others = NETWORKS
    also = [word for name in others for word in ("--also", f"{name}={arguments.weights}")]
    command("fid", "--samples", samples, "--reference", arguments.reference, "--features", first, "--weights",
            arguments.weights, *also, "--metrics", "fid,mind,dc,copies", "--work", arguments.work / "features",
            "--groups", 0, "--json", page)  # fmt: skip


def _numbers(found: dict) -> dict:
    """Metric -> value."""
    return {name: round(entry["value"], 5) for name, entry in found.items() if isinstance(entry.get("value"), float)}


def _keep_strip(samples: Path, path: Path) -> None:
    """The first sample of every class."""
    labels = json.loads(samples.with_name(f"{samples.name}.json").read_text())["labels_of_images"]
    with np.load(samples, allow_pickle=False) as archive:
        pictures = archive["arr_0"]
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.stack([pictures[labels.index(label)] for label in sorted(set(labels))[:PANEL]]))


def passes(run: Path, work: Path) -> dict:
    """Tokens that a pass of forecast decoding makes with guidance, by the number of registers behind the window."""
    path = work / "passes" / f"{run.name}.json"
    path.parent.mkdir(exist_ok=True)
    subprocess.run([sys.executable, str(ROOT / "experiments/passes.py"), str(run), "--images", str(FORECAST_IMAGES),
                    "--windows", str(WINDOW), "--cfg", f"{CFG_SCALE:g}", "--json", str(path)],
                   check=True, stdout=subprocess.DEVNULL, cwd=ROOT)  # fmt: skip
    return {str(row["drafts"]): round(row["tokens_per_pass"], 4) for row in read_json(path)["rows"]}


def planned(scale: Scale, gpu: str, mfu: float) -> str:
    """A line for each run: its time, and the time until it is done, by `mutor plan`."""
    lines, total = [f"minutes on one {gpu} at {mfu:.0%} of its peak, of training alone"], 0.0
    for run in runs_of(scale):
        config = replace(run.config, model=replace(run.config.model, **scale.planned))
        values = plan(run.method, config, gpu, 1, mfu)
        total += values["time"]["seconds"] / 60
        relative, memory = values["flops_per_image"]["relative_to_next_token"], values["memory"]["total"] / 2**30
        lines.append(f"{total:7.1f}  {values['time']['seconds'] / 60:5.2f}  {relative:5.2f} x  {memory:5.1f} GiB  "
                     f"{config.steps:,} steps  {run.block}, {run.method}, seed {config.seed}")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
