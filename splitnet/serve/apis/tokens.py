"""Further paths of llama.cpp's server and vLLM: tokens of texts, texts of tokens, infill, and facts about the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from splitnet.serve.apis.openai import API as OPENAI
from splitnet.serve.apis.openai import InfillWriter, answer_completions
from splitnet.serve.apis.openai_requests import ChatRequest, InfillRequest, TokenIds
from splitnet.serve.apis.strict import Strict
from splitnet.serve.chat import prompt_of
from splitnet.serve.gateway import Gateway
from splitnet.serve.request_gate import ParsingRoute, validated
from splitnet.version import __version__


class Tokenize(Strict):
    """The body of `/tokenize`: a text, named `prompt` by vLLM and `content` by llama.cpp, or a chat."""

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
        if self.messages is not None and (self.add_special_tokens or self.add_special):
            raise ValueError("add_special_tokens is for texts: leave it out, as a chat template adds special tokens")
        return self


class Detokenize(Strict):
    model: str | None = None
    tokens: TokenIds | Annotated[list[int], Field(max_length=0)]


def router(gateway: Gateway) -> APIRouter:
    """The paths of the API."""
    paths = APIRouter(route_class=ParsingRoute)

    @paths.post("/tokenize")
    async def tokenize(body: Tokenize, request: Request) -> dict[str, Any]:
        """Gives the tokens of a text or of a chat."""
        served = await gateway.find_model(body.model)
        prompts = served.prompts
        if body.messages is not None:
            names = "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"
            asked = {name: getattr(body, name) for name in names}
            document = {"model": served.name, "messages": body.messages} | asked
            chat = await served.prepare(request, lambda: validated(ChatRequest, document).chat)
            tokens = (await prompt_of(served, request, chat)).tokens
        else:
            text = body.prompt if body.content is None else body.content
            adds = body.add_special_tokens is not False if body.content is None else bool(body.add_special)
            make = prompts.tokens_of_text if adds and text else prompts.checked_ids
            tokens = await served.prepare(request, lambda: make(text or ""))
        shown = body.return_token_strs if body.content is None else body.with_pieces
        texts = await served.prepare(request, lambda: [*map(prompts.text_of, tokens if shown else ())])
        if body.content is not None:
            pieces = [{"id": token, "piece": text} for token, text in zip(tokens, texts, strict=False)]
            return {"tokens": pieces or tokens}
        told: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": prompts.max_positions}
        return told | ({"token_strs": texts} if shown else {})

    @paths.post("/apply-template")
    async def apply_template(body: ChatRequest, request: Request) -> dict[str, str]:
        """Gives the text of a chat's prompt."""
        served = await gateway.find_model(body.model)
        prompt = await prompt_of(served, request, await served.prepare(request, lambda: body.chat))
        return {"prompt": await served.prepare(request, lambda: served.prompts.decode_all(prompt.tokens))}

    @paths.post("/v1/chat/completions/input_tokens")
    async def count(body: ChatRequest, request: Request) -> dict[str, Any]:
        """Counts the tokens of a chat's prompt."""
        served = await gateway.find_model(body.model)
        prompt = await prompt_of(served, request, await served.prepare(request, lambda: body.chat))
        return {"object": "response.input_tokens", "input_tokens": len(prompt.tokens)}

    @paths.post("/infill", response_model=None)
    async def infill(body: InfillRequest, request: Request) -> Response:
        """Generates the text between a prefix and a suffix."""
        files = [(file.filename, file.text) for file in body.input_extra]
        max_tokens = None if body.n_predict < 0 else body.n_predict
        return await answer_completions(gateway, body, request, InfillWriter, max_tokens, (body.input_suffix, files))

    @paths.post("/detokenize")
    async def detokenize(body: Detokenize, request: Request) -> dict[str, str]:
        """Gives the text of tokens."""
        served = await gateway.find_model(body.model)
        text = await served.prepare(request, lambda: served.prompts.text_of_ids(body.tokens))
        return {"prompt": text, "content": text}

    @paths.get("/props")
    def props() -> dict[str, Any]:
        """Gives facts about the first model."""
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
        """Gives the version of splitnet."""
        return {"version": __version__}

    return paths


API = replace(OPENAI, paths=("/tokenize", "/detokenize", "/apply-template", "/infill", "/props"), router=router)
