"""Every snippet and every command of the README and the pages in docs runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import pytest
from pages import ROOT, read_blocks, read_commands, read_snippets, run, run_seeded

PAGES = ("README.md", *(f"docs/{name}.md" for name in ("robust_fits", "many_starts", "profile")))
BLOCKS = [block for page in PAGES for block in read_blocks(page)]
SNIPPETS = {name: text for page in PAGES for name, text in read_snippets(page).items()}
COMMANDS = dict.fromkeys(command for page in PAGES for command in read_commands(page))

# These install first: .ci/run runs the whole lines, and test_app.py runs examples/train.py.
INSTALLING = {
    "pip install -c constraints.txt -e '.[examples]' && python examples/train.py",
    "pip install -c constraints.txt -e '.[test]' && pytest -n 2",
}
# Other tests run shorter forms of these.
LONG = {
    "python examples/gaussian_process.py",
    "python examples/multistart.py",
    "python examples/pinn.py",
    *(
        f"python -m benchmarks.{name}"
        for name in ("gpu", "precision", "profile", "stacked", "step", "traffic", "variants")
    ),
}
TESTED = [command for command in COMMANDS if command not in INSTALLING | LONG]

PROFILE = ("two_stages.py", "units.py")
MANY = ("stacked.py", "many.py", "many_lightning.py")

# Substitutions that only compose the config, for commands that need GPUs, SLURM or another package's launcher.
COMPOSE = {r"^.*(?=examples/train\.py)": "python ", "$": " --cfg job"}
COMPOSE_SWEEP = {" -m ": " --cfg all ", "0.01,0.1": "0.01"}


class Case(NamedTuple):
    """How a test runs a command of the README, and what must come out."""

    command: str  # a regular expression; the first case that is found in a command counts
    output: tuple[str, ...] = ()  # regular expressions that are found in the output
    absent: str | None = None  # one that is not
    files: Mapping[str, bytes] = {}  # file names and regular expressions that match the files' contents
    change: Mapping[str, str] = {}  # substitutions in the command: regular expressions and replacements


CASES = (
    Case("hydra/launcher=slurm", ("SlurmLauncher", "partition: gpu"), change=COMPOSE_SWEEP),
    Case("hydra/launcher=parallel", ("n_jobs: 2",), change=COMPOSE_SWEEP),
    Case("nodes=2", ("accelerator: gpu", "num_nodes: 2"), change=COMPOSE),
    Case("trainer=(ddp|fsdp2)( |$)", ("accelerator: gpu",), absent="num_nodes: 2", change=COMPOSE),
    Case("starts=64", ("^best start +[0-9]+ of 64$",), change={"$": " trainer.max_epochs=1"}),
    Case(r"examples/train\.py", ("checkpoint",), change={"$": " trainer.max_epochs=2"}),
    Case(r"examples/fabric\.py", (r"^step 300, loss (0\.00[01]\d*|\S+e-\d+)$",)),  # below 2e-3; it reaches 1e-4
    Case(r"spread\.py", (r"^best loss \S+e-(0[5-9]|1\d) of 64, 32 members here$",)),  # it reaches 1e-14
    Case(r"watch\.py", (r"step_sizes\.png\s*\Z",), files={"watch.png": rb"\x89PNG", "step_sizes.png": rb"\x89PNG"}),
    Case(r"sweep\.py", (r"^1 epochs done\n(.*\n)*2 epochs done$",), absent=r"(?s)(done$.*){3}"),
    Case(r"app\.py -m", ("lr: 0.01", "lr: 0.1")),
    Case(r"app\.py", ("lr: 0.05",)),
    Case(r"cli\.py.*help", ("--optimizer.etas", "(?i)initial step size")),
    Case(r"cli\.py", files={"lightning_logs/version_0/config.yaml": rb"(?s).*class_path: lightning_rprop\.Rprop"}),
    Case(r"benchmarks\.monitor", (r"^\| digits\b.*\d.* \|$",), change={"$": " --seconds 0.1 --only digits"}),
    Case(r"benchmarks\.robust", (r"^\| digits \| \d",), change={"$": " --seconds 0.1 --only digits"}),
    Case(
        r"benchmarks\.full_batch",
        (r"\| max_iter=1, N = 32 \|", r"\| activations, 16 micro-batches \|"),
        change={"$": " --seconds 0.1 --only single-small,memory"},
    ),
)


def find_case(command):
    cases = [case for case in CASES if re.search(case.command, command)]
    assert cases, f"no case for {command!r}"
    return cases[0]


@pytest.fixture
def folder(tmp_path):
    """A folder with the snippets and the folders of a clone that the commands use."""
    for name, text in SNIPPETS.items():
        (tmp_path / name).write_text(text)
    for name in ("examples", "conf", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_every_block_is_tested():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    robust = {"robust.py", "robust_lightning.py"}
    tested_here = {"plain.py", "fit.py", "large.py", "take_over.py", *robust, *MANY, *PROFILE}
    run_by_commands = {"watch.py", "sweep.py", "app.py", "cli.py", "spread.py"}
    assert set(SNIPPETS) == tested_here | run_by_commands
    assert COMMANDS.keys() >= INSTALLING | LONG
    used = [find_case(command) for command in TESTED]
    assert [case for case in CASES if case not in used] == []


def test_plain_snippet_reaches_low_loss(folder):
    assert float(run_seeded("plain.py", folder).split()[-1]) < 1e-3


def test_two_stages_snippet_reaches_low_loss(folder):
    assert float(run_seeded("two_stages.py", folder).split()[-1]) < 1e-4


def test_units_snippet_finds_the_parameters(folder):
    output = run("python units.py", folder).strip().splitlines()[-1]
    assert output.startswith("{'amplitude': 1200.0, 'rate': 0.002, 'background': 0.0")


def test_take_over_snippet_steps_once_per_epoch(folder):
    assert re.match(r"5 tensor\([\d.e-]+", run("python take_over.py", folder).strip().splitlines()[-1])


def test_lightning_snippet_trains_and_logs(folder):
    loss, step_size = re.findall(r"tensor\(([\d.e-]+)", run_seeded("fit.py", folder).strip().splitlines()[-1])
    assert float(loss) < 1e-3
    assert float(step_size) > 0
    assert (
        list(folder.glob("lightning_logs/version_0/events*"))
        or (folder / "lightning_logs/version_0/metrics.csv").exists()
    )


def test_large_snippet_reaches_low_loss(folder):
    (loss,) = re.findall(r"tensor\(([\d.e-]+)", run_seeded("large.py", folder).strip().splitlines()[-1])
    assert float(loss) < 1e-3


def test_robust_loop_retreats_and_converges(folder):
    last = run("python robust.py", folder).strip().splitlines()[-1]
    assert re.match(r"loss 2\.0000000\d+ at step \d+, [1-9] retreats: the loss changed by at most 1e-12 ", last), last


def test_robust_fit_ends_with_best_weights(folder):
    last = run_seeded("robust_lightning.py", folder).strip().splitlines()[-1]
    loss, reason = re.match(r"best loss (\S+) after \d+ steps: (.*)$", last).groups()
    assert float(loss) < 2e-2
    assert reason.startswith("the loss changed by at most 0.0001 of itself for 10 steps in a row, up to step ")


@pytest.mark.parametrize("snippet", MANY)
def test_many_starts_reach_low_losses(snippet, folder):
    last = run_seeded(snippet, folder).strip().splitlines()[-1]
    best, median = map(float, re.match(r"best loss (\S+), median ([\d.e-]+)", last).groups())
    assert best < median / 2 < 1e-3  # 2e-5 and 2e-4


@pytest.mark.parametrize("command", TESTED)
def test_command_gives_expected_output(command, folder):
    case = find_case(command)
    for pattern, replacement in case.change.items():
        command = re.sub(pattern, replacement, command, count=1)
    output = run(command, folder)
    for pattern in case.output:
        assert re.search(pattern, output, flags=re.MULTILINE), output
    assert case.absent is None or not re.search(case.absent, output, flags=re.MULTILINE), output
    for name, pattern in case.files.items():
        assert re.match(pattern, (folder / name).read_bytes()), name
