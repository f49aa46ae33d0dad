"""vLLM behind the LanguageModel protocol: continuous batching, a prefix cache, weights in place.

The engine runs in a thread of this process (``vllm_loop``). Any number of threads may call
``generate`` and ``score``, any number of asyncio tasks ``generate_async`` and ``score_async``: it
is one path, and all their requests share the engine's batches. New weights go in when nothing is
being answered. Only this module imports vllm; ``available`` says whether it is there.

A spec reads ``vllm:PATH?option=value``; the options are the fields of ``EngineSettings``. A folder
with an adapter is served as one: vLLM keeps the base weights and each ``load_weights`` of another
adapter publishes it under the new version.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl

import numpy as np
import pydantic
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from pz_agents.config import Settings, parse_settings
from pz_agents.errors import ModelError
from pz_agents.models.adapters import ADAPTER_CONFIG, merged_state
from pz_agents.models.chat import ChatTokenizer, without_progress_bars
from pz_agents.models.protocol import Completion, GenerateRequest, Message
from pz_agents.models.vllm_loop import EngineLoop
from pz_agents.sdk.types import Ids, LogProbs
from pz_envs.errors import ConfigError

INSTALL = "pip install vllm==0.31.0 (with a GPU), or make test-vllm (its CPU build, kept apart)"
"""What to do where vLLM is missing."""

_CPU_CACHE_BYTES = 256 << 20
_CPU_BLOCK = 32
_LIBRARY = "llvmlite.binding.ffi"
_SEEDS = 2**63


class EngineSettings(Settings):
    """Which weights vLLM serves, and how much of the machine it may take."""

    folder: str
    """A `save_pretrained` folder, a model of the hub that is in the cache, or `tiny`."""
    required: bool = False
    """Without vLLM, stop (exit code 3) instead of using transformers."""
    context: int | None = pydantic.Field(None, ge=64)
    """Most tokens of prompt and reply; the model's own where it is not given."""
    memory: float = pydantic.Field(0.85, gt=0, lt=1)
    """Share of the GPU's memory for weights and cache; lower it where a learner is beside."""
    batch: int = pydantic.Field(256, ge=1)
    """Most requests in one batch."""


def parse_spec(spec: str) -> EngineSettings:
    """Return the settings in ``vllm:PATH?option=value``.

    Raises:
        ModelError: there is no path, or an option that does not exist.
    """
    folder, _, options = spec.removeprefix("vllm:").partition("?")
    if not folder:
        raise ModelError(f"`{spec}` names no weights. Write vllm:FOLDER, or vllm:tiny")
    values: dict[str, Any] = {**dict(parse_qsl(options, keep_blank_values=True)), "folder": folder}
    try:
        return parse_settings(EngineSettings, values, spec)
    except ConfigError as error:
        raise ModelError(str(error)) from error


def available() -> bool:
    """Return whether vLLM is installed; imports nothing."""
    return importlib.util.find_spec("vllm") is not None


def vllm_model(settings: EngineSettings) -> VllmModel:
    """Return the model that ``settings`` names, ready to answer.

    Raises:
        ModelError: there is no such folder, or vLLM cannot serve it.
    """
    from pz_agents.models import model_folder

    if settings.folder == "tiny":
        from pz_agents.models.tiny import tiny_folder

        return VllmModel(tiny_folder(), settings, name="tiny")
    return VllmModel(model_folder(settings.folder), settings)


