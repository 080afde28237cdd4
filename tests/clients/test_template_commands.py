"""The commands for lightning-hydra-template in docs/clients.md, in an app with its layout."""

import re

import pytest
from pages import read_blocks, read_commands, run
from template_app import write_app

PAGE = "docs/clients.md"
COMMANDS = read_commands(PAGE)

# The optimizers, learning rates and callbacks of the runs, by a part of the command; the first match counts.
RUNS = {
    "optimizer@": ["Rprop 0.01 ModelCheckpoint FullBatch StepSizeMonitor"],
    " -m ": [f"Rprop {lr} ModelCheckpoint FullBatch KeepBest StepSizeMonitor" for lr in (0.001, 0.01)],
    "experiment=": ["Rprop 0.001 ModelCheckpoint FullBatch KeepBest StepSizeMonitor"],
}


@pytest.fixture
def app(tmp_path):
    write_app(tmp_path)
    (experiment,) = (text for language, text in read_blocks(PAGE) if language == "yaml")
    (tmp_path / "configs/experiment/rprop.yaml").write_text(experiment)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_command_trains_with_rprop(command, app):
    """A step per epoch shows that FullBatch has taken over the DataLoader of three batches."""
    output = run(f"{command} data=shuffled trainer.max_epochs=4", app)
    runs = next(runs for part, runs in RUNS.items() if part in command)
    printed = [line for line in output.splitlines() if re.match(r"\w+ [\d.]+ ModelCheckpoint|\d+ steps in", line)]
    assert printed == [line for run in runs for line in (run, "4 steps in 4 epochs, schedulers: 0")]
