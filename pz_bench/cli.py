"""The ``pz-bench`` command line. Imports wait until a command runs, so that ``--help`` is quick.

Exit codes: 0 all is well, 1 some cells failed or a check did, 2 wrong usage, 3 cells are still
owed, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pz_bench.matrix import Matrix
    from pz_bench.runner import Job

OK, FAILED, USAGE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    name="pz-bench",
    help="Measure agents on text environments and write leaderboards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MatrixOption = Annotated[
    str | None,
    typer.Option("--matrix", "-m", help="A built-in matrix or a file; alone it means starter."),
]
AgentOption = Annotated[
    list[str] | None,
    typer.Option("--agent", "-a", help="An agent: name, package.module:Name or file.py:Name."),
]
EnvOption = Annotated[
    list[str] | None, typer.Option("--env", "-e", help="An environment id, or a glob over them.")
]
EpisodesOption = Annotated[
    int | None, typer.Option("--episodes", "-n", min=1, help="Episodes a cell.")
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model", "--models", help="Language models, for agents that need one: a,b."),
]
SeedsOption = Annotated[str | None, typer.Option("--seeds", help="Seeds, e.g. 0,1,2.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change the matrix, e.g. episodes=8 or rows.0.max_turns=50."),
]
SuiteOption = Annotated[str | None, typer.Option("--suite", help="The leaderboard's name.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="The store.")]
OutOption = Annotated[Path, typer.Option("--out", help="Where leaderboards are written.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Owe failed cells and failed episodes again.")
]

RUNS = Path("runs")
OUT = Path("leaderboards")
GPU_PRICE = 2.5


@app.command()
def run(
    matrix: MatrixOption = None,
    agent: AgentOption = None,
    env: EnvOption = None,
    episodes: EpisodesOption = None,
    model: ModelOption = None,
    seeds: SeedsOption = None,
    set_: SetOption = None,
    suite: SuiteOption = None,
    runs: RunsOption = RUNS,
    out: OutOption = OUT,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Cells at once; default: cores.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Measure at most this many cells now.")
    ] = None,
    retry_failed: RetryOption = False,
    fresh: Annotated[
        list[str] | None,
        typer.Option("--fresh", help="Measure this cell again from nothing (its id, or `all`)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
) -> None:
    """Measure what a matrix, or -a and -e, still owes; then write and print the leaderboard."""
    from pz_bench import live, runner

    chosen = _choose(matrix, agent, env, episodes, model, seeds, set_, suite)
    cells = _plan(chosen, runs, retry_failed)
    if dry_run:
        from pz_bench import plan as planning

        typer.echo(planning.to_text(planning.lines(cells), GPU_PRICE))
        _explain(cells)
        return
    if fresh:
        runner.forget(runs, cells, fresh)
    _remember(runs, chosen, cells, by_hand=matrix is None)
    owed = [cell for cell in cells if cell.state == "owed"]
    if owed:
        console = _console()
        with live.view(console) as view:
            board = runner.run_jobs(runs, owed[:limit], workers=jobs or _cores(), view=view)
        typer.echo(live.head(board))
    else:
        typer.echo(_nothing_to_do(cells))
    _explain(cells)
    problems = _report(runs, chosen.name, out)
    raise typer.Exit(FAILED if problems else _exit_code(cells))


@app.command()
def plan(
    matrix: MatrixOption = None,
    agent: AgentOption = None,
    env: EnvOption = None,
    episodes: EpisodesOption = None,
    model: ModelOption = None,
    seeds: SeedsOption = None,
    set_: SetOption = None,
    suite: SuiteOption = None,
    runs: RunsOption = RUNS,
    retry_failed: RetryOption = False,
    gpu_price: Annotated[
        float, typer.Option("--gpu-price", min=0, help="Of one GPU for one hour, in dollars.")
    ] = GPU_PRICE,
    as_json: JsonOption = False,
) -> None:
    """Say which cells `run` with the same options would measure, and what they would take."""
    from pz_bench import plan as planning

    chosen = _choose(matrix, agent, env, episodes, model, seeds, set_, suite)
    lines = planning.lines(_plan(chosen, runs, retry_failed))
    text = planning.to_json(lines, gpu_price) if as_json else planning.to_text(lines, gpu_price)
    typer.echo(text)
    if not as_json:
        _explain([line.job for line in lines])


@app.command()
def status(runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """Say how every suite of the store stands."""
    import json
    from collections import Counter

    from pz_bench import store

    names = store.suite_names(runs)
    counts = {
        name: dict(Counter(_state(runs, cell) for cell in store.read_suite(runs, name).cells))
        for name in names
    }
    if as_json:
        typer.echo(json.dumps(counts, indent=1, sort_keys=True))
        return
    if not names:
        typer.echo(f"{runs} holds no suite yet; pz-bench run --matrix starts one")
    for name, states in counts.items():
        parts = [f"{number} {state.replace('_', ' ')}" for state, number in sorted(states.items())]
        typer.echo(f"{name}: {sum(states.values())} cells: {', '.join(parts)}")


@app.command()
def report(
    suite: SuiteOption = None,
    runs: RunsOption = RUNS,
    out: OutOption = OUT,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if store or tables were changed.")
    ] = False,
) -> None:
    """Write the leaderboards anew from the store; with --check, compare them instead."""
    from pz_bench import store
    from pz_envs.errors import ConfigError

    names = store.suite_names(runs) if suite is None else (suite,)
    if not names:
        raise ConfigError(f"{runs} holds no suite yet. Begin with: pz-bench run --matrix")
    if not check:
        problems = [problem for name in names for problem in _report(runs, name, out)]
        raise typer.Exit(FAILED if problems else OK)
    problems = store.verify(runs) or _differences(runs, names, out)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(FAILED)
    cells = len(store.cell_folders(runs))
    typer.echo(f"ok: {cells} cells and the tables of {', '.join(names)} are as they were written")


@app.command()
def merge(
    other: Annotated[list[Path], typer.Argument(help="Stores of other machines.")],
    runs: RunsOption = RUNS,
) -> None:
    """Bring the cells of other stores into this one; they are only read."""
    from pz_bench.merge import merge as merge_stores

    conflicts = 0
    for folder in other:
        done = merge_stores(runs, folder)
        conflicts += len(done.conflicts)
        typer.echo(
            f"{folder}: {len(done.copied)} cells copied, {len(done.replaced)} replaced by fuller "
            f"ones, {len(done.equal)} here already"
        )
        for cell in done.conflicts:
            typer.echo(
                f"{runs / cell} and {folder / cell} are both done and differ; ours was kept. To "
                f"take theirs: rm -r {runs / cell}, then merge again",
                err=True,
            )
    raise typer.Exit(FAILED if conflicts else OK)


@app.command()
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
            }
        )
    if as_json:
        typer.echo(json.dumps(lines, indent=1))
        return
    for entry in lines:
        count = f"{entry['episodes']}/{entry['of']}"
        typer.echo(f"{entry['id']}  {entry['status']:8} {count:>9}  {entry['title']}")
    if not lines:
        typer.echo(f"{runs} holds no cell yet; pz-bench run --matrix starts some")


@app.command()
def view(
    episode: Annotated[list[str], typer.Argument(help="CELL or CELL:EPISODE; two stand abreast.")],
    runs: RunsOption = RUNS,
    failed: Annotated[bool, typer.Option("--failed", help="Leave out what succeeded.")] = False,
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
        _console().print(viewing.side_by_side(*shown))
    else:
        for name, each in zip(episode, shown, strict=True):
            picture = viewing.turn_by_turn if ":" in name else viewing.overview
            _console().print(picture(each))


@app.command()
def doctor(runs: RunsOption = RUNS) -> None:
    """Say what works here, and what to type about what does not."""
    from pz_bench.doctor import findings

    found = findings(runs)
    for finding in found:
        typer.echo(f"{'ok     ' if finding.ok else 'missing'} {finding.text}")
    raise typer.Exit(FAILED if any(finding.fatal for finding in found) else OK)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(args=name_the_matrix(words), prog_name="pz-bench")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.echo("interrupted; the same command goes on from here", err=True)
        return end.code if isinstance(end.code, int) else OK
    except Exception as error:  # the process ends here; importing our errors costs time
        from pz_agents.errors import AgentError, ModelError
        from pz_envs.errors import ConfigError, PzError

        if not isinstance(error, PzError):
            raise
        typer.echo(f"pz-bench: {error}", err=True)
        wrong = isinstance(error, ConfigError | AgentError | ModelError)
        return USAGE if wrong else FAILED
    return OK


def name_the_matrix(words: Sequence[str]) -> list[str]:
    """Return ``words`` with ``starter`` after a ``--matrix`` that has no value."""
    named: list[str] = []
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        named.append(word)
        if word in ("--matrix", "-m") and following.startswith("-"):
            named.append("starter")
    return named


def _choose(
    matrix: str | None,
    agents: list[str] | None,
    envs: list[str] | None,
    episodes: int | None,
    models: list[str] | None,
    seeds: str | None,
    overrides: list[str] | None,
    suite: str | None,
) -> Matrix:
    """Return the matrix that the options mean: one by name or file, or one row made of them."""
    from pz_bench.matrix import load_matrix, parse_matrix
    from pz_envs.errors import ConfigError

    changes = list(overrides or ())
    models = [name for each in models or () for name in each.split(",")]
    changes += [f"episodes={episodes}"] if episodes is not None else []
    changes += [f"seeds=[{seeds}]"] if seeds is not None else []
    if matrix is None:
        if not agents or not envs:
            raise ConfigError(
                "say what to run: --matrix (the starter matrix), --matrix NAME or FILE, or "
                "-a AGENT -e ENV, e.g. pz-bench run -a random -e pz/Countdown-v0 -n 5"
            )
        row = {"algorithms": agents, "environments": envs, "models": models or []}
        values = {"name": suite or "adhoc", "title": "By hand", "rows": [row]}
        return parse_matrix(values, changes, "the command line")
    if agents or envs:
        raise ConfigError("give --matrix or -a and -e, not both; rows of a matrix name their own")
    changes += [f"models=[{','.join(models)}]"] if models else []
    changes += [f"name={suite}"] if suite is not None else []
    return load_matrix(matrix, changes)


def _plan(chosen: Matrix, runs: Path, retry_failed: bool) -> list[Job]:
    from pz_bench.matrix import expand
    from pz_bench.runner import plan

    return plan(runs, expand(chosen), retry_failed=retry_failed)


def _explain(cells: Sequence[Job]) -> None:
    """Print, each reason once, why cells failed or could not be run."""
    said: dict[str, int] = {}
    for cell in cells:
        if cell.state in ("failed", "not_run", "locked"):
            where = cell.spec.env if cell.state == "not_run" else cell.spec.title
            command = f" Get it: {cell.command}" if cell.command else ""
            text = f"{cell.state.replace('_', ' ')}: {where}: {cell.reason}{command}"
            said[text] = said.get(text, 0) + 1
    for text, times in said.items():
        typer.echo(text + (f" ({times} cells)" if times > 1 else ""), err=True)
    if any(cell.state == "failed" for cell in cells):
        typer.echo("try the failed cells again: the same command with --retry-failed", err=True)


def _nothing_to_do(cells: Sequence[Job]) -> str:
    done = sum(cell.state == "done" for cell in cells)
    return f"nothing to do: {done} of {len(cells)} cells are done"


def _remember(runs: Path, chosen: Matrix, cells: Sequence[Job], *, by_hand: bool) -> None:
    """Note in the store which cells the suite's table has."""
    from pz_bench import store

    listed = tuple(
        store.SuiteCell(
            cell.id,
            cell.spec,
            added=by_hand,
            reason=cell.reason if cell.state == "not_run" else None,
            command=cell.command if cell.state == "not_run" else None,
        )
        for cell in cells
    )
    known = chosen.name in store.suite_names(runs)
    old = store.read_suite(runs, chosen.name) if known else None
    new = store.Suite(chosen.name, chosen.title, listed)
    store.write_suite(runs, store.merge_suite(old, new))


