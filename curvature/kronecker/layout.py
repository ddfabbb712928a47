"""Which parameters form which block: decided once, from the model and the parameters alone.

Nothing here holds a tensor or a module: a layout is copied and pickled with its estimator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from curvature.kronecker.rules import Dims, LayerRule, ScaleRule, rule_for


@dataclass(frozen=True)
class Block:
    """One Kronecker block [W, b], or W or b alone where only one of them is trained.

    Args:
        rule: how its layer is read.
        dims: groups, d_out, d_in of the weight.
        modules: the names of the modules that use it; several where a weight is tied.
        weight: index of the weight among the parameters, or ``None``.
        bias: index of the bias among the parameters, or ``None``.
        transposed: the block that the uses of the same weight with exchanged sides would form, or ``None``: those of an
            embedding that is tied to the head, whose rows are the head's outputs.
        is_transposed: whether this is such a block of another.
    """

    rule: LayerRule
    dims: Dims
    modules: tuple[str, ...]
    weight: int | None
    bias: int | None
    transposed: Block | None = None
    is_transposed: bool = False

    @property
    def root(self) -> int:
        """The parameter at whose place the block's state is kept."""
        index = self.bias if self.weight is None else self.weight
        assert index is not None
        return index

    @property
    def members(self) -> tuple[int, ...]:
        """The block's parameters."""
        return tuple(i for i in (self.weight, self.bias) if i is not None)

    @property
    def diagonal_input(self) -> bool:
        """Whether A is diagonal and kept as a vector."""
        return self.rule.diagonal_input and self.weight is not None

    @property
    def size_in(self) -> int:
        """Rows of A: d_in, one more for the bias, 1 for a bias alone."""
        return (0 if self.weight is None else self.dims.d_in) + (0 if self.bias is None else 1)


@dataclass(frozen=True)
class ScaleLayer:
    """A layer of scales and shifts, whose diagonal comes from its own inputs.

    Args:
        rule: how it is read.
        module: its name.
        parameters: the names of its trained parameters, and their indices.
    """

    rule: ScaleRule
    module: str
    parameters: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Layout:
    """The blocks of a model, and what is left to the diagonal.

    Args:
        names: the parameters' names, in order.
        shapes: their shapes.
        blocks: Kronecker blocks.
        diagonal: indices of the parameters treated by the diagonal.
        scales: those of them whose diagonal has a rule.
        reasons: for what fell back, why: ``"'norm' (LayerNorm)": "no rule"``.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    blocks: tuple[Block, ...]
    diagonal: tuple[int, ...]
    scales: tuple[ScaleLayer, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def with_transposed(self) -> tuple[Block, ...]:
        """The blocks, each followed by its transposed one."""
        pairs = ((b, b.transposed) for b in self.blocks)
        return tuple(b for pair in pairs for b in pair if b is not None)

    @property
    def watched(self) -> tuple[str, ...]:
        """The modules whose calls must be recorded."""
        blocks = [b.rule.watch(m) for b in self.with_transposed for m in b.modules]
        return tuple(dict.fromkeys([*blocks, *(s.module for s in self.scales)]))


@dataclass
class _Use:
    module: str
    rule: LayerRule
    dims: Dims
    weight: int | None
    bias: int | None


def build_layout(
    model: nn.Module, params: Sequence[Tensor], exclude: Sequence[str] = (), max_dim: int | None = None
) -> Layout:
    """Sort the parameters into blocks.

    Args:
        model: whose modules use them.
        params: the trained parameters, in the optimizer's order.
        exclude: names of modules (with all below them) left to the diagonal.
        max_dim: the largest factor; a layer that needs a larger one is left to the diagonal.

    Raises:
        ValueError: for a parameter that is not the model's, or an excluded name that is no module's.
    """
    index = {id(p): i for i, p in enumerate(params)}
    named = {id(p): name for name, p in model.named_parameters()}
    foreign = [i for i, p in enumerate(params) if id(p) not in named]
    if foreign:
        raise ValueError(
            f"the parameter at position {foreign[0]} (shape {tuple(params[foreign[0]].shape)}) is not one of the "
            "model's: give the estimator the model whose parameters are optimized"
        )
    modules = dict(model.named_modules())
    unknown = [name for name in exclude if name not in modules]
    if unknown:
        raise ValueError(f"exclude must name modules of the model, got {unknown[0]!r}")
    uses: list[_Use] = []
    scales: list[ScaleLayer] = []
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        own = [index[id(p)] for p in module._parameters.values() if p is not None and id(p) in index]
        if not own:
            continue
        label = f"{name or 'the model'!r} ({type(module).__name__})"
        rule = rule_for(module)
        if isinstance(rule, ScaleRule):
            held = {
                n: index[id(p)] for n, p in module._parameters.items() if p is not None and id(p) in index
            }
            known = tuple((n, i) for n, i in held.items() if n in (rule.scale, rule.shift))
            scales.append(ScaleLayer(rule, name, known))
            continue
        found, why = _uses(name, module, rule, index, exclude, max_dim)
        uses += found
        if why:
            reasons[label] = why
        elif any(i not in {j for use in found for j in (use.weight, use.bias)} for i in own):
            reasons[label] = "parameters that its rule does not know"
    blocks = _merge(_with_known_sharers(uses, modules, index, reasons), reasons)
    covered = {i for b in blocks for i in b.members}
    rest = tuple(i for i in range(len(params)) if i not in covered)
    shared = [i for s in scales for _, i in s.parameters]
    alone = [
        s for s in scales if s.parameters and all(shared.count(i) == 1 and i in rest for _, i in s.parameters)
    ]
    names, shapes = tuple(named[id(p)] for p in params), tuple(p.shape for p in params)
    return Layout(names, shapes, tuple(blocks), rest, tuple(alone), reasons)


def _uses(
    name: str,
    module: nn.Module,
    rule: LayerRule | None,
    index: dict[int, int],
    exclude: Sequence[str],
    max_dim: int | None,
) -> tuple[list[_Use], str]:
    """The uses of a module's weights, and why some of them are left to the diagonal."""
    found, reasons = [], []
    for part in (None,) if rule is None else rule.parts(module):
        use, reason = _use(name, module, part, index, exclude, max_dim)
        if use is not None:
            found.append(use)
        else:
            reasons.append(reason)
    left = [r for r in reasons if r != "no rule"]
    return found, left[0] if left else "" if found else "no rule"


