"""Triton binds its decorators at import, so these tests need a process that was started with TRITON_INTERPRET=1."""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    # One fixed set of examples: an interpreted kernel is slow, and a failure must be the same for everybody.
    settings.register_profile(
        "interpreter",
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("interpreter")


@pytest.fixture
def unwritten_is_nan():
    """Fresh memory holds NaN (or huge integers), so that an output nobody wrote is seen."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
