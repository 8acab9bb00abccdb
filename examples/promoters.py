"""Classifies DNA instead of text: a language model whose blocks run on peers tells which sequences are promoters.

The model learns, with LoRA, to write DNA after a sign for the kind of the DNA. A sequence is classified as the kind
after whose sign the sequence is likelier. Each token is a single character.

splitnet peer MODEL                    # prints ADDR
python examples/promoters.py MODEL ADDR [STEPS]
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import splitnet

DATA = Path(__file__).parent / "data"
SIGNS = {"promoter": "+", "other": "-"}
BASES = "acgt"
BATCH = 16
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def character_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Maps each character to the token of the model's vocabulary with the same text, because the embeddings do not
    change."""
    whole = splitnet.AutoTokenizer.from_pretrained(name)
    characters = [*BASES, *SIGNS.values()]
    vocabulary = {character: whole.convert_tokens_to_ids(character) for character in characters}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def read(name: str) -> list[tuple[str, str]]:
    """Sequences of 57 bases, and what they are."""
    rows = [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    return [(row["text"], row["label"]) for row in rows]


def encoded(tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, str]]) -> torch.Tensor:
    """Token ids `[pieces, 1 + bases]`: the sign of each piece, followed by its bases."""
    texts = [SIGNS[label] + text for text, label in pieces]
    return torch.as_tensor(tokenizer(texts, return_tensors="pt")["input_ids"])


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, str]]) -> float:
    """The share of pieces that are likelier after the sign of their own kind than after the other sign."""
    bases = torch.as_tensor(tokenizer(BASES)["input_ids"])
    likelihoods: dict[str, torch.Tensor] = {}
    for label in SIGNS:
        ids = encoded(tokenizer, [(text, label) for text, _ in pieces])
        likely = model(input_ids=ids).logits[:, :-1, bases].log_softmax(-1)
        likelihoods[label] = (likely * (ids[:, 1:, None] == bases)).sum((1, 2))
    told = likelihoods["promoter"] > likelihoods["other"]
    return float((told == torch.tensor([label == "promoter" for _, label in pieces])).float().mean())


def main(name: str, address: str, steps: str = "50") -> None:
    torch.manual_seed(0)
    tokenizer = character_tokenizer(name)
    pieces, held_out = read("promoters.train.jsonl"), read("promoters.test.jsonl")
    base = splitnet.AutoModelForCausalLM.from_pretrained(name, initial_peers=[address])
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules=LAYERS)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    print(f"before: {accuracy(model, tokenizer, held_out):.0%} of the held-out pieces are right", flush=True)
    order: list[tuple[str, str]] = []
    for step in range(int(steps)):
        if len(order) < BATCH:
            order = random.Random(step).sample(pieces, len(pieces))
        batch, order = order[:BATCH], order[BATCH:]
        ids = encoded(tokenizer, batch)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    print(f"after: {accuracy(model, tokenizer, held_out):.0%}")
    base.close()


main(*sys.argv[1:])
