"""Language models behind one protocol: from a short text to a model, and what its weights are.

A spec is ``tiny``, a ``save_pretrained`` folder, ``ORGANISATION/NAME`` on the Hugging Face hub,
``openai:MODEL@URL``, ``vllm:`` or ``supervised:`` before one of these, or ``scripted:REPLY|REPLY``.
Importing this package imports neither torch nor transformers; loading a model does.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from pz_agents.errors import EngineMissing, WrongModelError
from pz_agents.models.protocol import Completion, GenerateRequest, LanguageModel, Message
from pz_envs.errors import did_you_mean
from pz_envs.files import sha256_file

__all__ = [
    "Completion",
    "GenerateRequest",
    "LanguageModel",
    "Message",
    "load_model",
    "model_identity",
]

_ALLOWED = (
    "Allowed: `tiny`, a folder that save_pretrained wrote, `Organisation/Name` of the Hugging Face "
    "hub, `openai:MODEL@http://host/v1`, `vllm:FOLDER`, `supervised:MODEL`, `scripted:reply|reply`"
)
_logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = (".safetensors", ".bin")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "adapter_config.json",
)


def load_model(spec: str, *, device: str | None = None) -> LanguageModel:
    """Return the model that ``spec`` names; ``tiny`` is built first when it is not yet there.

    Args:
        spec: see the module.
        device: a torch device for local weights; None takes CUDA when there is one.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    if kind == "openai":
        from pz_agents.models.openai import openai_model

        return openai_model(spec)
    if kind == "scripted":
        from pz_agents.models.scripted import ScriptedModel

        return ScriptedModel(tuple(rest.split("|")), name=spec)
    if kind == "supervised":
        from pz_agents.models.supervised import SupervisedModel

        return SupervisedModel(rest, device=device)
    if kind == "vllm":
        return _served_by_vllm(spec, device)
    from pz_agents.models.transformers import TransformersModel

    if spec == "tiny":
        from pz_agents.models.tiny import tiny_folder

        return TransformersModel(tiny_folder(), device=device, name="tiny")
    return TransformersModel(model_folder(spec), device=device)


def _served_by_vllm(spec: str, device: str | None) -> LanguageModel:
    """Return vLLM's model or, without vLLM, the same weights in transformers."""
    from pz_agents.models import vllm

    settings = vllm.parse_spec(spec)
    if vllm.available():
        return vllm.vllm_model(settings)
    if settings.required:
        raise EngineMissing(f"vLLM is not installed. Install it: {vllm.INSTALL}")
    _logger.warning("vLLM is not installed; transformers serves %s instead", settings.folder)
    return load_model(settings.folder, device=device)


def model_identity(spec: str) -> str:
    """Return a hash of what decides the model's answers, without loading or building it.

    ``tiny`` is its recipe, a folder is its weights, configuration and tokenizer, a model of the
    hub its name. What a server holds cannot be seen from here: ``openai:`` is the spec without its
    transport options.

    Raises:
        ModelError: the folder does not exist.
    """
    kind = spec.partition(":")[0]
    if spec == "tiny":
        from pz_agents.models.recipe import recipe_hash

        return recipe_hash()
    if kind == "openai":
        from pz_agents.models.openai import parse_spec

        settings = parse_spec(spec)
        parts = (settings.model, settings.url, str(settings.tokenizer or ""))
        return _hash("openai", *parts)
    if kind == "scripted":
        return _hash(spec)
    if kind == "supervised":
        return model_identity(spec.partition(":")[2])
    if kind == "vllm":
        from pz_agents.models.vllm import parse_spec as parse_vllm

        return _hash("vllm", model_identity(parse_vllm(spec).folder))
    if is_hub_id(spec):
        return _hash("hub", spec)
    folder = model_folder(spec)
    files = sorted(
        path for path in folder.iterdir() if path.suffix in _WEIGHTS or path.name in _TOKENIZER
    )
    return _hash("folder", *(f"{path.name}={sha256_file(path)}" for path in files))


def is_hub_id(spec: str) -> bool:
    """Return whether ``spec`` names a model of the Hugging Face hub: of its form and no folder."""
    return _HUB_ID.fullmatch(spec) is not None and not Path(spec).is_dir()


def untrainable(name: str) -> str:
    """Return what to tell whoever would train a model whose weights another process has."""
    return (
        f"`{name}` cannot be trained here: its weights are not in this process. Use `tiny` or a "
        "folder with a transformers model"
    )


def model_folder(spec: str) -> Path:
    """Return where the weights lie: the folder itself, or the hub's copy in the local cache.

    Nothing is downloaded: a study of 7B models should not begin with a surprise.

    Raises:
        ModelError: there is no such folder, or the model was never downloaded; the message has
            the command that does it.
    """
    if is_hub_id(spec):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(spec, local_files_only=True))
        except LocalEntryNotFoundError:
            raise WrongModelError(
                f"No folder {spec}, and no model of that name in the Hugging Face cache. "
                f"Get it: hf download {spec}"
            ) from None
    folder = Path(spec).expanduser()
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise WrongModelError(
            f"No model `{spec}`.{did_you_mean(spec, ('tiny',))} {_ALLOWED}"
            + (f"; {folder} holds no config.json" if folder.is_dir() else "")
        )
    return folder


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]
