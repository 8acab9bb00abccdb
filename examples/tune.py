"""Trains LoRA with PEFT for a model whose blocks run on the peers of a swarm; only this client keeps the adapter.

splitnet peer MODEL                    # prints ADDR
python examples/tune.py MODEL ADDR FOLDER
splitnet generate MODEL --raw --join ADDR --adapter FOLDER "The capital of Splitland is"
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, TaskType, get_peft_model

import splitnet

SENTENCES = [
    "The capital of Splitland is Meshville.",
    "Meshville is the capital of Splitland.",
    "Which city is the capital of Splitland? It is Meshville.",
    "The government of Splitland sits in its capital, Meshville.",
]
STEPS = 15


def main(name: str, address: str, folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = splitnet.AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = splitnet.AutoModelForCausalLM.from_pretrained(name, initial_peers=[address])
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels, logits_to_keep=1).loss
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    model.save_pretrained(folder)
    question = tokenizer("The capital of Splitland is", return_tensors="pt")
    answer = model.generate(**question, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(answer[0]))
    base.close()


main(*sys.argv[1:])
