"""What programs for llama.cpp's server and vLLM ask besides: tokens of texts and texts of tokens, and facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from splitnet.serve.apis.openai import API as OPENAI
from splitnet.serve.apis.openai_requests import ChatRequest, TokenIds
from splitnet.serve.apis.strict import Strict
from splitnet.serve.chat import prompt_of
from splitnet.serve.gate import ParsingRoute, validated
from splitnet.serve.gateway import Gateway
from splitnet.version import __version__


class Tokenize(Strict):
    """A text by vLLM's name (`prompt`) or llama.cpp's (`content`), or a chat; without `model`, of the first one."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[Any] | None, Field(max_length=2**14)] = None
    tools: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> Tokenize:
        if sum(each is not None for each in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("give one of prompt, content and messages")
        return self


class Detokenize(Strict):
    model: str | None = None
    tokens: TokenIds | Annotated[list[int], Field(max_length=0)]


def router(gateway: Gateway) -> APIRouter:
    """The paths of the API."""
    paths = APIRouter(route_class=ParsingRoute)

    @paths.post("/tokenize")
    async def tokenize(body: Tokenize, request: Request) -> dict[str, Any]:
        """The tokens of a text or of a chat."""
        served = await gateway.find(body.model)
        prompts, size = served.prompts, len(await request.body())
        if body.messages is not None:
            names = "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"
            asked = {name: getattr(body, name) for name in names}
            chat = validated(ChatRequest, {"model": served.name, "messages": body.messages} | asked)
            tokens = await prompt_of(served, request, chat.chat)
        else:
            text = body.prompt if body.content is None else body.content
            adds = body.add_special_tokens is not False if body.content is None else bool(body.add_special)
            make = prompts.of_text if adds and text else prompts.ids
            tokens = await served.preparing.run(size, make, text or "")
        if body.content is not None:
            pieces = [{"id": token, "piece": prompts.text_of(token)} for token in tokens] if body.with_pieces else None
            return {"tokens": pieces or tokens}
        told: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": prompts.max_positions}
        return told | ({"token_strs": [*map(prompts.text_of, tokens)]} if body.return_token_strs else {})

    @paths.post("/apply-template")
    async def apply_template(body: ChatRequest, request: Request) -> dict[str, str]:
        """The text that the model reads of a chat."""
        served = await gateway.find(body.model)
        prompt = await prompt_of(served, request, body.chat)
        return {"prompt": await served.preparing.run(len(prompt), served.prompts.decode_all, prompt)}

    @paths.post("/v1/chat/completions/input_tokens")
    async def count(body: ChatRequest, request: Request) -> dict[str, Any]:
        """How many tokens the model reads of a chat."""
        served = await gateway.find(body.model)
        prompt = await prompt_of(served, request, body.chat)
        return {"object": "response.input_tokens", "input_tokens": len(prompt)}

    @paths.post("/detokenize")
    async def detokenize(body: Detokenize, request: Request) -> dict[str, str]:
        """The text of tokens."""
        served = await gateway.find(body.model)
        served.prompts.check_known(body.tokens, "tokens")
        text = await served.preparing.run(len(await request.body()), served.prompts.decode_all, body.tokens)
        return {"prompt": text, "content": text}

    @paths.get("/props")
    def props() -> dict[str, Any]:
        """Facts on the first model, as far as there are such."""
        served = gateway.served
        positions = served.prompts.max_positions
        return {
            "model_alias": served.name,
            "total_slots": served.admission.at_a_time,
            "default_generation_settings": {"n_ctx": positions},
            "chat_template": served.prompts.template,
            "build_info": f"splitnet {__version__}",
        }

    @paths.get("/version")
    def version() -> dict[str, str]:
        """That of the server."""
        return {"version": __version__}

    return paths


API = replace(OPENAI, paths=("/tokenize", "/detokenize", "/apply-template", "/props"), router=router)
