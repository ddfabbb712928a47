"""Public conformance check: does a workload keep what the ablation tool relies on?

Run it over a workload of your own; it raises :class:`AssertionError` with the law that is broken::

    def test_my_workload():
        optimizers.ablation.testing.check_workload(WORKLOAD)
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from optimizers.ablation.workload import Batch, Data, Split, Workload

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def check_workload(workload: Workload, steps: int = 30, learning_rate: float = 1e-3) -> None:
    """Check the laws of workloads: everything but the model's initial values is a function of a seed that is given.

    The model's initial values follow the global seed. Training batches follow the generator, have the size that was
    asked for and never end; an evaluation is the same at every call, and no longer than ``limit``. The loss is a
    finite 0-d mean (a batch twice over has the same loss), and so is the metric. Nothing but the model draws from the
    global generator, the three splits share no sample, and a few steps of AdamW bring the training loss down.

    Args:
        workload: what to check; its data are loaded.
        steps: of AdamW, at the workload's batch size.
        learning_rate: of AdamW.

    Raises:
        AssertionError: naming the law that is broken.

    >>> from optimizers.ablation import workload
    >>> check_workload(workload.get("digits"))

    Cost: loading the data, and ``steps`` training steps.
    """
    workload.prepare()
    data = workload.data()
    _check_model(workload)
    _check_batches(workload, data)
    _check_evaluation(workload, data)
    _check_splits(data)
    _check_training(workload, data, steps, learning_rate)


def _model(workload: Workload) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return workload.model()


def _check_model(workload: Workload) -> None:
    first, again = (_model(workload).state_dict() for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), f"one seed must give one initial model: {name!r} differs"


def _check_batches(workload: Workload, data: Data) -> None:
    before = torch.get_rng_state()

    def stream(seed: int, count: int) -> list[Batch]:
        batches = data.batches(workload.batch_size, torch.Generator().manual_seed(seed))
        return list(itertools.islice(batches, count))

    # three epochs, or forty batches: an order that ends with its epoch shows
    samples = sum(len(x) for x, _ in itertools.islice(data.evaluation("train"), 1000))
    count = max(3, min(40, 3 * samples // workload.batch_size + 1))
    first = stream(0, count)
    assert len(first) == count, f"training batches must never end, these did after {len(first)}"
    for x, _ in first:
        assert len(x) == workload.batch_size, (
            f"every training batch must have batch_size = {workload.batch_size} samples, got {len(x)}"
        )
    for (x, y), (x_again, y_again) in zip(first, stream(0, count), strict=True):
        assert torch.equal(x, x_again), "one generator must give one order of batches"
        assert torch.equal(y, y_again), "one generator must give one order of targets"
    others = stream(1, 3)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(first, others, strict=False)), (
        "the order must come from the generator: seeds 0 and 1 give the same batches"
    )
    assert torch.equal(before, torch.get_rng_state()), "batches must not draw from the global generator"


def _check_evaluation(workload: Workload, data: Data) -> None:
    model = _model(workload).eval()
    for split in SPLITS:
        x, y = _joined(data, split, 64)
        again, _ = _joined(data, split, 64)
        assert torch.equal(x, again), f"an evaluation of {split!r} must be the same at every call"
        part, _ = _joined(data, split, 5)
        assert len(part) == min(5, len(x)), f"limit=5 of {split!r} gave {len(part)} samples"
        with torch.no_grad():
            values = {}
            for name, function in (("loss", workload.loss), ("metric", workload.metric)):
                once = function(model(x), y)
                twice = function(model(torch.cat([x, x])), torch.cat([y, y]))
                assert once.dim() == 0, f"the {name} must be 0-d, got shape {tuple(once.shape)}"
                assert bool(torch.isfinite(once)), (
                    f"the {name} of the initial model must be finite, got {once}"
                )
                values[name] = (once.double(), twice.double())
        for name, (once, twice) in values.items():
            assert torch.allclose(once, twice, rtol=1e-3, atol=1e-6), (
                f"the {name} must be a mean over samples: {float(once):.6g}, but {float(twice):.6g} for them twice"
            )


def _joined(data: Data, split: Split, limit: int) -> Batch:
    batches = list(data.evaluation(split, limit))
    assert batches, f"the split {split!r} is empty"
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _check_splits(data: Data, limit: int = 2000) -> None:
    seen: dict[Split, set[bytes]] = {}
    for split in SPLITS:
        x, y = _joined(data, split, limit)
        seen[split] = {_bytes(a) + _bytes(b) for a, b in zip(x, y, strict=True)}
    for a, b in itertools.combinations(SPLITS, 2):
        shared = len(seen[a] & seen[b])
        # data sets do contain duplicates; a split that was cut twice from the same rows shares most of them
        assert shared <= 0.05 * min(len(seen[a]), len(seen[b])), (
            f"the splits must be apart: {shared} samples of {a!r} are also in {b!r}"
        )


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().numpy(force=True).tobytes()


def _check_training(workload: Workload, data: Data, steps: int, learning_rate: float) -> None:
    model = _model(workload)
    x, y = _joined(data, "train", 500)

    def measured() -> float:
        model.eval()
        with torch.no_grad():
            value = float(workload.loss(model(x), y))
        model.train()
        return value

    before = measured()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    batches = data.batches(workload.batch_size, torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout
        for inputs, target in itertools.islice(batches, steps):
            optimizer.zero_grad()
            loss = workload.loss(model(inputs), target)
            assert loss.requires_grad, "the loss must be differentiable"
            loss.backward()
            optimizer.step()
    after = measured()
    assert after < before, (
        f"{steps} steps of AdamW must lower the training loss: {before:.6g} became {after:.6g}"
    )
