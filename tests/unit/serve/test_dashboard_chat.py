"""The chat of the dashboard in a browser, which gets prepared answers. Screenshots are kept in `test-output/`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from splitnet.serve.prompts import Prompts
from tests.browser import NEEDED, NewPage, chromium, pages, photograph
from tests.images import of_one_colour
from tests.unit.serve.fake_model import VOCABULARY, FakeModel
from tests.unit.serve.serving import MODEL, Server, listening

pytestmark = NEEDED

MARKDOWN = """# Bees

They **dance**, *hum* and ~~sleep~~ in `hives` of snake_case_names, 2 * 3 * 4 of them.
See [a page](https://example.org/a_(b)?x=1) or https://example.org/c.

1. first
   - inner
   - *more*
2. second

> quoted
> **twice**

| name | count |
|:-----|------:|
| `a\\|b`  | 12 |
| worker | 30 000 |

```python
def hum(times: int = 3) -> str:  # loudly
    return "bzz" * times
```

---
The end.
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser, tokenizer: Any) -> Iterator[NewPage]:
    """Opens the page of a server with one model."""
    server = Server(FakeModel(), tokenizer)
    with opened(browser, server) as visit:
        yield visit
    server.generations.close()


@contextmanager
def opened(browser: Browser, server: Server, models: int = 1) -> Iterator[NewPage]:
    """Opens the page of a server that offers so many models, once it is live; the server drains afterwards."""
    with listening(server.app) as url, pages(browser, url) as new:

        def opening(**options: Any) -> Page:
            page = new(**options)
            page.goto(url)
            expect(page.locator("#connection")).to_have_text("live")
            expect(page.locator("#model-choice option")).to_have_count(models)
            return page

        yield opening
        server.generations.draining = True


def ask(page: Page, text: str) -> Locator:
    """Sends a message; the last answer."""
    expect(page.locator("#model-choice option")).not_to_have_count(0)  # until then the page sends no question
    page.fill("#question", text)
    page.keyboard.press("Enter")
    return page.locator(".answer").last


def ended(answer: Locator) -> Locator:
    expect(answer).not_to_have_class(re.compile("growing"))
    expect(answer.locator(".timing")).to_contain_text("tokens")
    return answer


def say(page: Page, *deltas: dict[str, Any], finish: str = "stop") -> list[Any]:
    """From now on answers are these; the requests for them."""
    asked: list[Any] = []
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    events = [{"id": "chatcmpl-said", "choices": [choice], "usage": None} for choice in choices]
    events.append({"id": "chatcmpl-said", "choices": [], "usage": {"completion_tokens": 7}})
    body = ": still at work\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(body=body, content_type="text/event-stream")

    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", answer)
    return asked


def listed(page: Page) -> list[Any]:
    """The bodies of requests for answers, as they are sent."""
    sent: list[Any] = []
    page.on("request", lambda each: sent.append(each.post_data_json) if "/v1/chat" in each.url else None)
    return sent


def said(request: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request["messages"]]


def drop(page: Page, kind: str, data: str, event: str = "drop") -> None:
    """Drops or pastes a file onto the form of the question."""
    of_file = """([kind, data, event]) => {
        const files = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
        files.items.add(new File([bytes], "file", { type: kind }));
        const options = { bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files };
        const made = event === "drop" ? new DragEvent("drop", options) : new ClipboardEvent("paste", options);
        document.getElementById("chat-form").dispatchEvent(made);
    }"""
    page.evaluate(of_file, [kind, data, event])


