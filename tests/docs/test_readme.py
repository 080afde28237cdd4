"""Every snippet and every command of the README runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
SNIPPETS = {re.match(r"# (\w+\.py)\n", text)[1]: text for language, text in BLOCKS if language == "python"}
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
ELSEWHERE = {"python examples/pinn.py"}  # test_examples.py runs these, with less to do
ELSEWHERE |= {f"python -m benchmarks.{name}" for name in ("budget", "precision", "step", "traffic", "variants")}
SET_UP = "pip install -c constraints.txt -e '.[{}]' && {}"


def run(command, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_seeded(snippet, folder):
    """Run a snippet from a start that is always the same: of some dozens one does not come so far."""
    program = f"import runpy, torch; torch.manual_seed(0); runpy.run_path('{snippet}', run_name='__main__')"
    return run(f'python -c "{program}"', folder)


@pytest.fixture
def folder(tmp_path):
    """A folder with the snippets, and with what a command finds in a clone."""
    for name, text in SNIPPETS.items():
        (tmp_path / name).write_text(text)
    for name in ("examples", "conf", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_every_block_is_known():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert set(SNIPPETS) == {
        "plain.py",
        "fit.py",
        "large.py",
        "take_over.py",
        "watch.py",
        "sweep.py",
        "app.py",
        "cli.py",
    }
    # these two install first: .ci/run runs the lines whole, test_app.py what the first of them starts
    assert SET_UP.format("examples", "python examples/train.py") in COMMANDS
    assert SET_UP.format("test", "pytest -n 2") in COMMANDS
    assert set(COMMANDS) >= ELSEWHERE


def test_plain_snippet_trains(folder):
    assert float(run_seeded("plain.py", folder).split()[-1]) < 1e-3


def test_take_over_snippet_makes_a_step_an_epoch(folder):
    assert re.match(r"5 tensor\([\d.e-]+", run("python take_over.py", folder).strip().splitlines()[-1])


def test_lightning_snippet_trains_and_logs(folder):
    loss, step_size = re.findall(r"tensor\(([\d.e-]+)", run_seeded("fit.py", folder).strip().splitlines()[-1])
    assert float(loss) < 1e-3
    assert float(step_size) > 0
    assert (
        list(folder.glob("lightning_logs/version_0/events*"))
        or (folder / "lightning_logs/version_0/metrics.csv").exists()
    )


def test_large_snippet_trains(folder):
    (loss,) = re.findall(r"tensor\(([\d.e-]+)", run_seeded("large.py", folder).strip().splitlines()[-1])
    assert float(loss) < 1e-3


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ELSEWHERE and "pip install" not in c])
def test_command_runs(command, folder):
    budgets = {
        "examples/train.py": " trainer.max_epochs=2",
        "benchmarks.full_batch": " --seconds 0.1 --only alone-small,memory",
        "benchmarks.monitor": " --seconds 0.1 --only digits",
    }
    if re.search(r"trainer=(ddp|fsdp2)( |$)", command) and " -m " not in command:  # wants GPUs: composed only
        output = run("python examples/train.py" + command.partition("examples/train.py")[2] + " --cfg job", folder)
        assert "accelerator: gpu" in output
        assert ("num_nodes: 2" in output) == ("nodes=2" in command)
        return
    if "hydra/launcher=parallel" in command:  # composed only; test_hydra_ddp.py runs joblib's launcher
        assert "n_jobs: 2" in run(command.replace(" -m ", " --cfg all ").replace("0.01,0.1", "0.01"), folder)
        return
    if "hydra/launcher=slurm" in command:  # there is no sbatch here: composed only; test_hydra_ddp.py makes its script
        output = run(command.replace(" -m ", " --cfg all ").replace("0.01,0.1", "0.01"), folder)
        assert "SlurmLauncher" in output
        assert "partition: gpu" in output
        return
    output = run(command + next((b for name, b in budgets.items() if name in command), ""), folder)
    if "watch.py" in command:
        assert output.strip().endswith("step_sizes.png")
        assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("watch.png", "step_sizes.png"))
    elif "sweep.py" in command:
        assert [line for line in output.splitlines() if line.endswith("done")] == ["1 epochs done", "2 epochs done"]
    elif "app.py" in command:
        assert "lr: 0.05" in output or "lr: 0.1" in output
    elif "help" in command:
        assert "--optimizer.etas" in output
        assert "initial step size" in output.lower()
    elif "fabric" in command:
        assert float(re.search(r"^step 300, loss (\S+)$", output, flags=re.MULTILINE)[1]) < 2e-3  # it reaches 1e-4
    elif "examples" in command:
        assert "checkpoint" in output
    elif "benchmarks.monitor" in command:
        assert "| digits |" in output
    elif "benchmarks.full_batch" in command:
        assert "| max_iter=1, N = 32 |" in output
        assert "| activations, 16 micro-batches |" in output
