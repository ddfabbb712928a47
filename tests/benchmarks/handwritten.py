"""SOAA's equations written down once more and compiled, without any of the framework: what composition is measured by.

Two passes over memory as in ``optimizers.compiled``, over whole tensors: every tensor is a row matrix of its own, and
small ones are not batched. Numbers are baked in where the framework reads them from a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BETA_1, BETA_2, EPS, GAMMA = 0.9, 0.999, 1e-8, 0.1
WIDTH = 1024


def _sums(g: list[Tensor], m: list[Tensor], v: list[Tensor], c2: Tensor, d: Tensor, k: Tensor) -> Tensor:
    found = []
    for g_i, m_i, v_i in zip(g, m, v, strict=True):
        moment = v_i * c2
        rms = moment.sqrt()
        u = m_i / (torch.maximum(k * moment, rms) + EPS)
        m_new = m_i + (g_i - m_i) * (1.0 - BETA_1)
        v_new = v_i * BETA_2 + g_i * g_i * (1.0 - BETA_2)
        parts = (m_new * m_new, v_new, g_i * 0.0, m_i * u, moment * u * u)
        found.append(torch.stack([x.sum(1).sum() for x in parts]))
    return torch.stack(found).sum(0)


def _move(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    c2: Tensor,
    k: Tensor,
    eta: Tensor,
    ok: Tensor,
) -> None:
    for p_i, g_i, m_i, v_i in zip(p, g, m, v, strict=True):
        m_new = m_i + (g_i - m_i) * (1.0 - BETA_1)
        v_new = v_i * BETA_2 + g_i * g_i * (1.0 - BETA_2)
        moment = v_new * c2
        u = m_new / (torch.maximum(k * moment, moment.sqrt()) + EPS)
        moved = p_i - eta * u
        m_i.copy_(torch.where(ok, m_new, m_i))
        v_i.copy_(torch.where(ok, v_new, v_i))
        p_i.copy_(torch.where(ok, moved, p_i))


class HandwrittenSOAA:
    """SOAA for contiguous tensors of one dtype and a multiple of 1024 elements; others are taken whole rows only.

    Args:
        params: with gradients.
        lr: η.
        total_steps: T.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, total_steps: int) -> None:
        self.params = [p for p in params if p.numel() >= 2 * WIDTH]
        self.lr, self.total_steps, self.t = lr, total_steps, 0
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.moment = [torch.zeros_like(p) for p in self.params]
        like = self.params[0]
        self.size = sum(p.numel() for p in self.params)
        self.d, self.predicted, self.loss, self.scale = (
            torch.full((), x, device=like.device, dtype=like.dtype) for x in (1.0, 0.0, 0.0, 1.0)
        )
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        self._sums: Any = torch.compile(_sums, fullgraph=True, options=options)
        self._move: Any = torch.compile(_move, fullgraph=True, options=options)

    def _rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.detach().view(-1)[: x.numel() // WIDTH * WIDTH].view(-1, WIDTH) for x in tensors]

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """One step; the radius by the paper's rule."""
        self.t += 1
        t = self.t
        c1 = 1.0 / (1.0 - BETA_1**t)
        old = self.mean[0].new_tensor(1.0 / (1.0 - BETA_2 ** max(t - 1, 1)))
        c2 = self.mean[0].new_tensor(1.0 / (1.0 - BETA_2**t))
        before = 1.0 / (1.0 - BETA_1 ** max(t - 1, 1))
        rows = [self._rows(x) for x in (self.params, [p.grad for p in self.params], self.mean, self.moment)]  # type: ignore[misc]
        sums = self._sums(*rows[1:], old, self.d, self.d * self.scale)
        ok = sums[2] == 0.0
        predicted = self.lr * self.d * (before * before * sums[3] - 0.5 * self.d * before * before * sums[4])
        if t > 1:
            self.predicted = predicted
        self.scale = 1.0 + sums[0] * (c1 * c1) / (sums[1] * c2 + EPS * self.size)
        eta = self.lr * c1 * self.d
        self._move(*rows, c2, self.d * self.scale, eta, ok)
        self.loss.lerp_(loss, 1.0 - BETA_1)
        ratio = (self.loss / (1.0 - BETA_1**t) - loss) / self.predicted.clamp(min=EPS)
        power = (t - 1) / self.total_steps
        self.d = (ratio * self.d).clamp((1.0 - GAMMA) ** power, 1.0 + GAMMA**power)
