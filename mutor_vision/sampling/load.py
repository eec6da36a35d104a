"""A run -> everything that sampling needs."""

from dataclasses import dataclass, field
from pathlib import Path

from mutor_vision.config import TrainConfig
from mutor_vision.data.token_set import read_facts
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.model.prepare import prepare
from mutor_vision.model.transformer import Transformer
from mutor_vision.runtime import Runtime
from mutor_vision.sampling.decode import Plain
from mutor_vision.sampling.draw import LAW
from mutor_vision.sampling.forecast import Either, Forecast, most_drafts
from mutor_vision.sampling.generate import Decoder
from mutor_vision.sampling.static import StaticSteps
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import sha256
from mutor_vision.tokenizer.model import VQTokenizer, load_tokenizer, tokenizer_identity

COMPILE = ("auto", "on", "off")
DECODE = ("auto", "plain", "forecast")
# Images at once up to which forecasts were measured to be faster (docs/performance.md).
FORECAST_UP_TO = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Decoding:
    """How codes are drawn: by which decoder. The codes are the same by all, but for rounding."""

    decode: str = "plain"  # 'plain', 'forecast', or 'auto': by FORECAST_UP_TO, forecasts for few images at once
    compile: str = "auto"  # of plain: 'off'; 'auto' records steps as CUDA graphs on CUDA; 'on' compiles them, too
    window: int = 8  # of forecast: inputs in a row
    drafts: int = -1  # of forecast: registers behind them; -1 = as many as the model was trained for, at most 2

    def __post_init__(self) -> None:
        for name, expected in (("compile", COMPILE), ("decode", DECODE)):
            if getattr(self, name) not in expected:
                raise UserError(f"{name} is '{getattr(self, name)}', expected one of {', '.join(expected)}")
        if not 1 <= self.window <= 64 or not -1 <= self.drafts <= 64:
            raise UserError(f"window is {self.window} and drafts {self.drafts}, expected 1 to 64, and 0 to 64")


@dataclass(frozen=True)
class LoadedModel:
    """Everything that sampling needs, in evaluation mode on one device."""

    transformer: Transformer
    tokenizer: VQTokenizer
    config: TrainConfig
    class_names: list[str]
    runtime: Runtime
    identity: dict  # where the weights come from, for the protocol of a result
    resize: int = 0  # pixels square to resize decoded images to, 0 = as decoded
    decoder: Decoder = Plain()
    decoding: dict = field(default_factory=lambda: {"draw": LAW, "decode": "plain"})  # the decoder, for the protocol

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images it makes."""
        if self.resize:
            return self.resize, self.resize
        height, width = (side * self.tokenizer.config.downsample for side in self.config.model.grid)
        return height, width


def load(
    path: str | Path, runtime: Runtime, weights: str = "best", adapter: str | Path = "", quantize: str = "none",
    decoding: Decoding = Decoding(), pack: bool = True,
) -> LoadedModel:  # fmt: skip
    """A run or one of its checkpoints -> LoadedModel. weights: 'model', 'ema', or 'best' (EMA where there is one).
    adapter: a LoRA run trained on it, whose classes, tokenizer and `weights` then count. quantize: 'none' or 'int8',
    see prepare.prepare. pack: prepared for drawing; False keeps the trained matrices, to be saved again."""
    if adapter:
        from mutor_vision.model.lora import load_merged

        merged = load_merged(path, adapter, weights)
        folder, root, config, weights = merged.folder, merged.root, merged.config, merged.weights
        transformer, base = merged.transformer, {"base": merged.base}
    else:
        folder = checkpoint.resolve(path)
        config = checkpoint.read_config(folder, "transformer", TrainConfig)
        root = folder if (folder / "tokenizer").is_dir() else folder.parent.parent
        weights = checkpoint.weights_named(folder, weights)
        transformer, base = Transformer(config.model), {}
        checkpoint.load_strictly(transformer, checkpoint.read_weights(folder, weights), folder)
    for name in ("tokenizer", "token_set.json"):
        if not (root / name).exists():
            raise UserError(f"{root} has no {name}; give a run of train/imagenet.py, or `mutor convert --tokenizer` it")
    token_set = read_facts(root)
    tokenizer = load_tokenizer(root / "tokenizer")
    if (found := tokenizer_identity(tokenizer)) != token_set["tokenizer_sha256"]:
        raise MismatchError(f"{root / 'tokenizer'} is tokenizer {found[:12]}, the model learnt the codes of "
                            f"{str(token_set['tokenizer_sha256'])[:12]}; restore that of its token set")  # fmt: skip
    identity = {
        "run": root.name,
        "checkpoint": folder.name,
        "weights": weights,
        "weights_sha256": sha256(folder / f"{weights}.safetensors"),
        "tokenizer_sha256": token_set["tokenizer_sha256"],
    } | base
    if quantize != "none":
        identity["quantize"] = quantize
    transformer = transformer.to(runtime.device).eval().requires_grad_(False)
    decoder, described = _decoder(decoding, config, runtime)
    return LoadedModel(
        transformer=prepare(transformer, runtime.autocast_dtype, quantize) if pack else transformer,
        tokenizer=tokenizer.to(runtime.device),
        config=config,
        class_names=token_set["class_names"],
        runtime=runtime,
        identity=identity,
        decoder=decoder,
        decoding=described,
    )


def _decoder(decoding: Decoding, config: TrainConfig, runtime: Runtime) -> tuple[Decoder, dict]:
    """The decoder, and what it is."""
    up_to = FORECAST_UP_TO.get(runtime.device.type, 0)
    if decoding.decode == "plain" or (decoding.decode == "auto" and not up_to):
        return _plain_decoder(decoding, runtime)
    most = most_drafts(config)
    drafts = min(most, 2) if decoding.drafts < 0 else decoding.drafts
    if drafts > most:
        raise UserError(f"drafts is {drafts}, expected at most {most}: the model has learnt no registers for tokens "
                        "further ahead")  # fmt: skip
    forecast = Forecast(decoding.window, drafts)
    described = {"draw": LAW, "decode": decoding.decode, "window": decoding.window, "drafts": drafts}
    if decoding.decode == "forecast":
        return forecast, described
    plain, of_plain = _plain_decoder(decoding, runtime)
    return Either(forecast, plain, up_to), of_plain | described | {"forecast_up_to": up_to}


def _plain_decoder(decoding: Decoding, runtime: Runtime) -> tuple[Decoder, dict]:
    if decoding.compile == "off" or (decoding.compile == "auto" and runtime.device.type != "cuda"):
        return Plain(), {"draw": LAW, "decode": "plain"}
    steps = StaticSteps("inductor" if decoding.compile == "on" else "")
    return steps, {"draw": LAW, "decode": "plain", "compile": decoding.compile}


def training_model(transformer: Transformer, run: Path, config: TrainConfig, runtime: Runtime) -> LoadedModel:
    """A model in training, put into evaluation mode, that samples like a finished run."""
    return LoadedModel(
        transformer=transformer.eval(),
        tokenizer=load_tokenizer(run / "tokenizer", runtime.device),
        config=config,
        class_names=read_facts(run)["class_names"],
        runtime=runtime,
        identity={},
    )
