"""What the commands of ``pz-bench`` share: option types, exit codes, defaults, the console."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

OK, FAILED, USAGE, INCOMPLETE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

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

PriceOption = Annotated[
    list[str] | None,
    typer.Option("--price", help="MODEL=READ,WRITE: dollars for a million tokens."),
]
GpuPriceOption = Annotated[
    float, typer.Option("--gpu-price", min=0, help="Of one GPU for one hour, in dollars.")
]

RUNS = Path("runs")
OUT = Path("leaderboards")
GPU_PRICE = 2.5


def console(*, err: bool = False) -> Any:
    """Return a console on standard output, or on standard error."""
    from rich.console import Console

    return Console(stderr=err)
