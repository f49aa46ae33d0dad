"""One update: the gradients of a step's rows, in micro-batches that fit, and what guards them.

The loss of an update is the sum of its micro-batches' shares, so that it does not depend on how
the rows are cut. When memory runs out, the gradients so far are dropped and the update begins
anew with half the tokens a micro-batch. An update that is not finite changes no parameter, no
optimizer state and no learning rate. The optimizer, the schedule and the counters are here,
because they must be saved and resumed exactly.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pz_agents.algorithms import load_algorithm
from pz_agents.algorithms.corrections import effective_share, mismatch, rollout_weights
from pz_agents.algorithms.gae import adapted
from pz_agents.algorithms.losses import MAX_LOG_RATIO, Loss, Tokens, Totals, aggregate, keep
from pz_agents.algorithms.rows import TrainRow, rows_of
from pz_agents.errors import ModelError
from pz_agents.models.adapters import add_adapter, without_adapter
from pz_agents.sdk.types import Trajectory
from pz_agents.training.batching import (
    MICRO_BATCH_COST,
    MicroBatch,
    StepRows,
    at_mask,
    group_numbers,
    head_is_plain,
    log_probs_of,
    micro_batch,
    micro_batches,
    side_by_side,
)
from pz_agents.training.memory import advice, savings
from pz_agents.training.schedules import Schedule
from pz_agents.training.settings import TrainSettings, algorithm_options
from pz_envs.seeding import derive_seed

if TYPE_CHECKING:
    from pz_agents.training.group import Group
    from pz_agents.training.ranks import Team

MOST_SKIPS = 5
"""So many non-finite updates in a row end the run."""

ENGINE_GAP = {None: 1e-3, torch.bfloat16: 0.3}
"""Log-probs of a sampler with the learner's weights should agree to this, in nats."""

LossFunction = Callable[..., Loss]
Backward = Callable[[Tensor], None]

_logger = logging.getLogger(__name__)


class Objective(NamedTuple):
    """What an ``Updater`` of a run's policy is given beside the network and the settings."""

    loss: LossFunction
    reference: torch.nn.Module | None
    entropy_gradient: bool


def objective(settings: TrainSettings, network: Any) -> Objective:
    """Return what the settings' algorithm wants of ``network``, whose weights are the first ones.

    A module with an adapter is its own reference, without it.
    """
    options = algorithm_options(settings)
    reference = None
    if getattr(options, "beta", 0.0) or settings.kl_reward:
        adapted = settings.lora_rank > 0
        reference = network if adapted else copy.deepcopy(network).requires_grad_(False)
    loss = partial(load_algorithm(settings.algorithm).loss, options=options)
    return Objective(loss, reference, bool(getattr(options, "entropy_coef", 0.0)))


