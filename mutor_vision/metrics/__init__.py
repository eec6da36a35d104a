"""Images -> numbers, each with the protocol that makes it comparable.

    npz          sample sets and reference statistics in ADM's file format, streamed
    sources      folder, npz or live sampler -> uint8 batches
    inception    ADM's Inception network; features: any timm model, or one trained on one's own images
    extract      source + extractor -> features, split over ranks, restartable
    moments      features -> mean and covariance in float64, in groups
    frechet      two means and covariances -> FID with error bars; scores: IS, precision, recall, KID
    evaluate     all of it -> one result; report: the table, the JSON file, the page per class

Importing this package imports nothing heavy.
"""
