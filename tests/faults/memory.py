"""How much memory a reader takes."""

import resource
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def little_memory(allowed: int):
    """At most `allowed` bytes of address space more than now: a larger allocation fails."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def memory_used():
    """Gives a list that, after the block, holds the most bytes that were resident at once beyond those before it."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before, found = _status("VmRSS"), []
    yield found
    found.append(_status("VmHWM") - before)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
