"""What a run of the hybrid is told: UniZero's settings, and ORZ's by the names that it gives them.

Four of ORZ's names mean what another setting here already says (``NAMES``): they are taken, and
shown, under both names, and one value is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import pydantic

from pz_agents.config import Settings
from pz_agents.errors import EngineMissing
from pz_agents.hybrid import presets
from pz_agents.models.protocol import LanguageModel
from pz_agents.priorzero.presets import Preset, composed
from pz_agents.priorzero.prior import LanguagePrior, LanguageSettings
from pz_agents.priorzero.settings import FREE_TO_CHANGE as UNIZERO_FREE
from pz_agents.priorzero.settings import GuidedSettings
from pz_agents.training.settings import RuntimeName, TrainSettings, algorithm_options
from pz_envs.errors import ConfigError

FREE_TO_CHANGE = UNIZERO_FREE | {
    "runtime",
    "total_num_nodes",
    "vllm_num_engines",
    "colocate_all",
    "vllm_required",
    "engine_seconds",
}
"""Settings that a resumed run may change, because no weight depends on them."""

NAMES: Mapping[str, tuple[str, ...]] = {
    "model": ("language", "model"),
    "wm_training_mode": ("phase",),
    "use_llm_prior_in_mcts": ("root", "mode"),
    "llm_prior_weight": ("root", "llm_prior_weight"),
}
"""Other names of settings, and where the value is kept."""

_NAMED_HERE = ("critic_update_steps", "critic_learning_rate")
"""Options of PPO that are settings here."""

_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(
        ("actor_num_nodes", "actor_num_gpus_per_node", "critic_num_nodes", "ref_num_nodes"),
        "the learner is one process with one device; engines are vllm_num_engines",
    ),
    **dict.fromkeys(
        ("critic_num_gpus_per_node", "ref_num_gpus_per_node", "vllm_tensor_parallel_size"),
        "each process has one device; leave it out",
    ),
    **dict.fromkeys(
        ("zero_stage", "adam_offload", "packing_max_len", "enable_prefix_caching"),
        "there is no such choice here; leave it out",
    ),
    **dict.fromkeys(("top_p", "top_k"), "replies are sampled from all tokens; leave it out"),
    **dict.fromkeys(
        ("micro_train_batch_size", "micro_rollout_batch_size", "micro_forward_batch_size"),
        "max_tokens_per_microbatch is counted in tokens",
    ),
    **dict.fromkeys(("init_kl_coef", "kl_loss_coef", "use_kl_loss"), 'options={"beta": 0.01}'),
    **dict.fromkeys(("eps_clip", "value_clip", "gamma", "lambd"), "one of `options`; see ppo"),
    "gpu_memory_utilization": "engines take half of it where they share; leave it out",
    "pretrain": "model",
    "num_episodes": "steps",
    "save_interval": "save_every",
    "eval_interval": "eval_every",
    "use_grpo": "rl_algorithm=grpo",
}
"""ORZ's names that mean nothing here, and what to do."""


class RewardSettings(Settings):
    """What a sampled reply is paid; 0 switches a term off."""

    score_gain: float = 1.0
    """Where the command raised the game's score."""

    valid: float = 0.1
    """Where the command is one of the state's admissible ones."""

    invalid: float = -0.5
    """Where it is not, or there is none."""

    format: float = 0.1
    """Where the reply ends its thought and then gives one answer, and nothing else."""


