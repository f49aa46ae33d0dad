"""Importing pz_envs registers ids and does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pz_envs

_LOOK = """
import json, sys, threading
before = set(sys.modules)
import pz_envs
import gymnasium
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({
    "modules": sorted(new),
    "submodules": sorted(name for name in sys.modules if name.startswith("pz_envs.")),
    "threads": threading.active_count(),
    "ids": sum(name.startswith("pz/") for name in gymnasium.registry),
}))
"""


def test_a_fresh_import_registers_and_starts_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", _LOOK],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PZ_CACHE": str(cache), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    seen = json.loads(done.stdout)
    unwanted = {"torch", "jericho", "transformers", "spacy", "typer", "rich", "pyarrow", "pydantic"}
    assert not unwanted & set(seen["modules"])
    assert "pz_envs.jericho.env" not in seen["submodules"]
    assert "pz_envs.countdown.env" not in seen["submodules"]
    assert seen["threads"] == 1
    assert seen["ids"] == len(pz_envs.rows())
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_gymnasium_alone_finds_an_environment_by_its_long_name() -> None:
    code = (
        "import gymnasium, sys\n"
        "env = gymnasium.make('pz_envs:pz/Countdown-v0')\n"
        "print(env.reset(seed=0)[0])\n"
        "assert 'torch' not in sys.modules and 'jericho' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Numbers: ")
