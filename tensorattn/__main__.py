"""The program ``python -m tensorattn``."""

import sys

from tensorattn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
