"""The command line ``pz-agents``: train, eval, serve, models, agents.

Anything heavy is imported inside the command that needs it, so that ``--help`` stays quick. An
error that pz raises on purpose is one line on standard error: exit 2 for wrong usage, 3 for a
demanded engine that is not installed, 4 when so many episodes failed that the run stopped, else 1;
Ctrl-C exits 130, SIGTERM 143, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Language-model agents for text environments.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Assignments = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting; dots go deeper.")
]


def main() -> None:
    """Run the command line; the entry point of the ``pz-agents`` script."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(prog_name="pz-agents")
    except Exception as error:
        # The process boundary; pz_envs.errors brings gymnasium, too slow for `--help`.
        from pz_agents.errors import EngineMissing, FailureBudgetError
        from pz_envs.errors import ConfigError, PzError

        if not isinstance(error, PzError):
            raise
        print(f"error: {error}", file=sys.stderr)
        codes = {ConfigError: 2, EngineMissing: 3, FailureBudgetError: 4}
        sys.exit(next((code for kind, code in codes.items() if isinstance(error, kind)), 1))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C exit 130 and SIGTERM 143, each after what it interrupts has saved its state."""
    from pz_agents.interrupt import exit_status, sigterm_raises

    try:
        with sigterm_raises():
            yield
    except KeyboardInterrupt as stopped:
        raise typer.Exit(exit_status(stopped)) from None


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


@app.command()
def train(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; resumed if there. [default: runs/NAME]")
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="E.g. grpo.")] = None,
    env: Annotated[str | None, typer.Option(help="E.g. pz/Countdown-v0.")] = None,
    model: Annotated[str | None, typer.Option(help="tiny, or a folder with a model.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the run.", min=1)] = None,
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
    from pz_agents.training.settings import resolved
    from pz_envs.errors import ConfigError

    named = {
        "preset": preset,
        "algorithm": algorithm,
        "env": env,
        "model": model,
        "steps": steps,
        "seed": seed,
        "runtime": runtime,
        "workers": workers,
    }
    flags: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if data:
        flags["datasets"] = [{"path": path} for path in data]
    for assignment in settings:
        _assign(flags, assignment)
    chosen, folder = _train_settings(config, flags, out)
    trainer = load_trainer(chosen.algorithm)
    if print_config:
        values = chosen.model_dump(mode="json") if trainer else resolved(chosen)
        print(json.dumps(values, indent=1))
        return
    if trainer and mode is not Mode.both:
        raise ConfigError(f"--mode {mode.value} is for language models; leave it out")
    with _interruptible():
        if mode is Mode.bench:
            _bench(chosen, folder)
        elif mode is Mode.explore:
            _explore(chosen, folder)
        else:
            policy = _train_with_progress(chosen, folder, mode, resume)
            if trainer and (line := trainer.last_evaluation(folder)):
                print(line)
            print(f"policy: {policy}")


def _train_settings(
    config: Path | None, flags: Mapping[str, Any], out: Path | None
) -> tuple[Any, Path]:
    """Return the run's settings and its folder.

    Without a file or flags they are those that the run in ``out`` began with.
    """
    from pz_agents.algorithms import load_trainer
    from pz_agents.config import parse_settings
    from pz_agents.training.modes import read_settings
    from pz_agents.training.presets import read_config, resolve
    from pz_agents.training.settings import TrainSettings
    from pz_envs.errors import ConfigError

    if out is not None and config is None and not flags:
        saved = read_settings(out)
        if saved is not None:
            return saved, out
    file = read_config(config) if config else {}
    folder = file.pop("out", None)
    source = str(config) if config else "train"
    trainer = load_trainer(str({**file, **flags}.get("algorithm", "")))
    values = {**file, **flags} if trainer else resolve(file, flags)
    if not values.get("env") and not values.get("datasets"):
        raise ConfigError(
            "no environment to train on. Name one: --env pz/Countdown-v0; all ids: pz-envs list"
        )
    if trainer:
        given = parse_settings(trainer.Settings, values, source)
        return given, out or Path(folder or _default_folder(given))
    chosen = parse_settings(TrainSettings, values, source)
    return chosen, out or Path(folder or _default_folder(chosen))


def _default_folder(settings: Any) -> str:
    """Return a folder that names the run: its algorithm, environment, model and seed."""
    env = settings.env.rpartition("/")[2]
    model = f"-{Path(settings.model).name}" if hasattr(settings, "model") else ""
    return f"runs/{settings.algorithm}-{env}{model}-s{settings.seed}"


def _bench(settings: Any, folder: Path) -> None:
    from pz_agents.training.modes import bench

    def on_row(row: Mapping[str, float]) -> None:
        print(
            f"step {row['step']:>6.0f} success {row['success']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}] score_norm {row['score_norm']:.3f} "
            f"turns {row['turns']:.1f}",
            flush=True,
        )

    print(f"table: {bench(settings, folder, on_row=on_row)}")


def _explore(settings: Any, folder: Path) -> None:
    from pz_agents.training.modes import explore

    def on_batch(batch: int, step: int) -> None:
        print(f"batch {batch} played with the weights of step {step}", file=sys.stderr, flush=True)

    print(f"batches: {explore(settings, folder, on_batch=on_batch)}")


def _train_with_progress(settings: Any, out: Path, mode: Mode, resume: str) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from pz_agents.algorithms import load_trainer
    from pz_agents.training.modes import train_both, train_only

    trainer = load_trainer(settings.algorithm)
    run = train_only if mode is Mode.train else train_both
    asked = resume == "auto" and sys.stdin.isatty() and sys.stderr.isatty()
    if asked and _begins_anew(out, settings.steps):
        resume = "never"
    describe = _line
    if trainer:
        run, describe = trainer.train, trainer.progress_line
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[line]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(settings.algorithm, total=settings.steps, line="")

        def on_progress(step: int, total: int, metrics: Mapping[str, float]) -> None:
            line = describe(metrics)
            epoch = ""
            if "epoch" in metrics:
                last = math.ceil(metrics["epoch"] * total / step)
                epoch = f"Epoch {math.ceil(metrics['epoch'])}/{last} | "
            progress.update(task, completed=step, line=epoch + line)
            if not console.is_terminal:
                told = f"{epoch}step {step}/{total} | {line}"
                console.print(told, highlight=False, soft_wrap=True)

        try:
            return run(settings, out, resume=resume, on_progress=on_progress)
        except KeyboardInterrupt:
            console.print(f"Stopped; {out} has a checkpoint. The same command goes on from it.")
            raise


def _begins_anew(out: Path, steps: int) -> bool:
    """Ask whether to go on from the newest checkpoint, if any is left to do; True: begin anew."""
    from pz_agents.training.checkpoint import step_of, steps_in

    found = steps_in(out / "checkpoints")
    if not found or step_of(found[0]) >= steps:
        return False
    return not typer.confirm(f"Resume from step {step_of(found[0])}?", default=True, err=True)


def _line(metrics: Mapping[str, float]) -> str:
    speed = metrics["sampled_tokens"] / max(metrics["seconds"], 1e-9)
    if "value_loss" in metrics:
        return _ppo_line(metrics, speed)
    parts = [
        f"reward {metrics['reward']:.3f} success {metrics['success']:.3f}",
        f"usable {metrics['usable_groups']:.0f}/{metrics['groups']:.0f}",
        f"loss {metrics['loss']:.4f} entropy {metrics['entropy']:.3f} {speed:.0f} tok/s",
    ]
    if metrics["stale_groups"]:
        parts.insert(2, f"stale {metrics['stale_groups']:.0f}")
    if "eval_success" in metrics:
        parts.append(f"eval {metrics['eval_success']:.3f}")
    return " ".join(parts)


@app.command()
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
    from pz_agents.training.presets import read_config, resolve
    from pz_agents.tune import TABLE, parse_draw, table
    from pz_agents.tune import tune as run_search

    flags: dict[str, Any] = {}
    for assignment in settings:
        _assign(flags, assignment)
    with _interruptible():
        found = run_search(
            resolve(read_config(config) if config else {}, flags),
            dict(map(parse_draw, search)),
            out,
            trials=trials,
            metric=metric,
            mode=mode.value,
            runtime=ray_runtime(ray),
            concurrent=concurrent,
            seed=seed,
        )
    print(table(found, metric), end="")
    print(f"table: {out / TABLE}")
    if any(trial.error for trial in found):
        raise typer.Exit(1)


def _ppo_line(metrics: Mapping[str, float], speed: float) -> str:
    """Policy loss, value loss, reward, advantage, entropy and learning rate."""
    parts = [
        f"PL {metrics['loss']:.4f} VL {metrics['value_loss']:.4f} R {metrics['reward']:.3f}",
        f"A {metrics['advantage']:.3f} E {metrics['entropy']:.3f}",
        f"LR {metrics['learning_rate']:.2e} | {speed:.0f} tok/s",
    ]
    if "eval_success" in metrics:
        parts.append(f"eval {metrics['eval_success']:.3f}")
    return " ".join(parts)


@app.command("eval")
def evaluate(
    env: Annotated[str, typer.Option(help="E.g. pz/Countdown-v0.")],
    agent: Annotated[str, typer.Option(help="See `pz-agents agents`.")] = "zeroshot",
    model: Annotated[str, typer.Option(help="For agents that play with a model.")] = "tiny",
    episodes: Annotated[int, typer.Option("-n", help="Episodes.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Of the agent's randomness.", min=0)] = 0,
    max_turns: Annotated[int, typer.Option(help="Turns an episode.", min=1)] = 100,
    concurrency: Annotated[int, typer.Option(help="Episodes alive at once.", min=1)] = 16,
    settings: Assignments = [],  # noqa: B006
    env_settings: Annotated[
        list[str], typer.Option("--env-set", metavar="KEY=VALUE", help="An environment argument.")
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Play held-out episodes and print what came of them; --set goes to the agent."""
    from functools import partial

    from pz_agents.models import load_model
    from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
    from pz_agents.sdk.loading import load_agent, needs_model
    from pz_envs.catalog import find, make_env
    from pz_envs.seeding import derive_seed

    row = find(env)
    kwargs: dict[str, Any] = {}
    env_kwargs: dict[str, Any] = {}
    for assignment in settings:
        _assign(kwargs, assignment)
    for assignment in env_settings:
        _assign(env_kwargs, assignment)
    player = load_agent(
        agent, model=load_model(model) if needs_model(agent) else None, kwargs=kwargs
    )
    commands = True if getattr(player, "needs_admissible_commands", False) else None
    played = run_episodes(
        player,
        [
            EpisodeSpec(str(number), row.id, derive_seed("eval", row.id, number) % 2**31)
            for number in range(episodes)
        ],
        make_env=partial(make_env, split="eval", admissible_commands=commands, **env_kwargs),
        limits=Limits(turns=max_turns),
        seed=seed,
        concurrency=concurrency,
    )
    with _interruptible():
        trajectories = list(played)
    figures = {
        "episodes": len(trajectories),
        "success": sum(item.success for item in trajectories) / episodes,
        "score_norm": sum(item.score_norm for item in trajectories) / episodes,
        "turns": sum(len(item.steps) for item in trajectories) / episodes,
        "sampled_tokens": sum(item.sampled_tokens for item in trajectories),
        "failed": sum(item.status == "failed" for item in trajectories),
    }
    if as_json:
        print(json.dumps(figures))
    else:
        print(" ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if figures["failed"]:
        errors = {item.error for item in trajectories if item.error}
        print(f"error: {figures['failed']} failed: {'; '.join(sorted(errors))}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="See `pz-agents models`.")] = "tiny",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 0,
    host: Annotated[
        str, typer.Option(help="Where to listen; whoever can reach it can use the model.")
    ] = "127.0.0.1",
    key: Annotated[
        str | None, typer.Option(envvar="PZ_API_KEY", help="The API key that is demanded.")
    ] = None,
) -> None:
    """Serve a model over the OpenAI API until Ctrl-C (exit status 0) or SIGTERM (143)."""
    import signal
    import threading

    from pz_agents.models import load_model
    from pz_agents.serving import ModelServer

    ended = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        ended.set()

    before = [signal.signal(number, end) for number in numbers]
    try:
        with ModelServer(load_model(model), host=host, port=port, key=key) as server:
            print(f"serving {model} at {server.url} (Ctrl-C ends it)", flush=True)
            ended.wait()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if signal.SIGTERM in received:
        raise typer.Exit(128 + signal.SIGTERM)


@app.command()
def models() -> None:
    """List the forms that --model takes."""
    rows = {
        "tiny": "a model of under 1 M parameters, built and cached at first use; for trying things",
        "PATH": "a folder written by transformers' save_pretrained, or by `pz-agents train`",
        "vllm:MODEL": "one of the two above, served by vLLM in this process",
        "supervised:MODEL": "any of these in a process of its own, restarted when it dies",
        "openai:NAME@URL": "a model behind an OpenAI-compatible server, e.g. vLLM; not trainable",
        "scripted:A|B": "says A, then B, and again; for tests",
    }
    for name, text in rows.items():
        print(f"{name:<16} {text}")


@app.command()
def agents() -> None:
    """List the agents that --agent takes, and the training algorithms."""
    from pz_agents.algorithms import ALGORITHMS, TRAINERS
    from pz_agents.sdk.loading import BUILT_IN, agent_names

    for name in agent_names():
        print(f"{name:<16} {BUILT_IN.get(name, 'installed')}")
    for name, place in {**ALGORITHMS, **TRAINERS}.items():
        print(f"{name:<16} {place} (train)")
    print("or your own: package.module:Name, path/file.py:Name, external:COMMAND")


def _assign(values: dict[str, Any], assignment: str) -> None:
    """Set ``a.b=value`` in ``values``; the value is read as YAML, so 1e-4 and [1, 2] work."""
    import yaml

    from pz_envs.errors import ConfigError

    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"a setting is KEY=VALUE, e.g. --set group_size=16; got `{assignment}`")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {assignment}: `{parent}` is a single value")
        values = inner
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: not a YAML value ({error})") from error
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    values[last] = value


if __name__ == "__main__":
    main()