class HybridSettings(GuidedSettings):
    """A world model's settings, and those of the language model beside it."""

    known: ClassVar[Mapping[str, Preset]] = presets.HYBRID
    foundation: ClassVar[Preset] = presets.FOUNDATION
    free: ClassVar[frozenset[str]] = FREE_TO_CHANGE

    algorithm: Literal["priorzero-ppo"] = "priorzero-ppo"  # type: ignore[assignment]
    """This one."""

    language: LanguageSettings = LanguageSettings(history=3)
    """The language model, and how many past turns its prompts show."""

    rl_algorithm: Literal["ppo", "grpo"] = "ppo"
    """How it learns: by PPO, whose critic learns first, or by GRPO, which has none."""

    options: Mapping[str, Any] = {}
    """Further options of that algorithm, e.g. `{"clip_high": 0.28}` (documented in its file)."""

    rollout_batch_size: int = pydantic.Field(default=128, ge=1)
    """Prompts of a rollout; each is a state that the world model's play came to."""

    n_samples_per_prompt: int = pydantic.Field(default=64, ge=1)
    """Replies sampled to each prompt."""

    policy_update_steps: int = pydantic.Field(default=1, ge=1)
    """Mini-batches that a rollout is shuffled into for the policy, one update each."""

    critic_update_steps: int = pydantic.Field(default=12, ge=1)
    """The same for the critic, which learns before the policy."""

    actor_learning_rate: float = pydantic.Field(default=1e-6, gt=0)
    """Of the policy's AdamW (betas .9 and .95, no weight decay)."""

    critic_learning_rate: float = pydantic.Field(default=5e-6, gt=0)
    """Of the critic's AdamW."""

    num_warmup_steps: int = pydantic.Field(default=50, ge=0)
    """Updates over which either rate rises."""

    prompt_max_len: int = pydantic.Field(default=2048, ge=16)
    """Most tokens of a prompt; what does not fit loses its oldest turns first."""

    generate_max_len: int = pydantic.Field(default=8000, ge=1)
    """Most tokens of a reply, where the model's context has room for them behind a prompt."""

    llm_temperature: float = pydantic.Field(default=1.0, gt=0)
    """Of sampling replies; the loss uses the same."""

    prompt_template: str = ""
    """A jinja file that makes the prompt of a state; empty: ORZ's form (`prompt.jinja`)."""

    rewards: RewardSettings = RewardSettings()
    """What a reply is paid, term by term."""

    custom_reward_fn: str = ""
    """A function that pays replies too, `package.module:name` or `path/file.py:name`, as
    `reward_function` of `training.settings`; it is also given `commands`, each state's list."""

    lora_rank: int = pydantic.Field(default=0, ge=0)
    """Rank of the adapter to train in place of the language model's weights; 0: the weights."""

    max_tokens_per_microbatch: int = pydantic.Field(default=8192, ge=0)
    """Most tokens that go through the language model together; see `training.settings`."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the language model's matrix products."""

    runtime: RuntimeName = "local"
    """Where engines live: `local` (child processes), `ray`, or `ray:ADDRESS` of a cluster."""

    vllm_num_engines: int = pydantic.Field(default=0, ge=0)
    """Processes that sample replies and try them in games of their own; 0: the learner's does."""

    vllm_required: bool = False
    """Stop (exit code 3) where vLLM is not installed; otherwise transformers samples then."""

    total_num_nodes: int | None = pydantic.Field(default=None, ge=1)
    """Devices of the language model's half: GPUs where the runtime has any, else cores. The
    learner takes one and each engine one, or all share with `colocate_all`. None: as many as that
    makes."""

    colocate_all: bool = False
    """Learner and engines share devices, half of one for each engine, as many as engines."""

    engine_seconds: float = pydantic.Field(default=3600.0, gt=0)
    """How long an engine may take over its share of a rollout before it is replaced."""

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def wm_training_mode(self) -> str:
        """ORZ's name of `phase`."""
        return self.phase

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def use_llm_prior_in_mcts(self) -> bool:
        """Whether the search asks the language model: `root.mode` is not `off`."""
        return self.root.mode != "off"

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def llm_prior_weight(self) -> float:
        """ORZ's name of `root.llm_prior_weight`."""
        return self.root.llm_prior_weight

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps of a rollout: the policy's, and with PPO the critic's."""
        critic = self.critic_update_steps if self.rl_algorithm == "ppo" else 0
        return self.policy_update_steps + critic

    @property
    def nodes(self) -> int:
        """Devices that the language model's half takes."""
        return max(self.vllm_num_engines + (not self.colocate_all), 1)

    def prior(self, model: LanguageModel) -> LanguagePrior:
        """Return what asks ``model`` for its opinion: in the prompts that it is trained on."""
        from pz_agents.hybrid.prompt import HybridPrior

        return HybridPrior(model, self)

    def training(self) -> TrainSettings:
        """Return the settings of the language model's learner and critic."""
        options: dict[str, Any] = {"aggregation": "seq_mean_token_mean", **self.options}
        if self.rl_algorithm == "ppo":
            options = {
                "lam": 1.0,
                "bootstrap": False,
                "critic_learning_rate": self.critic_learning_rate,
                "critic_update_steps": self.critic_update_steps,
                **options,
            }
        return TrainSettings(
            algorithm=self.rl_algorithm,
            options=options,
            env=self.env,
            model=self.language.model,
            seed=self.seed,
            steps=self.steps,
            groups_per_step=self.rollout_batch_size,
            group_size=self.n_samples_per_prompt,
            learning_rate=self.actor_learning_rate,
            warmup_updates=self.num_warmup_steps,
            policy_update_steps=self.policy_update_steps,
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
            lora_rank=self.lora_rank,
            precision=self.precision,
            temperature=self.llm_temperature,
            max_new_tokens=self.generate_max_len,
            max_turns=1,
            threads=self.threads,
        )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_from_presets(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        _check_given(cls, values)
        name = str(cls.model_fields["algorithm"].default)
        return composed(cls.known, cls.foundation, _by_own_names(values), name)

    @pydantic.model_validator(mode="after")
    def _check_language(self) -> Self:
        if self.language.kind != "score" or self.language.reasoning:
            raise ConfigError(
                f"language.kind is {self.language.kind!r} and language.reasoning "
                f"{self.language.reasoning}; priorzero-ppo's prior scores commands behind the "
                "prompt that the model is trained on: leave both out, or take priorzero"
            )
        for name in _NAMED_HERE:
            if name in self.options:
                raise ConfigError(
                    f"`{name}` is a setting of its own and not one of `options`: set "
                    f"{name}={self.options[name]}"
                )
        algorithm_options(self.training())
        return self

    @pydantic.model_validator(mode="after")
    def _check_placement(self) -> Self:
        if self.total_num_nodes not in (None, self.nodes):
            raise ConfigError(
                f"total_num_nodes is {self.total_num_nodes}, and {self.vllm_num_engines} engines "
                f"{'that share with' if self.colocate_all else 'beside'} the learner take "
                f"{self.nodes}; set that, change vllm_num_engines, or leave total_num_nodes out"
            )
        if not self.vllm_num_engines:
            if self.vllm_required:
                require_vllm()
            for name in ("colocate_all", "vllm_required"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name} is about engines, and vllm_num_engines is 0; set 1 or more"
                    )
            if self.runtime != "local":
                raise ConfigError(
                    f"runtime {self.runtime} is where engines live, and vllm_num_engines is 0; "
                    "set 1 or more, or leave runtime out"
                )
        elif not self.trains_language:
            raise ConfigError(
                f"vllm_num_engines is {self.vllm_num_engines}, and engines sample what the "
                f"language model learns from; with wm_llm_ratio {self.wm_llm_ratio:g} it learns "
                "nothing. Leave the engines out, or lower wm_llm_ratio"
            )
        return self


