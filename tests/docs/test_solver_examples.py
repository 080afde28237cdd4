"""The examples with a known solution find it: deep Ritz, fitted Q iteration, parameter groups and DDP."""

import re
from pathlib import Path

from pictures import is_png
from programs import run

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_deep_ritz_reaches_the_exact_energy(tmp_path):
    """Rprop converges to about 1e-4, and LBFGS continues from its best weights."""
    program = EXAMPLES / "deep_ritz.py"
    output = run(tmp_path, program, "--evaluations", "700", "--output", "r.png")
    errors = {int(n): float(e) for n, e in re.findall(r"evaluation +(\d+): .* error (\S+)$", output, re.MULTILINE)}
    assert [*errors] == [*range(100, 701, 100)]
    assert errors[100] > 0.1 > errors[400] > 1e-5, output
    assert "Rprop: the loss changed by at most 1e-06" in output
    found = re.search(r"^energy (\S+), exact (\S+), relative error (\S+)$", output, re.MULTILINE)
    energy, exact, error = map(float, found.groups())
    assert exact == round(8**0.5 / 3, 9)
    assert 0 < energy / exact - 1 < 2e-5, output
    assert abs(error - (energy / exact - 1)) < 0.1 * error  # printed with two digits
    assert float(re.search(r"largest error of u (\S+)", output)[1]) < 1e-3
    assert is_png(tmp_path / "r.png")
    assert "--evaluations must be >= 1, got 0" in run(tmp_path, program, "--evaluations", "0", fails=True)


def test_nfq_drives_the_car_up_the_hill(tmp_path):
    program = EXAMPLES / "nfq.py"
    output = run(tmp_path, program, "--iterations", "18", "--output", "q.png")
    means = [float(mean) for mean in re.findall(r"^iteration .* ([\d.]+) steps to the goal$", output, re.MULTILINE)]
    assert len(means) == 18
    assert means[0] == 200, output  # no car reaches the goal
    best, solved = re.search(r"best policy: ([\d.]+) steps .*; ([\d.]+)% of random states", output).groups()
    assert float(best) == min(means) < 170, output
    assert float(solved) > 90, output
    assert is_png(tmp_path / "q.png")
    assert "--iterations must be >= 1, got 0" in run(tmp_path, program, "--iterations", "0", fails=True)


def test_parameter_groups_recover_constants(tmp_path):
    """Within a tenth of the truth with two groups; one group with the default bounds ends far from it."""
    program = EXAMPLES / "parameter_groups.py"
    output = run(tmp_path, program, "--evaluations", "750", "--output", "g.png")
    rates = {
        name: (float(k1), float(k2))
        for name, k1, k2 in re.findall(r"^(.*): k1 (\S+), k2 (\S+) per second", output, re.MULTILINE)
    }
    assert rates["truth"] == (3e-6, 8e-7)
    for name, is_close in (("two groups", True), ("one group", False)):
        errors = [abs(found / true - 1) for found, true in zip(rates[name], rates["truth"], strict=True)]
        assert (max(errors) < 0.1) == is_close, output
    assert min(rates["one group"]) > 2e-6, output
    assert is_png(tmp_path / "g.png")
    assert "--evaluations must be >= 1, got 0" in run(tmp_path, program, "--evaluations", "0", fails=True)


def test_ddp_ends_with_weights_of_one_process(tmp_path):
    """On 1 and 2 ranks; bit for bit, because Rprop only uses signs, and rounding changes none of them in float64."""
    program = EXAMPLES / "ddp.py"
    losses = set()
    for devices in ("1", "2"):
        output = run(tmp_path, program, "--devices", devices, "--epochs", "1", "--output", f"{devices}.png")
        losses.add(re.search(rf"^{devices} ranks: best loss (\S+) at step (\d+)$", output, re.MULTILINE).groups())
        assert "largest difference from the weights of one process: 0.0e+00" in output
        assert is_png(tmp_path / f"{devices}.png")
    assert len(losses) == 1
    assert float(losses.pop()[0]) < 5e-3
    assert "--devices and --epochs must be >= 1, got 0 and 10" in run(tmp_path, program, "--devices", "0", fails=True)
