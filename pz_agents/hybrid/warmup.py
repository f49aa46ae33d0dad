"""Teaches a small model the form of a reply, so that there is something for its rewards to compare.

Where no sampled reply ever closes its thought or names a command, all are paid the same and nothing
can be learned. Invented turns in the prompts of the hybrid are answered with one of their commands,
any of them: what is taught is the form and not the play. The words are random letters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from pz_agents.algorithms import load_algorithm
from pz_agents.errors import ModelError
from pz_agents.hybrid.prompt import Prompter
from pz_agents.hybrid.settings import HybridSettings
from pz_agents.models import load_model
from pz_agents.models.chat import without_progress_bars
from pz_agents.models.transformers import TransformersModel
from pz_agents.priorzero.prior import Moment
from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_agents.training import checkpoint
from pz_agents.training.settings import algorithm_options
from pz_agents.training.update import Updater
from pz_envs.seeding import generator

_LETTERS = "aabcdeeefghiiklmnoooprstuvwy"


def teach_form(
    settings: HybridSettings,
    folder: Path,
    *,
    updates: int = 60,
    batch: int = 16,
    learning_rate: float = 3e-3,
) -> Path:
    """Train ``settings.language.model`` on invented turns, write it to ``folder`` and return that.

    Args:
        settings: of the runs that the model is for; their seed decides the turns.
        folder: for a model that ``load_model`` takes.
        updates: of AdamW.
        batch: turns an update.
        learning_rate: of all updates.

    Raises:
        ModelError: the model's weights are not here to be trained.
    """
    model = load_model(settings.language.model)
    if not isinstance(model, TransformersModel):
        raise ModelError(f"`{model.name}` cannot be trained here; use `tiny` or a folder")
    prompter = Prompter(model, settings)
    # Supervised learning is RAFT on replies that were all accepted.
    changes = {"algorithm": "raft", "options": {}, "learning_rate": learning_rate}
    given = settings.training().model_copy(update={**changes, "warmup_updates": 0})
    raft, options = load_algorithm("raft"), algorithm_options(given)
    learner = Updater(model.network, given, partial(raft.loss, options=options))
    moments = _moments(settings.seed)
    for _ in range(updates):
        taught = [_taught(model, prompter, *next(moments)) for _ in range(batch)]
        learner.accumulate(learner.step_rows(raft.credit(taught, options).rows))
        learner.before_update()
        learner.optimizer.step()
        model.network.zero_grad(set_to_none=True)
    with without_progress_bars():
        checkpoint.write_folder(folder, model.save)
    return folder


def _moments(seed: int) -> Iterator[tuple[Moment, int]]:
    """Yield invented turns, each with the place of a command, without end."""
    random = generator("hybrid", "form", seed)

    def words(least: int, most: int) -> str:
        letters = [
            "".join(random.choice(list(_LETTERS), int(random.integers(1, 8))))
            for _ in range(int(random.integers(least, most)))
        ]
        return " ".join(letters)

    while True:
        count = int(random.integers(2, 12))
        commands = tuple(dict.fromkeys(words(1, 4) for _ in range(count)))
        past = tuple((words(3, 9), words(1, 4), 0.0) for _ in range(int(random.integers(0, 4))))
        moment = Moment(f"{words(4, 30)}.".capitalize(), "", commands, past)
        yield moment, int(random.integers(len(commands)))


def _taught(model: TransformersModel, prompter: Prompter, moment: Moment, place: int) -> Trajectory:
    text, prompt = prompter.prompt(moment)
    answer = prompter.answers(moment.commands)[place]
    ids = model.encode(f" </think> <answer> {answer} </answer>")
    sample = Sample(prompt, ids, np.zeros(len(ids), np.float32))
    step = Step(text, answer, 1.0, 0.0, valid=True, format_error=False, sample=sample)
    return Trajectory(
        key=text,
        env_id="",
        env_seed=0,
        task_id="",
        group_id=text,
        attempt=0,
        steps=(step,),
        final_observation="",
        reward=1.0,
        score=0.0,
        max_score=1.0,
        score_norm=0.0,
        success=True,
        terminated=True,
        truncated="",
    )
