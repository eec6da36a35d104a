"""The JSON of experiments/look_ahead.py -> docs/results.md and its pictures. Nothing on that page is typed by hand.

    python experiments/look_ahead_page.py                    # write page and pictures
    python experiments/look_ahead_page.py --check            # is the page what the JSON says? (text only)
    python experiments/look_ahead_page.py --results DIR --page FILE.md [--panel WORK/panel]
"""

import math
from pathlib import Path

import numpy as np
from comparison import BASELINE, interval, spread
from look_ahead import METHODS, SCALES, lowest
from results import bullets, check, table
from scipy.special import stdtr, stdtrit

from mutor_vision.cli import Parser, run_command
from mutor_vision.commands.plot import COLORS
from mutor_vision.errors import UserError
from mutor_vision.storage.files import read_json, written

ROOT = Path(__file__).resolve().parents[1]
OTHERS = [name for name in METHODS if name != BASELINE]
# Measure of samples -> title, digits, whether less of it is better.
MEASURES = {
    "fd": ("FD, lite2", 1, True),
    "fd timm:tf_efficientnet_lite0": ("FD, lite0", 1, True),
    "mind": ("MIND", 1, True),
    "density": ("density", 3, False),
    "coverage": ("coverage", 3, False),
    "class_accuracy": ("class accuracy (%)", 1, False),
}
LEVEL, NEAR = 0.05, 0.04
COMMANDS = """\
mutor train-tokenizer --preset tiny-imagenet-8x8 --data IMAGES/train --val-data IMAGES/val --out vq --set steps=1600 \\
    --set model.codebook_size=1024 --set model.channels=16,32,64,128 --set model.latent_channels=128 \\
    --set perceptual_weight=1 --set perceptual_network=timm:tf_efficientnet_lite0@128 --set perceptual_weights=package
mutor encode --tokenizer vq --data IMAGES/train --out codes --features timm:tf_efficientnet_lite1@128 \\
    --features-weights package
mutor encode --tokenizer vq --data IMAGES/val --views center --out codes-val
mutor reconstruct --tokenizer vq --data IMAGES/train --out shown/train --save-images
mutor reconstruct --tokenizer vq --data IMAGES/val --out shown/val --save-images
python experiments/look_ahead.py --scale cpu --codes codes --val-codes codes-val --work work \\
    --results experiments/look_ahead_results --reference shown/train/reconstructions \\
    --held-out shown/val/reconstructions
python experiments/look_ahead_page.py --panel work/panel"""


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "experiments/look_ahead_results", help="folder of JSON")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results.md")
    parser.add_argument("--panel", type=Path, help="WORK/panel, for the picture of samples; default: leave it")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is another")
    arguments = parser.parse_args()
    setup, runs = read(arguments.results)
    text = page(setup, runs, arguments.page.stem)
    if arguments.check:
        return check(arguments, text, len(runs), "look_ahead_page.py")
    pictures = arguments.page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    draw(runs, pictures / "curves.png")
    if arguments.panel:
        draw_panel(runs, arguments.panel, pictures / "samples.png")
    with written(arguments.page) as partial:
        partial.write_text(text)
    print(arguments.page)


def read(folder: Path) -> tuple[dict, list[dict]]:
    """setup.json, and every run sorted by name."""
    runs = [read_json(path) | {"name": path.stem} for path in sorted(folder.glob("lr-*.json"))]
    if not runs or not (folder / "setup.json").is_file():
        raise UserError(f"{folder} has no setup.json or no finished run; run experiments/look_ahead.py")
    setup, pair = read_json(folder / "setup.json"), folder / "longer-pair.json"
    return setup | ({"longer_pair": read_json(pair)} if pair.is_file() else {}), runs


# --- what the runs say ------------------------------------------------------------------------------------------------

Table = dict[str, dict[int, float]]  # method -> seed -> value


