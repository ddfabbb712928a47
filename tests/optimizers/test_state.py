"""Checkpoints: what survives, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import ast
import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optimizers
from optimizers import SOAA, SecondOrder, available, build
from optimizers.ablation.errors import AblationError
from optimizers.ablation.store import Store


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


def train(model: torch.nn.Module, optimizer: SecondOrder, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(10, 6, generator=generator).to(dtype)
        y = torch.randint(0, 3, (10,), generator=generator)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            outputs = model(x)
            loss = torch.nn.functional.cross_entropy(outputs, y)
            optimizer.backward(loss, outputs)
            return loss

        optimizer.step(closure)


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", available()["optimizers"])
def test_resume_through_disk_is_bit_exact(name: str) -> None:
    """Radius, running loss, prediction, probe counters and Kronecker factors included: the next steps agree."""
    model, other = network(), network()
    optimizer = build(model, name)
    train(model, optimizer, range(7))
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other.load_state_dict(saved["model"])
    resumed = build(other, name)
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(7, 12))
    train(other, resumed, range(7, 12))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(optimizer.step_info.radius.nan_to_num(), resumed.step_info.radius.nan_to_num())


def test_float32_state_of_bfloat16_parameters_survives() -> None:
    model = network(torch.bfloat16)
    optimizer = SOAA(model.parameters(), lr=1e-2, total_steps=10)
    train(model, optimizer, range(3))
    second = SOAA(model.parameters(), lr=1e-2, total_steps=10)
    second.load_state_dict(through_disk(optimizer.state_dict()))
    for p in model.parameters():
        for name, value in optimizer.state[p].items():
            assert second.state[p][name].dtype == torch.float32, name
            assert torch.equal(second.state[p][name], value), name
            assert second.state[p][name] is not value
        assert not torch.equal(second.state[p]["momentum"], second.state[p]["momentum"].bfloat16().float())


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not a dict": lambda s: [1, 2],
    "no state": lambda s: {"param_groups": s["param_groups"]},
    "no groups": lambda s: {"state": s["state"]},
    "a model's state_dict": lambda s: {"0.weight": torch.zeros(2)},
    "fewer parameters": lambda s: {**s, "param_groups": [{**s["param_groups"][0], "params": [0, 1]}]},
    "a parameter without state": lambda s: {**s, "state": {k: v for k, v in s["state"].items() if k != 2}},
    "a stranger's state": lambda s: {**s, "state": {**s["state"], 99: {}}},
    "state that is no dict": lambda s: {**s, "state": {**s["state"], 1: 3}},
    "a wrong shape": lambda s: edit(s, 1, "momentum", torch.zeros(3)),
    "a wrong kind": lambda s: edit(s, 1, "momentum", torch.zeros(8, dtype=torch.int64)),
    "a string": lambda s: edit(s, 3, "step", "1"),
    "a missing entry": lambda s: edit(s, 0, "trust_region/radius", None),
    "a sparse tensor": lambda s: edit(s, 1, "momentum", torch.zeros(8).to_sparse()),
    "a tensor without values": lambda s: edit(s, 1, "momentum", torch.zeros(8, device="meta")),
    "a count too large for a float": lambda s: edit(s, 1, "step", 10**400),
    "parameters that are lists": lambda s: {
        **s,
        "param_groups": [{**s["param_groups"][0], "params": [[0], [1], [2], [3]]}],
    },
    "a parameter twice": lambda s: {
        "state": {0: s["state"][0], 1: s["state"][1], 3: s["state"][3]},
        "param_groups": [{**s["param_groups"][0], "params": [0, 1, 1, 3]}],
    },
    "a NaN in a tensor": lambda s: edit(s, 1, "momentum", torch.full((8,), float("nan"))),
    "a radius below zero": lambda s: edit(s, 0, "trust_region/radius", torch.tensor(-1.0)),
    "a radius that is NaN": lambda s: edit(s, 0, "trust_region/radius", torch.tensor(float("nan"))),
    "a running loss that is NaN": lambda s: edit(s, 0, "trust_region/running_loss", float("nan")),
    "a count below zero": lambda s: edit(s, 2, "step", torch.tensor(-3.0)),
    "an infinite count": lambda s: edit(s, 0, "trust_region/losses_seen", float("inf")),
    "an unknown entry": lambda s: edit(s, 3, "surprise", torch.zeros(())),
    "a negative lr": lambda s: {**s, "param_groups": [{**s["param_groups"][0], "lr": -1.0}]},
    "an lr that is text": lambda s: {
        **s,
        "param_groups": [{**s["param_groups"][0], "lr": "__import__('os')"}],
    },
    "a momentum out of range": lambda s: {**s, "param_groups": [{**s["param_groups"][0], "momentum": 1.5}]},
}


def edit(state: dict[str, Any], parameter: int, name: str, value: Any) -> dict[str, Any]:
    entries = dict(state["state"][parameter])
    entries[name] = value
    if value is None:
        del entries[name]
    return {**state, "state": {**state["state"], parameter: entries}}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.replace(" ", "-"))
def test_damaged_checkpoint_is_a_clear_error_and_changes_nothing(damage: str) -> None:
    model, other = network(), network()
    source, target = SOAA(model.parameters()), SOAA(other.parameters(), lr=5e-2)
    train(model, source, range(3))
    train(other, target, range(2))
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError) as error:
        target.load_state_dict(DAMAGES[damage](source.state_dict()))
    assert len(str(error.value)) > 20
    after = target.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entries in before["state"].items():
        assert entries.keys() == after["state"][i].keys()
        assert all(torch.equal(entries[k], after["state"][i][k]) for k in entries)
    train(other, target, range(2, 4))


@pytest.mark.parametrize("name", available()["optimizers"])
def test_every_entry_of_every_preset_is_checked(name: str) -> None:
    """One entry at a time of another shape, missing, or text: an error that names it, and nothing changed."""
    model, other = network(), network()
    source, target = build(model, name), build(other, name)
    train(model, source, range(2))
    good = source.state_dict()
    before = copy.deepcopy(target.state_dict())
    for i, entries in good["state"].items():
        for entry, value in entries.items():
            wrong = torch.zeros((*value.shape, 2)) if torch.is_tensor(value) else "1"
            for damaged in (wrong, None, "__import__('os')", [1.0]):
                if entry == "skipped_steps" and damaged is None:
                    continue  # an entry that older checkpoints lack
                with pytest.raises(ValueError, match=entry):
                    target.load_state_dict(edit(good, i, entry, damaged))
    after = target.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for i, entries in before["state"].items():
        for entry, value in entries.items():
            torch.testing.assert_close(value, after["state"][i][entry], rtol=0, atol=0, equal_nan=True)
    target.load_state_dict(good)


def test_checkpoint_of_another_composition_is_refused() -> None:
    a, b = network(), network()
    with pytest.raises(ValueError, match="another composition"):
        build(a, "adahessian").load_state_dict(build(b, "soaa").state_dict())


def test_state_of_another_precision_is_taken_in_this_ones() -> None:
    wide, narrow = network(torch.float64), network()
    source, target = SOAA(wide.parameters()), SOAA(narrow.parameters())
    train(wide, source, range(3))
    target.load_state_dict(source.state_dict())
    assert {x.dtype for e in target.state.values() for x in e.values()} == {torch.float32}
    train(narrow, target, range(3, 5))


class Bomb:
    """What a hostile checkpoint does when it is unpickled."""

    fired = False

    def __reduce__(self) -> Any:
        return (setattr, (Bomb, "fired", True))


def test_hostile_checkpoint_is_an_error_not_code() -> None:
    state = SOAA(network().parameters()).state_dict()
    state["state"][0]["step"] = Bomb()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    assert not Bomb.fired
    with pytest.raises(ValueError):
        SOAA(network().parameters()).load_state_dict(state)
    assert not Bomb.fired


#: Modules that turn data into code, and calls that do.
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "imp", "code"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
#: Checks that optimizers and estimators survive pickling; they read no file but their own buffer.
PICKLING_CHECKS = {"optimizers/testing.py", "curvature/testing"}


def unsafe(source: str) -> list[str]:
    """Lines of a module that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            if UNSAFE_MODULES & {n.partition(".")[0] for n in names}:
                found.append(ast.unparse(node))
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
            found.append(ast.unparse(node))
        if isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            if name == "torch.load" and given.get("weights_only") is not True:
                found.append(ast.unparse(node))
            if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"):
                found.append(ast.unparse(node))
            if given.get("allow_pickle") or given.get("shell"):
                found.append(ast.unparse(node))
    return found


