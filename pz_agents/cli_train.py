"""The commands of ``pz-agents`` that learn: train, tune."""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pz_agents.cli_options import Assignments, assign, interruptible


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(context_settings={"allow_extra_args": True})(train)
    app.command()(tune)


class Mode(enum.StrEnum):
    """What ``train`` does."""

    both = "both"
    explore = "explore"
    train = "train"
    bench = "bench"


class Goal(enum.StrEnum):
    """Which values of a metric are better."""

    max = "max"
    min = "min"


def train(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; resumed if there. [default: runs/NAME]")
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="E.g. grpo.")] = None,
    env: Annotated[str | None, typer.Option(help="E.g. pz/Countdown-v0.")] = None,
    model: Annotated[str | None, typer.Option(help="tiny, or a folder with a model.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the run.", min=1)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data, in place of steps.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of tasks and sampling.", min=0)] = None,
    preset: Annotated[
        str | None, typer.Option(help="Presets to begin with, e.g. quick,gpu; or none.")
    ] = None,
    data: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="A .jsonl or .parquet file to train on; repeatable."),
    ] = [],  # noqa: B006
    config: Annotated[
        Path | None, typer.Option(help="A .toml, .yaml or .json file of settings.")
    ] = None,
    settings: Assignments = [],  # noqa: B006  (typer reads it, nobody changes it)
    mode: Annotated[
        Mode,
        typer.Option(help="explore: only play; train: only learn; bench: evaluate checkpoints."),
    ] = Mode.both,
    runtime: Annotated[
        str | None,
        typer.Option(metavar="local|ray|ray:ADDRESS", help="Where workers and engines live."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that play; 0: this one does.")
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|must|PATH", help="Where to go on from.")
    ] = "auto",
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings and stop.")
    ] = False,
) -> None:
    """Train a model; the same command resumes a run that was cut short.

    Settings come from presets, over them the file, over it the flags, and --set over all.
    """
    from pz_agents.algorithms import load_trainer
    from pz_agents.training.player import check
    from pz_agents.training.settings import resolved
    from pz_envs.errors import ConfigError

    if context.args:
        raise ConfigError(
            f"train takes no argument `{context.args[0]}`; for a file of settings write "
            f"--config {context.args[0]}"
        )
    named = {
        "preset": preset,
        "algorithm": algorithm,
        "env": env,
        "model": model,
        "steps": steps,
        "epochs": epochs,
        "seed": seed,
        "runtime": runtime,
        "workers": workers,
    }
    flags: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if data:
        flags["datasets"] = [{"path": path} for path in data]
    for assignment in settings:
        assign(flags, assignment)
    chosen, folder = _train_settings(config, flags, out)
    trainer = load_trainer(chosen.algorithm)
    if print_config:
        values = chosen.model_dump(mode="json") if trainer else resolved(chosen)
        typer.echo(json.dumps(values, indent=1))
        return
    if trainer and mode is not Mode.both:
        raise ConfigError(f"--mode {mode.value} is for language models; leave it out")
    with interruptible():
        if not trainer:
            here = mode in (Mode.both, Mode.explore) and chosen.runtime == "local"
            check(chosen, plays=here)
        if mode is Mode.bench:
            _bench(chosen, folder)
        elif mode is Mode.explore:
            _explore(chosen, folder)
        else:
            policy = _train_with_progress(chosen, folder, mode, resume)
            if trainer and (line := trainer.last_evaluation(folder)):
                typer.echo(line)
            typer.echo(f"policy: {policy}")


def _train_settings(
    config: Path | None, flags: Mapping[str, Any], out: Path | None
) -> tuple[Any, Path]:
    """Return the run's settings and its folder.

    Without a file or flags they are those that the run in ``out`` began with.
    """
    from pz_agents.training.modes import read_settings, settings_of, with_presets
    from pz_agents.training.presets import read_config

    if out is not None and config is None and not flags:
        saved = read_settings(out)
        if saved is not None:
            return saved, out
    file = read_config(config) if config else {}
    folder = file.pop("out", None)
    chosen = settings_of(with_presets(file, flags), str(config) if config else "train")
    return chosen, out or Path(folder or _default_folder(chosen))


def _default_folder(settings: Any) -> str:
    """Return a folder that names the run: its algorithm, environment, model and seed."""
    env = settings.env.rpartition("/")[2]
    model = f"-{Path(settings.model).name}" if hasattr(settings, "model") else ""
    return f"runs/{settings.algorithm}-{env}{model}-s{settings.seed}"


