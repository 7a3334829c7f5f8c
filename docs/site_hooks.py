"""Hooks of the site (mkdocs.yml): README and its neighbours become pages, to which links from docs/ hold.

Every page is written for GitHub, where a link is relative to the file it stands in. Here README.md, LAB.md,
CONTRIBUTING.md, CHANGELOG.md and SECURITY.md, which lie beside docs/, move into it.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

import tutelage

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

BESIDE = {
    "README.md": "index.md",
    **{name: name for name in ("LAB.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")},
}
"""Files of the repository's root that are pages, and what they are called there."""

_SETTINGS = tuple(f"reference/{kind}.md" for kind in ("run", "store", "study", "cache"))
_SHIM = "https://unpkg.com/iframe-worker/shim"
_LINK = re.compile(r"(\]\(|<img src=\")(?![a-z]+:|#|/)([^)#\s\"]+)")
_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
_LIST = re.compile(r"^((?![-*] |\d+\. |\s|$).+\n)(?=(?:[-*]|\d+\.) )", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name headings as GitHub does, so that a link to one holds on both."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie beside docs/."""
    root = Path(config.docs_dir).parent
    for name, page in BESIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links at pages, and let lists begin without an empty line, as GitHub does."""
    generated = {"reference/cli.md": _commands, "reference/python.md": _public_names}
    if page.file.src_uri in generated:
        return markdown + generated[page.file.src_uri]()
    places = {page: name for name, page in BESIDE.items()}
    source = places.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = _FENCE.split(markdown)
    parts[::2] = [_LIST.sub(r"\1\n", _LINK.sub(lambda m: m[1] + _moved(m[2], source), p)) for p in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Mark the pages whose tables are settings (site.css)."""
    return f'<div class="settings">{html}</div>' if page.file.src_uri in _SETTINGS else html


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Let a page take from its own site what the theme takes from a server so that search works from disk."""
    return output.replace(_SHIM, posixpath.relpath("iframe_worker.js", posixpath.dirname(page.url) or "."))


def on_post_template(output_content: str, **_: object) -> str:
    """The same for the page of a wrong address."""
    return output_content.replace(_SHIM, "iframe_worker.js")


def _moved(link: str, source: str) -> str:
    """Return a link from the page that the file `source` became to the page that its target became."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    place = BESIDE.get(target, target.removeprefix("docs/"))
    start = BESIDE.get(source, source.removeprefix("docs/"))
    return posixpath.relpath(place, posixpath.dirname(start) or ".")


def _commands() -> str:
    """Describe every command, as typer does, below the page's own heading."""
    command = [sys.executable, "-m", "typer", "tutelage.cli.main", "utils", "docs", "--name", "tutelage"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lists = re.compile(
        r"\*\*Commands\*\*:\n\n(?:\* .*\n)+"
    )  # of which each entry is cut short, and follows below
    return "\n" + lists.sub("", done.stdout.partition("\n")[2])


def _public_names() -> str:
    """Ask mkdocstrings for every public name, those of one home together."""
    homes: dict[str, list[str]] = {}
    for name, home in tutelage._HOME.items():  # noqa: SLF001 - its `__all__` does not say where names are from
        homes.setdefault(home, []).append(name)
    return "".join(
        f"\n## {home}\n" + "".join(f"\n::: {home}.{name}\n" for name in names)
        for home, names in sorted(
            homes.items(), key=lambda place: (place[0].startswith("tutelage.config"), place[0])
        )
    )
