"""The command ``soaa`` as a user types it: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import optimizers
from optimizers.ablation import Ablation, cli, workload
from optimizers.ablation.config_file import studies

Soaa = Callable[..., tuple[int, str, str]]
SHORT = ("--steps", "3", "--evaluations", "1", "--seeds", "1", "--lr", "0.01")


@pytest.fixture
def soaa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Soaa:
    """Run the command in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for console in (cli.console, cli.errors):
        monkeypatch.setattr(console, "_width", 300)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["soaa", *words])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return code, out, err

    return run


def test_ablate_prints_a_table_and_show_and_report_read_what_it_wrote(soaa: Soaa, tmp_path: Path) -> None:
    code, out, _ = soaa("ablate", "-o", "torch-adamw,torch-sgd", *SHORT, "--out", "here")
    assert code == 0
    assert "torch-adamw" in out
    assert "target: validation loss <=" in out
    (first, second) = sorted(path.stem for path in (tmp_path / "here" / "runs").glob("*.json"))
    code, out, _ = soaa("show", first[:8], "--out", "here")
    assert code == 0
    record = json.loads(out)
    assert record["key"] == first
    assert record["config"]["steps"] == 3
    assert {"torch", "numpy"} <= set(record["environment"]["versions"])
    assert "git_revision" in record["environment"]
    assert soaa("report", "here")[0] == 0
    assert (tmp_path / "here" / "report.html").is_file()
    # again: nothing is made anew
    times = [path.stat().st_mtime_ns for path in (tmp_path / "here" / "runs").iterdir()]
    assert soaa("ablate", "-o", "torch-adamw,torch-sgd", *SHORT, "--out", "here")[0] == 0
    assert [path.stat().st_mtime_ns for path in (tmp_path / "here" / "runs").iterdir()] == times
    assert second in {path.stem for path in (tmp_path / "here" / "runs").iterdir()}


def test_list_names_everything_with_a_line_on_each(soaa: Soaa) -> None:
    code, out, _ = soaa("list")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    listed = {line[1] if line[0] != "trust" else line[2]: line for line in lines if len(line) > 2}
    for name in (
        *workload.names(),
        *studies(),
        *(n for names in optimizers.available().values() for n in names),
    ):
        assert name in listed, name
        assert len(listed[name]) > 3, name  # not without a summary
    assert "`" not in out  # what marks up the pages


def test_help_says_what_every_option_is_by_default_and_every_key_of_a_file_has_one(soaa: Soaa) -> None:
    code, out, _ = soaa("ablate", "--help")
    assert code == 0
    for field in dataclasses.fields(Ablation):
        if field.name in ("cells", "learning_rates", "optimizers", "curvature", "trust_region", "storage"):
            continue  # lists of tables, and those whose option has another name or an empty default
        option = "--" + field.name.replace("_", "-")
        (line,) = (line for line in out.splitlines() if re.match(rf"\W*{option}[ /,]", line))
        own = dict.fromkeys(("steps", "batch_size", "evaluation_samples"), "the workload's")
        default = {**own, "interleave": "--no-interleave"}
        assert str(default.get(field.name, field.default)) in line, line
    assert "(default: four in each written range)" in out


def test_a_file_that_takes_turns_can_be_told_not_to(soaa: Soaa, tmp_path: Path) -> None:
    (tmp_path / "turns.toml").write_text('optimizers = ["torch-sgd"]\ninterleave = true\ntune = 3\n')
    words = ("--no-interleave", "--tune-seed", "7", "--extensions", "0", "--seeds", "1", "--steps", "1")
    assert soaa("ablate", "turns.toml", *words, "--evaluations", "1", "--out", "out")[0] == 0
    written = json.loads((tmp_path / "out" / "configuration.json").read_text())
    assert (written["interleave"], written["tune_seed"], written["extensions"]) == (False, 7, 0)
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 3 + 1


def test_version_is_one_line(soaa: Soaa) -> None:
    code, out, _ = soaa("--version")
    assert code == 0
    assert re.fullmatch(r"soaa \S.*, torch \d\S*, optuna \d\S*\n", out)


def test_the_command_line_overrides_the_file(soaa: Soaa, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'optimizers = ["torch-sgd"]\nlearning_rates = [0.5]\nseeds = 4\nsteps = 900\nwarmup = 0.25\nevaluations = 1\n'
    )
    assert soaa("ablate", "mine.toml", "--steps", "4", "--seeds", "3,8", "--out", "out")[0] == 0
    written = json.loads((tmp_path / "out" / "configuration.json").read_text())
    assert (written["steps"], written["seeds"], written["warmup"]) == (4, [3, 8], 0.25)
    assert written["learning_rates"] == [0.5]


def test_a_run_that_fails_is_exit_code_1_and_the_others_are_kept(
    soaa: Soaa, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimizers.ablation import adapter

    plain = adapter.step_function

    def fails(optimizer: object) -> object:
        if type(optimizer).__name__ == "AdamW":
            raise RuntimeError("out of luck")
        return plain(optimizer)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter, "step_function", fails)
    code, out, err = soaa("ablate", "-o", "torch-adamw,torch-sgd", *SHORT)
    assert code == 1
    assert "failed: torch-adamw: RuntimeError: out of luck" in err
    assert "torch-sgd" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ablate", "-w", "digit"), "unknown workload 'digit': did you mean 'digits'"),
        (("ablate", "-o", "torch-adam"), "unknown optimizer 'torch-adam': did you mean 'torch-adamw'"),
        (
            ("ablate", "-o", "torch-adamw:bets=1"),
            "unknown option of torch-adamw 'bets': did you mean 'betas'",
        ),
        (("ablate", "-o", "soaa:gama=0.2"), "did you mean 'gamma'"),
        (("ablate", "-c", "kfca", "-t", "kl-clip"), "unknown curvature 'kfca': did you mean 'kfac'"),
        (("ablate", "studdy"), "unknown configuration 'studdy': did you mean 'study'"),
        (("ablate", "nowhere.toml"), "cannot read configuration nowhere.toml"),
        (("ablate", "bad.toml"), "bad.toml, line 2: stepz: unknown key 'stepz': did you mean 'steps'"),
        (("ablate", "broken.yaml"), "broken.yaml, line 2: not YAML"),
        (("ablate", "--lr", "fast"), "--lr must be numbers separated by commas"),
        (("ablate", "--seeds", "1,1"), "seeds must be"),
        (("ablate", "--seeds", "1000000000"), "seeds must be at most 10,000"),
        (("ablate", "--schedule", "cosin"), "unknown schedule 'cosin': did you mean 'cosine'"),
        (("ablate", "--device", "abacus", *SHORT), "device 'abacus' cannot be used"),
        (("ablate", "bad.toml", "--config", "study"), "give one configuration"),
        (("report", "nowhere"), "nowhere holds no results"),
        (("show", "abc"), "holds no results"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_exit_code_2(
    soaa: Soaa, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "bad.toml").write_text("seeds = 2\nstepz = 3\n")
    (tmp_path / "broken.yaml").write_text("seeds: 2\nsteps: [3\n")
    code, out, err = soaa(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "soaa-results" / "runs").exists()  # before any training


def test_an_option_that_does_not_exist_names_the_nearest(soaa: Soaa) -> None:
    code, _, err = soaa("ablate", "--step", "3")
    assert code == 2
    assert "--step" in err
    assert "--steps" in err
