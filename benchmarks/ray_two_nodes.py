"""A training run over two Ray nodes: engines on one, learner and workers on the other.

Both nodes are on this machine (``ray.cluster_utils``). After the second step the engines' node is
killed and another is started; the run goes on with an engine there, in step with the learner.
Prints what happened as one line of JSON.

    python benchmarks/ray_two_nodes.py MODEL_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from pz_agents.runtime import open_runtime
from pz_agents.training.fleet import Fleet
from pz_agents.training.monitors import read_metrics
from pz_agents.training.run import train
from pz_agents.training.settings import TrainSettings

STEPS = 4


def node_of(runtime: Any, handle: Any) -> str:
    """Return the address of the node that an actor runs on."""
    found = runtime.ray.get_actor(handle.name, handle.address.removeprefix("ray:").split("/")[0])
    nodes = {node["NodeID"]: node for node in runtime.ray.nodes()}
    table = runtime.ray._private.state.actors(found._actor_id.hex())
    return str(nodes[table["Address"]["NodeID"]]["NodeID"])[:12]


def main(model: str, out: str) -> None:
    """Run it."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "resources": {"learner": 1},
            "object_store_memory": 100 << 20,
        },
    )
    engine_node = {"num_cpus": 1, "resources": {"engines": 1}, "object_store_memory": 100 << 20}
    node = cluster.add_node(**engine_node)
    settings = TrainSettings(
        env="pz/Countdown-v0",
        model=model,
        steps=STEPS,
        groups_per_step=4,
        group_size=4,
        max_new_tokens=6,
        max_turns=2,
        runtime=f"ray:{cluster.address}",
        workers=1,
        engines=1,
        resources={
            "worker": {"cpus": 0.1, "learner": 0.1},
            "engine": {"cpus": 0.1, "engines": 0.1},
        },
    )
    with contextlib.closing(open_runtime(settings.runtime)) as runtime:
        fleet = Fleet(settings, runtime)
        worker, engine = fleet.handles
        before = {"worker": node_of(runtime, worker), "engine": node_of(runtime, engine)}
        killed: list[float] = []

        def on_progress(step: int, steps: int, metrics: Mapping[str, float]) -> None:
            if step == 2:
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(**engine_node)
                killed.append(time.monotonic())
            elif step == 3:
                killed.append(time.monotonic())

        train(settings, Path(out), fleet=fleet, on_progress=on_progress)
        after = {"worker": node_of(runtime, worker), "engine": node_of(runtime, engine)}
        report = {
            "steps": [line["step"] for line in read_metrics(Path(out) / "metrics.jsonl")],
            "before": before,
            "after": after,
            "replaced": fleet.replaced,
            "seconds_of_the_step_after_the_kill": round(killed[1] - killed[0], 1),
        }
    cluster.shutdown()
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
