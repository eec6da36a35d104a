"""A run -> everything that sampling needs."""

from dataclasses import dataclass
from pathlib import Path

from mutor_vision.config import TrainConfig
from mutor_vision.errors import UserError
from mutor_vision.model.prepare import prepare
from mutor_vision.model.transformer import Transformer
from mutor_vision.runtime import Runtime
from mutor_vision.sampling.static import StaticSteps
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json, sha256
from mutor_vision.tokenizer.model import VQTokenizer, load_tokenizer

COMPILE = ("auto", "on", "off")


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
    static: StaticSteps | None = None  # steps of static shape for this transformer; None = shapes that grow

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images it makes."""
        if self.resize:
            return self.resize, self.resize
        height, width = (side * self.tokenizer.config.downsample for side in self.config.model.grid)
        return height, width


def load(
    path: str | Path, runtime: Runtime, weights: str = "best", adapter: str | Path = "", quantize: str = "none",
    compile: str = "auto",
) -> LoadedModel:  # fmt: skip
    """A run or one of its checkpoints -> LoadedModel. weights: 'model', 'ema', or 'best' (EMA where there is one).
    adapter: a LoRA run trained on it, whose classes, tokenizer and `weights` then count. quantize: 'none' or 'int8',
    see prepare.prepare. compile: 'off'; 'auto' records steps as CUDA graphs where there is CUDA; 'on' compiles them
    by torch.compile as well, on any device."""
    if compile not in COMPILE:
        raise UserError(f"compile is '{compile}', expected one of {', '.join(COMPILE)}")
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
    token_set = read_json(root / "token_set.json")
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
    static = compile == "on" or (compile == "auto" and runtime.device.type == "cuda")
    return LoadedModel(
        transformer=prepare(transformer, runtime.autocast_dtype, quantize),
        tokenizer=load_tokenizer(root / "tokenizer", runtime.device),
        config=config,
        class_names=token_set["class_names"],
        runtime=runtime,
        identity=identity,
        static=StaticSteps("inductor" if compile == "on" else "") if static else None,
    )


def training_model(transformer: Transformer, run: Path, config: TrainConfig, runtime: Runtime) -> LoadedModel:
    """A model in training, put into evaluation mode, that samples like a finished run."""
    return LoadedModel(
        transformer=transformer.eval(),
        tokenizer=load_tokenizer(run / "tokenizer", runtime.device),
        config=config,
        class_names=read_json(run / "token_set.json")["class_names"],
        runtime=runtime,
        identity={},
    )
