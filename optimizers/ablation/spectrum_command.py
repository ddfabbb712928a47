"""``soaa spectrum``: the spectrum of the curvature of a workload's training loss, at a checkpoint or at the start."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from torch import Tensor, nn

from optimizers.ablation import workload as workloads
from optimizers.ablation.errors import AblationError, unknown_name
from optimizers.ablation.store import write_bytes

Of = Literal["hessian", "gauss-newton", "empirical-fisher"]


@dataclass(frozen=True)
class Spectrum:
    """What was measured.

    Args:
        workload: its name.
        checkpoint: the file that the parameters came from; ``None`` is the initial model of ``seed``.
        curvature: which matrix.
        samples: training samples that the loss was taken over.
        seed: of the initial model, and of all random vectors.
        parameters: P, the size of the matrix.
        loss: the loss at these parameters.
        gradient_norm: the length of its gradient.
        trace: the trace of the matrix, estimated by XTrace.
        trace_error: its standard error.
        largest: the largest eigenvalues, in descending order.
        largest_residuals: an eigenvalue lies within this distance of each.
        smallest: the smallest eigenvalues, in ascending order.
        smallest_residuals: as for the largest.
        negative_mass: the fraction of eigenvalues below zero by more than one smoothing width.
        products: products with the matrix that it took.
        grid: eigenvalues at which the density was smoothed.
        density: the density there; its integral is 1.
        density_error: its standard error over the probes.
        width: the standard deviation of the smoothing Gaussian.
    """

    workload: str
    checkpoint: str | None
    curvature: str
    samples: int
    seed: int
    parameters: int
    loss: float
    gradient_norm: float
    trace: float
    trace_error: float
    largest: list[float]
    largest_residuals: list[float]
    smallest: list[float]
    smallest_residuals: list[float]
    negative_mass: float
    products: int
    grid: list[float]
    density: list[float]
    density_error: list[float]
    width: float

    def summary(self) -> dict[str, Any]:
        """Everything but the curve, for ``spectrum.json``."""
        curve = ("grid", "density", "density_error")
        return {k: v for k, v in asdict(self).items() if k not in curve}

    def write(self, folder: Path) -> None:
        """Write ``spectrum.png``, ``density.csv`` and ``spectrum.json`` into ``folder``."""
        rows = ["eigenvalue,density,standard_error"]
        rows += [
            f"{x!r},{y!r},{e!r}" for x, y, e in zip(self.grid, self.density, self.density_error, strict=True)
        ]
        write_bytes(folder / "density.csv", ("\n".join(rows) + "\n").encode())
        # NaN (the error of a single probe) is no JSON
        clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in self.summary().items()}
        write_bytes(folder / "spectrum.json", (json.dumps(clean, indent=2) + "\n").encode())
        write_bytes(folder / "spectrum.png", picture(self))


def measure(
    workload: str = "digits",
    checkpoint: str | Path | None = None,
    *,
    curvature: str = "hessian",
    samples: int = 1000,
    steps: int = 60,
    probes: int = 4,
    eigenvalues: int = 5,
    seed: int = 0,
    device: str = "cpu",
) -> Spectrum:
    """Measure density, extreme eigenvalues and trace of a curvature of a workload's training loss.

    The model is evaluated in ``eval()`` mode, so that dropout and batch norm are functions of the parameters.

    Args:
        workload: see ``soaa list``.
        checkpoint: a file that ``torch.save(model.state_dict(), …)`` wrote (or a dictionary with that under
            ``"model"``); it is loaded with ``weights_only=True``. Without one the initial model of ``seed`` is taken.
        curvature: ``"hessian"``, ``"gauss-newton"`` or ``"empirical-fisher"``.
        samples: training samples in the loss, >= 1; all of them if there are fewer.
        steps: Lanczos steps a probe, >= 1.
        probes: random probes of the density, >= 1.
        eigenvalues: how many at either end, >= 1.
        seed: of the initial model and of the random vectors.
        device: where to compute.

    Returns:
        The measurements; :meth:`Spectrum.write` puts them on disk.

    Raises:
        AblationError: for an unknown name, a bad value, a device that is not there, a checkpoint that does not fit or
            has no finite loss and curvature, missing data.

    >>> found = measure("digits", samples=50, steps=8, probes=1, eigenvalues=1)
    >>> found.parameters, found.samples
    (6570, 50)

    Cost: about ``steps · probes + 8 · eigenvalues + 120`` products, each about two gradients over the samples.
    """
    for name, value in (
        ("samples", samples),
        ("steps", steps),
        ("probes", probes),
        ("eigenvalues", eigenvalues),
    ):
        if value < 1:
            raise AblationError(f"{name} must be at least 1, got {value}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise AblationError(f"seed must be a whole number of 64 bits, got {seed}")
    from curvature import EmpiricalFisher, GaussNewton, Hessian, estimate
    from curvature.problem import Problem
    from curvature.spectrum import extreme_eigenvalues, spectral_density, xtrace

    estimators = {"hessian": Hessian, "gauss-newton": GaussNewton, "empirical-fisher": EmpiricalFisher}
    if curvature not in estimators:
        raise unknown_name("curvature", curvature, list(get_args(Of)))
    task = workloads.get(workload)
    check_device(device)
    task.prepare()
    model = initial_model(task, seed)
    if checkpoint is not None:
        load(model, Path(checkpoint))
    model.to(device).eval()
    batches = [(x.to(device), y.to(device)) for x, y in task.data().evaluation("train", samples)]
    where = "the initial model" if checkpoint is None else f"checkpoint {str(checkpoint)!r}"
    refuse_divergence(model, task.loss, batches, where)
    B = estimate(estimators[curvature](), model, task.loss, batches)
    loss, squared = 0.0, None
    for share, graph in Problem(model, task.loss, batches).graphs():
        loss += float(share) * float(graph.loss.detach())
        part = [share * g for g in graph.gradient()]
        squared = part if squared is None else [a + b for a, b in zip(squared, part, strict=True)]
    assert squared is not None  # a workload has training samples
    size = sum(g.numel() for g in squared)
    count = min(eigenvalues, size)
    budget = max(4 * count + 30, 40)
    try:
        top = extreme_eigenvalues(B, count, "largest", max_products=budget, seed=seed)
        bottom = extreme_eigenvalues(B, count, "smallest", max_products=budget, seed=seed)
        trace = xtrace(B, 60, seed=seed)
        density = spectral_density(B, steps, probes, seed=seed)
    except ArithmeticError as error:
        raise AblationError(f"the {curvature} at {where} has no spectrum: {error}") from error
    width = density.default_width()
    grid = density.grid(2001, width)
    negative = [w[t < -width].sum() for t, w in zip(density.nodes, density.weights, strict=True)]
    return Spectrum(
        workload=workload,
        checkpoint=None if checkpoint is None else str(checkpoint),
        curvature=curvature,
        samples=sum(len(x) for x, _ in batches),
        seed=seed,
        parameters=size,
        loss=loss,
        gradient_norm=math.sqrt(sum(float(g.double().square().sum()) for g in squared)),
        trace=float(trace.value),
        trace_error=float(trace.standard_error),
        largest=top.eigenvalues.tolist(),
        largest_residuals=top.residuals.tolist(),
        smallest=bottom.eigenvalues.tolist(),
        smallest_residuals=bottom.residuals.tolist(),
        negative_mass=float(torch.stack(negative).mean()),
        products=top.products + bottom.products + trace.products + density.products,
        grid=grid.tolist(),
        density=density.density(grid, width).tolist(),
        density_error=density.standard_error(grid, width).tolist(),
        width=width,
    )


def initial_model(task: workloads.Workload, seed: int) -> nn.Module:
    """The workload's model as a run with this seed starts it; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.model()


