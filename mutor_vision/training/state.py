"""What training changes, named once: it is built, resumed, sharded, checked and saved from here."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mutor_vision.config import TrainConfig
from mutor_vision.errors import UserError
from mutor_vision.keyed_random import derived_seed
from mutor_vision.model import lora
from mutor_vision.model.base import Base, load_base
from mutor_vision.model.transformer import Transformer, num_parameters
from mutor_vision.objectives.auxiliary import auxiliaries_of
from mutor_vision.objectives.objective import Objective
from mutor_vision.runtime import Runtime
from mutor_vision.storage import checkpoint
from mutor_vision.training import sharding
from mutor_vision.training.optim import build_optimizer


class State:
    """Model, EMA, auxiliary losses, optimizer, and the number of steps taken. In the order of use: make it, `load` a
    checkpoint's weights if there is one, `parallelize`."""

    def __init__(self, config: TrainConfig, base: Base | None, runtime: Runtime):
        self.config, self.runtime, self.step = config, runtime, 0
        self.processes_before = 0  # that wrote the checkpoint; 0 = none, or not known
        self.skipped = torch.zeros(2, dtype=torch.int64, device=runtime.device)  # of train_step
        torch.manual_seed(derived_seed(config.seed, "initialisation"))
        self.model = Transformer(config.model)
        self.model.recompute = config.activation_checkpointing
        if base:
            load_base(self.model, base, say=print if runtime.is_main else lambda line: None)
        if config.lora_rank:
            lora.add_adapter(self.model, config.lora_rank, config.lora_alpha, config.lora_inputs)
        self.model.to(runtime.device)
        warmup: dict[str, Any] = {"use_warmup": True, "warmup_gamma": 10, "warmup_power": 1}
        self.averages = {name: ModelEmaV3(self.model, decay, **warmup) for name, decay in config.ema_decays.items()}
        self.objective = Objective(self.model, [each.to(runtime.device) for each in auxiliaries_of(config)])
        self.compiled = config.compile == "on" or (config.compile == "auto" and runtime.device.type == "cuda")
        if self.compiled:
            for block in self.model.blocks:  # after the copy for EMA, which only samples and validates
                block.compile(dynamic=False)

    @property
    def kind(self) -> str:
        """Of the run, in its config.json."""
        return "adapter" if self.config.lora_rank else "transformer"

    @property
    def trained(self) -> dict[str, nn.Module]:
        """File stem in a checkpoint -> what has weights that the optimizer changes."""
        own = {name: module for name, module in self.objective.auxiliaries.items() if module.state_dict()}
        return {"model": self.model, **own}

    @property
    def averaged(self) -> dict[str, Transformer]:
        """File stem -> average of the model's weights."""
        return {name: cast(Transformer, ema.module) for name, ema in self.averages.items()}

    @property
    def kept(self) -> dict[str, nn.Module]:
        """File stem -> everything whose weights a checkpoint keeps."""
        return self.trained | self.averaged

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> state dict, of an adapter its own part; of a sharded model this rank's shards."""
        return {name: lora.adapter_weights(module) if self._is_adapter(name) else module.state_dict()
                for name, module in self.kept.items()}  # fmt: skip

    def load(self, folder: Path) -> None:
        """Weights and step of a verified checkpoint. Raises MismatchError."""
        for name, module in self.kept.items():
            load = lora.load_adapter if self._is_adapter(name) else checkpoint.load_strictly
            load(module, checkpoint.read_weights(folder, name), folder / f"{name}.safetensors")
        self.step = cast(int, checkpoint.step_of(folder))

    def parallelize(self, found: Path | None) -> None:
        """Shard or wrap, and build the optimizer with the state of the checkpoint `found`."""
        averaged = self.averaged.values()
        self.parallel = sharding.parallelize(self.objective, averaged, self.config.parallel, self.runtime)
        self.optimizer = build_optimizer(self.objective, self.config)
        if found:
            self.processes_before = sharding.load_optimizer(self.optimizer, self.trained, found, self.runtime)

    def advance(self) -> int:
        """The optimizer has taken a step: update averages and teachers; returns the number of steps taken."""
        self.step += 1
        self.objective.after_step()
        for ema in self.averages.values():
            ema.update(self.model, step=self.step)
        return self.step

    def skips(self, step: int, say: Callable[[str], None]) -> dict[str, int]:
        """How many steps train_step has skipped since this was last called, for the log; {} for none. Waits for the
        device."""
        since = self.check_skips(step)
        self.skipped[0] = 0
        if not since:
            return {}
        say(f"step {step}: {since} step(s) skipped, whose gradients were not finite")
        return {"skipped": since}

    def check_skips(self, step: int) -> int:
        """Raise UserError when more than max_skipped steps in a row were skipped -> how many since `skips` was last
        called. Waits for the device."""
        since, row = self.skipped.tolist()
        if row > self.config.max_skipped:
            raise UserError(
                f"training diverged: the gradients of the last {row} steps up to {step} were not finite, and changed "
                f"nothing; go on with a lower lr: --init RUN --out NEW --set lr={self.config.lr / 2:g}"
            )
        return since

    def best(self) -> Transformer:
        """Collective: the EMA, where there is one, else the model, with all of its weights in every process."""
        return sharding.whole(self.averaged.get("ema", self.model))

    def uncompiled(self) -> AbstractContextManager:
        """Around sampling, whose shapes change at every token: compiled blocks would recompile each time."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def check_finite(self) -> None:
        """Collective: raise UserError if a weight or a moment of any rank is not finite, or too many steps were
        skipped."""
        self.check_skips(self.step)
        checkpoint.check_finite(self.weights(), [self.optimizer], self.step, self.runtime)

    def save(self, out: Path) -> None:
        """Collective: commit a checkpoint of the run directory `out`."""
        weights = {name: sharding.gather(own, self.runtime.is_main) for name, own in self.weights().items()}
        shards = sharding.save_optimizer(self.optimizer, self.trained, out, self.runtime)
        if self.runtime.is_main:
            state: dict[str, Any] = {"step": self.step, "processes": self.runtime.world_size}
            state |= {} if shards else {"optimizer": self.optimizer.state_dict()}
            checkpoint.save(out, self.step, self.kind, self.config, weights, state, self.config.keep, shards)

    def describe(self) -> str:
        """'1,234 parameters' for a person."""
        adapter = f" ({lora.describe_trainable(self.model)})" if self.config.lora_rank else ""
        return f"{num_parameters(self.model):,} parameters{adapter}"

    def _is_adapter(self, name: str) -> bool:
        return bool(self.config.lora_rank) and name in ("model", *self.averages)
