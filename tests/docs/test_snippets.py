"""Every snippet of the README and the docs is run as it stands, page by page, in an empty folder.

Python and bash fences are run (of a console the lines after ``$``), diffs applied, YAML, TOML and
JSON read. A fence whose first line is ``# some/file.py`` is written there first, so that later ones
may use it. A line before a fence says what else happens:

    <!-- not run: needs 8 GPUs -->        left out, with the reason
    <!-- runs as: the same, smaller -->   run as this instead
    <!-- needs pz/Zork1-v0 -->            anywhere: the page is run where that can be played

Pages under ``guides`` are followed in a copy of the three packages. ``make test-docs`` runs every
page (``PZ_DOCS=all``), ``make test`` those that take seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pz_envs.catalog import find, missing

ROOT = Path(__file__).resolve().parents[2]
DOCS = [str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")]
PAGES = ["README.md", "README.zh.md", *DOCS]
QUICK = {
    "README.zh.md",
    "docs/envs/countdown.md",
    "docs/envs/sokoban.md",
    "docs/envs/math.md",
    "docs/guides/new-environment.md",
}
RUN = ("python", "bash", "console", "diff", "yaml", "toml", "json")
SHOWN = "text"
MOST_NOT_RUN = 0.2

_FENCE = re.compile(
    r"(?:^<!-- (?P<how>not run|runs as): (?P<what>.+?) -->\n)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml|yml|toml|json))\n")


@dataclass(frozen=True)
class Snippet:
    """A fence of a page and what its page says about running it."""

    language: str
    text: str
    how: str | None
    what: str | None


def snippets(page: str) -> list[Snippet]:
    """Return a page's snippets in order, those in no language that is run left out."""
    found = [
        Snippet(match["language"], match["text"], match["how"], match["what"])
        for match in _FENCE.finditer((ROOT / page).read_text("utf-8"))
    ]
    return [snippet for snippet in found if snippet.language in RUN]


def command(snippet: Snippet, folder: Path) -> list[str] | None:
    """Write the snippet's files; return what is to be run for it, if anything."""
    text = snippet.text
    if snippet.how == "runs as":
        return ["bash", "-euo", "pipefail", "-c", str(snippet.what)]
    named = _FILE.match(text)
    if named:
        path = folder / named[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return [sys.executable, named[1]] if "/" not in named[1] and path.suffix == ".py" else None
    if snippet.language == "python":
        (folder / "snippet.py").write_text(text)
        return [sys.executable, "snippet.py"]
    if snippet.language == "diff":
        (folder / "change.diff").write_text(text)
        return ["git", "apply", "--unidiff-zero", "--verbose", "change.diff"]
    if snippet.language in ("bash", "console"):
        typed = re.findall(r"^\$ (.*(?:\\\n.*)*)", text, re.MULTILINE)
        script = text if snippet.language == "bash" else "\n".join(typed)
        return ["bash", "-euo", "pipefail", "-c", script]
    read = {"yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}
    assert read[snippet.language](text) is not None
    return None


def chosen() -> list[str]:
    """Return the pages with something to run, that this session is to run."""
    everything = os.environ.get("PZ_DOCS") == "all"
    pages = [page for page in PAGES if any(item.how != "not run" for item in snippets(page))]
    return [page for page in sorted(pages) if everything or page in QUICK]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", chosen())
def test_the_snippets_of_a_page_run_in_order(page: str, tmp_path: Path) -> None:
    for env_id in re.findall(r"<!-- needs (\S+) -->", (ROOT / page).read_text("utf-8")):
        why = missing(find(env_id))
        if why is not None:
            pytest.skip(why)
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["GIT_CEILING_DIRECTORIES"] = str(tmp_path.parent)
    if "/guides/" in page:
        for package in ("pz_envs", "pz_agents", "pz_bench"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
        environment["PYTHONPATH"] = str(tmp_path)
    for snippet in snippets(page):
        if snippet.how == "not run":
            continue
        words = command(snippet, tmp_path)
        if words is None:
            continue
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{snippet.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_few_snippets_are_left_out_and_each_says_why() -> None:
    every = [(page, snippet) for page in PAGES for snippet in snippets(page)]
    left_out = [(page, snippet) for page, snippet in every if snippet.how == "not run"]
    assert len(every) >= 30
    assert all(len(snippet.what or "") >= 10 for _, snippet in left_out)
    assert len(left_out) <= MOST_NOT_RUN * len(every), [page for page, _ in left_out]


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_says_what_it_holds(page: str) -> None:
    fences = re.findall(r"^```(.*)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[1::2]) <= {""}
    assert set(fences[0::2]) <= {*RUN, SHOWN}


def test_the_quick_pages_are_there() -> None:
    assert set(PAGES) >= QUICK


def test_a_snippet_that_fails_is_a_failure(tmp_path: Path) -> None:
    broken = Snippet("bash", "false\ntrue\n", None, None)
    words = command(broken, tmp_path)
    assert words is not None
    assert subprocess.run(words, cwd=tmp_path).returncode == 1
