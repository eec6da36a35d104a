"""Autoregressive image generation with MuToR's 2D-offset registers. The rooms are the pipeline; each imports only rooms
above it:

    storage/      files, checkpoints, strangers' weights
    data/         image folders, token sets, the order in which training reads them
    tokenizer/    images -> codes (h, w) -> images
    model/        tokens, labels, positions, attention pattern -> logits
    objectives/   codes -> training sequence: the method (arXiv 2505.10518), pure functions; logits -> loss
    sampling/     labels -> codes -> images
    features/     images -> features of a network -> moments
    metrics/      moments and features -> FID, IS and the rest, each number with its protocol
    training/     one flat loop for next-token, MuToR-1D and MuToR-2D
    interop/      LlamaGen's files in and out
    commands/     mutor sample, info, convert, merge, plot, plan

Importing the package imports nothing heavy; import the module you need.
"""

__version__ = "0.1.0"