def test_dropped_and_pasted_images_are_sent(browser: Browser, tokenizer: Any) -> None:
    sees: Any = SimpleNamespace(chat_template="")
    server = Server(FakeModel(), tokenizer, prompts=Prompts(tokenizer, VOCABULARY, 256, sees))
    with opened(browser, server) as visit:
        page = visit()
        expect(page.locator("#question")).to_have_attribute("placeholder", "Ask the swarm; paste or drop images")
        sent = say(page, {"content": "A bee"})
        waiting = page.locator("#images img")
        red, blue = of_one_colour("red"), of_one_colour("blue")
        drop(page, "image/png", red)
        expect(waiting).to_have_count(1)
        drop(page, "text/html", red)
        drop(page, "image/png", blue, "paste")
        drop(page, "image/png", red, "paste")
        expect(waiting).to_have_count(3)
        page.locator("#images").get_by_role("button", name="Remove image").first.click()
        photograph(page, "chat-images")
        ended(ask(page, "What is this?"))
        expect(waiting).to_have_count(0)
        expect(page.locator(".asked img")).to_have_count(2)
        images = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in (blue, red)]
        asked = {"role": "user", "content": [*images, {"type": "text", "text": "What is this?"}]}
        assert sent[-1]["messages"] == [asked]
        ended(ask(page, "Why?"))
        assert sent[-1]["messages"][0] == asked and sent[-1]["messages"][2]["content"] == "Why?"
        drop(page, "image/png", blue)
        expect(waiting).to_have_count(1)
        page.click("#send")
        ended(page.locator(".answer").nth(2))
        assert sent[-1]["messages"][-1]["content"] == images[:1], "without a text"
        page.reload()
        expect(page.locator(".asked .text").first).to_have_text("What is this? (images were here)")
    server.generations.close()


def test_a_model_without_eyes_is_offered_no_images(visit: NewPage) -> None:
    page = visit()
    expect(page.locator("#question")).to_have_attribute("placeholder", "Ask the swarm")
    drop(page, "image/png", of_one_colour("red"))
    sent = say(page, {"content": "A bee"})
    ended(ask(page, "What is this?"))
    assert said(sent[-1]) == [("user", "What is this?")]
    expect(page.locator("img.thumbnail")).to_have_count(0)


def test_a_question_is_changed_and_an_answer_made_anew(visit: NewPage) -> None:
    page = visit()
    sent = say(page, {"role": "assistant", "content": ""}, {"content": "one"})
    for text in ("first", "second", "third"):
        ended(ask(page, text))
    asked = page.locator(".asked").nth(1)
    asked.get_by_role("button", name="Edit your message").click()
    field = asked.get_by_label("Your message")
    expect(field).to_be_focused()
    expect(field).to_have_value("second")
    page.keyboard.press("Escape")
    expect(asked.locator(".text")).to_have_text("second")
    expect(asked.get_by_role("button", name="Edit")).to_be_focused()
    page.keyboard.press("Enter")
    field.fill("other")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line")
    page.keyboard.press("Enter")
    expect(page.locator(".message")).to_have_count(4)
    ended(page.locator(".answer").last)
    expected = [("user", "first"), ("assistant", "one"), ("user", "other\nline")]
    assert said(sent[-1]) == expected
    say(page, {"content": "two"})
    page.get_by_role("button", name="Again").last.click()
    expect(page.locator(".answer .text").last).to_have_text("two")
    expect(page.locator(".message")).to_have_count(4)


def test_the_chat_stays_when_the_page_is_loaded_again(visit: NewPage) -> None:
    page = visit()
    sent = say(page, {"reasoning_content": "Hm."}, {"content": "**one**"})
    ended(ask(page, "first"))
    page.reload()
    expect(page.locator(".asked .text")).to_have_text("first")
    expect(page.locator(".answer strong")).to_have_text("one")
    expect(page.locator(".answer .timing")).to_contain_text("7 tokens")
    expect(page.locator("#model-choice option")).to_have_count(1)
    ended(ask(page, "second"))
    assert said(sent[-1]) == [("user", "first"), ("assistant", "**one**"), ("user", "second")]
    page.click("#new-chat")
    page.reload()
    expect(page.locator(".empty")).to_be_visible()
    assert page.evaluate("localStorage.getItem('chat')") is None


