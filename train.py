#!/usr/bin/env python3
"""Train a model: `python train.py`, or `torchrun train.py` on several processes; the same as `nbn-train`."""
import sys

from nbn_timm.cli.train import console

if __name__ == '__main__':
    sys.exit(console())
