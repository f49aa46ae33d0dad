"""The command line ``pz-envs``: list, play, data, doctor, check.

Anything heavy is imported inside the command that needs it, so that ``--help`` stays quick. An
error that pz raises on purpose is one line on standard error: exit 2 for wrong usage, else 1.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pz_envs.errors import ConfigError, PzError

if TYPE_CHECKING:
    from pz_envs.textenv import TextEnv

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
    from pz_envs.catalog import FAMILIES, missing, rows
    from pz_envs.errors import did_you_mean

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
        bool, typer.Option(help="Work out admissible commands (`?` shows them); slow in some games")
    ] = True,
) -> None:
    """Play in the terminal: `?` admissible commands, `:undo` one step back, `:quit` leave."""
    from pz_envs.catalog import find, make_env, missing

    row = find(env_id)
    lack = missing(row)
    if lack is not None:
        from pz_envs.errors import DataError

        raise DataError(lack)
    env = make_env(row.id, admissible_commands=commands)
    try:
        _play(env, seed)
    finally:
        env.close()


def _play(env: TextEnv, seed: int) -> None:
    observation, info = env.reset(seed=seed)
    print(info["instruction"], observation, sep="\n\n")
    past: list[bytes] = []
    over = False
    for line in _lines():
        if line == ":quit":
            break
        if line == "?":
            commands = info["admissible_commands"]
            print("no list of commands here" if commands is None else "\n".join(commands))
        elif line == ":undo":
            if not past:
                print("nothing to undo")
                continue
            observation, info = env.restore(past.pop())
            over = False
            print(observation)
        elif over:
            print("the episode is over; :undo or :quit")
        elif line:
            if env.can_snapshot:
                past.append(env.snapshot())
            observation, reward, over, _, info = env.step(line)
            print(observation)
            if reward:
                print(f"[reward {reward:+g}; score {info['score']:g} of {info['max_score']:g}]")
            if over:
                print("You won." if info["success"] else "It is over.")
    print(f"score {info['score']:g} of {info['max_score']:g} after {info['steps']} steps")


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return


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
    """One line of the doctor's report; ``needed`` findings that fail make it exit 1."""

    name: str
    ok: bool
    detail: str
    needed: bool = True


@app.command()
def doctor() -> None:
    """Say what is here, what is missing, and the command that mends it."""
    findings = list(_findings())
    for finding in findings:
        mark = "ok" if finding.ok else "MISSING" if finding.needed else "-"
        print(f"{mark:<8} {finding.name:<18} {finding.detail}")
    if any(finding.needed and not finding.ok for finding in findings):
        raise typer.Exit(1)


def _findings() -> Iterator[_Finding]:
    from importlib.metadata import version

    from pz_envs.catalog import missing, rows
    from pz_envs.datasets import data_root, download_root

    yield _Finding("python", sys.version_info >= (3, 11), sys.version.split()[0])
    for package in ("gymnasium", "numpy", "typer"):
        yield _Finding(package, True, version(package))
    jericho = importlib.util.find_spec("jericho") is not None
    yield _Finding(
        "jericho",
        jericho,
        version("jericho") if jericho else "optional; pip install 'pz-envs[jericho]'",
        needed=False,
    )
    tools = (
        ("gcc", "builds jericho", "sudo apt-get install gcc make"),
        ("make", "builds jericho", "sudo apt-get install gcc make"),
        ("java", "for Java engines", "sudo apt-get install openjdk-17-jre-headless"),
    )
    for tool, purpose, install in tools:
        path = shutil.which(tool)
        yield _Finding(tool, path is not None, path or f"{purpose}; {install}", needed=False)
    try:
        yield _Finding("data", True, str(data_root() or f"{download_root()} (nothing there yet)"))
        games = [missing(row) for row in rows() if row.family == "jericho"]
    except PzError as error:
        yield _Finding("data", False, str(error))
        return
    playable = games.count(None)
    detail = f"{playable} of {len(games)} playable"
    if not playable:
        detail += "; pz-envs data get zork_mit (MIT), pz-envs data get jericho"
    yield _Finding("jericho games", playable > 0, detail, needed=jericho)


@app.command()
def check(
    env_ids: Annotated[list[str] | None, typer.Argument(help="Ids to check.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every playable id.")] = False,
) -> None:
    """Hold environments against the conformance suite; exit 1 when a rule is broken."""
    from pz_envs.catalog import find, missing, rows
    from pz_envs.checks import check_env
    from pz_envs.errors import EnvError

    if bool(env_ids) == everything:
        raise ConfigError("give ids or --all, e.g. pz-envs check pz/Countdown-v0")
    chosen = rows() if everything else tuple(find(env_id) for env_id in env_ids or ())
    broken = 0
    for row in chosen:
        lack = missing(row)
        if lack is not None:
            print(f"{row.id}: not checked. {lack}")
            broken += not everything
            continue
        try:
            report: Any = check_env(row.id)
        except EnvError as error:
            broken += 1
            print(f"{row.id}: FAILED. {error}")
            continue
        skipped = f"; skipped {', '.join(report.skipped)}" if report.skipped else ""
        print(f"{row.id}: {len(report.passed)} rules hold{skipped} ({report.seconds:.1f} s)")
    if broken:
        raise typer.Exit(1)
