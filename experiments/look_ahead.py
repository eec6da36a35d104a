"""Look-ahead side by side, for one GPU: the same offsets as registers, as heads on the same state, as private blocks,
as aligned states and as encoder states, against next-token prediction at equal steps and at equal compute.

    python experiments/look_ahead.py --plan                                            # what it costs, before it runs
    python experiments/look_ahead.py --codes CODES --val-codes VAL --work W --seconds 2400

Runs go from the most important on; each leaves a JSON file in WORK/json when it is done, and WORK/summary.md is written
anew. Run it again to go on. CODES has features (mutor encode --features), else the runs that read them are left out.
With --reference (eval/reference.py) and --features, samples of each run are scored, too.
"""

import dataclasses
import time
from dataclasses import replace
from pathlib import Path

from comparison import interval, paired, relative_compute
from grid import Run
from run import lock

from mutor_vision.auxiliary_config import AlignedStatesConfig, EncoderStatesConfig, PrivateBlocksConfig, RegisterConfig
from mutor_vision.cli import Parser, run_command
from mutor_vision.commands.plan import plan
from mutor_vision.config import TrainConfig, TransformerConfig
from mutor_vision.errors import UserError
from mutor_vision.storage.files import read_json, write_json, written
from mutor_vision.training.cost import flops

LEARNING_RATES = (4e-4, 1e-3)  # so that no method is hurt by what suits another
SEEDS = (0, 1, 2)
# 2,000 steps of every method; next-token goes on to the compute of the dearest. 31 M parameters on 64 codes of 4096.
# 100 classes of 500 images are 50,000, of which 512,000 are seen.
TRAINING = TrainConfig(
    model=TransformerConfig(8, 8, 512), batch_size=256, steps=2000, warmup_steps=100, ema_decay=0.999, log_every=50,
    val_every=100, val_images=5000, sample_every=0, save_every=500, eval_images=5000,
)  # fmt: skip
PLANNED = {"vocab_size": 4096, "num_classes": 100, "grid": (8, 8)}  # of the token set that --plan assumes

# What each method is given is right and below, and the cell itself where that is something to align with: the token of
# a cell is no target, since it has been read. Registers are 20 at 64 slots, the paper's 31 %.
TOKENS, STATES = "right below", "same right below"
_MUTOR = RegisterConfig("2d", 20)
_ALIGNED = AlignedStatesConfig(2.0, "0:0,5%:1,27%:0.5", STATES, decay=0.999)
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


def runs_of() -> list[Run]:
    """Every method with one seed, then the other seeds, then the same at the other learning rate."""
    model = replace(TRAINING.model, **PLANNED)
    dearest = max(relative_compute(replace(TRAINING, model=model, **losses)) for losses in METHODS.values())
    longer = -(-TRAINING.steps * dearest // TRAINING.val_every) * TRAINING.val_every
    return [
        Run(f"lr {lr:g}", name, replace(TRAINING, **losses, lr=lr, seed=seed,
                                        steps=TRAINING.steps if losses else int(longer)))
        for lr in LEARNING_RATES for seed in SEEDS for name, losses in METHODS.items()
    ]  # fmt: skip


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--codes", help="token set to train on")
    parser.add_argument("--val-codes", help="token set of held-out images")
    parser.add_argument("--work", type=Path, help="folder for runs and results")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no run that would end after this long"
    )
    parser.add_argument("--reference", default="", help="statistics to measure samples from; default: losses alone")
    parser.add_argument("--features", default="inception", help="network that made them, as of eval/fid.py")
    parser.add_argument("--features-weights", default="", help="its file")
    parser.add_argument("--plan", action="store_true", help="say what the runs cost, and start none")
    parser.add_argument("--gpu", default="h100", help="of --plan; default h100")
    parser.add_argument("--mfu", type=float, default=0.2, help="of --plan: share of its peak; default 0.2")
    arguments = parser.parse_args()
    if arguments.plan:
        print(planned(runs_of(), arguments.gpu, arguments.mfu))
        return
    if not (arguments.codes and arguments.val_codes and arguments.work):
        raise UserError("--codes, --val-codes or --work is missing; give all three, or --plan")
    begun, done = time.monotonic(), 0.0
    for run in readable(runs_of(), arguments.codes):
        path = arguments.work / "json" / f"{run.name}.json"
        spent = time.monotonic() - begun
        expected = run_flops(run) * spent / done if done else 0.0  # at the speed so far
        if spent + expected > arguments.seconds:
            print(
                f"{spent:.0f} s spent, {run.name} would take {expected:.0f} s more; run again to continue", flush=True
            )
            break
        with lock(arguments.work / run.name, wait=False) as mine:
            if mine and not path.exists():
                write_json(path, measure(run, arguments))
                done += run_flops(run)
                print(f"{run.name}: done", flush=True)
                summarise(arguments.work)


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


