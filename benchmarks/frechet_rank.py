"""Rounding of the Fréchet distance when there are fewer images than features: ours and torch-fidelity's against the
exact value, which follows from the features themselves.

    python benchmarks/frechet_rank.py --images 300 --features 2048

With n images the trace term is the nuclear norm of an n x n product of centred features, so float64 gives it to 1e-12.
"""

import argparse

import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from mutor_vision.features.moments import Moments
from mutor_vision.metrics import frechet


def rounding(images: int, features: int, seed: int = 0) -> dict[str, float]:
    """'exact': the distance of two seeded draws (images, features) like Inception's: none negative, and a few
    directions hold most of the variance; 'ours' and 'torch-fidelity': relative errors of the two computations."""
    generator = torch.Generator().manual_seed(seed)
    spread = 1 / (1 + torch.arange(features))
    mixing = torch.randn(features, features, generator=generator) * spread / features**0.5
    sets = [(torch.randn(images, features, generator=generator) @ mixing.T + 0.1).relu().double() for _ in range(2)]
    centred = [(x - x.mean(0)) / (images - 1) ** 0.5 for x in sets]
    exact = (sets[0].mean(0) - sets[1].mean(0)).square().sum() + sum(x.square().sum() for x in centred)
    exact = (exact - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()).item()
    statistics = []
    for rows in sets:
        moments = Moments(features)
        moments.update(rows)
        statistics.append(moments.total())
    ours = frechet.distance(statistics[0], frechet.root(statistics[1]))
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, sets), verbose=False)
    theirs = theirs["frechet_inception_distance"]
    return {"exact": exact, "ours": abs(ours / exact - 1), "torch-fidelity": abs(theirs / exact - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--features", type=int, default=2048)
    arguments = parser.parse_args()
    found = rounding(arguments.images, arguments.features)
    print(f"{arguments.images} images, {arguments.features} features: distance {found['exact']:.6g}; "
          f"relative error: ours {found['ours']:.1e}, torch-fidelity {found['torch-fidelity']:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
