"""From a loss to what a step needs: ``.grad``, and the statistics that the curvature takes from the loss's graph."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from curvature.loss_graph import LossGraph, check_loss
from curvature.protocols import TRANSIENT, Needs
from optimizers import row_solves
from optimizers.autocast import Autocast
from optimizers.composed import Composed
from optimizers.distributed import find_ranks
from optimizers.shared_gradient import accumulate_, may_share
from optimizers.static_graph import not_the_backward_pass


class Observing(Composed):
    """A composition that observes losses; what it saw waits in ``_pending`` for the step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and what ``backward`` observed but no step used; inside a trial this does nothing."""
        if self._in_trial:
            return
        self._forget()
        super().zero_grad(set_to_none)

    def backward(
        self,
        loss: Tensor,
        outputs: Any = None,
        retain_graph: bool = False,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Accumulate the gradient into ``.grad``, and whatever else the curvature needs from this loss.

        Where only gradients are needed this is ``loss.backward()``. Several calls before a step add up. Inside a trial
        evaluation it does nothing.

        Args:
            loss: a scalar with a graph.
            outputs: the model's outputs from which the loss was computed; needed by Gauss-Newton and sampled-label
                curvature (``optimizer.needs.outputs``). All of the loss must come through them, or the optimizer be
                told to drop what does not (``beside_outputs``).
            retain_graph: keep the graph alive, as in ``loss.backward``.
            scaler: scales the loss for the gradients; curvature and radius see the loss as it is.
        """
        if self._in_trial:
            if self._trial_needs_gradient:
                loss.backward(retain_graph=retain_graph)
            return
        self._backward_called = True
        keeps = self._take_in(loss, outputs, gives_gradient=scaler is None and not retain_graph)
        self._pending.knows_scale = scaler is not None
        formed = self._pending.take_gradient()
        if formed is not None:
            accumulate_(self._params, formed)
            return
        watch = self._watch(loss, outputs) if scaler is None else None
        scaled = loss if scaler is None else scaler.scale(loss)
        with nullcontext() if watch is None else watch:
            scaled.backward(retain_graph=retain_graph or keeps)
        self._pending.rows = {} if watch is None else watch.found(self._params)

    def _watch(self, loss: Tensor, outputs: Any) -> Any:
        """What the curvature wants to see of the backward pass that follows, or ``None``."""
        watch = getattr(self.curvature, "watch", None)
        wanted = watch is not None and row_solves.suits(self.momentum) and self._pending.backwards == 1
        return watch(loss, outputs, self._params) if watch is not None and wanted else None

    def observe(self, loss: Tensor, outputs: Any = None) -> None:
        """What :meth:`backward` does beside the gradient: for every further optimizer over the same loss.

        Call it before the one ``backward``, which adds the gradients of all parameters once and frees the graph; with
        curvature that takes products in the step (:class:`curvature.Hessian`) that needs ``retain_graph=True``. Inside
        a trial evaluation it does nothing.

        Args:
            loss: a scalar with a graph, not scaled.
            outputs: the model's outputs, as for :meth:`backward`.

        >>> from optimizers import AdaHessian, SOAA
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> body, head = AdaHessian(model[0].parameters()), SOAA(model[2].parameters())
        >>> loss = model(torch.ones(2, 3)).square().mean()
        >>> body.observe(loss)
        >>> head.backward(loss)
        >>> body.step(), head.step()
        (None, None)
        """
        if not self._in_trial:
            self._take_in(loss, outputs)
            self._pending.knows_scale = True

    def _take_in(self, loss: Tensor, outputs: Any, *, gives_gradient: bool = False) -> bool:
        """Measure what the curvature needs and note the loss; whether its graph must live on till the step."""
        check_loss(loss, outputs)
        if self._pending.backwards and all(p.grad is None for p in self._params):
            self._forget()  # the gradients were cleared behind this optimizer's back: so are the observations
        keeps = False
        if self.needs.graph and self._due():
            keeps = self._measure(loss, outputs, gives_gradient and Needs.HVP in self.needs)
        self._pending.add_loss(loss)
        return keeps

    def _measure(self, loss: Tensor, outputs: Any, gives_gradient: bool) -> bool:
        """Statistics of the curvature from the loss's graph; whether the graph must live on till the step."""
        ranks = find_ranks(self._params, self.process_group)
        # What an estimator proves and draws from outputs makes no sense of NaN, and the step will be skipped. All ranks
        # pass it over together: those that measure may wait for each other.
        if self.needs.outputs and not ranks.all(loss.detach().isfinite().all()):
            self._pending.diverged = True
            return False
        gives_gradient = gives_gradient and may_share(loss, self._params)
        graph = LossGraph(
            loss,
            self._params,
            outputs,
            gives_gradient=gives_gradient,
            beside_outputs=self.beside_outputs,
        )
        apart = not_the_backward_pass(loss) if ranks.groups else nullcontext()
        with apart, torch.enable_grad(), ranks.dividing(), Autocast.found(self._params[0].device).set_aside():
            statistics = self.curvature.measure(self._curvature_state, graph)  # type: ignore[attr-defined]
        self._pending.add_statistics(statistics)
        if getattr(self.curvature, "keeps_graph", False):
            self._pending.graphs.append(graph)
            return True
        if graph.spent:
            self._pending.gradient = graph.formed
        graph.release()
        return False

    def _forget(self) -> None:
        """Drop what ``backward`` observed and no step used."""
        self._pending.discard()
        self._curvature_state.pop(TRANSIENT, None)

    def _due(self) -> bool:
        due = getattr(self.curvature, "due", None)
        return True if due is None else bool(due(self._curvature_state))
