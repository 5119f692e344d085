"""Settings of all tests: one thread, uninitialised memory full of NaN, and how many examples Hypothesis tries.

`pytest --hypothesis-profile=deep`, or HYPOTHESIS_PROFILE=deep in the environment, tries many more, and other ones
each time.
"""

import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

from tensorattn import slabs

sys.path.insert(0, str(Path(__file__).parent / "unit"))  # the checker of the floors is shared with the README's test

torch.set_num_threads(1)

# What `torch.empty` returns is NaN rather than whatever was there, so that reading it shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

# What the tests are about is what large tensors go through; `test_few.py` compares with what small ones do.
slabs.SMALL = 0

settings.register_profile("default", derandomize=True, deadline=None, max_examples=20, print_blob=False)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