def _bench(settings: Any, folder: Path) -> None:
    from pz_agents.training.modes import bench

    def on_row(row: Mapping[str, float]) -> None:
        typer.echo(
            f"step {row['step']:>6.0f} success {row['success']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}] score_norm {row['score_norm']:.3f} "
            f"turns {row['turns']:.1f}",
        )

    typer.echo(f"table: {bench(settings, folder, on_row=on_row)}")


def _explore(settings: Any, folder: Path) -> None:
    from pz_agents.training.modes import explore

    def on_batch(batch: int, step: int) -> None:
        typer.echo(f"batch {batch} played with the weights of step {step}", err=True)

    typer.echo(f"batches: {explore(settings, folder, on_batch=on_batch)}")


def _train_with_progress(settings: Any, out: Path, mode: Mode, resume: str) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from pz_agents.algorithms import load_trainer
    from pz_agents.training.modes import train_any, train_only
    from pz_agents.training.telling import epoch_text, step_line

    trainer = load_trainer(settings.algorithm)
    run = train_only if mode is Mode.train else train_any
    asked = resume == "auto" and sys.stdin.isatty() and sys.stderr.isatty()
    if asked and _begins_anew(out, settings.steps):
        resume = "never"
    describe = trainer.progress_line if trainer else step_line
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[line]}"),
    )
    console = Console(stderr=True)
    # Whoever fails before the first step leaves an error and no bar.
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    with bar as progress, _warnings_above():
        task = progress.add_task(settings.algorithm, total=settings.steps, line="")

        def on_progress(step: int, total: int, metrics: Mapping[str, float]) -> None:
            line, epoch = describe(metrics), epoch_text(metrics, step, total)
            bar.live.transient = False
            progress.update(task, completed=step, line=epoch + line)
            if not console.is_terminal:
                told = f"{epoch}step {step}/{total} | {line}"
                console.print(told, highlight=False, soft_wrap=True)

        try:
            return run(settings, out, resume=resume, on_progress=on_progress)
        except KeyboardInterrupt:
            console.print(f"Stopped; {out} has a checkpoint. The same command goes on from it.")
            raise


@contextlib.contextmanager
def _warnings_above() -> Iterator[None]:
    """Let the log write to what standard error is now: above a bar, not into it."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.__stderr__)


def _begins_anew(out: Path, steps: int) -> bool:
    """Ask whether to go on from the newest checkpoint, if any is left to do; True: begin anew."""
    from pz_agents.training.checkpoint import step_of, steps_in

    found = steps_in(out / "checkpoints")
    if not found or step_of(found[0]) >= steps:
        return False
    return not typer.confirm(f"Resume from step {step_of(found[0])}?", default=True, err=True)


def tune(
    search: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=KIND(ARGS)",
            help="A range, e.g. learning_rate=loguniform(1e-6,1e-3); also uniform, randint, "
            "lograndint, choice, grid.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the search; resumed if there.")],
    trials: Annotated[int, typer.Option(help="Trials, for each point of a grid.", min=1)] = 8,
    metric: Annotated[
        str, typer.Option(help="A name in metrics.jsonl, e.g. eval_success.")
    ] = "mean_reward",
    mode: Annotated[Goal, typer.Option(help="Whether more of it is better.")] = Goal.max,
    ray: Annotated[
        str, typer.Option(metavar="local|auto|ADDRESS", help="A Ray of its own, or a cluster.")
    ] = "local",
    concurrent: Annotated[int, typer.Option(help="Trials at once; 0: no limit.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    config: Annotated[
        Path | None, typer.Option(help="A .toml, .yaml or .json file of settings.")
    ] = None,
    settings: Assignments = [],  # noqa: B006
) -> None:
    """Search over training settings with Ray Tune; --config and --set say what all trials share."""
    from pz_agents.runtime import ray_runtime
    from pz_agents.training.modes import with_presets
    from pz_agents.training.presets import read_config
    from pz_agents.tune import TABLE, parse_draw, table
    from pz_agents.tune import tune as run_search

    flags: dict[str, Any] = {}
    for assignment in settings:
        assign(flags, assignment)
    file = read_config(config) if config else {}
    file.pop("out", None)
    with interruptible():
        found = run_search(
            with_presets(file, flags),
            dict(map(parse_draw, search)),
            out,
            trials=trials,
            metric=metric,
            mode=mode.value,
            runtime=ray_runtime(ray),
            concurrent=concurrent,
            seed=seed,
        )
    typer.echo(table(found, metric), nl=False)
    typer.echo(f"table: {out / TABLE}")
    if any(trial.error for trial in found):
        raise typer.Exit(1)
