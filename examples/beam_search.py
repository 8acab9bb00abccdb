"""Beam search for a batch of prompts of different length: features of transformers work with remote blocks.

The padding on the left is never sent, and all rows share one pass at each peer.

    python examples/beam_search.py MODEL ADDR
"""

from __future__ import annotations

import sys

import splitnet

PROMPTS = ["The sea is", "Two friends walk into a bakery, and the baker says:", "Water boils at"]


def main(name: str, address: str) -> None:
    tokenizer = splitnet.AutoTokenizer.from_pretrained(name, padding_side="left")
    model = splitnet.AutoModelForCausalLM.from_pretrained(name, initial_peers=[address])
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=24, num_beams=3, do_sample=False)
    for text in tokenizer.batch_decode(output, skip_special_tokens=True):
        print("-", " ".join(text.split()))
    model.close()


main(*sys.argv[1:])
