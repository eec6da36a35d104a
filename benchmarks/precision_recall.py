"""Precision and recall at ADM's size, ours beside torch-fidelity's calculate_precision_recall_part, in one run.

    python benchmarks/precision_recall.py [--samples 50000 --reference 10000 --dim 2048 --threads 2]

Synthetic features with a decaying spectrum; each side runs in a process of its own, so that its peak memory is its
own. The whole evaluation (moments in 20 groups, FID with error bars, precision and recall) is measured as well.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch


def features(count: int, dim: int, seed: int) -> torch.Tensor:
    """(count, dim) float32 with standard deviations falling as 1 / (1 + i); seed 1 is a little wider."""
    generator = torch.Generator().manual_seed(seed)
    scale = (1.05 if seed == 1 else 1.0) / (1 + torch.arange(dim))
    out = torch.empty(count, dim)
    for start in range(0, count, 1000):
        rows = out[start : start + 1000]
        rows.copy_(torch.randn(len(rows), dim, generator=generator) * scale)
    return out


def run_ours(samples: torch.Tensor, reference: torch.Tensor) -> dict:
    from mutor_vision.metrics.scores import precision_recall
    from mutor_vision.runtime import start

    precision, recall = precision_recall(samples, reference, start(device="cpu"))
    return {"precision": precision, "recall": recall}


def run_torch_fidelity(samples: torch.Tensor, reference: torch.Tensor) -> dict:
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    precision, recall = calculate_precision_recall_part(samples, reference)
    return {"precision": precision, "recall": recall}


def run_evaluation(samples: torch.Tensor, reference: torch.Tensor) -> dict:
    from mutor_vision.features.moments import Moments
    from mutor_vision.metrics.frechet import jackknife, root
    from mutor_vision.runtime import start

    runtime = start(device="cpu")
    moments, reference_moments = Moments(samples.shape[1], groups=20), Moments(samples.shape[1])
    for first in range(0, len(samples), 250):
        moments.update(samples[first : first + 250], first)
    for first in range(0, len(reference), 250):
        reference_moments.update(reference[first : first + 250], first)
    estimate = jackknife(moments, root(reference_moments.total()), runtime)
    del moments, reference_moments
    return {"fid": estimate.value, "standard_error": estimate.standard_error} | run_ours(samples, reference)


SIDES = {"ours": run_ours, "torch-fidelity": run_torch_fidelity, "evaluation": run_evaluation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process (used by the command itself)")
    options = parser.parse_args()
    if options.side is None:
        measured = {}
        for side in SIDES:
            done = subprocess.run([sys.executable, *sys.argv, "--side", side], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{side} failed: {done.stderr[-500:]}")
            measured[side] = json.loads(done.stdout)
            print(f"{side:15}", done.stdout.strip(), flush=True)
        ratio = measured["torch-fidelity"]["seconds"] / measured["ours"]["seconds"]
        print(f"precision and recall: {ratio:.1f} times as fast as torch-fidelity")
        return
    torch.set_num_threads(options.threads)
    samples, reference = features(options.samples, options.dim, 1), features(options.reference, options.dim, 2)
    start = time.perf_counter()
    result = SIDES[options.side](samples, reference)
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
