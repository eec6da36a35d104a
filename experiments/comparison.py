"""What the runs of experiments/results say about each other: differences paired by seed, with their intervals."""

import math
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from mutor_vision.auxiliary_config import ParallelHeadsConfig, RegisterConfig
from mutor_vision.config import TrainConfig, TransformerConfig
from mutor_vision.errors import UserError
from mutor_vision.settings import from_dict
from mutor_vision.storage.files import read_json
from mutor_vision.training.cost import flops

LONGER = ("long", "longest")  # blocks of the headline's pair, trained longer
BASELINE, MUTOR, MUTOR_ALL = "next-token", "MuToR-2D, 31 %", "MuToR-2D, 100 %"
# Measure of a scored checkpoint -> (name, digits, what less of it is).
MEASURES = {
    "loss": ("held-out loss (nats per token)", 3, "better"),
    "fd": ("Fréchet distance", 2, "better"),
    "accuracy": ("class accuracy (%)", 1, "worse"),
}
SHORT = {"loss": "held-out loss", "fd": "FD", "accuracy": "class accuracy"}


def read(folder: Path) -> tuple[dict, list[dict]]:
    """setup.json, and every run sorted by name."""
    if not (folder / "setup.json").is_file():
        raise UserError(f"{folder} has no setup.json; run experiments/run.py first")
    runs = [read_json(path) for path in sorted(folder.glob("*-seed-*.json"))]
    if not runs:
        raise UserError(f"{folder} has no finished run yet; run experiments/run.py again")
    return read_json(folder / "setup.json"), runs


def relative_compute(config: TrainConfig) -> float:
    """FLOPs of a training step, relative to a next-token step of the same model."""
    return round(flops(config).training / flops(TrainConfig(model=config.model)).training, 4)


def recounted(run: dict) -> float:
    """relative_compute of a run as it is counted today; run['relative_compute'] was counted when the run was made."""
    model = from_dict(TransformerConfig, run["model"])
    registers = from_dict(RegisterConfig, run["registers"], format=3)  # as old as the oldest results
    heads = ParallelHeadsConfig(run["parallel_heads"])
    return relative_compute(TrainConfig(model=model, registers=registers, parallel_heads=heads))


