"""Paths that turn texts into tokens and tokens into texts."""

from __future__ import annotations

from typing import Any

from tests.unit.serve.serving import GREEDY, MODEL, TEMPLATE, Serve, Server


def test_tokens_of_texts_and_texts_of_tokens(serve: Serve, tokenizer: Any) -> None:
    async def does(server: Server) -> None:
        ids = tokenizer("Bees fly").input_ids
        post = server.http.post
        told = (await post("/tokenize", json={"model": MODEL, "prompt": "Bees fly", "return_token_strs": True})).json()
        assert told == {"tokens": ids, "count": len(ids), "max_model_len": 256, "token_strs": ["B", "ees", " fly"]}
        assert (await post("/tokenize", json={"content": "Bees fly"})).json() == {"tokens": ids}
        pieces = (await post("/tokenize", json={"content": "Bees", "with_pieces": True})).json()["tokens"]
        assert [piece["piece"] for piece in pieces] == ["B", "ees"]
        chat = (await post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})).json()
        assert chat["tokens"] == tokenizer("user: Hi\nassistant:").input_ids
        assert (await post("/detokenize", json={"tokens": ids})).json()["content"] == "Bees fly"
        for body, wrong in (
            (
                {"messages": [{"role": "user", "content": "Hi"}], "add_special_tokens": True},
                "add_special_tokens is for",
            ),
            ({"content": "Bees " * 20_000}, "shorten the prompt"),
        ):
            refused = await post("/tokenize", json=body)
            assert refused.status_code == 400 and wrong in refused.json()["error"]["message"]
        refused = await post("/detokenize", json={"tokens": [10**9]})
        assert refused.status_code == 400 and "knows the tokens" in refused.json()["error"]["message"]
        props = (await server.http.get("/props")).json()
        assert props["default_generation_settings"]["n_ctx"] == 256 and props["chat_template"] == TEMPLATE
        assert "POST /v1/chat/completions" in (await server.http.get("/docs")).text
        unversioned = await post("/chat/completions", json=GREEDY | {"messages": [{"role": "user", "content": "Hi"}]})
        assert unversioned.status_code == 200

    serve(does)
