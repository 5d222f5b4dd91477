"""Handwritten digits read one pixel at a time: S4D and S5 beside an LSTM of equal size.

    pip install 'dualform[experiments]'
    python experiments/sequential_digits.py

The 1797 digits of 8 x 8 pixels that come with scikit-learn are sequences of 64 numbers, read in order and in one fixed
random order of the pixels. A fifth of each class is held out for testing; the number of epochs is fixed, and the
accuracy is that after the last. The options, one set for all three layers, were chosen on another random split of the
same 1797 images, so the test set is not untouched; the LSTM was not tuned for itself. CPU time is that of the process,
on one thread, training and testing. The same seed gives the same accuracies on the same machine.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from dualform.layers.lstm import LSTMConfig
from dualform.layers.mixer import PartConfig
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.models.config import ModelConfig
from dualform.models.heads import SequenceClassifier
from dualform.train.optim import build_optimizer, schedule, set_learning_rate
from dualform.train.recipe import Optim

MODELS: dict[str, PartConfig] = {
    "s4d": S4DConfig(d_state=32, dt_min=1e-2, dt_max=0.5),
    "s5": S5Config(d_state=64, dt_min=1e-2, dt_max=0.5),
    "lstm": LSTMConfig(hidden=24),
}
BATCH, WIDTH, BLOCKS = 64, 48, 2
OPTIM = Optim(lr=8e-3, weight_decay=0.02, warmup=20)


def digits(order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences ``(n, 64, 1)`` with the pixels in an order, and labels, for training and for testing."""
    bundle = load_digits()
    pixels = torch.from_numpy(bundle.data).float()[:, order, None] / 8 - 1
    rows = train_test_split(range(len(pixels)), test_size=0.2, random_state=1, stratify=bundle.target)
    labels = torch.from_numpy(bundle.target)
    train, test = (torch.tensor(part) for part in rows)
    return pixels[train], labels[train], pixels[test], labels[test]


def run(part: PartConfig, order: Tensor, epochs: int) -> tuple[int, float, float]:
    """Parameters, test accuracy and CPU seconds."""
    torch.manual_seed(0)
    start = time.process_time()
    pixels, labels, test, test_labels = digits(order)
    model = SequenceClassifier(ModelConfig(0, WIDTH, {"X": (part,)}, "X" * BLOCKS), 10, inputs=1)
    optimizer = build_optimizer(model, OPTIM)
    total, done = epochs * -(-len(pixels) // BATCH), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(BATCH):
            set_learning_rate(optimizer, schedule(OPTIM, done, done / total))
            optimizer.zero_grad()
            model.loss(pixels[rows], labels[rows]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
    with torch.no_grad():
        accuracy = (model.eval()(test)[0].argmax(1) == test_labels).double().mean().item()
    return model.parameter_count(), accuracy, time.process_time() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Digits read one pixel at a time.")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    if unknown := sorted(set(options.models) - set(MODELS)):
        parser.error(f"unknown models {', '.join(unknown)}; there are {', '.join(MODELS)}")
    torch.set_num_threads(1)
    orders = {"in order": torch.arange(64), "permuted": torch.randperm(64, generator=torch.Generator().manual_seed(0))}
    print("| model | pixels | parameters | test accuracy | CPU seconds |\n|---|---|---|---|---|")
    for name in options.models:
        for pixels, order in orders.items():
            parameters, accuracy, seconds = run(MODELS[name], order, options.epochs)
            print(f"| {name} | {pixels} | {parameters:,} | {accuracy:.2%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
