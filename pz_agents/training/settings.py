"""What a training run is told, and which settings may change when it is resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic

from pz_agents.algorithms import load_algorithm
from pz_agents.config import Settings, parse_settings
from pz_agents.rollout.reflect_retry import RetryOptions
from pz_agents.rollout.store import Policy
from pz_agents.training.mixture import DATA_ENV, DataSource, load_mixture
from pz_agents.training.monitors import MonitorName
from pz_agents.training.presets import compose, preset_names
from pz_agents.training.stopping import EarlyStopping
from pz_envs.errors import ConfigError

FREE_TO_CHANGE = frozenset(
    {
        "preset",
        "save_every",
        "keep_checkpoints",
        "eval_episodes",
        "eval_every",
        "eval_metrics",
        "early_stopping",
        "monitor",
        "threads",
        "runtime",
        "workers",
        "engines",
        "resources",
        "worker_seconds",
        "weights",
        "learner_ranks",
        "colocate_all",
    }
)
"""Settings that a resumed run may change, because no weight depends on them."""

TRUNCATED_SAMPLING = ("top_p", "top_k", "min_p")
"""Settings of sampling that exist elsewhere and bias training."""


def _is_runtime(name: str) -> str:
    kind, colon, address = name.partition(":")
    if name != "local" and (kind != "ray" or bool(colon) != bool(address)):
        raise ValueError("a runtime is local, ray or ray:ADDRESS, e.g. ray:auto")
    return name


RuntimeName = Annotated[str, pydantic.AfterValidator(_is_runtime)]
"""Where processes live."""


class TrainSettings(Settings):
    """Everything a training run depends on."""

    preset: str = ""
    """Names in `presets.toml`, with commas between, that supply the settings not given here."""

    algorithm: str = "grpo"
    """A name in `pz_agents.algorithms.ALGORITHMS`."""

    options: Mapping[str, Any] = {}
    """The algorithm's own options, e.g. `{"beta": 0.04}` (documented in its file)."""

    env: str
    """A Gymnasium id of pz_envs; training plays its training split. Left out with `datasets`."""

    datasets: tuple[DataSource, ...] = ()
    """Files of single questions to train on in place of an environment, mixed by weight:
    `{path, type, input, output, weight, split, skip}` (`pz_agents.training.mixture`)."""

    env_kwargs: Mapping[str, Any] = {}
    """Keyword arguments of the environment."""

    model: str = "tiny"
    """What to start from: `tiny` or a folder written by `save_pretrained`."""

    seed: int = pydantic.Field(default=0, ge=0)
    """Decides the tasks, the sampling and the order of rows."""

    steps: int = pydantic.Field(ge=1)
    """Steps of the run; in each, fresh tasks are played and learned from."""

    epochs: float | None = pydantic.Field(default=None, gt=0, exclude=True)
    """How often to go through `datasets`, in place of `steps`, which it turns into."""

    groups_per_step: int = pydantic.Field(default=8, ge=1)
    """Tasks a step."""

    group_size: int = pydantic.Field(default=8, ge=1)
    """Attempts at each task; 1 only for algorithms with a critic, which compare none."""

    learning_rate: float = pydantic.Field(default=1e-6, gt=0)
    """Highest learning rate of AdamW (betas .9 and .999, no weight decay)."""

    schedule: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    """How the learning rate goes on after warm-up; linear and cosine end at 0, plateau halves."""

    plateau_patience: int = pydantic.Field(default=20, ge=1)
    """Steps without a higher reward after which schedule `plateau` halves the learning rate."""

    warmup_updates: int = pydantic.Field(default=0, ge=0)
    """Updates over which the learning rate rises."""

    iterations: int = pydantic.Field(default=1, ge=1)
    """Passes over the rows of one step."""

    policy_update_steps: int = pydantic.Field(default=1, ge=1)
    """Mini-batches that the rows are shuffled into, one update each; with 1 and one pass the
    policy ratio is 1 and clipping never acts."""

    max_tokens_per_microbatch: int = pydantic.Field(default=8192, ge=0)
    """Most tokens that go through the network together, padding included (0: all rows at once);
    halved when memory runs out. The loss does not depend on it."""

    lora_rank: int = pydantic.Field(default=0, ge=0)
    """Rank of the adapter to train in place of the weights; 0 trains the weights."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto takes bfloat16 where CUDA has it. What is trained stays
    float32, and so do log-probs and losses."""

    correction: Literal[
        "none", "token_truncate", "token_mask", "seq_truncate", "seq_mask", "geo"
    ] = "none"
    """What to do where the sampler's log-probs are not the learner's: a rule of
    `pz_agents.algorithms.corrections`, for samplers on other engines or with older weights."""

    kl_reward: float = pydantic.Field(default=0.0, ge=0)
    """Weight of a rollout's KL to the starting weights, taken off its reward; an algorithm's own
    `beta` is the weight of that KL in the loss, and only one of them may be set. With a critic
    it comes off token by token."""

    kl_target: float | None = pydantic.Field(default=None, gt=0)
    """Steer the weight `kl_reward` so that the KL a token stays near this; None: it is fixed."""

    kl_horizon: int = pydantic.Field(default=10_000, ge=1)
    """Rollouts over which a KL that is far off changes the weight by a fifth."""

    reward_function: str = ""
    """A function that pays episodes, `package.module:name` or `path/file.py:name`; it is given
    `prompts`, `completions`, `trajectories` and the data set's columns, as lists, by keyword."""

    reward_model: str = ""
    """A model that scores conversations (a sequence classifier with one label); clipped to 10."""

    env_reward: float | None = None
    """Weight of the environment's own reward beside `reward_function` and `reward_model`; None:
    they replace it."""

    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""

    temperature: float = pydantic.Field(default=1.0, gt=0)
    """Of sampling; the loss uses the same. There is no top-p or top-k: both bias the ratio."""

    max_new_tokens: int = pydantic.Field(default=256, ge=1)
    """Most tokens of one reply."""

    max_turns: int = pydantic.Field(default=10, ge=1)
    """Most turns of an episode."""

    concurrency: int = pydantic.Field(default=256, ge=1)
    """Episodes alive at once."""

    max_staleness: int = pydantic.Field(default=0, ge=0)
    """Steps that weights may be behind when what they played is trained on; older groups are
    dropped and counted. 0 plays and trains in turn; 1 plays the next step's tasks while this one's
    are trained on, in a process of its own; more plays further ahead."""

    max_uses: int = pydantic.Field(default=1, ge=1)
    """Steps that may train on a group; each after the first takes one of `max_staleness`."""

    sampling: Policy = "fifo"
    """Which groups a step takes when more are stored than it needs: `fifo`, `latest`, `uniform`,
    or `priority` (newest weights first, less two steps for each use)."""

    save_every: int = pydantic.Field(default=20, ge=1)
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: int = pydantic.Field(default=2, ge=1)
    """Newest checkpoints to keep; the best is kept beside them."""

    eval_episodes: int = pydantic.Field(default=0, ge=0)
    """Held-out episodes to play, greedily, at each checkpoint; the best checkpoint is then the
    one with the best result, else (0) the one with the highest mean reward since the last."""

    eval_every: int | None = pydantic.Field(default=None, ge=1)
    """Steps between evaluations, and after the last; None: at each checkpoint."""

    eval_metrics: str = ""
    """A function that measures the evaluation too, `package.module:name` or `path/file.py:name`:
    it is given the trajectories and returns a mapping of names to numbers."""

    early_stopping: EarlyStopping | None = None
    """End before the last step, `{metric, mode, patience, min_delta}`; None: never."""

    monitor: MonitorName = "none"
    """Where figures go beside `metrics.jsonl`."""

    threads: int = pydantic.Field(default=1, ge=1)
    """Torch's CPU threads; more than one pays only for models above some 10 M parameters."""

    runtime: RuntimeName = "local"
    """Where workers and engines live: `local`, `ray` (of this run's own), or `ray:ADDRESS` of a
    cluster (`ray:auto` finds the one on this machine)."""

    workers: int = pydantic.Field(default=0, ge=0)
    """Processes that play the episodes; 0: this one plays, or on Ray one actor."""

    engines: int = pydantic.Field(default=0, ge=0)
    """Processes with a model that the workers share; 0: each worker has its own."""

    weights: Literal["files", "group"] = "files"
    """How engines get new weights: as files, which any of them can load, or through a process group
    with the learner, by NCCL where each has a GPU of its own, else by gloo."""

    learner_ranks: int = pydantic.Field(default=1, ge=0)
    """Processes that learn together, each from its share of the rows (this one is the first); 0:
    one for each GPU that workers and engines leave."""

    colocate_all: bool = False
    """Each engine shares its GPU (without GPUs its CPUs) with a learner rank; there are then as
    many ranks as engines."""

    resources: Mapping[Literal["worker", "engine", "rank"], Mapping[str, float]] = {}
    """What each worker, engine and learner rank is given on a cluster: `cpus` (1), `gpus` (0; a
    rank 1 where there are any), or a resource of its nodes by name, e.g.
    `{"engine": {"gpus": 1}}`."""

    worker_seconds: float = pydantic.Field(default=3600.0, gt=0)
    """How long a worker may take over its share of a batch before it is replaced, and a learner
    rank over a step."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_truncated_sampling(cls, values: Any) -> Any:
        for name in TRUNCATED_SAMPLING:
            if isinstance(values, Mapping) and name in values:
                raise ConfigError(
                    f"`{name}` ({values[name]!r}) cannot be used while training: it samples from "
                    "a part of the vocabulary and renormalises, so the log-probs of what was "
                    "sampled are too high and every policy ratio is too low by exactly the mass "
                    "that was kept. Remove it; `temperature` is allowed."
                )
        return values

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_the_data(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not values.get("datasets"):
            return values
        env = values.get("env") or DATA_ENV
        if env != DATA_ENV:
            raise ConfigError(f"`env` is {env} and there are `datasets` too; leave one of them out")
        return {"max_turns": 1, **values, "env": env}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not values.get("preset"):
            return values
        return {**compose(preset_names(str(values["preset"]))), **values}

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _steps_of_epochs(cls, values: Any, parse: Callable[[Any], TrainSettings]) -> TrainSettings:
        if not isinstance(values, Mapping) or values.get("epochs") is None:
            return parse(values)
        if values.get("steps") is not None:
            raise ConfigError(
                f"`epochs` is {values['epochs']} and `steps` {values['steps']}; epochs decide the "
                "steps, so leave one of them out"
            )
        if not values.get("datasets"):
            raise ConfigError(
                f"`epochs` is {values['epochs']} and there are no `datasets`: an environment's "
                "tasks have no end to come to. Set `steps`"
            )
        one = parse({**values, "steps": 1})
        rows = len(load_mixture(one.datasets, "train", one.seed))
        steps = math.ceil((one.epochs or 0) * rows / one.groups_per_step - 1e-9)
        return parse({**values, "steps": max(steps, 1)})

    @pydantic.model_validator(mode="after")
    def _check_staleness(self) -> TrainSettings:
        if self.batches_ahead < 0:
            raise ConfigError(
                f"`max_uses` is {self.max_uses} and `max_staleness` {self.max_staleness}: weights "
                f"are {self.max_uses - 1} steps behind at a group's last use. Set `max_staleness` "
                f"to {self.max_uses - 1} or more"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_places(self) -> TrainSettings:
        if self.colocate_all and self.learner_ranks not in (0, self.engines):
            raise ConfigError(
                f"`colocate_all` puts an engine and a learner rank on each GPU, and there are "
                f"{self.engines} `engines` and {self.learner_ranks} `learner_ranks`; set both to "
                "the number of GPUs"
            )
        if self.colocate_all and not self.engines:
            raise ConfigError("`colocate_all` needs `engines`: one for each GPU; there are none")
        if self.weights == "group" and not self.engines:
            raise ConfigError("`weights` go through a group to `engines`, and there are none")
        return self

    @pydantic.model_validator(mode="after")
    def _check_evaluation(self) -> TrainSettings:
        if self.eval_every is not None and not self.eval_episodes:
            raise ConfigError(
                f"`eval_every` is {self.eval_every} and there are no `eval_episodes` to play; set "
                "them too (100 are usual)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_that_something_pays(self) -> TrainSettings:
        answers = [source.output for source in self.datasets if source.split == "train"]
        if answers and not any(answers) and not (self.reward_function or self.reward_model):
            raise ConfigError(
                "nothing pays for replies to `datasets`: name the column with the answer as "
                "`output`, or set `reward_function` or `reward_model`"
            )
        return self

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps that the rows of one step get."""
        return self.iterations * self.policy_update_steps

    @property
    def has_fleet(self) -> bool:
        """Whether other processes play, looked after by the one that learns."""
        return self.workers > 0 or self.engines > 0 or self.runtime != "local"

    @property
    def batches_ahead(self) -> int:
        """Batches that may be played before they are needed; 0: play and train in turn."""
        return (self.max_staleness + 1) // self.max_uses - 1


