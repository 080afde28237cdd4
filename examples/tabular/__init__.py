"""Data, model and report of the example app ``examples/train.py``."""
