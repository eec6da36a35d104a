"""LoRA (arXiv 2106.09685) through Hugging Face peft: an adapter on every linear layer of the blocks, with the
register's embedding and the class table trained in full. A run of it keeps the adapter only, a few MB; `mutor merge`
makes a plain run of a base and its adapter. Or of our own making: an adapter that is active at registers alone, which
drafts tokens and changes nothing (drafter.py)."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mutor_vision.config import TrainConfig
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.model.base import RECORD, load_base, open_base
from mutor_vision.model.drafter import LINEAR_LAYERS, add_drafter
from mutor_vision.model.transformer import Transformer
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json, write_json, written_folder
from mutor_vision.storage.outputs import check_new

_ADAPTER_TENSORS = (".lora_A.", ".lora_B.", ".trainable_tokens_delta.", ".modules_to_save.", ".draft_")


def add_adapter(model: Transformer, rank: int, alpha: float, inputs: str = "all"):
    """Put an adapter into `model`, in place, whose output is unchanged until it is trained: rank numbers wide, scaled
    by alpha / rank. Afterwards only the adapter takes gradients. inputs: 'all', or 'registers' for a drafter. Returns
    peft's handle, which merges it; of a drafter None."""
    if inputs == "registers":
        return add_drafter(model, rank, alpha)
    try:
        from peft import LoraConfig, get_peft_model  # here, because it takes seconds to import
    except ImportError:
        raise UserError("LoRA needs Hugging Face peft; pip install 'mutor-vision[peft]'") from None
    return get_peft_model(
        model,
        LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(LINEAR_LAYERS), modules_to_save=["class_embedding"],
            trainable_token_indices={"token_embedding": [model.register_token]},
        ),
    )  # fmt: skip


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that is trained."""
    return {name: tensor for name, tensor in model.state_dict().items() if _is_adapter(name)}


def load_adapter(model: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """adapter_weights back into a model that has the same adapter. Raises MismatchError naming the first tensor that is
    missing, unexpected or of another shape."""
    frozen = {name: tensor for name, tensor in model.state_dict().items() if not _is_adapter(name)}
    checkpoint.load_strictly(model, frozen | weights, source)


@dataclass(frozen=True)
class Merged:
    transformer: Transformer  # plain but for a drafter, in evaluation mode on the CPU, without gradients
    config: TrainConfig
    folder: Path  # the adapter's checkpoint
    root: Path  # its run directory
    weights: str  # 'ema' or 'model'
    base: dict[str, str]  # base.json


def load_merged(base: str | Path, adapter: str | Path, weights: str = "best") -> Merged:
    """A base and the run (or checkpoint) of an adapter trained on it -> one transformer. weights: of the adapter.
    Raises MismatchError when the adapter was trained on other weights than base's."""
    folder = checkpoint.resolve(adapter)
    config = checkpoint.read_config(folder, "adapter", TrainConfig)
    root = folder.parent.parent
    if not (root / RECORD).is_file():
        raise UserError(f"{root} has no {RECORD}; give the run directory of an adapter, or a checkpoint in it")
    record = read_json(root / RECORD, {"checkpoint": str, "weights": str, "weights_sha256": str})
    opened = open_base(base, record["weights"])
    if (found := opened.record["weights_sha256"]) != record["weights_sha256"]:
        raise MismatchError(
            f"{adapter} was trained on {record['checkpoint']}, weights sha256 {record['weights_sha256'][:12]}; "
            f"{base} has {found[:12]}; give that base"
        )
    model = Transformer(config.model)
    load_base(model, opened, say=lambda line: None)
    handle = add_adapter(model, config.lora_rank, config.lora_alpha, config.lora_inputs)
    weights = checkpoint.weights_named(folder, weights)
    load_adapter(model, checkpoint.read_weights(folder, weights), folder)
    model = handle.merge_and_unload() if handle else model
    return Merged(model.eval().requires_grad_(False), config, folder, root, weights, record)


def merge(base: str | Path, adapter: str | Path, out: str | Path, weights: str = "best") -> None:
    """A base and its adapter -> the plain run `out`, which must not exist."""
    out = Path(out)
    check_new(out)
    merged = load_merged(base, adapter, weights)
    if merged.config.lora_inputs == "registers":
        raise UserError(f"{adapter} is a drafter, which cannot become part of the model; use it by --adapter")
    config = dataclasses.replace(merged.config, init="", lora_rank=0, ema_decay=0.0)
    step = checkpoint.step_of(merged.folder) or 0
    with written_folder(out) as partial:
        tensors = {"model": merged.transformer.state_dict()}
        checkpoint.save(partial, step, "transformer", config, tensors, {"step": step}, keep=2)
        shutil.copytree(merged.root / "tokenizer", partial / "tokenizer")
        shutil.copyfile(merged.root / "token_set.json", partial / "token_set.json")
        checkpoint.write_config(partial, "transformer", config)
        status = {
            "state": "done",
            "step": step,
            "reason": f"{merged.root.name} merged into {merged.base['checkpoint']}",
        }
        write_json(partial / "status.json", status)


def describe_trainable(model: nn.Module) -> str:
    """'12,345 of them trained' for a model with an adapter."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{count:,} of them trained"


def _is_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTER_TENSORS)
