"""The JSON of experiments/run.py -> docs/results.md and its pictures. Nothing on that page is typed by hand.

python experiments/results.py                        # write page and pictures
python experiments/results.py --check                # is the page what the JSON says? (text only)
python experiments/results.py --results DIR --page FILE.md
"""

import math
import sys
from pathlib import Path

import numpy as np

from mutor_vision.checkpoint import read_json
from mutor_vision.cli import Parser, run_command
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.plots import COLORS

ROOT = Path(__file__).resolve().parents[1]
# 97.5 % points of Student's t at 1, 2, ... degrees of freedom (any table; exact to the digits shown).
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
BASELINE, MUTOR, MUTOR_ALL = "next-token", "MuToR-2D, 31 %", "MuToR-2D, 100 %"
# Measure of a scored checkpoint -> (name, digits, what less of it is).
MEASURES = {
    "loss": ("held-out loss (nats per token)", 3, "better"),
    "fd": ("Fréchet distance", 2, "better"),
    "accuracy": ("class accuracy (%)", 1, "worse"),
}
# (MuToR-2D at the last checkpoint, at the best one) -> what that means.
MEANING = {
    ("better", ""): ": registers postpone overfitting and do not lower the best loss",
    ("better", "worse"): ": registers postpone overfitting and raise the best loss",
    ("better", "better"): ": the gain outlives early stopping",
}
SHORT = {"loss": "held-out loss", "fd": "FD", "accuracy": "class accuracy"}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "experiments/results", help="folder of JSON")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is another")
    arguments = parser.parse_args()
    setup, runs = read(arguments.results)
    text = page(setup, runs, arguments.page.stem)
    if arguments.check:
        if not arguments.page.is_file() or arguments.page.read_text() != text:
            raise MismatchError(f"{arguments.page} is not what {arguments.results} says; run experiments/results.py")
        return print(f"{arguments.page} is what {len(runs)} runs say")
    draw(runs, arguments.page.with_suffix(""))
    arguments.page.write_text(text)
    print(arguments.page)


def read(folder: Path) -> tuple[dict, list[dict]]:
    """setup.json, and every run sorted by name."""
    if not (folder / "setup.json").is_file():
        raise UserError(f"{folder} has no setup.json; run experiments/run.py first")
    runs = [read_json(path) for path in sorted(folder.glob("*-seed-*.json"))]
    if not runs:
        raise UserError(f"{folder} has no finished run yet; run experiments/run.py again")
    return read_json(folder / "setup.json"), runs


# --- statistics -------------------------------------------------------------------------------------------------------


def t_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; the width is nan for one value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, math.nan
    return mean, STUDENT_T[count - 2] * float(np.std(values, ddof=1)) / math.sqrt(count)


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


# --- looking things up ------------------------------------------------------------------------------------------------


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


# --- the page ---------------------------------------------------------------------------------------------------------


