from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from optimizers.ablation import Ablation, AblationError, Cell, ablate, figures
from optimizers.ablation.comparison import Comparison
from optimizers.ablation.intervals import Interval
from optimizers.ablation.profiles import performance_profiles
from optimizers.ablation.report import report
from optimizers.ablation.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    cells = (Cell("soaa", title="<script>alert(1)</script> & more"), Cell("torch-adamw"), Cell("torch-sgd"))
    ablate(Ablation(cells=cells, tune=3, extensions=0, seeds=2, steps=30, evaluations=3), folder)
    return report(folder)


def test_page_refers_to_nothing_outside_and_escapes_what_it_is_given(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", text)
    assert references
    for first, second in references:
        assert (first or second).strip("\"'").startswith(("#", "data:")), first or second
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert text.count("<svg") > 8


def test_markdown_tables_and_pictures_lie_beside_it(written: Path) -> None:
    text = (written.parent / "report.md").read_text(encoding="utf-8")
    for path in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text):
        assert (written.parent / path).read_bytes().startswith(b"\x89PNG")
    for name in ("cells", "comparisons", "tuning"):
        assert (written.parent / f"digits-{name}.csv").is_file()


def test_a_method_without_damping_has_no_picture_of_it(tmp_path: Path) -> None:
    few = Ablation(optimizers=("muon", "soaa"), learning_rates=(0.01,), seeds=1, steps=4, evaluations=1)
    report(ablate(few, tmp_path).folder)
    pictures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert "digits-radius" in pictures
    assert "digits-damping" not in pictures


@pytest.mark.parametrize("reference", ["AdamW", "SGD-Nesterov, as others call it"])
def test_what_an_axis_is_fits_beside_long_names(reference: str) -> None:
    interval = Interval(1.0, 0.5, 2.0, 5)
    found = [Comparison("AdamW, SOAA's radius replayed", reference, *[interval] * 5) for _ in range(7)]
    figure = figures.forest(found, "gradients", f"gradients over {reference}'s", 1.0)
    FigureCanvasAgg(figure).draw()
    place = figure.axes[0].xaxis.label.get_window_extent()
    assert figure.bbox.x0 <= place.x0 < place.x1 <= figure.bbox.x1


def test_every_revision_and_machine_of_a_continued_ablation_is_named(tmp_path: Path) -> None:
    ablation = Ablation(optimizers=("torch-sgd",), learning_rates=(0.1,), seeds=2, steps=2, evaluations=1)
    store = Store(ablate(ablation, tmp_path).folder)
    for key, revision, processor in zip(store.keys(), ("aaa", "bbb"), ("one", "two"), strict=True):
        record = store.load(key)
        record["environment"] |= {"git_revision": revision, "git_dirty": False, "processor": processor}
        store.path(key).write_text(json.dumps(record), encoding="utf-8")
    text = report(tmp_path).with_name("report.md").read_text(encoding="utf-8")
    (revisions,) = (line for line in text.splitlines() if line.startswith("- revision"))
    (machines,) = (line for line in text.splitlines() if line.startswith("- machine"))
    assert "aaa" in revisions
    assert "bbb" in revisions
    assert "one, " in machines
    assert "two, " in machines


def test_a_run_without_its_parts_is_one_error(tmp_path: Path) -> None:
    ablation = Ablation(optimizers=("torch-sgd",), learning_rates=(0.1,), seeds=1, steps=2, evaluations=1)
    store = Store(ablate(ablation, tmp_path).folder)
    (key,) = store.keys()
    whole = store.load(key)
    for part in ("config", "environment", "trace"):
        store.save(key, {name: value for name, value in whole.items() if name != part})
        with pytest.raises(AblationError, match=f"{key}.json lacks '{part}': remove this file"):
            report(tmp_path)


def test_two_ablations_of_one_workload_have_sections_of_their_own(tmp_path: Path) -> None:
    for name, rate in (("one", 0.1), ("two", 0.2)):
        few = Ablation(optimizers=("torch-sgd",), learning_rates=(rate,), seeds=1, steps=2, evaluations=1)
        ablate(few, tmp_path / name)
    page = report(tmp_path)
    text = page.with_name("report.md").read_text(encoding="utf-8")
    assert "\n## one\n" in text
    assert "\n## two\n" in text
    tables = [(tmp_path / f"{name}-cells.csv").read_text() for name in ("one", "two")]
    assert tables[0] != tables[1]


