"""The site: what pages take from the program is what the program says, and links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pz_agents.algorithms import ALGORITHMS, TRAINERS
from pz_agents.sdk import BUILT_IN
from pz_envs.catalog import rows
from pz_envs.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
QUICK = ("countdown", "gymcards", "math", "sokoban")

_spec = importlib.util.spec_from_file_location("pages", ROOT / "tools" / "pages.py")
assert _spec is not None
assert _spec.loader is not None
pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pages)


def page_of(family: str) -> Path:
    found = [path for path in PAGES if f"<!-- family {family} -->" in path.read_text("utf-8")]
    assert len(found) == 1, f"{family} has {len(found)} pages"
    return found[0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_a_page_with_its_ids_its_definitions_and_an_episode(family: str) -> None:
    text = page_of(family).read_text("utf-8")
    assert pages.family(family) in text
    assert "<!-- transcript pz/" in text
    assert all(f"`{row.id}`" in text for row in rows() if row.family == family)


@pytest.mark.parametrize("family", QUICK)
def test_a_transcript_is_what_the_environment_says_today(family: str) -> None:
    path = page_of(family)
    text = path.read_text("utf-8")
    assert pages.filled(text) == text, f"old; run: python tools/pages.py {path.relative_to(ROOT)}"


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = re.findall(r"[\w/-]+\.md", text.partition("nav:")[2])
    assert sorted(named) == sorted(str(path.relative_to(DOCS)) for path in PAGES)


@pytest.mark.skipif(os.environ.get("PZ_DOCS") != "all", reason="half a minute; make test-docs")
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stderr[-3000:]
    html = [path.read_text("utf-8") for path in tmp_path.rglob("*.html")]
    assert len(html) >= len(PAGES)
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]*src=.?https?:|<link[^>]*stylesheet[^>]*https?:"
    )
    assert [text for text in html if loaded.search(text)] == []


def test_the_site_asks_no_other_machine_for_anything() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert settings["theme"]["font"] is False
    assert "extra_javascript" not in settings
    assert "extra_css" not in settings
    for path in PAGES:
        assert not re.search(r"<(script|link|img)[^>]*https?://", path.read_text("utf-8"))


def test_every_algorithm_and_every_agent_is_described() -> None:
    text = "\n".join(path.read_text("utf-8") for path in PAGES)
    for name in (*ALGORITHMS, *TRAINERS, *BUILT_IN):
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_links_of_the_readme_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
