"""The JSON of experiments/run.py -> docs/first-grid.md and its pictures. Nothing on that page is typed by hand.

python experiments/results.py                        # write page and pictures
python experiments/results.py --check                # is the page what the JSON says? (text only)
python experiments/results.py --results DIR --page FILE.md
"""

import math
import sys
from pathlib import Path

import numpy as np
from comparison import (
    BASELINE,
    MEASURES,
    MUTOR,
    MUTOR_ALL,
    SHORT,
    ablation_differences,
    best,
    draft_means,
    drafting,
    equal_compute,
    equal_steps,
    gap,
    interval,
    judged,
    last,
    last_difference,
    longer_pairs,
    mapped,
    methods,
    paired,
    planned,
    position_map,
    read,
    recounted,
    regime_cells,
    said,
    select,
    spread,
    step_of_equal_compute,
    t_interval,
    tuned,
    values,
)
from figures import draw

from mutor_vision.cli import Parser, run_command
from mutor_vision.errors import MismatchError

ROOT = Path(__file__).resolve().parents[1]
# (MuToR-2D at the last checkpoint, at the best one) -> what that means.
MEANING = {
    ("better", ""): ": registers postpone overfitting and do not lower the best loss",
    ("better", "worse"): ": registers postpone overfitting and raise the best loss",
    ("better", "better"): ": the gain outlives early stopping",
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "experiments/first_grid", help="folder of JSON")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/first-grid.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is another")
    arguments = parser.parse_args()
    setup, runs = read(arguments.results)
    text = page(setup, runs, arguments.page.stem)
    if arguments.check:
        return check(arguments, text, len(runs), "experiments/results.py")
    draw(runs, arguments.page.with_suffix(""))
    arguments.page.write_text(text)
    print(arguments.page)


def check(arguments, text: str, runs: int, command: str) -> None:
    """Raise MismatchError unless the page is `text`, which `command` makes of --results."""
    if not arguments.page.is_file() or arguments.page.read_text() != text:
        raise MismatchError(f"{arguments.page} is not what {arguments.results} says; run {command}")
    print(f"{arguments.page} is what {runs} runs say")


