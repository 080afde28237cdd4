"""Data, model and progress report of the example app ``examples/train.py``."""
