"""Seconds of drawing codes, ours beside the same model without a cache and, where a checkout is given, beside
LlamaGen's own `generate`; the same random weights, sizes, tokens and guidance on all sides, in one run, in turns.

    python benchmarks/sampling.py [--preset imagenet256-B-next-token] [--images 16] [--cfg-scale 2] [--json FILE]
    python benchmarks/sampling.py --llamagen CHECKOUT        # of github.com/FoundationVision/LlamaGen

A full forward pass for every token takes a hundred times as long, so the side without a cache draws --naive-tokens
only, and ours is timed on as many beside it. Ratios are to ours on the same number of tokens.
"""

import dataclasses
import sys
from contextlib import nullcontext

import numpy as np
import torch
from report import add_arguments, machine, measure, medians, table, write

from mutor_vision.cli import Parser, run_command
from mutor_vision.config import TransformerConfig
from mutor_vision.errors import UserError
from mutor_vision.interop.llamagen import llamagen_transformer_state_dict
from mutor_vision.model.prepare import QUANTIZATIONS, prepare
from mutor_vision.model.transformer import Transformer
from mutor_vision.presets import TRANSFORMERS
from mutor_vision.runtime import start
from mutor_vision.sampling.draw import SampleSettings, draw, filtered_probabilities, noise_keys
from mutor_vision.sampling.forecast import Forecast
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.load import COMPILE
from mutor_vision.sampling.static import StaticSteps
from mutor_vision.settings import preset


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="imagenet256-B-next-token", help="whose transformer, with random weights")
    parser.add_argument("--images", type=int, default=16, help="images in the batch (default 16)")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="guidance, 1 = none (default 2)")
    parser.add_argument("--tokens", type=int, default=0, help="draw only the first so many of each image, 0 = all")
    parser.add_argument("--naive-tokens", type=int, default=16, help="tokens of the side without a cache, 0 = omit it")
    parser.add_argument("--llamagen", help="folder with a checkout of LlamaGen, to time its generate as well")
    parser.add_argument("--compile", default="auto", help="of ours, as in `mutor sample`; on: LlamaGen's model as well")
    parser.add_argument("--window", type=int, default=8, help="of forecasts (default 8)")
    parser.add_argument("--drafts", type=int, default=2, help="of forecasts (default 2)")
    parser.add_argument("--tokens-per-pass", type=float, default=2.76, help="of a trained model, as "
                        "experiments/passes.py counts them (default 2.76, the demo's)")  # fmt: skip
    parser.add_argument("--quantize", default="none", help=f"of ours: {' or '.join(QUANTIZATIONS)}")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.compile not in COMPILE:
        raise UserError(f"--compile is '{arguments.compile}', expected one of {', '.join(COMPILE)}")
    if arguments.images < 1 or arguments.repeats < 1:
        raise UserError("--images and --repeats must be 1 or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runtime = start(arguments.precision, arguments.device)
    config = preset(TRANSFORMERS, arguments.preset).model
    if not config.vocab_size:  # what a token set would decide
        config = dataclasses.replace(config, vocab_size=16384, num_classes=1000, grid=(16, 16))
    tokens = arguments.tokens or config.num_tokens
    if not 0 < tokens <= config.num_tokens or not 0 <= arguments.naive_tokens <= config.num_tokens:
        raise UserError(f"--tokens and --naive-tokens must be at most the model's {config.num_tokens}")

    settings = SampleSettings(cfg_scale=arguments.cfg_scale)
    labels = (torch.arange(arguments.images) % config.num_classes).to(runtime.device)
    weights = random_weights(config)
    ours = prepare(load(config, weights, runtime), runtime.autocast_dtype, arguments.quantize)
    static = arguments.compile == "on" or (arguments.compile == "auto" and runtime.device.type == "cuda")
    static = StaticSteps("inductor" if arguments.compile == "on" else "") if static else None

    def cached(count: int) -> None:
        with runtime.autocast():
            generate(
                ours, labels, settings, seed=0, indices=np.arange(len(labels)), decoder=static, num_tokens=count
            )  # fmt: skip

    forecast = Forecast(arguments.window, arguments.drafts)

    def forecasted() -> None:
        with runtime.autocast():
            generate(ours, labels, settings, seed=0, indices=np.arange(len(labels)), decoder=forecast,
                     num_tokens=tokens)  # fmt: skip

    named = f"forecast, {arguments.window} + {arguments.drafts}"
    sides, counts = {"ours": lambda: cached(tokens), named: forecasted}, {"ours": tokens, named: tokens}
    if arguments.llamagen:
        sides["llamagen"] = llamagen(config, weights, labels, settings, tokens, runtime, arguments)
        counts["llamagen"] = tokens
    if arguments.naive_tokens:
        plain, few = load(config, weights, runtime), arguments.naive_tokens
        sides |= {f"ours, {few} tokens": lambda: cached(few),
                  f"no cache, {few} tokens": lambda: without_cache(plain, labels, settings, few, runtime)}  # fmt: skip
        counts |= {f"ours, {few} tokens": few, f"no cache, {few} tokens": few}

    seconds = measure(sides, arguments.repeats, runtime.device)
    middle = medians(seconds)
    ours_of = {counts[name]: value for name, value in middle.items() if name.startswith("ours")}
    rows = [
        {"side": name, "tokens": f"{counts[name]} of {config.num_tokens}", "seconds": value,
         "images/s": len(labels) / value if counts[name] == config.num_tokens else None,
         "times ours": value / ours_of[counts[name]]}
        for name, value in middle.items()
    ]  # fmt: skip
    sizes = {
        "preset": arguments.preset, "images": len(labels), "tokens": counts, "of_tokens": config.num_tokens,
        "cfg_scale": arguments.cfg_scale, "precision": "bfloat16" if runtime.autocast_dtype else "float32",
        "compile": arguments.compile, "quantize": arguments.quantize,
    }  # fmt: skip
    host = machine(runtime.device)
    print(f"{arguments.preset}: {len(labels)} images, guidance {arguments.cfg_scale:g}, {sizes['precision']}, "
          f"{host['device']}, {host['threads']} threads, median of {arguments.repeats}")  # fmt: skip
    print(table(rows))
    # Random weights are guessed well or badly by chance; what a pass costs is the same for any weights.
    a_pass, a_token = forecast_pass(forecasted, forecast, len(labels), runtime.device), middle["ours"] / tokens
    print(f"a pass of {arguments.window} + {arguments.drafts} inputs: {1000 * a_pass:.1f} ms, "
          f"{a_pass / a_token:.2f} times a token of plain decoding; with {arguments.tokens_per_pass:g} tokens a pass "
          f"forecasts are {arguments.tokens_per_pass * a_token / a_pass:.2f} times as fast")  # fmt: skip
    if arguments.json:
        write(arguments.json, {"machine": host, "sizes": sizes, "seconds": seconds, "medians": middle})


def forecast_pass(forecasted, forecast: Forecast, images: int, device: torch.device) -> float:
    """Seconds of a pass, in the middle of three batches."""
    found = []
    for _ in range(3):
        before = forecast.passes
        seconds = measure({"one": forecasted}, 1, device, warmup=0)["one"][0]
        found.append(seconds * images / (forecast.passes - before))
    return sorted(found)[1]


def random_weights(config: TransformerConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model.state_dict()


def load(config: TransformerConfig, weights: dict[str, torch.Tensor], runtime) -> Transformer:
    model = Transformer(config)
    model.load_state_dict(weights)
    return model.to(runtime.device).eval().requires_grad_(False)


@torch.no_grad()
def without_cache(model: Transformer, labels: torch.Tensor, settings: SampleSettings, count: int, runtime) -> None:
    """One whole forward pass per token, both streams in one batch: what a first version of a sampler does."""
    keys = noise_keys(0, np.arange(len(labels)), count).to(labels.device)
    guided = settings.cfg_scale != 1
    rows = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    codes = labels.new_empty(len(labels), 0)
    with runtime.autocast():
        for i in range(count):
            slots = torch.arange(i + 1, device=labels.device)[None]
            logits = model(codes.repeat(2, 1) if guided else codes, rows, slots)[:, -1]
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + settings.cfg_scale * (conditional - unconditional)
            drawn = draw(filtered_probabilities(logits, settings), keys[:, i])
            codes = torch.cat([codes, drawn[:, None]], dim=1)


def llamagen(config: TransformerConfig, weights, labels, settings: SampleSettings, count: int, runtime, arguments):
    """LlamaGen's generate on a model of the same sizes and weights, as its autoregressive/sample/sample_c2i.py calls
    it: the model in the precision asked for, caches for the whole image, the whole vocabulary."""
    sys.path.insert(0, arguments.llamagen)
    if not hasattr(torch.backends.cuda, "sdp_kernel"):  # gone from newer PyTorch; it chose among CUDA kernels
        torch.backends.cuda.sdp_kernel = lambda **kernels: nullcontext()
    try:
        from autoregressive.models import generate as peer
        from autoregressive.models.gpt import ModelArgs
        from autoregressive.models.gpt import Transformer as Peer
    except ImportError as error:
        raise UserError(f"{arguments.llamagen} is no checkout of LlamaGen ({error})") from None
    if config.grid[0] != config.grid[1]:
        raise UserError("LlamaGen has square grids only; leave out --llamagen")
    model = Peer(ModelArgs(
        dim=config.dim, n_layer=config.layers, n_head=config.heads, vocab_size=config.vocab_size,
        num_classes=config.num_classes, block_size=config.num_tokens, cls_token_num=1, model_type="c2i",
    ))  # fmt: skip
    model.load_state_dict(llamagen_transformer_state_dict(weights))
    model = model.to(runtime.device, runtime.autocast_dtype or torch.float32).eval().requires_grad_(False)
    # Its generate takes caches for the tokens asked for; the first tokens of an image cost what whole ones make them.
    setup = model.setup_caches
    model.setup_caches = lambda max_batch_size, max_seq_length, dtype: setup(
        max_batch_size, 1 + config.num_tokens, dtype
    )
    if arguments.compile == "on":
        model = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    return lambda: peer.generate(
        model, labels, count, cfg_scale=settings.cfg_scale, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0,
        sample_logits=True,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
