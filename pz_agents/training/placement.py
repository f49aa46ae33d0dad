"""What each process of a run is given on a cluster, and where it is put.

Engines, workers and learner ranks get what ``resources`` says. With ``colocate_all`` the cluster
holds one place an engine, each with a GPU where it has any, and puts the engine and the learner
rank of the same number there, half a GPU each. The process of the run is rank 0: it takes its place
before anything else is put anywhere, so that nothing is put on its GPU. On one machine without a
cluster its GPUs are dealt out in order: to the ranks, then to the engines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from pz_agents.runtime import Resources, Runtime
from pz_agents.training.settings import TrainSettings
from pz_envs.errors import ConfigError

Kind = Literal["worker", "engine", "rank"]


def rank_count(settings: TrainSettings, runtime: Runtime) -> int:
    """Return how many ranks learn; 0 in the settings: one for each GPU that nothing else has."""
    if settings.colocate_all:
        return settings.engines
    if settings.learner_ranks:
        return settings.learner_ranks
    if settings.runtime == "local":
        return max(len(local_devices()) - settings.engines, 1)
    taken = settings.engines * resources_of(settings, "engine", runtime).gpus
    taken += settings.workers * resources_of(settings, "worker", runtime).gpus
    return max(int(runtime.total().gpus - taken), 1)


def take_places(settings: TrainSettings, runtime: Runtime) -> None:
    """Hold what this process needs of a cluster, and all places where engines and ranks share.

    Raises:
        ConfigError: the cluster has no room for them.
    """
    gpus = _gpus(runtime)
    if settings.colocate_all:
        engine, rank = _given(settings, "engine"), _given(settings, "rank")
        names = engine.custom.keys() | rank.custom.keys()
        custom = {name: engine.custom.get(name, 0) + rank.custom.get(name, 0) for name in names}
        each = Resources(engine.cpus + rank.cpus, gpus, custom)
        runtime.reserve(settings.engines, each, gpus / 2)
    elif gpus and (settings.learner_ranks != 1 or (_asked(settings) and local_devices())):
        runtime.reserve(1, Resources(0.0, gpus), gpus)


def _asked(settings: TrainSettings) -> bool:
    """Return whether engines or workers are given GPUs, which then must not be this process's."""
    counts: tuple[tuple[Kind, int], ...] = (
        ("engine", settings.engines),
        ("worker", settings.workers),
    )
    return any(count and _given(settings, kind).gpus for kind, count in counts)


def local_devices() -> list[str]:
    """Return the GPUs that this process may use, as CUDA names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def resources_of(settings: TrainSettings, kind: Kind, runtime: Runtime) -> Resources:
    """Return what each worker, engine or other rank is given.

    ``cpus`` and ``gpus`` are those; every other name is a resource of a cluster's nodes.

    Raises:
        ConfigError: this machine has GPUs, and fewer than its ranks and engines take.
    """
    given = _given(settings, kind)
    if settings.runtime == "local":
        return Resources(given.cpus, devices=_dealt(settings, kind, runtime))
    gpus = _gpus(runtime)
    if settings.colocate_all and kind != "worker":
        # The other ranks are numbered from 0 too.
        place = 1 if kind == "rank" else 0
        return Resources(given.cpus, gpus / 2, given.custom, place)
    if kind == "rank" and "gpus" not in settings.resources.get("rank", {}):
        return Resources(given.cpus, gpus, given.custom)
    return given


def _dealt(settings: TrainSettings, kind: Kind, runtime: Runtime) -> tuple[str, ...]:
    """Return which GPU of this machine each engine or other rank has; none where all see all."""
    there = local_devices()
    if kind == "worker" or not there:
        return ()
    ranks = rank_count(settings, runtime)
    if kind == "rank":
        # Ranks may share, over gloo; the process of the run is on the first.
        return tuple(there[rank % len(there)] for rank in range(1, ranks))
    first = 0 if settings.colocate_all else ranks
    taken = first + settings.engines
    if taken > len(there):
        raise ConfigError(
            f"{settings.engines} `engines` and {ranks} `learner_ranks` take {taken} GPUs, and this "
            f"machine has {len(there)}; set fewer, or `colocate_all` for one of each on every GPU"
        )
    return tuple(there[first:taken])


def _given(settings: TrainSettings, kind: Kind) -> Resources:
    given: Mapping[str, float] = settings.resources.get(kind, {})
    custom = {name: amount for name, amount in given.items() if name not in ("cpus", "gpus")}
    return Resources(given.get("cpus", 1.0), given.get("gpus", 0.0), custom)


def _gpus(runtime: Runtime) -> float:
    """Return the GPUs of one place: 1 where there are any."""
    return min(runtime.total().gpus, 1.0)
