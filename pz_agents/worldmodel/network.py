"""The world model: texts to latents, a transformer over latents and actions, four heads.

Tokens alternate: o_0 a_0 o_1 a_1 ... An observation's token predicts policy and value, an action's
token reward and the next latent. Attention reaches back over a fixed number of tokens, with a
learned bias for each distance in place of positions, so that a cache that slides is exact: running
a sequence at once or token by token gives the same numbers. Policy logits are products of the
observation with the embedded text of each command, so any list of commands can be ranked.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from pz_agents.config import Settings
from pz_agents.worldmodel import scalars
from pz_agents.worldmodel.texts import BUCKETS, Bags
from pz_envs.errors import ConfigError

LatentNorm = Literal["layernorm", "simnorm"]


class NetworkSettings(Settings):
    """The sizes of the model; the defaults are UniZero's for text."""

    embed: int = Field(default=512, ge=8)
    """Width of every token."""

    layers: int = Field(default=2, ge=1)
    """Transformer blocks."""

    heads: int = Field(default=8, ge=1)
    """Attention heads; must divide ``embed``."""

    context_steps: int = Field(default=4, ge=1)
    """How far a token sees back, in steps of one observation and one action."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """On tokens, residuals and attention while training."""

    latent_norm: LatentNorm = "layernorm"
    """``layernorm`` goes with a squared latent loss, ``simnorm`` (a softmax in each group of
    eight) with a group KL; the loss follows from this."""

    buckets: int = Field(default=BUCKETS, ge=64)
    """Of the hashed n-grams."""

    text_width: int = Field(default=0, ge=0)
    """Width of a frozen encoder's vectors in place of the n-grams of observations; 0: none."""

    @property
    def window(self) -> int:
        """Tokens that a token attends to, itself included."""
        return 2 * self.context_steps


class Block(nn.Module):
    """A pre-norm transformer block with a learned bias for each head and distance."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        width = settings.embed
        self.heads = settings.heads
        self.dropout = settings.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(settings.heads, settings.window))
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [B, T, E] of [B, T, E]; each token sees the last ``window`` up to itself."""
        batch, length, width = tokens.shape
        states = self.query_key_value(self.attention_norm(tokens))
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in states.chunk(3, dim=-1)
        )
        seen = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self.mask(length).to(query.dtype),
            dropout_p=self.dropout if self.training else 0.0,
        )
        seen = self.project(seen.transpose(1, 2).reshape(batch, length, width))
        tokens = tokens + functional.dropout(seen, self.dropout, self.training)
        hidden = functional.gelu(self.expand(self.mlp_norm(tokens)), approximate="tanh")
        return tokens + functional.dropout(self.contract(hidden), self.dropout, self.training)

    def mask(self, length: int) -> torch.Tensor:
        """Return [heads, T, T] of biases, -inf outside the window."""
        window = self.bias.shape[1]
        place = torch.arange(length, device=self.bias.device)
        distance = place[:, None] - place[None, :]
        inside = (distance >= 0) & (distance < window)
        return torch.where(inside, self.bias[:, distance.clamp(0, window - 1)], -torch.inf)


class WorldModel(nn.Module):
    """See the module.

    Raises:
        ConfigError: heads do not divide the width, or groups of eight do not with ``simnorm``.
    """

    def __init__(self, settings: NetworkSettings | None = None) -> None:
        super().__init__()
        self.settings = settings = settings or NetworkSettings()
        width = settings.embed
        if width % settings.heads or (settings.latent_norm == "simnorm" and width % 8):
            raise ConfigError(
                f"embed={width} must be a multiple of heads={settings.heads}, and of 8 with simnorm"
            )
        if settings.text_width:
            self.observation_features: nn.Module = nn.Linear(settings.text_width, width)
        else:
            self.observation_features = nn.EmbeddingBag(settings.buckets, width, mode="mean")
        self.observation_mlp = _mlp(width, width)
        self.action_features = nn.EmbeddingBag(settings.buckets, width, mode="mean")
        self.action_mlp = _mlp(width, width)
        self.kind = nn.Parameter(torch.zeros(2, width))
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.final_norm = nn.LayerNorm(width)
        self.reward_head = _mlp(width, scalars.ATOMS)
        self.latent_head = _mlp(width, width)
        self.value_head = _mlp(width, scalars.ATOMS)
        self.policy_head = _mlp(width, width)
        self.policy_keys = nn.Linear(width, width, bias=False)
        self.apply(_initialise)
        # First predictions: reward and value 0, policy uniform. The latent head is left alone: its
        # output is normalised, and the derivative of a norm at 0 is enormous.
        for head in (self.reward_head, self.value_head, self.policy_head):
            for parameter in head[-1].parameters():
                nn.init.zeros_(parameter)

    def encode_observations(self, texts: Bags | torch.Tensor) -> torch.Tensor:
        """Return latents [N, E] of observations given as bags, or as a frozen encoder's vectors."""
        read = (
            self.observation_features(texts)
            if isinstance(texts, torch.Tensor)
            else self.observation_features(texts.ids, texts.offsets)
        )
        return self.normalise(self.observation_mlp(read))

    def encode_actions(self, texts: Bags) -> torch.Tensor:
        """Return tokens [N, E] of commands."""
        out: torch.Tensor = self.action_mlp(self.action_features(texts.ids, texts.offsets))
        return out

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents as the model keeps them: of unit variance, or softmaxes in groups of 8."""
        if self.settings.latent_norm == "layernorm":
            return functional.layer_norm(latents, latents.shape[-1:])
        groups = latents.float().view(*latents.shape[:-1], -1, 8).softmax(-1)
        return groups.view(latents.shape).to(latents.dtype)

    def forward(
        self, latents: torch.Tensor, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is known after each observation and after each action.

        Args:
            latents: [B, T, E] of observations.
            actions: [B, T, E] tokens of the commands that followed them.

        Returns:
            [B, T, E] after observations and [B, T, E] after actions, for the heads.
        """
        batch, length, width = latents.shape
        pairs = torch.stack([latents + self.kind[0], actions + self.kind[1]], dim=2)
        tokens = pairs.view(batch, 2 * length, width)
        tokens = functional.dropout(tokens, self.settings.dropout, self.training)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.final_norm(tokens)
        return tokens[:, 0::2], tokens[:, 1::2]

    def policy_logits(self, known: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return <policy head, key> / sqrt(E) of matching rows.

        Args:
            known: [..., E] after an observation.
            keys: [..., E] ``policy_keys`` of the tokens of commands.
        """
        query = self.policy_head(known)
        out: torch.Tensor = (query * keys).sum(-1) / math.sqrt(self.settings.embed)
        return out


def product_dtype(device: str = "cpu") -> torch.dtype:
    """Return the type in which matrix products are quick: bfloat16 where the machine has it.

    A CPU without bfloat16 instructions emulates them, ten times slower than float32.
    """
    quick = (
        torch.cuda.is_bf16_supported()
        if device == "cuda"
        else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.bfloat16 if quick else torch.float32


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width), nn.GELU(approximate="tanh"), nn.Linear(width, out)
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.EmbeddingBag):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.EmbeddingBag):
        # A mean of n-grams has a small variance; the MLP behind it needs inputs of order one.
        nn.init.normal_(module.weight, std=1.0)