def require_vllm() -> None:
    """Check that vLLM is here.

    Raises:
        EngineMissing: it is not; the message has the command that installs it.
    """
    from pz_agents.models import vllm

    if not vllm.available():
        raise EngineMissing(f"vllm_required, and vLLM is not installed. Install it: {vllm.INSTALL}")


def _check_given(kind: type[HybridSettings], values: Mapping[str, Any]) -> None:
    """Refuse what is given and would do nothing, and names of ORZ that nothing here has.

    Raises:
        ConfigError: there is such a setting; the message says what to do.
    """
    for name, instead in _ELSEWHERE.items():
        if name in values:
            raise ConfigError(f"unknown key `{name}` of ORZ's: {instead}")
    if GuidedSettings.model_fields.keys() <= values.keys():
        return  # what a run has written names every setting
    names = [each.strip() for each in str(values.get("preset", "") or "").split(",")]
    grpo = values.get("rl_algorithm", "grpo" if "grpo" in names else "ppo") == "grpo"
    for name in _NAMED_HERE:
        if grpo and name in values:
            raise ConfigError(
                f"{name} is about the critic, and rl_algorithm grpo has none; leave it out, or "
                "take ppo"
            )
    root = values.get("root", {})
    root = root.model_dump(exclude_unset=True) if isinstance(root, Settings) else root
    off = values.get("use_llm_prior_in_mcts") is False or root.get("mode") == "off"
    if off and ("llm_prior_weight" in values or "llm_prior_weight" in root):
        raise ConfigError(
            "llm_prior_weight is how much of the language model's prior the search takes, and "
            "use_llm_prior_in_mcts is false; leave it out, or set that true"
        )


def _by_own_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with what other names say under our own.

    Raises:
        ConfigError: a setting has two different values under its two names.
    """
    found = dict(values)
    for name, (first, *rest) in NAMES.items():
        if name not in found:
            continue
        value = found.pop(name)
        inner = found.get(first, {}) if rest else found
        if isinstance(inner, Settings):
            inner = inner.model_dump()
        key = rest[0] if rest else first
        old = inner.get(key)
        if name == "use_llm_prior_in_mcts":
            if not isinstance(value, bool):
                raise ConfigError(f"use_llm_prior_in_mcts is true or false; got {value!r}")
            agrees = old is None or (old != "off") == value
            value = (old or "mix") if value else "off"
        else:
            agrees = old is None or old == value
        if not agrees:
            place = ".".join((first, *rest))
            raise ConfigError(
                f"`{name}` and `{place}` ({old!r}) are one setting and differ; leave one out"
            )
        if rest:
            found[first] = {**inner, key: value}
        else:
            found[key] = value
    return found
