"""Sphinx configuration. Build with: python -m sphinx -W -n -b html docs docs/_build/html."""

from __future__ import annotations

import html
import importlib
import importlib.util
import inspect
import re
import shutil
import tomllib
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from sphinx.errors import ExtensionError
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "soaa"
author = "The soaa developers"
project_copyright = "2026, The soaa developers"
release = version = PROJECT["version"]

extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "_inventories", "**/README.md"]
nitpicky = True

# -- pages
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

# -- reference
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# Types stand in the signature only: a second list of them below the prose repeats and drifts.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Shape", "returns_style"),
    ("Shapes", "returns_style"),
    "Cost",
    "Reference",
    "Mathematics",
    "Unit",
]

# -- pictures
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_include_source = False

# -- links to other projects
# A build must not depend on a network, and intersphinx only warns about an inventory that it cannot fetch. So
# the few foreign names that our pages link to are listed, readably, in _inventories/*.txt; `setup` packs them
# in the format that intersphinx reads. A foreign name missing there stays plain text, by the patterns below.
INVENTORIES = {
    "python": "https://docs.python.org/3",
    "torch": "https://docs.pytorch.org/docs/stable",
    "numpy": "https://numpy.org/doc/stable",
    "scipy": "https://docs.scipy.org/doc/scipy",
}
intersphinx_mapping = {
    name: (url, str(HERE / "_build" / "inventories" / f"{name}.inv")) for name, url in INVENTORIES.items()
}
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|scipy|sklearn|matplotlib|optuna|typer|rich|pooch|nn)\..*"),
    (r"py:.*", r"(collections|enum|dataclasses|pathlib|typing|types|abc|fractions|os|weakref)\..*"),
    # Names that annotations use unqualified, because they are imported for type checking only.
    (r"py:.*", r"(Tensor|Module|Parameter|Generator|Callable|Iterable|Iterator|Sequence|Mapping|Any|Path)"),
    (r"py:.*", r"(ParamsT|ProcessGroup|LinearOperator)"),
    # Aliases of literal types: the signature shows the alias, the docstring lists the values.
    (r"py:.*", r"(.*\.)?(FisherKind|Sharing|Likelihood|Distribution|Scope|Compile|BesideOutputs|OptionValue|Sink)"),
    # Type variables and the state of an estimator or a policy, which each defines for itself.
    (r"py:.*", r"([A-Z]|State|.*\.(State|[A-Z]))"),
    (r"py:.*", r"optional"),
    # Values that only the inside of an estimator makes and reads.
    (r"py:class", r"curvature\.kronecker\.(output_curvature\.OutputCurvature|sample_rows\.Rows)"),
]

# -- html
html_theme = "furo"
html_title = "soaa"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# Mathematics renders without a network: MathJax comes from the package django-static-mathjax (its files
# alone, no Django), and `copy_mathjax` puts the one self-contained script, SVG output with its fonts inside,
# beside the pages. docs/explanation/decisions.md has the alternatives.
MATHJAX = "mathjax/tex-svg-full.js"
mathjax_path = MATHJAX
mathjax3_config = {
    "tex": {"macros": {"R": r"\mathbb{R}", "argmin": r"\operatorname*{arg\,min}", "T": r"{\!\top}"}},
    "svg": {"fontCache": "global"},
    "options": {"enableMenu": False},
}


