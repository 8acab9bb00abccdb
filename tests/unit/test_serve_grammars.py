"""What may come next in an answer that keeps to a schema, in whatever order it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import splitnet
from splitnet.serve.failures import ApiError
from splitnet.serve.grammars import AllowedTokens, Grammars
from splitnet.serve.sampling import Sampling, TokenChooser


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path) -> Any:
    return splitnet.AutoTokenizer.from_pretrained(demo_checkpoint)


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, 49152, {2})


def possible(allowed: AllowedTokens, answer: list[int]) -> set[int]:
    scores = torch.zeros(49152)
    allowed.forbid_others(answer, scores)
    return set(scores.isfinite().nonzero().flatten().tolist())


def test_answers_may_be_looked_at_in_any_order(grammars: Grammars, tokenizer: Any) -> None:
    allowed = AllowedTokens(grammars.of_schema({"enum": ["red", "rose", "blue"]}))
    red, blue = (tokenizer(text).input_ids for text in ('"red"', '"blue"'))
    for answer in (red, blue):
        assert all(token in possible(allowed, answer[:length]) for length, token in enumerate(answer))
    assert possible(allowed, red) == {2}, "only the end"
    assert set(tokenizer.batch_decode([[token] for token in possible(allowed, [])])) <= {'"', '"r', '"b'}
    assert possible(allowed, blue) == {2}


def test_a_choice_is_one_that_is_possible(grammars: Grammars, tokenizer: Any) -> None:
    allowed = AllowedTokens(grammars.of_schema({"const": 7}))
    scores = torch.randn(1, 49152, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    chooser = TokenChooser(Sampling(1.0, 1.0, 1), 1, begins=3, allowed=[allowed])
    (chosen,) = chooser(torch.zeros(1, 3, dtype=torch.long), scores).argmax(dim=-1).tolist()
    assert tokenizer.decode([chosen]) == "7"
    # Its score is the model's own.
    assert torch.equal(scores, before)
    assert chooser.scored[0, 3].logprob == pytest.approx(float(scores.log_softmax(-1)[0, chosen]))


@pytest.mark.parametrize("schema", [{"type": "rope"}, {"$ref": "#/none"}, {"minimum": "a"}])
def test_schemas_that_cannot_be_kept_to(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="cannot be kept to"):
        grammars.of_schema(schema)


def test_a_tokenizer_that_does_not_fit() -> None:
    with pytest.raises(ApiError, match="ask for text"):
        Grammars(object(), 10, {2}).of_schema({"type": "object"})
