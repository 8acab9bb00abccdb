"""A conversation in one session: the peers keep the KV caches of the session, so each turn sends only new positions.

python examples/chat.py MODEL ADDR "My name is Ada." "What is my name?"
"""

from __future__ import annotations

import sys

import splitnet


def main(name: str, address: str, *turns: str) -> None:
    tokenizer = splitnet.AutoTokenizer.from_pretrained(name)
    model = splitnet.AutoModelForCausalLM.from_pretrained(name, initial_peers=[address])
    messages: list[dict[str, str]] = []
    with model.session(max_length=1024) as cache:
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
            length = inputs["input_ids"].shape[1]
            answer = tokenizer.decode(output[0, length:], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
            sent = cache.session.traffic.positions if cache.session else 0
            print(f"you:   {turn}\nmodel: {answer}\n({length} tokens of prompt; {sent} positions sent so far)\n")
    model.close()


main(*sys.argv[1:])
