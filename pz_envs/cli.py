"""The command line ``pz-envs``: list, play, data, doctor, check.

Anything heavy is imported inside the command that needs it, so that ``--help`` stays quick. An
error that pz raises on purpose is one line on standard error: exit 2 for wrong usage, else 1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pz_envs.errors import ConfigError, DataError, PzError

if TYPE_CHECKING:
    from pz_envs.catalog import EnvRow

app = typer.Typer(
    help="Text environments of LLM-agent research.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Find and download data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main() -> None:
    """Run the command line; the entry point of the ``pz-envs`` script."""
    try:
        app(prog_name="pz-envs")
    except PzError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


@app.command("list")
def list_environments(
    family: Annotated[str | None, typer.Option(help="Show only this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every environment and what it lacks to be played here."""
    from pz_envs.catalog import missing, rows
    from pz_envs.errors import did_you_mean
    from pz_envs.families import FAMILIES

    if family is not None and family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"No family `{family}`.{did_you_mean(family, FAMILIES)} Known: {known}")
    table = [
        {"id": row.id, "family": row.family, "metric": row.metric, "missing": missing(row)}
        for row in rows()
        if family in (None, row.family)
    ]
    if as_json:
        print(json.dumps(table, indent=1))
        return
    for entry in table:
        state = entry["missing"] or "playable"
        print(f"{entry['id']:<24} {entry['family']:<10} {state}")
    playable = sum(entry["missing"] is None for entry in table)
    print(f"{playable} of {len(table)} playable")


@app.command()
def play(
    env_id: Annotated[str, typer.Argument(help="An id, e.g. pz/Countdown-v0.")],
    seed: Annotated[int, typer.Option(help="Which episode.", min=0)] = 0,
    commands: Annotated[
        bool, typer.Option(help="Work out admissible commands for Tab; slow in some games.")
    ] = True,
    transcript: Annotated[
        Path | None, typer.Option(help="Append what is typed and answered to this file.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="Shop in a browser (WebShop).")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --web; 0 picks one.")] = 0,
) -> None:
    """Play in the terminal; /help lists what is no move: /commands, /hint, /undo, /quit."""
    from pz_envs.catalog import find, make_env, missing
    from pz_envs.play import play as play_by_hand

    row = find(env_id)
    lack = missing(row)
    if lack is not None:
        raise DataError(lack)
    if web:
        _serve_shop(row.id, seed, port)
        return
    env = make_env(row.id, admissible_commands=commands)
    try:
        play_by_hand(env, seed=seed, title=row.id, transcript=transcript)
    finally:
        env.close()


def _serve_shop(env_id: str, seed: int, port: int) -> None:
    """Let a person shop in a browser until Ctrl-C."""
    from pz_envs.webshop.page import ADDRESS, ShopServer

    if env_id != "pz/WebShop-v0":
        raise ConfigError(f"--web is for pz/WebShop-v0, not {env_id}")
    with ShopServer(port, seed=seed) as server:
        print(f"http://{ADDRESS}:{server.server_port}/   (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


@data_app.command("import-webshop")
def data_import_webshop(
    source: Annotated[Path, typer.Argument(help="Folder with items_shuffle*.json and the rest.")],
    target: Annotated[Path, typer.Argument(help="The shop folder to make.")],
    num_products: Annotated[int | None, typer.Option(help="Only the first N records.")] = None,
) -> None:
    """Turn the original WebShop's files into a memory-mapped shop folder."""
    from rich.progress import Progress

    from pz_envs.webshop.importing import import_files

    with Progress() as progress:
        task = progress.add_task("importing", total=1.0)

        def show(done: int, share: float) -> None:
            progress.update(task, completed=share, description=f"{done} products")

        import_files(source, target, num_products=num_products, on_progress=show)
    print(target)


@data_app.command("list")
def data_list() -> None:
    """List the known data sets, how much of each is here, and their licences."""
    from pz_envs.datasets import DATASETS, is_present

    for dataset in DATASETS.values():
        here = sum(is_present(dataset, file) for file in dataset.files)
        print(f"{dataset.name:<10} {here}/{len(dataset.files)} files here   {dataset.title}")
        print(f"{'':<10} licence: {dataset.licence}")


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="A data set, or dataset/file for one file.")],
) -> None:
    """Download a data set, check every file's sha256, and print its folder."""
    from pz_envs.datasets import dataset_for, get

    print(f"licence: {dataset_for(name)[0].licence}", file=sys.stderr)

    def show(done: int, total: int, file: str) -> None:
        print(f"[{done}/{total}] {file}".rstrip(), file=sys.stderr)

    print(get(name, on_progress=show))


@data_app.command("path")
def data_path() -> None:
    """Print the folder that data are read from first."""
    from pz_envs.datasets import data_root, download_root

    print(data_root() or download_root())


