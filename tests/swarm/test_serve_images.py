"""Images through the gateway and the command line on a small swarm: answers are those of transformers' whole model."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.connection import ModelConnection
from splitnet.cli.text_generator import SamplingOptions, TextGenerator
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import ModelNotFound, SplitnetError, UnsupportedModel
from splitnet.images import read_images
from splitnet.serve.gateway import Gateway
from splitnet.serve.request_gate import ApiKeys
from splitnet.serve.responses import ServedModel
from splitnet.serve.server import ModelSpec, ServeOptions, _ModelLoader, make_app
from splitnet.serve.session_cache import KeepLimits
from splitnet.session.options import GENERATING, JOINING, ConnectionOptions
from tests.image_models import GGUF_IMAGE_MODELS, IMAGE, IMAGE_MODELS, vocabulary
from tests.images import of_one_colour
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.unit.gguf_writing import write_gguf, write_mmproj

pytestmark = pytest.mark.swarm

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}|"
    "{% endfor %}assistant:"
)
RED, BLUE = of_one_colour("red", (40, 30)), of_one_colour("blue")
OPTIONS = ServeOptions("127.0.0.1", 0, None, 2, 2, KeepLimits(4, 4096, 60.0), 1.0)


def write_processor(folder: Path) -> None:
    """Writes a tokenizer of single characters and a processor of images beside a small LLaVA."""
    characters = {chr(32 + number): number + 3 for number in range(95)}
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **characters}
    vocabulary |= {f"<unused{number}>": number for number in range(len(vocabulary), IMAGE)}
    one = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    one.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    one.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=one, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    sides: Any = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}}
    processor = LlavaProcessor(CLIPImageProcessor(**sides), tokenizer, patch_size=4, num_additional_image_tokens=0)
    processor.chat_template = TEMPLATE
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small LLaVA in transformers; `folder` is that of its checkpoint."""
    folder = tmp_path_factory.mktemp("llava") / "published"
    local = IMAGE_MODELS["llava"].write(folder).eval()
    write_processor(folder)
    local.folder = folder
    return local


