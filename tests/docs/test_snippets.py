"""Every snippet and every command of the README and of all pages in docs runs.

Except those of docs/clients.md, which tests/clients runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from pages import ROOT, find_pages, read_blocks, read_commands, read_prose, read_snippets, run, run_seeded

PAGES = [page for page in find_pages() if page != "docs/clients.md"]
SNIPPETS = {name: text for page in PAGES for name, text in read_snippets(page).items()}
COMMANDS = dict.fromkeys(command for page in PAGES for command in read_commands(page))

NOT_RUN = {"bibtex", "mermaid"}  # languages of blocks

# These install first: .ci/run runs the whole lines, and test_app.py runs examples/train.py.
INSTALLING = {
    "pip install -c constraints.txt -e '.[examples]' && python examples/train.py",
    "pip install -c constraints.txt -e '.[test]' && pytest -n 2",
}

# The loss that a snippet prints last is below this.
LOSSES = {"plain.py": 1e-3, "half.py": 5e-3, "large.py": 1e-3, "two_stages.py": 1e-4}

# What a snippet prints last, as a regular expression.
OUTPUTS = {
    "both_ways.py": r"equal: True",
    "fused.py": r"fused: True",
    "take_over.py": r"5 tensor\([\d.e-]+.*",  # it steps once per epoch
    "units.py": r"\{'amplitude': 1200\.0, 'rate': 0\.002, 'background': 0\.0.*",
    "update_mine.py": r"update_wrong: a parameter becomes \S+ instead of .*",
}

MANY = ("many.py", "many_lightning.py")

# Substitutions that only compose the config, for commands that need GPUs, SLURM or another package's launcher.
COMPOSE = {r"^.*(?=examples/train\.py)": "python ", "$": " --cfg job"}
COMPOSE_SWEEP = {" -m ": " --cfg all ", "0.01,0.1": "0.01"}


class Case(NamedTuple):
    """How a test runs a command, and what must come out."""

    command: str  # a regular expression
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
    Case(
        "fabric run",
        (r"^step 300, loss (0\.00[01]\d*|\S+e-\d+)$",),  # below 2e-3; it reaches 1e-4
        files={"fabric.png": rb"\x89PNG"},
    ),
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


# The first case that is found in a command counts.
TESTED = {
    command: cases[0]
    for command in COMMANDS
    if command not in INSTALLING and (cases := [case for case in CASES if re.search(case.command, command)])
}


@pytest.fixture
def folder(tmp_path):
    """A folder with the snippets and the folders of a clone that the commands use."""
    for name, text in SNIPPETS.items():
        (tmp_path / name).write_text(text)
    for name in ("examples", "conf", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_every_block_is_tested():
    for page in PAGES:
        blocks = read_blocks(page)
        assert {language for language, _ in blocks} <= {"python", "bash"} | NOT_RUN, page
        assert "```" not in read_prose(page), f"{page}: indented or unnamed blocks escape the tests"
    other_tests = {"fit.py", "robust.py", "robust_lightning.py", *MANY}
    run_by_commands = {"watch.py", "sweep.py", "app.py", "cli.py", "spread.py"}
    assert set(SNIPPETS) == LOSSES.keys() | OUTPUTS.keys() | other_tests | run_by_commands


def test_every_command_is_tested():
    assert COMMANDS.keys() >= INSTALLING
    assert [case for case in CASES if case not in TESTED.values()] == []
    others = "".join(
        path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_snippets.py"
    )
    for command in COMMANDS.keys() - TESTED.keys() - INSTALLING:  # long ones, of which other tests run shorter forms
        long = re.fullmatch(r"python (?:-m (benchmarks\.\w+)|examples/(\w+)\.py)", command)
        assert long, f"no case for {command!r}"
        assert re.search(rf"\b{long[1] or long[2]}\b", others), f"no test of {command!r}"


def test_snippet_is_the_same_on_every_page():
    for page in PAGES:
        for name, text in read_snippets(page).items():
            assert text == SNIPPETS[name], f"{page}: {name}"


@pytest.mark.parametrize("snippet", LOSSES)
def test_snippet_reaches_low_loss(snippet, folder):
    last = run_seeded(snippet, folder).strip().splitlines()[-1]
    assert float(re.match(r"(?:(?:best )?loss |tensor\()([\d.e-]+)", last)[1]) < LOSSES[snippet], last


@pytest.mark.parametrize("snippet", OUTPUTS)
def test_snippet_prints_expected_line(snippet, folder):
    last = run(f"python {snippet}", folder).strip().splitlines()[-1]
    assert re.fullmatch(OUTPUTS[snippet], last), last


def test_lightning_snippet_trains_and_logs(folder):
    loss, step_size = re.findall(r"tensor\(([\d.e-]+)", run_seeded("fit.py", folder).strip().splitlines()[-1])
    assert float(loss) < 1e-3
    assert float(step_size) > 0
    assert (
        list(folder.glob("lightning_logs/version_0/events*"))
        or (folder / "lightning_logs/version_0/metrics.csv").exists()
    )


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
    case = TESTED[command]
    for pattern, replacement in case.change.items():
        command = re.sub(pattern, replacement, command, count=1)
    output = run(command, folder)
    for pattern in case.output:
        assert re.search(pattern, output, flags=re.MULTILINE), output
    assert case.absent is None or not re.search(case.absent, output, flags=re.MULTILINE), output
    for name, pattern in case.files.items():
        assert re.match(pattern, (folder / name).read_bytes()), name
