"""Configuration files in TOML or YAML: one ablation, or a study of the same cells on several workloads."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from optimizers.ablation.cell import Cell, freeze
from optimizers.ablation.config import Ablation
from optimizers.ablation.errors import AblationError, unknown_name

# key -> type as a user writes it
_LISTS = {"optimizers": str, "curvature": str, "trust_region": str, "learning_rates": float}
_SCALARS: dict[str, type] = {
    "workload": str,
    "steps": int,
    "batch_size": int,
    "schedule": str,
    "warmup": float,
    "evaluations": int,
    "evaluation_samples": int,
    "threads": int,
    "workers": int,
    "device": str,
    "dtype": str,
    "tune": int,
    "tune_seed": int,
    "extensions": int,
    "interleave": bool,
    "storage": str,
}
_CELL_KEYS = ("title", "optimizer", "curvature", "trust_region", "options", "replay")
_WORDS = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
Table = tuple[str, int]  # the second ``[[cells]]`` is ("cells", 1); the top level is ("", 0)
TOP: Table = ("", 0)


@dataclass(frozen=True)
class _Source:
    path: Path
    text: str = field(repr=False)

    @property
    def is_yaml(self) -> bool:
        return self.path.suffix.lower() in (".yaml", ".yml")

    def content(self) -> dict[str, Any]:
        if self.is_yaml:
            return self._yaml()
        try:
            return tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            raise self._not_toml(str(error)) from error

    def _not_toml(self, problem: str) -> AblationError:
        found = re.fullmatch(r"(.*) \(at line (\d+), (column \d+)\)", problem)
        if found is None:  # at the end of the document
            return AblationError(f"{self.path}, line {len(self.text.splitlines())}: not TOML: {problem}")
        what, line, column = found.groups()
        key = re.match(r"\s*([\w\"'.-]+)\s*=", (self.text.splitlines() or [""])[int(line) - 1])
        named = f"{key[1]}: " if key else ""
        return AblationError(f"{self.path}, line {line}: {named}not TOML: {what} ({column})")

    def _yaml(self) -> dict[str, Any]:
        import yaml  # type: ignore[import-untyped]

        try:
            found = yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            # what is never closed is found at the end of the file, and to be mended where it opens
            opened = getattr(error, "context_mark", None) if "stream end" in problem else None
            mark = opened or getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark is not None else ""
            raise AblationError(f"{self.path}{where}: not YAML: {problem}") from error
        if not isinstance(found, dict):
            raise AblationError(
                f"{self.path}, line 1: must be a mapping of keys to values, got {found!r:.60}"
            )
        return {str(key): value for key, value in found.items()}

    def error(self, key: str, problem: str, table: Table = TOP) -> AblationError:
        return AblationError(f"{self.path}, line {self.line(key, table)}: {key}: {problem}")

    def line(self, key: str, table: Table) -> int:
        """The line of a key at the top level, or in one of several tables of a name."""
        return self._yaml_line(key, table) if self.is_yaml else self._toml_line(key, table)

    def _toml_line(self, key: str, table: Table) -> int:
        current, counts = TOP, dict[str, int]()
        for number, line in enumerate(self.text.splitlines(), start=1):
            header = re.match(r"\s*\[\[\s*(\w+)\s*\]\]", line)
            if header:
                name = header[1]
                counts[name] = counts.get(name, -1) + 1
                current = (name, counts[name])
            opens = current == table or (header and table == TOP)
            if opens and re.search(rf"""(^|[\s,{{\[])["']?{re.escape(key)}["']?\s*[=\]]""", line):
                return number
        return 1

    def _yaml_line(self, key: str, table: Table) -> int:
        import yaml

        node = yaml.compose(self.text)
        if table != TOP:
            name, index = table
            for key_node, value in node.value:
                if key_node.value == name and isinstance(value, yaml.SequenceNode):
                    node = value.value[index]
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.value == key:
                return int(key_node.start_mark.line) + 1
        return int(node.start_mark.line) + 1


def studies() -> dict[str, str]:
    """Return the configurations that come with this package: names, and the first line of each.

    >>> sorted(studies())
    ['controls', 'first-order', 'study']
    """
    folder = resources.files("optimizers.ablation").joinpath("studies")
    return {
        Path(entry.name).stem: entry.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def find(name: str | Path) -> Path:
    """Return the path of a configuration: a file, or the name of one that comes with this package."""
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    if path.name in studies():
        return Path(str(resources.files("optimizers.ablation").joinpath("studies", f"{path.name}.toml")))
    raise unknown_name("configuration", path.name, studies())


def read_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Ablation:
    """Read an ablation from a TOML or YAML file.

    Args:
        path: the file, or the name of a configuration that comes with this package.
        overrides: values that replace the file's, such as those of the command line.

    Returns:
        The configuration.

    Raises:
        AblationError: with the line and the key of what cannot be read, or where the file names several workloads.
    """
    found = read_study(path, overrides)
    if len(found) > 1:
        raise AblationError(
            f"{path} names {len(found)} workloads: read it with read_study, or choose one with workload="
        )
    return found[0]


def read_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> tuple[Ablation, ...]:
    """Read an ablation for each ``[[workloads]]`` table of a TOML or YAML file, which overrides the keys above it.

    Args:
        path: the file, or the name of a configuration that comes with this package.
        overrides: values that replace the file's; ``workload`` chooses one table.

    Returns:
        The configurations; a single one where there is no such table.

    Raises:
        AblationError: with the line and the key of what cannot be read.
    """
    path, given = find(path), dict(overrides or {})
    try:
        source = _Source(path, path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise AblationError(f"cannot read configuration {path}: {error}") from error
    content = source.content()
    tables = content.pop("workloads", None)
    shared = {key: _value(source, key, value) for key, value in content.items()}
    if tables is None:
        return (_ablation(source, shared, given, TOP),)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise source.error("workloads", "must be written as [[workloads]] tables")
    found = []
    for number, table in enumerate(tables):
        place = ("workloads", number)
        own = {key: _value(source, key, value, place) for key, value in table.items()}
        if "workload" not in own:
            raise source.error(next(iter(table), "workloads"), "its table names no workload", place)
        if given.get("workload", own["workload"]) == own["workload"]:
            found.append(_ablation(source, {**shared, **own}, given, place))
    if not found:
        found = [_ablation(source, shared, given, TOP)]
    names = [ablation.workload for ablation in found]
    repeated = next((number for number, name in enumerate(names) if name in names[:number]), None)
    if repeated is not None:
        raise source.error("workload", f"{names[repeated]!r} has a table already", ("workloads", repeated))
    return tuple(found)


def _ablation(source: _Source, values: dict[str, Any], overrides: dict[str, Any], place: Table) -> Ablation:
    try:
        return Ablation(**{**values, **overrides})
    except AblationError as error:
        blamed = [n for n in values if re.match(rf"{n}\b", str(error)) and n not in overrides]
        if not blamed:
            raise
        line = source.line(blamed[0], place)
        if not re.search(
            rf"\b{blamed[0]}\b", source.text.splitlines()[line - 1]
        ):  # it stands above the tables
            line = source.line(blamed[0], TOP)
        raise AblationError(f"{source.path}, line {line}: {error}") from error


def _check_names(source: _Source, key: str, names: Sequence[str], table: Table) -> None:
    """Raise AblationError, with its line, for a name that does not exist."""
    from optimizers.ablation import adapter, workload

    try:
        for name in names:
            if key == "workload":
                workload.get(name)
            elif key == "optimizers":
                adapter.check_names(Cell.parse(name))
            elif name not in (known := adapter.available()[{"optimizer": "optimizers"}.get(key, key)]):
                raise unknown_name(key.replace("_", " "), name, known)
    except AblationError as error:
        raise source.error(key, str(error), table) from error


def _value(source: _Source, key: str, value: object, table: Table = TOP) -> object:
    if key in _SCALARS:
        scalar = _typed(source, key, value, _SCALARS[key], table)
        if key == "workload":
            _check_names(source, key, [scalar], table)
        return scalar
    if key in _LISTS:
        if not isinstance(value, list):
            raise source.error(key, f"must be a list, got {value!r}", table)
        items = tuple(_typed(source, key, item, _LISTS[key], table) for item in value)
        if _LISTS[key] is str:
            _check_names(source, key, items, table)
        return items
    if key == "seeds":
        if isinstance(value, list):
            return tuple(_typed(source, key, item, int, table) for item in value)
        return _typed(source, key, value, int, table)
    if key == "cells" and table == TOP:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise source.error(key, "must be written as [[cells]] tables")
        return tuple(_cell(source, ("cells", number), item) for number, item in enumerate(value))
    known = [*_SCALARS, *_LISTS, "seeds", *(("cells", "workloads") if table == TOP else ())]
    raise source.error(key, str(unknown_name("key", key, known)), table)


def _typed(source: _Source, key: str, value: object, kind: type, table: Table) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        hint = ", written 1.0e-3" if source.is_yaml and kind is float and isinstance(value, str) else ""
        raise source.error(key, f"must be {_WORDS[kind]}{hint}, got {value!r}", table)
    return value


def _cell(source: _Source, table: Table, content: Mapping[str, Any]) -> Cell:
    for key, value in content.items():
        if key not in _CELL_KEYS:
            raise source.error(key, str(unknown_name("key of a cell", key, _CELL_KEYS)), table)
        if key == "options" and not isinstance(value, dict):
            raise source.error(key, f"must be a table such as {{gamma = 0.2}}, got {value!r}", table)
        if key != "options" and not isinstance(value, str):
            raise source.error(key, f"must be text in quotes, got {value!r}", table)
        if key in ("optimizer", "curvature", "trust_region") and value:
            _check_names(source, key, [value], table)
    try:
        names = {key: content.get(key, "") for key in _CELL_KEYS if key != "options"}
        key = "options" if "options" in content else next(iter(content), "cells")
        written = f"{source.path}, line {source.line(key, table)}: {key}"
        return Cell(**names, options=freeze(content.get("options", {})), source=written)
    except AblationError as error:
        first = next(iter(content), "cells")
        raise source.error(first, str(error), table) from error
