"""``hydra_ddp`` on real command lines, with gloo ranks, sweepers and launchers."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import programs
import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAM = "pack/app.py"

APP = """
import atexit, json, logging, os, signal, sys, time, warnings
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


def fail(how):
    match how:
        case "raise": raise ValueError("planned")
        case "kill": os.kill(os.getpid(), signal.SIGKILL)
        case "exit": sys.exit(0)
        case "sleep":
            open(f"{os.getpid()}.sleeping", "w").close()
            time.sleep(100)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    import lightning as L
    import torch
    from torch.utils.data import DataLoader
    from lightning_rprop import hydra_ddp

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    how, failing_rank = cfg.fail.split("-")

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            if batch_idx == 1 and failing_rank in ("all", str(self.global_rank)):
                fail(how)
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=cfg.lr)

    before = dict(os.environ), list(sys.argv), torch.get_num_threads(), os.getcwd()
    node, net = HydraConfig.get(), Net()
    trainer = L.Trainer(accelerator="cpu", devices=cfg.devices, strategy=cfg.strategy, max_epochs=1, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with hydra_ddp(trainer):
        if cfg.fail == "early-" + os.environ.get("LOCAL_RANK", "0"):
            fail("raise")
        trainer.fit(net, DataLoader(torch.arange(8.0).reshape(4, 2)))
        seen = OmegaConf.to_container(cfg, resolve=True)
        seen["hydra"] = OmegaConf.to_container(node.job, resolve=True), str(node.mode), node.sweep.dir, os.getcwd()
        rank = {"weight": net.net.weight, "lr": trainer.optimizers[0].param_groups[0]["lr"], "seen": json.dumps(seen)}
        torch.save(rank, f"{node.runtime.output_dir}/rank{trainer.global_rank}.pt")
    after = dict(os.environ), list(sys.argv), torch.get_num_threads(), os.getcwd()
    if trainer.is_global_zero and (before != after or torch.distributed.is_initialized()):
        raise ValueError(f"the process was not restored: {before} {after}")
    if cfg.fail == f"late-{trainer.global_rank}":
        atexit.register(os.abort)
    print("AFTER", trainer.global_rank, flush=True)
    return float(net.net.weight.sum())


if __name__ == "__main__":
    main()
"""

CONFIG = """
lr: 0.1
devices: 2
strategy: ddp
fail: never-0
text: plain
when: ${now:%H:%M:%S.%f}
folder: ${hydra:runtime.output_dir}
"""

TRIALS = "fails: [raise-all, never-0]\n"


@pytest.fixture
def run(tmp_path):
    """Write the app and return a function that runs Python with a command line."""
    conf = tmp_path / "pack" / "conf"
    conf.mkdir(parents=True)
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "app.py").write_text(APP)
    (conf / "config.yaml").write_text(CONFIG)
    (conf / "trials.yaml").write_text(CONFIG.replace("never-0", "${fails.${hydra:job.id}}") + TRIALS)
    (conf / "other.yaml").write_text(CONFIG + "other: true\n")
    for folder in ("more", "path"):
        (tmp_path / folder / "group").mkdir(parents=True)
        (tmp_path / folder / "group" / f"{folder}.yaml").write_text("value: ${now:%f}\n")

    return partial(programs.run, tmp_path, streams="both", timeout=200)


def ranks(folder):
    """Return what each rank of a job saved, after checking that all ranks agree."""
    found = [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]
    for rank in found[1:]:
        assert torch.equal(rank["weight"], found[0]["weight"])
        assert rank["lr"] == found[0]["lr"]
        assert rank["seen"] == found[0]["seen"]
    return found


def folders(path):
    """Return the names in a folder: those of the jobs, and of anything a repeated sweep would add."""
    return {child.name for child in path.iterdir()}


def test_ranks_share_folder_and_config(run, tmp_path):
    text = """it\\'s = a, "b c" {x} [y] #1 ${lr} \u00e4"""
    output = run(
        PROGRAM, "-cn", "other", "--config-dir", "more", "-m", "hydra.searchpath=[file://path]", "+group@one=more",
        "+group@two=path", "devices=2,1", f"text='{text}'", "hydra.job.chdir=true",
        "hydra.sweep.dir=all/${now:%f}", "+hydra.job.env_set.OF_THE_JOB=1", "lr=0.25",
    )  # fmt: skip
    (sweep,) = (tmp_path / "all").iterdir()
    assert folders(sweep) == {"0", "1", "multirun.yaml"}
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "multirun").exists()
    assert re.findall(r"^AFTER (\d)", output, flags=re.MULTILINE) == ["1", "0", "0"]
    for job, number in (("0", 2), ("1", 1)):
        found = ranks(sweep / job)
        assert len(found) == number
        assert found[0]["lr"] == 0.25
        assert 'it\'s = a, \\"b c\\" {x} [y] #1 0.25 ' in found[0]["seen"]
        assert f'"num": {job}' in found[0]["seen"]
        assert f'RunMode.MULTIRUN", "{sweep.relative_to(tmp_path)}", "{sweep / job}"' in found[0]["seen"]
    assert {path.name for path in (sweep / "0").iterdir()} == {
        ".hydra", "app.log", "app_ddp_process_1.log", "rank0.pt", "rank1.pt",
    }  # fmt: skip


