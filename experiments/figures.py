"""The pictures of docs/first-grid.md."""

from pathlib import Path

import numpy as np
from comparison import (
    BASELINE,
    MUTOR,
    draft_means,
    gap,
    longer_pairs,
    mapped,
    methods,
    position_map,
    regime_cells,
    select,
)

from mutor_vision.commands.plot import COLORS


def draw(runs: list[dict], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False})
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("curves", draw_curves(plt, runs)), ("longer", draw_longer(plt, runs)),
                         ("regimes", draw_regimes(plt, runs)),
                         ("offsets", draw_offsets(plt, runs)), ("positions", draw_positions(plt, runs))):  # fmt: skip
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
            plt.close(figure)


def curve(run: dict) -> tuple[np.ndarray, np.ndarray]:
    """Compute in next-token steps, and the validation loss there."""
    steps = np.array([int(step) for step in run["validation"]])
    return steps * run["relative_compute"], np.array(list(run["validation"].values()))


def band(axis, x: np.ndarray, rows: list[np.ndarray], color: str, label: str) -> None:
    axis.plot(x, np.mean(rows, 0), color=color, label=label, linewidth=1.6)
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
    right.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="compute (steps of next-token)", ylabel="held-out loss (nats per token)")
    right.set(xlabel="compute (steps of next-token)", ylabel="loss less next-token's (nats per token)")
    top = np.mean([curve(run)[1][-1] for run in baseline.values()])
    left.set_ylim(top - 0.1, top + 0.9)
    left.legend(fontsize=8)
    return figure


def draw_longer(plt, runs: list[dict]):
    pairs = longer_pairs(runs)
    if not pairs:
        return None
    baseline, mutor = pairs[-1]
    both = [(curve(baseline[seed]), curve(mutor[seed])) for seed in sorted(baseline.keys() & mutor.keys())]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    x, other_x = both[0][0][0], both[0][1][0]
    band(left, x, [own for (_, own), _ in both], COLORS[0], BASELINE)
    band(left, other_x, [other for _, (_, other) in both], COLORS[1], MUTOR)
    band(right, other_x, [other - np.interp(other_x, *own) for own, (_, other) in both], COLORS[1], MUTOR)
    right.axhline(0, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.set(xlabel="compute (steps of next-token)", xscale="log")
    left.set_ylabel("held-out loss (nats per token)")
    right.set_ylabel("MuToR-2D's less next-token's (nats)")
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