def test_markdown_is_shown_and_copied(visit: NewPage) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    say(page, *({"content": MARKDOWN[start : start + 7]} for start in range(0, len(MARKDOWN), 7)))
    answer = ended(ask(page, "bees?"))
    text = answer.locator(".text")
    expect(text.locator("h3")).to_have_text("Bees")
    paragraph = text.locator("> p").first
    assert [paragraph.locator(tag).inner_text() for tag in ("strong", "em", "del", "code")] == [
        "dance",
        "hum",
        "sleep",
        "hives",
    ]
    expect(paragraph).to_contain_text("of snake_case_names, 2 * 3 * 4 of them.\nSee a page or https://example.org/c.")
    links = [(link.get_attribute("href"), link.get_attribute("rel")) for link in text.locator("a").all()]
    assert links == [
        ("https://example.org/a_(b)?x=1", "noopener noreferrer"),
        ("https://example.org/c", "noopener noreferrer"),
    ]
    expect(text.locator("ol > li")).to_have_count(2)
    expect(text.locator("ol > li:first-child > ul > li")).to_have_text(["inner", "more"])
    expect(text.locator("blockquote")).to_have_text("quoted\ntwice")
    assert text.locator("th").all_inner_texts() == ["name", "count"]
    expect(text.locator("td")).to_have_text(["a|b", "12", "worker", "30 000"])
    expect(text.locator("td.number").first).to_have_css("text-align", "right")
    expect(text.locator("hr")).to_have_count(1)
    expect(text.locator(".code-head")).to_contain_text("python")
    expect(text.locator(".code-keyword")).to_have_text(["def", "int", "return"])
    expect(text.locator(".code-string")).to_have_text('"bzz"')
    expect(text.locator(".code-comment")).to_have_text("# loudly")
    expect(text.locator(".code-number")).to_have_text("3")
    page.get_by_role("button", name="Copy the code").click()
    expect(text.locator(".code-head button")).to_have_text("Copied")
    code = MARKDOWN.split("```")[1].removeprefix("python\n").removesuffix("\n")
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.get_by_role("button", name="Copy the answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN
    photograph(page, "chat-markdown")
    page.get_by_role("button", name="Full page").click()
    photograph(page, "chat-wide")
    # Without a clipboard, as over plain HTTP from another machine.
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.get_by_role("button", name="Copy the code").click()
    expect(text.locator(".code-head button")).to_have_text("Copied")
    page.fill("#question", "")
    page.keyboard.press("Control+V")
    expect(page.locator("#question")).to_have_value(code)


def test_reasoning_is_folded_away_and_calls_are_shown(visit: NewPage) -> None:
    page = visit()
    calls = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":'}},
        {"index": 0, "function": {"arguments": ' "Paris"}'}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "time", "arguments": "{half"}},
    ]
    reasoning = [{"reasoning_content": "They", "reasoning": "They"}, {"reasoning_content": " hum.", "reasoning": ""}]
    sent = say(page, *reasoning, {"content": "So."}, *({"tool_calls": [call]} for call in calls), finish="length")
    answer = ended(ask(page, "bees?"))
    expect(answer.locator("summary")).to_have_text("Reasoning")
    expect(answer.locator(".reasoning p")).to_be_hidden()
    answer.locator("summary").click()
    expect(answer.locator(".reasoning p")).to_have_text("They hum.")
    expect(answer.locator(".text")).to_have_text("So.")
    expect(answer.locator(".call p")).to_have_text(["Calls weather", "Calls time"])
    expect(answer.locator(".call pre")).to_have_text(['{\n  "city": "Paris"\n}', "{half"])
    expect(answer.locator(".note")).to_have_text("cut off: there is no room for more tokens")
    photograph(page, "chat-reasoning")
    ended(ask(page, "more"))
    expect(page.locator(".message")).to_have_count(4)
    assert said(sent[-1]) == [("user", "bees?"), ("assistant", "So."), ("user", "more")]


def test_errors_are_told_and_the_question_is_asked_again(visit: NewPage) -> None:
    page = visit()
    error = {"error": {"message": "blocks 2..5 are served by nobody"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {json.dumps(error)}\n\n"))
    answer = ask(page, "bees?")
    expect(answer.locator(".problem")).to_have_text("blocks 2..5 are served by nobody")
    sent = say(page, {"content": "one"})
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".answer .text")).to_have_text("one")
    assert said(sent[0]) == [("user", "bees?")]


EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
HOSTILE = f"""{EVIL}

# {EVIL}

- {EVIL}
> {EVIL}

[click](javascript:document.title='owned') [click](JaVaScRiPt:alert(1)) [data](data:text/html,x) <javascript:alert(1)>
[tab](java\tscript:alert(1)) ![image](https://evil.example/track.png) [relative](/v1/models) [file](file:///etc/passwd)
[quoted](https://evil.example/"onmouseover="alert(1)) [**b**](vbscript:x)

| {EVIL} | b |
|---|---|
| [x](javascript:alert(1)) | {EVIL} |

```html" onclick="alert(1)
{EVIL}
"""