def test_failed_job_names_rank_and_ends_no_other(run, tmp_path):
    output = run(PROGRAM, "-m", "fail=early-1,exit-0,kill-1,late-1", "hydra.sweep.dir=sweep", fails=True)
    assert folders(tmp_path / "sweep") == {"0", "1", "2", "3", "multirun.yaml"}
    assert output.count("AFTER") == 2
    assert len(ranks(tmp_path / "sweep" / "3")) == 2
    assert "ValueError: planned" in output
    assert "rank 1 exited with code 1" in output
    assert "rank 1 was killed by SIGKILL" in output
    assert "SIGABRT" not in output  # late-1 aborts after its job is done, as torch may
    assert "Error executing job with overrides: ['fail=early-1']" in output  # Hydra reports the first


def test_optuna_continues_after_a_failed_trial(run, tmp_path):
    output = run(
        PROGRAM, "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.max_failure_rate=1", "lr=interval(0.01,0.1)", "hydra.sweep.dir=sweep", "-cn", "trials",
    )  # fmt: skip
    jobs = [ranks(tmp_path / "sweep" / str(number)) for number in range(2)]
    assert [len(job) for job in jobs] == [0, 2]
    assert 0.01 < jobs[1][0]["lr"] < 0.1
    assert "Best value" in output
    assert folders(tmp_path / "sweep") == {"0", "1", "optimization_results.yaml"}


def test_single_run_waits_for_ranks_after_block(run, tmp_path):
    output = run("-m", "pack.app", "lr=0.5", "hydra.run.dir='a b/${now:%f}'")
    assert re.findall(r"^AFTER (\d)", output, flags=re.MULTILINE) == ["1", "0"]  # rank 0 waits for the others
    (folder,) = (tmp_path / "a b").iterdir()
    assert len(ranks(folder)) == 2
    assert str(folder) in ranks(folder)[1]["seen"]


@pytest.mark.parametrize(
    ("launcher", "start"),
    [("joblib", ["-m", "pack.app"]), ("submitit_local", ["pack/app.py"])],
)
def test_launcher_process_starts_the_ranks(launcher, start, run, tmp_path):
    run(*start, "-m", f"hydra/launcher={launcher}", "lr=0.5", "hydra.sweep.dir=sweep")
    assert len(ranks(tmp_path / "sweep" / "0")) == 2
    assert not (tmp_path / "multirun").exists()


def test_sweep_in_each_process_is_an_error(run, tmp_path):
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", PROGRAM]
    error = run(*start, "-m", "lr=0.1,0.2", "hydra.sweep.dir=sweep", fails=True)
    assert "Each of 2 processes runs its own sweep" in error
    assert not list(tmp_path.glob("sweep/*/rank*.pt"))


def is_there(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("way", ["ctrl-c", "kill"])
def test_ended_sweep_leaves_nothing_behind(way, run, tmp_path):
    temporary = tmp_path / "${oc.env:HOME} = 'a'"  # has characters that Hydra's grammar would interpret
    temporary.mkdir()
    command = [sys.executable, PROGRAM, "-m", "fail=sleep-all", "lr=0.1,0.2", "hydra.sweep.dir=sweep"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as sweep:
        processes = set()
        try:
            until = time.monotonic() + 100
            while len(processes) < 2:
                assert time.monotonic() < until, "the ranks did not start"
                time.sleep(0.1)
                processes = {int(path.stem) for path in tmp_path.glob("*.sleeping")}
            if way == "ctrl-c":
                os.killpg(sweep.pid, signal.SIGINT)  # to all processes, as a terminal does
            else:
                sweep.kill()
            assert sweep.wait(timeout=30) != 0
            (rank_1,) = processes - {sweep.pid}
            until = time.monotonic() + 20
            while is_there(rank_1):
                assert time.monotonic() < until, "rank 1 is still running"
                time.sleep(0.1)
        finally:
            for process in filter(is_there, processes | {sweep.pid} if sweep.poll() is None else processes):
                os.kill(process, signal.SIGKILL)
    assert folders(tmp_path / "sweep") == {"0", "multirun.yaml"}
    left = [path for path in temporary.rglob("*") if path.is_file() and b"sleep-all" in path.read_bytes()]
    assert not left  # only torch may leave files, which do not contain the job's config


def test_slurm_script_requests_the_ranks(tmp_path):
    """Check the script that the launcher would pass to sbatch."""
    code = f"""
import submitit
from pathlib import Path
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from submitit.slurm.slurm import SlurmExecutor
overrides = ["hydra/launcher=slurm", "trainer=ddp", "trainer.devices=4", "+trainer.num_nodes=2"]
overrides += ["hydra.job.name=train", "hydra.launcher.partition=gpu"]
with initialize_config_dir({str(ROOT / "conf")!r}, version_base="1.3"):
    config = compose("train", overrides, return_hydra_config=True)
made = []
SlurmExecutor._submit_command = lambda self, command: made.append(self._make_submission_file_text(command, "id")) or 1/0
SlurmExecutor.affinity = classmethod(lambda kind: 1)
launcher = instantiate(config.hydra.launcher)
launcher.setup(hydra_context=None, task_function=len, config=config)
try:
    launcher.launch([["optimizer.lr=0.1"], ["optimizer.lr=0.2"]], 0)
except ZeroDivisionError:
    pass
print(made[0])
"""
    script = programs.run(tmp_path, "-c", code, timeout=60)
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=4", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in script