def check_device(device: str) -> None:
    """Raise AblationError where nothing can be computed on a device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AblationError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def refuse_divergence(
    model: nn.Module, loss_fn: Any, batches: list[tuple[Tensor, Tensor]], where: str
) -> None:
    """Raise AblationError where the loss or its gradient is not finite."""
    for x, y in batches:
        loss = loss_fn(model(x), y)
        params = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        size = sum(float(g.double().square().sum()) for g in gradient)
        if not math.isfinite(float(loss.detach())) or not math.isfinite(size):
            raise AblationError(
                f"the loss at {where} is {float(loss.detach()):.6g}, its gradient's length {math.sqrt(size):.6g}: no "
                "curvature there; did the run diverge?"
            )


def load(model: nn.Module, path: Path) -> None:
    """Put a checkpoint into the model."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise AblationError(f"there is no checkpoint {str(path)!r}") from None
    except Exception as error:  # a damaged or hostile file may raise anything; none of it is run
        first = str(error).strip().split("\n")[0]
        raise AblationError(
            f"checkpoint {str(path)!r} cannot be read as a dictionary of tensors: {first}"
        ) from error
    state = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise AblationError(
            f"checkpoint {str(path)!r} must hold model.state_dict(), or a dictionary with it under 'model'"
        )
    for name, value in state.items():
        if value.is_complex():
            raise AblationError(
                f"checkpoint {str(path)!r} holds complex numbers in {name!r}, the model real ones"
            )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise AblationError(f"checkpoint {str(path)!r} does not fit the workload's model: {lines}") from error


