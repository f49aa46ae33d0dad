"""A frozen text encoder of the Hugging Face kind, in place of learned n-grams of the states.

A state's vector is the encoder's last hidden state at its first token (the CLS token of BERT-like
models). Texts are read one at a time, without padding, so that a vector depends on its text alone,
bit for bit; ``Texts`` remembers it.
"""

from __future__ import annotations

import torch

from pz_agents.models import model_folder

_MOST_TOKENS = 512


class FrozenEncoder:
    """Reads texts.

    Args:
        spec: a folder that save_pretrained wrote, or the id of a downloaded model of the hub.

    Attributes:
        width: of its vectors.

    Raises:
        ModelError: there is no such model here.
    """

    def __init__(self, spec: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = model_folder(spec)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._network = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.width = int(self._network.config.hidden_size)
        places = getattr(self._network.config, "max_position_embeddings", _MOST_TOKENS)
        self._most = min(_MOST_TOKENS, places)

    @torch.inference_mode()
    def __call__(self, text: str) -> torch.Tensor:
        """Return [W]; of a long text only the beginning is read."""
        given = self._tokenizer(text, truncation=True, max_length=self._most, return_tensors="pt")
        vector: torch.Tensor = self._network(**given).last_hidden_state[0, 0]
        return vector.clone()
