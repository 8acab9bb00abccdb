"""Generates text with a model whose blocks run on the peers of a swarm, and prints each token when it arrives.

splitnet peer MODEL                    # prints ADDR
python examples/generate.py MODEL ADDR "The three primary colours are"
"""

from __future__ import annotations

import sys

from transformers import TextStreamer

import splitnet


def main(name: str, address: str, prompt: str = "The three primary colours are") -> None:
    tokenizer = splitnet.AutoTokenizer.from_pretrained(name)
    model = splitnet.AutoModelForCausalLM.from_pretrained(name, initial_peers=[address])
    inputs = tokenizer(prompt, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=32, do_sample=False, streamer=TextStreamer(tokenizer))
    model.close()


main(*sys.argv[1:])
