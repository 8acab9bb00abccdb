"""Not about English: which pieces of DNA are promoters, told by a language model whose blocks run on peers.

LoRA and a head with two labels are trained; the tokenizer is one of single characters.

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
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import splitnet

DATA = Path(__file__).parent / "data"
LABELS = ["other", "promoter"]
BATCH = 16


def character_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Each base is a token: that of the model's vocabulary which is written like it, since its embeddings stay."""
    whole = AutoTokenizer.from_pretrained(name)
    vocabulary = {base: whole.convert_tokens_to_ids(base) for base in "acgt"}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters)


def read(name: str, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[sequences, bases]` and labels `[sequences]`."""
    rows = [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    ids = tokenizer([row["text"] for row in rows], return_tensors="pt")["input_ids"]
    return torch.as_tensor(ids), torch.tensor([LABELS.index(row["label"]) for row in rows])


@torch.no_grad()
def accuracy(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of sequences whose label the model tells right."""
    return float((model(input_ids=ids).logits.argmax(-1) == labels).float().mean())


def main(name: str, address: str, steps: str = "60") -> None:
    torch.manual_seed(0)
    tokenizer = character_tokenizer(name)
    ids, labels = read("promoters.train.jsonl", tokenizer)
    held_out = read("promoters.test.jsonl", tokenizer)
    base = splitnet.AutoModelForSequenceClassification.from_pretrained(
        name, initial_peers=[address], num_labels=len(LABELS)
    )
    base.config.pad_token_id = -1  # all sequences have the same length
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    print(f"before: {accuracy(model, *held_out):.0%} of the held-out sequences are told right")
    order: list[int] = []
    for step in range(int(steps)):
        if len(order) < BATCH:
            order = random.Random(step).sample(range(len(ids)), len(ids))
        chosen, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        loss = model(input_ids=ids[chosen], labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}, {accuracy(model, *held_out):.0%}", flush=True)
    print(f"after: {accuracy(model, *held_out):.0%}")
    base.close()


main(*sys.argv[1:])