class VllmModel:
    """A ``save_pretrained`` folder served by vLLM; see ``LanguageModel`` and the module.

    Args:
        folder: weights, configuration, tokenizer with a chat template; or an adapter.
        settings: the rest; its ``folder`` is not looked at.
        name: what a table shows; None takes the folder's name.

    Attributes:
        chat: the tokenizer.
        shares_batches: True says that threads may ask side by side.

    Raises:
        ModelError: the folder holds nothing that vLLM can serve, or the memory does not suffice.
    """

    shares_batches: ClassVar[bool] = True

    def __init__(self, folder: Path, settings: EngineSettings, *, name: str | None = None) -> None:
        self.chat = ChatTokenizer(folder)
        self._adapter: Path | None = folder if (folder / ADAPTER_CONFIG).is_file() else None
        rank, base = _adapter_parts(folder) if self._adapter else (0, folder)
        config = AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        self._shapes = {key: value.shape for key, value in skeleton.state_dict().items()}
        self._ends = {self.chat.end_of_turn_id, *_ends(base)}
        self.name = name or folder.resolve().name
        self.version = 0
        self.end_of_turn_id = self.chat.end_of_turn_id
        text = config.get_text_config()
        own = min(int(text.max_position_embeddings), int(self.chat.tokenizer.model_max_length))
        self.max_context = min(own, settings.context or own)
        self.template = str(getattr(text, "pz_template", "chat"))
        self.vocabulary = int(text.vocab_size)
        self._forgotten = False
        self._engine = EngineLoop(self.name, partial(self._start, base, settings, rank))

    def encode(self, text: str) -> Ids:
        """Return the ids of plain text, no special tokens added."""
        return self.chat.encode(text)

    def decode(self, ids: Ids) -> str:
        """Return the text of ``ids`` without special tokens."""
        return self.chat.decode(ids)

    def render(self, messages: Sequence[Message], *, continuation: bool = False) -> Ids:
        """Return the ids of ``messages`` with the generation prompt; see ``LanguageModel``."""
        return self.chat.render(messages, continuation=continuation)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample one completion a request, in order; see ``LanguageModel``."""
        return self._engine.wait(self._generate(requests))

    async def generate_async(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Do what ``generate`` does, in any event loop; cancelling it ends its requests."""
        return await self._engine.join(self._generate(requests))

    def score(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        """Return log-probs [N_k] of each candidate's tokens after ``prefix_ids``.

        vLLM reads nothing from its cache for a request with prompt log-probs, so K candidates would
        be K prefills. Here the candidates form a tree of tokens; each inner node is one request for
        the log-probs of its children, and all but the root find their prefix in the cache.
        """
        return self._engine.wait(self._scored(prefix_ids, candidates))

    async def score_async(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        """Do what ``score`` does, in any event loop; cancelling it ends its requests."""
        return await self._engine.join(self._scored(prefix_ids, candidates))

    def load_weights(self, source: Path) -> int:
        """Load a folder's weights in place; see ``LanguageModel``.

        An adapter takes the place of an adapter; otherwise it is added to the weights that it
        belongs to. Nothing has changed when the folder cannot be read or is of another
        architecture.
        """
        source = Path(source)
        is_adapter = (source / ADAPTER_CONFIG).is_file()
        if not is_adapter and not (source / "config.json").is_file():
            raise ModelError(f"No weights in {source}: save_pretrained writes config.json there")
        if is_adapter and self._adapter is not None:
            return self._publish(source)
        try:
            with without_progress_bars():
                network = AutoModelForCausalLM.from_pretrained(source.resolve())
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{source} holds no weights that can be read: {error}") from error
        return self.load_state(merged_state(network))

    def load_state(self, state: Mapping[str, torch.Tensor]) -> int:
        """Copy a ``state_dict`` of the same architecture in place; returns the new version.

        It must be a ``state_dict()``, which names ``lm_head.weight`` even where it is tied to the
        embedding: vLLM packs its own copy of that matrix and would keep the old one, silently.

        Raises:
            ModelError: names or shapes differ, and nothing has changed; or vLLM failed in the
                middle, and the model refuses to answer until weights are loaded whole.
        """
        differing = sorted(
            key
            for key in self._shapes.keys() | state.keys()
            if key not in state or self._shapes.get(key) != state[key].shape
        )
        if differing:
            raise ModelError(
                f"These weights are not of {self.name}'s architecture: {len(differing)} tensors "
                f"differ, e.g. `{differing[0]}`. Load them as a model of their own"
            )
        return self._engine.wait(self._engine.changed(partial(self._reload, state)))

    def sleep(self, level: int = 1) -> None:
        """Free the GPU's memory for a learner; level 2 forgets the weights as well.

        After level 2, ``wake`` must be followed by ``load_weights``. On a CPU nothing is freed.
        """
        if level not in (1, 2):
            raise ConfigError(f"sleep level {level}: allowed are 1 and 2")

        def sleep() -> None:
            self._engine.llm.sleep(level=level)
            self._forgotten = level == 2
            then = ", then load weights" * self._forgotten
            self._engine.unusable = f"it is asleep. Call wake(){then}"

        self._engine.wait(self._engine.changed(sleep))

    def wake(self) -> None:
        """Take the memory back after ``sleep``."""

        def wake() -> None:
            self._engine.llm.wake_up()
            self._engine.unusable = "its weights were forgotten. Load weights" * self._forgotten
            self._engine.llm.reset_prefix_cache()

        self._engine.wait(self._engine.changed(wake))

    def _start(self, base: Path, settings: EngineSettings, rank: int) -> Any:
        # Weights are handed over as tensors, which needs the engine in this process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind

        self._params = partial(
            SamplingParams,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._lora = LoRARequest
        options: dict[str, Any] = {
            "dtype": "bfloat16",
            "gpu_memory_utilization": settings.memory,
            "enable_sleep_mode": True,
        }
        if current_platform.is_cpu():
            options = {"dtype": "float32", "kv_cache_memory_bytes": _CPU_CACHE_BYTES}
            options |= {"enforce_eager": True, "block_size": _CPU_BLOCK}
        if rank:
            options |= {"enable_lora": True, "max_lora_rank": max(8, rank), "max_loras": 1}
        # vLLM's CPU build asks every object of every module for its `__dict__`, at which numba's
        # library, there since the search was imported, answers with a function.
        library = sys.modules.pop(_LIBRARY, None)
        try:
            return LLM(
                str(base.resolve()),
                max_model_len=self.max_context,
                max_num_seqs=settings.batch,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                max_logprobs=-1,
                generation_config="vllm",
                use_tqdm_on_load=False,
                **options,
            )
        except (RuntimeError, ValueError, OSError, NotImplementedError) as error:
            raise ModelError(
                f"vLLM cannot serve {base}: {error}. On a CPU the head size must be 32 or 64 or "
                "larger; on a GPU lower `memory`, or take the folder without `vllm:`"
            ) from error
        finally:
            if library is not None:
                sys.modules[_LIBRARY] = library

    async def _generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        for request in requests:
            self._check(request)
        async with self._engine.using():
            outputs = await self._answer([(r.prompt_ids, self._sampling(r)) for r in requests])
            pairs = zip(requests, outputs, strict=True)
            # At once: each that is to be read again asks the engine.
            return await asyncio.gather(*(self._completion(*pair) for pair in pairs))

    async def _scored(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        longest = max((len(candidate) for candidate in candidates), default=0)
        if len(prefix_ids) == 0 or len(prefix_ids) + longest > self.max_context:
            raise ModelError(
                f"A prefix of {len(prefix_ids)} tokens and a candidate of {longest} cannot be "
                f"scored by {self.name}. Allowed: at least 1 and together {self.max_context}"
            )
        async with self._engine.using():
            return await self._score(prefix_ids, candidates, temperature=1.0)

    def _sampling(self, request: GenerateRequest) -> Any:
        return self._params(
            max_tokens=request.max_new_tokens,
            seed=request.seed % _SEEDS,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop_token_ids=sorted(self._ends.union(request.stop_ids)),
            stop=list(request.stops),
            include_stop_str_in_output=True,
            detokenize=bool(request.stops),
            logprobs=0,
        )

    async def _completion(self, request: GenerateRequest, output: Any) -> Completion:
        [answer] = output.outputs
        ids = np.asarray(answer.token_ids, np.int32)
        stopped = answer.finish_reason == "stop"
        if request.temperature > 0 and (request.top_p < 1 or request.top_k > 0):
            # vLLM's are renormalised over the tokens that were kept; the contract's are not.
            [log_probs] = await self._score(request.prompt_ids, [ids], request.temperature)
        else:
            rows = zip(answer.logprobs, ids.tolist(), strict=True)
            log_probs = np.array([row[token].logprob for row, token in rows], np.float32)
        by_text = isinstance(answer.stop_reason, str)
        text = self.decode(ids[:-1] if stopped and not by_text else ids)
        return Completion(ids, log_probs, text, "stop" if stopped else "length", self.version)

    async def _score(
        self, prefix_ids: Ids, candidates: Sequence[Ids], temperature: float
    ) -> list[LogProbs]:
        paths = [tuple(np.asarray(candidate).tolist()) for candidate in candidates]
        children: dict[tuple[int, ...], set[int]] = {}
        for path in paths:
            for length, token in enumerate(path):
                children.setdefault(path[:length], set()).add(token)
        # The root first, alone: it fills the cache that the others read.
        inner = [node for node in children if node]
        levels: list[list[tuple[int, ...]]] = [[()], inner] if children else []
        table: dict[tuple[int, ...], Any] = {}
        for nodes in levels:
            outputs = await self._answer(
                [
                    (
                        np.concatenate([prefix_ids, np.asarray(node, np.int32)]),
                        self._params(
                            max_tokens=1,
                            temperature=temperature,
                            seed=0,
                            logprob_token_ids=sorted(children[node]),
                        ),
                    )
                    for node in nodes
                ]
            )
            table |= {
                node: output.outputs[0].logprobs[0]
                for node, output in zip(nodes, outputs, strict=True)
            }
        return [
            np.array([table[path[:n]][token].logprob for n, token in enumerate(path)], np.float32)
            for path in paths
        ]

    async def _answer(self, asked: Sequence[tuple[Ids, Any]]) -> list[Any]:
        lora = None if self._adapter is None else self._adapter_request(self._adapter, self.version)
        plain = [(np.asarray(ids).tolist(), params) for ids, params in asked]
        return await self._engine.answer(plain, lora)

    def _reload(self, state: Mapping[str, torch.Tensor]) -> int:
        self._engine.unusable = "its last weights were not loaded whole. Load weights again"
        try:
            self._engine.llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": iter(state.items())}
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelError(f"vLLM could not take new weights: {error}") from error
        self._engine.unusable = ""
        self._adapter = None
        return self._renewed()

    def _adapter_request(self, folder: Path, version: int) -> Any:
        return self._lora(f"policy-v{version}", version + 1, str(folder.resolve()))

    def _publish(self, adapter: Path) -> int:
        """Answer with another adapter from now on; the old one stays if it cannot be loaded."""

        def publish() -> int:
            request = self._adapter_request(adapter, self.version + 1)
            try:
                self._engine.llm.llm_engine.add_lora(request)
            except (RuntimeError, ValueError, OSError) as error:
                raise ModelError(f"vLLM cannot load the adapter in {adapter}: {error}") from error
            self._adapter = adapter
            return self._renewed()

        return self._engine.wait(self._engine.changed(publish))

    def _renewed(self) -> int:
        self._engine.llm.reset_prefix_cache()
        self.version += 1
        return self.version

    def _check(self, request: GenerateRequest) -> None:
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        if prompt < 1 or new < 1 or prompt + new > self.max_context:
            raise ModelError(
                f"A prompt of {prompt} tokens with max_new_tokens={new} does not fit {self.name}. "
                f"Allowed: at least 1 of each and together {self.max_context}"
            )


def _ends(folder: Path) -> list[int]:
    """Return the ids that the folder's own settings end a reply with."""
    try:
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        ends = AutoConfig.from_pretrained(folder).get_text_config().eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


def _adapter_parts(folder: Path) -> tuple[int, Path]:
    """Return an adapter's rank and the folder of the weights that it belongs to."""
    import json

    from pz_agents.models import model_folder

    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    return int(config["r"]), model_folder(str(config["base_model_name_or_path"]))
