from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from pz_agents.cli import main
from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.timeout(240)

SMALL = (
    "--set",
    "groups_per_step=1",
    "--set",
    "group_size=2",
    "--set",
    "max_new_tokens=3",
    "--set",
    "learning_rate=1e-3",
    "--set",
    "eval_episodes=5",
)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Done]:
    """Run the command line in this process."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["pz-agents", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Done(int(stop.value.code or 0), captured.out, captured.err)

    return call


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pz_agents.cli", *arguments]


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("micro") / "model"
    torch.manual_seed(0)
    recipe = Recipe(layers=1, hidden=32, key_value_heads=1, feed_forward=32, context=128)
    Qwen2ForCausalLM(tiny_config(recipe)).save_pretrained(folder)
    tiny_tokenizer(recipe.context).save_pretrained(folder)
    return folder


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['pz-agents', '--help']\n"
        "from pz_agents.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'gymnasium', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("train", "eval", "models", "agents"):
        assert name in done.stdout


def test_listings_name_agents_algorithms_and_models(run):
    listed = run("agents").stdout
    for name in ("random", "expert", "zeroshot", "best-of-n", "grpo"):
        assert name in listed
    assert "tiny" in run("models").stdout


def test_the_resolved_configuration_is_printed_and_set_goes_deep(run):
    done = run(
        "train", "--preset", "tiny-countdown", "--steps", "7", "--print-config",
        "--set", "options.beta=0.04", "--set", "learning_rate=2e-4",
        "--set", "env_kwargs.numbers=[3]",
    )  # fmt: skip
    config = json.loads(done.stdout)
    assert config["steps"] == 7
    assert config["learning_rate"] == 2e-4
    assert config["options"]["beta"] == 0.04
    assert config["options"]["clip_high"] == 0.2
    assert config["env_kwargs"]["numbers"] == [3]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--env", "pz/Countdown-v0", "--steps", "0"], 2, "greater than or equal to 1"),
        (["--steps", "1"], 2, "--env pz/Countdown-v0; all ids: pz-envs list"),
        (["--algorithm", "unizero"], 2, "--env pz/Countdown-v0; all ids: pz-envs list"),
        (["--env", "pz/Countdown-v0", "--runtime", "slurm"], 2,
         "`runtime`: a runtime is local, ray or ray:ADDRESS"),
        (["--env", "pz/Countdown-v0", "--runtime", "xlocal"], 2, "(got 'xlocal')"),
        (["--preset", "tiny-countdow"], 2, "Did you mean `tiny-countdown`"),
        (["--env", "e", "--steps", "1", "--set", "sed=1"], 2, "Did you mean `seed`"),
        (["--env", "e", "--steps", "1", "--set", "seed"], 2, "KEY=VALUE"),
        (["--env", "e", "--steps", "1", "--set", "top_p=0.9"], 2, "renormalises"),
        (["--preset", "quick,smoke"], 2, "both of the layer base"),
        (["--config", "/none.toml"], 2, "no configuration in /none.toml"),
        (["--env", "pz/Countdown-v0", "--out", "{out}", "--resume", "must"], 2,
         "there is no checkpoint"),
        (["--env", "pz/Countdown-v0", "--out", "{out}", "--resume", "/none"], 2,
         "neither auto, never or must"),
        (["--env", "pz/Countdown-v0", "--out", "{out}", "--mode", "bench"], 2,
         "there is no checkpoint"),
        (["--env", "pz/Countdown-v0", "--set", "max_uses=3", "--print-config"], 2,
         "Set `max_staleness` to 2 or more"),
        (["--env", "pz/Countdown-v0", "--set", "monitor=wandbb"], 2, "'trackio'"),
        (["--env", "pz/Countdwn-v0", "--steps", "1", "--out", "{out}", "--model", "{micro}"], 2,
         "Did you mean `pz/Countdown-v0`"),
        (["--env", "pz/Countdown-v0", "--steps", "1", "--out", "{out}", "--model", "/none"], 2,
         "No model `/none`. Allowed: `tiny`, a folder"),
        (["nope.yaml"], 2, "write --config nope.yaml"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_on_standard_error_with_its_exit_code(
    run, micro, tmp_path, arguments, code, words
):
    filled = [text.format(out=tmp_path / "run", micro=micro) for text in arguments]
    done = run("train", *filled)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("algorithm=grop", "Did you mean `grpo`"),
        ("options.alpah=1", "Did you mean `alpha`"),
        ("env=pz/Countdwn-v0", "Did you mean `pz/Countdown-v0`"),
        ("env_kwargs.numbrs=[3]", "Did you mean `numbers`"),
        ("model=scripted:a", "cannot be trained here"),
        ("reward_function=pz_agents.errors:nope", "has no `nope`"),
        ("reward_model=/none", "No model `/none`"),
        ("correction=geo", "knows at `temperature` 1 alone; it is 0.5"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_written_or_shown(
    run, micro, tmp_path, monkeypatch, setting, words
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where a run has a bar
    out = tmp_path / "run"
    given = {"algorithm": "r3l", "env": "pz/Countdown-v0", "model": micro, "temperature": 0.5}
    flags = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    done = run("train", *flags, "--set", setting, "--steps", "1", "--out", str(out))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not out.exists()
    assert "0/1" not in done.stderr


def test_a_bar_is_taken_away_before_an_error_that_came_before_the_first_step(
    run, micro, tmp_path, monkeypatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "200")
    flags = ["--env", "pz/Countdown-v0", "--model", str(micro), "--steps", "1"]
    flags += ["--set", "max_new_tokens=4", "--set", "groups_per_step=1", "--set", "group_size=2"]
    done = run("train", *flags, "--out", str(tmp_path / "run"), "--resume", "must")
    assert done.returncode == 2
    # What is written after the last line that was erased stays on the screen.
    assert "0/1" in done.stderr
    assert "0/1" not in done.stderr.rpartition("\x1b[2K")[2]
    assert "no checkpoint" in done.stderr
    done = run("train", *flags, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "1/1" in done.stderr.rpartition("\x1b[2K")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--agent", "zeroshoot"], "Did you mean `zeroshot`? Known: random"),
        (["--agent", "nope.py:Agent"], "No file"),
        (["--agent", "random", "--set", "noise=1"], "takes no `noise`"),
        (["--model", "tny"], "Did you mean `tiny`? Allowed: `tiny`, a folder"),
    ],
)
def test_wrong_names_of_agents_and_models_are_wrong_usage(run, arguments, words):
    done = run("eval", "--env", "pz/Countdown-v0", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_file_says_what_flags_say_and_flags_win(run, tmp_path):
    flags = run(
        "train", "--algorithm", "r3l", "--env", "pz/ALFWorld-v0", "--model", "tiny",
        "--set", "options.alpha=2", "--set", "learning_rate=2e-4", "--print-config",
    )  # fmt: skip
    config = json.loads(flags.stdout)
    assert config["preset"] == "standard,alfworld,r3l,tiny"
    assert (config["max_turns"], config["options"]["alpha"]) == (25, 2)
    toml, yaml = tmp_path / "run.toml", tmp_path / "run.yaml"
    toml.write_text(
        'algorithm = "r3l"\nenv = "pz/ALFWorld-v0"\nmodel = "tiny"\nlearning_rate = 2e-4\n'
        "[options]\nalpha = 2\n"
    )
    yaml.write_text(
        "algorithm: r3l\nenv: pz/ALFWorld-v0\nmodel: tiny\nlearning_rate: 2e-4\n"
        "options: {alpha: 2}\nout: ignored\n"
    )
    for path in (toml, yaml):
        assert run("train", "--config", str(path), "--print-config").stdout == flags.stdout
    done = run("train", "--config", str(toml), "--set", "options.alpha=1", "--print-config")
    assert json.loads(done.stdout)["options"]["alpha"] == 1
    toml.write_text(toml.read_text().replace("model =", "modle ="))
    done = run("train", "--config", str(toml), "--print-config")
    assert (done.returncode, done.stdout) == (2, "")
    assert "run.toml: unknown key `modle`. Did you mean `model`?" in done.stderr


def test_training_ends_with_a_policy_that_can_be_evaluated(run, micro, tmp_path):
    out = tmp_path / "run"
    arguments = (
        "train", "--env", "pz/Countdown-v0", "--model", str(micro), "--steps", "2",
        "--out", str(out), *SMALL,
    )  # fmt: skip
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"policy: {out / 'policy'}\n"
    assert "step 2/2 | reward" in done.stderr
    assert "usable 0/1" in done.stderr
    again = run(*arguments)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    # The folder knows its settings, and what it began with cannot be changed.
    again = run("train", "--out", str(out))
    assert (again.returncode, again.stdout) == (0, done.stdout)
    refused = run(*arguments, "--set", "learning_rate=1e-4")
    assert refused.returncode == 2
    assert "`learning_rate` was 0.001 when the run" in refused.stderr
    assert "is 0.0001 now" in refused.stderr

    for mode, line in (("explore", "batches: 0\n"), ("train", done.stdout)):
        again = run("train", "--out", str(out), "--mode", mode)
        assert (again.returncode, again.stdout) == (0, line)

    benched = run("train", "--out", str(out), "--mode", "bench")
    assert benched.returncode == 0, benched.stderr
    assert [line.split()[1] for line in benched.stdout.splitlines()[:-1]] == ["0", "2"]
    table = (out / "bench.csv").read_text().splitlines()
    assert table[0].startswith("step,episodes,success,low,high,score_norm")
    assert [line.split(",")[:2] for line in table[1:]] == [["0", "5"], ["2", "5"]]
    if importlib.util.find_spec("matplotlib"):
        assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"

    done = run(
        "eval", "--env", "pz/Countdown-v0", "--model", str(out / "policy"), "-n", "3",
        "--set", "max_new_tokens=3", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["episodes"] == 3
    assert 3 <= figures["sampled_tokens"] <= 9


def test_the_expert_is_evaluated_without_a_model(run):
    done = run(
        "eval", "--agent", "expert", "--env", "pz/Countdown-v0", "-n", "4", "--json",
        "--env-set", "numbers=[3]",
    )  # fmt: skip
    assert json.loads(done.stdout)["success"] == 1.0


@pytest.mark.slow
def test_ctrl_c_exits_130_with_a_checkpoint_and_the_same_command_goes_on(micro, tmp_path):
    out = tmp_path / "run"
    arguments = command(
        "train", "--env", "pz/Countdown-v0", "--model", str(micro), "--steps", "60",
        "--out", str(out), *SMALL, "--set", "save_every=1000",
    )  # fmt: skip
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "The same command goes on from it" in rest
    (saved,) = (out / "checkpoints").iterdir()
    began = time.time()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stderr.splitlines() if line.startswith("step "))
    assert int(first.split("/")[0].split()[1]) == int(saved.name.split("_")[1]) + 1
    assert time.time() - began < 200


@pytest.mark.slow
def test_a_terminal_is_asked_and_shown_a_bar_with_the_epoch(run, micro, tmp_path):
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(f'{{"prompt": "Say {n}.", "answer": {n}}}\n' for n in range(4)))
    arguments = (
        "train", "--algorithm", "ppo", "--model", str(micro), "--out", str(tmp_path / "run"),
        "--set", f"datasets=[{{path: {data}, output: answer}}]", "--set", "groups_per_step=2",
        "--set", "group_size=1", "--set", "max_new_tokens=3",
    )  # fmt: skip
    assert run(*arguments, "--epochs", "0.5").returncode == 0
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments, "--epochs", "2"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "200", "TERM": "xterm"},
    )
    os.close(theirs)
    os.write(ours, b"\n")
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends whose process has gone
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "Resume from step 1? [Y/n]" in text
    assert re.search(
        r"4/4 .*Epoch 2/2 \| PL \S+ VL \S+ R \S+ A \S+ E \S+ LR \S+ \| \d+ tok/s", text
    )
    assert f"policy: {tmp_path / 'run' / 'policy'}" in text