_SELECT_BY_REWARD = ("raft", "raft-pp", "opmd-reweight", "r3l")
"""What they accept or weight depends on whether a reward reaches a mark."""


def algorithm_options(settings: TrainSettings) -> Settings:
    """Return the algorithm's options with the user's changes.

    Raises:
        ConfigError: an option does not exist or is out of range.
    """
    algorithm = load_algorithm(settings.algorithm)
    defaults = algorithm.defaults
    values = {**defaults.model_dump(), **settings.options}
    options = parse_settings(type(defaults), values, f"options of {settings.algorithm}")
    if settings.correction != "none" and getattr(options, "form", "simple") != "simple":
        raise ConfigError(
            f"`correction` ({settings.correction}) weighs each token's advantage, and the form "
            f"`{getattr(options, 'form', '')}` of {settings.algorithm} has none a token; set it "
            "to none, or the form to simple"
        )
    if settings.learner_ranks != 1 and getattr(options, "form", "") == "pairwise":
        raise ConfigError(
            f"`learner_ranks` is {settings.learner_ranks}, and the form `pairwise` of "
            f"{settings.algorithm} compares rows that would be on different ranks; set it to 1, or "
            "the form to simple or squared"
        )
    if settings.group_size == 1 and algorithm.critic is None:
        raise ConfigError(
            f"`group_size` is 1, and {settings.algorithm} compares the attempts at one task; set "
            "2 or more, or take ppo, whose critic needs no other attempt"
        )
    if settings.kl_target is not None and not settings.kl_reward:
        raise ConfigError(
            f"`kl_target` ({settings.kl_target:g}) steers the weight `kl_reward`, which is 0; "
            "set that too (0.05 is usual)"
        )
    if settings.kl_reward and settings.algorithm in _SELECT_BY_REWARD:
        raise ConfigError(
            f"`kl_reward` ({settings.kl_reward:g}) changes rewards, and {settings.algorithm} "
            "selects what it learns from by the reward itself; set it to 0, or take another, "
            "e.g. grpo or ppo"
        )
    if (
        settings.correction != "none"
        and settings.temperature != 1
        and isinstance(options, RetryOptions)
    ):
        raise ConfigError(
            f"`correction` ({settings.correction}) compares the log-probs of a retry with those "
            f"it would have had without guidance, which {settings.algorithm} knows at "
            f"`temperature` 1 alone; it is {settings.temperature:g}. Set it to 1, or `correction` "
            "to none"
        )
    beta = getattr(options, "beta", 0.0)
    if settings.kl_reward and beta:
        raise ConfigError(
            f"`kl_reward` ({settings.kl_reward:g}) puts the KL to the starting weights in the "
            f"reward and {settings.algorithm}'s `beta` ({beta:g}) puts it in the loss; both would "
            "count it twice. Set one of them to 0"
        )
    return options


