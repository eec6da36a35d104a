"""Peak memory and time of the metrics for few samples, each in a process of its own.

    python benchmarks/few_samples.py [--images 10000 --dim 2048 --threads 2]

Synthetic features with a decaying spectrum, equally many samples, reference and held-out images. `none` makes the
features and measures nothing: what the others need beyond it is theirs.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch


def features(count: int, dim: int, seed: int) -> torch.Tensor:
    """(count, dim) float32 with standard deviations falling as 1 / (1 + i)."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 / (1 + torch.arange(dim))
    out = torch.empty(count, dim)
    for start in range(0, count, 1000):
        rows = out[start : start + 1000]
        rows.copy_(torch.randn(len(rows), dim, generator=generator) * scale)
    return out


def run(name: str, samples: torch.Tensor, reference: torch.Tensor, held_out: torch.Tensor) -> dict:
    from mutor_vision.metrics import copies, density, mind
    from mutor_vision.runtime import exact_float32, start

    runtime = start(device="cpu")
    if name == "mind":
        found = [mind.monge_distance(rows, reference, len(rows), 1000, 20, runtime) for rows in (samples, held_out)]
        return {"samples": found[0].value, "held_out": found[1].value, "standard_error": found[1].standard_error}
    if name == "density":
        with exact_float32():
            balls = density.Balls(reference, 5, runtime)
            found = [balls.occupied_by(rows) for rows in (samples, held_out)]
        return {"density": found[0].density, "coverage": found[0].coverage}
    if name == "copies":
        with exact_float32():
            found = [copies.nearest(rows, reference, runtime) for rows in (samples, held_out)]
        return {"near": found[0].near.mean().item(), "held_out": found[1].near.mean().item()}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    sides = ("none", "mind", "density", "copies")
    parser.add_argument("--side", choices=sides, help="measure one in this process (used by the command itself)")
    options = parser.parse_args()
    if options.side is None:
        for side in sides:
            done = subprocess.run([sys.executable, *sys.argv, "--side", side], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{side} failed: {done.stderr[-500:]}")
            print(f"{side:8}", done.stdout.strip(), flush=True)
        return
    torch.set_num_threads(options.threads)
    sets = [features(options.images, options.dim, seed) for seed in range(3)]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    start, before = time.perf_counter(), usage.ru_utime + usage.ru_stime
    result = run(options.side, *sets)
    result["seconds"] = round(time.perf_counter() - start, 1)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result["processor_seconds"] = round(usage.ru_utime + usage.ru_stime - before, 1)
    result["peak_gb"] = round(usage.ru_maxrss / 1e6, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
