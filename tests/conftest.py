"""Settings of all tests: one thread, uninitialised memory full of NaN, and how many examples Hypothesis tries.

`pytest --hypothesis-profile=deep`, or HYPOTHESIS_PROFILE=deep in the environment, tries many more, and other ones
each time.
"""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)

# What `torch.empty` returns is NaN rather than whatever was there, so that reading it shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

settings.register_profile("default", derandomize=True, deadline=None, max_examples=20, print_blob=False)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
