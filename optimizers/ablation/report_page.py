"""A report as a page, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from importlib import resources

from optimizers.ablation import figures
from optimizers.ablation.report_sections import LEGENDED, Picture, Section
from optimizers.ablation.report_tables import Table


def page(sections: Sequence[Section], overall: tuple[Picture, Table] | None, missing: Sequence[str]) -> str:
    """Return the whole page as HTML; every text in it is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )

    def drawn(picture: Picture, name: str = "all") -> Markup:
        # from `figures.svg` alone, which escapes what it is given
        return Markup(figures.svg(picture.figure, f"{name}: {picture.title}"))

    environment.filters["drawn"] = drawn
    source = resources.files("optimizers.ablation").joinpath("report.html.j2").read_text(encoding="utf-8")
    groups = {
        part.name: {
            group: [picture for picture in part.pictures if picture.group == group]
            for group in dict.fromkeys(picture.group for picture in part.pictures)
        }
        for part in sections
    }
    return environment.from_string(source).render(
        sections=sections, groups=groups, overall=overall, missing=missing, legended=LEGENDED
    )


def markdown(
    sections: Sequence[Section], overall: tuple[Picture, Table] | None, missing: Sequence[str]
) -> str:
    """Return the report as Markdown; its figures are the PNG files beside it."""
    lines = ["# Ablation", ""]
    if missing:
        lines += [f"Not finished yet: {', '.join(missing)}.", ""]
    if overall is not None:
        lines += ["## All workloads", "", overall[0].note, "", *_markdown_table(overall[1]), ""]
        lines += ["![Performance profile](figures/performance-profile.png)", ""]
    for part in sections:
        lines += [f"## {part.name}", "", f"{part.title}.", ""]
        if not part.complete:
            lines += ["Not finished: cells without all of their runs are left out.", ""]
        lines += [f"- {name}: {text}" for name, text in part.facts] + [""]
        if part.statements:
            lines += ["What may be said:", "", *(f"- {text}" for text in part.statements), ""]
        for title, note, table in part.tables:
            lines += [f"### {title}", "", note, "", *_markdown_table(table), ""]
        lines += [f"- {label} failed: {error}" for label, error in part.failures] + [""] * bool(part.failures)
        for picture in part.pictures:
            lines += [
                f"![{picture.title}](figures/{part.name}-{slug(picture.title)}.png)",
                "",
                picture.note,
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Table) -> list[str]:
    names, rows = table
    clean = [[text.replace("|", "\\|") for text in row] for row in [names, *rows]]
    return [
        "| " + " | ".join(clean[0]) + " |",
        "|" + "---|" * len(names),
        *("| " + " | ".join(row) + " |" for row in clean[1:]),
    ]


def comma_separated(table: Table) -> str:
    """Return a table as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([table[0], *table[1]])
    return stream.getvalue()


def slug(title: str) -> str:
    """Return a title as part of a file name."""
    return "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in title.lower()).split())
