"""FDr: a Fréchet distance in units of real images (arXiv 2604.28190),

    FD(samples, training images) / FD(held-out images, training images)

A distance has a scale of its own in every feature network; the ratio has not. 1 is what real images reach; below 1,
samples are nearer to the training images than new real images are.
"""

from mutor_vision.errors import MismatchError
from mutor_vision.metrics.frechet import FrechetDistance, Root
from mutor_vision.metrics.guards import Caveat
from mutor_vision.metrics.metric import Found, Measured, Metric, Side

EQUAL = 1.02  # counts that differ by no more than this are called equal


class FrechetRatio(Metric):
    """The ratio for the features of one Fréchet distance, whose work it shares."""

    name = "fdr"
    held_out = True

    def __init__(self, distance: FrechetDistance):
        self.distance = distance
        self.statistics = distance.statistics

    def prepare(self, reference: Side) -> Root:
        return self.distance.prepare(reference)

    def compute(self, measured: Measured, prepared: Root) -> Found:
        samples, held_out = measured.samples, measured.held_out
        ours, real = (self.distance.of(side, prepared, measured.runtime) for side in (samples, held_out))
        if real["value"] <= 0:
            raise MismatchError("the held-out images are at distance 0 from the reference: give others as --held-out")
        extractor, dim = measured.extractor, measured.extractor.layers[self.distance.layer]
        title = "FDr" if extractor.identity["name"] == "inception" else f"FDr-{extractor.identity['name']}"
        result = {"name": measured.title(title), "value": ours["value"] / real["value"]}
        if "standard_error" in ours and "standard_error" in real:
            # Of a quotient of two independent numbers, to first order; the reference is the same for both.
            shares = [part["standard_error"] / part["value"] for part in (ours, real)]
            result["standard_error"] = result["value"] * (shares[0] ** 2 + shares[1] ** 2) ** 0.5
        result["protocol"] = {
            "layer": self.distance.layer, "features": dim, "n_reference": measured.reference.n,
            "n_held_out": held_out.n, "distance_of_samples": ours["value"], "distance_of_held_out": real["value"],
        }  # fmt: skip
        warnings = []
        if samples.n and held_out.n and not 1 / EQUAL <= samples.n / held_out.n <= EQUAL:
            text = (f"FDr of {samples.n:,} samples and {held_out.n:,} held-out images: a distance of few images is too "
                    "large, so the ratio means little unless both are equally many")  # fmt: skip
            warnings.append(Caveat("fdr-unequal-counts", text))
        if held_out.n is not None and held_out.n <= dim:
            text = f"{held_out.n:,} held-out images for {dim} features: their covariance is singular; use more"
            warnings.append(Caveat("singular-held-out", text))
        return Found({self.name: result}, tuple(warnings))