def t_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; the width is nan for one value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, math.nan
    return mean, float(stdtrit(count - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(count)


def paired(values: dict[int, float], others: dict[int, float]) -> list[float]:
    """values - others by seed, for the seeds that both have."""
    return [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]


def spread(values: list[float], digits: int) -> str:
    mean, half = t_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else " (one seed)")


def interval(differences: list[float], digits: int) -> str:
    """'+0.012 [+0.004, +0.020]', in bold when the interval leaves 0 out."""
    if not differences:
        return "-"
    mean, half = t_interval(differences)
    if math.isnan(half):
        return f"{mean:+.{digits}f} (one seed)"
    text = f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    return f"**{text}**" if is_clear(differences) else text


def is_clear(differences: list[float]) -> bool:
    """Whether the interval leaves 0 out. Never with two seeds: two rounded differences can be equal by chance, and the
    interval then has no width."""
    mean, half = t_interval(differences) if len(differences) > 2 else (0.0, math.nan)
    return abs(mean) > half


def said(differences: dict[str, list[float]]) -> str:
    """What paired differences by measure say, in words, by rule: better or worse when the interval leaves 0 out."""
    clear_ones, others = [], []
    for measure, found in differences.items():
        text = f"{SHORT[measure]} {{}}({interval(found, MEASURES[measure][1]).strip('*')})"
        word = judged(found, measure)
        (clear_ones if word else others).append(text.format(f"{word} " if word else ""))
    return "; ".join(clear_ones + ([f"not told apart: {', '.join(others)}"] if others else []))


def judged(differences: list[float], measure: str) -> str:
    """'better', 'worse', or '' where the interval holds 0 or there are fewer than three seeds."""
    if not is_clear(differences):
        return ""
    less = MEASURES[measure][2]
    return less if np.mean(differences) < 0 else {"better": "worse", "worse": "better"}[less]


def select(runs: list[dict], **wanted) -> dict[int, dict]:
    """Seed -> the run with these values."""
    return {run["seed"]: run for run in runs if all(run[key] == value for key, value in wanted.items())}


def methods(runs: list[dict], block: str) -> list[str]:
    """In the order of compute, and of appearance where it is equal; the baseline first."""
    compute = {run["method"]: run["relative_compute"] for run in runs if run["block"] == block}
    kinds = ("next-token", "MuToR-1D", "MuToR-2D", "2 parallel", "4 parallel")
    return sorted(compute, key=lambda name: (next((i for i, k in enumerate(kinds) if name.startswith(k)), 9),
                                             compute[name]))  # fmt: skip


def value(run: dict, step: int | str, measure: str) -> float:
    """A measure at a scored step; accuracy in per cent."""
    return run["scores"][str(step)][measure] * (100 if measure == "accuracy" else 1)


def values(found: dict[int, dict], step, measure: str) -> dict[int, float]:
    """Seed -> measure; step: a number, or run -> number."""
    return {seed: value(run, step(run) if callable(step) else step, measure) for seed, run in found.items()}


best, last = (lambda run: run["best"]), (lambda run: run["steps"])


def step_of_equal_compute(baseline: dict[int, dict], rival: dict) -> int:
    """The planned step of the baseline whose compute is nearest to the whole of the rival's."""
    compute = rival["steps"] * rival["relative_compute"]
    return min(planned(baseline), key=lambda step: (abs(step - compute), step))


def planned(found: dict[int, dict]) -> set[int]:
    """Planned steps that were scored for every seed, without those of early stopping."""
    of_all = set.intersection(*({int(step) for step in run["scores"]} for run in found.values()))
    return {step for step in of_all if any(step == run["steps"] or step != run["best"] for run in found.values())}


def equal_compute(baseline: dict, rival: dict, measure: str) -> list[float]:
    step = step_of_equal_compute(baseline, next(iter(rival.values())))
    return paired(values(rival, last, measure), values(baseline, step, measure))


def equal_steps(baseline: dict, rival: dict, measure: str) -> list[float]:
    both = {s: baseline[s] for s in baseline.keys() & rival.keys() if str(rival[s]["steps"]) in baseline[s]["scores"]}
    steps = {seed: rival[seed]["steps"] for seed in both}
    return paired(values(rival, last, measure),
                  {seed: value(run, steps[seed], measure) for seed, run in both.items()})  # fmt: skip


def last_difference(other: dict, mine: dict, measure: str) -> list[float]:
    return paired(values(mine, last, measure), values(other, last, measure))


def longer_pairs(runs: list[dict]) -> list[list[dict[int, dict]]]:
    """Baseline and MuToR-2D of each longer comparison that has a seed of both."""
    pairs = [[select(runs, block=block, method=name) for name in (BASELINE, MUTOR)] for block in LONGER]
    return [pair for pair in pairs if pair[0].keys() & pair[1].keys()]


def regime_cells(runs: list[dict]) -> list[tuple[int, float]]:
    """(images a class, dropout) that have runs."""
    return sorted({(run["per_class"], run["dropout"]) for run in runs if run["block"] == "regimes"})


def tuned(runs: list[dict], per_class: int, method: str) -> tuple[float, dict[int, dict]] | None:
    """The dropout with the lowest mean of best validation losses, and its runs: over the seeds that all dropouts have
    which were run with two seeds or more."""
    found = {d: select(runs, block="regimes", method=method, per_class=per_class, dropout=d)
             for c, d in regime_cells(runs) if c == per_class}  # fmt: skip
    enough = min(2, max(map(len, found.values()), default=0))
    found = {d: r for d, r in found.items() if len(r) >= enough}
    seeds = set.intersection(*map(set, found.values())) if found else set()
    if not seeds:
        return None
    score = {d: np.mean([min(r[seed]["validation"].values()) for seed in seeds]) for d, r in found.items()}
    dropout = min(score, key=score.get)
    return dropout, {seed: found[dropout][seed] for seed in sorted(seeds)}


def ablation_differences(runs: list[dict]) -> list[tuple[str, list[float]]]:
    """Setting -> differences of the validation loss from the default at the setting's last step, sorted by mean."""
    default, found = select(runs, block="headline", method=MUTOR), []
    for name in sorted({run["method"] for run in runs if run["block"] == "ablations"}):
        changed = select(runs, block="ablations", method=name)
        at = {seed: str(run["steps"]) for seed, run in changed.items() if seed in default}
        found.append((name, [changed[seed]["validation"][step] - default[seed]["validation"][step]
                             for seed, step in sorted(at.items())]))  # fmt: skip
    return sorted(((name, d) for name, d in found if d), key=lambda pair: np.mean(pair[1]))


def draft_means(runs: list[dict], method: str, key: str) -> dict[str, list[float]]:
    """Offset -> values over seeds."""
    found = [run["drafts"] for run in select(runs, block="headline", method=method).values() if "drafts" in run]
    return {name: [one[name][key] for one in found] for name in (found[0] if found else ())}


def gap(runs: list[dict], method: str) -> dict[str, list[float]]:
    losses, own = (draft_means(runs, method, key) for key in ("loss", "next_token_loss"))
    return {name: [a - b for a, b in zip(losses[name], own[name], strict=True)] for name in losses}


def drafting(runs: list[dict]) -> list[str]:
    return [name for name in methods(runs, "headline") if draft_means(runs, name, "acceptance")]


def mapped(runs: list[dict]) -> list[str]:
    """The objective whose every offset is shown, in a list: the one with most registers."""
    return [name for name in drafting(runs) if name.startswith("MuToR-2D")][-1:]


def position_map(runs: list[dict], method: str) -> np.ndarray | None:
    """(h, w) mean held-out loss at each position over the seeds of baseline and MuToR-2D, at equal compute."""
    baseline, mutor = (select(runs, block="headline", method=name) for name in (BASELINE, MUTOR))
    maps = []
    for seed in sorted(baseline.keys() & mutor.keys()):
        run = baseline[seed] if method == BASELINE else mutor[seed]
        step = run["steps"] if method == MUTOR else step_of_equal_compute(baseline, mutor[seed])
        maps.append(run["scores"][str(step)]["loss_by_position"])
    return np.mean(maps, 0).reshape(run["model"]["grid"]) if maps else None