def test_no_pickle_and_no_eval_where_files_are_read() -> None:
    root = Path(optimizers.__file__).parents[1]
    seen = 0
    for package in ("curvature", "trust_region", "optimizers"):
        for path in (root / package).rglob("*.py"):
            if any(path.relative_to(root).as_posix().startswith(p) for p in PICKLING_CHECKS):
                continue
            seen += 1
            assert not unsafe(path.read_text()), path
    assert seen > 100


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(file)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_would_run_a_file_is_found(line: str) -> None:
    assert unsafe(line)
    assert not unsafe("torch.load(path, weights_only=True)\nyaml.safe_load(file)\njson.loads(text)")


def test_hostile_run_folder_is_an_error_not_code(tmp_path: Path) -> None:
    """Pickles in the place of records, of the marker, and of a checkpoint for the spectrum."""
    store = Store(tmp_path / "runs")
    bomb = pickle.dumps(Bomb())
    (store.runs / "abc.json").write_bytes(bomb)
    with pytest.raises(AblationError, match=r"abc\.json"):
        store.load("abc")
    (tmp_path / "outside.json").write_text('{"result": {}}')
    for key in ("../../outside", str(tmp_path / "outside"), "*", "x" * 5000, "\0"):
        with pytest.raises(AblationError, match="no finished run"):
            store.load(key)
    for text in (
        "[" * 100_000,
        '{"result": 1}',
        '{"result": {}, "trace": "x"}',
        '{"result": {}, "environment": []}',
    ):
        (store.runs / "abc.json").write_text(text)
        with pytest.raises(AblationError, match=r"abc\.json"):
            store.load("abc")
    (store.folder / "ablation.json").write_bytes(bomb)
    with pytest.raises(AblationError, match=r"ablation\.json"):
        Store(tmp_path / "runs")
    (tmp_path / "model.pt").write_bytes(bomb)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "model.pt", weights_only=True)
    assert not Bomb.fired


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
