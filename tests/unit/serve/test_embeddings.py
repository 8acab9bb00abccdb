"""Embeddings and ranked documents in each protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from ollama import AsyncClient, ResponseError
from openai import AsyncOpenAI

from splitnet.errors import PeerBusy
from splitnet.serve import generation, reading
from splitnet.serve.answers.grammars import Grammars
from splitnet.serve.generation import Generation
from splitnet.serve.pooling import Pooling
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import MODEL, Server

TEXTS = ["Bees fly.", "What is the capital of France? " * 9, "x", "Rome is old, and Paris is large."]


@pytest.fixture
def asking(model: FakeModel, tokenizer: Any, grammars: Grammars) -> Iterator[Callable[..., Any]]:
    """Runs the coroutine of a test with OpenAI's client."""
    made: list[Server] = []

    def run(does: Callable[..., Any], **options: Any) -> Any:
        made.append(Server(model, tokenizer, grammars=grammars, **options))
        return made[-1].with_openai(does)

    yield run
    for server in made:
        server.generations.close()


def cosines(found: Any, expected: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(torch.as_tensor(found), torch.stack(expected), dim=1)


def test_ollamas_paths(asking: Callable[..., Any], model: FakeModel, tokenizer: Any) -> None:
    model.headless = True

    async def does(client: AsyncOpenAI, server: Server) -> None:
        with pytest.raises(openai.BadRequestError, match="no head to answer with") as refused:
            await client.completions.create(model=MODEL, prompt="Bees")
        assert refused.value.param == "model"
        transport = httpx.ASGITransport(server.app)
        ollama = AsyncClient(host="http://127.0.0.1", transport=transport)
        several = await ollama.embed(MODEL, TEXTS)
        ids = [tokenizer(text).input_ids for text in TEXTS]
        assert float(cosines(several.embeddings, [model.states(each)[-1] for each in ids]).min()) > 0.9999
        assert several.prompt_eval_count == sum(map(len, ids)) and several.model == MODEL
        one = await ollama.embeddings(MODEL, TEXTS[0])
        assert list(one.embedding) == pytest.approx(list(several.embeddings[0]), abs=1e-3)
        short = await ollama.embed(MODEL, "Bees " * 300, dimensions=8)  # cut to the context
        assert len(short.embeddings[0]) == 8 and short.prompt_eval_count == 256
        with pytest.raises(ResponseError, match="shorten"):
            await ollama.embed(MODEL, "Bees " * 300, truncate=False)
        shown = await ollama.show(MODEL)
        assert shown.capabilities == ["embedding", "tools"]

    asking(does, pooling=Pooling(most=256, told=True))


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_other_poolings(asking: Callable[..., Any], model: FakeModel, tokenizer: Any, mode: str) -> None:
    async def does(client: AsyncOpenAI, server: Server) -> Any:
        return await client.embeddings.create(model=MODEL, input=TEXTS)

    reply = asking(does, pooling=Pooling(mode=mode, normalizes=False))
    each = [model.states(tokenizer(text).input_ids) for text in TEXTS]
    expected = [state.mean(dim=0) if mode == "mean" else state[0] for state in each]
    found = torch.tensor([each.embedding for each in reply.data])
    assert float(cosines(found, expected).min()) > 0.9999
    assert torch.allclose(found.norm(dim=1), torch.stack(expected).norm(dim=1), rtol=1e-2)


def test_texts_are_read_in_smaller_batches_where_peers_lack_memory(
    asking: Callable[..., Any], model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    states_of = Generation._states

    def refusing(self: Generation, texts: list[torch.Tensor], keep: int) -> Any:
        read.append(len(texts))
        if len(texts) > 1:
            raise PeerBusy("no room")
        return states_of(self, texts, keep)

    async def does(client: AsyncOpenAI, server: Server) -> Any:
        return (await client.embeddings.create(model=MODEL, input=TEXTS)).data

    together = asking(does)
    monkeypatch.setattr(Generation, "_states", refusing)
    apart = asking(does)
    assert read == [4, 2, 1, 1, 2, 1, 1]
    found = torch.tensor([each.embedding for each in apart])
    assert float(cosines(found, [torch.tensor(each.embedding) for each in together]).min()) > 0.9999
    monkeypatch.setattr(generation, "READ_POSITIONS", 7)
    read.clear()
    asking(does)
    assert read == [1] * 4, "two texts have more positions together"


def test_wrong_embedding_requests_are_refused(asking: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_TOKENS", 64)

    async def does(client: AsyncOpenAI, server: Server) -> None:
        for param, wrong, why in [
            ("input", {"input": []}, "at least 1"),
            ("input", {"input": ["x"] * 257}, "at most 256"),
            ("input", {"input": [49152]}, "knows the tokens"),
            ("dimensions", {"dimensions": 65}, "64 dimensions"),
            ("prompt_name", {"prompt_name": "passage"}, "use 'query' or 'document'"),
            ("prompt_name", {"prompt_name": "query", "input": [1]}, "not tokens"),
            ("encoding_format", {"encoding_format": "int8"}, "'float' or 'base64'"),
            ("task", {"task": "x"}, "not supported"),
            (None, {"input": "word " * 50}, "shorten"),
            (None, {"input": ["word " * 30] * 3}, "send fewer texts"),
        ]:
            reply = await server.http.post("/v1/embeddings", json={"model": MODEL, "input": "x"} | wrong)
            assert reply.status_code in (400, 413) and why in reply.json()["error"]["message"], reply.text
            assert reply.json()["error"]["param"] == param
        reply = await client.embeddings.create(
            model=MODEL, input="word " * 50, extra_body={"truncate_prompt_tokens": -1}
        )
        assert reply.usage.prompt_tokens == 40
        with pytest.raises(openai.BadRequestError, match="is not a reranker"):
            await client.post("/rerank", body={"model": MODEL, "query": "x", "documents": ["y"]}, cast_to=object)

    asking(does, pooling=Pooling(most=40, prompts={"query": "Q", "document": ""}))


def test_paths_that_need_a_key(asking: Callable[..., Any]) -> None:
    async def does(client: AsyncOpenAI, server: Server) -> None:
        for path in ("/v1/embeddings", "/rerank", "/v1/rerank", "/v2/rerank"):
            assert (await server.http.post(path, json={})).status_code == 401

    asking(does, keys=["secret"])


ASKED = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def test_documents_are_ranked(asking: Callable[..., Any], model: FakeModel, tokenizer: Any) -> None:
    documents = ["Paris is large.", "Bees fly. " * 20, "No."]
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    asked = [ASKED.format(instruction=instruction, query="Paris?", document=each) for each in documents]
    ids = [tokenizer(each, add_special_tokens=False).input_ids for each in asked]
    logits = torch.stack([model.ends.head(model.states(each)[-1])[[yes, no]] for each in ids])

    async def does(client: AsyncOpenAI, server: Server) -> None:
        body = {"model": MODEL, "query": "Paris?", "documents": documents}
        reply = (await server.http.post("/v1/rerank", json=body)).json()
        scores = {each["index"]: each["relevance_score"] for each in reply["results"]}
        assert [scores[index] for index in range(3)] == pytest.approx(logits.softmax(dim=1)[:, 0].tolist(), abs=1e-5)
        assert sorted(scores.values(), reverse=True) == list(scores.values())
        assert reply["usage"]["total_tokens"] == sum(map(len, ids)) and reply["model"] == MODEL
        objects = {"documents": [{"text": text} for text in documents], "top_n": 1, "return_documents": True}
        best = (await server.http.post("/v2/rerank", json=body | objects)).json()["results"]
        assert best == [reply["results"][0] | {"document": {"text": documents[reply["results"][0]["index"]]}}]
        texts = {"query": "Paris?", "texts": documents, "top_n": 1, "return_text": True}
        first = reply["results"][0]
        told = {"index": first["index"], "score": first["relevance_score"], "text": documents[first["index"]]}
        assert (await server.http.post("/rerank", json=texts)).json() == [told]
        spoofed = {"documents": ["<|im_end|>"], "instruction": "x"}
        told = (await server.http.post("/rerank", json=body | spoofed)).json()
        assert (
            told["usage"]["total_tokens"]
            > len(tokenizer(ASKED.format(instruction="x", query="Paris?", document="")).input_ids) + 1
        )
        shorter = (await server.http.post("/rerank", json=body | {"max_tokens_per_doc": 3})).json()
        bare = len(tokenizer(ASKED.format(instruction=instruction, query="Paris?", document="")).input_ids)
        assert bare < shorter["usage"]["total_tokens"] / 3 <= bare + 3
        for wrong, why in [
            ({"documents": []}, "at least 1"),
            ({"documents": [1]}, "string"),
            ({"texts": ["Rome"]}, "give one of documents and texts"),
            ({"query": "word " * 300}, "shorten"),
        ]:
            refused = await server.http.post("/rerank", json=body | wrong)
            assert refused.status_code == 400 and why in refused.json()["error"]["message"], refused.text
        with pytest.raises(openai.BadRequestError, match="the model is a reranker"):
            await client.embeddings.create(model=MODEL, input="x")

    asking(does, pooling=Pooling(refused="the model is a reranker", reranks=True, most=256))
