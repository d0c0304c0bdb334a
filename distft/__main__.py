"""`python -m distft` equals `distft`."""

import sys

from distft.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
