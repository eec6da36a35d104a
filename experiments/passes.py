"""How many tokens a pass of forecast decoding makes, by window, registers and guidance, and where in the image.

    python experiments/passes.py RUN [RUN ...] [--images 40] [--windows 1,2,4,8,16] [--drafts 0,1,2] [--cfg 1,2]
                                 [--adapter DRAFTER] [--json FILE] [--map FILE.png]

Every image is compared with the one that a token after another makes; in float64, the default, all are equal. The
interval is of the mean over images (Student's t, 95 %). The map shows, for the first run, guidance and the widest
window, the share of images in which a pass ended at each cell.
"""

from pathlib import Path

import numpy as np
import torch
from comparison import t_interval

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
    parser.add_argument("--map", type=Path)
    options = parser.parse_args()
    windows, drafts, scales = ([float(x) for x in text.split(",")] for text in
                               (options.windows, options.drafts, options.cfg))  # fmt: skip
    rows, cells = [], None
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
                    for i in range(options.images):  # one by one, so that passes belong to an image
                        ends = []
                        forecast = Forecast(window, m, record=lambda step, ends=ends: watched(step, ends))
                        codes = generate(model, labels[i : i + 1], settings, seed=options.seed,
                                         indices=indices[i : i + 1], decoder=forecast)  # fmt: skip
                        taken.append(forecast.tokens / forecast.passes)
                        differing += int(not torch.equal(codes[0], expected[i]))
                        where[np.array(ends) - 1] += 1
                    mean, half = t_interval(taken)
                    rows.append({
                        "run": run.name, "cfg": scale, "window": window, "drafts": m, "tokens_per_pass": mean,
                        "half_interval": half, "differing_images": differing, "images": options.images,
                    })  # fmt: skip
                    print("{run}: guidance {cfg:g}, window {window}, {drafts} registers: {tokens_per_pass:.2f} +- "
                          "{half_interval:.2f} tokens a pass, {differing_images} of {images} images differ"
                          .format(**rows[-1]), flush=True)  # fmt: skip
                    if run == options.runs[0] and scale == scales[-1] and window == max(windows):
                        cells = where.reshape(loaded.config.model.grid) / options.images
    if options.json:
        write_json(options.json, {"rows": rows, "seed": options.seed})
    if options.map:
        draw_map(cells, options.map)


def watched(step, ends: list[int]):
    """The step, which also notes how many tokens are exact after it."""

    def call() -> None:
        step()
        ends.append(int(step.args[3][0]))

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


def draw_map(ends: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.2, 3.6))
    image = axes.imshow(ends, cmap="viridis", vmin=0, vmax=1)
    axes.set_xlabel("column")
    axes.set_ylabel("row")
    axes.set_title("Share of images in which a pass\nended with this token", fontsize=10)
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main)
