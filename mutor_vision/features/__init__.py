"""Images from any source -> features of a network, and their moments.

sources      images to measure: from files, an npz, or the sampler
extractors   networks by name; inception: ADM's; train: a small one for images of one's own
extract      images -> features; moments: features -> mean and covariance
reference    statistics of one's own images, as a file to compare with
"""
