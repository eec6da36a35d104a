"""Autoregressive image generation with MuToR's 2D-offset registers. The file list is the pipeline:

    tokenizer/       images -> codes (h, w)          train_loop, quantizer, losses
    data             image folders, token sets on disk, the order in which training reads them
    registers        codes -> training sequence: the method (arXiv 2505.10518), pure functions
    transformer      tokens, labels, positions, attention pattern -> logits   (rope, attention)
    loss, optim      logits -> loss; AdamW groups, schedules
    train_loop       one flat loop for next-token, MuToR-1D and MuToR-2D; checkpoint keeps what it makes
    generate, sample logits -> codes -> images -> grids
    metrics/         images -> FID, IS and the rest, each number with its protocol

Importing the package imports nothing heavy; import the module you need.
"""

__version__ = "0.1.0"
