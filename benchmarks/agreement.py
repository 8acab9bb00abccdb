"""Greedy tokens through three peers, compared with plain transformers; prints Markdown.

    python -m benchmarks.agreement CHECKPOINT [--tokens 64] [--peers 3] [--codec NAME ...]

Each prompt is continued greedily by plain transformers and by the peers (processes on this machine, every link with the
codec under test). Two numbers per prompt: how many tokens are equal before the first difference, and how many tokens of
the reference (plain transformers) the peers would choose, too, each time after the reference's text so far. The second
number says more about the codec, because both texts diverge after one different token, and both can be good.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitnet
from splitnet.cli.demo import EXACT, LocalSwarm
from splitnet.security.identity import Identity
from splitnet.wire.codecs import CODECS

PROMPTS = {
    "facts": "The three primary colours are",
    "code": "def fibonacci(n):\n    ",
    "story": "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "science": "Photosynthesis is the process by which",
    "letter": "Dear Sir or Madam,\n\nI am writing to",
    "list": "Ten things to pack for a week in the mountains:\n1.",
}


@dataclass(frozen=True)
class Reference:
    """The continuation of a prompt by plain transformers: all token ids, `[1, prompt + new]`."""

    ids: torch.Tensor
    prompt: int


@dataclass(frozen=True)
class Agreement:
    """Equal new tokens before the first difference, and equal choices after the reference's text."""

    from_start: int
    led: int


def continue_greedily(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Continues `[1, prompt]` to `[1, prompt + tokens]`, even after an end token."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def compare(model: Any, reference: Reference) -> Agreement:
    """The agreement of a model with a reference."""
    new = reference.ids.shape[1] - reference.prompt
    own = continue_greedily(model, reference.ids[:, : reference.prompt], new)
    same = (own == reference.ids)[0, reference.prompt :]
    with torch.no_grad():
        logits = model(reference.ids[:, :-1]).logits[0, reference.prompt - 1 :]
    led = logits.argmax(dim=-1) == reference.ids[0, reference.prompt :]
    return Agreement(new if bool(same.all()) else int(same.int().argmin()), int(led.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id or folder of a checkpoint")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--codec", action="append", choices=list(CODECS), help="only this codec; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    local = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype="auto").eval()
    references: dict[str, Reference] = {}
    for name, prompt in PROMPTS.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        references[name] = Reference(continue_greedily(local, ids, arguments.tokens), ids.shape[1])
    print(f"Of {arguments.tokens} tokens: equal before the first difference / chosen after the reference's text.")
    print()
    print(f"| codec | {' | '.join(references)} | all |")
    print(f"|---|{'---|' * (len(references) + 1)}")
    with LocalSwarm(arguments.checkpoint, arguments.peers, EXACT) as swarm:
        address = swarm.wait()
        for codec in arguments.codec or CODECS:
            model: Any = splitnet.AutoModelForCausalLM.from_pretrained(
                arguments.checkpoint, initial_peers=[address], codec=codec, identity=Identity.generate()
            )
            try:
                found = [compare(model, reference) for reference in references.values()]
            finally:
                model.close()
            led = sum(agreement.led for agreement in found) / arguments.tokens / len(found)
            cells = [f"{agreement.from_start} / {agreement.led}" for agreement in found]
            print(f"| {codec} | {' | '.join(cells)} | {led:.1%} |", flush=True)


if __name__ == "__main__":
    main()
