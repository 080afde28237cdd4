"""FullBatchLoader reads every kind of source, among them streams and iterables of ready batches."""

import pytest
import torch
from fitting import DATA, Reiterable, Stream, fit, shares
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from whole_set import Regression, exact, make_data, relative_error

from lightning_rprop import FullBatch, FullBatchLoader


class MapStyle(Dataset):
    def __len__(self):
        return 103

    def __getitem__(self, i):
        return DATA[0][i], DATA[1][i]


@pytest.mark.parametrize(
    ("source", "size"),
    [
        (lambda: DataLoader(TensorDataset(*DATA), batch_size=20), None),
        (lambda: DataLoader(TensorDataset(*DATA), batch_size=20, num_workers=1, persistent_workers=True), None),
        (lambda: DataLoader(TensorDataset(*DATA), batch_size=None, sampler=[range(50), range(50, 103)]), None),
        (lambda: Stream(*DATA), 20),
        (lambda: DataLoader(Stream(*DATA), batch_size=20), None),
        (lambda: DATA, 20),
        (lambda: list(DATA), 20),
        (lambda: TensorDataset(*DATA), 20),
        (MapStyle, 20),
    ],
    ids=[
        "DataLoader",
        "workers",
        "batches",
        "stream",
        "DataLoader of a stream",
        "tuple",
        "list",
        "dataset",
        "map-style",
    ],
)
def test_every_source_is_exact(source, size, tmp_path):
    module = Regression()
    _, gradient = exact(module.net, DATA)
    fit(tmp_path, module, size, data=source(), steps=4)
    assert relative_error(module.gradients[0], gradient) < 1e-6  # float32 rounding
    assert torch.equal(torch.cat(module.targets), DATA[1].flatten().repeat(4))


def test_every_rank_reads_its_own_stream():
    class Own(IterableDataset):
        def __iter__(self):
            return iter([1.0, 2.0, 3.0])

    assert shares(Own(), 2, 2) == [[([1.0, 2.0], 2), ([3.0], 1)]] * 2


def test_ready_batches_take_no_size():
    batches = Reiterable(torch.arange(10.0))
    assert [m.size for m in FullBatchLoader(batches).micro_batches()] == [10]
    with pytest.raises(ValueError, match="micro_batch_size=5 cannot be used with an iterable of ready batches"):
        FullBatchLoader(batches, 5)


def test_time_axis_of_stream_is_not_counted(tmp_path):
    def time_first(samples):
        x, y = zip(*samples, strict=True)
        return torch.stack(x).expand(5, -1, -1), torch.stack(y).expand(5, -1, -1)

    class TimeFirst(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0][0], batch[1][0]), batch_idx)

    source = DataLoader(Stream(*make_data(20)), batch_size=7, collate_fn=time_first)
    with pytest.raises(ValueError, match="cannot be counted"):
        fit(tmp_path, TimeFirst(), None, source)
    fit(tmp_path, TimeFirst(), None, source, full_batch=FullBatch(weight=lambda batch: batch[0].shape[1]))


def test_float8_batches_are_streamed(tmp_path):
    x, y = make_data(20)

    class OfFloat8(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].float(), batch[1]), batch_idx)

    fit(tmp_path, OfFloat8(), None, Reiterable((x.to(torch.float8_e4m3fn), y)))
