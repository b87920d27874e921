"""Data sets of labels alone, for partitions."""

import numpy as np

from fedjax_qp.data import Dataset, Examples


def labelled(labels, classes=10, client_ids=None):
    """A data set whose images are blank: partitions look at labels only."""
    labels = np.asarray(labels, np.int32)
    blank = np.zeros((len(labels), 1, 1, 1), np.uint8)
    return Dataset(Examples(blank, labels), Examples(blank[:1], labels[:1]), classes, client_ids=client_ids)


def balanced(examples=4000, classes=10, seed=0):
    return labelled(np.random.default_rng(seed).permutation(np.arange(examples) % classes), classes)
