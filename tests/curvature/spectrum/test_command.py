"""``soaa spectrum``: the numbers of a dense matrix, files on disk, clear errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from optimizers.ablation import spectrum_command as command
from optimizers.ablation import workload as workloads
from optimizers.ablation.cli import app
from optimizers.ablation.errors import AblationError
from optimizers.ablation.workload import TensorData, Workload
from tests.curvature import dense
from tests.curvature.matrix_free import cases


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Workload:
    """A workload whose matrix can be formed."""
    _, _, x, y = cases.classification()
    task = Workload(
        name="small",
        summary="a small network",
        model=lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(),
        data=lambda: TensorData((x, y), (x, y), (x, y), evaluation_batch=4),
        loss=workloads.cross_entropy,
        metric=workloads.accuracy,
        metric_name="accuracy",
        higher_is_better=True,
        steps=10,
        batch_size=4,
    )
    monkeypatch.setattr(workloads, "get", lambda name: task)
    return task


def matrix(task: Workload, checkpoint: Path | None, of: str) -> tuple[torch.Tensor, float]:
    model = command.initial_model(task, 3)
    if checkpoint is not None:
        command.load(model, checkpoint)
    _, _, x, y = cases.classification()
    z = model(x)
    loss = nn.functional.cross_entropy(z, y)
    params = dense.trainable(model)
    B = dense.hessian(loss, params) if of == "hessian" else dense.gauss_newton(loss, z, params)
    return B, float(loss.detach())


@pytest.mark.parametrize("of", ["hessian", "gauss-newton"])
def test_numbers_are_those_of_the_dense_matrix_at_the_checkpoint(
    small: Workload, of: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    torch.save(cases.randomise(small.model(), 8).state_dict(), path)
    rng = torch.get_rng_state()
    found = command.measure("small", path, curvature=of, steps=43, probes=3, eigenvalues=3, seed=3)
    assert torch.equal(torch.get_rng_state(), rng)
    B, loss = matrix(small, path, of)
    values = torch.linalg.eigvalsh(B)
    assert found.parameters == 43
    assert abs(found.loss - loss) < 1e-12
    assert torch.allclose(torch.tensor(found.largest).double(), values.flip(0)[:3], atol=1e-6)
    assert torch.allclose(torch.tensor(found.smallest).double(), values[:3], atol=1e-4 * float(values[-1]))
    assert abs(found.trace - values.sum()) < 4 * found.trace_error + 1e-6
    start, _ = matrix(small, None, of)
    assert abs(torch.linalg.eigvalsh(start)[-1] - values[-1]) > 1e-3  # the checkpoint matters
    assert abs(sum(found.density) * (found.grid[1] - found.grid[0]) - 1) < 1e-3


def test_files_hold_the_measurement(small: Workload, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["spectrum", "-w", "small", "--steps", "5", "--probes", "1", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert summary["parameters"] == 43
    assert summary["checkpoint"] is None
    assert f"trace {summary['trace']:.6g}" in result.output
    with (tmp_path / "out" / "density.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2001
    assert float(rows[0]["eigenvalue"]) < float(rows[-1]["eigenvalue"])
    assert (tmp_path / "out" / "spectrum.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_bad_input_is_one_clear_error(small: Workload, tmp_path: Path) -> None:
    with pytest.raises(AblationError, match="there is no checkpoint"):
        command.measure("small", tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(AblationError, match="cannot be read"):
        command.measure("small", tmp_path / "text.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(AblationError, match=r"does not fit the workload's model.*[Mm]issing"):
        command.measure("small", tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(AblationError, match=r"must hold model\.state_dict"):
        command.measure("small", tmp_path / "list.pt")
    with pytest.raises(AblationError, match="hessian"):
        command.measure("small", curvature="hesian")
    with pytest.raises(AblationError, match="probes must be at least 1, got 0"):
        command.measure("small", probes=0)


def test_damaged_and_diverged_checkpoints_are_named(small: Workload, tmp_path: Path) -> None:
    state = small.model().state_dict()
    path = tmp_path / "checkpoint.pt"
    for damaged, message in (
        ({1: torch.ones(3)}, r"must hold model\.state_dict"),
        ({"model": {1: torch.ones(3)}}, r"must hold model\.state_dict"),
        ({k: v.to(torch.complex64) for k, v in state.items()}, r"complex numbers in '0\.weight'"),
        (
            {k: v * float("nan") for k, v in state.items()},
            "the loss at checkpoint .* is nan.* did the run diverge",
        ),
    ):
        torch.save(damaged, path)
        with pytest.raises(AblationError, match=message):
            command.measure("small", path, steps=3, probes=1, eigenvalues=1)


def test_devices_seeds_and_folders_that_are_none_are_named(small: Workload, tmp_path: Path) -> None:
    for device in ("nosuch", "cuda:99", "cpu:x"):
        with pytest.raises(AblationError, match=f"device '{device}' cannot be used"):
            command.measure("small", device=device)
    with pytest.raises(
        AblationError, match="seed must be a whole number of 64 bits, got 99999999999999999999"
    ):
        command.measure("small", seed=99999999999999999999)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = CliRunner().invoke(app, ["spectrum", "-w", "small", "--steps", "3", "--out", str(out)])
        assert isinstance(result.exception, AblationError)
        assert "cannot write results to" in str(result.exception)


def test_checkpoint_under_the_key_model_is_found(small: Workload, tmp_path: Path) -> None:
    state = small.model().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": state, "step": torch.tensor(3)}, tmp_path / "nested.pt")
    plain, nested = (
        command.measure("small", tmp_path / n, steps=3, probes=1, eigenvalues=1)
        for n in ("plain.pt", "nested.pt")
    )
    assert plain.largest == nested.largest
