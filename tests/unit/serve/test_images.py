"""Images in all protocols, sent by the official clients to a gateway whose model has no peers."""

from __future__ import annotations

import base64
import copy
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
import torch
from transformers import CLIPImageProcessor, LlavaProcessor

from splitnet.serve.answers.grammars import Grammars
from splitnet.serve.prompts import Prompts
from tests.images import hostile_images, of_one_colour
from tests.unit.serve.clients import POSITIONS
from tests.unit.serve.fake_model import VOCABULARY, FakeModel
from tests.unit.serve.serving import MODEL, Server, listening

RED, BLUE = of_one_colour("red"), of_one_colour("blue", (60, 30))
COLOURS = {1.9: "red", -1.7: "blue"}  # by the normalized value of the red channel
OF_TEXT = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{{ '\n' }}"
    "{% endfor %}assistant:"
)
OF_PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{{ '\n' }}{% endfor %}assistant:"
)


class SeeingModel(FakeModel):
    """Records the prompt and the images of each call."""

    sees_images = True

    def __init__(self) -> None:
        super().__init__(POSITIONS)
        self.asked: list[tuple[list[int], torch.Tensor | None, int]] = []

    def generate(self, input_ids: torch.Tensor, cache: Any, *given: Any, **others: Any) -> torch.Tensor:
        self.asked.append((input_ids[0].tolist(), others.pop("pixel_values", None), cache.remote.columns))
        return super().generate(input_ids, cache, *given, **others)


class Seeing:
    """A gateway of a model that sees images."""

    def __init__(self, tokenizer: Any, grammars: Grammars, template: str = OF_TEXT) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        sides: Any = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
        image_processor = CLIPImageProcessor(**sides)
        processor = LlavaProcessor(image_processor, self.tokenizer, patch_size=14, num_additional_image_tokens=0)
        processor.chat_template = template
        self.model = SeeingModel()
        prompts = Prompts(self.tokenizer, VOCABULARY, POSITIONS, processor)
        self.server = Server(self.model, self.tokenizer, grammars=grammars, positions=POSITIONS, prompts=prompts)

    @property
    def last(self) -> tuple[str, list[str]]:
        """The text of the last prompt, with one `<image>` for each image, and the colours of the images."""
        tokens, pixels, held = self.model.asked[-1]
        assert held == 0, "a prompt with images gets a new session"
        text = self.tokenizer.decode(tokens).replace("<image>" * 4, "<image>")
        colours = [] if pixels is None else [float(image[0].mean()) for image in pixels]
        return text, [COLOURS[min(COLOURS, key=lambda value: abs(value - colour))] for colour in colours]


@pytest.fixture
def seeing(shared_tokenizer: Any, grammars: Grammars) -> Iterator[Seeing]:
    made = Seeing(shared_tokenizer, grammars)
    yield made
    made.server.generations.close()


@pytest.fixture
def seen_at(seeing: Seeing) -> Iterator[str]:
    with listening(seeing.server.app) as url:
        yield url


def data_url(data: str) -> str:
    return f"data:image/png;base64,{data}"


def image_url(url: str) -> Any:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def part(data: str) -> Any:
    return image_url(data_url(data))


def text(said: str) -> Any:
    return {"type": "text", "text": said}


def of_openai(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)


def test_openai_chats(seen_at: str, seeing: Seeing) -> None:
    said: list[Any] = [
        {"role": "user", "content": [text("Left "), part(RED), text(" or <image> "), part(BLUE), text("?")]},
        {"role": "assistant", "content": "Both"},
        {"role": "user", "content": [part(RED)]},
    ]
    options: Any = {"model": MODEL, "temperature": 0, "max_tokens": 4}
    client = of_openai(seen_at)
    reply = client.chat.completions.create(messages=said, **options)
    shown = "user: Left <image> or <image> <image>?\nassistant: Both\nuser: <image>\nassistant:"
    assert seeing.last == (shown, ["red", "blue", "red"])
    tokens = seeing.model.asked[-1][0]
    assert tokens.count(seeing.tokenizer.convert_tokens_to_ids("<image>")) == 3 * 4, "the user's <image> stays text"
    assert reply.usage is not None and reply.usage.prompt_tokens == len(tokens)
    streamed = client.chat.completions.create(messages=said, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == reply.choices[0].message.content
    assert reply.usage.prompt_tokens_details is None or not reply.usage.prompt_tokens_details.cached_tokens
    counted = httpx.post(f"{seen_at}/v1/chat/completions/input_tokens", json={"messages": said}).json()
    assert counted["input_tokens"] == len(tokens)
    assert len(seeing.server.generations.kept) == 0
    client.chat.completions.create(messages=[{"role": "user", "content": "Bees"}], **options)
    assert seeing.last == ("user: Bees\nassistant:", [])
    assert len(seeing.server.generations.kept) == 1, "text alone keeps its session"


def test_openai_responses(seen_at: str, seeing: Seeing) -> None:
    client = of_openai(seen_at)
    content: Any = [
        {"type": "input_text", "text": "What is this? "},
        {"type": "input_image", "image_url": data_url(BLUE), "detail": "low"},
    ]
    options: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 4}
    first = client.responses.create(input=[{"role": "user", "content": content}], instructions="Be brief.", **options)
    assert seeing.last == ("system: Be brief.\nuser: What is this? <image>\nassistant:", ["blue"])
    client.responses.create(input="And now?", previous_response_id=first.id, **options)
    shown = f"user: What is this? <image>\nassistant: {first.output_text}\nuser: And now?\nassistant:"
    assert seeing.last == (shown, ["blue"]), "a stored response keeps its images"


