"""Every parameter of transformers' `GenerationConfig` and `forward` has the effect that it has in transformers, or is
refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils.generic import TransformersKwargs

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import UnsupportedParameter
from splitnet.hf.parameters import FORWARD, GENERATION, RefusedParameter
from tests.parameter_table import with_tables
from tests.swarm.harness import LocalSwarm, shared_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parameters.md"
FAMILIES = ("llama", "gpt2", "mixtral")
ENDS = {"eos_token_id": list(range(3, 200))}
"""Most tokens end a text."""
SAMPLES = {"do_sample": True}
BEAMS = {"num_beams": 3}
ALL = {"return_dict_in_generate": True}

GIVEN: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 13, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 14, **ENDS},
    "min_new_tokens": {"min_new_tokens": 5, **ENDS},
    "early_stopping": {"early_stopping": True, **BEAMS, **ENDS},
    "max_time": {"max_time": 1e-9},
    "stop_strings": {"stop_strings": [chr(letter) for letter in range(ord("A"), ord("z"))]},
    "do_sample": SAMPLES,
    "num_beams": BEAMS,
    "use_mtp": {"use_mtp": True},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "cache_config": {"cache_config": {"nbits": 4}},
    "max_cache_len": {"max_cache_len": 64},
    "temperature": {"temperature": 0.5, **SAMPLES},
    "top_k": {"top_k": 3, **SAMPLES},
    "top_p": {"top_p": 0.4, **SAMPLES},
    "min_p": {"min_p": 0.3, **SAMPLES},
    "top_h": {"top_h": 0.4, **SAMPLES},
    "typical_p": {"typical_p": 0.4, **SAMPLES},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05, **SAMPLES},
    "eta_cutoff": {"eta_cutoff": 0.05, **SAMPLES},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "length_penalty": {"length_penalty": 3.0, **BEAMS, **ENDS},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, 150)]},
    "renormalize_logits": {"renormalize_logits": True, **BEAMS},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 2.0), "eos_token_id": 7},
    "suppress_tokens": {"suppress_tokens": list(range(3, 150))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 150))},
    "sequence_bias": {"sequence_bias": [[[5], 50.0]]},
    "token_healing": {"token_healing": True},
    "guidance_scale": {"guidance_scale": 2.0},
    "watermarking_config": {"watermarking_config": {"bias": 5.0, "seeding_scheme": "selfhash"}},
    "num_return_sequences": {"num_return_sequences": 2, **SAMPLES},
    "output_attentions": {"output_attentions": True, **ALL},
    "output_hidden_states": {"output_hidden_states": True, **ALL},
    "output_scores": {"output_scores": True, **ALL},
    "output_logits": {"output_logits": True, **ALL},
    "return_dict_in_generate": ALL,
    "pad_token_id": {"pad_token_id": 5, **ENDS, **SAMPLES, "num_return_sequences": 3},
    "bos_token_id": {"bos_token_id": 9, "input_ids": None, "attention_mask": None},
    "eos_token_id": ENDS,
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "decoder_start_token_id": {"decoder_start_token_id": 5},
    "is_assistant": {"is_assistant": True, "output_scores": True, **ALL},
    "num_assistant_tokens": {"num_assistant_tokens": 3, "assistant_model": None},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic", "assistant_model": None},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9, "assistant_model": None},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "max_matching_ngram_size": {"max_matching_ngram_size": 1, "prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"assistant_early_exit": 2},
    "assistant_lookbehind": {"assistant_lookbehind": 3, "assistant_model": None},
    "target_lookbehind": {"target_lookbehind": 3, "assistant_model": None},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5, "assistant_model": None},
    "speculation_type": {"speculation_type": "dflash", "assistant_model": None},
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "continuous_batching_config": {"continuous_batching_config": ContinuousBatchingConfig()},
    "low_memory": {"low_memory": True},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "diversity_penalty": {"diversity_penalty": 0.5, "num_beams": 4},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2},
    "constraints": {"constraints": [object()], **BEAMS},
    "force_words_ids": {"force_words_ids": [[5]], **BEAMS},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "transformers_version": {"transformers_version": "5"},
}
"""By parameter, options with which it has an effect. `None` is replaced by an assistant model."""

SOME = (
    *("max_new_tokens", "min_new_tokens", "stop_strings", "num_beams", "use_cache", "top_p", "repetition_penalty"),
    *(
        "bad_words_ids",
        "guidance_scale",
        "num_return_sequences",
        "output_hidden_states",
        "output_scores",
        "eos_token_id",
    ),
    *("bos_token_id", "prompt_lookup_num_tokens", "num_assistant_tokens", "penalty_alpha", "compile_config"),
)
"""Parameters of each kind: ends of texts, choice of tokens, further outputs, drafts, refused ones."""

FAILS_IN_TRANSFORMERS = {"token_healing"}
"""Parameters that fail in plain transformers with these models; the remote model raises the same error."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(folder, [(0, 3), (3, 6)], node=node) as started:
        yield started


@pytest.fixture(scope="module")
def remote(swarm: LocalSwarm) -> Iterator[Any]:
    with swarm.visit() as visit:
        yield visit.model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    letters = sorted(ByteLevel.alphabet())
    made = Tokenizer(BPE({letters[token] if token < len(letters) else f"<{token}>": token for token in range(300)}, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=letters[2], bos_token=letters[1])


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(random_checkpoint("llama", tmp_path_factory.mktemp("small"), blocks=2))


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 300, (rows, 9), generator=torch.Generator().manual_seed(rows))