def rates(runs: list[dict]) -> list[float]:
    """Learning rates, that of the headline first: the one of most runs."""
    found = [run["lr"] for run in runs]
    return sorted(set(found), key=lambda lr: (-found.count(lr), -lr))


def of(runs: list[dict], lr: float, method: str) -> dict[int, dict]:
    """Seed -> run."""
    return {run["seed"]: run for run in runs if run["lr"] == lr and run["method"] == method}


def present(runs: list[dict], lr: float) -> list[str]:
    """Methods with a seed that next-token has, too."""
    return [name for name in OTHERS if of(runs, lr, name).keys() & of(runs, lr, BASELINE).keys()]


def loss(run: dict, step: float) -> float | None:
    """Held-out loss of the average that is best at a step, between validations by a straight line; None where training
    ended before."""
    curves = [run[f"val_next_token_{name}"] for name in run["averages"]]
    known = [int(other) for other in curves[0]]
    if step > known[-1] * (1 + NEAR):
        return None
    return min(float(np.interp(step, known, list(curve.values()))) for curve in curves)


def measured(run: dict, step: float, name: str) -> float | None:
    """A measure of samples at the scored step nearest to `step`, None where that is NEAR away; accuracy in per cent."""
    known = min(run["scores"], key=lambda other: abs(int(other) - step))
    if abs(int(known) / step - 1) > NEAR:
        return None
    return run["scores"][known][name] * (100 if name == "class_accuracy" else 1)


def columns(runs: list[dict], lr: float, value) -> tuple[Table, dict[str, Table]]:
    """value(run, step) -> every method's at its last step; and next-token's at the 'steps' and at the 'compute' of each
    method, without those where value is None."""
    baseline, own, other = of(runs, lr, BASELINE), {}, {"steps": {}, "compute": {}}
    for name in present(runs, lr):
        found = of(runs, lr, name)
        both = sorted(found.keys() & baseline.keys())
        own[name] = {seed: value(found[seed], found[seed]["steps"]) for seed in both}
        for kind, factor in (("steps", 1.0), ("compute", next(iter(found.values()))["relative_compute"])):
            theirs = {seed: value(baseline[seed], found[seed]["steps"] * factor) for seed in both}
            if None not in theirs.values():
                other[kind][name] = theirs
    return own, other


def noise(values: Table) -> tuple[float, int]:
    """Standard deviation of one run's value about method + seed, and its degrees of freedom: the residuals of a table
    of two ways (methods by seeds), of the methods that have most seeds. nan and 0 with fewer than two."""
    most = max(map(len, values.values()), default=0)
    values = {name: row for name, row in values.items() if len(row) == most}
    seeds = sorted(set.intersection(*(set(row) for row in values.values()))) if values else []
    if len(seeds) < 2 or len(values) < 2:
        return math.nan, 0
    cells = np.array([[row[seed] for seed in seeds] for row in values.values()])
    rest = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
    freedom = (len(cells) - 1) * (len(seeds) - 1)
    return float(np.sqrt((rest**2).sum() / freedom)), freedom


class Difference:
    """A method less next-token, with the noise of all methods: mean, half of its 95 % interval, and p."""

    def __init__(self, own: dict[int, float], other: dict[int, float], deviation: float, freedom: int):
        differences = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
        self.seeds, self.mean, self.half, self.p = len(differences), float(np.mean(differences)), math.nan, math.nan
        if self.seeds > 2 and freedom > 0:
            error = deviation * math.sqrt(2 / self.seeds)
            self.half = float(stdtrit(freedom, 1 - LEVEL / 2)) * error
            self.p = 2 * float(stdtr(freedom, -abs(self.mean) / error)) if error else float(self.mean == 0)

    def shown(self, digits: int, clear: bool) -> str:
        if math.isnan(self.half):
            return f"{self.mean:+.{digits}f} ({self.seeds} seed{'s' * (self.seeds > 1)})"
        text = f"{self.mean:+.{digits}f} ± {self.half:.{digits}f}"
        return f"**{text}**" if clear else text


