"""Features of samples and of a reference -> numbers, each with the protocol that makes it comparable.

    metric       what a metric is: what it needs, what it computes
    frechet      FID and sFID with error bars; scores: Inception Score, precision and recall, KID
    mind         a distance for few samples; density: and coverage; ratio: FDr; copies: of training images
    per_class    each class by itself; class_accuracy: among the classes that were asked for
    several      distances in the features of several networks
    evaluate     the table of metrics, and the loop over them; guards: warnings, and what is refused
    report       the table in the terminal, the page per class; sweep: the best guidance scale

Importing this package imports nothing heavy.
"""
