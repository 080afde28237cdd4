"""``hydra_ddp`` when a rank is lost while the ranks connect."""

import re

import pytest
from programs import run

from lightning_rprop import hydra_ddp
from lightning_rprop._hydra_ddp import RANK_FILE

APP = """
import os, signal, time
import hydra
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy
from lightning_rprop import hydra_ddp


class Fails(DDPStrategy):
    def __init__(self, moment):
        super().__init__()
        self.moment = moment

    def setup_distributed(self):
        second = os.environ["LOCAL_RANK"] == "1"
        if self.moment == "before" and second:
            raise RuntimeError("planned")
        if self.moment == "connected" and second:
            dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, False)
            os.kill(os.getpid(), signal.SIGKILL)
        super().setup_distributed()
        if self.moment == "grouped":
            if second:
                os._exit(7)
            dist.new_group([0, 1])  # a device mesh does this too


@hydra.main(version_base="1.3")
def main(cfg):
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy=Fails(cfg.moment), logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    begun = time.monotonic()
    try:
        with hydra_ddp(trainer):
            trainer.fit(BoringModel())
    except RuntimeError as error:
        print(f"{cfg.moment}: {time.monotonic() - begun:.0f} s, {error}", flush=True)
        raise
    print(f"{cfg.moment}: done", flush=True)


main()
"""


def test_rank_lost_while_connecting_ends_its_job(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    moments = "before,connected,grouped,never"
    output = run(tmp_path, "app.py", "-m", f"+moment={moments}", fails=True, timeout=200, streams="both")
    ends = {
        "before": "rank 1 exited with code 1",
        "connected": "rank 1 was killed by SIGKILL",
        "grouped": "rank 1 exited with code 7",
    }
    for moment, end in ends.items():
        (seconds,) = re.findall(rf"^{moment}: (\d+) s, This job failed because {end}\.", output, flags=re.MULTILINE)
        assert int(seconds) < 60  # mostly the start of rank 1
    assert output.count("never: done") == 2


def test_rank_without_plugin_is_an_error(monkeypatch):
    monkeypatch.setenv(RANK_FILE, "3")
    with pytest.raises(RuntimeError, match="Hydra did not load the plugin"), hydra_ddp(None):
        pass
