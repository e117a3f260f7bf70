"""Files that appear whole or not at all, and the random numbers that a resumed run goes on with."""

import os
import pickle
import random
import tempfile
from pathlib import Path

import numpy as np
import torch


def write(path: Path, content: dict) -> None:
    """Tensors and plain data, written beside ``path``, read back, then renamed: a rename is atomic."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        read(Path(name), shown_as=path)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path, shown_as: Path | None = None) -> dict:
    try:
        return torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        wanted, came = "tensors and plain data", "what torch.load(weights_only=True) refuses"
        raise ValueError(f"{shown_as or path}: expected {wanted}, got {came}") from error
    except (EOFError, RuntimeError) as error:  # what torch.load raises of files cut short
        came = f"what torch.load cannot read ({str(error).splitlines()[0]})" if str(error) else "an empty file"
        raise ValueError(f"{shown_as or path}: expected a whole file of torch.save, got {came}") from error


def random_state() -> dict:
    """Of torch (all devices), numpy's global generator and ``random``."""
    name, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": [version, list(numbers), gauss],
    }


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
