"""Kill runs with SIGKILL and resume them from their last checkpoint; print the outcome of each as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import forks
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import WEIGHTS_ONLY
from strategy_ranks import Begin, Fit, fully, loader, make_trainer, parameters

from lightning_rprop import Converged, KeepBest, StepSizeMonitor

STEPS, EVERY = 30, 4
BAD = (6, 13, 14, 22)  # steps whose loss is NaN
VARIANTS = ("irprop+", "irprop-")


class BadLosses(Fit):
    """Has a NaN loss in some steps, from which Rprop retreats."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.trainer.global_step in BAD else loss


class AtStep(Callback):
    """Signals the parent that a step has begun."""

    def __init__(self, step, pipe):
        self.step, self.pipe = step, pipe

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            os.write(self.pipe, b".")


class End(Callback):
    """Records the parameters after the last step, before KeepBest restores the best ones."""

    def on_train_end(self, trainer, pl_module):
        self.params = parameters(trainer.strategy, pl_module)


class WhileSaving(Callback):
    """Kills this process at the n-th file access after the third checkpoint has begun."""

    def __init__(self, n):
        self.left, self.saves = n, 0
        sys.addaudithook(self.hook)

    def on_save_checkpoint(self, *args):
        self.saves += 1

    def hook(self, event, args):
        if self.saves >= 3 and event in ("open", "os.rename", "os.remove", "os.mkdir", "os.symlink", "os.chmod"):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def checkpoints(sharded):
    if not sharded:
        return ModelCheckpoint("checkpoints", every_n_train_steps=EVERY, save_last=True)
    # shards are written in place into a folder: keep the previous one, and move the link when all are written
    return ModelCheckpoint(
        "checkpoints", monitor="step", mode="max", save_top_k=2, every_n_train_steps=EVERY, save_last="link"
    )


def run_rank(strategy, callbacks=()):
    """Train from the last checkpoint, if any, and save the result, as a user's program does."""
    if strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        world = int(os.environ["WORLD_SIZE"])
        module = BadLosses(fully, variants=VARIANTS)
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    else:
        module = BadLosses(variants=VARIANTS)
    sharded = not isinstance(strategy, str)
    begin, end, keep = Begin(), End(), KeepBest()
    monitor, converged = StepSizeMonitor(silence=["no_logger", "no_record"]), Converged(0.005, patience=5)
    callbacks = [monitor, checkpoints(sharded), begin, keep, end, converged, *callbacks]
    trainer = make_trainer(strategy, STEPS, callbacks, enable_checkpointing=True)
    trainer.fit(module, loader(20), ckpt_path="last", **WEIGHTS_ONLY)
    numbers = [keep.best_loss, keep.best_step, trainer.global_step, trainer.callback_metrics["step_size/retreats"]]
    best = parameters(trainer.strategy, module) | {"numbers": torch.tensor(numbers)}
    seen = {"params": end.params, "best": best, "from": begin.step}
    torch.save(seen, f"end-{trainer.global_rank}.pt")


def start(world, strategy, folder, callbacks=lambda rank: ()):
    """Start the ranks of a run and return their process ids."""
    return forks.start(world, folder, lambda rank: run_rank(strategy, callbacks(rank)))


def crash(world, strategy, folder, victim, step=None, delay=0.0, access=None):
    """Kill one rank at a step or while it saves, start the run again, and return the outcome."""
    folder.mkdir()
    if step is None:
        children = start(world, strategy, folder, lambda rank: [WhileSaving(access)] if rank == victim else [])
    else:
        ours, theirs = os.pipe()
        children = start(world, strategy, folder, lambda rank: [AtStep(step, theirs)] if rank == victim else [])
        os.read(ours, 1)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[victim], signal.SIGKILL)
        os.close(ours)
        os.close(theirs)
    codes, seconds = forks.wait(children)
    again, _ = forks.wait(start(world, strategy, folder))
    ends = [torch.load(folder / f"end-{rank}.pt") for rank in range(world)] if not any(again) else []
    return {
        "codes": codes,
        "seconds": seconds,
        "step": step,
        "from": [end["from"] for end in ends],
        "again": again,
        "equal": [same(end["params"], truth["params"]) and same(end["best"], truth["best"]) for end in ends],
    }


def same(tensors, others):
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in others)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, count, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    strategy = {"saving": "auto", "rank": "ddp"}.get(kind, "fsdp2")
    os.environ["WORLD_SIZE"] = "1"
    run_rank("auto")  # undisturbed; it also imports everything before the forks
    truth = torch.load("end-0.pt")
    assert not same(truth["params"], {name: truth["best"][name] for name in truth["params"]})
    assert truth["best"]["numbers"][2:].tolist() == [29, len(BAD)]  # Converged stops before the last step

    for i in range(count):
        folder = Path(f"{kind}-{i}").absolute()
        if kind == "rank":  # at different moments of different steps
            moment = {"step": 1 + i * (STEPS - 10) // count, "delay": 0.0005 * i}
        else:
            moment = {"access": 1 + i // world}
        seen = crash(world, strategy, folder, i % world, **moment)
        print("seen", json.dumps(seen), flush=True)
