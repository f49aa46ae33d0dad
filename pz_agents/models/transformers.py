"""Any causal language model that transformers can load from a folder, with batched sampling.

The sample of a request depends on its own seed and on nothing else in the batch (up to rounding:
batched matrix products differ in the last bits): token t is argmax(log-probs / T + Gumbel noise),
the noise a hash of (seed, t, token id), the same on every device. Log-probs are float32 whatever
the weights' type. The folder's own generation settings (top-p, repetition penalty) are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pz_agents.errors import ModelError
from pz_agents.models.adapters import ADAPTER_CONFIG, has_adapter, merged_state
from pz_agents.models.chat import ChatTokenizer, without_progress_bars
from pz_agents.models.protocol import Completion, GenerateRequest, Message
from pz_agents.models.sampling import gumbel_noise, mask_top_k, mask_top_p
from pz_agents.models.scoring import score_candidates
from pz_agents.sdk.types import Ids, LogProbs
from pz_envs.errors import require

_MARGIN = 8
"""Tokens without text of their own that may be among those of a stop text."""


class TransformersModel:
    """A policy from a ``save_pretrained`` folder; see ``LanguageModel``.

    Args:
        folder: weights, configuration, tokenizer with a chat template.
        device: a torch device; None takes CUDA when there is one. CUDA weights are bfloat16, CPU
            weights float32.
        name: what a table shows; None takes the folder's name.
        batch_tokens: most tokens (prompt and reply, padding included) in one batch.

    Attributes:
        network: the transformers model, in evaluation mode.
        chat: the tokenizer.
        vocabulary: how many token ids there are.
        autocast: the type of matrix products; None: that of the weights.

    Raises:
        ModelError: the folder holds no model that can be loaded.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        device: str | None = None,
        name: str | None = None,
        batch_tokens: int = 32_768,
    ) -> None:
        folder = Path(folder)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self._batch_tokens = batch_tokens
        self.autocast: torch.dtype | None = None
        self.chat = ChatTokenizer(folder)
        self.network: Any = self._read(folder).to(self._device)
        self.network.eval()
        ends = self.network.generation_config.eos_token_id
        self._ends = {self.chat.end_of_turn_id, *([ends] if isinstance(ends, int) else ends or ())}
        self.network.generation_config = GenerationConfig()
        self.name = name or folder.resolve().name
        self.version = 0
        self.end_of_turn_id = self.chat.end_of_turn_id
        config = self.network.config.get_text_config()
        self.max_context = min(
            int(config.max_position_embeddings), int(self.chat.tokenizer.model_max_length)
        )
        self.vocabulary = int(self.network.get_input_embeddings().num_embeddings)
        self.template = str(getattr(config, "pz_template", "chat"))

    def encode(self, text: str) -> Ids:
        """Return the ids of plain text, no special tokens added."""
        return self.chat.encode(text)

    def decode(self, ids: Ids) -> str:
        """Return the text of ``ids`` without special tokens."""
        return self.chat.decode(ids)

    def render(self, messages: Sequence[Message], *, continuation: bool = False) -> Ids:
        """Return the ids of ``messages`` with the generation prompt; see ``LanguageModel``."""
        return self.chat.render(messages, continuation=continuation)

    @torch.no_grad()
    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample one completion a request, in order; see ``LanguageModel``."""
        for request in requests:
            self._check(request)
        order = sorted(
            range(len(requests)),
            key=lambda i: (-len(requests[i].prompt_ids), -requests[i].max_new_tokens),
        )
        completions: dict[int, Completion] = {}
        for batch in self._batches(order, requests):
            answers = self._generate_batch([requests[i] for i in batch])
            completions.update(zip(batch, answers, strict=True))
        return [completions[i] for i in range(len(requests))]

    def score(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        """Return log-probs [N_k] of each candidate's tokens after ``prefix_ids``, computed once."""
        longest = max((len(candidate) for candidate in candidates), default=0)
        if len(prefix_ids) == 0 or len(prefix_ids) + longest > self.max_context:
            raise ModelError(
                f"A prefix of {len(prefix_ids)} tokens and a candidate of {longest} cannot be "
                f"scored by {self.name}. Allowed: at least 1 and together {self.max_context}"
            )
        with self._products():
            return score_candidates(self.network, prefix_ids, candidates)

    def load_weights(self, source: Path) -> int:
        """Load a folder's weights in place; see ``LanguageModel``.

        An adapter is added to the weights it belongs to, unless this model carries one as well.
        """
        if not any((Path(source) / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise ModelError(f"No weights in {source}: save_pretrained writes config.json there")
        network = self._read(Path(source))
        carries = has_adapter(self.network)
        return self.load_state(network.state_dict() if carries else merged_state(network))

    def save(self, folder: Path) -> None:
        """Write a folder that ``load_model`` takes; of a model with an adapter, the adapter alone.

        The adapter's folder has the path of the weights it belongs to, which must stay there.
        """
        self.network.save_pretrained(folder)
        self.chat.tokenizer.save_pretrained(folder)

    def load_state(self, state: Mapping[str, torch.Tensor]) -> int:
        """Copy a ``state_dict`` of the same architecture in place; returns the new version.

        Raises:
            ModelError: names or shapes differ; nothing has changed then.
        """
        own = self.network.state_dict()
        differing = [
            name
            for name in sorted(own.keys() | state.keys())
            if name not in own or name not in state or own[name].shape != state[name].shape
        ]
        if differing:
            raise ModelError(
                f"These weights are not of {self.name}'s architecture: {len(differing)} tensors "
                f"differ, e.g. `{differing[0]}`. Load them as a model of their own"
            )
        self.network.load_state_dict(state)
        self.version += 1
        return self.version

    def _products(self) -> torch.autocast:
        return torch.autocast(self._device.type, self.autocast, enabled=self.autocast is not None)

    def _read(self, folder: Path) -> Any:
        if (folder / ADAPTER_CONFIG).is_file():
            require("peft", "pz-agents[train]")
        folder = folder.resolve()
        try:
            with without_progress_bars():
                return AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"{folder} holds no causal language model that can be loaded: {error}. "
                f"Write one there with model.save_pretrained({str(folder)!r})"
            ) from error

    def _check(self, request: GenerateRequest) -> None:
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        if prompt < 1 or new < 1 or prompt + new > self.max_context:
            raise ModelError(
                f"A prompt of {prompt} tokens with max_new_tokens={new} does not fit {self.name}. "
                f"Allowed: at least 1 of each and together {self.max_context}"
            )

    def _batches(
        self, order: Sequence[int], requests: Sequence[GenerateRequest]
    ) -> Iterator[list[int]]:
        """Split ``order`` (longest prompt first) so that no batch exceeds ``batch_tokens``."""
        batch: list[int] = []
        longest = new = 0
        for i in order:
            longest = max(longest, len(requests[i].prompt_ids))
            new = max(new, requests[i].max_new_tokens)
            if batch and (len(batch) + 1) * (longest + new) > self._batch_tokens:
                yield batch
                batch = []
                longest, new = len(requests[i].prompt_ids), requests[i].max_new_tokens
            batch.append(i)
        if batch:
            yield batch

    def _generate_batch(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        width = max(len(request.prompt_ids) for request in requests)
        ids = torch.full((len(requests), width), self.end_of_turn_id, dtype=torch.long)
        mask = torch.zeros(len(requests), width, dtype=torch.long)
        for row, request in enumerate(requests):
            prompt = torch.from_numpy(np.asarray(request.prompt_ids, np.int64))
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        sampler = _Sampler(requests, self._device)
        stop = _Stop(requests, self._ends, width, self._device, self.decode)
        with self._products():
            sequences = self.network.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(request.max_new_tokens for request in requests),
                    pad_token_id=self.end_of_turn_id,
                ),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        tokens = sequences[:, width:].cpu().numpy().astype(np.int32)
        log_probs = torch.stack(sampler.log_probs, 1).cpu().numpy()
        return [
            self._completion(request, tokens[row], log_probs[row], stop.told.get(row))
            for row, request in enumerate(requests)
        ]

    def _completion(
        self, request: GenerateRequest, tokens: Ids, log_probs: LogProbs, told: int | None
    ) -> Completion:
        """Return what a row says; ``told`` is after how many tokens a stop text was complete."""
        tokens = tokens[: min(told or len(tokens), request.max_new_tokens)]
        stops = np.flatnonzero(np.isin(tokens, list(self._ends.union(request.stop_ids))))
        length = int(stops[0]) + 1 if len(stops) else len(tokens)
        text = self.decode(tokens[: length - 1] if len(stops) else tokens)
        return Completion(
            token_ids=tokens[:length].copy(),
            log_probs=log_probs[:length].copy(),
            text=text,
            finish="stop" if len(stops) or told else "length",
            version=self.version,
        )


class _Sampler(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Makes the greedy choice of ``generate`` a seeded sample, and keeps its log-prob."""

    def __init__(self, requests: Sequence[GenerateRequest], device: torch.device) -> None:
        temperatures = np.array([request.temperature for request in requests], np.float32)
        self._greedy = torch.from_numpy(temperatures == 0).to(device)[:, None]
        divisors = np.where(temperatures == 0, np.float32(1), temperatures)
        self._divisors = torch.from_numpy(divisors).to(device)[:, None]
        self._seeds = torch.tensor([request.seed for request in requests], device=device)
        top_k = [request.top_k for request in requests]
        top_p = [request.top_p for request in requests]
        self._top_k = torch.tensor(top_k, device=device) if any(top_k) else None
        self._top_p = torch.tensor(top_p, device=device) if min(top_p) < 1 else None
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_probs = torch.log_softmax(scores.float() / self._divisors, -1)
        kept = log_probs
        if self._top_k is not None:
            kept = mask_top_k(kept, self._top_k)
        if self._top_p is not None:
            kept = mask_top_p(kept, self._top_p)
        noise = gumbel_noise(self._seeds, len(self.log_probs), scores.shape[-1])
        keys = torch.where(self._greedy, kept, kept + noise)
        chosen = keys.argmax(-1, keepdim=True)
        self.log_probs.append(log_probs.gather(-1, chosen)[:, 0])
        return keys


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Each row ends at its own stop ids, its own stop texts and its own length.

    Attributes:
        told: rows that ended with a stop text, and after how many tokens.
    """

    def __init__(
        self,
        requests: Sequence[GenerateRequest],
        ends: set[int],
        width: int,
        device: torch.device,
        decode: Callable[[Ids], str],
    ) -> None:
        stops = [sorted(ends.union(request.stop_ids)) for request in requests]
        most = max(len(row) for row in stops)
        padded = [row + [-1] * (most - len(row)) for row in stops]
        self._stops = torch.tensor(padded, device=device)
        new = [request.max_new_tokens for request in requests]
        self._lengths = torch.tensor(new, device=device) + width
        self.eos_token_id = self._stops  # tells `generate` to pad rows that have ended
        self._width, self._decode = width, decode
        # Rows that have not ended yet and have stop texts.
        self._texts = {row: each.stops for row, each in enumerate(requests) if each.stops}
        # A token has a byte of text or more, but for marks and parts of characters.
        sizes = [len(stop.encode()) for stops in self._texts.values() for stop in stops]
        self._tail = max(sizes, default=0) + _MARGIN
        self.told: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        ended = (input_ids[:, -1:] == self._stops).any(1)
        if self._texts:
            self._read(input_ids[:, self._width :], ended)
        ended |= input_ids.shape[1] >= self._lengths
        if self._texts:
            over = ended.tolist()
            self._texts = {row: stops for row, stops in self._texts.items() if not over[row]}
        return ended

    def _read(self, replies: torch.Tensor, ended: torch.Tensor) -> None:
        """Note, in ``ended`` too, the rows whose last token completes a stop text."""
        tails = replies[:, -self._tail :].cpu().numpy()
        for row, stops in self._texts.items():
            text = self._decode(tails[row])
            if any(stop in text for stop in stops):
                self.told[row] = replies.shape[1]
                ended[row] = True