def page(setup: dict, runs: list[dict], figures: str) -> str:
    parts = [
        "# Does MuToR-2D work here, and what decides it?",
        "Written by `python experiments/results.py` from the JSON of `python experiments/run.py`; no number is "
        "typed by hand. Differences are paired by seed (same initial weights, same order of images), in brackets "
        "the 95 % interval by Student's t over seeds, bold where it leaves 0 out in three seeds or more. Intervals "
        "are not corrected for their number: of twenty, one leaves 0 out by chance.",
        "## The answer",
        *answer(setup, runs),
        "## Set-up",
        set_up(setup, runs),
        *headline(runs, figures),
        *longer(setup, runs, figures),
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
    lines, images, baseline = [], setup["train_images"], select(runs, block="headline", method=BASELINE)
    mutor = select(runs, block="headline", method=MUTOR)
    opening = ""
    if baseline.keys() & mutor.keys():
        fair = {m: equal_compute(baseline, mutor, m) for m in MEASURES}
        seen = passes(next(iter(baseline.values())), images)
        where = f"at this scale, in the first {seen:.1f} passes over plentiful images, and at equal compute"
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
    if longer_pairs(runs):
        lengths = []
        for pair in longer_pairs(runs):
            run = next(iter(pair[0].values()))
            lengths.append(f"At {run['steps']} steps of next-token ({passes(run, images):.0f} passes), seeds: "
                           f"{len(pair[0].keys() & pair[1].keys())}: "
                           f"{said({m: last_difference(*pair, m) for m in MEASURES})}")  # fmt: skip
        lines.append(f"**With more training** ({MUTOR}, against next-token at equal compute): {'. '.join(lengths)}.")
        opening += f" **After {passes(run, images):.0f} passes: {said({'loss': last_difference(*pair, 'loss')})}.**"
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
    lines += recount_answer(runs)
    return [opening, bullets(lines)]


def recount_answer(runs: list[dict]) -> list[str]:
    """What has to be said while runs are shown whose compute was counted by an older rule than today's."""
    changed = []
    for name in methods(runs, "headline"):
        run = next(iter(select(runs, block="headline", method=name).values()))
        was, now = run["relative_compute"], recounted(run)
        if abs(now / was - 1) > 0.0005:
            changed.append(f"{name}: {now:.3f} instead of {was:.3f} ({now / was - 1:+.1%})")
    if not changed:
        return []
    return ["**Equal compute is not quite equal**: these runs were counted with half a row of attention for a "
            "register. The whole row is computed (with a register at every slot a CPU skips half of it), and `mutor "
            f"plan` counts it: {'; '.join(changed)} next-token steps. By that count whatever this page compares at "
            "equal compute gives registers that much more than next-token, and so favours them. The numbers on this "
            "page are the old ones until the runs are made again."]  # fmt: skip


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


def set_up(setup: dict, runs: list[dict]) -> str:
    run = runs[0]
    model, height = run["model"], setup["grid"][0]
    psnr = next((value for name, value in setup["tokenizer"].items() if name.endswith("psnr")), math.nan)
    real = setup["reconstructions"]
    return bullets([
        f"**Images.** {setup['classes']} classes, {setup['train_images']:,} training images in {setup['views']} "
        f"views, {setup['image_size']} pixels. Of the held-out images {setup['validation_images']} choose the best "
        f"checkpoint and draw the curves, the other {setup['test_images']} give every loss in the tables.",
        f"**Tokenizer.** Trained by this project on the same images: {height}x{setup['grid'][1]} codes of "
        f"{setup['codebook_size']}, {psnr:.1f} dB on held-out images.",
        f"**Transformer.** {model['layers']} layers, {model['heads']} heads, {model['dim']} wide; batch "
        f"{run['batch_size']}, constant learning rate {run['lr']:g} after 20 steps of warm-up, AdamW, no EMA, class "
        "dropout 0.1. The learning rate was chosen with next-token runs of another seed; nothing else was tuned.",
        "**Objectives.** All are one loss (1 - a) L_next + a L_other with a = 0.5. Parallel heads (arXiv "
        "2404.19737): head k is one more transformer block on the trunk's output, the unembedding is shared, and "
        "it predicts k tokens ahead. The trunk is the same in every method, and sampling uses the trunk alone.",
        f"**Samples.** {setup['samples']} a checkpoint, guidance {setup['cfg_scale']:g}, the same seeds and classes "
        f"everywhere. Fréchet distance (FD) and class accuracy are by a {setup['features']['architecture']} of "
        f"{setup['features']['image_size']} pixels, trained on the training images as the tokenizer shows them, so "
        "that they measure the transformer and not the tokenizer: right on "
        f"{setup['features']['held_out_accuracy']:.1%} of held-out images. {setup['samples']} real held-out images "
        f"through the tokenizer have FD {real['fd']:.2f} and accuracy {real['accuracy']:.1%}: what no model here "
        "can beat by much.",
        "**Compute** is counted: matrices of every input, attention, the unembedding of every target, times three for "
        "the backward pass; 1 is a next-token step.",
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
        "Few passes over all images, no dropout; `python experiments/run.py --only headline`. Mean ± half of the "
        f"95 % interval; compute 1 is {min(planned(baseline))} steps of next-token.",
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


def passes(run: dict, images: int) -> float:
    return run["steps"] * run["batch_size"] / images


def longer(setup: dict, runs: list[dict], figures: str) -> list[str]:
    rows, images = [], setup["train_images"]
    for pair in longer_pairs(runs):
        for name, found in zip((BASELINE, MUTOR), pair, strict=True):
            run = next(iter(found.values()))
            cells = [spread(list(values(found, last, m).values()), MEASURES[m][1]) for m in MEASURES]
            rows.append([name, f"{run['steps']} ({passes(run, images):.1f})", f"{len(found)}",
                         f"{np.mean([run['best'] for run in found.values()]):.0f}",
                         spread(list(values(found, best, "loss").values()), 3), *cells])  # fmt: skip
        differences = [interval(last_difference(*pair, m), MEASURES[m][1]) for m in MEASURES]
        of_best = interval(paired(values(pair[1], best, "loss"), values(pair[0], best, "loss")), 3)
        rows.append(["difference", "", f"{len(pair[0].keys() & pair[1].keys())}", "", of_best, *differences])
    if not rows:
        return []
    heads = [f"{SHORT[m]}, last" for m in MEASURES]
    return [
        "## More training",
        "Plentiful data again, trained longer, each pair to the same compute. *Best* and *last* as below. `python "
        "experiments/run.py --only long`",
        table(["objective", "steps (passes)", "seeds", "best step", "held-out loss, best", *heads], rows),
        f"![Held-out loss of the longest runs]({figures}/longer.png)",
        "*Held-out loss (validation images) of the longest runs by compute; right, MuToR-2D's less next-token's at the "
        "same compute. Lines are means over seeds, bands reach from the lowest to the highest seed.*",
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


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
                seen = passes(first, per_class * setup_classes(runs))
                row = [f"{per_class}", f"{dropout:g}", name, f"{len(found)}", f"{first['steps']} ({seen:.0f})",
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
        "dropout. *Best* is the checkpoint with the lowest loss on the validation images (early stopping), *last* "
        "the end of training. Each seed has images of its own. `python experiments/run.py --only regimes`",
        table(["images a class", "dropout", "objective", "seeds", "steps (passes)", "best step", *heads], rows),
        f"![Overfitting]({figures}/regimes.png)",
        "*Held-out loss (validation images) by compute where images are few. Lines are means over seeds, bands "
        "reach from the lowest to the highest seed.*",
        "MuToR-2D less next-token, paired by seed:" if details else "",
        table(["images a class", "dropout", "seeds", *heads], details) if details else "",
    ]


def setup_classes(runs: list[dict]) -> int:
    return runs[0]["model"]["num_classes"]


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
        "(default: m = 4, an offset per sequence, targets across the edge in raster order, a = 0.5, registers at "
        "the class too). Loss on the validation images; `python experiments/run.py --only ablations`.",
        table(["changed", "seeds", "compute a step", "difference in held-out loss (nats per token)"], rows),
    ]


def ahead(name: str, width: int) -> str:
    if name.startswith("head"):
        return name.removeprefix("head ")
    d_h, d_w = map(int, name.split(","))
    return f"{(d_h - 1) * width + d_w - 1}"


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
        "p of a token, given all before it, with what a register or head said of that token earlier, q. On "
        f"held-out images ({setup['draft_images']}, every slot with a target), at the last checkpoint, over seeds; "
        f"with guidance both p and q are guided with {setup['cfg_scale']:g}. An offset (d_h, d_w) lies d_h - 1 rows "
        "down and d_w - 1 columns right of the last token seen; *ahead* counts tokens in raster order, 1 being the "
        "next token itself. A high overlap says that p and q agree, not that they are good: two flat distributions "
        "agree too, so the last columns say what the register knows.",
        "Registers and heads side by side, acceptance (%) by tokens ahead:",
        table(["objective", "seeds", *(f"{k} ahead{g}" for k in "234" for g in ("", ", guided"))], along),
        f"![Register loss and acceptance by offset]({figures}/offsets.png)",
        "*Left to right: how much worse than the next-token prediction of the same tokens a register is, and the "
        "share of its drafts that would be accepted, without and with guidance. Means over seeds.*",
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
    longest = ([pair[0] for pair in longer_pairs(runs)] or [baseline])[-1]
    if longest:
        early, late = (t_interval([run["validation"][str(step(run))] for run in longest.values()])[0]
                       for step in (lambda run: run["steps"] // 2, last))  # fmt: skip
        seen = passes(next(iter(longest.values())), setup["train_images"])
        change = f"falls by {early - late:.3f}" if early > late else f"rises by {late - early:.3f}"
        lines.append(
            f"The length: the longest runs see each image {seen:.1f} times, and in the second half next-token's loss "
            f"{change} nats. The paper's models see it 288 times, in two views."
        )
    chance = 100 / setup["classes"]
    found, later = (np.mean([*values(found, last, "accuracy").values()] or 0) for found in (baseline, longest))
    if baseline and found < 2 * chance:
        lines.append(
            f"The class: samples of next-token in the main comparison are taken for their class in {found:.1f} % of "
            f"cases, {chance:.1f} % being chance, and after the longest training in {later:.1f} %. Where it is near "
            "chance, models have hardly learned what a class is, and class accuracy and guidance tell little."
        )
    return [
        "## What this does not settle",
        bullets(lines + [
            f"The scale: {run['parameters'] / 1e6:.2f} million parameters, {setup['grid'][0]}x{setup['grid'][1]} "
            f"tokens, {setup['classes']} classes. The paper trains 111 million parameters on 1.28 million images "
            "with 16x16 tokens; an effect that needs long training, long sequences or capacity cannot be seen here.",
            "The seeds are few: with three, a 95 % interval reaches 2.5 standard deviations of the differences to "
            "either side, with five 1.2. What is not told apart may still differ by as much as the interval says.",
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
        "experiments/grid.py declares them in the order of their importance, and the page is of those that have "
        "run; experiments/first_grid/ has a JSON for each, with its command.\n\n```\npython experiments/run.py --zips "
        "DIR --work WORK                     # all; again, or twice at once: goes on\npython experiments/run.py "
        "--grid small --images FOLDER --work WORK   # 2 objectives, 2 seeds, your images\npython "
        "experiments/results.py                                        # this page\npython experiments/results.py "
        "--check                                # is it what the JSON says?\n```"
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run_command(main)
