"""The laws of workloads, and an ablation on it by name."""

from soaa_diabetes_workload import WORKLOAD

from optimizers.ablation import Ablation, ablate
from optimizers.ablation.testing import check_workload


def test_laws():
    check_workload(WORKLOAD)


def test_an_ablation_finds_it_by_name(tmp_path):
    ablation = Ablation(
        workload="diabetes", optimizers=["torch-adamw", "soaa"], learning_rates=[3e-3], seeds=1, steps=40
    )
    table = ablate(ablation, tmp_path).table()
    assert [row["cell"] for row in table] == ["torch-adamw", "soaa"]
