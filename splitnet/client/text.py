"""The text of `splitnet.client.speculation.decoding`: its tokens, and how the next one is chosen."""

from __future__ import annotations

from typing import Any

import torch


class Text:
    """The tokens so far, and how the next one is chosen: as in transformers' `generate()`, from what that has prepared.

    Args:
        prompt: `[1, seq]`.
        processor, criteria, config, streamer: transformers' `LogitsProcessorList`, `StoppingCriteriaList`,
            `GenerationConfig`, and `BaseStreamer` or None.
    """

    def __init__(self, prompt: torch.Tensor, processor: Any, criteria: Any, config: Any, streamer: Any) -> None:
        self.tokens: list[int] = prompt[0].tolist()
        self.finished = False
        self.most: int | None = config.max_length
        """Tokens that it may have."""
        self._held = torch.empty(1, 2 * prompt.shape[1] + 256, dtype=prompt.dtype, device=prompt.device)
        self._held[:, : prompt.shape[1]] = prompt
        self._processor = processor
        self._criteria = criteria
        self._samples: bool = config.do_sample
        self._streamer = streamer

    def ids(self, start: int = 0) -> torch.Tensor:
        """`[1, seq]`, from the token at `start` on."""
        return self._held[:, start : len(self.tokens)]

    def choose(self, logits: torch.Tensor) -> int:
        """Takes the next token by its logits `[vocabulary]`."""
        scores = self._processor(self.ids(), logits[None].to(torch.float32, copy=True))
        if self._samples:
            chosen = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)[0]
        else:
            chosen = scores.argmax(dim=-1)
        token = int(chosen)
        if len(self.tokens) == self._held.shape[1]:
            self._held = torch.cat((self._held, torch.empty_like(self._held)), dim=1)
        self._held[0, len(self.tokens)] = token
        self.tokens.append(token)
        if self._streamer is not None:
            self._streamer.put(chosen.cpu())
        self.finished = bool(self._criteria(self.ids(), scores).all())
        return token

    def end(self) -> None:
        """Nothing comes any more."""
        if self._streamer is not None:
            self._streamer.end()
