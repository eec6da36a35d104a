"""A training that is asked to stop saves first: SIGTERM (a cluster takes the machine away, torchrun ends), SIGUSR1
(what Slurm's --signal sends beforehand) and Ctrl-C. A second signal ends it at once."""

import os
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist

from mutor_vision.errors import UserError
from mutor_vision.runtime import Runtime, patience

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class Preempted(UserError):
    """A training was asked to stop, and has saved."""

    exit_code = 75  # EX_TEMPFAIL: a cluster's script may queue the same command again
    state = "preempted"  # in status.json


class Preemption:
    """From here until `end`, the first signal is remembered instead of ending the process. Collective: made and asked
    by every process."""

    def __init__(self, runtime: Runtime):
        self._runtime, self._signal, self._before = runtime, 0, {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        # Signals reach processes at different times, so they agree at every step. Hosts do, not devices: with nccl
        # the group is one of gloo, and no step waits for a GPU.
        self._group: Any = None
        if runtime.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=patience())

    def end(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _) -> None:
        if self._signal:  # a second one
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = number

    def asked(self) -> bool:
        """Collective: whether any process has had a signal."""
        if self._runtime.world_size == 1:
            return bool(self._signal)
        heard = torch.tensor([self._signal])
        dist.all_reduce(heard, dist.ReduceOp.MAX, group=self._group)
        self._signal = self._signal or int(heard)
        return bool(self._signal)

    def stopped(self, step: int) -> Preempted:
        """What to raise, once the checkpoint of `step` is written."""
        name = signal.Signals(self._signal).name
        return Preempted(f"stopped by {name} after step {step}, which is saved; the same command goes on from there")
