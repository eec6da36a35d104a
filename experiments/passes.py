"""How many tokens a pass of forecast decoding makes, by window, registers and guidance, and where in the image.

    python experiments/passes.py RUN [RUN ...] [--images 40] [--windows 1,2,4,8,16] [--drafts 0,1,2] [--cfg 1,2]
                                 [--adapter DRAFTER] [--json FILE] [--picture FILE.png]

Every image is compared with the one that a token after another makes; in float64, the default, all are equal. The
interval is of the mean over images (Student's t, 95 %). A pass draws W + m tokens, of which the first is exact; 'right'
says how many of those drawn 1, 2, ... ahead turn out right. The picture shows both for the first run, the last guidance
and the widest window: in how many images a pass ended at each cell, and the share of right draws.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from comparison import t_interval
from torch import Tensor

from mutor_vision.cli import Parser, run_command
from mutor_vision.runtime import start
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.forecast import Forecast, most_drafts
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.load import load
from mutor_vision.sampling.stream import label_plan
from mutor_vision.storage.files import write_json


def main() -> None:
    parser = Parser(prog="experiments/passes.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories or checkpoints")
    parser.add_argument("--adapter", default="", help="a drafter trained on RUN, of which there is one then")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--windows", default="1,2,4,8,16")
    parser.add_argument("--drafts", default="0,1,2", help="left out where a run has learnt fewer")
    parser.add_argument("--cfg", default="1,2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="also says how many images differ")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    windows, drafts, scales = ([float(x) for x in text.split(",")] for text in
                               (options.windows, options.drafts, options.cfg))  # fmt: skip
    rows, shown = [], []
    for run in options.runs:
        loaded = load(run, start("float32", "cpu"), adapter=options.adapter)
        model = loaded.transformer if options.float32 else plain_model(run, options.adapter).double()
        labels, indices = label_plan(options.images, loaded.config.model.num_classes), np.arange(options.images)
        for scale in scales:
            settings = SampleSettings(cfg_scale=scale)
            expected = generate(model, labels, settings, seed=options.seed, indices=indices)
            for window in map(int, windows):
                for m in [int(m) for m in drafts if m <= most_drafts(loaded.config)]:
                    taken, differing, where = [], 0, np.zeros(loaded.config.model.num_tokens)
                    right = []
                    for i in range(options.images):  # one by one, so that passes belong to an image
                        ends = []
                        exact = expected[i].flatten()
                        forecast = Forecast(window, m, record=partial(watched, exact=exact, ends=ends, right=right))
                        codes = generate(model, labels[i : i + 1], settings, seed=options.seed,
                                         indices=indices[i : i + 1], decoder=forecast)  # fmt: skip
                        taken.append(forecast.tokens / forecast.passes)
                        differing += int(not torch.equal(codes[0], expected[i]))
                        where[np.array(ends) - 1] += 1
                    mean, half = t_interval(taken)
                    share = np.nanmean(right, axis=0).round(4).tolist()
                    rows.append({
                        "run": run.name, "cfg": scale, "window": window, "drafts": m, "tokens_per_pass": mean,
                        "half_interval": half, "differing_images": differing, "images": options.images,
                        "right": share,
                    })  # fmt: skip
                    print("{run}: guidance {cfg:g}, window {window}, {drafts} registers: {tokens_per_pass:.2f} +- "
                          "{half_interval:.2f} tokens a pass, {differing_images} of {images} images differ"
                          .format(**rows[-1]), flush=True)  # fmt: skip
                    if run == options.runs[0] and scale == scales[-1] and window == max(windows):
                        shown.append((m, where.reshape(loaded.config.model.grid) / options.images, share))
    if options.json:
        write_json(options.json, {"rows": rows, "seed": options.seed})
    if options.picture:
        draw(options.picture, *zip(*shown, strict=True))


def watched(step, exact: Tensor, ends: list[int], right: list[np.ndarray]):
    """The step, which also notes how many tokens are exact after it, and which of the tokens that it drew are right
    (exact: (N,), all tokens of the image; NaN behind the last)."""
    tokens, start, (window, drafts) = *step.args[2:4], step.args[-2:]

    def call() -> None:
        done = int(start[0])
        step()
        ends.append(int(start[0]))
        drawn = tokens[0, done + 1 : done + 1 + window + drafts]
        wanted = exact[done : done + window + drafts]
        found = np.full(window + drafts, np.nan)
        found[: len(wanted)] = (drawn[: len(wanted)] == wanted).numpy()
        right.append(found)

    return call


def plain_model(run: Path, adapter: str):
    """The weights that `load` takes, not packed for float32."""
    if adapter:
        from mutor_vision.model.lora import load_merged

        return load_merged(run, adapter).transformer
    from mutor_vision.config import TrainConfig
    from mutor_vision.model.transformer import Transformer
    from mutor_vision.storage import checkpoint

    folder = checkpoint.resolve(run)
    model = Transformer(checkpoint.read_config(folder, "transformer", TrainConfig).model)
    checkpoint.load_strictly(model, checkpoint.read_weights(folder, "best"), folder)
    return model.eval().requires_grad_(False)


def draw(path: Path, drafts: tuple[int, ...], cells: tuple[np.ndarray, ...], shares: tuple[list[float], ...]) -> None:
    """cells: (h, w), the share of images in which a pass ended at each; the map shows the last, of most registers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    image = left.imshow(cells[-1], cmap="viridis", vmin=0, vmax=1)
    left.set_xlabel("column")
    left.set_ylabel("row")
    left.set_title("Share of images in which a pass\nended with this token", fontsize=10)
    figure.colorbar(image, ax=left)
    for m, share in zip(drafts, shares, strict=True):
        right.plot(range(1, len(share) + 1), share, marker="o", markersize=4, label=f"m = {m}")
        if m:  # the registers' draws
            right.plot(range(len(share) - m + 1, len(share) + 1), share[-m:], "o", markersize=9, fillstyle="none",
                       color="black")  # fmt: skip
    right.set_ylim(0, 1.03)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("tokens ahead")
    right.set_title("Share of draws that turn out right\n(circled: by registers)", fontsize=10)
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main)
