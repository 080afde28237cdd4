"""Members with their own losses in one step equal the scalar twin, run for each weight with its member's losses."""

import pytest
import torch
from cases import BY_PATH, INTERPRETED, VARIANTS
from member_histories import MEMBERS, differ, draw_history, run_together, run_twins
from mutation import IMPLEMENTATIONS, fused_kernel, use_mutant

from lightning_rprop import Rprop
from lightning_rprop.optim import _foreach, _loss, _rule, rprop

if INTERPRETED:
    from lightning_rprop.optim import _triton as module

    PIECE = "_BLOCK"
else:
    from lightning_rprop.optim import _numba as module

    PIECE = "_CHUNK"

HISTORY = draw_history(8 if INTERPRETED else 60)
DTYPES = (torch.float64, torch.bfloat16, torch.float32, torch.float16)[: 2 if INTERPRETED else 4]
NUMBERS = {"step_size_min": 1e-6, "step_size_max": 50, "etaminus": 0.5, "etaplus": 1.2}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Cut parameters in the middle of a member."""
    monkeypatch.setattr(module, PIECE, 8)


@pytest.fixture(params=["tensor"] if INTERPRETED else ["number", "tensor"], autouse=True)
def flag(request, monkeypatch):
    """Whether the host knows the losses; if not, as on an accelerator, no step may read them."""
    if request.param == "tensor":
        monkeypatch.setattr(_loss, "_is_known", lambda loss: False)


@BY_PATH
@pytest.mark.parametrize("variant", VARIANTS)
def test_members_match_separate_twins(variant, foreach):
    for dtype in DTYPES:
        for options, twin_options in (
            ({}, {}),
            ({"maximize": True, "weight_decay": 0.25}, {"decay": 0.25}),
            ({"retreat": False}, {"retreat": False}),
        ):
            rows, optimizer = run_together(HISTORY, dtype, variant=variant, foreach=foreach, **options)
            assert not differ(rows, run_twins(HISTORY, variant, dtype, **twin_options)), (dtype, options)
            assert optimizer.retreats == (0 if options.get("retreat") is False else len(HISTORY))


@BY_PATH
@pytest.mark.parametrize("variant", VARIANTS)
def test_members_of_complex_parameters_match_twins(variant, foreach):
    rows, _ = run_together(HISTORY, torch.complex64, variant=variant, foreach=foreach, steps_as="closure")
    assert not differ(rows, run_twins(HISTORY, variant, torch.float32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_differentiable_members_match_twins(variant):
    rows, _ = run_together(HISTORY, torch.float64, variant=variant, differentiable=True)
    assert not differ(rows, run_twins(HISTORY, variant, torch.float64))


MUTANTS = {
    _rule: (
        ("along(is_bad[param.device], param)", "is_bad[param.device].any()"),
        ("along(fell[param.device], param)", "fell[param.device].any()"),
    ),
    _foreach: (
        ("along(on_device(retreat, param.device), param)", "on_device(retreat, param.device).any()"),
        ("along(take_back.to(flip.device), flip)", "take_back.to(flip.device).any()"),
    ),
    fused_kernel: (
        ("(short - left)", "(short - short)"),
        ("take_back_at + member *", "take_back_at + 0 * member *"),
        ("retreat_at + member *", "retreat_at + 0 * member *"),
        ("first + (elements", "0 * first + (elements"),
    )
    if INTERPRETED
    else (
        ("and actions[after] == action", ""),
        ("first = member * each +", "first ="),
        ("last = member * each +", "last ="),
        ("start += size\n", "start += each\n"),
        ("member = after", "member = member + 1"),
        ("action != 0", "False"),
        ("if action & 2:", "if False:"),
    ),
}
if INTERPRETED:
    MUTANTS = {fused_kernel: MUTANTS[fused_kernel]}


@pytest.mark.parametrize(
    ("module", "edit"), [pytest.param(m, e, id=f"{e[0].strip()}, fused") for m in MUTANTS for e in MUTANTS[m]]
)
def test_twins_detect_wrong_members(module, edit, monkeypatch):
    edits = [edit, ("_BLOCK = 2048", "_BLOCK = 8")] if INTERPRETED else [edit]
    use_mutant(monkeypatch, module, *edits)
    rows, _ = run_together(HISTORY, torch.float64, variant="irprop+", foreach=IMPLEMENTATIONS[module])
    assert differ(rows, run_twins(HISTORY, "irprop+", torch.float64))


def test_closure_may_skip_backward_for_members():
    """Members with a good loss then have no gradient, and stay."""
    p = torch.zeros(MEMBERS, 2, requires_grad=True)
    optimizer = Rprop([p], lr=0.5, variant="rprop-")
    p.grad = torch.ones(MEMBERS, 2)
    optimizer.step(loss=torch.ones(MEMBERS))
    optimizer.zero_grad()
    optimizer.step(lambda: torch.tensor([1.0, torch.nan, 1.0, 1.0, torch.inf]))
    assert torch.equal(p[:, 1], torch.tensor([-0.5, 0.0, -0.5, -0.5, 0.0]))
    assert torch.equal(optimizer.state[p]["step_size"][:, 0], torch.tensor([0.5, 0.25, 0.5, 0.5, 0.25]))
    assert optimizer.retreats == 1


def test_groups_judge_members_by_their_options():
    params = {name: torch.zeros(MEMBERS, 2, requires_grad=True) for name in ("retreats", "never", "maximizes")}
    options = {"retreats": {}, "never": {"retreat": False}, "maximizes": {"maximize": True}}
    optimizer = Rprop([{"params": [p], **options[name]} for name, p in params.items()], lr=1.0, variant="rprop-")
    losses = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 2.0])
    for each in (torch.ones(MEMBERS), losses):
        for p in params.values():
            p.grad = torch.ones(MEMBERS, 2)
        optimizer.step(loss=each)
    moved = torch.tensor(1.0) + torch.tensor(1.2)  # in float32
    assert torch.equal(params["retreats"][:, 0], torch.tensor([-moved, 0.0, 0.0, -moved, -moved]))
    assert torch.equal(params["never"][:, 1], torch.full((MEMBERS,), -moved))
    assert torch.equal(params["maximizes"][:, 0], torch.tensor([moved, 0.0, moved, 0.0, moved]))


def test_other_number_of_losses_starts_over():
    """The previous loss is then unknown, as at the first call, so that no move is taken back."""
    p = torch.zeros(2, requires_grad=True)
    optimizer = Rprop([p], lr=1.0, variant="irprop+")
    for g, loss in ((1.0, 1.0), (-1.0, torch.full((2,), 5.0)), (-1.0, torch.full((2,), 6.0)), (1.0, torch.tensor(9.0))):
        p.grad = torch.full((2,), g)
        optimizer.step(loss=loss)
        assert optimizer.state[p]["prev_loss"].shape == torch.as_tensor(loss).shape
    assert p.tolist() == [-1 + 0.5] * 2


@BY_PATH
def test_functional_form_refuses_other_sizes(foreach):
    for shape in ((6,), ()):
        lists = [[torch.ones(2, 2), torch.ones(shape)] for _ in range(4)]
        with pytest.raises(RuntimeError, match=r"size|shape"):
            rprop(*lists, [torch.zeros(())] * 2, retreat=torch.tensor([True, False]), foreach=foreach, **NUMBERS)
        assert all(bool((tensor == 1).all()) for tensors in lists for tensor in tensors)


@BY_PATH
def test_functional_form_takes_one_element(foreach):
    """In any shape, also for parameters without dimensions."""
    p, g, prev, size = tensors = [torch.tensor(value) for value in (0.0, 1.0, 1.0, 0.5)]
    lists = ([tensor] for tensor in tensors)
    rprop(*lists, [torch.zeros(())], retreat=torch.ones(1, dtype=torch.bool), foreach=foreach, **NUMBERS)
    assert [p.item(), g.item(), prev.item(), size.item()] == [0.5, 1.0, 0.0, 0.25]


@BY_PATH
def test_functional_form_judges_members(foreach):
    """Either flag may be one value for all members."""
    for rose, retreat in (
        (torch.tensor([True, False]), False),
        (torch.tensor([True, False]), torch.tensor([False, True])),
        (torch.tensor(True), torch.tensor([False, True])),
        (torch.tensor([True, False]), torch.tensor([[False]])),
    ):
        both = [torch.tensor([[-1.0, -2.0], [3.0, 4.0]]), torch.ones(2, 2), -torch.ones(2, 2), torch.full((2, 2), 0.5)]
        alone = [[tensor[i].clone() for tensor in both] for i in range(2)]
        options = {"variant": "irprop+", "foreach": foreach, **NUMBERS}
        rprop(*([tensor] for tensor in both), [torch.zeros(())], loss_rose=rose, retreat=retreat, **options)
        for i in range(2):
            flags = [flag[i] if getattr(flag, "shape", None) == (2,) else flag for flag in (rose, retreat)]
            flags = [bool(flag) for flag in flags]
            tensors = ([tensor] for tensor in alone[i])
            rprop(*tensors, [torch.zeros(())], loss_rose=flags[0], retreat=flags[1], **options)
            assert all(torch.equal(tensor[i], each) for tensor, each in zip(both, alone[i], strict=True))
