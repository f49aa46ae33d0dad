"""The ``pz-bench`` command line. Imports wait until a command runs, so that ``--help`` is quick.

Exit codes: 0 all is well, 1 some cells failed or a check did, 2 wrong usage, 3 cells are still
owed, 130 interrupted, 143 interrupted by SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from pz_bench import cli_reading
from pz_bench.options import (
    FAILED,
    GPU_PRICE,
    INCOMPLETE,
    INTERRUPTED,
    OK,
    OUT,
    RUNS,
    TERMINATED,
    USAGE,
    AgentOption,
    EnvOption,
    EpisodesOption,
    GpuPriceOption,
    JsonOption,
    MatrixOption,
    ModelOption,
    OutOption,
    PriceOption,
    RetryOption,
    RunsOption,
    SeedsOption,
    SetOption,
    SuiteOption,
    console,
)

if TYPE_CHECKING:
    from pz_bench.matrix import Matrix
    from pz_bench.runner import Job, Launch

app = typer.Typer(
    name="pz-bench",
    help="Measure agents on text environments and write leaderboards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

cli_reading.register(app)

init_app = typer.Typer(help="Write a working template.", no_args_is_help=True)
app.add_typer(init_app, name="init")


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
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="auto|local|ADDRESS", help="Measure on a Ray cluster, or a Ray of our own."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Measure at most this many cells now.")
    ] = None,
    retry_failed: RetryOption = False,
    fresh: Annotated[
        list[str] | None,
        typer.Option("--fresh", help="Measure this cell again from nothing (its id, or `all`)."),
    ] = None,
    max_usd: Annotated[
        float | None,
        typer.Option("--max-usd", min=0, help="Start no cell that would make the study dearer."),
    ] = None,
    price: PriceOption = None,
    gpu_price: GpuPriceOption = GPU_PRICE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what a matrix, or -a and -e, still owes; then write and print the leaderboard."""
    from pz_bench import budget, live, runner

    chosen = _choose(matrix, agent, env, episodes, model, seeds, set_, suite)
    chosen = _limited(chosen, max_usd, price)
    cells = _plan(chosen, runs, retry_failed)
    runner.renew(cells, fresh or ())
    owed = [cell for cell in cells if cell.state == "owed"]
    if dry_run:
        from pz_bench import plan as planning

        to_words = planning.to_json if as_json else planning.to_text
        typer.echo(to_words(planning.lines(cells, chosen.prices), gpu_price))
        if limit is not None and limit < len(owed):
            now = f"now: {limit} of them (--limit {limit}): {_titles(owed[:limit])}"
            typer.echo(now, err=as_json)
        _explain(cells)
        return
    _remember(runs, chosen, cells, by_hand=matrix is None)
    if owed:
        with _place(ray) as (cores, launch), live.view(console(err=as_json)) as view:
            board = runner.run_jobs(
                runs,
                owed[:limit],
                workers=jobs or cores,
                view=view,
                launch=launch,
                may_not=budget.gate(runs, cells, chosen.limits, chosen.prices, gpu_price),
            )
        typer.echo(live.head(board), err=as_json)
    else:
        typer.echo(_nothing_to_do(cells), err=as_json)
    _explain(cells)
    problems, written = _report(runs, chosen.name, out, show=not as_json)
    if as_json:
        typer.echo(_to_json(chosen.name, cells, written, problems))
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
    price: PriceOption = None,
    gpu_price: GpuPriceOption = GPU_PRICE,
    as_json: JsonOption = False,
) -> None:
    """Say which cells `run` with the same options would measure, and what they would take."""
    from pz_bench import plan as planning

    chosen = _choose(matrix, agent, env, episodes, model, seeds, set_, suite)
    chosen = _limited(chosen, None, price)
    lines = planning.lines(_plan(chosen, runs, retry_failed), chosen.prices)
    text = planning.to_json(lines, gpu_price) if as_json else planning.to_text(lines, gpu_price)
    typer.echo(text)
    if not as_json:
        _explain([line.job for line in lines])