def test_anthropic_messages(seen_at: str, seeing: Seeing) -> None:
    client = anthropic.Anthropic(base_url=seen_at, api_key="k", max_retries=0)
    blue: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BLUE}}
    red = blue | {"source": blue["source"] | {"data": RED}, "cache_control": {"type": "ephemeral"}}
    said: list[Any] = [
        {"role": "user", "content": [text("a"), blue, text("b")]},
        {"role": "user", "content": [text("c"), red]},
    ]
    reply = client.messages.create(model=MODEL, max_tokens=4, messages=said)
    assert seeing.last == ("user: a<image>b\nc<image>\nassistant:", ["blue", "red"])
    assert reply.usage.input_tokens == len(seeing.model.asked[-1][0])
    assert client.messages.count_tokens(model=MODEL, messages=said).input_tokens == reply.usage.input_tokens
    call: Any = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    result: Any = {"type": "tool_result", "tool_use_id": "t", "content": [text("Seen:"), red], "is_error": True}
    seeing.server.generations.kept.clear()
    more: list[Any] = [{"role": "user", "content": "Look"}, {"role": "assistant", "content": [call]}]
    with pytest.raises(anthropic.BadRequestError, match="chat template shows no calls"):
        client.messages.create(model=MODEL, max_tokens=4, messages=[*more, {"role": "user", "content": [result]}])
    del more[1]
    client.messages.create(model=MODEL, max_tokens=4, messages=[*more, {"role": "user", "content": [result]}])
    assert seeing.last == ("user: Look\ntool: Error: Seen:<image>\nassistant:", ["red"])


def test_ollama(seen_at: str, seeing: Seeing) -> None:
    client = ollama.Client(host=seen_at)
    options = {"temperature": 0, "num_predict": 4}
    said = [{"role": "user", "content": "What?", "images": [RED, BLUE]}]
    reply = client.chat(MODEL, messages=said, options=options)
    assert seeing.last == ("user: <image><image>What?\nassistant:", ["red", "blue"])
    assert reply.prompt_eval_count == len(seeing.model.asked[-1][0])
    client.generate(MODEL, prompt="What?", images=[BLUE], options=options)
    assert seeing.last == ("user: <image>What?\nassistant:", ["blue"])
    assert "vision" in (client.show(MODEL).capabilities or [])
    with pytest.raises(ollama.ResponseError, match="raw is not supported with images: leave it out"):
        client.generate(MODEL, prompt="What?", images=[BLUE], raw=True, options=options)


def test_models_say_that_they_see(seen_at: str, url: str) -> None:
    (sees,) = httpx.get(f"{seen_at}/v1/models").json()["data"]
    assert sees["input_modalities"] == ["text", "image"]
    blind = httpx.get(f"{url}/v1/models", headers={"x-api-key": "sk-protocols"}).json()["data"]
    assert all("input_modalities" not in each for each in blind)


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages", "api/chat", "api/generate"])
def test_a_model_without_eyes_refuses_images(path: str, url: str) -> None:
    anthropics = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": RED}}
    body: dict[str, Any] = {
        "chat/completions": {"messages": [{"role": "user", "content": [part(RED)]}]},
        "responses": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(RED)}]}]},
        "messages": {"messages": [{"role": "user", "content": [anthropics]}], "max_tokens": 4},
        "api/chat": {"messages": [{"role": "user", "content": "a", "images": [RED]}]},
        "api/generate": {"prompt": "a", "images": [RED]},
    }[path]
    under = path if path.startswith("api") else f"v1/{path}"
    reply = httpx.post(f"{url}/{under}", json={"model": MODEL} | body, headers={"x-api-key": "sk-protocols"})
    assert reply.status_code == 400
    assert f"the model '{MODEL}' does not see images: send text alone" in reply.text