def test_hostile_markdown_does_nothing(visit: NewPage) -> None:
    page = visit()
    opened: list[Page] = []
    page.on("popup", lambda popup: opened.append(popup))
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": MODEL}, {"id": EVIL}]}))
    page.reload()
    choice = page.get_by_label("Model", exact=True)
    expect(choice.locator("option")).to_have_text([MODEL, EVIL])
    choice.select_option(EVIL)
    call = {"index": 0, "function": {"name": EVIL, "arguments": json.dumps({"city": EVIL})}}
    say(page, {"reasoning_content": EVIL}, {"content": HOSTILE}, {"tool_calls": [call]})
    answer = ended(ask(page, EVIL))
    expect(page.locator(".asked .text")).to_have_text(EVIL)
    expect(answer.locator(".timing")).to_contain_text(EVIL)
    expect(answer.locator("h3")).to_have_text(EVIL)
    expect(answer.locator("th").first).to_have_text(EVIL)
    expect(answer.locator(".call code")).to_have_text(EVIL)
    expect(answer.locator(".code-block code")).to_contain_text(EVIL)
    assert page.locator("main img, main script, main iframe, main [onclick], main [onerror]").count() == 0
    hrefs = [link.get_attribute("href") for link in answer.locator("a").all()]
    assert hrefs and all(href is not None and href.startswith("https://evil.example/") for href in hrefs)
    assert all(link.get_attribute("onmouseover") is None for link in answer.locator("a").all())
    assert "owned" not in page.title() and not opened


LONG = {
    "line": "a" * 10**6,
    "openers": "*a " * (10**6 // 3),
    "runs": "**" * 10**5 + "x" + "`" * 10**5,
    "paragraphs": "\n\n".join(["*a"] * 20_000),
    "quotes": "> " * 50_000 + "deep\n" + "- " * 50_000,
    "lists": "\n".join("  " * depth + "- x" for depth in range(400)),
    "table": "|" * 90_000 + "\n|" + "-|" * 5000 + "\n" + "|x\n" * 20_000,
    "links": "[" * 20_000 + "a](" * 6000 + "https://" * 2000,
    "code": '```js\n"' + '\\"' * 24_000 + "'" * 900,
    "parentheses": "[x](https://e.org/" + "(" * 19_000,
}


@pytest.mark.default_cases(name=("openers",))
@pytest.mark.parametrize("name", LONG)
def test_long_and_deep_texts_do_not_stop_the_page(visit: NewPage, name: str) -> None:
    page, text = visit(), LONG[name]
    size = len(text) // 4 + 1
    say(page, *({"content": text[start : start + size]} for start in range(0, len(text), size)))
    ended(ask(page, "bees?"))  # soon enough
    say(page, {"content": "*still here*"})
    expect(ask(page, "and now?").locator("em")).to_have_text("still here")


def test_a_keyboard_is_enough(visit: NewPage) -> None:
    page = visit()
    say(page, {"content": "```js\nlet a\n```"})
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    question = page.get_by_role("textbox", name="Your message")
    expect(question).to_be_focused()
    expect(question).to_have_accessible_description(
        "Enter sends, Shift with Enter begins a new line, Escape stops an answer."
    )
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator(".message")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name="Your message").locator(".text")).to_have_text("one\ntwo")
    ended(page.get_by_role("article", name=f"Answer of {MODEL}"))
    expect(question).to_have_value("")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    page.get_by_role("button", name="Full page").focus()
    expected = ["#messages", ".asked button", ".code-head button", ".code-block pre", ".actions button >> nth=0"]
    for place in [*expected, ".actions button >> nth=1", "#question", "#send"]:
        page.keyboard.press("Tab")
        expect(page.locator(place)).to_be_focused()
    page.keyboard.press("Enter")  # with nothing to send
    expect(page.locator(".message")).to_have_count(2)


