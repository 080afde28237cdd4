"""Hydra plugins of lightning_rprop."""