@app.command()
def report(
    suite: SuiteOption = None,
    runs: RunsOption = RUNS,
    out: OutOption = OUT,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if store or tables were changed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the leaderboards anew from the store; with --check, compare them instead."""
    import json

    from pz_bench import store
    from pz_envs.errors import ConfigError

    names = store.suite_names(runs) if suite is None else (suite,)
    if not names:
        raise ConfigError(f"{runs} holds no suite yet. Begin with: pz-bench run --matrix")
    if not check and not as_json:
        problems = [problem for name in names for problem in _report(runs, name, out)[0]]
        raise typer.Exit(FAILED if problems else OK)
    problems = store.verify(runs)
    written: list[str] = []
    if not problems and check:
        problems = _differences(runs, names, out)
    elif not problems:
        from pz_bench.publish import publish

        written = [str(path) for name in names for path in publish(runs, name, out)[1]]
    if as_json:
        typer.echo(json.dumps({"suites": names, "written": written, "problems": problems}))
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(FAILED)
    if not as_json:
        cells = len(store.cell_folders(runs))
        named = ", ".join(names)
        typer.echo(f"ok: {cells} cells and the tables of {named} are as they were written")


@app.command()
def merge(
    other: Annotated[list[Path], typer.Argument(help="Stores of other machines.")],
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Bring the cells of other stores into this one; they are only read."""
    import json
    from dataclasses import asdict

    from pz_bench.merge import merge as merge_stores

    found = {str(folder): merge_stores(runs, folder) for folder in other}
    if as_json:
        typer.echo(json.dumps({folder: asdict(done) for folder, done in found.items()}, indent=1))
    for folder, done in found.items():
        if not as_json:
            typer.echo(
                f"{folder}: {len(done.copied)} cells copied, {len(done.replaced)} replaced by "
                f"fuller ones, {len(done.equal)} here already"
            )
        for cell in done.conflicts:
            typer.echo(
                f"{runs / cell} and {Path(folder) / cell} are both done and differ; ours was kept. "
                f"To take theirs: rm -r {runs / cell}, then merge again",
                err=True,
            )
    raise typer.Exit(FAILED if any(done.conflicts for done in found.values()) else OK)


@init_app.command("agent")
def init_agent(
    name: Annotated[str, typer.Argument(help="Of the agent, e.g. my-agent.")],
    with_model: Annotated[
        bool, typer.Option("--with-model", help="One that prompts a language model.")
    ] = False,
    parent: Annotated[Path, typer.Option("--in", help="Where its folder goes.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Write a folder with an agent that works, its test, its packaging and a README."""
    from pz_bench.scaffold import write_agent

    files = write_agent(name, parent, with_model=with_model)
    if as_json:
        import json

        typer.echo(json.dumps({"written": [str(file) for file in files]}, indent=1))
        return
    for file in files:
        typer.echo(f"written: {file}")
    typer.echo(f"next: cd {files[0].parent} && pytest")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        app(args=name_the_matrix(words), prog_name="pz-bench")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.echo("interrupted; the same command goes on from here", err=True)
            return TERMINATED if terminated else INTERRUPTED
        return end.code if isinstance(end.code, int) else OK
    except Exception as error:  # the process ends here; importing our errors costs time
        from pz_agents.errors import AgentError, ModelError
        from pz_envs.errors import ConfigError, PzError

        if not isinstance(error, PzError):
            raise
        typer.echo(f"pz-bench: {error}", err=True)
        wrong = isinstance(error, ConfigError | AgentError | ModelError)
        return USAGE if wrong else FAILED
    finally:
        signal.signal(signal.SIGTERM, before)
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


def _limited(chosen: Matrix, max_usd: float | None, prices: list[str] | None) -> Matrix:
    """Return the matrix with the limit and the prices of the command line before its own."""
    from pz_bench.budget import parse_price

    limits = chosen.limits
    if max_usd is not None:
        limits = limits.model_copy(update={"usd": max_usd})
    given = dict(map(parse_price, prices or ()))
    return chosen.model_copy(
        update={"limits": limits, "prices": {**given, **chosen.prices, **given}}
    )


def _plan(chosen: Matrix, runs: Path, retry_failed: bool) -> list[Job]:
    from pz_bench.matrix import expand
    from pz_bench.runner import plan

    return plan(runs, expand(chosen), retry_failed=retry_failed)


def _explain(cells: Sequence[Job]) -> None:
    """Print, each reason once, why cells failed or could not be run."""
    said: dict[str, int] = {}
    for cell in cells:
        if cell.state in ("failed", "not_run", "locked") or (cell.state == "owed" and cell.reason):
            where = cell.spec.env if cell.state == "not_run" else cell.spec.title
            command = f" Get it: {cell.command}" if cell.command else ""
            text = f"{cell.state.replace('_', ' ')}: {where}: {cell.reason}{command}"
            said[text] = said.get(text, 0) + 1
    for text, times in said.items():
        typer.echo(text + (f" ({times} cells)" if times > 1 else ""), err=True)
    if any(cell.state == "failed" for cell in cells):
        typer.echo("try the failed cells again: the same command with --retry-failed", err=True)


def _titles(cells: Sequence[Job]) -> str:
    return "; ".join(cell.spec.title for cell in cells)


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


def _to_json(
    suite: str, cells: Sequence[Job], written: Sequence[str], problems: Sequence[str]
) -> str:
    import json

    told = [
        {
            "id": cell.id,
            "title": cell.spec.title,
            "state": cell.state,
            "reason": cell.reason,
            "command": cell.command,
        }
        for cell in cells
    ]
    found = {"suite": suite, "cells": told, "written": written, "problems": problems}
    return json.dumps(found, indent=1, ensure_ascii=False)


def _report(runs: Path, name: str, out: Path, *, show: bool = True) -> tuple[list[str], list[str]]:
    """Write and print one leaderboard, or print what is wrong with the store.

    Returns:
        What is wrong, and the files that were written.
    """
    from pz_bench import report, store
    from pz_bench.publish import publish

    problems = store.verify(runs)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        return problems, []
    leaderboard, files = publish(runs, name, out)
    written = [str(path) for path in files]
    if show:
        console().print(report.render_terminal(leaderboard))
        typer.echo("written: " + ", ".join(written))
    return [], written


def _differences(runs: Path, names: Sequence[str], out: Path) -> list[str]:
    from pz_bench.publish import differences

    return differences(runs, names, out)


def _exit_code(cells: Sequence[Job]) -> int:
    states = {cell.state for cell in cells}
    if "failed" in states:
        return FAILED
    if states & {"owed", "locked"} or states == {"not_run"}:
        return INCOMPLETE
    return OK


@contextlib.contextmanager
def _place(ray: str | None) -> Iterator[tuple[int, Launch | None]]:
    """Yield how many cells fit at once, and what starts them where that is not this machine."""
    if ray is None:
        yield _cores(), None
        return
    from pz_agents.runtime import open_runtime, ray_runtime
    from pz_bench.ray_cells import Launcher

    with contextlib.closing(open_runtime(ray_runtime(ray))) as runtime:
        yield max(int(runtime.total().cpus), 1), Launcher(runtime)


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