def _report(runs: Path, name: str, out: Path) -> list[str]:
    """Write and print one leaderboard, or print what is wrong with the store and return it."""
    from pz_bench import report, store
    from pz_bench.publish import publish

    problems = store.verify(runs)
    for problem in problems:
        typer.echo(problem, err=True)
    if not problems:
        leaderboard, files = publish(runs, name, out)
        _console().print(report.render_terminal(leaderboard))
        typer.echo("written: " + ", ".join(str(path) for path in files))
    return problems


def _differences(runs: Path, names: Sequence[str], out: Path) -> list[str]:
    from pz_bench.publish import differences

    return differences(runs, names, out)


def _state(runs: Path, cell: Any) -> str:
    """Return how a suite's cell stands, ``running`` when a process is writing it now."""
    from pz_bench import store
    from pz_bench.lock import holder

    folder = store.cell_folder(runs, cell.id)
    if not (folder / store.CELL).exists():
        return "owed" if cell.reason is None else "not_run"
    if holder(folder) is not None:
        return "running"
    found = store.read_cell(folder).status
    return "owed" if found == "partial" else found


def _exit_code(cells: Sequence[Job]) -> int:
    states = {cell.state for cell in cells}
    if "failed" in states:
        return FAILED
    if states & {"owed", "locked"} or states == {"not_run"}:
        return INCOMPLETE
    return OK


def _console() -> Any:
    from rich.console import Console

    return Console()


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
