"""`python -m calm_pl` is `calm`: for launchers that start modules, such as torchrun."""

import sys

from calm_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