def picture(found: Spectrum) -> bytes:
    """The density on a logarithmic axis, with the extreme eigenvalues marked; the bytes of a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    low = [max(y - e, 0.0) for y, e in zip(found.density, found.density_error, strict=True)]
    high = [y + e for y, e in zip(found.density, found.density_error, strict=True)]
    axes.plot(found.grid, found.density, color="C0", linewidth=1.5, label="density, smoothed")
    if all(math.isfinite(e) for e in found.density_error):
        axes.fill_between(
            found.grid, low, high, color="C0", alpha=0.2, linewidth=0, label="one standard error"
        )
    for values, color, label in ((found.largest, "C3", "largest"), (found.smallest, "C2", "smallest")):
        for i, value in enumerate(values):
            text = f"{label}: {values[0]:.4g}" if i == 0 else None
            axes.axvline(value, color=color, linewidth=0.8, linestyle="--", label=text)
    # an eigenvalue of its own has the height 1/P of a Gaussian: below it there is nothing to see
    floor = 1.0 / (found.parameters * found.width * math.sqrt(2 * math.pi))
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor / 100)
    axes.set_xlabel(f"eigenvalue of the {found.curvature}")
    axes.set_ylabel("density")
    axes.grid(visible=True, alpha=0.2)
    axes.legend(frameon=False, fontsize="small")
    where = "the initial model" if found.checkpoint is None else Path(found.checkpoint).name
    axes.set_title(
        f"{found.workload} at {where}: loss {found.loss:.4g}, trace {found.trace:.4g} ± {found.trace_error:.2g}",
        fontsize="medium",
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


def spectrum(
    workload: Annotated[str, typer.Option("--workload", "-w", help="See soaa list.")] = "digits",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", help="A state_dict file.  (default: the initial model)", show_default=False
        ),
    ] = None,
    curvature: Annotated[
        str, typer.Option("--curvature", "-c", help="hessian, gauss-newton or empirical-fisher.")
    ] = "hessian",
    samples: Annotated[int, typer.Option("--samples", help="Training samples in the loss.")] = 1000,
    steps: Annotated[int, typer.Option("--steps", help="Lanczos steps a probe.")] = 60,
    probes: Annotated[int, typer.Option("--probes", help="Random probes of the density.")] = 4,
    eigenvalues: Annotated[int, typer.Option("--eigenvalues", help="How many at either end.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of the initial model and the random vectors.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option("--out", help="Folder of the picture and the numbers.")] = Path(
        "soaa-spectrum"
    ),
) -> None:
    """Draw the spectrum of a workload's curvature at a checkpoint."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AblationError(f"cannot write results to {out}: {error.strerror}") from error
    found = measure(
        workload,
        checkpoint,
        curvature=curvature,
        samples=samples,
        steps=steps,
        probes=probes,
        eigenvalues=eigenvalues,
        seed=seed,
        device=device,
    )
    found.write(out)
    typer.echo(
        f"{found.curvature} of {found.workload}, {found.parameters} parameters, {found.samples} samples"
    )
    typer.echo(f"loss {found.loss:.6g}, gradient norm {found.gradient_norm:.4g}")
    typer.echo(f"trace {found.trace:.6g} ± {found.trace_error:.2g}")
    typer.echo("largest  " + "  ".join(f"{v:.6g}" for v in found.largest))
    typer.echo("smallest " + "  ".join(f"{v:.6g}" for v in found.smallest))
    typer.echo(f"written to {out}: spectrum.png, density.csv, spectrum.json")
