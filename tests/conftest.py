"""Settings of all tests: one thread, uninitialised memory full of NaN, how many examples Hypothesis tries; fixtures.

`pytest --hypothesis-profile=deep`, or HYPOTHESIS_PROFILE=deep in the environment, tries many more, and other ones
each time.
"""

import os

import pytest
import torch
from hypothesis import settings

from tensorattn.functional import OPERATORS

torch.set_num_threads(1)

# What `torch.empty` returns is NaN rather than whatever was there, so that reading it shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

settings.register_profile("default", derandomize=True, deadline=None, max_examples=20, print_blob=False)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def fresh_compiler():
    """Let a test compile as the first one does."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def registry():
    """The registry, which is afterwards as before."""
    before = dict(OPERATORS)
    yield OPERATORS
    OPERATORS.clear()
    OPERATORS.update(before)
