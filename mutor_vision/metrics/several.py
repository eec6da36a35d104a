"""One comparison in the features of several networks: none sees everything, and a model that was trained or chosen by
one looks better to it than to others."""

import math
from typing import Any

# What is measured in the features of every further network; all else is of the first.
IN_EVERY_NETWORK = ("fid", "fdr")


def combine(results: list[dict]) -> dict:
    """What `evaluate` returned for the same images and several networks, the first with all metrics -> one result. The
    metrics of further networks have the network's name in their key. Where there are two ratios or more (FDr), their
    geometric mean is added: a network with distances of another size has no more weight than the others."""
    first, *others = results
    metrics, warnings = dict(first["metrics"]), dict(zip(first["marks"], first["warnings"], strict=True))
    for result in others:
        name = result["protocol"]["extractor"]["name"]
        metrics |= {f"{key} {name}": entry for key, entry in result["metrics"].items() if key in ("fid", "fd", "fdr")}
        for mark, text in zip(result["marks"], result["warnings"], strict=True):
            if text not in warnings.values():
                warnings[f"{mark} {name}"] = f"{name}: {text}"
    ratios = [entry for key, entry in metrics.items() if key.partition(" ")[0] == "fdr"]
    if len(ratios) > 1:
        n = first["protocol"]["n"]
        mean: dict[str, Any] = {"name": f"FDr, geometric mean of {len(ratios)}" + (f"@{n}" if n else "")}
        mean["value"] = math.exp(sum(math.log(max(entry["value"], 1e-300)) for entry in ratios) / len(ratios))
        mean["protocol"] = {"of": [entry["name"] for entry in ratios]}
        metrics["fdr_mean"] = mean
    protocol = first["protocol"] | {"more_extractors": [result["protocol"]["extractor"] for result in others]}
    return first | {
        "metrics": metrics, "marks": list(warnings), "warnings": list(warnings.values()), "protocol": protocol,
    }  # fmt: skip
