"""The written search space: which learning rates (and other numbers) are tried for what.

Frozen on purpose: a space that is widened for one method after its results were seen is no fair comparison.
"""

from __future__ import annotations

from optimizers.ablation.cell import Cell

# (low, high) of the learning rate by optimizer; log-uniform. The geometric mean is the typical value.
LEARNING_RATES: dict[str, tuple[float, float]] = {
    "torch-sgd": (1e-2, 1.0),
    "torch-adamw": (1e-4, 1e-2),
    "torch-muon": (1e-4, 1e-2),
    "adamw": (1e-4, 1e-2),
    "soaa": (1e-4, 1e-2),
    "tadam": (1e-4, 1e-2),
    "adahessian": (1e-2, 1.0),
    "sophia-h": (1e-4, 1e-2),
    "sophia-g": (1e-4, 1e-2),
    "kfac": (1e-2, 1.0),
    "ekfac": (1e-2, 1.0),
    "shampoo": (1e-3, 1e-1),
    "soap": (3e-4, 3e-2),
    "muon": (1e-3, 1e-1),
    "lars": (1e-2, 1.0),
    "lamb": (1e-3, 1e-1),
}
UNKNOWN = (1e-4, 1.0)


def typical_learning_rates(cell: Cell) -> tuple[float | None, ...]:
    """Return the learning rates that are tried where none were asked for.

    Args:
        cell: the cell; one with the option ``lr`` keeps it.

    Returns:
        Four values, a factor of about 3 apart, from below the middle to the end of the written range; None (the
        optimizer's own default) for what has no range, such as a method that judges a trial.

    >>> typical_learning_rates(Cell("torch-adamw"))
    (0.0003, 0.001, 0.003, 0.01)
    """
    if cell.optimizer not in LEARNING_RATES or any(name == "lr" for name, _ in cell.options):
        return (None,)
    low, high = LEARNING_RATES[cell.optimizer]
    middle = float(f"{(low * high) ** 0.5:.3g}")
    return (float(f"{0.3 * middle:.3g}"), middle, float(f"{3 * middle:.3g}"), high)
