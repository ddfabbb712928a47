"""A cell of the ablation: which optimizer, or which curvature with which trust region, and its options."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from optimizers.ablation.errors import AblationError

OptionValue = bool | int | float | str | tuple["OptionValue", ...]
_SPLIT = re.compile(r",(?![^\[]*\])")  # commas outside of [lists]


@dataclass(frozen=True)
class Cell:
    """One choice that is compared with others; written ``soaa:gamma=0.2`` or ``kfac+levenberg-marquardt``.

    Args:
        optimizer: name of an optimizer; empty for a composition.
        curvature: name of a curvature, where no optimizer is named.
        trust_region: name of a trust region, where no optimizer is named.
        options: what is given to the optimizer besides the learning rate, sorted by name.
        title: what tables call it, where it is not to be called by what it is made of.
        replay: label of another cell, whose recorded radius multiplies the learning rate of this one step by step.
        source: file, line and key that it was read from, for errors; no part of what it is.
    """

    optimizer: str = ""
    curvature: str = ""
    trust_region: str = ""
    options: tuple[tuple[str, OptionValue], ...] = ()
    title: str = ""
    replay: str = ""
    source: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if bool(self.optimizer) == bool(self.curvature) or bool(self.curvature) != bool(self.trust_region):
            raise AblationError(
                "a cell must name an optimizer, or a curvature and a trust region (curvature+trust-region), "
                f"got optimizer={self.optimizer!r} curvature={self.curvature!r} trust_region={self.trust_region!r}"
            )

    @property
    def name(self) -> str:
        """What it is made of, without options: ``soaa`` or ``kfac+levenberg-marquardt``."""
        return self.optimizer or f"{self.curvature}+{self.trust_region}"

    @property
    def label(self) -> str:
        """The title, or the name with its options; `Cell.parse` reads the latter back."""
        if self.title:
            return self.title
        written = [f"{name}={_write(value)}" for name, value in self.options]
        options = ",".join(written + ([f"replay={self.replay}"] if self.replay else []))
        return f"{self.name}:{options}" if options else self.name

    def as_dict(self) -> dict[str, object]:
        """Return what defines the optimizer, for a file; the title, which changes no number, is left out."""
        return {
            "optimizer": self.optimizer,
            "curvature": self.curvature,
            "trust_region": self.trust_region,
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, object], title: str = "") -> Cell:
        """Return the cell that `as_dict` wrote."""
        options = content.get("options", {})
        assert isinstance(options, Mapping)
        return cls(
            str(content.get("optimizer", "")),
            str(content.get("curvature", "")),
            str(content.get("trust_region", "")),
            freeze(options),
            title,
        )

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read a cell as written on the command line.

        Args:
            text: ``name``, ``curvature+trust-region``, either followed by ``:option=value,option=value``.
                Values are written as in TOML; a bare word is a string. ``replay=LABEL`` names the cell to replay.

        Returns:
            The cell; whether its names exist is not checked here.

        Raises:
            AblationError: the text does not have this form.

        >>> Cell.parse("soaa:scope=tensor,gamma=0.2").options
        (('gamma', 0.2), ('scope', 'tensor'))
        >>> Cell.parse("kfac+levenberg-marquardt").trust_region
        'levenberg-marquardt'
        """
        name, _, written = text.strip().partition(":")
        options: dict[str, OptionValue] = {}
        for item in _SPLIT.split(written) if written else []:
            key, equals, value = item.partition("=")
            if not equals or not key.strip().isidentifier() or not value.strip():
                raise AblationError(
                    f"cannot read {item!r} in {text!r}: write options as name:option=value,option=value"
                )
            options[key.strip()] = _read(value.strip())
        replay = str(options.pop("replay", ""))
        first, plus, second = name.partition("+")
        if plus:
            return cls(curvature=first, trust_region=second, options=freeze(options), replay=replay)
        return cls(optimizer=first, options=freeze(options), replay=replay)


def freeze(options: Mapping[str, object]) -> tuple[tuple[str, OptionValue], ...]:
    """Return options as a sorted tuple of pairs, with lists as tuples."""
    return tuple(sorted((str(name), _frozen(value)) for name, value in options.items()))


def grid(curvatures: Iterable[str], trust_regions: Iterable[str]) -> tuple[Cell, ...]:
    """Return every curvature with every trust region, row by row.

    >>> [cell.name for cell in grid(["kfac"], ["fixed", "soaa"])]
    ['kfac+fixed', 'kfac+soaa']
    """
    regions = tuple(trust_regions)
    return tuple(Cell(curvature=row, trust_region=column) for row in curvatures for column in regions)


def _frozen(value: object) -> OptionValue:
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, bool | int | float | str):
        return value
    raise AblationError(f"an option must be a number, a word, true, false or a list of these, got {value!r}")


def _read(text: str) -> OptionValue:
    try:
        return _frozen(tomllib.loads(f"value = {text}")["value"])
    except tomllib.TOMLDecodeError:
        return text


def _write(value: OptionValue) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(_write(item) for item in value) + "]"
    return str(value)
