"""`python -m dqt`."""

import sys

from dqt.cli import main

if __name__ == "__main__":
    sys.exit(main())
