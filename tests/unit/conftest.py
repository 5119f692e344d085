"""Keep the unit tests apart from what torch changes for the whole process."""

import pytest
from torch.distributions import Distribution


@pytest.fixture(autouse=True)
def _distributions_validate():
    """Compiling a module turns the validation of distributions off for good; every test starts with it on."""
    Distribution.set_default_validate_args(True)