def measure(run: Run, arguments) -> dict:
    """Train, or go on, and what the log says."""
    from mutor_vision.storage.run_log import read_log
    from mutor_vision.training.loop import train

    scored = {"eval_every": TRAINING.steps, "eval_reference": arguments.reference, "eval_features": arguments.features,
              "eval_weights": arguments.features_weights} if arguments.reference else {}  # fmt: skip
    config = replace(run.config, codes=arguments.codes, val_codes=arguments.val_codes, **scored)
    out, begun = arguments.work / "runs" / run.name, time.monotonic()
    train(config, out)
    log = read_log(out)
    curve = lambda name: {line["step"]: round(line[name], 5) for line in log if name in line}  # noqa: E731
    losses = {name: dataclasses.asdict(own) for name, own in config.auxiliaries.items() if own.active}
    names = sorted({name for line in log for name in line if name.startswith("val_") or "fd" == name})
    return {
        "method": run.method, "lr": config.lr, "seed": config.seed, "steps": config.steps, "losses": losses,
        "batch_size": config.batch_size, "model": dataclasses.asdict(config.model),
        "flops_per_image": flops(config).training, "relative_compute": relative_compute(config),
        "seconds": round(time.monotonic() - begun), "train": curve("next_token"),
        **{name: curve(name) for name in names},
    }  # fmt: skip


def planned(runs: list[Run], gpu: str, mfu: float) -> str:
    """A line for each run: its time, and the time until it is done, by `mutor plan`."""
    lines, total = [f"minutes on one {gpu} at {mfu:.0%} of its peak, of training alone"], 0.0
    for run in runs:
        config = replace(run.config, model=replace(run.config.model, **PLANNED))
        values = plan(run.method, config, gpu, 1, mfu)
        total += values["time"]["seconds"] / 60
        relative, memory = values["flops_per_image"]["relative_to_next_token"], values["memory"]["total"] / 2**30
        lines.append(f"{total:7.1f}  {values['time']['seconds'] / 60:5.2f}  {relative:5.2f} x  {memory:5.1f} GiB  "
                     f"{config.steps:,} steps  {run.block}, {run.method}, seed {config.seed}")  # fmt: skip
    return "\n".join(lines)


def summarise(work: Path) -> None:
    """WORK/summary.md: differences of the held-out loss from next-token, paired by seed, with their intervals."""
    results = [read_json(path) for path in sorted((work / "json").glob("*.json"))]
    lines = ["Held-out loss of the next token (nats), EMA, less that of next-token prediction; 95 % intervals.", "",
             "| lr | method | seeds | at equal steps | at equal compute |", "|---|---|---|---|---|"]  # fmt: skip
    for lr in sorted({result["lr"] for result in results}):
        of = {name: {result["seed"]: result for result in results if (result["lr"], result["method"]) == (lr, name)}
              for name in METHODS}  # fmt: skip
        for name in [name for name in METHODS if METHODS[name] and of[name]]:
            last = {seed: at(result, result["steps"]) for seed, result in of[name].items()}
            found = []
            for factor in (1, next(iter(of[name].values()))["relative_compute"]):
                steps = {seed: result["steps"] * factor for seed, result in of[name].items()}
                baseline = {
                    seed: at(of["next-token"][seed], steps[seed]) for seed in steps.keys() & of["next-token"].keys()
                }
                found.append(interval(paired(last, baseline), 4))
            lines.append(f"| {lr:g} | {name} | {len(last)} | {' | '.join(found)} |")
    with written(work / "summary.md") as partial:
        partial.write_text("\n".join(lines) + "\n")


def at(result: dict, step: float) -> float:
    """The held-out loss at the validation nearest to a step."""
    curve = result["val_next_token_ema"]
    return curve[min(curve, key=lambda known: abs(int(known) - step))]


if __name__ == "__main__":
    run_command(main)
