"""The learner: TRL's trainer loop, fed finished episodes. Nothing else in pz imports trl.

One subclass of ``GRPOTrainer`` overrides two methods: where TRL would generate completions it is
given the rows of the step, and where it would compute its loss it computes ours. TRL supplies
devices, gradient accumulation and the loop; the optimizer, the learning rate, gradient clipping
and the guard against non-finite updates are here, because they must be saved and resumed exactly.
Every step seeds torch's global generator from (run seed, step), so that no generator needs saving.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from pz_agents.algorithms.losses import Loss, Tokens, Totals, predictions, token_log_probs
from pz_agents.algorithms.rows import TrainRow
from pz_agents.errors import ModelError
from pz_agents.training.settings import TrainSettings
from pz_envs.seeding import derive_seed

MOST_SKIPS = 5
"""So many non-finite updates in a row end the run."""

ENGINE_GAP = 1e-3
"""Log-probs of the sampler and the learner should agree to this, in nats."""

LossFunction = Callable[[Tokens], Loss]
Collect = Callable[[int], Sequence[TrainRow]]
AfterStep = Callable[[int, Mapping[str, float]], bool]

_logger = logging.getLogger(__name__)


class Learner:
    """A module with its optimizer and its counters.

    ``updates`` counts optimizer steps taken, ``skipped`` those that were not: nothing to train on,
    or a loss or gradient that was not finite. A skipped update changes no parameter, no optimizer
    state and no learning rate.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: TrainSettings,
        loss: LossFunction,
        reference: torch.nn.Module | None = None,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        # The trainer would set these too, with a warning.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(module.generation_config, name, getattr(tokenizer, name))
        self.settings = settings
        self.loss = loss
        self.reference = reference
        self.optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            weight_decay=0.0,
        )
        self.updates = 0
        self.skipped = 0
        self._skips_in_a_row = 0
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._gap = 0.0

    def state(self) -> dict[str, int]:
        """Return the counters; the module and the optimizer are saved beside them."""
        return {"updates": self.updates, "skipped": self.skipped}

    def load_state(self, state: Mapping[str, int], optimizer: Mapping[str, Any]) -> None:
        """Go on from ``state()`` and the optimizer's ``state_dict()``."""
        self.updates = state["updates"]
        self.skipped = state["skipped"]
        self.optimizer.load_state_dict(dict(optimizer))

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
            ModelError: too many updates in a row were not finite.
        """
        if first > last:
            return
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: self._lr_factor())
        trainer = EpisodeTrainer(
            model=self.module,
            reward_funcs=_no_reward,
            args=self._arguments(last - first + 1, folder),
            train_dataset=Dataset.from_dict(
                {"prompt": [""] * (self.settings.micro_batches * (last - first + 1))}
            ),
            processing_class=self.tokenizer,
            optimizers=(self.optimizer, scheduler),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.learner = self
        trainer.collect = collect
        trainer.step = first
        trainer.add_callback(_StepCallback(trainer, after_step))
        trainer.train()

    def _arguments(self, steps: int, folder: Path) -> trl.GRPOConfig:
        device = next(self.module.parameters()).device
        with warnings.catch_warnings():
            # Renamed in transformers; only the old name works in all versions we allow.
            warnings.simplefilter("ignore", FutureWarning)
            return self._config(steps, folder, device)

    def _config(self, steps: int, folder: Path, device: torch.device) -> trl.GRPOConfig:
        settings = self.settings
        return trl.GRPOConfig(
            output_dir=str(folder),
            max_steps=steps * settings.iterations,
            # Two dummy prompts stand for a micro-batch: TRL wants groups, we bring our own rows.
            per_device_train_batch_size=2,
            num_generations=2,
            gradient_accumulation_steps=settings.micro_batches,
            steps_per_generation=settings.micro_batches,
            num_iterations=settings.iterations,
            temperature=settings.temperature,
            beta=0.0,
            max_grad_norm=0.0,
            seed=derive_seed(settings.seed, "trl") % 2**31,
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

    def _lr_factor(self) -> float:
        """Return the learning rate of the next update as a fraction of the setting."""
        settings = self.settings
        if self.updates < settings.warmup_updates:
            return (self.updates + 1) / (settings.warmup_updates + 1)
        total = settings.steps * settings.iterations
        left = total - settings.warmup_updates
        done = min((self.updates - settings.warmup_updates) / max(left, 1), 1.0)
        if settings.schedule == "linear":
            return 1.0 - done
        if settings.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0

    def _reference_log_probs(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        if self.reference is None:
            return None
        with torch.no_grad():
            return completion_log_probs(self.reference, batch, self.settings.temperature)[0]

    def _micro_batch_loss(self, module: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return this micro-batch's share of the step's loss and remember its figures."""
        mask = _trained(batch)
        log_probs, entropy = completion_log_probs(module, batch, self.settings.temperature)
        totals = Totals(
            tokens=float(batch["num_items_in_batch"]),
            sequences=float(batch["num_sequences"]),
            length=float(self.settings.max_turns * self.settings.max_new_tokens),
        )
        old = batch["old_per_token_logps"]
        value, stats = self.loss(
            Tokens(
                log_probs=log_probs,
                old_log_probs=old,
                advantages=batch["advantages"],
                mask=mask,
                totals=totals,
                reference_log_probs=batch.get("ref_per_token_logps"),
                groups=batch["groups"],
            )
        )
        for name, share in stats.items():
            self._sums[name] += float(share)
        self._sums["loss"] += float(value.detach())
        self._sums["entropy"] += float(entropy.sum()) / max(totals.tokens, 1.0)
        self._sums["tokens"] = totals.tokens
        if mask.any():
            self._gap = max(self._gap, float((log_probs.detach() - old)[mask].abs().max()))
        return value

    def _before_update(self) -> dict[str, float]:
        """Clip the gradients, or drop them when this update must not be; return its metrics."""
        metrics = dict(self._sums)
        self._sums.clear()
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
        finite = math.isfinite(norm) and math.isfinite(metrics["loss"])
        metrics["grad_norm"] = norm
        metrics["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if finite and metrics["tokens"] > 0:
            self.updates += 1
            self._skips_in_a_row = 0
            return metrics
        # Without gradients the optimizer passes over every parameter and its moments.
        self.module.zero_grad(set_to_none=True)
        self.skipped += 1
        self._skips_in_a_row = 0 if finite else self._skips_in_a_row + 1
        if not finite:
            _logger.warning("update skipped: loss %s, gradient norm %s", metrics["loss"], norm)
        if self._skips_in_a_row >= MOST_SKIPS:
            raise ModelError(
                f"{MOST_SKIPS} updates in a row were not finite (loss {metrics['loss']}, gradient "
                f"norm {norm}); the last checkpoint is whole. Lower `learning_rate` "
                f"(now {self.settings.learning_rate:g}) and train into another folder."
            )
        return metrics

    def _engine_gap(self) -> float:
        """Return the largest |learner - sampler| log-prob of the step's first pass."""
        gap, self._gap = self._gap, 0.0
        if gap > ENGINE_GAP:
            _logger.warning(
                "the learner's log-probs differ from the sampler's by up to %.2g nats", gap
            )
        return gap


class EpisodeTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer with our rows and our loss."""

    learner: Learner
    collect: Collect
    step: int

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
        """Return the rows of the step in TRL's batch format; ``inputs`` are placeholders."""
        settings = self.learner.settings
        self.model.eval()
        rows = self.collect(self.step)
        self.model.train()
        torch.manual_seed(derive_seed(settings.seed, "learner", self.step))
        batch = batch_of(rows, self.processing_class.pad_token_id or 0, settings.micro_batches)
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        reference = self.learner._reference_log_probs(batch)
        if reference is not None:
            batch["ref_per_token_logps"] = reference
        return batch

    def _compute_loss(self, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.learner._micro_batch_loss(model, inputs)


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    """Guards each update and reports each step (of one or more updates over the same rows)."""

    def __init__(self, trainer: EpisodeTrainer, after_step: AfterStep) -> None:
        self._trainer = trainer
        self._after_step = after_step
        self._updates: list[dict[str, float]] = []
        self._gap = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        learner = self._trainer.learner
        if not self._updates:
            self._gap = learner._engine_gap()
        self._updates.append(learner._before_update())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if len(self._updates) < trainer.learner.settings.iterations:
            return
        metrics = {
            name: float(np.mean([update[name] for update in self._updates]))
            for name in self._updates[0]
        }
        metrics["engine_gap"] = self._gap
        metrics["skipped_updates"] = trainer.learner.skipped
        trainer.learner._gap = 0.0
        self._updates.clear()
        step = trainer.step
        trainer.step += 1
        if not self._after_step(step, metrics):
            control.should_training_stop = True


def batch_of(rows: Sequence[TrainRow], pad_id: int, divisor: int) -> dict[str, Tensor]:
    """Return ``rows`` as TRL's batch: prompts padded left, the rest padded right.

    What follows the first sampled token is the "completion"; ``tool_mask`` is 0 on the
    environment's words inside it. Rows without trained tokens fill up to a multiple of
    ``divisor``, since TRL drops what does not divide. ``num_items_in_batch`` and
    ``num_sequences`` count trained tokens and rows, before any split; ``groups`` numbers each
    row's group.
    """
    filler = TrainRow(
        ids=np.full(2, pad_id, np.int32),
        mask=np.array([False, False]),
        log_probs=np.zeros(2, np.float32),
        versions=np.full(2, -1, np.int32),
        turns=np.full(2, -1, np.int32),
        advantages=np.zeros(2, np.float32),
        trajectory_id="",
        group_id="",
    )
    count = max(-(-len(rows) // divisor), 1) * divisor
    filled = [*rows, *[filler] * (count - len(rows))]
    prompts = [row.prompt_length or 1 for row in filled]
    width = max(prompts)
    length = max(len(row.ids) - prompt for row, prompt in zip(filled, prompts, strict=True))

    def block(columns: int, fill: float, dtype: Any) -> NDArray[Any]:
        return np.full((count, columns), fill, dtype)

    prompt_ids, prompt_mask = block(width, pad_id, np.int64), block(width, 0, np.int64)
    ids, real, trained = (
        block(length, pad_id, np.int64),
        block(length, 0, np.int64),
        block(length, 0, np.int64),
    )
    old, advantages = block(length, 0, np.float32), block(length, 0, np.float32)
    for index, (row, prompt) in enumerate(zip(filled, prompts, strict=True)):
        prompt_ids[index, width - prompt :] = row.ids[:prompt]
        prompt_mask[index, width - prompt :] = 1
        rest = len(row.ids) - prompt
        ids[index, :rest] = row.ids[prompt:]
        real[index, :rest] = 1
        trained[index, :rest] = row.mask[prompt:]
        old[index, :rest] = row.log_probs[prompt:]
        advantages[index, :rest] = row.advantages[prompt:]
    arrays = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": real,
        "tool_mask": trained,
        "old_per_token_logps": old,
        "advantages": advantages,
    }
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    names = {row.group_id: number for number, row in enumerate(filled)}
    batch["groups"] = torch.tensor([names[row.group_id] for row in filled])
    batch["num_items_in_batch"] = torch.tensor(float(trained.sum()))
    batch["num_sequences"] = torch.tensor(float(trained.any(-1).sum()))
    return batch


def _no_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Stand in for the reward function that TRL's constructor demands."""
    return [0.0] * len(completions)


def _trained(batch: Mapping[str, Tensor]) -> Tensor:
    return (batch["completion_mask"] * batch["tool_mask"]).bool()


def completion_log_probs(
    module: torch.nn.Module, batch: Mapping[str, Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probs [B, T] of the completion (0 off the mask) and entropies [N] on the mask."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    count = batch["completion_ids"].shape[1]
    logits = module(
        input_ids=ids,
        attention_mask=attention,
        # As the sampler counts them: padding on the left takes no position.
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=count + 1,
        use_cache=False,
    ).logits
    mask = _trained(batch)
    chosen, entropy = token_log_probs(
        predictions(logits, count)[mask], batch["completion_ids"][mask], temperature
    )
    log_probs = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, chosen)
    return log_probs, entropy
