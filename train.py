"""The entry of a checkout: `deepspeed train.py …`, `torchrun train.py …`, `python train.py … [-m]`.

It equals `distft train`.
"""

import sys

from distft.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
