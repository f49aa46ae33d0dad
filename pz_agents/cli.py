"""The command line ``pz-agents``: train, eval, serve, models, agents.

Anything heavy is imported inside the command that needs it, so that ``--help`` stays quick. An
error that pz raises on purpose is one line on standard error: exit 2 for wrong usage, 3 for a
demanded engine that is not installed, 4 when so many episodes failed that the run stopped, else 1;
Ctrl-C exits 130, SIGTERM 143, and the same command goes on.
"""

from __future__ import annotations

import json
import logging
import sys
from types import FrameType
from typing import Annotated, Any

import typer

from pz_agents import cli_train
from pz_agents.cli_options import Assignments, JsonOption, assign, interruptible

app = typer.Typer(
    help="Language-model agents for text environments.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

cli_train.register(app)


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
    as_json: JsonOption = False,
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
        assign(kwargs, assignment)
    for assignment in env_settings:
        assign(env_kwargs, assignment)
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
    with interruptible():
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


if __name__ == "__main__":
    main()
