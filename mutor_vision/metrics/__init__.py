"""Features of samples and of a reference -> numbers, each with the protocol that makes it comparable.

    frechet      two means and covariances -> FID with error bars; scores: IS, precision, recall, KID
    per_class    each class by itself; guards: warnings, and what is refused
    evaluate     all of it -> one result; report: the table, the JSON file, the page per class
    reference    statistics of one's own images; sweep: the best guidance scale

Importing this package imports nothing heavy.
"""
