"""Curves of training runs, from their log.jsonl: the command `mutor plot`, and the demo's picture."""

import argparse
from pathlib import Path

from mutor_vision.errors import UserError
from mutor_vision.run_log import read_log

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, for all eyes
PANELS = (  # title of the vertical axis, [(key of the log, line style, what it is)]
    (
        "next-token cross-entropy (nats per token)",
        [
            ("next_token", ":", "training"),
            ("val_next_token", "-", "held out"),
            ("val_next_token_ema", "--", "held out, EMA"),
        ],
    ),
    ("register cross-entropy (nats per token)", [("register", ":", "training"), ("val_register", "-", "held out")]),
    ("Fréchet distance of samples", [("fd", "-o", "")]),
)


def plot_runs(runs: dict[str, Path], path: Path, panels=PANELS) -> None:
    """Draw name -> run directory into a PNG: a panel for each kind of curve that any of the runs has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logs = {name: read_log(run) for name, run in runs.items()}
    drawn = [
        panel for panel in panels if any(key in line for key, _, _ in panel[1] for log in logs.values() for line in log)
    ]
    if not drawn:
        raise UserError(
            f"{', '.join(map(str, runs.values()))}: no curve in log.jsonl yet; train with log_every above 0"
        )
    figure, axes = plt.subplots(1, len(drawn), figsize=(7 * len(drawn), 4.2), layout="constrained", squeeze=False)
    for axis, (title, curves) in zip(axes[0], drawn, strict=True):
        for index, (name, log) in enumerate(logs.items()):
            for key, style, what in curves:
                points = [(line["step"], line[key]) for line in log if key in line]
                if points:
                    label = f"{name}, {what}" if what else name
                    axis.plot(*zip(*points, strict=True), style, color=COLORS[index % len(COLORS)], label=label)
        axis.set(xlabel="optimizer step", ylabel=title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="run directories of train/imagenet.py")
    parser.add_argument("--out", required=True, type=Path, help="FILE.png")


def main(arguments: argparse.Namespace) -> None:
    runs = {Path(run).name: Path(run) for run in arguments.runs}
    for run in runs.values():
        if not (run / "log.jsonl").is_file():
            raise UserError(f"{run} has no log.jsonl; expected a run directory of train/imagenet.py")
    plot_runs(runs, arguments.out)
    print(arguments.out)