def flat(output: Any) -> list[torch.Tensor]:
    """All tensors of an output, without its cache."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for name, value in output.items() if name != "cache" for tensor in flat(value)]
    return [tensor for value in output for tensor in flat(value)] if isinstance(output, tuple | list) else []


def outcome(call: Any, **options: Any) -> list[torch.Tensor] | Exception:
    torch.manual_seed(3)
    try:
        with torch.no_grad():
            return flat(call(**options))
    except Exception as error:
        return error


def compare(name: str, rule: str | RefusedParameter, expected: Any, got: Any) -> None:
    """Expects the outcome of plain transformers, or a refusal by name, as the table says.

    Args:
        expected: called only if the parameter is not refused, because transformers may break a model before it fails.
    """
    if isinstance(rule, RefusedParameter):
        assert isinstance(got, UnsupportedParameter), got
        assert name in str(got)
        return
    expected = expected()
    if name in FAILS_IN_TRANSFORMERS:
        assert isinstance(expected, Exception)
        assert type(got) is type(expected), got
        assert str(got) == str(expected)
        return
    assert not isinstance(expected, Exception), expected
    assert not isinstance(got, Exception), got
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.default_cases(family=("llama",))
def test_the_tables_have_every_parameter(folder: Path) -> None:
    of_config = vars(GenerationConfig()).keys() - {"_from_model_config"}
    assert of_config == GENERATION.keys() == GIVEN.keys()
    assert not forward_parameters(folder) - FORWARD.keys()


def test_the_documented_tables_are_up_to_date() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text()), "python -m tests.parameter_table docs/parameters.md"


@pytest.mark.default_cases(family=("llama",), name=SOME)
@pytest.mark.parametrize("name", GIVEN)
def test_a_parameter_of_generation_has_the_effect_of_transformers_or_is_refused(
    local: Any, remote: Any, assistant: Any, tokenizer: Any, name: str
) -> None:
    ids = prompt()
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 7}
    options |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **GIVEN[name]}
    if "assistant_model" in options:
        options["assistant_model"] = assistant
    if name in ("stop_strings", "token_healing"):
        options["tokenizer"] = tokenizer
    got = outcome(remote.generate, **options)
    compare(name, GENERATION[name], lambda: outcome(local.generate, **options), got)


def forward_parameters(folder: Path) -> set[str]:
    """The parameters of a family's methods, including keywords that they pass on."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    named = inspect.signature(model.forward).parameters.keys() - {"kwargs"}
    return named | set(TransformersKwargs.__optional_keys__)


def forward_values(local: Any) -> dict[str, dict[str, Any]]:
    """Values to call a model with, by parameter."""
    ids, mask = prompt(2), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    counts = torch.tensor([0, 9, 18])
    hidden = torch.ones(2, 4, local.config.hidden_size)
    labels = {"labels": ids}
    return {
        "input_ids": {},
        "attention_mask": {"attention_mask": mask},
        "position_ids": {"position_ids": torch.arange(9)[None]},
        "cache": {"cache": None, "use_cache": True},
        "inputs_embeds": {"input_ids": None, "inputs_embeds": local.get_input_embeddings()(ids).detach() * 1.5},
        "labels": labels,
        "use_cache": {"use_cache": True},
        "logits_to_keep": {"logits_to_keep": 2},
        "num_items_in_batch": {"num_items_in_batch": torch.tensor(3), **labels},
        "return_dict": {"return_dict": False},
        "token_type_ids": {"token_type_ids": ids},
        "output_attentions": {"output_attentions": True},
        "output_hidden_states": {"output_hidden_states": True},
        "output_router_logits": {"output_router_logits": True},
        "cu_seq_lens_q": {"cu_seq_lens_q": counts},
        "cu_seq_lens_k": {"cu_seq_lens_k": counts},
        "max_length_q": {"max_length_q": 9},
        "max_length_k": {"max_length_k": 9},
        "seq_idx": {"seq_idx": ids},
        "is_causal": {"is_causal": False},
        "encoder_hidden_states": {"encoder_hidden_states": hidden},
        "encoder_attention_mask": {"encoder_attention_mask": torch.ones(2, 4)},
    }


@pytest.mark.default_cases(family=("llama",))
@pytest.mark.parametrize("name", FORWARD)
def test_a_parameter_of_forward_has_the_effect_of_transformers_or_is_refused(
    folder: Path, local: Any, remote: Any, name: str
) -> None:
    if name not in forward_parameters(folder) | {"return_dict"}:
        with pytest.raises(UnsupportedParameter, match=name), torch.no_grad():
            remote(**{"input_ids": prompt(2), **forward_values(local)[name]})
        return
    options = {"input_ids": prompt(2), **forward_values(local)[name]}
    of_local: dict[str, Any] = {"cache": DynamicCache()} if name == "cache" else {}
    of_remote: dict[str, Any] = {"cache": remote.new_cache()} if name == "cache" else {}
    mask = options.get("attention_mask", torch.ones(2, 9)).bool()

    def call(model: Any, **cache: Any) -> Any:
        found = outcome(model, **(options | cache))
        if isinstance(found, Exception) or name != "attention_mask":
            return found
        return [logits[mask] for logits in found]

    compare(name, FORWARD[name], lambda: call(local, **of_local), call(remote, **of_remote))
