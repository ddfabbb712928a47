"""``soaa report``: one page that holds everything, and the same as Markdown, CSV and PNG."""

from __future__ import annotations

from pathlib import Path

from optimizers.ablation.ablate import CONFIGURATION, read_outcome
from optimizers.ablation.errors import AblationError
from optimizers.ablation.store import write_bytes


def report(folder: str | Path) -> Path:
    """Write ``report.html``, ``report.md``, CSV tables and PNG figures into the folder of an ablation or a study.

    It may be called while the ablation still runs: what is not finished is left out, and the page says so.

    Args:
        folder: where `ablate` or `ablate_study` wrote.

    Returns:
        The path of ``report.html``: one file that refers to nothing outside of itself.

    Raises:
        AblationError: there is no finished run, or the folder is none of an ablation.
    """
    # here, so that a process that only trains loads nothing that draws
    from optimizers.ablation import figures
    from optimizers.ablation.report_page import comma_separated, markdown, page, slug
    from optimizers.ablation.report_sections import LEGENDED, overall, section

    folder = Path(folder)
    outcomes = [read_outcome(place) for place in _places(folder)]
    workloads = [outcome.ablation.workload for outcome in outcomes]
    finished = [outcome for outcome in outcomes if outcome.rows]
    if not finished:
        raise AblationError(
            f"{folder} holds no cell whose runs are all finished: let soaa ablate go on, the same command continues"
        )
    sections = [section(outcome) for outcome in finished]
    for part, outcome in zip(sections, finished, strict=True):
        if (
            workloads.count(part.name) > 1
        ):  # two ablations of one workload: files and figures must not be one's
            part.name = outcome.folder.name
    missing = [outcome.ablation.workload for outcome in outcomes if not outcome.rows]
    everywhere = overall(finished) if len(finished) > 1 else None
    write_bytes(folder / "report.html", page(sections, everywhere, missing).encode())
    write_bytes(folder / "report.md", markdown(sections, everywhere, missing).encode())
    pictures = folder / "figures"
    try:
        pictures.mkdir(exist_ok=True)
    except OSError as error:
        raise AblationError(f"cannot write {pictures}: {error.strerror}; finished runs are intact") from error
    for part in sections:
        for title, _, table in part.tables:
            write_bytes(folder / f"{part.name}-{slug(title)}.csv", comma_separated(table).encode())
        for picture in part.pictures:
            look = part.look if picture.group in LEGENDED else None
            png = figures.png(picture.figure, look)
            write_bytes(pictures / f"{part.name}-{slug(picture.title)}.png", png)
    if everywhere is not None:
        png = figures.png(everywhere[0].figure, sections[0].look)
        write_bytes(pictures / "performance-profile.png", png)
        write_bytes(folder / "performance-profile.csv", comma_separated(everywhere[1]).encode())
    return folder / "report.html"


def _places(folder: Path) -> list[Path]:
    if (folder / CONFIGURATION).is_file() or (folder / "runs").is_dir():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIGURATION}"))
    if not found:
        raise AblationError(f"{folder} holds no results: name the folder that soaa ablate wrote")
    return found
