"""The critic: a network of its own that says what a state is worth, and learns before the actor.

It begins as a copy of the policy's starting weights (or from a folder) with a head of zeros, so
that the first values are 0, and has its own optimizer, rate and number of updates. It is a
transformers sequence classifier with one label, and is saved as one. Micro-batches, the way out of
full memory, the guard and the schedule are the learner's own (``update.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pz_agents.algorithms import CriticRule
from pz_agents.algorithms.rows import TrainRow
from pz_agents.config import Settings
from pz_agents.errors import ModelError, WrongModelError
from pz_agents.models import is_hub_id, model_folder
from pz_agents.models.adapters import add_adapter, merged_state
from pz_agents.models.protocol import Message
from pz_agents.models.transformers import TransformersModel
from pz_agents.sdk.types import Trajectory
from pz_agents.training.batching import MicroBatch, StepRows, values_of
from pz_agents.training.settings import TrainSettings
from pz_agents.training.update import Updater
from pz_envs.seeding import derive_seed

_TAKES = {
    "critic_model": "`tiny`, a folder with a causal language model or a sequence classifier",
    "reward_model": "a folder with a transformers sequence classifier of one label",
}
_ALSO = "or such a model of the Hugging Face hub that was downloaded (hf download ORG/NAME)"
_MAKE = (
    "To make one, train AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1) "
    "on what replies are worth, and save_pretrained it together with its tokenizer"
)

GOES_ON = ("turns", "tokens", "time")
"""Limits after which an episode could have gone on; being cut for what was said is an end."""


class Critic(Updater):
    """A value network with its optimizer.

    Args:
        policy: whose starting weights it copies, before any adapter.
        settings: of the run.
        options: of the algorithm; ``critic_model``, ``critic_learning_rate``,
            ``critic_update_steps`` and ``bootstrap`` are read here.
        rule: how the algorithm uses values.
        shown: what the policy would have been shown, from what the environment said last.

    Raises:
        ModelError: the architecture has no sequence classifier, or ``critic_model`` is none.
    """

    def __init__(
        self,
        policy: TransformersModel,
        settings: TrainSettings,
        options: Any,
        rule: CriticRule,
        shown: Callable[[str], str] = str,
    ) -> None:
        self._policy = policy
        self._rule = rule
        self._options: Settings = options
        self._bootstraps: bool = options.bootstrap
        self._shown = shown
        own = {
            "learning_rate": options.critic_learning_rate,
            "policy_update_steps": options.critic_update_steps,
            "correction": "none",
            "kl_reward": 0.0,
        }
        module = value_network(policy.network, options.critic_model)
        super().__init__(module, settings.model_copy(update=own), rule.loss)

    def judge(
        self, step: int, played: Sequence[Trajectory], rows: Sequence[TrainRow]
    ) -> tuple[Sequence[TrainRow], dict[str, float]]:
        """Give the rows their advantages, then learn their returns.

        Args:
            step: its number decides the order of the rows.
            played: the episodes that the rows are of.
            rows: with their rewards.

        Returns:
            The rows with advantages, and figures about them and about the updates.

        Raises:
            ModelError: too many updates in a row were not finite, or memory ran out.
        """
        values = self.values(rows)
        lasts = self._lasts(played, rows) if self._bootstraps else {}
        estimate = self._rule.estimate(rows, values, lasts, self._options)
        torch.manual_seed(derive_seed(self.settings.seed, "critic", step))
        learned = self.learn(estimate.rows, values, estimate.returns)
        return estimate.rows, {**estimate.stats, **learned}

    def values(self, rows: Sequence[TrainRow]) -> list[NDArray[np.float32]]:
        """Return the value [L] of what was there before each sampled token, 0 elsewhere."""
        return self.per_token(rows) if self.team is None else self.team.per_token(self, rows)

    @torch.no_grad()
    def per_token(self, rows: Sequence[TrainRow]) -> list[NDArray[np.float32]]:
        """Return ``values``, all of them worked out here."""
        found = [np.empty(0, np.float32)] * len(rows)
        for batch in self._batches(rows):
            values = values_of(self.module, batch, self.autocast).cpu().numpy()
            for place, number in enumerate(batch.numbers.tolist()):
                found[number] = values[place, : len(rows[number].ids)]
        return found

    def learn(
        self,
        rows: Sequence[TrainRow],
        values: Sequence[NDArray[np.float32]],
        returns: Sequence[NDArray[np.float32]],
    ) -> dict[str, float]:
        """Take every update on the rows and return the means of the updates' figures.

        Args:
            rows: of the step.
            values: [L] of each row before any of the updates.
            returns: [L] of each row.
        """
        if not rows:
            return {}
        step = self.step_rows(rows, {"values": values, "returns": returns})
        metrics = self.step_metrics(self.take(step))
        names = {
            "loss": "value_loss",
            "value_clip": "value_clip",
            "grad_norm": "critic_grad_norm",
            "learning_rate": "critic_learning_rate",
        }
        figures = {new: metrics[old] for old, new in names.items() if old in metrics}
        return {**figures, "critic_skipped_updates": self.skipped}

    def save(self, folder: Path) -> None:
        """Write ``critic/``, whole weights that transformers loads, and its optimizer's state."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        weights = dict(self.module.state_dict())
        if self.settings.lora_rank:
            # What an adapter was cannot be read from merged weights.
            state["trained"] = {
                name: parameter.detach()
                for name, parameter in self.module.named_parameters()
                if parameter.requires_grad
            }
            body = merged_state(self.module.base_model)
            prefix = self.module.base_model_prefix
            weights = {f"{prefix}.{name}": tensor for name, tensor in body.items()}
            weights["score.weight"] = self.module.score.weight
        self.module.save_pretrained(folder / "critic", state_dict=weights)
        torch.save(state, folder / "optimizer" / "critic.pt")

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on from what ``save`` wrote into ``folder`` and from ``state()``."""
        saved = torch.load(
            folder / "optimizer" / "critic.pt", weights_only=True, map_location=self.device
        )
        trained = saved.get("trained")
        if trained is None:
            trained = classifier(folder / "critic").state_dict()
        self.module.load_state_dict(trained, strict="trained" not in saved)
        self.load_state(state, saved["optimizer"])

    def _add_adapter(self, seed: int) -> None:
        add_adapter(self.module.base_model, self.settings.lora_rank, seed)
        self.module.score.float()

    def _lasts(self, played: Sequence[Trajectory], rows: Sequence[TrainRow]) -> dict[str, float]:
        """Return the value of where each episode was that a limit cut short, by trajectory."""
        ends = {row.trajectory_id: row for row in rows}
        cut = [item for item in played if item.truncated in GOES_ON and item.key in ends]
        asked = [self._after(ends[item.key], item.final_observation) for item in cut]
        found = self.values(asked)
        return {item.key: float(value[-1]) for item, value in zip(cut, found, strict=True)}

    def _after(self, row: TrainRow, observation: str) -> TrainRow:
        """Return a row whose last token alone is valued: the first of the reply that never came."""
        policy = self._policy
        message: Message = {"role": "user", "content": self._shown(observation)}
        parts = [row.ids, policy.render([message], continuation=True), np.zeros(1, np.int32)]
        if row.ids[-1] != policy.end_of_turn_id:
            parts.insert(1, np.asarray([policy.end_of_turn_id], np.int32))
        ids = np.concatenate(parts)[-policy.max_context :].astype(np.int32)
        mask = np.zeros(len(ids), np.bool_)
        mask[-1] = True
        zeros = np.zeros(len(ids), np.float32)
        numbers = np.zeros(len(ids), np.int32)
        return TrainRow(
            ids, mask, zeros, numbers, numbers, zeros, row.trajectory_id, row.group_id, zeros
        )

    def _share(self, step: StepRows, batch: MicroBatch) -> Tensor:
        """Return this micro-batch's share of the critic's loss and remember its figures."""
        mask = batch.mask
        width = slice(0, mask.shape[1])
        value, stats = self._rule.loss(
            values_of(self.module, batch, self.autocast),
            step.targets["values"][batch.numbers, width],
            step.targets["returns"][batch.numbers, width],
            mask,
            step.totals,
            self._options,
        )
        for name, share in stats.items():
            self._sums[name] += share.detach()
        self._sums["loss"] += value.detach()
        return value


def value_network(policy: Any, folder: str) -> Any:
    """Return a sequence classifier with one label, on its way to be a critic.

    Args:
        policy: the network whose body is copied where ``folder`` is empty.
        folder: see ``classifier_folder``; a classifier's head is kept.

    Raises:
        ModelError: the architecture has no sequence classifier.
        WrongModelError: ``folder`` holds no model.
    """
    from transformers import AutoModelForSequenceClassification

    device = next(policy.parameters()).device
    if folder:
        return classifier(classifier_folder(folder, "critic_model")).to(device)
    config = type(policy.config).from_dict(policy.config.to_dict())
    config.num_labels = 1
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence classifier for {type(policy).__name__}, and the critic "
            "is one; take a model of another architecture, or an algorithm without a critic"
        ) from error
    module.base_model.load_state_dict(policy.base_model.state_dict())
    torch.nn.init.zeros_(module.score.weight)
    return module.to(device).eval()


def classifier_folder(spec: str, setting: Literal["critic_model", "reward_model"]) -> Path:
    """Return where the weights of a setting's model lie; nothing is downloaded or loaded.

    Raises:
        WrongModelError: there is no such model, transformers can make no classifier of it, or it
            is to give rewards and is a language model; the message says what the setting takes.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    takes = f"`{setting}` takes {_TAKES[setting]}, {_ALSO}"
    if spec == "tiny" and setting == "critic_model":
        from pz_agents.models.tiny import tiny_folder

        return tiny_folder()
    if spec == "tiny":
        raise WrongModelError(f"`tiny` is a language model and gives no score. {takes}. {_MAKE}")
    if not is_hub_id(spec) and not (Path(spec).expanduser() / "config.json").is_file():
        made = f" {_MAKE}" if setting == "reward_model" else ""
        raise WrongModelError(f"No model `{spec}` (no {spec}/config.json). {takes}.{made}")
    folder = model_folder(spec)
    try:
        kind = type(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        raise WrongModelError(f"{folder} holds no model: {error}. {takes}") from error
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise WrongModelError(f"transformers has no sequence classifier for {folder}. {takes}")
    if setting == "reward_model":
        labels = _head_labels(folder)
        if labels == 0:
            raise _headless(folder)
        if labels not in (None, 1):
            raise WrongModelError(f"{folder} gives {labels} scores, not one. {takes}")
        if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
            # transformers would make an empty one for it.
            raise WrongModelError(
                f"{folder} holds no tokenizer to read conversations with. {_MAKE}"
            )
    return folder


def _head_labels(folder: Path) -> int | None:
    """Return how many scores the head in ``folder`` gives, 0 without one; None: not to be seen."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as tensors:
            if "score.weight" in set(tensors.keys()):
                return int(tensors.get_slice("score.weight").get_shape()[0])
    return 0 if files else None


def _headless(folder: Path) -> WrongModelError:
    return WrongModelError(
        f"{folder} has no head that gives a score (its file lacks score.weight): it is a language "
        f"model and no reward model. {_MAKE}"
    )


def classifier(folder: Path, *, needs_head: bool = False) -> Any:
    """Return the one-label classifier in ``folder``, in float32; a missing head is zeros.

    Args:
        folder: what ``save_pretrained`` wrote.
        needs_head: refuse a model without a head, such as a causal language model.

    Raises:
        WrongModelError: there is no such model.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        module, told = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WrongModelError(
            f"{folder} holds no model with one value a sequence (a transformers sequence "
            f"classifier with num_labels 1): {error}"
        ) from error
    finally:
        logging.set_verbosity(before)
    headless = any(name.startswith("score") for name in told["missing_keys"])
    if headless and needs_head:
        raise _headless(folder)
    if headless:
        torch.nn.init.zeros_(module.score.weight)
    return module.eval()
