"""Training of the transformer, one flat function. Next-token prediction, MuToR and other auxiliary losses differ in the
objective that State builds from the configuration, and in nothing here."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mutor_vision.config import TrainConfig
from mutor_vision.data.order import read_batch
from mutor_vision.keyed_random import derived_seed
from mutor_vision.preemption import Preemption
from mutor_vision.progress import progress
from mutor_vision.runtime import blamed, start
from mutor_vision.schedule import due
from mutor_vision.settings import to_dict
from mutor_vision.storage.outputs import check_out_folder
from mutor_vision.storage.run_log import RunLog
from mutor_vision.storage.trackers import check_trackers
from mutor_vision.training import sharding
from mutor_vision.training.inputs import Inputs, keep_on_device, open_inputs
from mutor_vision.training.resume import resume
from mutor_vision.training.state import State
from mutor_vision.training.step import means_of, train_step, zero_sums
from mutor_vision.training.validate import validate


def train(config: TrainConfig, out: Path, trackers: Sequence[str] = ()) -> None:
    """Train config.model on config.codes and keep everything in the run directory `out`. Running it again with the
    same configuration continues from the newest checkpoint, on CPU to the last bit as if it had never stopped.
    trackers: see RunLog."""
    check_trackers(trackers)
    runtime = start(config.precision)
    check_out_folder(out)
    inputs = open_inputs(config, runtime)
    config = inputs.config
    if config.eval_every:
        from mutor_vision.training.distance import distance_measure  # loads timm's and torch-fidelity's networks

        measure = distance_measure(config, runtime)
    state = State(config, inputs.base, runtime)
    found = resume(out, inputs, state)
    state.parallelize(found)
    log = RunLog(out, state.step, config.steps, active=runtime.is_main, trackers=trackers, config=to_dict(config))
    keep_on_device(inputs.token_set, runtime)
    if runtime.is_main:
        print(_beginning(inputs, state), flush=True)
    log.status("running", state.step)
    preemption = Preemption(runtime)

    sums = zero_sums(state.objective, runtime)  # of train_step, since the last log line
    since, last = time.perf_counter(), state.step
    bar = progress(total=config.steps * config.batch_size, initial=state.step * config.batch_size, unit=" images",
                   unit_scale=True, desc=out.name)  # fmt: skip
    say = bar.write if runtime.is_main else lambda line: None
    state.model.train()
    try:
        while state.step < config.steps:
            torch.manual_seed(derived_seed(config.seed, "dropout", state.step, runtime.rank))
            batch = read_batch(inputs.token_set, inputs.order, step=state.step, batch_size=config.batch_size,
                               rank=runtime.rank, world_size=runtime.world_size, label_dropout=config.label_dropout,
                               device=runtime.device, features=config.reads_features)  # fmt: skip
            gradient_norm, lr = train_step(state.parallel, state.objective, state.optimizer, batch, config, runtime,
                                           step=state.step, sums=sums, skipped=state.skipped)  # fmt: skip
            step, stopping = state.advance(), preemption.asked()
            bar.update(config.batch_size)

            if due(step, config.log_every, config.steps):
                values = means_of(runtime.all_reduce(sums), state.objective.weights(step - 1))
                values |= {"lr": lr, "gradient_norm": gradient_norm.item()} | state.skips(step, say)
                speed = (step - last) * config.batch_size / (time.perf_counter() - since)
                log.write(step, images=step * config.batch_size, **values, images_per_second=round(speed, 2))
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                sums.zero_()
                since, last = time.perf_counter(), step
            saved = due(step, config.save_every, config.steps) or step == config.steps or stopping
            sampled = due(step, config.sample_every, config.steps)
            measured = due(step, config.eval_every, config.steps)
            if saved or sampled or measured:
                state.check_finite()
            if len(inputs.val_images) and due(step, config.val_every, config.steps):
                scores = _held_out(inputs, state)
                log.write(step, **scores)
                say(
                    f"step {step}: "
                    + ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if " " not in name)
                )
            if sampled:
                whole = state.best()
                if runtime.is_main:
                    from mutor_vision.sampling.stream import save_training_grid

                    with state.uncompiled():
                        log.picture(step, save_training_grid(whole, out, step, config, runtime))
                    state.model.train()
            if measured:
                with state.uncompiled():
                    scores = measure(state.best(), out)
                state.model.train()
                log.write(step, **scores)
                say(f"step {step}: Frechet distance {scores['fd']:.4f} of {scores['fd_images']} samples")
            if saved:
                state.save(out)
                log.status("running", step)
                runtime.barrier()
            if stopping and step < config.steps:
                raise preemption.stopped(step)
        log.status("done", state.step)
    except BaseException as raised:
        error = blamed(raised, f"step {state.step + 1}")
        log.failed(state.step, error)
        if error is not raised:
            raise error from None
        raise
    finally:
        preemption.end()
        bar.close()
        log.close()


def _held_out(inputs: Inputs, state: State) -> dict[str, float]:
    """Collective: 'val_<loss>' of the model, and 'val_<loss>_ema', and of each further average."""
    found: dict[str, float] = {}
    for stem, model in {"": state.model, **state.averaged}.items():
        objective = state.objective.on_held_out(sharding.whole(model))
        scores = validate(objective, inputs.val_set, inputs.val_images, state.config, state.runtime)
        found |= {f"val_{name}{stem and '_'}{stem}": value for name, value in scores.items()}
    return found


def _beginning(inputs: Inputs, state: State) -> str:
    """What is trained on what, in a line."""
    runtime = state.runtime
    parts = [
        state.describe(),
        f"{len(inputs.train_images):,} training and {len(inputs.val_images):,} held-out images",
        f"{runtime.world_size} process(es) on {runtime.device.type}",
        "bfloat16 autocast" if runtime.autocast_dtype else "float32",
    ]
    parts += ["compiled"] if state.compiled else []
    parts += [f"continuing after step {state.step}"] if state.step else []
    model = state.config.model
    dropout = model.token_dropout or model.residual_dropout or model.ffn_dropout
    if dropout and state.processes_before not in (0, runtime.world_size):  # a rank seeds its own masks
        parts += [f"with other draws of dropout, since {state.processes_before} process(es) came before"]
    return ", ".join(parts)
