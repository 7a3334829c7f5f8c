"""The documentation as a site: every link leads somewhere, and a phone shows every page whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tutelage

ROOT = Path(__file__).parents[2]
PAGES = ["index.html", "how-to/text.html", "reference/python.html", "LAB.html"]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", place)
    assert done.returncode == 0, done.stderr
    return place


def test_readme_and_its_neighbours_are_pages_and_links_to_them_hold(site):
    home = (site / "index.html").read_text()
    assert 'href="how-to/text.html"' in home
    assert 'src="figures/alpha.png"' in home
    assert 'href="LAB.html"' in home
    assert 'href="LAB.html"' in (site / "performance.html").read_text()
    contributing = (site / "CONTRIBUTING.html").read_text()
    assert "<li>No <code>hasattr</code> or" in contributing  # of a list that begins without an empty line


def test_the_reference_has_every_command_and_every_public_name(site):
    commands = (site / "reference" / "cli.html").read_text()
    shown = {"demo", "train", "teach", "data-build", "study-run", "eval-score"}
    assert all(f'id="tutelage-{name}"' in commands for name in shown)
    names = (site / "reference" / "python.html").read_text()
    public = set(tutelage.__all__) - {"__version__", "objective"}
    assert {name for name in public if not re.search(rf'id="[\w.]*\.{name}"', names)} == set()


def test_no_page_fetches_anything_from_elsewhere(site):
    fetched = re.compile(r'<script[^>]*\ssrc="?([^"\s>]+)|<link[^>]*rel="?stylesheet"?[^>]*href="?([^"\s>]+)')
    pages = [*site.rglob("*.html")]
    assert len(pages) > 30
    for page in pages:
        if page.name == "report.html":
            continue  # studies' own pages, which fetch nothing at all
        files = [script or style for script, style in fetched.findall(page.read_text())]
        assert any("iframe_worker.js" in file for file in files), page
        for file in files:
            assert (page.parent / file.partition("?")[0]).is_file() or page.name == "404.html", (page, file)
            assert "://" not in file, (page, file)


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    (tmp_path / "docs" / "how-to").mkdir(parents=True)
    for name in ("README", "LAB", "CONTRIBUTING", "CHANGELOG", "SECURITY"):
        (tmp_path / f"{name}.md").write_text(f"# {name}\n[back](docs/how-to/a.md#a-b)\n")
    (tmp_path / "docs" / "how-to" / "a.md").write_text(
        "# A, b\n[up](../../README.md) [lab](../../LAB.md#lab)\n"
    )
    config = tmp_path / "mkdocs.yml"
    nav = "index.md, how-to/a.md, LAB.md, CONTRIBUTING.md, CHANGELOG.md, SECURITY.md"
    config.write_text(
        f"site_name: t\nplugins: []\nhooks: [{ROOT / 'docs/site_hooks.py'}]\nnav: [{nav}]\n"
        "validation: {nav: {omitted_files: warn}, links: {not_found: warn, anchors: warn}}\n"
    )
    assert build(config, tmp_path / "site").returncode == 0
    (tmp_path / "README.md").write_text("[gone](docs/how-to/gone.md)")
    (tmp_path / "LAB.md").write_text("[no heading](docs/how-to/a.md#c)")
    (tmp_path / "docs" / "new.md").write_text("nobody links here")
    told = build(config, tmp_path / "site").stderr
    for warning in (
        "a link 'how-to/gone.md'",
        "does not contain an anchor '#c'",
        'not included in the "nav"',
        "- new.md",
    ):
        assert warning in told


@pytest.mark.browser
def test_a_phone_shows_pages_without_scrolling_sideways_and_without_errors(site, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not on PATH")
    frames = "".join(f'<iframe src="{page}" style="width:390px;height:900px"></iframe>' for page in PAGES)
    (site / "phone.html").write_text(
        f"{frames}<p id=o></p><script>onload = () => {{ for (const f of document.querySelectorAll('iframe'))"
        " o.textContent += ' wide ' + f.contentDocument.documentElement.scrollWidth }</script>"
    )
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path}", "--allow-file-access-from-files",
            "--virtual-time-budget=5000", "--dump-dom", (site / "phone.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert [int(width) <= 390 for width in re.findall(r"wide (\d+)", done.stdout)] == [True] * len(PAGES)
    assert "CONSOLE" not in done.stderr