@dataclass(frozen=True, slots=True)
class _Finding:
    """One line of the doctor's report.

    ``state`` is ``ok``, ``optional`` (something could be added) or ``missing`` (something that is
    installed cannot work); ``mend`` is the command that changes it.
    """

    name: str
    state: str
    detail: str
    mend: str = ""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is here, what is missing, and the command that mends it; exit 1 when one must be."""
    findings = list(_findings())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        marks = {"ok": "ok", "optional": "-", "missing": "MISSING"}
        for finding in findings:
            mend = f"  mend: {finding.mend}" if finding.mend else ""
            print(f"{marks[finding.state]:<8} {finding.name:<18} {finding.detail}{mend}")
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def _findings() -> Iterator[_Finding]:
    from importlib.metadata import version

    from pz_envs.datasets import data_root, download_root

    recent = sys.version_info >= (3, 11)
    found = sys.version.split()[0]
    yield _Finding("python", "ok" if recent else "missing", found, "" if recent else "python 3.11")
    for package in ("gymnasium", "numpy", "typer", "rich"):
        yield _Finding(package, "ok", version(package))
    yield from _extras()
    yield from _tools()
    try:
        root = data_root()
    except DataError as error:
        yield _Finding("data", "missing", str(error), "unset PZ_DATA")
        return
    yield _Finding("data", "ok", str(root or f"{download_root()} (nothing there yet)"))
    yield from _data_sets()
    yield from _families()


def _extras() -> Iterator[_Finding]:
    from pz_envs.catalog import extra_module
    from pz_envs.families import FAMILIES

    for extra in sorted({family.extra for family in FAMILIES.values() if family.extra}):
        module = extra_module(extra)
        if importlib.util.find_spec(module) is None:
            yield _Finding(
                extra, "optional", f"{module} is not installed", f"pip install 'pz-envs[{extra}]'"
            )
        else:
            yield _Finding(extra, "ok", f"{module} is installed")


def _tools() -> Iterator[_Finding]:
    """Look for programs; Java is a must once the package that needs it is installed."""
    java_needed = importlib.util.find_spec("scienceworld") is not None
    tools = (
        ("java", "runs ScienceWorld", "openjdk-17-jre-headless", java_needed),
        ("gcc", "builds jericho", "gcc make", False),
        ("make", "builds jericho", "gcc make", False),
    )
    for tool, purpose, packages, needed in tools:
        path = shutil.which(tool)
        home = os.environ.get("JAVA_HOME")
        if tool == "java" and path is None and home:
            path = shutil.which("java", path=os.path.join(home, "bin"))
        if path is not None:
            yield _Finding(tool, "ok", path)
        else:
            yield _Finding(
                tool,
                "missing" if needed else "optional",
                f"not found; {purpose}",
                f"sudo apt-get install {packages}",
            )


def _data_sets() -> Iterator[_Finding]:
    """Say of each data set how many of its files are found (by name; ``data get`` verifies)."""
    from pz_envs.datasets import DATASETS, find_file

    for dataset in DATASETS.values():
        here = sum(find_file(dataset.folder, file.name) is not None for file in dataset.files)
        whole = here == len(dataset.files)
        yield _Finding(
            f"data {dataset.name}",
            "ok" if whole else "optional",
            f"{here} of {len(dataset.files)} files; {dataset.title}",
            "" if whole else f"pz-envs data get {dataset.name}",
        )


def _families() -> Iterator[_Finding]:
    """Say of each family how many ids are playable; none, with its extra here, is a lack."""
    from pz_envs.catalog import extra_module, missing, rows
    from pz_envs.families import FAMILIES

    for family in FAMILIES.values():
        lacks = [missing(row) for row in rows() if row.family == family.name]
        playable = lacks.count(None)
        first = next((lack for lack in lacks if lack is not None), "")
        installed = family.extra and importlib.util.find_spec(extra_module(family.extra))
        yield _Finding(
            f"play {family.name}",
            "ok" if playable else "missing" if installed else "optional",
            f"{playable} of {len(lacks)} ids" + (f". {first}" if first else ""),
        )


@app.command()
def check(
    env_ids: Annotated[list[str] | None, typer.Argument(help="Ids to check.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every id whose data are here.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("-j", "--jobs", help="How many at a time.", min=1)
    ] = None,
) -> None:
    """Hold environments against the conformance suite; exit 1 when a rule is broken."""
    from pz_envs.catalog import find, rows

    if bool(env_ids) == everything:
        raise ConfigError("give ids or --all, e.g. pz-envs check pz/Countdown-v0")
    chosen = rows() if everything else tuple(find(env_id) for env_id in env_ids or ())
    if _check(chosen, jobs or os.cpu_count() or 1, absent_is_failure=not everything):
        raise typer.Exit(1)


def _check(chosen: Sequence[EnvRow], jobs: int, *, absent_is_failure: bool) -> bool:
    """Check rows, print a line for each and a table of families; returns whether any failed."""
    import time

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from pz_envs.catalog import missing
    from pz_envs.checks import check_many

    console = Console(highlight=False, markup=False, soft_wrap=True)
    started = time.monotonic()
    lacks = {row.id: missing(row) for row in chosen}
    family_of = {row.id: row.family for row in chosen}
    counts = {family: Counter[str]() for family in family_of.values()}
    for env_id, lack in lacks.items():
        if lack is not None:
            counts[family_of[env_id]]["not here"] += 1
            console.print(f"{env_id}: not here. {lack}", style="dim")
    here = [env_id for env_id, lack in lacks.items() if lack is None]
    columns = (TextColumn("checking"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(here))
        for env_id, report, problem in check_many(here, jobs=min(jobs, max(len(here), 1))):
            count = counts[family_of[env_id]]
            if report is None:
                count["failed"] += 1
                console.print(f"{env_id}: FAILED. {problem}", style="red")
            else:
                count["hold"] += 1
                count["seconds"] += round(report.seconds)
                skipped = f"; skipped {', '.join(report.skipped)}" if report.skipped else ""
                rules = f"{len(report.passed)} rules hold{skipped}"
                console.print(f"{env_id}: {rules} ({report.seconds:.1f} s)")
            progress.advance(task)
    shown = ("hold", "failed", "not here", "seconds")
    table = Table("family", *shown)
    for family, count in counts.items():
        table.add_row(family, *(str(count[column]) for column in shown))
    console.print(table)
    failed = sum(count["failed"] for count in counts.values())
    absent = len(chosen) - len(here)
    console.print(
        f"{len(here) - failed} ids hold, {failed} failed, {absent} are not here; "
        f"{time.monotonic() - started:.0f} s with {jobs} at a time"
    )
    return bool(failed) or (absent_is_failure and absent > 0)
