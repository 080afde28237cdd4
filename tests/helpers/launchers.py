"""Fit in processes that Lightning launches and save each rank's parameters; ``launchers.py 3 ddp`` uses three."""

from __future__ import annotations

import atexit
import sys

import torch
from strategy_ranks import Fit, loader, make_trainer, whole


class Saving(Fit):
    def __init__(self, strategy):
        super().__init__()
        self.strategy = strategy

    def on_train_end(self):
        params = {name: whole(param) for name, param in self.named_parameters()}
        torch.save(params, f"{self.strategy}-{self.global_rank}.pt")
        # else torch may abort the process at exit (torch issue 190489)
        atexit.register(torch.distributed.destroy_process_group)


if __name__ == "__main__":
    torch.set_num_threads(1)  # torch's threads do not survive a fork
    for strategy in sys.argv[2:]:
        make_trainer(strategy, devices=int(sys.argv[1])).fit(Saving(strategy), loader())
