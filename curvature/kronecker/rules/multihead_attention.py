"""Multi-head attention, which applies its weights by function calls: they are found in the graph.

The packed weight of query, key and value projections is three groups, whatever products compute them: one for all
three in self-attention, two where key and value are the same, three otherwise. Where keys or values have dimensions of
their own (``kdim``, ``vdim``) there are three weights, each a block, and their packed bias is a block of three groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from curvature.kronecker.rules.base import BlockCall, Dims, LayerRule
from curvature.kronecker.rules.registry import register_rule
from curvature.layer_io import Call, Trace, Use

#: What reads a weight; a bias beside a frozen weight may also be added to a product that has no graph.
_PRODUCTS = ("AddmmBackward0", "MmBackward0", "AddBackward0")


def _checked(use: Use, name: str) -> Use:
    if use.node.name() not in _PRODUCTS:
        raise RuntimeError(
            f"{name!r} applies its weight by {use.node.name()}, which has no Kronecker rule: pass exclude=({name!r},) "
            "to treat it by the diagonal"
        )
    return use


def _calls_of(uses: list[Use], calls: list[Call], name: str) -> list[list[Use]]:
    """The uses of each recorded call: a split belongs to one call, an unsplit use is a call of its own."""
    grouped: dict[Node, list[Use]] = {}
    for use in uses:
        grouped.setdefault(use.node if use.split is None else use.split, []).append(_checked(use, name))
    found = sorted(grouped.values(), key=lambda g: g[0].node._sequence_nr())
    if len(found) != len(calls):
        raise RuntimeError(
            f"{len(found)} uses of the weights of {name!r} were found for {len(calls)} calls: pass exclude=({name!r},) "
            "to treat it by the diagonal"
        )
    return found


def _samples_first(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return x if x.dim() == 2 or module.batch_first else x.transpose(0, 1)


def _inner_lead(module: nn.MultiheadAttention, query: Tensor) -> tuple[int, ...]:
    """The shape of positions inside: (L,) or (L, N); the length comes first whatever ``batch_first``."""
    if query.dim() == 2:
        return (query.shape[0],)
    return (query.shape[1], query.shape[0]) if module.batch_first else (query.shape[0], query.shape[1])


class PackedProjectionRule(LayerRule):
    """The query, key and value projections of ``torch.nn.MultiheadAttention``, three groups."""

    layers = (nn.MultiheadAttention,)
    weight = "in_proj_weight"
    bias = "in_proj_bias"

    def parts(self, module: nn.Module) -> tuple[LayerRule, ...]:
        assert isinstance(module, nn.MultiheadAttention)
        return (self,) if module._qkv_same_embed_dim else (*SEPARATE, self)

    def dims(self, module: nn.Module) -> Dims:
        assert isinstance(module, nn.MultiheadAttention)
        return Dims(3, module.embed_dim, module.embed_dim)

    def calls(self, name: str, modules: Mapping[str, nn.Module], trace: Trace) -> list[BlockCall]:
        module = cast(nn.MultiheadAttention, modules[name])
        recorded = trace.calls.get(name, [])
        uses = trace.uses.get(id(module.in_proj_weight), [])
        if (
            not uses and module.in_proj_bias is not None
        ):  # a bias trained alone needs no inputs, only the nodes
            uses = trace.uses.get(id(module.in_proj_bias), [])
        found = []
        for call, parts in zip(recorded, _calls_of(uses, recorded, name), strict=True):
            call.record.check_unchanged()
            inputs = [call.record.argument(k, word) for k, word in enumerate(("query", "key", "value"))]
            for use in parts:
                if use.part is None:
                    groups = (0, 3)
                elif use.part == 1 and len(parts) == 2:
                    groups = (1, 3)
                else:
                    groups = (use.part, use.part + 1)
                x = inputs[groups[0]]
                rows = (groups[1] - groups[0]) * module.embed_dim
                shape = (*_inner_lead(module, x), rows)
                found.append(BlockCall(module, name, (x,), GradientEdge(use.node, 0), shape, groups))
        return found

    def input_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(module, nn.MultiheadAttention)
        return _samples_first(module, inputs[0]).unsqueeze(0)

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        assert isinstance(module, nn.MultiheadAttention)
        if gradient.dim() == 3:
            gradient = gradient.transpose(0, 1)
        split = gradient.reshape(*gradient.shape[:-1], -1, module.embed_dim)
        return split.movedim(-2, 0)


class SeparateProjectionRule(LayerRule):
    """The weight of one projection of ``torch.nn.MultiheadAttention`` with ``kdim`` or ``vdim``."""

    bias = None
    argument: ClassVar[tuple[int, str]]

    def calls(self, name: str, modules: Mapping[str, nn.Module], trace: Trace) -> list[BlockCall]:
        module = cast(nn.MultiheadAttention, modules[name])
        recorded = trace.calls.get(name, [])
        uses = trace.uses.get(id(module.get_parameter(self.weight)), [])
        found = []
        for call, (use,) in zip(recorded, _calls_of(uses, recorded, name), strict=True):
            call.record.check_unchanged()
            x = call.record.argument(*self.argument)
            shape = (*_inner_lead(module, x), module.embed_dim)
            found.append(BlockCall(module, name, (x,), GradientEdge(use.node, 0), shape))
        return found

    def input_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(module, nn.MultiheadAttention)
        return _samples_first(module, inputs[0]).unsqueeze(0)

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        return (gradient.transpose(0, 1) if gradient.dim() == 3 else gradient).unsqueeze(0)


class QueryProjectionRule(SeparateProjectionRule):
    """W_q."""

    weight = "q_proj_weight"
    argument = (0, "query")


class KeyProjectionRule(SeparateProjectionRule):
    """W_k."""

    weight = "k_proj_weight"
    argument = (1, "key")


class ValueProjectionRule(SeparateProjectionRule):
    """W_v."""

    weight = "v_proj_weight"
    argument = (2, "value")


SEPARATE = (QueryProjectionRule(), KeyProjectionRule(), ValueProjectionRule())


class OutputProjectionRule(LayerRule):
    """The output projection of attention: a linear layer whose ``forward`` is never called."""

    layers = (nn.modules.linear.NonDynamicallyQuantizableLinear,)

    def watch(self, name: str) -> str:
        return name.rpartition(".")[0]

    def calls(self, name: str, modules: Mapping[str, nn.Module], trace: Trace) -> list[BlockCall]:
        outer = name.rpartition(".")[0]
        attention, module = modules[outer], cast(nn.Linear, modules[name])
        if not isinstance(attention, nn.MultiheadAttention):
            return super().calls(name, modules, trace)
        recorded = trace.calls.get(outer, [])
        uses = trace.uses.get(id(module.weight), [])
        if not uses and module.bias is not None:  # a bias trained alone needs no inputs, only the node
            uses = trace.uses.get(id(module.bias), [])
        found = []
        for call, (use,) in zip(recorded, _calls_of(uses, recorded, outer), strict=True):
            lead = _inner_lead(attention, call.record.argument(0, "query"))
            shape = (*lead, module.out_features)
            node = use.node
            x = getattr(node, "_saved_mat1" if node.name() == "AddmmBackward0" else "_saved_self", None)
            if x is None:  # not kept for a bias alone
                x = call.record.argument(0, "query").new_zeros(()).expand(*lead, module.in_features)
            x = x.detach().reshape(*lead, -1)
            found.append(BlockCall(attention, name, (x,), GradientEdge(node, 0), shape))
        return found

    def input_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        x = inputs[0]
        return (x.transpose(0, 1) if x.dim() == 3 else x).unsqueeze(0)

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        return (gradient.transpose(0, 1) if gradient.dim() == 3 else gradient).unsqueeze(0)


register_rule(PackedProjectionRule())
register_rule(OutputProjectionRule())