def differences(runs: list[dict], lr: float, value) -> dict[tuple[str, str], Difference]:
    """(method, 'steps' or 'compute') -> what value(run, step) differs by from next-token's."""
    own, other = columns(runs, lr, value)
    rows = dict(own)
    if own:
        rows[BASELINE] = next(iter(other["steps"].values()))
    found = noise(rows)
    return {
        (name, kind): Difference(own[name], other[kind][name], *found)
        for name in own for kind in other if name in other[kind]
    }  # fmt: skip


def clear_ones(found: dict) -> set:
    """Keys of differences that survive Holm's correction (1979) over all that have a p, at LEVEL."""
    tested = [key for key in found if not math.isnan(found[key].p)]
    ordered, clear = sorted(tested, key=lambda key: found[key].p), set()
    for rank, key in enumerate(ordered):
        if found[key].p > LEVEL / (len(ordered) - rank):
            break
        clear.add(key)
    return clear


# --- the page ---------------------------------------------------------------------------------------------------------


def page(setup: dict, runs: list[dict], figures: str) -> str:
    lr = rates(runs)[0]
    parts = [
        "# Does looking ahead help?",
        *answer(setup, runs, lr),
        how(setup),
        "## Held-out loss",
        *losses(runs, lr, figures),
        "## Samples",
        *samples(setup, runs, lr, figures),
        "## Passes of forecast decoding",
        *forecasts(runs, lr),
        "## The other learning rate, and averages",
        *other_rate(runs),
        "## A longer pair",
        *longer_pair(setup),
        "## Set-up",
        set_up(setup, runs, lr),
        "## What this does not settle",
        limits(setup, runs, lr),
        "## Repeat it",
        repeat(setup, runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def answer(setup: dict, runs: list[dict], lr: float) -> list[str]:
    """The first lines, by rule: who is told apart from next-token, and where."""
    found = differences(runs, lr, loss)
    clear, lines = clear_ones(found), []
    seen = next(iter(of(runs, lr, BASELINE).values()))
    steps = next(iter(of(runs, lr, OTHERS[0]).values()), seen)["steps"]
    passes = steps * seen["batch_size"] / setup["images"]
    at_equal = {"steps": f"At equal steps ({passes:.1f} passes over the images)", "compute": "At equal compute"}
    for kind, words in at_equal.items():
        better, worse, none = (
            [name for name, k in found if k == kind and (name, k) in clear and found[name, k].mean < 0],
            [name for name, k in found if k == kind and (name, k) in clear and found[name, k].mean > 0],
            [name for name, k in found if k == kind and (name, k) not in clear],
        )  # fmt: skip
        texts = [f"{what} held-out loss than next-token prediction: {listed(names, found, kind)}"
                 for what, names in (("lower", better), ("higher", worse)) if names]  # fmt: skip
        if none:
            texts.append(f"not told apart: {listed(none, found, kind)}")
        lines.append(f"**{words}**: {'; '.join(texts)}.")
    told = samples_found(runs, lr)
    if told:
        lines.append("**Samples**: " + said_of_samples(told))
    if passes_of := forecast_rows(runs, lr):
        best = max(passes_of, key=lambda row: row[3])
        own = next(row for row in passes_of if row[0] == BASELINE)
        lines.append(f"**Forecast decoding** makes most tokens a pass after {best[0]} ({best[3]:.2f}, next-token "
                     f"{own[3]:.2f}).")  # fmt: skip
    if pair := setup.get("longer_pair"):
        gaps = [f"{gap:.3f} nats at step {step:,}" for gap, step in zip(pair["difference"], pair["steps"], strict=True)]
        lines.append(f"**A longer pair** ({pair['what']}): MuToR-2D has a higher held-out loss, by {gaps[0]}, by "
                     f"{gaps[-1]}, at equal steps.")  # fmt: skip
    return [bullets(lines)]


def listed(names: list[str], found: dict, kind: str) -> str:
    return ", ".join(f"{name} ({found[name, kind].mean:+.3f})" for name in names)


def how(setup: dict) -> str:
    return (
        "Written by `python experiments/look_ahead_page.py` from the JSON of `python experiments/look_ahead.py --scale "
        "cpu`; no number is typed by hand. Differences are paired by seed (same initial weights, same order of "
        "images). ± is half of a 95 % interval by Student's t; its noise is that of a table of methods by seeds, "
        "pooled over methods, which takes their noise to be equal. **Bold**: survives Holm's correction over its whole "
        "table; what is not bold is not told apart. An [earlier, smaller grid](first-grid.md) has MuToR-1D, ablations, "
        "scarce data and drafts."
    )


def losses(runs: list[dict], lr: float, figures: str) -> list[str]:
    found = differences(runs, lr, loss)
    clear = clear_ones(found)
    baseline = of(runs, lr, BASELINE)
    rows = []
    for name in present(runs, lr):
        each = of(runs, lr, name)
        first = next(iter(each.values()))
        rows.append([name, f"{first['relative_compute']:.2f}", f"{len(each)}",
                     spread([loss(run, run["steps"]) for run in each.values()], 3),
                     *(found[name, k].shown(3, (name, k) in clear) if (name, k) in found else ""
                       for k in ("steps", "compute"))])  # fmt: skip
    last = next(iter(baseline.values()))
    steps = first["steps"]
    own = [[f"{BASELINE}, step {step}", f"{step / steps:.2f}", f"{len(baseline)}",
            spread([loss(run, step) for run in baseline.values()], 3), "", ""]
           for step in (steps, min(run["steps"] for run in baseline.values()))]  # fmt: skip
    return [
        f"Nats per token on {last['val_images']:,} held-out images, of the better of two averages of the weights; "
        f"learning rate {lr:g}. Compute is that of a step in next-token steps.",
        table(["objective", "compute", "seeds", "held-out loss", "less next-token's, equal steps",
               "less next-token's, equal compute"], own + rows),
        f"![Held-out loss less next-token's]({figures}/curves.png)",
        "*Held-out loss less next-token's, by step and by compute. Lines are means over seeds, bands reach from the "
        "lowest to the highest seed.*",
    ]  # fmt: skip


def samples_found(runs: list[dict], lr: float) -> dict:
    """(method, kind, measure) -> Difference, for the measures that all runs have."""
    scored = [run for run in runs if run["lr"] == lr and run["scores"]]
    names = [name for name in MEASURES if scored and all(name in next(iter(run["scores"].values())) for run in scored)]
    found = {}
    for name in names:
        each = differences(scored, lr, lambda run, step, name=name: measured(run, step, name))
        found |= {(*key, name): difference for key, difference in each.items()}
    return found


def said_of_samples(found: dict) -> str:
    clear, grouped = clear_ones(found), {}
    order = [[*OTHERS], ["steps", "compute"], [*MEASURES]]
    places = lambda key: [names.index(part) for part, names in zip(key, order, strict=True)]  # noqa: E731
    for method, kind, name in sorted(clear, key=places):
        title, digits, less = MEASURES[name]
        mean = found[method, kind, name].mean
        word = "better" if (mean < 0) == less else "worse"
        grouped.setdefault((kind, method, word), []).append(f"{title} ({mean:+.{digits}f})")
    texts = [f"{method}: {word} at equal {kind} in {', '.join(names)}"
             for (kind, method, word), names in grouped.items()]  # fmt: skip
    rest = len(found) - len(clear)
    return ("; ".join(texts) + f"; the other {rest} differences are not told apart." if texts
            else f"none of {rest} differences from next-token is told apart.")  # fmt: skip


def samples(setup: dict, runs: list[dict], lr: float, figures: str) -> list[str]:
    found = samples_found(runs, lr)
    if not found:
        return ["Not measured."]
    clear, names = clear_ones(found), [name for name in MEASURES if any(key[2] == name for key in found)]
    scored = [run for run in runs if run["lr"] == lr and run["scores"]]
    rows = []
    for method in (BASELINE, *present(scored, lr)):
        each = of(scored, lr, method).values()
        for step in sorted(int(step) for step in next(iter(each))["scores"]):
            cells = [spread([measured(run, step, name) for run in each], MEASURES[name][1]) for name in names]
            rows.append([f"{method}, step {step}" if method == BASELINE else method, *cells])
    real = setup["real"]
    shown = {name: real[name] * (100 if name == "class_accuracy" else 1) for name in names if name in real}
    cells = [f"{shown[name]:.{MEASURES[name][1]}f}" if name in shown else "" for name in names]
    rows.insert(0, [f"{setup['held_out']:,} held-out images", *cells])
    parts = [
        f"{setup['samples']:,} a checkpoint, guidance {setup['cfg_scale']:g}, the same classes and random numbers "
        "everywhere, against the training images as the tokenizer shows them. Networks: EfficientNet-lite2, which no "
        "loss has seen, for all but the second column, and lite0, which the tokenizer's loss has seen, both at 128 "
        "pixels. Class accuracy is lite2's best guess among the classes. Held-out images stand at the top, fewer of "
        "them, so that their distances are too large. At equal compute, only methods of a compute at which "
        "next-token's samples were scored.",
        table(["objective", *(MEASURES[name][0] for name in names)], rows),
    ]
    for kind in ("steps", "compute"):
        rows = [
            [method, *(found[method, kind, n].shown(MEASURES[n][1], (method, kind, n) in clear) for n in names)]
            for method in present(scored, lr) if (method, kind, names[0]) in found
        ]  # fmt: skip
        parts.append(table([f"less next-token's, equal {kind}", *(MEASURES[name][0] for name in names)], rows))
    copies = [step["copies"] for run in scored for step in run["scores"].values() if "copies" in step]
    if copies:
        parts.append(f"Copies: nearer to a training image than training images are to each other are "
                     f"{100 * min(copies):.1f} to {100 * max(copies):.1f} % of a model's samples, and "
                     f"{100 * real['copies']:.1f} % of held-out images.")  # fmt: skip
    return [
        *parts,
        f"![Samples]({figures}/samples.png)",
        "*Seed 0's models, one sample of each class with the same random numbers, none selected. Left to right: "
        f"{', '.join(setup['names'])}.*",
    ]


def forecast_rows(runs: list[dict], lr: float) -> list[tuple[str, int, list[float], float]]:
    """(method, registers behind the window, tokens a pass by seed, their mean), the most registers of each method."""
    rows = []
    for name in METHODS:
        found = [run["tokens_per_pass"] for run in of(runs, lr, name).values() if run.get("tokens_per_pass")]
        for m in sorted({int(m) for one in found for m in one}):
            values = [one[str(m)] for one in found if str(m) in one]
            rows.append((name, m, values, float(np.mean(values))))
    return rows


def forecasts(runs: list[dict], lr: float) -> list[str]:
    rows = forecast_rows(runs, lr)
    if not rows:
        return ["Not measured."]
    return [
        "Tokens a pass at the last step, with guidance, a window of 8 inputs and m registers behind it, where a model "
        "has learnt them; mean over seeds ± half of its own 95 % interval. More is faster; a model that has learnt "
        "less is easier to forecast.",
        table(["objective", "m", "tokens a pass"], [[name, f"{m}", spread(values, 2)] for name, m, values, _ in rows]),
    ]


def other_rate(runs: list[dict]) -> list[str]:
    first, *others = rates(runs)
    parts = [] if others else [f"The other learning rate was not run: all rows are at {first:g}."]
    for lr in others:
        rows = []
        for name in (BASELINE, *present(runs, lr)):
            other, main = of(runs, lr, name), of(runs, first, name)
            both = sorted(other.keys() & main.keys())
            steps = min(run["steps"] for run in runs)
            own = [loss(other[seed], steps) - loss(main[seed], steps) for seed in both]
            against = of(runs, lr, BASELINE)
            rest = [loss(other[seed], steps) - loss(against[seed], steps) for seed in both if seed in against]
            rows.append([name, f"{len(both)}", interval(own, 3).replace(" (one seed)", ""),
                         "" if name == BASELINE else interval(rest, 3).replace(" (one seed)", "")])  # fmt: skip
        parts.append(f"Held-out loss at a learning rate of {lr:g} instead of {first:g}, after the steps of all:")
        parts.append(table(["objective", "seeds", f"less its own at {first:g}", "less next-token's at {lr:g}"], rows))
    chosen = [(run["method"], lowest(run, run["steps"])) for run in runs]
    names = sorted({name for _, name in chosen})
    counted = ", ".join(f"{name} in {sum(one == name for _, one in chosen)}" for name in names)
    decays = ", ".join(f"{name}: decay {decay:g}" for name, decay in SCALES["cpu"].training.ema_decays.items())
    parts.append(f"Two averages of the weights are kept ({decays}); the lowest loss at the end, of {len(chosen)} runs: "
                 f"{counted}.")  # fmt: skip
    return parts


def longer_pair(setup: dict) -> list[str]:
    pair = setup.get("longer_pair")
    if not pair:
        return ["None was run."]
    steps, gaps = np.array(pair["steps"], float), np.array(pair["difference"])
    slope, offset = np.polyfit(np.log(steps[1:]), np.log(gaps[1:]), 1)
    later = 10 * steps[-1]
    return [
        pair["text"],
        table(["step", *(f"{step:,}" for step in pair["steps"])], [
            ["next-token", *(f"{value:.3f}" for value in pair["next_token"])],
            ["MuToR-2D", *(f"{value:.3f}" for value in pair["mutor"])],
            ["difference", *(f"{value:.3f}" for value in pair["difference"])]]),
        f"From step {pair['steps'][1]:,} on the difference falls about as step^{slope:.2f}; so it would be "
        f"{math.exp(offset + slope * math.log(later)):.3f} nats after ten times as many steps, and would not change "
        "its sign. Four points of one seed bear no more than that.",
    ]  # fmt: skip


def set_up(setup: dict, runs: list[dict], lr: float) -> str:
    run = next(iter(of(runs, lr, BASELINE).values()))
    model = run["model"]
    return bullets([
        f"**Images.** {setup['classes']} classes of Tiny ImageNet ({', '.join(setup['names'])}), {setup['images']:,} "
        f"training images in {setup['views']} views, {setup['held_out']:,} held out, 64 pixels.",
        f"**Tokenizer.** {setup['grid'][0]}x{setup['grid'][1]} codes of {setup['codebook_size']}, trained here with a "
        "perceptual loss" + (f": {setup['psnr']:.1f} dB on held-out images." if setup["psnr"] else "."),
        f"**Transformer.** {model['layers']} layers, {model['heads']} heads, {model['dim']} wide, "
        f"{setup['parameters']:,} parameters; batch {run['batch_size']}, constant learning rate {lr:g} after 50 steps "
        "of warm-up, AdamW, no dropout, class dropout 0.1, bfloat16.",
        "**Objectives.** MuToR-2D: 20 registers of 64 slots (31 %), m = 4, a = 0.5, as in the paper. The others have "
        "the same offsets, the cell to the right and the cell below, aligned states and encoder states the cell "
        "itself, too: registers; linear heads on the last state; private blocks (MTAR's head, one block, weight 0.1); "
        "aligned states (Mirai-E, weight 2, its schedule by shares); encoder states (Mirai-I's loss with the features "
        f"of {setup['encoder']}). At sampling all models are the same.",
        "**Compute** is counted as `mutor plan` counts it: matrices, attention, unembeddings, projectors and teachers.",
    ])  # fmt: skip


def limits(setup: dict, runs: list[dict], lr: float) -> str:
    run = next(iter(of(runs, lr, BASELINE).values()))
    steps = next(iter(of(runs, lr, OTHERS[0]).values()), run)["steps"]
    accuracy = [measured(each, steps, "class_accuracy") for each in of(runs, lr, BASELINE).values() if each["scores"]]
    lines = [
        f"The length: {steps * run['batch_size'] / setup['images']:.1f} passes over the images; the papers train for "
        "300. What costs early may pay late.",
        f"The scale: {setup['parameters'] / 1e6:.1f} million parameters and 64 tokens; the papers have 111 million and "
        "256.",
        "Weights of the losses, other than two settings of registers, are the papers', chosen for ImageNet.",
        "The baseline has no dropout to tune: in so few passes nothing overfits. The earlier grid has that comparison.",
    ]
    if missing := [name for name in OTHERS if name not in present(runs, lr)]:
        lines.append(f"Declared and not run: {', '.join(missing)}.")
    if accuracy:
        real, chance = 100 * setup["real"]["class_accuracy"], 100 / setup["classes"]
        lines.append(f"Samples: next-token's are taken for their class in {np.mean(accuracy):.0f} % of cases, "
                     f"{chance:.0f} % being chance and {real:.0f} % what held-out images reach.")  # fmt: skip
    return bullets(lines)


def repeat(setup: dict, runs: list[dict]) -> str:
    seconds = sum(run["seconds"] for run in runs)
    return (
        f"{len(runs)} runs, {seconds / 3600:.1f} hours of one thread in training ({setup['machine']}, torch "
        f"{setup['torch']}). `python experiments/look_ahead.py --plan` says what the same costs with 31 million "
        "parameters on a GPU.\n\n```\n" + COMMANDS + "\n```"
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(runs: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False})
    lr = rates(runs)[0]
    baseline = of(runs, lr, BASELINE)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for index, name in enumerate(present(runs, lr)):
        found = of(runs, lr, name)
        first = next(iter(found.values()))
        steps = [int(step) for step in first["val_next_token"] if int(step) >= first["steps"] // 4]
        style = "-" if index < len(COLORS) else "--"
        for axis, factor in zip(axes, (1.0, first["relative_compute"]), strict=True):
            reached = [step for step in steps if all(loss(run, step * factor) is not None for run in baseline.values())]
            rows = [[loss(run, step) - loss(baseline[seed], step * factor) for step in reached]
                    for seed, run in found.items() if seed in baseline]  # fmt: skip
            x, color = np.array(reached) * factor, COLORS[index % len(COLORS)]
            axis.plot(x, np.mean(rows, 0), style, color=color, label=name, linewidth=1.6)
            axis.fill_between(x, np.min(rows, 0), np.max(rows, 0), color=color, alpha=0.13, linewidth=0)
    for axis, words in zip(axes, ("step", "compute (steps of next-token)"), strict=True):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel=words)
    axes[0].set(ylabel="held-out loss less next-token's (nats)", title="at equal steps")
    axes[1].set(title="at equal compute")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(runs: list[dict], strips: Path, path: Path) -> None:
    """Below each other the samples of every method of seed 0, next-token's at equal steps first and at its last."""
    import torch

    from mutor_vision.data.images import grid, save_png

    lr, rows, labels = rates(runs)[0], [], []
    for name in METHODS:
        run = of(runs, lr, name).get(0)
        steps = sorted(map(int, run["scores"])) if run else []
        for step in steps[:1] + steps[1:][-1:]:
            strip = strips / f"{run['name']}-{step}.npy"
            if strip.exists():
                rows += list(torch.from_numpy(np.load(strip, allow_pickle=False)).permute(0, 3, 1, 2))
                labels.append(f"{name}, step {step}")
    if rows:
        save_png(grid(torch.stack(rows), len(rows) // len(labels), labels).quantize(128), path)


if __name__ == "__main__":
    run_command(main)
