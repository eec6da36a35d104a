"""Curves of training runs, from their log.jsonl: the command `mutor plot`, and the demo's picture."""

import argparse
from pathlib import Path

from mutor_vision.errors import UserError
from mutor_vision.names import printable
from mutor_vision.storage.files import written
from mutor_vision.storage.outputs import check_out_file
from mutor_vision.storage.run_log import read_log

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
MOST_PANELS = 6


def plot_runs(runs: dict[str, Path], path: Path, panels=PANELS) -> None:
    """Draw name -> run directory into a picture of the kind that the ending of `path` says: a panel for each kind of
    curve that any of the runs has. Raises UserError when there is none, and for an ending that cannot be written."""
    plt = _pyplot()
    endings = plt.figure(0).canvas.get_supported_filetypes()
    plt.close(0)
    if path.suffix[1:].lower() not in endings:
        raise UserError(f"{path} is no picture that can be written; expected the ending .{', .'.join(sorted(endings))}")
    check_out_file(path)
    logs = {name: read_log(run) for name, run in runs.items()}
    drawn = [
        panel for panel in panels if any(key in line for key, _, _ in panel[1] for log in logs.values() for line in log)
    ]
    drawn = drawn or _panels_of_other_numbers(logs)
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
                    label = _label(f"{name}, {what}" if what else name)
                    axis.plot(*zip(*points, strict=True), style, color=COLORS[index % len(COLORS)], label=label)
        axis.set(xlabel="optimizer step", ylabel=title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    with written(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix[1:].lower())
    plt.close(figure)


def _panels_of_other_numbers(logs: dict[str, list[dict]]) -> list:
    """For logs with other curves, such as a tokenizer's: a panel for each of the first few."""
    keys = dict.fromkeys(key for log in logs.values() for line in log for key, value in line.items()
                         if key != "step" and isinstance(value, int | float))  # fmt: skip
    return [(key, [(key, "-", "")]) for key in list(keys)[:MOST_PANELS]]


def shortest_names(runs: list[Path]) -> dict[str, Path]:
    """The shortest end of each run's path that tells it from the others -> the run; a run given twice counts once."""
    resolved = {run.resolve(): run for run in runs}
    names = {}
    for path, run in resolved.items():
        ends = ["/".join(path.parts[-count:]) for count in range(1, len(path.parts))]
        others = [f"/{other.as_posix()}" for other in resolved if other != path]
        names[next((end for end in ends if not any(o.endswith(f"/{end}") for o in others)), str(path))] = run
    return names


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib; pip install 'mutor-vision[demo]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _label(text: str) -> str:
    """As the legend shows it: matplotlib would read formulas between dollars, and hide what begins with '_'."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="run directories of train/imagenet.py")
    parser.add_argument("--out", required=True, type=Path, help="FILE.png, or another ending such as .pdf, .svg")


def main(arguments: argparse.Namespace) -> None:
    runs = shortest_names([Path(run) for run in arguments.runs])
    for run in runs.values():
        if not (run / "log.jsonl").is_file():
            raise UserError(f"{run} has no log.jsonl; expected a run directory of train/imagenet.py")
    plot_runs(runs, arguments.out)
    print(arguments.out)
