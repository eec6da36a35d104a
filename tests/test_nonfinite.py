"""A loss or gradient that is not finite changes nothing, on any rank, and too many in a row end the run."""

import dataclasses
import json
import math

import pytest
import torch
from faults.score import record

from mutor_vision.errors import UserError
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.training import loop
from mutor_vision.training.state import State

KINDS = {"a loss": ("loss", math.nan), "an infinite loss": ("loss", math.inf), "a gradient": ("gradient", math.nan),
         "one number of a gradient": ("number", -math.inf)}  # fmt: skip


def weights_and_moments(state):
    found = [tensor.clone() for own in state.weights().values() for tensor in own.values()]
    for each in state.optimizer.state.values():
        found += [each["exp_avg"].clone(), each["exp_avg_sq"].clone(), torch.as_tensor(each["step"]).clone()]
    return [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in found]


@pytest.fixture
def faulty(monkeypatch):
    """faulty(kind, at, rank, part): in steps `at` (from 1) the loss or a gradient of a rank is spoilt, in its
    micro-batch `part`. -> for each step, whether weights and moments stayed as they were."""

    def prepare(kind, at, rank=0, part=0):
        what, value = KINDS[kind]
        unchanged, count, original = [], [0], loop.train_step
        states = []
        made = State.__init__

        def kept(self, *arguments):
            made(self, *arguments)
            states.append(self)

        def step(parallel, objective, optimizer, batch, config, runtime, **settings):
            count[0] += 1
            bad, parts = count[0] in at and runtime.rank == rank, [0]
            parameter = next(objective.transformer.blocks.parameters())

            def spoil(gradient):
                parts[0] += 1
                if parts[0] != part + 1:
                    return gradient
                if what == "number":
                    gradient = gradient.clone()
                    gradient.view(-1)[3] = value
                    return gradient
                return gradient * value

            def spoil_loss(module, _, terms):
                parts[0] += 1
                return {name: term * (value if parts[0] == part + 1 else 1) for name, term in terms.items()}

            hook = None
            if bad:
                hook = objective.register_forward_hook(spoil_loss) if what == "loss" else parameter.register_hook(spoil)
            before = weights_and_moments(states[-1])
            result = original(parallel, objective, optimizer, batch, config, runtime, **settings)
            if hook:
                hook.remove()
            after = weights_and_moments(states[-1])
            unchanged.append(len(before) == len(after) and all(map(torch.equal, before, after)))
            return result

        monkeypatch.setattr(State, "__init__", kept)
        monkeypatch.setattr(loop, "train_step", step)
        return unchanged

    return prepare


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_changes_nothing_and_the_run_goes_on(train_config, tmp_path, faulty, kind):
    unchanged = faulty(kind, at={3, 4})
    loop.train(dataclasses.replace(train_config, micro_batch=6), tmp_path / "run")
    assert unchanged == [False, False, True, True, *[False] * 6]
    log = {line["step"]: line for line in read_log(tmp_path / "run") if "lr" in line}
    assert [log[step].get("skipped", 0) for step in range(1, 11)] == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in log.values())
    record("A gradient that is not finite changes nothing", kind, 1, 1)


def test_also_in_a_later_micro_batch(train_config, tmp_path, faulty):
    unchanged = faulty("a gradient", at={3}, part=1)
    loop.train(dataclasses.replace(train_config, micro_batch=6), tmp_path / "run")
    assert [i for i, same in enumerate(unchanged, 1) if same] == [3]
    record("A gradient that is not finite changes nothing", "in a later micro-batch", 1, 1)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_on_one_of_two_ranks(train_config, tmp_path, faulty, forked, parallel):
    config = dataclasses.replace(train_config, parallel=parallel)

    def job():
        unchanged = faulty("a loss", at={3}, rank=1)
        loop.train(config, tmp_path / "run")
        assert [i for i, same in enumerate(unchanged, 1) if same] == [3], unchanged

    done = forked(job, ranks=2)
    assert done.code == 0, done.out[-3000:]
    assert [line["step"] for line in read_log(tmp_path / "run") if "skipped" in line] == [3]
    record("A gradient that is not finite changes nothing", f"on one of two ranks, {parallel}", 1, 1)


def test_too_many_in_a_row_end_the_run_with_what_to_do(train_config, tmp_path, faulty):
    faulty("a loss", at=set(range(4, 11)))
    with pytest.raises(UserError, match="last 4 steps up to 7 were not finite.*--init RUN --out NEW --set lr=0.0015"):
        loop.train(dataclasses.replace(train_config, save_every=2), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    found = checkpoint.newest(tmp_path / "run")
    loop.train(dataclasses.replace(train_config, init=str(tmp_path / "run"), lr=0.0015, steps=2), tmp_path / "new")
    assert all(tensor.isfinite().all() for tensor in checkpoint.read_weights(found, "model").values())
