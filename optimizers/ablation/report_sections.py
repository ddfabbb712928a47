"""What a report says of one workload: summaries, comparisons, statements and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from optimizers.ablation import comparison, figures, measures, results, workload
from optimizers.ablation.ablate import Outcome
from optimizers.ablation.comparison import Comparison, Summary
from optimizers.ablation.profiles import Profile, performance_profiles
from optimizers.ablation.report_tables import (
    AXES,
    Table,
    clock_note,
    comparison_table,
    facts,
    interval_note,
    number,
    summary_note,
    summary_table,
    tuning_note,
    tuning_table,
)

#: groups of pictures whose lines are cells
LEGENDED = ("Loss", "Inside the optimizer", "Sensitivity", "Profile")
TRACES = {
    "radius": "radius",
    "ratio": "ratio ρ of actual to predicted reduction",
    "fisher_active_fraction": "fraction of elements inside the box (Fisher branch live)",
    "damping": "damping λ",
}


@dataclass(frozen=True)
class Picture:
    """One figure of the page.

    Args:
        title: above it; it names its file too.
        figure: the drawing.
        note: below it.
        group: what it is shown among.
    """

    title: str
    figure: Figure
    note: str = ""
    group: str = ""


@dataclass
class Section:
    """What the page says of one workload."""

    name: str
    title: str
    facts: list[tuple[str, str]]
    complete: bool
    summaries: list[Summary]
    comparisons: list[Comparison]
    statements: list[str]
    tables: list[tuple[str, str, Table]]
    pictures: list[Picture]
    failures: list[tuple[str, str]]
    look: dict[str, figures.Style] = field(default_factory=dict)


def section(outcome: Outcome) -> Section:
    """Return everything that is said of one workload."""
    problem = workload.get(outcome.ablation.workload)
    measure = problem.target
    best = sorted(outcome.best, key=lambda row: row.mean("validation_loss"))
    labels = [cell.label for cell in outcome.ablation.all_cells()]
    look = figures.styles(labels)
    summaries = comparison.summarise(outcome.rows, outcome.tunings, measure)
    goal, whose = results.target(best, measure)
    compared = [
        found
        for reference in comparison.references(outcome.rows, measure)
        for found in comparison.compare(best, reference, measure)
    ]
    tables: list[tuple[str, str, Table]] = [
        (
            "Cells",
            summary_note(measure),
            summary_table(summaries, problem),
        )
    ]
    if compared:
        tables.append(("Comparisons", interval_note(), comparison_table(compared)))
    if outcome.tunings:
        tables.append(("Tuning", tuning_note(outcome), tuning_table(outcome, summaries)))
    failures = [(row.cell.label, row.error) for row in outcome.rows if row.error]
    return Section(
        name=problem.name,
        title=problem.summary,
        facts=facts(outcome, goal, whose, measure),
        complete=outcome.complete,
        summaries=summaries,
        comparisons=compared,
        statements=statements(compared),
        tables=tables,
        pictures=list(_pictures(outcome, best, compared, look, measure)),
        failures=list(dict(failures).items()),
        look={row.cell.label: look[row.cell.label] for row in best},
    )


def statements(compared: Sequence[Comparison]) -> list[str]:
    """Return what may be said of the comparisons: a cell is called better only where its interval says so.

    Args:
        compared: from `comparison.compare`.

    Returns:
        Sentences; for every reference one on each axis.
    """
    found = []
    for reference in dict.fromkeys(entry.reference for entry in compared):
        own = [entry for entry in compared if entry.reference == reference]
        for axis, name in AXES.items():
            groups: dict[str, list[str]] = {"better": [], "worse": [], "not separated": []}
            for entry in own:
                groups[entry.verdicts[axis]].append(entry.cell)
            said = [
                f"{', '.join(map(_quoted, names))} {'is' if len(names) == 1 else 'are'} {verdict}"
                for verdict, names in groups.items()
                if names and verdict != "not separated"
            ]
            rest = len(groups["not separated"])
            if rest:
                said.append(f"{rest} of {len(own)} not separated" if said else "nothing is separated")
            found.append(f"Against {reference}, {name}: {'; '.join(said)}.")
    return found


def _quoted(name: str) -> str:
    """A title with a comma in it would read as two in a list."""
    return f"“{name}”" if "," in name else name


def _pictures(
    outcome: Outcome,
    best: Sequence[results.Row],
    compared: Sequence[Comparison],
    look: Mapping[str, figures.Style],
    measure: str,
) -> list[Picture]:
    band = "Median over seeds; the band reaches from the least to the largest."
    found = [
        Picture("Training loss against steps", figures.losses(best, look, "train_loss", "step"), band, "Loss"),
        Picture("Validation loss against steps", figures.losses(best, look, "validation_loss", "step"), band, "Loss"),
        Picture("Loss against time", figures.losses(best, look, measure, "seconds"), clock_note(outcome), "Loss"),
        Picture(
            "Loss against gradients", figures.losses(best, look, measure, "gradients"),
            "Operations counted, not measured: the same on every machine. Elementwise work is left out.", "Loss",
        ),
    ]  # fmt: skip
    for name, label in TRACES.items():
        figure = figures.trace(best, look, name, label)
        if figure is not None:
            found.append(
                Picture(
                    label[0].upper() + label[1:], figure, "Over training. " + band, "Inside the optimizer"
                )
            )
    tunings = {tuning.cell.label: tuning for tuning in outcome.tunings}
    curves = {
        row.cell.label: comparison.sensitivity(
            [other for other in outcome.rows if other.cell == row.cell], tunings.get(row.cell.label)
        )
        for row in best
    }
    figure = (
        figures.sensitivities({label: points for label, points in curves.items() if points}, look)
        if any(curves.values())
        else None
    )
    if figure is not None:
        note = "A ring marks the best. Where other numbers were searched too: the best loss near each rate."
        found.append(Picture("Learning-rate sensitivity", figure, note, "Sensitivity"))
    ablation = outcome.ablation
    if ablation.curvature:
        values = {
            (row.cell.curvature, row.cell.trust_region): statistics.fmean(
                measures.final_loss(record, measure) for record in row.records
            )
            for row in best
            if row.cell.curvature and not row.cell.title
        }
        figure = figures.heat_map(
            values, ablation.curvature, ablation.trust_region, measure.replace("_", " ")
        )
        note = "Mean final loss over seeds; a cross is a failure or a divergence."
        found.append(Picture("Curvature x trust region", figure, note, "Grid"))
    for reference in dict.fromkeys(entry.reference for entry in compared):
        own = [entry for entry in compared if entry.reference == reference]
        for axis, name in (("steps", "Steps"), ("gradients", "Gradients"), ("seconds", "Time")):
            figure = figures.forest(own, axis, f"{name.lower()} over {reference}'s", 1.0)
            note = (
                "Median over seeds with its 95% interval. Blue is better, orange worse, grey and hollow not separated; "
                "an arrow is a miss or lies beyond the picture."
            )
            found.append(Picture(f"{name} to where {reference} ends", figure, note, "Against the baselines"))
    seeds = performance(outcome)
    if seeds is not None:
        note = "Problems are the seeds of this workload."
        found.append(
            Picture("Performance profile", figures.profiles(seeds, look, "steps to target"), note, "Profile")
        )
    return found


def performance(outcome: Outcome) -> dict[str, Profile] | None:
    """Return the profiles of steps to the target over the seeds; None without a target or a second cell."""
    measure = workload.get(outcome.ablation.workload).target
    goal, whose = results.target(outcome.best, measure)
    if not whose or len(outcome.best) < 2:
        return None
    return performance_profiles({
        row.cell.label: [max(1.0, measures.steps_to(record, measure, goal)) for record in row.records]
        for row in outcome.best
    })  # fmt: skip


def overall(outcomes: Sequence[Outcome]) -> tuple[Picture, Table] | None:
    """Return the profile over workloads, of the cells that all have."""
    costs = []
    for outcome in outcomes:
        measure = workload.get(outcome.ablation.workload).target
        found = comparison.summarise(outcome.rows, outcome.tunings, measure)
        costs.append({summary.cell: max(1.0, summary.steps) for summary in found})
    common = [label for label in costs[0] if all(label in other for other in costs)]
    if len(common) < 2:
        return None
    found_profiles = performance_profiles({label: [cost[label] for cost in costs] for label in common})
    ordered = sorted(found_profiles, key=lambda label: -found_profiles[label].score)
    figure = figures.profiles(
        found_profiles, figures.styles([c.label for c in outcomes[0].ablation.all_cells()]), "steps to target"
    )
    names = [outcome.ablation.workload for outcome in outcomes]
    table = (
        ["cell", "score", *names],
        [
            [label, f"{found_profiles[label].score:.3f}", *(number(cost[label]) for cost in costs)]
            for label in ordered
        ],
    )
    note = f"Over {len(names)} workloads, median steps to target, r_max = 4. The score is the area under the profile."
    return Picture("Performance profile", figure, note), table