def resolved(settings: TrainSettings) -> dict[str, Any]:
    """Return every setting and every option of the algorithm as plain values."""
    options = algorithm_options(settings).model_dump(mode="json")
    return {**settings.model_dump(mode="json"), "options": options}


def check_resumable(saved: Mapping[str, Any], settings: TrainSettings, folder: str) -> None:
    """Compare the settings a run was started with to those it is to go on with.

    ``steps`` may grow while the learning rate does not depend on them.

    Raises:
        ConfigError: a setting that weights depend on has changed; the message names it.
    """
    now = resolved(settings)
    # Settings that came after the run began had their defaults then.
    known = {key: value for key, value in saved.items() if key in now}
    then = resolved(TrainSettings.model_validate({**known, "preset": ""}))
    free = set(FREE_TO_CHANGE)
    steady = settings.schedule in ("constant", "plateau")
    if steady and settings.steps >= then["steps"]:
        free.add("steps")
    for path, old, new in _changes(then, now):
        if path.partition(".")[0] not in free:
            raise ConfigError(
                f"`{path}` was {old!r} when the run in {folder} began and is "
                f"{new!r} now; set it back, or train into another folder."
            )


def _changes(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name, the old and the new value of what differs."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{prefix}{key}.")
        else:
            yield prefix + key, before, after
