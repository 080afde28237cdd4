"""Properties of the rules on random histories of gradients and losses."""

import torch
from cases import PATHS, VARIANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from tapes import rprop_rows, twin_rows

from lightning_rprop import Rprop

REALS = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30]
)
HISTORIES = st.lists(st.tuples(st.lists(REALS, min_size=4, max_size=4), REALS), min_size=1, max_size=12)


def rows_in_layout(layout, variant, history, foreach, **options):
    """Return weights and step sizes ``(steps, 2, 4)`` of four weights in one tensor, in four, or in a complex one."""
    params = {
        "joined": [torch.zeros(4, dtype=torch.float64)],
        "split": [torch.zeros((), dtype=torch.float64) for _ in range(4)],
        "complex": [torch.zeros(2, dtype=torch.complex128)],
    }[layout]
    for p in params:
        p.requires_grad_()
    optimizer = Rprop(params, variant=variant, foreach=foreach, **options)
    rows = []
    for gradients, loss in history:
        flat = torch.tensor(gradients, dtype=torch.float64)
        grads = {"joined": [flat], "split": flat.unbind(), "complex": [torch.view_as_complex(flat.reshape(2, 2))]}
        for p, g in zip(params, grads[layout], strict=True):
            p.grad = g.clone()
        optimizer.step(loss=loss)
        both = ([p.detach() for p in params], [optimizer.state[p]["step_size"] for p in params])
        real = [[torch.view_as_real(t) if t.is_complex() else t for t in tensors] for tensors in both]
        rows.append(torch.stack([torch.cat([t.reshape(-1) for t in tensors]) for tensors in real]))
    return torch.stack(rows)


@settings(deadline=None, max_examples=150)
@given(
    history=HISTORIES,
    etas=st.tuples(st.floats(0.05, 0.95), st.floats(1.05, 4.0)),
    bounds=st.tuples(st.floats(1e-3, 0.5), st.floats(0.5, 5.0)),
    lr=st.floats(1e-3, 5.0),
    maximize=st.booleans(),
)
def test_random_histories_match_twin(history, etas, bounds, lr, maximize):
    """Every implementation and every layout of the weights gives the twin's result for each weight."""
    lr = min(max(lr, bounds[0]), bounds[1])  # in the twin, a NaN before the first move leaves lr unclamped
    options = {"lr": lr, "etas": etas, "step_sizes": bounds}
    direction = -1 if maximize else 1
    for variant in VARIANTS:
        first, *others = (
            rows_in_layout(layout, variant, history, foreach, maximize=maximize, **options)
            for layout in ("joined", "split", "complex")
            for foreach in PATHS.values()
        )
        assert all(torch.equal(first, other) for other in others)
        assert bounds[0] <= first[:, 1].min() <= first[:, 1].max() <= bounds[1]
        for i in range(4):
            tape = [(direction * gradients[i], direction * loss) for gradients, loss in history]
            rows = twin_rows(variant, tape, **options)
            assert first[:, :, i].tolist() == [[w, D] for w, D, _ in rows]


@settings(deadline=None, max_examples=50)
@given(history=HISTORIES, scale=st.floats(1e-150, 1e150), variant=st.sampled_from(VARIANTS))
def test_only_gradient_signs_matter(history, scale, variant):
    tape = [(gradients[0], loss) for gradients, loss in history]
    scaled = [(g * scale if abs(g) > 1e-100 else g, loss) for g, loss in tape]
    assert [row[:2] for row in rprop_rows(variant, tape)] == [row[:2] for row in rprop_rows(variant, scaled)]


@settings(deadline=None, max_examples=50)
@given(history=HISTORIES, variant=st.sampled_from(VARIANTS))
def test_mirrored_problem_mirrors_weights(history, variant):
    tape = [(gradients[0], loss) for gradients, loss in history]
    mirrored = rprop_rows(variant, [(-g, loss) for g, loss in tape])
    assert [(-w, D) for w, D, _ in mirrored] == [(w, D) for w, D, _ in rprop_rows(variant, tape)]
