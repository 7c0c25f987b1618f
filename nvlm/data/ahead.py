"""Reads a dataset in worker processes, ahead of whoever asks for its items."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset


def in_processes(dataset: Dataset, workers: int, **options) -> Iterator:
    """The items of `dataset`, read by `workers` processes, which start at once (0: by this process).

    `options`: further ones of torch's DataLoader, whose advice to have no more workers than cores is not printed.
    """
    ahead = 2 if workers else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        return iter(DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=ahead, **options))
