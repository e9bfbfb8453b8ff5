#!/usr/bin/env python3
"""Evaluate a model: `python validate.py`, or `torchrun validate.py` on several processes; also as `nbn-validate`."""
import sys

from nbn_timm.cli.validate import console

if __name__ == '__main__':
    sys.exit(console())