def page(setup: dict, runs: list[dict], figures: str) -> str:
    parts = [
        "# Does MuToR-2D work here, and what decides it?",
        "Written by `python experiments/results.py` from the JSON of `python experiments/run.py`; no number is "
        "typed by "
        "hand. Differences are paired by seed (same initial weights, same order of images), in brackets the 95 % "
        "interval "
        "by Student's t over seeds, bold where it leaves 0 out in three seeds or more. Intervals are not corrected for "
        "their number: of "
        "twenty, one "
        "leaves 0 out by chance.",
        "## The answer",
        *answer(setup, runs),
        "## Set-up",
        set_up(setup, runs),
        *headline(runs, figures),
        *longer(runs),
        *regimes(runs, figures),
        *ablations(runs),
        *drafts(setup, runs, figures),
        *positions(runs, figures),
        *limits(setup, runs),
        "## Repeat it",
        repeat(setup, runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def answer(setup: dict, runs: list[dict]) -> list[str]:
    """The first lines: what the intervals say, by rule."""
    lines, baseline = [], select(runs, block="headline", method=BASELINE)
    mutor = select(runs, block="headline", method=MUTOR)
    opening = ""
    if baseline.keys() & mutor.keys():
        fair = {m: equal_compute(baseline, mutor, m) for m in MEASURES}
        passes = max(run["steps"] * run["batch_size"] for run in baseline.values()) / setup["train_images"]
        where = f"at this scale, in the first {passes:.1f} passes over plentiful images, and at equal compute"
        opening = opening_line(fair, where)
        lines.append(f"**{MUTOR}, against next-token at equal compute**, seeds: {len(baseline.keys() & mutor.keys())}: "
                     f"{said(fair)}. At equal steps: "
                     f"{said({m: equal_steps(baseline, mutor, m) for m in MEASURES})}.")  # fmt: skip
    for rival, own in (("MuToR-1D, 31 %", MUTOR), ("2 parallel heads", MUTOR), ("4 parallel heads", MUTOR_ALL)):
        other, mine = select(runs, block="headline", method=rival), select(runs, block="headline", method=own)
        if other.keys() & mine.keys():
            compute = [next(iter(found.values()))["relative_compute"] for found in (mine, other)]
            lines.append(f"**{own}, against {rival}** (equal steps, compute {compute[0]:.2f} and {compute[1]:.2f}): "
                         f"{said({m: last_difference(other, mine, m) for m in MEASURES})}.")  # fmt: skip
    more = [select(runs, block="long", method=name) for name in (BASELINE, MUTOR)]
    if more[0].keys() & more[1].keys():
        steps = next(iter(more[0].values()))["steps"]
        lines.append(f"**With more training** ({MUTOR}, at the compute of {steps} steps of next-token), seeds: "
                     f"{len(more[0].keys() & more[1].keys())}: "
                     f"{said({m: last_difference(*more, m) for m in MEASURES})}.")  # fmt: skip
    lines += regimes_answer(runs)
    found = [(name, differences) for name, differences in ablation_differences(runs) if len(differences) > 1]
    changed = [f"{name} {interval(d, 3).strip('*')}" for name, d in found if judged(d, "loss")]
    if found:
        seeds = sorted({len(differences) for _, differences in found})
        lines.append(f"**Ablations** ({len(found)} settings of {MUTOR} changed one at a time, held-out loss, seeds: "
                     f"{' or '.join(map(str, seeds))}): " + (
            f"{'; '.join(changed)}; the others are not told apart from the default." if changed
            else "none is told apart from the default."))  # fmt: skip
    lines += drafts_answer(runs)
    return [opening, bullets(lines)]


def opening_line(fair: dict[str, list[float]], where: str) -> str:
    words = {measure: judged(found, measure) for measure, found in fair.items()}
    better, worse = (
        " and ".join(SHORT[m] for m, word in words.items() if word == kind) for kind in ("better", "worse")
    )
    if len(fair["loss"]) < 3:
        return f"**{len(fair['loss'])} of the 3 seeds that a statement takes: none is made.**"
    if better and worse:
        return f"**Mixed: {where}, MuToR-2D has better {better} and worse {worse} than next-token prediction.**"
    if better:
        return f"**Yes: {where}, MuToR-2D has better {better} than next-token prediction.**"
    if worse:
        return (f"**No: {where}, MuToR-2D has worse {worse} than next-token prediction, and nothing that is told apart "
                "as better.**")  # fmt: skip
    return f"**No effect: {where}, MuToR-2D is not told apart from next-token prediction.**"


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


def set_up(setup: dict, runs: list[dict]) -> str:
    run = runs[0]
    model, height = run["model"], setup["grid"][0]
    psnr = next((value for name, value in setup["tokenizer"].items() if name.endswith("psnr")), math.nan)
    real = setup["reconstructions"]
    return bullets([
        f"**Images.** {setup['classes']} classes, {setup['train_images']:,} training images in {setup['views']} views, "
        f"{setup['image_size']} pixels. Of the held-out images {setup['validation_images']} choose the best "
        "checkpoint and "
        f"draw the curves, the other {setup['test_images']} give every loss in the tables.",
        f"**Tokenizer.** Trained by this project on the same images: {height}x{setup['grid'][1]} codes of "
        f"{setup['codebook_size']}, {psnr:.1f} dB on held-out images.",
        f"**Transformer.** {model['layers']} layers, {model['heads']} heads, {model['dim']} wide; batch "
        f"{run['batch_size']}, constant learning rate {run['lr']:g} after 20 steps of warm-up, AdamW, no EMA, "
        "class dropout "
        "0.1. The learning rate was chosen with next-token runs of another seed; nothing else was tuned.",
        "**Objectives.** All are one loss (1 - a) L_next + a L_other with a = 0.5. Parallel heads (arXiv "
        "2404.19737): head k "
        "is one more transformer block on the trunk's output, the unembedding is shared, and it predicts k tokens "
        "ahead. "
        "The trunk is the same in every method, and sampling uses the trunk alone.",
        f"**Samples.** {setup['samples']} a checkpoint, guidance {setup['cfg_scale']:g}, the same seeds and classes "
        f"everywhere. Fréchet distance (FD) and class accuracy are by a {setup['features']['architecture']} of "
        f"{setup['features']['image_size']} pixels, trained on the training images as the tokenizer shows them, so "
        "that "
        f"they measure the transformer and not the tokenizer: right on {setup['features']['held_out_accuracy']:.1%} of "
        f"held-out images. {setup['samples']} real held-out images through the tokenizer have FD {real['fd']:.2f} and "
        f"accuracy {real['accuracy']:.1%}: what no model here can beat by much.",
        "**Compute** is counted: matrices of every input, attention of every visible pair, the unembedding of "
        "every target, "
        "times three for the backward pass; 1 is a next-token step.",
    ])  # fmt: skip


def headline(runs: list[dict], figures: str) -> list[str]:
    names = methods(runs, "headline")
    baseline = select(runs, block="headline", method=BASELINE)
    if not baseline:
        return []
    rows, details = [], []
    for name in names:
        found = select(runs, block="headline", method=name)
        first = next(iter(found.values()))
        if name == BASELINE:
            for step in sorted(planned(found)):
                cells = [spread(list(values(found, step, m).values()), MEASURES[m][1]) for m in MEASURES]
                rows.append([f"{name}", f"{step}", f"{step / min(planned(found)):.2f}", f"{len(found)}", *cells])
            continue
        compute = first["steps"] * first["relative_compute"] / min(planned(baseline))
        cells = [spread(list(values(found, first["steps"], m).values()), MEASURES[m][1]) for m in MEASURES]
        rows.append([name, f"{first['steps']}", f"{compute:.2f}", f"{len(found)}", *cells])
        details.append(
            [
                name,
                *(interval(equal_steps(baseline, found, m), MEASURES[m][1]) for m in MEASURES),
                f"{step_of_equal_compute(baseline, first)}",
                *(interval(equal_compute(baseline, found, m), MEASURES[m][1]) for m in MEASURES),
            ]
        )
    return [
        "## Plentiful data: objectives side by side",
        "Few passes over all images, no dropout; `python experiments/run.py --only headline`. Mean ± half of the 95 % "
        f"interval; compute 1 is {min(planned(baseline))} steps of next-token.",
        table(["objective", "steps", "compute", "seeds", *(name for name, _, _ in MEASURES.values())], rows),
        f"![Held-out loss by compute]({figures}/curves.png)",
        "*Held-out loss (validation images) by compute; right, its difference from next-token at the same compute. "
        "Lines are means over seeds, bands reach from the lowest to the highest seed.*",
        "Difference from next-token, negative = less (good for loss and FD, bad for accuracy):",
        table(["objective", *(f"equal steps: {SHORT[m]}" for m in MEASURES), "next-token's step at equal compute",
               *(f"equal compute: {SHORT[m]}" for m in MEASURES)], details),
        f"![Samples]({figures}/samples.png)",
        "*Samples of seed 0's models, the same classes and random numbers in each column, none selected.*",
    ]  # fmt: skip


def longer(runs: list[dict]) -> list[str]:
    baseline, mutor = (select(runs, block="long", method=name) for name in (BASELINE, MUTOR))
    rows = []
    for name, found in ((BASELINE, baseline), (MUTOR, mutor)):
        for first in list(found.values())[:1]:
            cells = [spread(list(values(found, last, m).values()), MEASURES[m][1]) for m in MEASURES]
            compute = first["steps"] * first["relative_compute"]
            rows.append([name, f"{first['steps']}", f"{compute:.0f}", f"{len(found)}", *cells])
    if not baseline.keys() & mutor.keys():
        return []
    differences = [interval(last_difference(baseline, mutor, m), MEASURES[m][1]) for m in MEASURES]
    return [
        "## More training",
        "The same with plentiful data, trained longer to the same compute (in next-token steps); `python "
        "experiments/run.py --only long`:",
        table(["objective", "steps", "compute", "seeds", *(name for name, _, _ in MEASURES.values())],
              [*rows, ["difference", "", "", f"{len(baseline.keys() & mutor.keys())}", *differences]]),
    ]  # fmt: skip


def planned(found: dict[int, dict]) -> set[int]:
    """Steps that every seed has scored, but for those that were only somebody's best checkpoint."""
    of_all = set.intersection(*({int(step) for step in run["scores"]} for run in found.values()))
    return {step for step in of_all if any(step == run["steps"] or step != run["best"] for run in found.values())}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def regime_cells(runs: list[dict]) -> list[tuple[int, float]]:
    """(images a class, dropout) that have runs."""
    return sorted({(run["per_class"], run["dropout"]) for run in runs if run["block"] == "regimes"})


def regimes(runs: list[dict], figures: str) -> list[str]:
    cells = regime_cells(runs)
    if not cells:
        return []
    rows, details = [], []
    for per_class, dropout in cells:
        both = {}
        for name in (BASELINE, MUTOR):
            found = both[name] = select(runs, block="regimes", method=name, per_class=per_class, dropout=dropout)
            if found:
                first = next(iter(found.values()))
                passes = first["steps"] * first["batch_size"] / (per_class * setup_classes(runs))
                row = [f"{per_class}", f"{dropout:g}", name, f"{len(found)}", f"{first['steps']} ({passes:.0f})",
                       f"{np.mean([run['best'] for run in found.values()]):.0f}"]  # fmt: skip
                for m in MEASURES:
                    row += [spread(list(values(found, step, m).values()), MEASURES[m][1]) for step in (best, last)]
                rows.append(row)
        if both[BASELINE].keys() & both[MUTOR].keys():
            details.append([f"{per_class}", f"{dropout:g}", f"{len(both[BASELINE].keys() & both[MUTOR].keys())}"] + [
                interval(paired(values(both[MUTOR], step, m), values(both[BASELINE], step, m)), MEASURES[m][1])
                for m in MEASURES for step in (best, last)
            ])  # fmt: skip
    heads = [f"{SHORT[m]}, {when}" for m in MEASURES for when in ("best", "last")]
    return [
        "## Scarce data: is it regularisation?",
        "The same two objectives where images are few and seen many times, to the same compute, with more and less "
        "dropout. "
        "*Best* is the checkpoint with the lowest loss on the validation images (early stopping), *last* the end "
        "of training. "
        "Each seed has images of its own. `python experiments/run.py --only regimes`",
        table(["images a class", "dropout", "objective", "seeds", "steps (passes)", "best step", *heads], rows),
        f"![Overfitting]({figures}/regimes.png)",
        "*Held-out loss (validation images) by compute where images are few. Lines are means over seeds, bands "
        "reach from "
        "the lowest to the highest seed.*",
        "MuToR-2D less next-token, paired by seed:" if details else "",
        table(["images a class", "dropout", "seeds", *heads], details) if details else "",
    ]


def setup_classes(runs: list[dict]) -> int:
    return runs[0]["model"]["num_classes"]


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


def regimes_answer(runs: list[dict]) -> list[str]:
    lines = []
    for per_class in sorted({c for c, _ in regime_cells(runs)}):
        plain = [select(runs, block="regimes", method=name, per_class=per_class, dropout=0.0)
                 for name in (BASELINE, MUTOR)]  # fmt: skip
        critic, rival = tuned(runs, per_class, BASELINE), tuned(runs, per_class, MUTOR)
        if not critic or not rival or not critic[1].keys() & rival[1].keys():
            continue
        parts = []
        if plain[0].keys() & plain[1].keys():
            at = {w: {"loss": paired(values(plain[1], step, "loss"), values(plain[0], step, "loss"))}
                  for w, step in (("last", last), ("best", best))}  # fmt: skip
            words = tuple(judged(at[when]["loss"], "loss") for when in ("last", "best"))
            parts.append(f"without dropout, at the last checkpoint {said(at['last'])}, at the best one "
                         f"{said(at['best'])}{MEANING.get(words, '')}")  # fmt: skip
            if np.mean([run["best"] / run["steps"] for run in plain[1].values()]) > 0.9:
                parts[-1] += ", as far as training went: MuToR-2D's best checkpoints are near its end"
        fair = {m: paired(values(rival[1], best, m), values(critic[1], best, m)) for m in MEASURES}
        parts.append(f"against the baseline that a careful critic would ask for, next-token with its best dropout "
                     f"({critic[0]:g}; MuToR-2D's: {rival[0]:g}) and early stopping, seeds: {len(fair['loss'])}: "
                     f"{said(fair)}")  # fmt: skip
        lines.append(f"**Scarce data, {per_class} images a class** ({MUTOR}, equal compute): "
                     f"{'. Then '.join(parts)}.")  # fmt: skip
    return lines


def ablation_differences(runs: list[dict]) -> list[tuple[str, list[float]]]:
    """Setting -> differences of the validation loss from the default at the setting's last step, sorted by mean."""
    default, found = select(runs, block="headline", method=MUTOR), []
    for name in sorted({run["method"] for run in runs if run["block"] == "ablations"}):
        changed = select(runs, block="ablations", method=name)
        at = {seed: str(run["steps"]) for seed, run in changed.items() if seed in default}
        found.append((name, [changed[seed]["validation"][step] - default[seed]["validation"][step]
                             for seed, step in sorted(at.items())]))  # fmt: skip
    return sorted(((name, d) for name, d in found if d), key=lambda pair: np.mean(pair[1]))


def ablations(runs: list[dict]) -> list[str]:
    rows, steps = [], 0
    for name, differences in ablation_differences(runs):
        first = next(iter(select(runs, block="ablations", method=name).values()))
        steps = first["steps"]
        rows.append([name, f"{len(differences)}", f"{first['relative_compute']:.2f}", interval(differences, 3)])
    if not rows:
        return []
    return [
        "## Ablations",
        f"One setting of {MUTOR} changed at a time, plentiful data, against the default at the same step, {steps} "
        "(default: m = 4, an offset per sequence, targets across the edge in raster order, a = 0.5, registers at the "
        "class too). Loss on the validation images; `python experiments/run.py --only ablations`.",
        table(["changed", "seeds", "compute a step", "difference in held-out loss (nats per token)"], rows),
    ]


# --- drafts -----------------------------------------------------------------------------------------------------------


def draft_means(runs: list[dict], method: str, key: str) -> dict[str, list[float]]:
    """Offset -> values over seeds."""
    found = [run["drafts"] for run in select(runs, block="headline", method=method).values() if "drafts" in run]
    return {name: [one[name][key] for one in found] for name in (found[0] if found else ())}


def gap(runs: list[dict], method: str) -> dict[str, list[float]]:
    losses, own = (draft_means(runs, method, key) for key in ("loss", "next_token_loss"))
    return {name: [a - b for a, b in zip(losses[name], own[name], strict=True)] for name in losses}


def ahead(name: str, width: int) -> str:
    if name.startswith("head"):
        return name.removeprefix("head ")
    d_h, d_w = map(int, name.split(","))
    return f"{(d_h - 1) * width + d_w - 1}"


def drafting(runs: list[dict]) -> list[str]:
    return [name for name in methods(runs, "headline") if draft_means(runs, name, "acceptance")]


def mapped(runs: list[dict]) -> list[str]:
    """The objective whose every offset is shown, in a list: the one with most registers."""
    return [name for name in drafting(runs) if name.startswith("MuToR-2D")][-1:]


def percent(values: list[float]) -> str:
    return spread([100 * x for x in values], 1)


def drafts(setup: dict, runs: list[dict], figures: str) -> list[str]:
    width, names = setup["grid"][1], drafting(runs)
    if not names:
        return []
    along = []  # side by side: what is 2, 3, 4 tokens ahead
    for name in names:
        plain, guided, beyond = draft_means(runs, name, "acceptance"), draft_means(runs, name, "acceptance_guided"), {
            ahead(offset, width): offset for offset in draft_means(runs, name, "acceptance")}  # fmt: skip
        cells = [f"{percent(found[beyond[k]])}" if k in beyond else "-" for k in "234" for found in (plain, guided)]
        along.append([name, f"{len(next(iter(plain.values())))}", *cells])
    offsets = []
    for name in mapped(runs):
        plain, guided = (draft_means(runs, name, key) for key in ("acceptance", "acceptance_guided"))
        loss, difference = draft_means(runs, name, "loss"), gap(runs, name)
        for offset in plain:
            offsets.append(
                [
                    name,
                    f"({offset.replace(',', ', ')})",
                    ahead(offset, width),
                    percent(plain[offset]),
                    percent(guided[offset]),
                    spread(loss[offset], 3),
                    spread(difference[offset], 3),
                ]
            )
    return [
        "## Registers as drafts",
        "What lossless speculative sampling would accept: the overlap sum_v min(p, q) of the model's distribution "
        "p of a "
        "token, given all before it, with what a register or head said of that token earlier, q. On held-out images "
        f"({setup['draft_images']}, every slot with a target), at the last checkpoint, over seeds; with guidance "
        "both p "
        f"and q are guided with {setup['cfg_scale']:g}. An offset (d_h, d_w) lies d_h - 1 rows down and d_w - 1 "
        "columns "
        "right of the last token seen; *ahead* counts tokens in raster order, 1 being the next token itself. A high "
        "overlap says that p and q agree, not that they are good: two flat distributions agree too, so the last "
        "columns "
        "say what the register knows.",
        "Registers and heads side by side, acceptance (%) by tokens ahead:",
        table(["objective", "seeds", *(f"{k} ahead{g}" for k in "234" for g in ("", ", guided"))], along),
        f"![Register loss and acceptance by offset]({figures}/offsets.png)",
        "*Left to right: how much worse than the next-token prediction of the same tokens a register is, and the share "
        "of its drafts that would be accepted, without and with guidance. Means over seeds.*",
        table(["objective", "offset", "ahead", "acceptance (%)", "guided (%)", "loss (nats)",
               "loss - next-token's (nats)"], offsets),
    ]  # fmt: skip


def drafts_answer(runs: list[dict]) -> list[str]:
    for name in (MUTOR_ALL, MUTOR):
        plain, guided = (draft_means(runs, name, key) for key in ("acceptance", "acceptance_guided"))
        beyond = [offset for offset in plain if offset != "1,2"]
        if beyond:
            top, low = (f(beyond, key=lambda offset: np.mean(plain[offset])) for f in (max, min))
            heads = draft_means(runs, "2 parallel heads", "acceptance")
            rival = f"; the second parallel head, two tokens ahead: {percent(heads['head 2'])} %" if heads else ""
            shown = [f"{percent(plain[o])} % ({percent(guided[o])} % with guidance) at offset ({o.replace(',', ', ')})"
                     for o in (low, top)]  # fmt: skip
            return [f"**Drafts** ({name}): beyond the next token, speculative sampling would accept from {shown[0]} to "
                    f"{shown[1]}{rival}."]  # fmt: skip
    return []


# --- the rest ---------------------------------------------------------------------------------------------------------


def position_map(runs: list[dict], method: str) -> np.ndarray | None:
    """(h, w) mean held-out loss at each position over the seeds of baseline and MuToR-2D, at equal compute."""
    baseline, mutor = (select(runs, block="headline", method=name) for name in (BASELINE, MUTOR))
    maps = []
    for seed in sorted(baseline.keys() & mutor.keys()):
        run = baseline[seed] if method == BASELINE else mutor[seed]
        step = run["steps"] if method == MUTOR else step_of_equal_compute(baseline, mutor[seed])
        maps.append(run["scores"][str(step)]["loss_by_position"])
    return np.mean(maps, 0).reshape(run["model"]["grid"]) if maps else None


def positions(runs: list[dict], figures: str) -> list[str]:
    own, other = position_map(runs, BASELINE), position_map(runs, MUTOR)
    if own is None:
        return []
    rows = [[name, *(f"{found[part].mean():.3f}" for part in (0, slice(1, None), np.s_[:, 0], np.s_[:, 1:]))]
            for name, found in ((BASELINE, own), (MUTOR, other), ("difference", other - own))]  # fmt: skip
    return [
        "## Where in the image",
        "Held-out loss by position at equal compute, means over seeds (nats per token):",
        table(["objective", "first row", "other rows", "first column", "other columns"], rows),
        f"![Loss by position]({figures}/positions.png)",
    ]


def limits(setup: dict, runs: list[dict]) -> list[str]:
    run, lines = runs[0], []
    baseline = select(runs, block="headline", method=BASELINE)
    if baseline:
        early, late = (t_interval([run["validation"][str(step(run))] for run in baseline.values()])[0]
                       for step in (lambda run: run["steps"] // 2, last))  # fmt: skip
        passes = next(iter(baseline.values()))["steps"] * run["batch_size"] / setup["train_images"]
        lines.append(
            f"The length: the longest runs see each image {passes:.1f} times, and next-token's loss still "
            "falls, "
            f"by {early - late:.3f} nats in the second half. What is compared is the beginning of training."
        )
        chance, found = 100 / setup["classes"], list(values(baseline, last, "accuracy").values())
        if np.mean(found) < 2 * chance:
            lines.append(f"The class: next-token's samples are taken for their class in {np.mean(found):.1f} % of "
                         "cases, "
                         f"{chance:.1f} % being chance. These models have hardly learned what a class is, so class "
                         "accuracy and guidance tell little here.")  # fmt: skip
    return [
        "## What this does not settle",
        bullets(lines + [
            f"The scale: {run['parameters'] / 1e6:.2f} million parameters, {setup['grid'][0]}x{setup['grid'][1]} "
            "tokens, "
            f"{setup['classes']} classes. The paper trains 111 million parameters on 1.28 million images with 16x16 "
            "tokens; an effect that needs long training, long sequences or capacity cannot be seen here.",
            "The seeds are few: with three, a 95 % interval reaches 2.5 standard deviations of the differences to "
            "either "
            "side, with five 1.2. What is not told apart may still differ by as much as the interval says.",
            "One learning rate and one batch size, chosen for next-token. A rival with settings of its own may do "
            "better.",
            "FD and class accuracy are of a small network trained on these classes; they compare with this page alone.",
        ]),
    ]  # fmt: skip


def repeat(setup: dict, runs: list[dict]) -> str:
    seconds = sum(run["seconds"] for run in runs)
    blocks = {}
    for run in runs:
        blocks.setdefault(run["block"], []).append(run)
    counted = ", ".join(f"{len(found)} {name}" for name, found in sorted(blocks.items()))
    return (
        f"{len(runs)} runs ({counted}), {seconds / 3600:.1f} hours of one thread in all ({setup['machine']}, torch "
        f"{setup['torch']}; other programs ran beside them, so times say little, and compute is counted). "
        "experiments/grid.py declares them in the order of their importance, and the page is of those that have run; "
        "experiments/results/ has a JSON for each, with its command.\n\n"
        "```\n"
        "python experiments/run.py --zips DIR --work WORK                     # all; again, or twice at once: goes on\n"
        "python experiments/run.py --grid small --images FOLDER --work WORK   # 2 objectives, 2 seeds, your images\n"
        "python experiments/results.py                                        # this page\n"
        "python experiments/results.py --check                                # is it what the JSON says?\n"
        "```"
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(runs: list[dict], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False})
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("curves", draw_curves(plt, runs)), ("regimes", draw_regimes(plt, runs)),
                         ("offsets", draw_offsets(plt, runs)), ("positions", draw_positions(plt, runs))):  # fmt: skip
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
            plt.close(figure)


def curve(run: dict) -> tuple[np.ndarray, np.ndarray]:
    """Compute in next-token steps, and the validation loss there."""
    steps = np.array([int(step) for step in run["validation"]])
    return steps * run["relative_compute"], np.array(list(run["validation"].values()))


def band(axis, x: np.ndarray, rows: list[np.ndarray], color: str, label: str, style: str = "-") -> None:
    axis.plot(x, np.mean(rows, 0), style, color=color, label=label, linewidth=1.6)
    if len(rows) > 1:
        axis.fill_between(x, np.min(rows, 0), np.max(rows, 0), color=color, alpha=0.13, linewidth=0)


def draw_curves(plt, runs: list[dict]):
    baseline = select(runs, block="headline", method=BASELINE)
    if not baseline:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, name in enumerate(methods(runs, "headline")):
        found = select(runs, block="headline", method=name)
        curves = {seed: curve(run) for seed, run in found.items()}
        color, x = COLORS[(index + 6) % len(COLORS)], next(iter(curves.values()))[0]
        band(left, x, [y for _, y in curves.values()], color, name)
        if name != BASELINE and found.keys() & baseline.keys():
            rows = [y - np.interp(x, *curve(baseline[seed])) for seed, (_, y) in curves.items() if seed in baseline]
            shown = x >= x[-1] * 0.25
            band(right, x[shown], [row[shown] for row in rows], color, name)
    both = [select(runs, block="long", method=name) for name in (BASELINE, MUTOR)]
    pairs = [(curve(both[0][seed]), curve(both[1][seed])) for seed in sorted(both[0].keys() & both[1].keys())]
    if pairs:
        color, x = COLORS[(methods(runs, "headline").index(MUTOR) + 6) % len(COLORS)], pairs[0][1][0]
        band(left, pairs[0][0][0], [own[1] for own, _ in pairs], COLORS[6], f"{BASELINE}, longer", "--")
        band(left, x, [other[1] for _, other in pairs], color, f"{MUTOR}, longer", "--")
        shown, rows = x >= x[-1] * 0.1, [other[1] - np.interp(x, *own) for own, other in pairs]
        band(right, x[shown], [row[shown] for row in rows], color, f"{MUTOR}, longer", "--")
    right.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="compute (steps of next-token)", ylabel="held-out loss (nats per token)")
    right.set(xlabel="compute (steps of next-token)", ylabel="loss less next-token's (nats per token)")
    top = np.mean([curve(run)[1][-1] for run in baseline.values()])
    left.set_ylim(top - 0.1, top + 0.9)
    left.legend(fontsize=8)
    return figure


def draw_regimes(plt, runs: list[dict]):
    cells = regime_cells(runs)
    if not cells:
        return None
    sizes, dropouts = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    figure, axes = plt.subplots(len(sizes), len(dropouts), figsize=(3.4 * len(dropouts), 2.9 * len(sizes)),
                                sharex="row", sharey="row", layout="constrained", squeeze=False)  # fmt: skip
    for row, size in zip(axes, sizes, strict=True):
        for axis, dropout in zip(row, dropouts, strict=True):
            for color, name in zip(COLORS, (BASELINE, MUTOR), strict=False):
                found = select(runs, block="regimes", method=name, per_class=size, dropout=dropout)
                if found:
                    curves = [curve(run) for run in found.values()]
                    band(axis, curves[0][0], [y for _, y in curves], color, name)
            axis.set_title(f"{size} images a class, dropout {dropout:g}", fontsize=9)
        row[0].set_ylabel("held-out loss (nats per token)")
    for axis in axes[-1]:
        axis.set_xlabel("compute (steps of next-token)")
    axes[0, 0].legend(fontsize=8)
    return figure


def offset_map(found: dict[str, list[float]]) -> np.ndarray:
    pairs = {tuple(map(int, name.split(","))): np.mean(values) for name, values in found.items()}
    side = max(max(pair) for pair in pairs)
    return np.array([[pairs.get((h, w), np.nan) for w in range(1, side + 1)] for h in range(1, side + 1)])


def draw_offsets(plt, runs: list[dict]):
    if not mapped(runs):
        return None
    (name,) = mapped(runs)
    panels = [
        ("register's loss less next-token's (nats)", offset_map(gap(runs, name)), "{:.2f}"),
        ("acceptance (%)", 100 * offset_map(draft_means(runs, name, "acceptance")), "{:.0f}"),
        ("acceptance with guidance (%)", 100 * offset_map(draft_means(runs, name, "acceptance_guided")), "{:.0f}"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for axis, (title, cells, form) in zip(axes, panels, strict=True):
        heat(figure, axis, cells, form, "cividis")
        side = range(1, len(cells) + 1)
        axis.set(title=title, xlabel="d_w (1 = same column)", ylabel="d_h (1 = same row)",
                 xticks=range(len(cells)), yticks=range(len(cells)), xticklabels=side, yticklabels=side)  # fmt: skip
        axis.text(0, 0, "last\ntoken", ha="center", va="center", fontsize=8)
    figure.suptitle(name, fontsize=10)
    return figure


def draw_positions(plt, runs: list[dict]):
    own, other = position_map(runs, BASELINE), position_map(runs, MUTOR)
    if own is None or other is None:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    heat(figure, axes[0], own, "{:.1f}", "cividis")
    reach = np.abs(other - own).max()
    heat(figure, axes[1], other - own, "{:+.2f}", "PuOr", -reach, reach)
    axes[0].set_title("next-token: held-out loss (nats)", fontsize=9)
    axes[1].set_title(f"{MUTOR} less next-token (nats)", fontsize=9)
    for axis in axes:
        axis.set(xlabel="column", ylabel="row")
    return figure


def heat(figure, axis, cells: np.ndarray, form: str, colors: str, low=None, high=None) -> None:
    picture = axis.imshow(cells, cmap=colors, vmin=low, vmax=high)
    axis.spines[:].set_visible(False)
    for (i, j), cell in np.ndenumerate(cells):
        if not np.isnan(cell):
            red, green, blue, _ = picture.cmap(picture.norm(cell))
            color = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axis.text(j, i, form.format(cell), ha="center", va="center", fontsize=8, color=color)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run_command(main)
