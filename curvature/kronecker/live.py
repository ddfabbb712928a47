"""What a Kronecker estimator holds beside its hyperparameters and its state: hooks, its layout, what it has proven.

None of it is saved: a run that goes on looks at the model again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from curvature.kronecker.gradient_rows import Proven
from curvature.kronecker.layout import Layout
from curvature.kronecker.moments import Held
from curvature.kronecker.proofs import Proofs
from curvature.kronecker.spare import Spare
from curvature.layer_io import Recorder
from curvature.likelihood import Likelihood
from curvature.sample_mixing import FirstInputs, refuse_per_sample
from curvature.side_effects import coupled_by_batch_norm


@dataclass
class Live:
    """One estimator's.

    Args:
        recorder: of the layers' inputs and outputs.
        layout: of the parameters that were asked about last.
        proven: the likelihood that the loss was found to be.
        said: which parts of the model the user was told to be treated by a diagonal.
        proofs: of the layers' uses.
        spare: memory between measurements.
        first: the model's inputs, until they are looked at.
        may_mix: whether that look did not find the samples apart.
        rows: the layers whose gradients are products of rows.
    """

    recorder: Recorder | None = None
    layout: Layout | None = None
    proven: Likelihood | None = None
    said: set[str] = field(default_factory=set)
    proofs: Proofs = field(default_factory=Proofs)
    spare: Spare = field(default_factory=Spare)
    first: FirstInputs | None = None
    may_mix: bool = False
    rows: Proven = field(default_factory=Proven)

    def layout_of(
        self, names: tuple[str, ...], build: Callable[[], Layout], model: nn.Module, estimator: str
    ) -> Layout:
        """The layout of the parameters with these names; the model's hooks are installed with it.

        Args:
            names: of the parameters in the model.
            build: makes their layout, where it is another than the last.
            model: to watch.
            estimator: the estimator's class, for messages.
        """
        if self.layout is None or self.layout.names != names:
            self.layout = build()
            self._say(self.layout, estimator)
        watched = self.layout.watched
        if self.recorder is None or not set(watched) <= set(self.recorder.names):
            before = () if self.recorder is None else self.recorder.names
            self.recorder = Recorder(model, dict.fromkeys((*before, *watched)))
        return self.layout

    def _say(self, layout: Layout, estimator: str) -> None:
        new = {where: why for where, why in layout.reasons.items() if where not in self.said}
        self.said.update(new)
        quiet = {"excluded"}
        told = [f"{where}: {why}" for where, why in new.items() if why not in quiet]
        if told:
            warnings.warn(
                f"{estimator} treats these by the diagonal of the same curvature: " + "; ".join(told) + ". "
                "Exclude them to say so, or register a rule (how_to/add_layer_rule)",
                stacklevel=5,
            )

    def try_model(self, model: nn.Module, *, by_labels: bool) -> None:
        """Look once whether a row of the model's outputs depends on other samples.

        A sample of the empirical Fisher has then no gradient. Drawn labels let rows meet, in expectation without harm
        where a row is computed once for all samples; of a model that mixes them the rows are proven.

        Args:
            model: to try.
            by_labels: whether the labels are those of the data (the empirical Fisher).

        Raises:
            ValueError: with ``by_labels``, where samples are mixed.
        """
        if self.first is None:
            return
        verdict = self.first.verdict()
        if by_labels:
            refuse_per_sample(verdict, model)
        self.may_mix = self.may_mix or verdict != "apart"


@dataclass
class Parts:
    """What one step's micro-batches leave to each other, until the step is taken.

    Args:
        samples: how many there were so far, by which labels are drawn.
        count: the micro-batches so far.
        held: what EK-FAC's first S will be formed from, while there is no basis yet.
        alone: the first S where one micro-batch was too large to be held, measured in the bases of it alone.
        owned: S of the blocks whose bases this rank alone keeps, so far.
    """

    samples: int = 0
    count: int = 0
    held: Held | None = None
    alone: list[Tensor] | None = None
    owned: dict[int, Tensor] = field(default_factory=dict)


def refuse_coupled_samples(model: nn.Module) -> None:
    """Refuse batch norm in training mode: every sample's output then depends on all samples."""
    name = coupled_by_batch_norm(model)
    if name is not None:
        raise ValueError(
            f"batch norm {name!r} is in training mode, where samples depend on each other and have no curvature of "
            "their own: freeze its statistics with .eval(), use a norm that treats samples alone (GroupNorm), or leave "
            "out what is between samples with between_samples='drop'"
        )
