"""The language model's training: towards the search's visits, and towards what paid.

loss = sft_weight SFT + rft_weight RFT + kl KL, each a mean over the whole optimizer batch, so that
it is the same however the batch is cut into micro-batches. SFT is the cross-entropy of the visits'
shares to the prior over all of a state's commands, RFT the policy gradient on the tokens of the
command that was played, KL the k3 estimate to the model as it was at the start on the same tokens.
An update that is not finite changes nothing. The network stays in evaluation mode: what is trained
is what plays, and no random state needs saving.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pz_agents.algorithms.losses import kl_estimate
from pz_agents.errors import ModelError
from pz_agents.models import untrainable
from pz_agents.models.adapters import add_adapter, without_adapter
from pz_agents.models.chat import without_progress_bars
from pz_agents.models.protocol import LanguageModel
from pz_agents.priorzero.language_batch import lay_out, log_probs_of
from pz_agents.priorzero.language_loss import (
    Lesson,
    Totals,
    imitation,
    reinforcement,
    sequences,
)
from pz_agents.priorzero.language_settings import Decision, LanguageLearnerSettings
from pz_agents.search.priors import visit_policy
from pz_agents.training.batching import head_is_plain
from pz_agents.training.update import MOST_SKIPS, autocast_type, is_out_of_memory
from pz_envs.seeding import derive_seed, generator

__all__ = ["Decision", "LanguageLearner", "LanguageLearnerSettings", "normalised"]

_logger = logging.getLogger(__name__)

_STATE = "language.pt"


class LanguageLearner:
    """Trains a local model in place; what plays with the model plays with the new weights.

    Args:
        model: of transformers; its weights as they are now are what the KL is to.
        settings: see there.
        seed: decides the adapter's start and the order of decisions.
        reduction: of the prior that plays (``LanguageSettings.reduction``).
        temperature: likewise (``PriorSettings.temperature``).

    Attributes:
        updates: optimizer steps taken.
        skipped: those that were not, for there was nothing to learn or a number was not finite.

    Raises:
        ModelError: the model's weights are not here to be trained (a server's, a script's).
    """

    def __init__(
        self,
        model: LanguageModel,
        settings: LanguageLearnerSettings,
        *,
        seed: int,
        reduction: Literal["mean", "sum"] = "mean",
        temperature: float = 1.0,
    ) -> None:
        from pz_agents.models.transformers import TransformersModel

        if not isinstance(model, TransformersModel):
            raise ModelError(f"{untrainable(model.name)}, or train the world model alone")
        self.model, self.settings = model, settings
        self._seed, self._reduction, self._temperature = seed, reduction, temperature
        network = model.network
        self._autocast = autocast_type(settings.precision, network.device)
        if self._autocast is None or not settings.lora_rank:
            # Small updates vanish in bfloat16: what is trained is float32.
            network.float()
        model.autocast = self._autocast
        self._reference: Any = None
        if settings.kl and not settings.lora_rank:
            self._reference = copy.deepcopy(network).requires_grad_(False)
        if settings.lora_rank:
            add_adapter(network, settings.lora_rank, derive_seed(seed, "lora") % 2**31)
        self._plain_head = head_is_plain(network)
        self.optimizer = torch.optim.AdamW(
            [p for p in network.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )
        self.updates = 0
        self.skipped = 0
        self._skips_in_a_row = 0
        self._microbatch = settings.microbatch

    def learn(self, decisions: Sequence[Decision]) -> dict[str, float]:
        """Go through ``decisions`` once, ``microbatch * accumulate`` an optimizer step.

        Advantages of ``critic`` ``world_model`` are normalised over the whole call: give a phase's
        decisions together. ``model.version`` grows by one where anything was learned.

        Returns:
            Means over the updates: ``llm_total_loss``, ``llm_sft_loss``, ``llm_sft_kl`` (KL(visits
            || prior), the part that can be learned), ``llm_agreement`` (of the prior's favourite
            with the visits'), ``llm_entropy`` (of the prior), ``llm_rft_loss``, ``llm_ratio``,
            ``llm_kl``, ``llm_grad_norm``, each where it was asked for; and ``llm_updates``,
            ``llm_skipped_updates`` so far. Nothing without decisions.

        Raises:
            ModelError: too many updates in a row were not finite, or memory ran out with one
                decision.
        """
        if not decisions:
            return {}
        began = self.updates
        random = generator(self._seed, "language", self.updates + self.skipped)
        lessons = self._lessons(decisions)
        order = random.permutation(len(lessons))
        size = self.settings.microbatch * self.settings.accumulate
        parts = [order[first : first + size] for first in range(0, len(order), size)]
        if self.settings.rft == "clipped" and len(parts) > 1:
            lessons = self._with_old(lessons)
        lines = [self._update([lessons[place] for place in part]) for part in parts]
        if self.updates > began:
            self.model.version += 1
        means = {
            name: float(np.mean([line[name] for line in lines if name in line]))
            for name in sorted({name for line in lines for name in line})
        }
        counts = {"llm_updates": self.updates, "llm_skipped_updates": self.skipped}
        return {f"llm_{name}": value for name, value in means.items()} | counts

    def save(self, folder: Path) -> None:
        """Write all that ``load`` needs; ``folder / "model"`` is what ``load_model`` takes.

        Of a model with an adapter it is the adapter alone.
        """
        folder = Path(folder)
        with without_progress_bars():
            self.model.save(folder / "model")
        state = {
            "updates": self.updates,
            "skipped": self.skipped,
            "skips_in_a_row": self._skips_in_a_row,
            "microbatch": self._microbatch,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, folder / _STATE)

    def load(self, folder: Path) -> None:
        """Go on from ``save``, bit for bit; what the KL is to stays as it was.

        Raises:
            ModelError: the weights are of another architecture.
        """
        from transformers import AutoModelForCausalLM

        folder = Path(folder)
        with without_progress_bars():
            saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.model.load_state(saved.state_dict())
        state = torch.load(folder / _STATE, weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates, self.skipped = state["updates"], state["skipped"]
        self._skips_in_a_row = state["skips_in_a_row"]
        self._microbatch = state["microbatch"]

    def _lessons(self, decisions: Sequence[Decision]) -> list[Lesson]:
        settings = self.settings
        advantages = np.array([each.advantage for each in decisions], np.float64)
        paid = np.full(len(decisions), settings.rft_weight > 0)
        if settings.critic == "world_model":
            advantages = normalised(advantages)
        else:
            paid &= advantages != 0.0
        lessons = []
        for decision, advantage, is_paid in zip(decisions, advantages, paid, strict=True):
            shares = None
            if settings.sft_weight > 0 and np.any(decision.visits):
                visits = np.asarray(decision.visits, np.float64)
                # In shares of the most visited, so that `visit_policy` takes counts and shares.
                shares = visit_policy(visits / visits.max(), settings.target_temperature)
            lessons.append(Lesson(decision, shares, float(advantage) if is_paid else None))
        return lessons

    def _with_old(self, lessons: Sequence[Lesson]) -> list[Lesson]:
        """Remember the log-probs before the first update; later ones clip against these."""
        found: list[Lesson] = []
        for first in range(0, len(lessons), self._microbatch):
            part = lessons[first : first + self._microbatch]
            with torch.no_grad():
                flat = self._played(self.model.network, part)
            old = torch.split(flat, [each.tokens for each in part])
            found += [
                Lesson(each.decision, each.shares, each.advantage, mine)
                for each, mine in zip(part, old, strict=True)
            ]
        return found

    def _update(self, lessons: Sequence[Lesson]) -> dict[str, float]:
        """Take one optimizer step, and return its figures."""
        totals = Totals(
            states=float(sum(each.shares is not None for each in lessons)),
            rewarded=float(sum(each.tokens for each in lessons if each.advantage is not None)),
            played=float(sum(each.tokens for each in lessons)),
        )
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            sums: defaultdict[str, float] = defaultdict(float)
            try:
                for first in range(0, len(lessons), self._microbatch):
                    loss, shares = self._share(lessons[first : first + self._microbatch], totals)
                    loss.backward()  # type: ignore[no-untyped-call]
                    for name, value in {"total_loss": loss, **shares}.items():
                        sums[name] += float(value.detach())
                return self._step(sums, bool(totals.states or totals.rewarded))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if self._microbatch == 1:
                longest = max(len(each.decision.prefix_ids) for each in lessons)
                raise ModelError(
                    f"memory ran out with one decision behind a prompt of up to {longest} tokens. "
                    "Set `lora_rank` (16 is usual) or lower `history`"
                )
            self._microbatch = max(1, min(self._microbatch, len(lessons)) // 2)
            _logger.warning("memory ran out; going on with a micro-batch of %d", self._microbatch)

    def _share(self, lessons: Sequence[Lesson], totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a micro-batch's share of the loss, and of the figures."""
        settings = self.settings
        groups, places = sequences(lessons)
        network = self.model.network
        layout = lay_out(network, [each.decision.prefix_ids for each in lessons], groups)
        log_probs = log_probs_of(
            network, layout, plain_head=self._plain_head, autocast=self._autocast
        )
        loss = 0.0 * log_probs.sum()
        figures: dict[str, Tensor] = {}
        if totals.states:
            lengths = torch.bincount(layout.sequences).float()
            sums = torch.zeros_like(lengths).index_add(0, layout.sequences, log_probs)
            figures |= imitation(
                lessons, groups, sums, lengths, self._reduction, self._temperature, totals.states
            )
            loss = loss + settings.sft_weight * figures["sft_loss"]
        played = log_probs[torch.isin(layout.sequences, places.to(layout.sequences.device))]
        if totals.rewarded:
            figures |= reinforcement(lessons, played, totals, settings)
            loss = loss + settings.rft_weight * figures["rft_loss"]
        if settings.kl:
            own = self._reference is None
            with torch.no_grad(), without_adapter(network) if own else nullcontext():
                reference = self._played(network if own else self._reference, lessons)
            mask = torch.ones_like(played, dtype=torch.bool)
            figures["kl"] = kl_estimate(played, reference, mask).sum() / totals.played
            loss = loss + settings.kl * figures["kl"]
        return loss, figures

    def _played(self, network: Any, lessons: Sequence[Lesson]) -> Tensor:
        """Return the log-probs of the played commands' tokens, one after the other."""
        played = [[each.decision.candidates[each.decision.played]] for each in lessons]
        layout = lay_out(network, [each.decision.prefix_ids for each in lessons], played)
        return log_probs_of(network, layout, plain_head=self._plain_head, autocast=self._autocast)

    def _step(self, sums: Mapping[str, float], anything: bool) -> dict[str, float]:
        """Step, unless there is nothing to learn or a number is not finite."""
        network, settings = self.model.network, self.settings
        parameters = [p for p in network.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
        finite = math.isfinite(norm) and math.isfinite(sums["total_loss"])
        if finite and anything:
            self.optimizer.step()
            self.updates += 1
            self._skips_in_a_row = 0
        else:
            self.skipped += 1
            self._skips_in_a_row = 0 if finite else self._skips_in_a_row + 1
        self.optimizer.zero_grad(set_to_none=True)
        if self._skips_in_a_row >= MOST_SKIPS:
            raise ModelError(
                f"{MOST_SKIPS} updates of the language model in a row were not finite (loss "
                f"{sums['total_loss']}, gradient norm {norm}). Lower its `learning_rate` (now "
                f"{settings.learning_rate:g})"
            )
        if not finite:
            _logger.warning("update skipped: loss %s, norm %s", sums["total_loss"], norm)
        return {**sums, "grad_norm": norm}


def normalised(advantages: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (advantages - mean) / standard deviation; zeros where all are equal."""
    centred = advantages - advantages.mean()
    spread = float(centred.std())
    return centred / spread if spread > 0.0 else np.zeros_like(centred)