def pack_inventories() -> None:
    """Write each ``_inventories/NAME.txt`` (name, role, address a line) as intersphinx reads it."""
    target = HERE / "_build" / "inventories"
    target.mkdir(parents=True, exist_ok=True)
    for name in INVENTORIES:
        lines = (HERE / "_inventories" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        entries = (line.split() for line in lines if line and not line.startswith("#"))
        body = "".join(f"{dotted} {role} 1 {uri} -\n" for dotted, role, uri in entries)
        head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        (target / f"{name}.inv").write_bytes(head.encode() + zlib.compress(body.encode()))


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Put MathJax beside the pages; without the package the build fails, since no formula would render."""
    if exception is not None or app.builder.format != "html":
        return
    spec = importlib.util.find_spec("mathjax")
    if spec is None or spec.origin is None:
        raise RuntimeError('MathJax is missing: install the documentation extra, pip install -e ".[docs]"')
    files = Path(spec.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(files / "es5" / "tex-svg-full.js", target / "tex-svg-full.js")
    shutil.copyfile(files / "LICENSE", target / "LICENSE")


def whole_attribute_docstring(docstring: GoogleDocstring) -> tuple[str, list[str]]:
    """Take an attribute's docstring as prose: napoleon would read `Products with B: one a step` as `type: text`."""
    return "", docstring._dedent(docstring._consume_to_end())


def escape_mathematics(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Let docstrings write `|p| <= 1` and `(r, *shape)`: reStructuredText would read markup."""
    for number, line in enumerate(lines):
        if "``" not in line and not line.lstrip().startswith((">>>", "...")):
            escaped = re.sub(r"(?<!\\)\|(?=[^\s|])", r"\|", line)
            lines[number] = re.sub(r"(?<![\\*\w])\*(?=\w)(?![^*]*\*)", r"\*", escaped)


# Everything that a package offers under its `__all__`, and modules that have none, by the names that they define.
PUBLIC = (
    "curvature",
    "curvature.spectrum",
    "curvature.testing",
    "trust_region",
    "optimizers",
    "optimizers.ablation",
    "optimizers.cost_model",
    "optimizers.integrations",
    "optimizers.telemetry",
)


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, which fails the build, of a public name that no page documents."""
    documented = set(env.get_domain("py").objects)
    for package in PUBLIC:
        module = importlib.import_module(package)
        own = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and getattr(value, "__module__", None) == package
            and (isinstance(value, type) or callable(value))
        ]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            defined = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
            if not (
                inspect.isclass(value) or inspect.isroutine(value)
            ):  # data does not know where it was defined
                known = any(
                    d.split(".")[0] == package.split(".")[0] and d.endswith(f".{name}") for d in documented
                )
            else:
                known = f"{package}.{name}" in documented or defined in documented
            if not known:
                logging.getLogger(__name__).warning(
                    "%s.%s is public, and no page under docs/reference documents it", package, name
                )


def forget_builtins(app: Sphinx) -> list[Any]:
    """No source page for Python's own names, which viewcode lists and cannot write."""
    getattr(app.env, "_viewcode_modules", {}).pop("builtins", None)
    return []


def mend_backlinks(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Links from a source page to the reference under the name that the reference has.

    Sphinx's viewcode knows one prefix a module, so a class that is documented under its module's name, beside others
    that are documented under their package's, is sought under the wrong one.
    """
    module = page.removeprefix("_modules/").replace("/", ".")
    entry = getattr(app.env, "_viewcode_modules", {}).get(module) if page.startswith("_modules/") else None
    if entry:
        objects, prefix = app.env.get_domain("py").objects, entry[3]  # type: ignore[attr-defined]
        for name in entry[2]:
            known = [
                o for o in objects if o.endswith(f".{name}") and module.startswith(o.removesuffix(f".{name}"))
            ]
            if known and f"{prefix}.{name}" not in known:
                context["body"] = context["body"].replace(f'#{prefix}.{name}"', f'#{known[0]}"')


def check_links(app: Sphinx, exception: Exception | None) -> None:
    """Raise where a link of the built site leads to a page or a place in it that does not exist."""
    if exception is not None or app.builder.name != "html":
        return
    text = {page: page.read_text(encoding="utf-8") for page in sorted(Path(app.outdir).rglob("*.html"))}
    places = {page: set(re.findall(r'\bid="([^"]+)"', content)) for page, content in text.items()}
    dead = []
    for page, content in text.items():
        for link in set(re.findall(r'\bhref="([^"]+)"', content)):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, place = unquote(html.unescape(link)).partition("#")
            path = path.partition("?")[0]
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (place and place not in places.get(target, {place})):
                dead.append(f"{page.relative_to(app.outdir)}: {link}")
    if dead:
        raise ExtensionError(f"{len(dead)} links lead nowhere:\n" + "\n".join(dead[:20]))


def setup(app: Sphinx) -> None:
    """Entry point of Sphinx."""
    app.connect("autodoc-process-docstring", escape_mathematics)
    app.connect("env-check-consistency", check_public_names)
    pack_inventories()
    GoogleDocstring._consume_inline_attribute = whole_attribute_docstring
    app.connect("html-collect-pages", forget_builtins, priority=100)  # before viewcode writes its pages
    app.connect("html-page-context", mend_backlinks)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", check_links, priority=900)
