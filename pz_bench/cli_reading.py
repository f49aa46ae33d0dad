"""The commands of ``pz-bench`` that only read: status, watch, ls, view, compare, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pz_bench.options import FAILED, OK, RUNS, JsonOption, RunsOption, SuiteOption, console

_NO_CELL = "{runs} holds no cell yet; pz-bench run --matrix starts some"


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (status, watch, ls, view, compare, doctor):
        app.command()(command)


def status(suite: SuiteOption = None, runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """Say how every suite of the store stands, or one."""
    import json
    from collections import Counter

    from pz_bench import store
    from pz_bench.watch import state

    names = store.suite_names(runs) if suite is None else [suite]
    counts = {
        name: dict(Counter(state(runs, cell) for cell in store.list_suite(runs, name)))
        for name in names
    }
    if as_json:
        typer.echo(json.dumps(counts, indent=1, sort_keys=True))
        return
    if not names:
        typer.echo(f"{runs} holds no suite yet; pz-bench run --matrix starts one")
    for name, states in counts.items():
        parts = [f"{number} {each.replace('_', ' ')}" for each, number in sorted(states.items())]
        typer.echo(f"{name}: {sum(states.values())} cells: {', '.join(parts)}")


def watch(
    suite: SuiteOption = None,
    runs: RunsOption = RUNS,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    every: Annotated[
        float, typer.Option("--every", min=0.1, help="Seconds between two frames.")
    ] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Follow a run from its files alone: progress, scores so far, training, time left.

    Ends when no cell is owed or running any more; with --json it prints a frame a line group.
    """
    import time

    from rich.live import Live

    from pz_bench import watch as watching

    def still(cells: list[watching.CellView]) -> bool:
        return not once and any(cell.state in ("running", "owed") for cell in cells)

    cells = watching.look(runs, suite)
    if as_json or once:
        while True:
            screen = console()
            if as_json:
                typer.echo(watching.to_json(cells))
            elif cells:
                screen.print(watching.frame(cells, len(cells)))
            else:
                typer.echo(_NO_CELL.format(runs=runs))
            if not still(cells):
                return
            time.sleep(every)
            cells = watching.look(runs, suite)
    screen = console()
    with Live(console=screen, auto_refresh=False) as live:
        while True:
            live.update(watching.frame(cells, max(screen.height - 4, 3)), refresh=True)
            if not still(cells):
                return
            time.sleep(every)
            cells = watching.look(runs, suite)


def ls(runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """List the cells of the store."""
    import json

    from pz_bench import store

    lines = []
    for folder in store.cell_folders(runs):
        cell = store.read_cell(folder)
        lines.append(
            {
                "id": cell.id,
                "status": cell.status,
                "episodes": len(store.read_episodes(folder)),
                "of": cell.spec.episodes,
                "seconds": cell.seconds,
                "title": cell.spec.title,
                "reason": cell.reason,
                "code": cell.code,
            }
        )
    if as_json:
        typer.echo(json.dumps(lines, indent=1))
        return
    for entry in lines:
        count = f"{entry['episodes']}/{entry['of']}"
        typer.echo(f"{entry['id']}  {entry['status']:8} {count:>9}  {entry['title']}")
    if not lines:
        typer.echo(_NO_CELL.format(runs=runs))


def view(
    episode: Annotated[list[str], typer.Argument(help="CELL or CELL:EPISODE; two stand abreast.")],
    runs: RunsOption = RUNS,
    failed: Annotated[bool, typer.Option("--failed", help="Leave out what succeeded.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Unfold reasoning and commands.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page instead.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a cell's episodes, or one of them turn by turn."""
    from pz_bench import view as viewing
    from pz_envs.files import write_atomic

    shown = [viewing.find(runs, each, failed_only=failed) for each in episode]
    if html is not None:
        write_atomic(html, viewing.to_html(shown))
        typer.echo(f"written: {html}")
    elif as_json:
        typer.echo("\n".join(map(viewing.to_json, shown)))
    elif len(shown) == 2 and all(":" in each for each in episode):
        console().print(viewing.side_by_side(*shown, full=full))
    else:
        for name, each in zip(episode, shown, strict=True):
            turns = viewing.turn_by_turn(each, full=full) if ":" in name else None
            console().print(turns or viewing.overview(each))


def compare(
    left: Annotated[str, typer.Argument(metavar="A", help="A row's label, a player, or a cell.")],
    right: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")],
    suite: SuiteOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Say how much A is above B on the instances both played, and how sure that is."""
    from pz_bench import compare as comparing
    from pz_bench.report.terminal import render_table

    found = comparing.compare(runs, left, right, suite)
    if as_json:
        typer.echo(comparing.to_json(found))
        return
    title = f"A: {found.left}   B: {found.right}   (percent)"
    screen = console()
    # A narrow terminal shows what matters most; --json has all of it.
    columns = 11 if screen.width >= 120 else 7 if screen.width >= 80 else 5
    screen.print(render_table(title, comparing.table(found, columns)))
    for name in found.not_shared:
        typer.echo(f"not compared: {name}: nothing there that both played")


def doctor(runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """Say what works here, and what to type about what does not."""
    import json
    from dataclasses import asdict

    from pz_bench.doctor import findings

    found = findings(runs)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        for finding in found:
            typer.echo(f"{'ok     ' if finding.ok else 'missing'} {finding.text}")
    raise typer.Exit(FAILED if any(finding.fatal for finding in found) else OK)
