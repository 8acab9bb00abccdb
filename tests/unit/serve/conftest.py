"""What tests of the gateway share: the demo model's tokenizer, its grammars, and servers of a model without peers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.serve.answers.grammars import AnswerConstraints, Grammars
from tests.leftovers import outliving_tests
from tests.unit.serve.clients import KEY, THINKING, gateway
from tests.unit.serve.fake_model import VOCABULARY, FakeModel
from tests.unit.serve.serving import TEMPLATE, Serve, Server, servers


@pytest.fixture(scope="session")
def shared_tokenizer(demo_checkpoint: Path) -> Any:
    return Checkpoint.open(demo_checkpoint).tokenizer()


@pytest.fixture
def tokenizer(shared_tokenizer: Any) -> Any:
    """The demo model's tokenizer, whose attributes a test may change."""
    tokenizer = copy.copy(shared_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def grammars(shared_tokenizer: Any) -> Iterator[Grammars]:
    grammars = Grammars(shared_tokenizer, VOCABULARY, {2})
    with outliving_tests():
        grammars.of_answer(AnswerConstraints(schema={}))
    yield grammars
    grammars.close()


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def serve(model: FakeModel, tokenizer: Any, grammars: Grammars) -> Iterator[Serve]:
    """Runs the coroutine of a test with a new server."""
    with servers(partial(Server, model, tokenizer, grammars=grammars)) as run:
        yield run


@pytest.fixture
def url(tokenizer: Any, grammars: Grammars) -> Iterator[str]:
    """The URL of a gateway with one key."""
    with gateway(tokenizer, grammars, [KEY]) as url:
        yield url


@pytest.fixture
def thinking(shared_tokenizer: Any, grammars: Grammars) -> Iterator[str]:
    """The URL of a gateway whose model never ends its reasoning."""
    with gateway(copy.copy(shared_tokenizer), grammars, template=THINKING) as url:
        yield url
