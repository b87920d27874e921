"""What the site shows beside the pages of this folder: notebooks, measurements, and references made from the code.

MkDocs calls the functions named `on_…`.
"""

import ast
import importlib
import inspect
import zlib
from collections.abc import Iterator
from pathlib import Path

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from fedjax_qp.config import Config, groups
from fedjax_qp.settings.catalogue import KINDS, Entry, entries

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fedjax_qp"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds a page for each room of the package to the navigation."""
    assert config.nav is not None
    config.nav.append({"API": [{title: f"api/{title}.md"} for title in rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not written by hand, and the files that the measurements link to."""
    pages = {
        **{f"tutorials/{file.stem}.md": tutorial(file) for file in (ROOT / "notebooks").glob("*.py")},
        **{f"api/{title}.md": reference(title, modules) for title, modules in rooms().items()},
        **{name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")},
        "benchmarks/README.md": (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"),
        "parts.md": parts(),
        "settings.md": settings(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text.replace("](../docs/", "](../").replace("](docs/", "](")))
    linked = [*(ROOT / "benchmarks" / "results").iterdir(), *(ROOT / "configs").glob("*.yaml")]
    for file in linked:
        files.append(File.generated(config, file.relative_to(ROOT).as_posix(), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Puts the list of rooms where a page asks for it."""
    return markdown.replace("<!-- rooms -->", "\n".join(room_lines())) if "<!-- rooms -->" in markdown else markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Stops if the reference lacks a name that a room exports."""
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    missing = sorted(public_names() - documented)
    if missing:
        raise PluginError(f"the API reference lacks {', '.join(missing)}: give each a docstring")


def public_names() -> set[str]:
    """Full names of all that the package and its rooms export."""
    found = set()
    for file in [PACKAGE / "__init__.py", *sorted(PACKAGE.glob("*/__init__.py"))]:
        room = importlib.import_module(".".join(file.parent.relative_to(ROOT).parts))
        found |= {f"{room.__name__}.{name}" for name in getattr(room, "__all__", ())}
    return found


def tutorial(file: Path) -> str:
    """A notebook as a page: its text and its code."""
    notebook = jupytext.read(file)
    notebook.metadata = {}
    note = f"This page is `notebooks/{file.name}`: open it with jupytext to run it. The tests do."
    _, _, text = jupytext.writes(notebook, "md").partition("\n# ")
    title, _, text = text.replace("%matplotlib inline\n", "").partition("\n\n")
    return f"# {title}\n\n!!! note\n\n    {note}\n\n{text}"


def rooms() -> dict[str, list[str]]:
    """The package's public modules by room: its folders, and the files beside them together."""
    found: dict[str, list[str]] = {"fedjax_qp": ["fedjax_qp"]}
    for file in sorted(PACKAGE.rglob("*.py")):
        names = file.relative_to(ROOT).with_suffix("").parts
        names = names[:-1] if names[-1] == "__init__" else names
        if len(names) > 1 and not any(name.startswith("_") for name in names):
            room = names[1] if (PACKAGE / names[1]).is_dir() else "fedjax_qp"
            found.setdefault(room, []).append(".".join(names))
    return found


def room_lines() -> Iterator[str]:
    """A table of the package's folders and of the files beside them, with the first line of their docstrings."""
    yield from ("| room | holds |", "| :-- | :-- |")
    for place in sorted(PACKAGE.iterdir(), key=lambda one: (one.is_dir(), one.name)):
        file = place / "__init__.py" if place.is_dir() else place
        text = (
            ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            if file.suffix == ".py" and file.exists()
            else None
        )
        if text:
            yield f"| `{place.name}{'/' if place.is_dir() else ''}` | {text.splitlines()[0]} |"


def settings() -> str:
    """Every group of settings as its dataclass is written: defaults, ranges and comments."""
    parts = [
        "# Settings",
        "Every setting with its default, as `fedjax_qp/config.py` declares it. In YAML a group is a mapping; on the"
        " command line a setting is `group.name=value`. `Config` is the configuration itself.",
    ]
    for name, group in {"Config": Config, **groups()}.items():
        parts.append(f"## {name}\n\n```python\n{inspect.getsource(group)}```")
    return "\n\n".join(parts)


def reference(title: str, modules: list[str]) -> str:
    """The API page of a room."""
    return "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)])


def parts() -> str:
    """Every method, data source, partition and model with its options, as `fedjax-qp list` knows them."""
    return "\n".join(["# Methods, data, models", "", "What a configuration can name.", *parts_lines()])


def parts_lines() -> Iterator[str]:
    for registry, kind in KINDS.items():
        yield f"\n## {kind.title.capitalize()}s\n"
        for entry in (one for one in entries() if one.registry == registry):
            yield from entry_lines(entry)


def entry_lines(entry: Entry) -> Iterator[str]:
    yield f"### {entry.name}\n"
    yield f"{entry.idea}\n"
    options = ", ".join(f"`{option}`" for option in entry.shown_options()) or "none"
    yield f"For: {', '.join(entry.suits)}. Options: {options}.\n"
