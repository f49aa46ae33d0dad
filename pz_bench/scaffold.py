"""``pz-bench init agent NAME``: a folder with an agent that works, its test, and its packaging.

What is written plays at once and can be measured unchanged, by its file or, once installed, by its
name. Nothing is overwritten.
"""

from __future__ import annotations

import re
import sys
from importlib import resources
from importlib.metadata import packages_distributions
from pathlib import Path
from string import Template

from pz_agents.sdk import BUILT_IN
from pz_envs.errors import ConfigError
from pz_envs.files import write_atomic

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", re.ASCII)


def write_agent(name: str, parent: Path, *, with_model: bool = False) -> list[Path]:
    """Write the folder ``parent / name``; returns the files, the agent's first.

    Args:
        name: of the agent, the folder and the distribution, such as ``my-agent``.
        parent: where the folder goes.
        with_model: write an agent that prompts a language model.

    Raises:
        ConfigError: the name cannot be one, is taken, or the folder is there.
    """
    module = name.replace("-", "_")
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"init agent {name!r}: a name has small letters, digits and single hyphens and begins "
            "with a letter, for example my-agent"
        )
    if name in BUILT_IN or module in sys.stdlib_module_names | packages_distributions().keys():
        raise ConfigError(f"init agent {name}: there is an agent or a module of that name already")
    folder = parent / name
    if folder.exists():
        raise ConfigError(f"{folder} is there already; choose another name, or another --in")
    class_name = "".join(part.capitalize() for part in re.split("[-_]", name))
    words = {
        "name": name,
        "module": module,
        "class_name": class_name,
        "with_model": " --model tiny" if with_model else "",
        "import_model": "from pz_agents.models import load_model\n" if with_model else "",
        "load": (
            'load_agent(AGENT, model=load_model("tiny"))' if with_model else "load_agent(AGENT)"
        ),
    }
    files = {
        f"{module}.py": "agent_with_model" if with_model else "agent",
        f"test_{module}.py": "test",
        "pyproject.toml": "pyproject",
        "README.md": "readme",
    }
    sources = resources.files("pz_bench") / "templates" / "agent"
    folder.mkdir(parents=True)
    for file, source in files.items():
        text = Template((sources / f"{source}.txt").read_text("utf-8")).substitute(words)
        write_atomic(folder / file, text)
    return [folder / file for file in files]
