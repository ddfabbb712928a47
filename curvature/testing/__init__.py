"""Public conformance check: does a curvature estimator keep the laws of this package?

Run it over an estimator of your own; it raises :class:`AssertionError` with the law that is broken. The tests of this
package run it over every registered estimator, one law at a time::

    @pytest.mark.parametrize("law", curvature.testing.LAWS)
    def test_my_estimator(law):
        curvature.testing.check_estimator(MyEstimator, only=[law])
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from curvature.testing import matrix_laws, training_laws
from curvature.testing.subject import Subject

__all__ = ["LAWS", "Subject", "check_estimator"]

LAWS: dict[str, Callable[[Subject], None]] = {
    "contract": training_laws.check_contract,
    "state": training_laws.check_state,
    "statistics": training_laws.check_statistics,
    "diagonal": matrix_laws.check_diagonal,
    "matvec": matrix_laws.check_matvec,
    "semidefinite": matrix_laws.check_semidefinite,
    "solve": matrix_laws.check_solve,
    "vectors": matrix_laws.check_vectors,
    "splits": matrix_laws.check_splits,
    "repeats": matrix_laws.check_repeats,
    "side effects": training_laws.check_side_effects,
    "stays": matrix_laws.check_stays,
    "first update": training_laws.check_first_update,
    "none": training_laws.check_none,
    "saving": training_laws.check_saving,
    "memory": training_laws.check_memory,
    "graph": training_laws.check_graph,
    "layouts": matrix_laws.check_layouts,
}
"""Every law by name."""


def check_estimator(
    estimator: Any,
    *,
    options: Mapping[str, Any] | None = None,
    semidefinite: bool = False,
    splits: bool = True,
    refreshes: bool = True,
    only: Collection[str] = (),
) -> None:
    """Check the laws of curvature estimators on a small network in float64, each against dense matrices.

    Args:
        estimator: a class (its field ``model``, if it has one, is filled in), a function ``factory(model=…)``, or an
            instance that holds no model.
        options: arguments of the class.
        semidefinite: whether B promises to be positive semidefinite, as Gauss-Newton and Fisher matrices do; an
            estimator whose own ``semidefinite`` is true has promised it.
        splits: whether batches promise to combine exactly; false for curvature that draws labels.
        refreshes: whether the first update promises to equal the one-shot estimate.
        only: names of :data:`LAWS` to check; all by default.

    Raises:
        AssertionError: naming the law that is broken, and by how much.
        ValueError: for an unknown law.

    >>> from curvature import HutchinsonDiagonal
    >>> check_estimator(HutchinsonDiagonal)
    >>> check_estimator(HutchinsonDiagonal, semidefinite=True, only=["semidefinite"])
    Traceback (most recent call last):
    AssertionError: semidefinite: ...

    Cost: a second or two.
    """
    unknown = sorted(set(only) - LAWS.keys())
    if unknown:
        raise ValueError(f"only must name laws out of {sorted(LAWS)}, got {unknown}")
    for name in only or LAWS:
        subject = Subject(estimator, dict(options or {}), semidefinite, splits, refreshes)
        try:
            LAWS[name](subject)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{name}: ended in {type(error).__name__}: {error}") from error
