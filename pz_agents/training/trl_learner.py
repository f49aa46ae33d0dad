"""TRL's trainer loop, fed finished episodes. Nothing else in pz imports trl.

One subclass of ``GRPOTrainer`` overrides one method: where TRL would generate completions, score
them and take the gradient of its own loss, it is given the rows of the step and takes the gradient
of ours, in micro-batches that fit (``update.py``). TRL supplies the device, the loop and its
callbacks. Every step seeds torch's global generator from (run seed, step), so that no generator
needs saving.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from pz_agents.algorithms.rows import TrainRow
from pz_agents.training.batching import StepRows
from pz_agents.training.settings import TrainSettings
from pz_agents.training.update import LossFunction, Updater
from pz_envs.seeding import derive_seed

Collect = Callable[[int], Sequence[TrainRow]]
AfterStep = Callable[[int, Mapping[str, float]], bool]

_PLACEHOLDERS = 2
"""Prompts that TRL is given for one update; its groups have at least two."""


class Learner(Updater):
    """An ``Updater`` that TRL's loop drives.

    Args:
        module: a transformers causal language model; trained in place, with an adapter added to it
            in place where the settings ask for one.
        tokenizer: of the module.
        settings: of the run.
        loss: one micro-batch's share of the loss.
        reference: what the loss's KL term is to; ``module`` itself stands for the module without
            its adapter.
        entropy_gradient: the loss has an entropy bonus.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: TrainSettings,
        loss: LossFunction,
        reference: torch.nn.Module | None = None,
        *,
        entropy_gradient: bool = False,
    ) -> None:
        super().__init__(module, settings, loss, reference, entropy_gradient=entropy_gradient)
        self.tokenizer = tokenizer
        # The trainer would set these too, with a warning.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(module.generation_config, name, getattr(tokenizer, name))

    def run(
        self, first: int, last: int, collect: Collect, after_step: AfterStep, folder: Path
    ) -> None:
        """Take steps ``first`` to ``last``.

        Args:
            first: number of the first step, from 1.
            last: number of the last step.
            collect: gives the rows of a step; called when the weights of the step before are in.
            after_step: told each step and its metrics; the run ends when it returns False.
            folder: TRL's output folder; nothing of ours is written there.

        Raises:
            ModelError: too many updates in a row were not finite, or one row alone does not fit
                into memory.
        """
        if first > last:
            return
        updates = (last - first + 1) * self.settings.updates_per_step
        trainer = EpisodeTrainer(
            model=self.module,
            reward_funcs=_no_reward,
            args=self._arguments(updates, folder),
            train_dataset=Dataset.from_dict({"prompt": [""] * updates}),
            processing_class=self.tokenizer,
            # The rate is set before each update, so that a resumed run needs no scheduler's state.
            optimizers=(
                self.optimizer,
                torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0),
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.learner = self
        trainer.collect = collect
        trainer.step = first
        trainer.rows = None
        trainer.add_callback(_StepCallback(trainer, after_step))
        trainer.train()

    def _arguments(self, updates: int, folder: Path) -> trl.GRPOConfig:
        device = next(self.module.parameters()).device
        with warnings.catch_warnings():
            # Renamed in transformers; only the old name works in all versions we allow.
            warnings.simplefilter("ignore", FutureWarning)
            return trl.GRPOConfig(
                output_dir=str(folder),
                max_steps=updates,
                per_device_train_batch_size=_PLACEHOLDERS,
                num_generations=_PLACEHOLDERS,
                gradient_accumulation_steps=1,
                steps_per_generation=1,
                temperature=self.settings.temperature,
                beta=0.0,
                max_grad_norm=0.0,
                seed=derive_seed(self.settings.seed, "trl") % 2**31,
                use_cpu=device.type == "cpu",
                bf16=False,
                gradient_checkpointing=False,
                disable_dropout=True,
                shuffle_dataset=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )


class EpisodeTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer with our rows and our loss."""

    learner: Learner
    collect: Collect
    step: int
    rows: StepRows | None

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Leave the gradients of one update and return its loss; ``inputs`` are placeholders."""
        if self.rows is None:
            self.model.eval()
            rows = self.collect(self.step)
            self.model.train()
            torch.manual_seed(derive_seed(self.learner.settings.seed, "learner", self.step))
            self.rows = self.learner.step_rows(rows)
        return self.learner.accumulate(self.rows, self.accelerator.backward)


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    """Guards each update and reports each step (of one or more updates over the same rows)."""

    def __init__(self, trainer: EpisodeTrainer, after_step: AfterStep) -> None:
        self._trainer = trainer
        self._after_step = after_step
        self._updates: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._updates.append(self._trainer.learner.before_update())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if len(self._updates) < trainer.learner.settings.updates_per_step:
            return
        metrics = trainer.learner.step_metrics(self._updates)
        self._updates.clear()
        step = trainer.step
        trainer.step += 1
        trainer.rows = None
        if not self._after_step(step, metrics):
            control.should_training_stop = True


def _no_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Stand in for the reward function that TRL's constructor demands."""
    return [0.0] * len(completions)