class Updater:
    """A module with its optimizer, its schedule and its counters.

    ``updates`` counts optimizer steps taken, ``skipped`` those that were not: nothing to train on,
    or a loss or gradient that was not finite. ``budget`` is the most tokens of a micro-batch.
    ``group`` are the ranks that gradients are added up over, and ``team`` hands the rows out, on
    rank 0; both are None where one process learns. ``kl_figures`` are the KL a token of the last
    episodes and the weight with which it was taken off their rewards.
    """

    def __init__(
        self,
        module: Any,
        settings: TrainSettings,
        loss: LossFunction,
        reference: torch.nn.Module | None = None,
        *,
        entropy_gradient: bool = False,
    ) -> None:
        self.module = module
        self.settings = settings
        self.loss = loss
        self.reference: Any = reference
        self._reference_in_loss = reference is not None and not settings.kl_reward
        self._entropy_gradient = entropy_gradient
        self.kl_weight = settings.kl_reward
        self.kl_figures: dict[str, float] = {}
        self.device = next(module.parameters()).device
        self.autocast = autocast_type(settings.precision, self.device)
        if self.autocast is None or not settings.lora_rank:
            # Small updates vanish in bfloat16: what is trained is float32.
            module.float()
        if settings.lora_rank:
            self._add_adapter(derive_seed(settings.seed, "lora") % 2**31)
        self.plain_head = head_is_plain(module)
        self.optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            weight_decay=0.0,
        )
        self.schedule = Schedule(
            settings.schedule,
            settings.warmup_updates,
            settings.steps * settings.updates_per_step,
            settings.plateau_patience,
        )
        self.budget = settings.max_tokens_per_microbatch
        self._cost = MICRO_BATCH_COST["cpu" if self.device.type == "cpu" else "cuda"]
        self.updates = 0
        self.skipped = 0
        self.out_of_memory = 0
        self._skips_in_a_row = 0
        self._told_of_gap = False
        self._sums: defaultdict[str, Tensor | float] = defaultdict(float)
        self.group: Group | None = None
        self.team: Team | None = None

    def _add_adapter(self, seed: int) -> None:
        add_adapter(self.module, self.settings.lora_rank, seed)

    def state(self) -> dict[str, Any]:
        """Return the counters; the module and the optimizer are saved beside them."""
        return {
            "updates": self.updates,
            "skipped": self.skipped,
            "skips_in_a_row": self._skips_in_a_row,
            "out_of_memory": self.out_of_memory,
            "budget": self.budget,
            "kl_weight": self.kl_weight,
            "schedule": self.schedule.state(),
        }

    def load_state(self, state: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
        """Go on from ``state()`` and the optimizer's ``state_dict()``."""
        self.load_counters(state)
        self.optimizer.load_state_dict(dict(optimizer))

    def load_counters(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()`` alone."""
        self.updates = state["updates"]
        self.skipped = state["skipped"]
        self._skips_in_a_row = state["skips_in_a_row"]
        self.out_of_memory = state["out_of_memory"]
        self.budget = state["budget"]
        self.kl_weight = state.get("kl_weight", self.settings.kl_reward)
        self.schedule.load_state(state["schedule"])

    def step_rows(
        self,
        rows: Sequence[TrainRow],
        targets: Mapping[str, Sequence[NDArray[np.float32]]] | None = None,
    ) -> StepRows:
        """Return the rows of a step, shuffled into mini-batches where there are several a pass.

        Where there are other ranks they begin to learn from their shares, and this one's is
        returned: every update must then be taken.

        Args:
            rows: of the step.
            targets: [L] of each row, by name; what a critic learns.
        """
        count = self.settings.policy_update_steps
        everything = np.arange(len(rows))
        minibatches = [everything]
        if count > 1:
            # The remainder is spread: no row is left out, and each mini-batch has its own totals.
            minibatches = np.array_split(torch.randperm(len(rows)).numpy(), count)
        step = StepRows(
            rows=rows,
            groups=group_numbers(rows),
            minibatches=minibatches,
            sums=[self._totals([rows[number] for number in part.tolist()]) for part in minibatches],
            sizes=[len(part) for part in minibatches],
            targets={name: side_by_side(each) for name, each in (targets or {}).items()},
        )
        if self.team is not None:
            step = self.team.shared(self, step)
        return self.prepared(step)

    def prepared(self, step: StepRows) -> StepRows:
        """Return ``step`` with its tensors on this device and what must be known beforehand."""
        shape = (len(step.rows), max((len(row.ids) for row in step.rows), default=0))
        step.targets = {name: each.to(self.device) for name, each in step.targets.items()}
        if self.settings.correction != "none":
            step.old = torch.zeros(shape, device=self.device)
        if self._reference_in_loss:
            step.reference = torch.zeros(shape, device=self.device)
        if len(step.minibatches) > 1 and step.old is not None:
            # Later mini-batches are seen first after an update.
            for batch in self._batches(step.rows):
                with torch.no_grad():
                    now, _ = self._log_probs(batch)
                step.old[batch.numbers, : batch.mask.shape[1]] = now
        return step

    def divergences(self, rows: Sequence[TrainRow]) -> list[NDArray[np.float32]]:
        """Return log_prob - reference [L] of each row's sampled tokens, 0 elsewhere."""
        return self.per_token(rows) if self.team is None else self.team.per_token(self, rows)

    def per_token(self, rows: Sequence[TrainRow]) -> list[NDArray[np.float32]]:
        """Return ``divergences``, all of them worked out here."""
        found = [np.empty(0, np.float32)] * len(rows)
        for batch in self._batches(rows):
            moved = keep(batch.log_probs - self._reference_log_probs(batch), batch.mask)
            for place, number in enumerate(batch.numbers.tolist()):
                found[number] = moved[place, : len(rows[number].ids)].cpu().numpy()
        return found

    def with_kl_in_rewards(self, trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
        """Return the episodes with their KL to the reference, times its weight, off the reward.

        An episode's KL is estimated on what it sampled: sum_t (log_prob_t - reference_t). Groups
        whose rewards are all equal keep them: there is nothing to learn from such a group, and by
        its KL alone it would seem that there is.
        """
        if not self.settings.kl_reward:
            return trajectories
        earned: dict[str, set[float]] = {}
        for item in trajectories:
            earned.setdefault(item.group_id, set()).add(item.reward)
        numbered = [
            (number, row)
            for number, item in enumerate(trajectories)
            for row in rows_of(item, advantage=0.0)
        ]
        rows = [row for _, row in numbered]
        found = self.divergences(rows)
        sums = np.zeros(len(trajectories))
        for (number, _), moved in zip(numbered, found, strict=True):
            sums[number] += moved.sum()
        weight = self._kl_taken(rows, found, len(trajectories))
        return [
            replace(item, reward=item.reward - weight * float(divergence))
            if len(earned[item.group_id]) > 1
            else item
            for item, divergence in zip(trajectories, sums, strict=True)
        ]

    def with_kl_in_token_rewards(
        self, rows: Sequence[TrainRow], rollouts: int
    ) -> Sequence[TrainRow]:
        """Return the rows with each token's KL, times its weight, off its reward."""
        if not self.settings.kl_reward:
            return rows
        found = self.divergences(rows)
        weight = self._kl_taken(rows, found, rollouts)
        return [
            replace(row, rewards=row.rewards - np.float32(weight) * moved)
            for row, moved in zip(rows, found, strict=True)
        ]

    def _kl_taken(
        self, rows: Sequence[TrainRow], found: Sequence[NDArray[np.float32]], rollouts: int
    ) -> float:
        """Return the KL's weight for this step, and steer the next one's by the KL a token."""
        settings, weight = self.settings, self.kl_weight
        tokens = sum(int(row.mask.sum()) for row in rows)
        mean = sum(float(moved.sum()) for moved in found) / max(tokens, 1)
        self.kl_figures = {"kl": mean, "kl_weight": weight}
        if settings.kl_target is not None:
            self.kl_weight = adapted(
                weight, mean, settings.kl_target, rollouts, settings.kl_horizon
            )
        return weight

    def accumulate(self, step: StepRows, backward: Backward | None = None) -> Tensor:
        """Leave the gradients of one update over ``step`` and return its loss, detached.

        Args:
            step: the rows.
            backward: takes a loss's gradients; None: ``Tensor.backward``.

        Raises:
            ModelError: memory runs out with one row alone.
        """
        numbers = step.numbers
        lengths = [len(step.rows[number].ids) for number in numbers]
        while True:
            self._sums.clear()
            parts = micro_batches(lengths, self.budget, self._cost)
            batches = [numbers[part] for part in parts]
            if self._fits(step, batches, backward or torch.autograd.backward):
                break
            self._halve(lengths, parts)
        padded = sum(len(part) * lengths[part[0]] for part in parts)
        self._sums["tokens"] = step.totals.tokens
        if self.group is not None and step.size:
            self._sums["loss"] = self.group.add_up(self.module, self._sums["loss"])
        step.updates += 1
        self._sums["micro_batches"] = float(len(parts))
        self._sums["padding"] = 1.0 - sum(lengths) / padded if padded else 0.0
        return torch.as_tensor(self._sums["loss"], dtype=torch.float32, device=self.device)

    def take(self, step: StepRows) -> list[dict[str, float]]:
        """Take every update of a step and return their metrics; empty where there were no rows."""
        metrics: list[dict[str, float]] = []
        for _ in range(self.settings.updates_per_step):
            if not step.size:
                step.updates += 1  # fewer rows than mini-batches
                metrics.append({})
                continue
            self.accumulate(step)
            metrics.append(self.before_update())
            self.optimizer.step()
            self.module.zero_grad(set_to_none=True)
        return metrics

    def _fits(self, step: StepRows, parts: Sequence[NDArray[np.intp]], backward: Backward) -> bool:
        """Take the gradients of every part; return False when memory ran out."""
        try:
            for part in parts:
                batch = micro_batch(step.rows, part, step.groups, self.device)
                backward(self._share(step, batch))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _halve(self, lengths: Sequence[int], parts: Sequence[NDArray[np.intp]]) -> None:
        """Forget what was added up so far and allow half the tokens a micro-batch."""
        largest = max(len(part) * lengths[part[0]] for part in parts)
        if all(len(part) == 1 for part in parts):
            held = self.reference is not None and self.reference is not self.module
            found = savings(self.settings, self.module, largest, reference=held)
            raise ModelError(
                f"memory ran out with one row of {largest} tokens; the last checkpoint is whole. "
                f"By what it saves, set: {advice(found)}; and train into another folder."
            )
        self.module.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.out_of_memory += 1
        self.budget = max(largest // 2, 1)
        _logger.warning(
            "memory ran out with %d tokens a micro-batch; going on with %d", largest, self.budget
        )

    def _share(self, step: StepRows, batch: MicroBatch) -> Tensor:
        """Return this micro-batch's share of the update's loss and remember its figures."""
        settings, mask, totals = self.settings, batch.mask, step.totals
        if step.first_pass and step.reference is not None:
            step.reference[batch.numbers, : mask.shape[1]] = self._reference_log_probs(batch)
        now, entropy = self._log_probs(batch, entropy_gradient=self._entropy_gradient)
        if step.updates == 0:
            self._remember(step, batch, now.detach())
        old, advantages = batch.log_probs, batch.advantages
        if step.old is not None:
            old = step.old[batch.numbers, : mask.shape[1]]
            weights = rollout_weights(old, batch.log_probs, mask, settings.correction)
            # No weight is negative, and for one sign of the advantage every loss is linear in it.
            advantages = advantages * weights
            self._sums["correction"] += aggregate(weights, mask, "token_mean", totals)
        reference = None
        if step.reference is not None:
            reference = step.reference[batch.numbers, : mask.shape[1]]
        value, stats = self.loss(
            Tokens(
                log_probs=now,
                old_log_probs=old,
                advantages=advantages,
                mask=mask,
                totals=totals,
                reference_log_probs=reference,
                groups=batch.groups,
                entropies=at_mask(entropy, mask) if self._entropy_gradient else None,
                rollout_log_probs=batch.log_probs,
            )
        )
        for name, share in stats.items():
            self._sums[name] += share.detach()
        self._sums["loss"] += value.detach()
        self._sums["entropy"] += entropy.detach().sum() / max(totals.tokens, 1.0)
        return value

    def _remember(self, step: StepRows, batch: MicroBatch, now: Tensor) -> None:
        """Keep the learner's log-probs for a correction, and how far the sampler's are."""
        if step.old is not None and len(step.minibatches) == 1:
            step.old[batch.numbers, : now.shape[1]] = now
        found = mismatch(now, batch.log_probs, batch.mask, step.totals)
        self._sums["mismatch_kl"] += found.kl
        self._sums["mismatch_ratio"] += found.ratio
        self._sums["mismatch_square"] += found.square
        self._sums["engine_gap"] = torch.maximum(
            torch.as_tensor(self._sums["engine_gap"], device=self.device), found.largest
        )

    def _totals(self, rows: Sequence[TrainRow]) -> Totals:
        return Totals(
            tokens=float(sum(int(row.mask.sum()) for row in rows)),
            sequences=float(sum(bool(row.mask.any()) for row in rows)),
            length=float(self.settings.max_turns * self.settings.max_new_tokens),
        )

    def _batches(self, rows: Sequence[TrainRow]) -> Iterator[MicroBatch]:
        """Yield all rows in micro-batches, for a pass without gradients."""
        groups = [0] * len(rows)
        for part in micro_batches([len(row.ids) for row in rows], self.budget, self._cost):
            yield micro_batch(rows, part, groups, self.device)

    def _log_probs(
        self, batch: MicroBatch, *, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        return log_probs_of(
            self.module,
            batch,
            self.settings.temperature,
            plain_head=self.plain_head,
            autocast=self.autocast,
            entropy_gradient=entropy_gradient,
        )

    def _reference_log_probs(self, batch: MicroBatch) -> Tensor:
        own = self.reference is self.module
        with torch.no_grad(), without_adapter(self.module) if own else nullcontext():
            log_probs, _ = log_probs_of(
                self.reference,
                batch,
                self.settings.temperature,
                plain_head=self.plain_head,
                autocast=self.autocast,
            )
        return log_probs

    def before_update(self) -> dict[str, float]:
        """Set the rate, clip the gradients or drop them, and return the update's metrics.

        Without gradients the optimizer passes over every parameter and its moments.

        Raises:
            ModelError: too many updates in a row were not finite.
        """
        metrics = {"loss": 0.0, "entropy": 0.0}
        metrics.update((name, float(value)) for name, value in self._sums.items())
        self._sums.clear()
        rate = self.settings.learning_rate * self.schedule.rate(self.updates)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
        finite = math.isfinite(norm) and math.isfinite(metrics["loss"])
        metrics["grad_norm"] = norm
        metrics["learning_rate"] = rate
        if finite and metrics["tokens"] > 0:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.updates += 1
            self._skips_in_a_row = 0
            return metrics
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

    def step_metrics(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the means of a step's updates; how far the sampler was is the first one's."""
        if self.team is not None:
            updates = self.team.merged(updates)
        first = updates[0]
        metrics = {
            name: float(np.mean([update[name] for update in updates if name in update]))
            for name in first
        }
        gap = first.get("engine_gap", 0.0)
        metrics["engine_gap"] = gap
        metrics["mismatch_kl"] = first.get("mismatch_kl", 0.0)
        for name in ("mismatch_ratio", "mismatch_square"):
            metrics.pop(name, None)
        metrics["effective_sample_size"] = effective_share(
            first.get("mismatch_ratio", 0.0), first.get("mismatch_square", 0.0)
        )
        metrics["mismatch_max_ratio"] = math.exp(min(gap, MAX_LOG_RATIO)) if gap == gap else gap
        metrics["skipped_updates"] = self.skipped
        metrics["out_of_memory"] = self.out_of_memory
        told = self._told_of_gap or self.settings.correction != "none"
        if gap > ENGINE_GAP[self.autocast] and not told:
            self._told_of_gap = True
            _logger.warning(
                "the learner's log-probs differ from the sampler's by up to %.2g nats; where the "
                "sampler is another engine or has older weights, set `correction`",
                gap,
            )
        return metrics


def autocast_type(
    precision: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> torch.dtype | None:
    """Return the type that matrix products are cast to; None: that of the weights.

    Raises:
        ModelError: bfloat16 was asked for and the device has none.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "float32" or (precision == "auto" and not on_gpu):
        return None
    if not on_gpu and device.type != "cpu":
        raise ModelError(
            f"This device ({device.type}) has no bfloat16; set `precision` to float32 or auto"
        )
    return torch.bfloat16


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an allocator refused: CUDA's by its class, the CPU's by its words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
