"""K-FAC (arXiv 1503.05671): Kronecker factors, a KL ellipsoid, adaptive damping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

import curvature
from curvature.kronecker.fisher import FisherKind
from curvature.likelihood import Likelihood
from curvature.protocols import CurvatureEstimator
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import FixedRadius, KLBall, LevenbergMarquardt, TrustRegion

#: λ₀ and Δ for a loss of the size of a mean cross-entropy (docs/results/kronecker_defaults).
DAMPING, RADIUS = 0.03, 0.03


class KFAC(SecondOrder):
    """Kronecker factors x KL ellipsoid x Levenberg-Marquardt damping: p = -(F+λI)⁻¹m, held to (ηp)ᵀ(F+λI)(ηp) <= Δ.

    Give it the model's outputs: ``optimizer.backward(loss, outputs)``. Three ways to the damping, the first of which
    needs a closure:

    - ``damping="trial"`` (the paper's): the loss at the trial point, on the same batch, moves λ every
      ``damping_interval`` steps. One ``step(closure)`` is one step.
    - ``damping="lagged"``: the loss of the next step judges this one, in any loop; with minibatches λ then follows
      noise as well, so use large ones.
    - ``damping="fixed"``: λ stays; in any loop. With this it is what most libraries call K-FAC.

    A loop that cannot pass a closure (a trainer's) takes one of the last two, or a ``trust_region`` of its own.

    Args:
        model: whose layers are observed, and whose parameters that require grad are optimised.
        lr: η >= 0, on the step inside the region. 1 is the natural-gradient step, and what an adaptive damping is meant
            for: λ judges the step as it was taken, and does not fall below ``initial_damping`` for a step that η < 1
            shortened. To search or to decay the rate, use ``damping="fixed"``.
        momentum: β in [0, 1) of the gradient's bias-corrected running mean.
        initial_damping: λ₀ > 0, in curvature units: it scales with the loss.
        radius: Δ > 0, on (ηp)ᵀC(ηp) = -η²m̂ᵀp with C the damped F, no less than about twice the KL divergence that one
            step may cause. While the factors come from few batches a large one lets them drive the loss up. It scales
            with the loss: 0.01 to 0.03 for a mean cross-entropy, 0.1 for one summed over the 784 pixels of an image
            (there with ``damping="fixed"``, λ₀ = 0.01 and ``inverse_interval=4``: docs/results/kronecker_defaults).
        damping: ``"trial"``, ``"lagged"`` or ``"fixed"``.
        damping_interval: T₁ >= 1, steps between two looks at λ.
        trials: with ``damping="trial"``: ``"every"`` step is tried, so that one that ends in a loss that is not finite
            is taken back; ``"due"`` saves the forward pass, and that guard, where λ is not looked at.
        fisher: ``"mc"`` (labels drawn from the model, the paper's), ``"type-2"`` (exact), ``"empirical"`` or
            ``"forward-only"``.
        sharing: ``"expand"`` or ``"reduce"``; see :class:`curvature.KFAC`.
        beta: decay of the factors' running means.
        factor_interval: steps between measurements of the factors.
        inverse_interval: steps between two refreshes of a layer's inverses (or eigenbases); layers take turns, sooner
            while steps are few.
        weight_decay: decoupled, λ >= 0.
        likelihood: of the drawn labels; ``None`` reads it from the loss.
        seed: of the drawn labels.
        params: parameters or groups to optimise in place of the model's.
        trust_region: in place of KL ellipsoid and damping, which must then be left at their defaults.
        exclude: names of modules to treat by the diagonal.
        between_samples: ``"refuse"`` or ``"drop"``, for models with a batch norm in training mode; see
            :class:`curvature.KFAC`.
        inverses: where ranks keep eigenbases, ``"everywhere"`` or with their ``"owner"``; see :class:`curvature.KFAC`
            and :class:`curvature.EKFAC`.
        damping_kind: ``"factored"`` (the paper's, section 6.3: each factor is damped by itself) or ``"exact"``;
            ``None`` is ``"factored"``, which needs the smaller λ for the same stability, inverts by Cholesky, and
            multiplies by formed inverses: two products a layer where the eigenbases of ``"exact"`` take four.
        refresh: of :class:`EKFAC` alone, where bases are decomposed (``"eigh"``) or iterated (``"qr"``).
        **options: of :class:`SecondOrder`.

    Raises:
        ValueError: for arguments out of range, or damping options beside a ``trust_region``.
        RuntimeError: in the first step, with ``damping="trial"`` and no closure.

    >>> import torch
    >>> model, x, y = torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1])
    >>> optimizer = KFAC(model, lr=0.5, damping="fixed", radius=1.0, fisher="type-2")
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     outputs = model(x)
    ...     loss = torch.nn.functional.cross_entropy(outputs, y)
    ...     optimizer.backward(loss, outputs)
    ...     optimizer.step()
    >>> bool(loss < 0.1)
    True

    Cost: see :class:`curvature.KFAC`; with ``damping="trial"`` one forward pass a step more. A linear layer with fewer
    rows a batch than about a third of its width is solved for by these rows, with the same numbers, and one buffer of
    its size more; not where gradients are clipped, accumulated or averaged among ranks (docs/explanation/kfac).
    References: Martens & Grosse 2015, arXiv 1503.05671, sections 2, 3, 6.5; Ba, Grosse & Martens 2017 (KL clip).
    """

    #: The Kronecker estimator; EK-FAC puts its own in this place.
    estimator: Callable[..., CurvatureEstimator] = curvature.KFAC

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        initial_damping: float = DAMPING,
        radius: float = RADIUS,
        damping: Literal["trial", "lagged", "fixed"] = "trial",
        damping_interval: int = 5,
        fisher: FisherKind = "mc",
        sharing: Literal["expand", "reduce"] = "expand",
        beta: float = 0.95,
        factor_interval: int = 1,
        inverse_interval: int = 20,
        weight_decay: float = 0.0,
        *,
        likelihood: Likelihood | None = None,
        seed: int = 0,
        params: ParamsT | None = None,
        trust_region: TrustRegion | None = None,
        exclude: Sequence[str] = (),
        between_samples: Literal["refuse", "drop"] = "refuse",
        inverses: Literal["everywhere", "owner"] = "everywhere",
        damping_kind: Literal["exact", "factored"] | None = None,
        refresh: Literal["eigh", "qr"] | None = None,
        trials: Literal["every", "due"] = "every",
        **options: Any,
    ) -> None:
        estimator = self.estimator(
            model,
            fisher=fisher,
            sharing=sharing,
            seed=seed,
            likelihood=likelihood,
            beta=beta,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            exclude=exclude,
            between_samples=between_samples,
            inverses=inverses,
            **self._own_options(damping_kind, refresh),
        )
        super().__init__(
            trainable(model) if params is None else params,
            lr,
            curvature=estimator,
            trust_region=damped_kl_ball(
                initial_damping, radius, damping, damping_interval, trust_region, trials
            ),
            momentum=momentum,
            weight_decay=weight_decay,
            **options,
        )

    def _own_options(
        self, damping_kind: Literal["exact", "factored"] | None, refresh: Literal["eigh", "qr"] | None
    ) -> dict[str, Any]:
        """Those that K-FAC and EK-FAC do not have in common; ``None`` was not given."""
        if refresh is not None:
            raise ValueError(
                f"refresh={refresh!r} is for EKFAC, which measures eigenvalues in whatever basis it has; K-FAC's are "
                "those of its factors: leave it out"
            )
        return {"damping_kind": "factored" if damping_kind is None else damping_kind}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require grad."""
    return [p for p in model.parameters() if p.requires_grad]


def damped_kl_ball(
    initial_damping: float,
    radius: float,
    damping: str,
    interval: int,
    given: TrustRegion | None,
    trials: str = "every",
) -> TrustRegion:
    """The KL ellipsoid with the damping of that kind, or what was given in its place."""
    if damping not in ("trial", "lagged", "fixed"):
        raise ValueError(f"damping must be 'trial', 'lagged' or 'fixed', got {damping!r}")
    if given is not None:
        if (initial_damping, radius, damping, interval, trials) != (DAMPING, RADIUS, "trial", 5, "every"):
            raise ValueError(
                "give either trust_region=, or initial_damping, radius, damping, damping_interval and trials"
            )
        return given
    if trials != "every" and damping != "trial":
        raise ValueError(f'trials={trials!r} goes with damping="trial" only, got damping={damping!r}')
    region = KLBall(includes_lr=True, includes_damping=True)
    if damping == "fixed":
        return TrustRegion(region=region, radius=FixedRadius(radius, damping=initial_damping))
    policy = LevenbergMarquardt(
        initial_damping=initial_damping,
        interval=interval,
        radius=radius,
        evaluate=cast(Any, damping),
        trials=cast(Any, trials),
    )
    return TrustRegion(region=region, radius=policy)


optimizers.add("kfac", KFAC)
