"""A set of sequences that comes with scikit-learn."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from dualform.series.panel import Panel
from dualform.series.tables import Table


def digits() -> Table:
    """1,797 handwritten digits, read row by row: eight sensors, the pixels of a row, in eight steps.

    References:
        Alpaydin & Kaynak (1998), Optical recognition of handwritten digits, UCI Machine Learning Repository.
    """
    found: Any = load_digits()
    images, target = np.asarray(found["images"], dtype=np.float64), np.asarray(found["target"])
    lengths = torch.full((len(images),), 8)
    return Table(
        Panel(torch.from_numpy(images), lengths, [f"digit {i}" for i in range(len(images))]),
        target,
        [f"pixel {i}" for i in range(8)],
        [],
    )
