"""Finished networks: opening one from wherever it lies, what is recorded of it, its results and its digest."""