def _use(
    name: str,
    module: nn.Module,
    rule: LayerRule | None,
    index: dict[int, int],
    exclude: Sequence[str],
    max_dim: int | None,
) -> tuple[_Use | None, str]:
    if any(name == e or name.startswith(e + ".") for e in exclude):
        return None, "excluded"
    if rule is None:
        return None, "no rule"
    weight, bias = (module._parameters.get(n) if n else None for n in (rule.weight, rule.bias))
    if weight is None and getattr(module, rule.weight, None) is not None:
        return None, "its weight is computed from other parameters"
    refused = rule.refuse(module)
    if refused is not None:
        return None, refused
    dims = rule.dims(module)
    use = _Use(
        name,
        rule,
        dims,
        None if weight is None else index.get(id(weight)),
        None if bias is None else index.get(id(bias)),
    )
    if use.weight is None and use.bias is None:
        return None, "no rule"
    largest = max(dims.d_out, 0 if rule.diagonal_input or use.weight is None else dims.d_in + 1)
    if max_dim is not None and largest > max_dim:
        return None, f"a factor of {largest} rows, above max_dim={max_dim}"
    return use, ""


def _merge(uses: list[_Use], reasons: dict[str, str]) -> list[Block]:
    """One block a weight: modules that share it are its calls. Biases join it only where all sharers agree.

    An embedding tied to a head uses the head's matrix with its sides exchanged; the head's bias then stands alone.
    """
    by_weight: dict[int, list[_Use]] = {}
    by_bias: dict[int, list[_Use]] = {}
    for use in uses:
        if use.weight is not None:
            by_weight.setdefault(use.weight, []).append(use)
        if use.bias is not None:
            by_bias.setdefault(use.bias, []).append(use)
    blocks, alone = [], dict(by_bias)
    for weight, sharers in by_weight.items():
        first = sharers[0]
        exchanged: Block | None = None
        if any((u.rule, u.dims) != (first.rule, first.dims) for u in sharers):
            pair = _exchanged_sides(sharers)
            if pair is None:
                label = ", ".join(repr(u.module) for u in sharers)
                reasons[label] = "a weight that layers of different kinds share"
                continue
            sharers, exchanged = pair
            first = sharers[0]
        bias = first.bias
        if bias is not None and by_bias[bias] == sharers and exchanged is None:
            del alone[bias]
        else:
            bias = None
        names = tuple(u.module for u in sharers)
        blocks.append(Block(first.rule, first.dims, names, weight, bias, exchanged))
    for bias, sharers in alone.items():
        first = sharers[0]
        blocks.append(Block(first.rule, first.dims, tuple(u.module for u in sharers), None, bias))
    return sorted(blocks, key=lambda b: b.root)


def _exchanged_sides(sharers: list[_Use]) -> tuple[list[_Use], Block] | None:
    """(the linear uses, the block of the embeddings) where these exchange the sides of one matrix, else ``None``."""
    embeddings = [u for u in sharers if u.rule.diagonal_input]
    linear = [u for u in sharers if not u.rule.diagonal_input]
    if not embeddings or not linear:
        return None
    one, other = linear[0], embeddings[0]
    for some in (linear, embeddings):
        if any((u.rule, u.dims) != (some[0].rule, some[0].dims) for u in some):
            return None
    if (one.dims.groups, one.dims.d_out, one.dims.d_in) != (1, other.dims.d_in, other.dims.d_out):
        return None
    weight = torch.empty(other.dims.d_in, other.dims.d_out, device="meta")
    here, there = one.rule.to_matrix(weight, one.dims)[0], other.rule.to_matrix(weight, other.dims)[0].T
    if (here.shape, here.stride()) != (there.shape, there.stride()):
        return None
    names = tuple(u.module for u in embeddings)
    return linear, Block(other.rule, other.dims, names, other.weight, None, is_transposed=True)


def _with_known_sharers(
    uses: list[_Use], modules: Mapping[str, nn.Module], index: Mapping[int, int], reasons: dict[str, str]
) -> list[_Use]:
    """The uses of parameters all of whose modules form uses; a parameter that another module reads is left alone."""
    treated = {u.module for u in uses}
    elsewhere = {
        index[id(p)]: name
        for name, module in modules.items()
        if name not in treated
        for p in module._parameters.values()
        if p is not None and id(p) in index
    }
    kept = []
    for use in uses:
        shared = [elsewhere[i] for i in (use.weight, use.bias) if i is not None and i in elsewhere]
        if shared:
            reasons[repr(use.module)] = f"a parameter of it is also that of {shared[0]!r}"
        else:
            kept.append(use)
    return kept