@pytest.mark.full
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_the_chat(visit: NewPage, theme: str) -> None:
    page = visit(width=390, height=844, theme=theme)
    wide = f"{MARKDOWN}\n```sh\n{'echo x; ' * 40}# long\n```\n|{'wide cell|' * 20}\n|{'-|' * 20}\n{'unbroken' * 40}"
    say(page, {"reasoning_content": "Hm."}, {"content": wide})
    ended(ask(page, "What do bees do all day, and how do they know where the flowers are?"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    chat = page.locator(".chat")
    expect(chat).to_have_css("position", "static")
    chat.scroll_into_view_if_needed()
    photograph(page, f"chat-phone-within-{theme}")
    page.get_by_role("button", name="Full page").click()
    box = chat.bounding_box()
    assert box and box["width"] > 360 and box["height"] > 800
    photograph(page, f"chat-phone-{theme}")
    page.get_by_role("button", name="Edit").click()
    photograph(page, f"chat-phone-edit-{theme}")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Back to the swarm").click()
    expect(chat).to_have_css("position", "static")


def test_the_full_page_is_the_chat_alone(visit: NewPage) -> None:
    page = visit(width=1280, height=600)
    scrolls = (
        "document.documentElement.scrollHeight > innerHeight && getComputedStyle(document.documentElement).overflowY"
    )
    assert page.evaluate(scrolls) == "visible", "the page is longer than the window"
    page.get_by_role("button", name="Full page").click()
    assert page.locator(".chat").bounding_box() == {"x": 0, "y": 0, "width": 1280, "height": 600}
    assert page.evaluate(scrolls) == "hidden"
    expect(page.get_by_role("button", name="Full page")).to_have_count(0)
    expect(page.locator("#theme-button")).to_be_visible()
    page.locator("#theme-button").focus()
    expect(page.locator("#theme-button")).not_to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Full page")).to_be_visible()
    assert page.evaluate(scrolls) == "visible"


def test_settings_are_sent_and_kept_in_the_browser(visit: NewPage) -> None:
    page = visit()
    sent = say(page, {"content": "one"}, finish="length")
    ended(ask(page, "first"))
    assert (sent[0]["temperature"], "max_tokens" in sent[0]) == (0, False)
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.type("Be short.")
    page.keyboard.press("Tab")
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#temperature-told")).to_have_text("0.7")
    page.get_by_label("Longest answer").fill("20")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    expect(page.get_by_label("System prompt")).to_be_hidden()
    page.reload()
    expect(page.locator("#connection")).to_have_text("live")
    expect(page.get_by_role("button", name="Settings")).to_have_class(re.compile("changed"))
    answer = ended(ask(page, "second"))
    expect(answer.locator(".note")).to_have_text("cut off: the settings allow 20 tokens")
    assert (sent[1]["temperature"], sent[1]["max_tokens"]) == (0.7, 20)
    assert said(sent[1])[:2] == [("system", "Be short."), ("user", "first")]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("-3")
    ended(ask(page, "third"))
    assert "max_tokens" not in sent[2]
    page.get_by_role("button", name="Reset").click()
    expect(page.get_by_label("System prompt")).to_have_value("")
    ended(ask(page, "fourth"))
    assert sent[3]["temperature"] == 0 and said(sent[3])[0] == ("user", "first")


@pytest.mark.full
def test_settings_on_a_phone(visit: NewPage) -> None:
    page = visit(width=390, height=844, has_touch=True, is_mobile=True, theme="dark")
    page.get_by_role("button", name="Settings").tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    photograph(page, "chat-settings-phone")
    page.get_by_role("button", name="Done").tap()
    expect(page.get_by_label("System prompt")).to_be_hidden()


@pytest.mark.full
def test_settings_of_another_kind_are_left_alone(visit: NewPage) -> None:
    page = visit()
    page.evaluate("localStorage.setItem('chat-settings', '{')")
    page.reload()
    sent = say(page, {"content": "one"})
    ended(ask(page, "first"))
    assert sent[0]["temperature"] == 0


def test_code_without_a_language_has_no_empty_header(visit: NewPage) -> None:
    page = visit()
    say(page, {"content": "```\nhive\n```\n\n```js\nlet a\n```"})
    ended(ask(page, "bees?"))
    bare, named = (
        block.bounding_box()["height"] - block.locator("pre").bounding_box()["height"]  # pyright: ignore[reportOptionalSubscript]
        for block in page.locator(".code-block").all()
    )
    assert bare <= 2 < 10 < named
    expect(page.locator(".code-block").first.get_by_role("button", name="Copy the code")).to_be_visible()


def looked_at(visit: NewPage, spans: dict[str, tuple[int, int]], **options: Any) -> Page:
    """A page that is told of these peers, and of an answer that goes through them in turn."""
    peer = {"state": "here", "state_s": 1.0, "serves": True, "address": "192.0.2.7:31331", "moving_to": None}
    peer |= {
        "device": "cpu",
        "weights": "stored/float32 KV int8",
        "token_ms": 1.0,
        "token_joules": None,
        "queue_ms": 0.0,
    }
    peer |= {"sessions": 1, "kv_free": 5, "delay_ms": 0.5, "version": "0"}
    peers = [peer | {"key": key, "short": key[:9], "start": span[0], "end": span[1]} for key, span in spans.items()]
    link = {"codec": "int8", "bytes_per_token": 600, "delay_ms": 12.5, "via_client": False}
    hops = [{"peer": key, "start": span[0], "end": span[1]} for key, span in spans.items()]
    answer = {"id": "a", "ended": False, "began_s": 1.0, "first_token_s": 0.5, "tokens": 2, "tokens_per_s": 2.0}
    answer["routes"] = [{"hops": hops, "links": [link] * (len(hops) + 1)}]
    told = {
        "type": "snapshot",
        "at": 0.0,
        "version": "0",
        "model": MODEL,
        "num_blocks": 30,
        "problem": None,
        "holes": [],
    }
    told |= {"local_spans": [], "peers": peers, "requests": {"running": 1, "waiting": 0}, "tokens_per_s": 2.0}
    told |= {"history": [0.0, 2.0], "answers": [answer]}
    page = visit(**options)
    stream = f"data: {json.dumps(told)}\n\n"
    page.route("**/dashboard/events", lambda asked: asked.fulfill(body=stream, content_type="text/event-stream"))
    page.reload()
    expect(page.locator("#peers tr")).to_have_count(len(spans))
    return page


THREE = {"sn1xfgzqtaa": (0, 12), "sn1iq3okjbb": (12, 20), "sn1ah6rcdcc": (20, 30)}


def test_a_peer_has_the_colour_of_its_key_whoever_else_is_there(visit: NewPage) -> None:
    def colours(spans: dict[str, tuple[int, int]]) -> dict[str, set[str]]:
        page = looked_at(visit, spans)
        places = {"#map .span": ".span-name", "#routes .hop": "b", "#peers tr": "b"}
        seen: dict[str, set[str]] = {}
        for place, name in places.items():
            for node in page.locator(place).all():
                coloured = node.locator(".dot") if place == "#peers tr" else node
                hue = coloured.evaluate("each => getComputedStyle(each).getPropertyValue('--hue')")
                seen.setdefault(node.locator(name).first.inner_text(), set()).add(hue)
        return seen

    alone, together = colours({"sn1ah6rcdcc": (0, 30)}), colours(THREE)
    assert together["sn1ah6rcd"] == alone["sn1ah6rcd"]
    assert len(set.union(*together.values())) == 3 and all(len(hues) == 1 for hues in together.values())


@pytest.mark.default_cases(count=(3,))
@pytest.mark.parametrize("count", [3, 9])
def test_no_end_of_a_route_stands_alone(visit: NewPage, count: int) -> None:
    edges = [30 * index // count for index in range(count + 1)]
    spans = {f"sn1{chr(97 + index) * 8}": (edges[index], edges[index + 1]) for index in range(count)}
    page = looked_at(visit, spans, width=1280)
    first, *_, last = page.locator("#routes .stop").all()
    arrow = page.locator("#routes .link").last
    tops = [place.bounding_box()["y"] for place in (first, last, arrow)]  # pyright: ignore[reportOptionalSubscript]
    assert tops[1] == tops[2] and (count > 3 or tops[0] == tops[1])
    photograph(page, f"route-{count}")


def test_the_page_says_in_plain_words_how_weights_are_held(visit: NewPage) -> None:
    page = looked_at(visit, THREE)
    cell = page.locator("#peers td.wraps").first
    expect(cell).to_have_text("cpu, as in the files")
    expect(cell).to_have_attribute(
        "title",
        "Weights are held in the codes of the model's files; blocks compute in float32; "
        "keys and values are held as int8",
    )
    theme = page.locator("#theme-button")
    expect(theme).to_have_text("Theme: system")
    theme.click()
    expect(theme).to_have_text("Theme: light")


@pytest.mark.full
def test_fingers_break_lines_with_enter(visit: NewPage) -> None:
    page = visit(width=390, height=844, has_touch=True, is_mobile=True)
    say(page, {"content": "one"})
    page.fill("#question", "one")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    expect(page.locator("#question")).to_have_value("one\ntwo")
    page.click("#send")
    expect(page.locator(".asked .text")).to_have_text("one\ntwo")