def test_picture_that_stands_alone_says_whose_each_line_is() -> None:
    look = figures.styles(["a", "b", "c"])
    sizes = []
    for legend in (None, look):
        figure = figures.profiles(performance_profiles({"a": [1.0], "b": [2.0]}), look, "steps")
        assert figures.png(figure, legend).startswith(b"\x89PNG")
        sizes.append(figure.get_size_inches()[1])
        # and of no other: "c" is not drawn
        assert [text.get_text() for box in figure.legends for text in box.get_texts()] == ["a", "b"] * bool(
            legend
        )
    assert sizes[1] > sizes[0]


def test_legend_fits_into_its_picture() -> None:
    names = ["SOAA, a scale and radius for each tensor", "AdamW, SOAA's radius replayed", "SOAA", "Muon"] * 4
    look = figures.styles([f"{name} {i}" for i, name in enumerate(names)])
    found = performance_profiles({name: [1.0 + i] for i, name in enumerate(look)})
    figure = figures.profiles(found, look, "steps")
    figures.png(figure, look)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert figure.bbox.x0 <= place.x0 < place.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= place.y0
    assert place.y1 <= figure.axes[0].get_window_extent().y0  # and leaves the axes their room


def test_a_folder_without_results_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(AblationError, match="holds no results"):
        report(tmp_path)


def test_a_configuration_of_another_version_is_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    content = Ablation().as_dict() | {"of_tomorrow": 1}
    (tmp_path / "configuration.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(AblationError, match=r"another version .*of_tomorrow.*same soaa ablate command"):
        report(tmp_path)


# a frame is a viewport of its own: its width is what media queries and the layout see
PROBE = """<!DOCTYPE html><html><body><iframe id=f style="width:WIDTHpx;height:800px;border:0" src="PAGE"></iframe>
<script>
document.getElementById("f").onload = event => {
  const page = event.target.contentDocument, style = (query, name) =>
    getComputedStyle(page.querySelector(query))[name];
  const wide = [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > WIDTH + 1
    && !e.closest(".scroll") && !e.closest("svg")).map(e => e.tagName + "." + e.className);
  const small = [...page.querySelectorAll("p, li, td, h2")].filter(e => parseFloat(getComputedStyle(e).fontSize) < 12);
  const drawn = [...page.querySelectorAll("svg text")].filter(e => e.closest("svg").viewBox.baseVal.width).map(e =>
    parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b));
  document.title = "measured";
  document.body.innerHTML = "<pre>" + JSON.stringify({width: page.documentElement.scrollWidth, wide: wide.slice(0, 5),
    small: small.length, drawn: Math.min(...drawn), page: style("body", "backgroundColor"), ink: style("body", "color"),
    cell: style("td", "color")}) + "</pre>";
}</script></body></html>"""


def _luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    low, high = sorted([_luminance(first), _luminance(second)])
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB; and the CIE's matrix from linear sRGB to XYZ
VISIONS = {
    "usual": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
}  # fmt: skip
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def _lab(colour: str, vision: np.ndarray) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(XYZ @ np.clip(vision @ linear, 1e-3, 1) / (0.95047, 1, 1.08883))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
def test_lines_are_told_apart_with_and_without_red_and_green_and_stand_out_from_the_page(vision: str) -> None:
    labs = [_lab(colour, VISIONS[vision]) for colour in figures.COLORS]
    apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)]
    assert min(apart) > 15  # a difference of 2 is just noticed, side by side
    for colour, page in itertools.product(figures.COLORS, ("#ffffff", "#f6f8fa", "#0f1419", "#171d24")):
        rgb = ["{},{},{}".format(*(int(c[i : i + 2], 16) for i in (1, 3, 5))) for c in (colour, page)]
        assert _contrast(*rgb) > 2.85, (colour, page)  # WCAG 2.1 asks for 3, 1.4.11
    looks = figures.styles([str(i) for i in range(25)]).values()
    assert len({(look["color"], look["dashes"]) for look in looks}) == 25


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)], ids=["dark", "light"])
def test_page_fits_a_phone_and_is_readable_in_dark_and_light(
    written: Path, tmp_path: Path, scheme: int, dark: bool
) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("WIDTH", "360").replace("PAGE", written.as_uri()), encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         "--enable-logging=stderr", f"--blink-settings=preferredColorScheme={scheme}",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["width"] <= 360, seen  # nothing but tables and figures in their own boxes scrolls sideways
    assert seen["wide"] == []
    assert seen["small"] == 0
    assert seen["drawn"] > 8.5  # CSS pixels, of the smallest text in a figure
    assert (_luminance(seen["page"]) < 0.1) == dark
    assert _contrast(seen["page"], seen["ink"]) > 7  # WCAG AAA
    assert _contrast(seen["page"], seen["cell"]) > 4.5


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_browser_draws_the_page_without_a_console_error(written: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--window-size=500,900", f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={picture}", written.as_uri()],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG"), done.stderr
    assert "CONSOLE" not in done.stderr