def test_what_cannot_be_seen_is_refused_by_name(seen_at: str) -> None:
    def refusal(*parts: Any, role: str = "user", **more: Any) -> tuple[int, str]:
        body = {"messages": [{"role": role, "content": [*parts]}], "max_tokens": 2} | more
        reply = httpx.post(f"{seen_at}/v1/chat/completions", json=body)
        return reply.status_code, reply.json()["error"]["message"]

    fetched = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    assert refusal(fetched) == (
        400,
        "images are not fetched from 'example.org': send a data URL such as data:image/png;base64,..., or start the "
        "server with --image-hosts",
    )
    for url in ("data:image/svg+xml;base64,AAAA", "file:///etc/passwd", "", "data:image/png,AAAA"):
        status, told = refusal({"type": "image_url", "image_url": {"url": url}})
        assert status == 400 and told.startswith("images are data URLs: send")
    assert "a message of the system has an image: send it" in refusal(part(RED), role="system")[1]
    assert "17 images are too many" in refusal(*[part(RED)] * 17)[1]
    others: list[dict[str, Any]] = [{"n": 2}, {"prompt_logprobs": 1}, {"truncate_prompt_tokens": 5}]
    for more in others:
        assert refusal(part(RED), **more) == (400, f"{next(iter(more))} is not supported with images: leave it out")
    assert "more than the model's context of 1024" in refusal(part(RED), max_tokens=1020)[1]
    for name, (data, says) in hostile_images().items():
        status, told = refusal(text("a"), part(RED), part(data))
        assert status == 400 and told.startswith(f"image 2 cannot be used: {says}"), (name, told)


def test_images_of_listed_hosts_go_to_the_model(seeing: Seeing, tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(base64.b64decode(BLUE))
    (tmp_path / "page.html").write_text("<!doctype html>")
    files = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    host = f"127.0.0.1:{files.server_port}"
    url = f"http://{host}/blue.png"
    block = {"type": "image", "source": {"type": "url", "url": url}}
    bodies: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": [{"role": "user", "content": [part(RED), image_url(url), part(RED)]}]},
        "messages": {"model": MODEL, "messages": [{"role": "user", "content": [block]}], "max_tokens": 1},
        "responses": {
            "model": MODEL,
            "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}],
        },
    }

    async def asks(server: Server) -> None:
        (served,) = server.app.state.gateway.loaded
        served.image_hosts._hosts = [host]
        for path, body in bodies.items():
            reply = await server.http.post(f"/v1/{path}", json=body)
            assert reply.status_code == 200, reply.text
            assert seeing.last[1] == (["red", "blue", "red"] if path == "chat/completions" else ["blue"])
            assert served.pixels.used == 0, "an answered request holds nothing"
        wrong = {"messages": [{"role": "user", "content": [image_url(f"http://{host}/page.html")]}]}
        reply = await server.http.post("/v1/chat/completions", json=wrong)
        assert reply.status_code == 400 and "image 1 cannot be used: it is not a PNG, JPEG" in reply.text
        many = {"messages": [{"role": "user", "content": [image_url(url)] * 17}]}
        reply = await server.http.post("/v1/chat/completions", json=many)
        assert reply.status_code == 400 and "17 images are too many" in reply.text

    serving = threading.Thread(target=files.serve_forever)
    serving.start()
    try:
        seeing.server.run(asks)
    finally:
        files.shutdown()
        files.server_close()
        serving.join()


def test_images_that_need_too_much_memory_wait(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    async def asks(server: Server) -> None:
        body = {"messages": [{"role": "user", "content": [part(RED)]}], "max_tokens": 1}
        (served,) = server.app.state.gateway.loaded
        assert (await server.http.post("/v1/chat/completions", json=body)).status_code == 200
        assert served.pixels.used == 0, "an answered request holds nothing"
        monkeypatch.setattr(served.pixels, "limit", 3 * 28 * 28 * 4 - 1)
        reply = await server.http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 429 and "no memory left for these images" in reply.text

    seeing.server.run(asks)


def test_templates_that_read_parts_alone_get_parts(shared_tokenizer: Any, grammars: Grammars) -> None:
    seeing = Seeing(shared_tokenizer, grammars, OF_PARTS)
    try:
        seeing.server.run(lambda server: server.chat("Bees", "fly", "far", max_tokens=1))
        assert seeing.last == ("user: Bees\nassistant: fly\nuser: far\nassistant:", [])
    finally:
        seeing.server.generations.close()


def test_a_template_that_leaves_out_images_is_an_error(shared_tokenizer: Any, grammars: Grammars) -> None:
    seeing = Seeing(shared_tokenizer, grammars, OF_TEXT.replace("<image>", ""))

    async def asks(server: Server) -> Any:
        body = {"messages": [{"role": "user", "content": [part(RED)]}]}
        return await server.http.post("/v1/chat/completions", json=body)

    try:
        reply = seeing.server.run(asks)
        assert reply.status_code == 400 and "the model's processor refuses these images" in reply.text
    finally:
        seeing.server.generations.close()