@pytest.fixture(scope="module")
def swarm(whole: Any, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(whole.folder, [(0, 2), (2, 6)], node=node, dtype="float32") as swarm:
        yield swarm


@contextmanager
def loaded(swarm: LocalSwarm, warned: list[str]) -> Iterator[ServedModel]:
    """The model as `splitnet serve` loads it."""
    checkpoint = Checkpoint.open(swarm.folder)
    options = ConnectionOptions.of({"codec": "none", "dtype": "float32"})
    spec = ModelSpec(["small"], checkpoint, checkpoint.tokenizer(), lambda _: swarm.connect(), options)
    loader = _ModelLoader(OPTIONS, 0, warned.append)
    served = loader.load_model(spec)
    try:
        yield served
    finally:
        loader.close()
        served.close()


def answer_of(whole: Any, text: str, images: list[str], tokens: int) -> tuple[int, str]:
    """The length of a prompt, and the answer of the whole model."""
    processor: Any = AutoProcessor.from_pretrained(whole.folder)
    inputs = processor(text=text, images=read_images(images) or None, return_tensors="pt", add_special_tokens=False)
    output = whole.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return length, processor.tokenizer.decode(output[0, length:], skip_special_tokens=True)


def part(data: str) -> Any:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_the_gateway_answers_about_images_as_transformers(whole: Any, swarm: LocalSwarm) -> None:
    red_bee = ([part(RED), {"type": "text", "text": "A bee?"}], "<image>A bee?", [RED])

    async def asks(served: ServedModel) -> None:
        transport = httpx.ASGITransport(make_app(Gateway(served), ApiKeys({})))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            for content, text, images in (
                red_bee,
                ([part(BLUE), {"type": "text", "text": "A bee?"}], "<image>A bee?", [BLUE]),
                ([part(BLUE), {"type": "text", "text": " and "}, part(RED)], "<image> and <image>", [BLUE, RED]),
                ("A bee?", "A bee?", []),
                red_bee,
            ):
                body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
                reply = (await http.post("/v1/chat/completions", json=body)).json()
                length, expected = answer_of(whole, f"user: {text}|assistant:", images, 12)
                assert reply["choices"][0]["message"]["content"] == expected
                assert reply["usage"]["prompt_tokens"] == length

    with loaded(swarm, warned := []) as served:
        asyncio.run(asks(served))
    assert not warned


def test_a_checkpoint_without_a_processor_serves_its_text(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(store: Any) -> Any:
        raise ModelNotFound("it has no processor")

    monkeypatch.setattr("splitnet.checkpoint.safetensors.SafetensorsStore.processor", missing)
    with loaded(swarm, warned := []) as served:
        assert not served.sees_images
    assert warned == ["small is served without images: it has no processor"]


def test_the_command_line_answers_about_images(
    whole: Any, swarm: LocalSwarm, demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ConnectionOptions.of(
        {"initial_peers": swarm.addresses, "codec": "none", "dtype": "float32"}, (*JOINING, *GENERATING)
    )
    with pytest.raises(UnsupportedModel, match="models of the family 'llama' read no images"):
        TextGenerator.connect(ModelConnection(str(demo_checkpoint), options), sees_images=True)
    client = TextGenerator.connect(ModelConnection(str(whole.folder), options), sees_images=True)
    greedy = SamplingOptions(8, 0.0, 1.0, None)
    with closing(client.model), client.model.session():
        prompt = client.encode_prompt("A bee?", chat=None, system="Brief.", images=[BLUE])
        answer = client.print_answer(prompt, greedy)
        _, expected = answer_of(whole, "system: Brief.|user: <image>A bee?|assistant:", [BLUE], 8)
        assert answer.text == expected and expected.strip() in capsys.readouterr().out
        said = [("system", "Brief."), ("user", "A bee?"), ("assistant", answer.text), ("user", "Why?")]
        messages = [{"role": role, "content": text} for role, text in said]
        again = client.print_answer(client.encode_chat(messages, [BLUE]), greedy)
        with pytest.raises(SplitnetError, match="images need the chat template of the model: leave out --raw"):
            client.encode_prompt("A bee?", chat=False, images=[BLUE])
    text = f"system: Brief.|user: <image>A bee?|assistant: {answer.text}|user: Why?|assistant:"
    assert again.text == answer_of(whole, text, [BLUE], 8)[1]


GGUF_TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{% endfor %}"
)


def test_a_gguf_file_with_its_mmproj_answers_about_images(node: DhtDirectory, tmp_path: Path) -> None:
    local = GGUF_IMAGE_MODELS["qwen3_vl"].write(tmp_path / "published")
    (folder := tmp_path / "gguf").mkdir()
    names = vocabulary("qwen3_vl")
    write_gguf(tmp_path / "published", folder / "model.gguf", tokens=names, template=GGUF_TEMPLATE)
    sizes: dict[str, Any] = {"vision__image_min_pixels": 64, "vision__image_max_pixels": 1024}
    tower = write_mmproj(tmp_path / "published", folder / "mmproj.gguf", **sizes)
    options = {"codec": "none", "dtype": "float32"}
    with local_swarm(folder, [(0, 2), (2, 6)], node=node, dtype="float32") as swarm:
        joining = ConnectionOptions.of({"initial_peers": swarm.addresses, **options}, (*JOINING, *GENERATING))
        client = TextGenerator.connect(ModelConnection(str(folder), joining), sees_images=True)
        with closing(client.model):
            prompt = client.encode_prompt("ab", chat=None, images=[BLUE, RED])
            assert [prompt.tokens.count(IMAGE)] == [prompt.pixels["image_grid_thw"].prod(dim=1).sum() // 4]
            answer = client.print_answer(prompt, SamplingOptions(8, 0.0, 1.0, None))
        ids = torch.tensor([prompt.tokens])
        output = local.generate(ids, **prompt.pixels, max_new_tokens=8, do_sample=False)
        assert answer.text == client.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        with loaded(swarm, warned := []) as served:
            assert served.sees_images and not warned
        tower.unlink()
        with loaded(swarm, warned) as served:
            assert not served.sees_images and not warned
        shutil.copy(folder / "model.gguf", tower)
        with loaded(swarm, warned) as served:
            assert not served.sees_images and "mmproj.gguf holds a projector None" in warned[0]
