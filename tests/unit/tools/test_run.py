"""Training runs: the order of the data, gradients of batch parts, and resumption without a difference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from splitnet.errors import DataError, NotFinite, PeerLost, SplitnetError
from splitnet.tools.tune.folder import ADAPTER, TuningFolder
from splitnet.tools.tune.job import TuningProgress, evaluate, take_steps
from splitnet.tools.tune.methods import Schedule, TrainingSettings
from splitnet.tools.tune.run import IGNORED, Encoded, TuningRun

VOCABULARY = 11


class Bigram(nn.Module):
    """A language model that sees one token, with the loss of transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.table[input_ids]
        loss = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        return SimpleNamespace(loss=loss, logits=logits)


class Sparing(Bigram):
    """The same model with a loss in parts; it keeps only the requested logits."""

    loss_in_parts = True

    def forward(self, *, logits_to_keep: int | torch.Tensor, **inputs: torch.Tensor) -> Any:  # type: ignore[override]
        output = super().forward(**inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(loss=output.loss, logits=output.logits[:, kept])


def rows(*lengths: int) -> list[Encoded]:
    ids = [[(start + 3 * place) % VOCABULARY for place in range(length)] for start, length in enumerate(lengths)]
    return [Encoded(row, [IGNORED, *row[1:]]) for row in ids]


def run(**changed: Any) -> TuningRun:
    settings = TrainingSettings(**{"steps": 6, "learning_rate": 0.1, "batch_size": 3, **changed})
    return TuningRun(Bigram(), rows(4, 7, 2, 5, 3), settings, pad=0)


@given(count=st.integers(1, 20), size=st.integers(1, 30), seed=st.integers(0, 5))
def test_every_example_is_used_once_per_epoch(count: int, size: int, seed: int) -> None:
    lengths = range(2, 2 + count)
    tuning = TuningRun(Bigram(), rows(*lengths), TrainingSettings(9, 0.1, batch_size=size, seed=seed), pad=0)
    taken = [len(row.ids) for step in range(2 * count) for row in tuning._rows_of(step)]
    for epoch in range(len(taken) // count):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == list(lengths)


def test_the_order_differs_between_epochs_and_seeds() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return run(seed=seed)._order(epoch)

    orders = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) > 8


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(parts: int) -> None:
    whole, cut = run(batch_size=5), run(batch_size=5, accumulate=parts)
    first, second = whole.take_step(), cut.take_step()
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-5)
    torch.testing.assert_close(cut.model.table, whole.model.table)


def test_only_the_needed_logits_are_requested_if_the_model_can_omit_others() -> None:
    """`logits_to_keep` has no default in this model."""
    whole, sparing = (
        TuningRun(model, rows(4, 7, 2, 5, 3), TrainingSettings(6, 0.1, batch_size=3), pad=0)
        for model in (Bigram(), Sparing())
    )
    assert sparing.take_step() == whole.take_step()
    assert torch.equal(sparing.model.table, whole.model.table)


def test_gradients_are_clipped() -> None:
    # The first step of AdamW ignores the scale of gradients, so the test looks at the gradients given to it.
    tuning = run(clip=0.01)
    norm = tuning.take_step().gradient_norm
    assert norm > 0.05
    assert tuning.model.table.grad.norm() == pytest.approx(0.01, rel=1e-3)


def test_learning_rates_follow_the_schedule() -> None:
    settings = TrainingSettings(steps=10, learning_rate=1.0, warmup_steps=2)
    assert [settings.learning_rate_at(step) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    cosine = TrainingSettings(steps=8, learning_rate=1.0, schedule=Schedule.COSINE)
    assert cosine.learning_rate_at(4) == pytest.approx(0.5)
    assert TrainingSettings(steps=8, learning_rate=2.0, schedule=Schedule.CONSTANT).learning_rate_at(7) == 2.0


@pytest.mark.parametrize("method", [{}, {"zeroth_order": True, "directions": 2}], ids=["adamw", "zeroth order"])
def test_a_resumed_run_equals_an_uninterrupted_run(method: dict[str, Any], tmp_path: Path) -> None:
    whole, first = run(**method), run(**method)
    losses = [whole.take_step().loss for _ in range(6)]
    for _ in range(3):
        first.take_step()
    folder = TuningFolder(tmp_path)
    folder.save_checkpoint(*first.saved_state())
    second = run(**method)
    saved = folder.load_checkpoint()
    assert saved is not None
    second.restore(*saved)
    assert [second.take_step().loss for _ in range(3)] == losses[3:]
    assert torch.equal(second.model.table, whole.model.table)
    assert torch.equal(second.model.frozen, torch.ones(1))


def test_a_checkpoint_of_another_run_is_refused() -> None:
    tensors, facts = run().saved_state()
    tensors["parameter.table"] = tensors["parameter.table"][:3]
    other = run()
    with pytest.raises(DataError, match="not of this run"):
        other.restore(tensors, facts)
    assert other.done == 0


@pytest.mark.parametrize("zeroth_order", [False, True])
def test_a_loss_that_is_not_finite_changes_no_parameter(zeroth_order: bool) -> None:
    tuning = run(zeroth_order=zeroth_order)
    with torch.no_grad():
        tuning.model.table[3, 3] = float("inf")
    before = tuning.model.table.detach().clone()
    with pytest.raises(SplitnetError, match="step 1 has overflowed"):
        tuning.take_step()
    assert torch.equal(tuning.model.table, before)
    assert tuning.done == 0


@pytest.mark.parametrize("kind", [Bigram, Sparing])
def test_accuracy_compares_the_logits_of_the_label_words(kind: type[Bigram]) -> None:
    model = kind()
    told = [int(model.table[last, [4, 9]].argmax()) for last in range(VOCABULARY)]
    examples = [Encoded([1, last, 4], [IGNORED, IGNORED, 4], choice=told[last]) for last in range(VOCABULARY)]
    examples += [Encoded([last, 4], [IGNORED, 4], choice=1 - told[last]) for last in range(VOCABULARY)]
    tuning = TuningRun(model, examples, TrainingSettings(steps=1, learning_rate=0.1, batch_size=4), pad=0)
    result = evaluate(tuning, examples, [4, 9], lambda _: None)
    assert result.accuracy == 0.5
    alone = [evaluate(tuning, [row], None, lambda _: None).loss for row in examples]
    assert result.loss == pytest.approx(sum(alone) / len(alone), rel=1e-5)


class TestFolder:
    def test_a_run_is_resumed_with_its_own_options_only(self, tmp_path: Path) -> None:
        folder = TuningFolder(tmp_path / "run")
        folder.check_settings({"steps": 3, "method": "lora"}, resume=False)
        folder.claim({"steps": 9, "method": "lora"})  # This run ended before its first step.
        folder.check_settings({"steps": 3, "method": "lora"}, resume=False)
        folder.claim({"steps": 3, "method": "lora"})
        folder.save_checkpoint({}, {})
        with pytest.raises(DataError, match="continue it with --resume"):
            folder.check_settings({"steps": 3, "method": "lora"}, resume=False)
        folder.check_settings({"steps": 3, "method": "lora"}, resume=True)
        with pytest.raises(DataError, match="has steps 3, not 4"):
            folder.check_settings({"steps": 4, "method": "lora"}, resume=True)

    def test_a_folder_with_other_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(DataError, match="already holds files"):
            TuningFolder(tmp_path).check_settings({}, resume=False)
        with pytest.raises(DataError, match="no run to continue"):
            TuningFolder(tmp_path).check_settings({}, resume=True)

    def test_metrics_after_the_checkpoint_are_dropped(self, tmp_path: Path) -> None:
        folder = TuningFolder(tmp_path)
        for step in range(5):
            folder.add_metrics({"step": step})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        assert [line["step"] for line in folder.metrics(until=2)] == [0, 1, 2]
        folder.add_metrics({"step": 3})
        assert [line["step"] for line in folder.metrics()] == [0, 1, 2, 3]

    def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = TuningFolder(tmp_path)
        folder.save_checkpoint({"a": torch.ones(2)}, {"step": 1})

        for error in (OSError(28, "No space left on device"), SafetensorError("No space left on device (os error 28)")):

            def full(*arguments: Any, error: Exception = error, **options: Any) -> None:
                Path(arguments[1]).write_bytes(b"half")
                raise error

            monkeypatch.setattr("safetensors.torch.save_file", full)
            with pytest.raises(DataError, match=r"No space left on device.*--resume"):
                folder.save_checkpoint({"a": torch.zeros(2)}, {"step": 2})
        saved = folder.load_checkpoint()
        assert saved is not None and saved[1] == {"step": 1} and saved[0]["a"].tolist() == [1, 1]
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite_leave_the_last_checkpoint_and_adapter(
        self, value: float, tmp_path: Path
    ) -> None:
        class Adapted:
            def __init__(self, weight: float) -> None:
                self.weight = weight

            def save_pretrained(self, folder: str, **options: Any) -> None:
                (Path(folder) / ADAPTER[0]).write_text("{}")
                save_file({"w": torch.full((2,), self.weight)}, Path(folder) / ADAPTER[1])

        folder = TuningFolder(tmp_path)
        folder.save_checkpoint({"parameter.w": torch.ones(2)}, {"step": 1})
        folder.save_adapter(Adapted(1.0))
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(DataError, match=r"is unchanged, because parameter\.w is not finite"):
            folder.save_checkpoint({"parameter.w": torch.full((2,), value)}, {"step": 2})
        with pytest.raises(DataError, match="is unchanged, because w is not finite"):
            folder.save_adapter(Adapted(value))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_an_incomplete_write_leaves_the_last_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = TuningFolder(tmp_path)
        folder.save_checkpoint({"a": torch.ones(2)}, {"step": 1})
        monkeypatch.setattr("safetensors.torch.save_file", lambda *given, **_: Path(given[1]).write_bytes(b"half"))
        with pytest.raises(DataError, match="cannot write"):
            folder.save_checkpoint({"a": torch.zeros(2)}, {"step": 2})
        saved = folder.load_checkpoint()
        assert saved is not None and saved[1] == {"step": 1}

    def test_a_run_that_overflows_keeps_its_last_checkpoint(self, tmp_path: Path) -> None:
        folder, tuning = TuningFolder(tmp_path), run()
        folder.claim({})

        def look() -> None:
            if tuning.done == 1:
                folder.save_checkpoint(*tuning.saved_state())
            if tuning.done == 2:
                with torch.no_grad():
                    tuning.model.table[:] = float("inf")

        def keep() -> None:
            raise AssertionError("what has overflowed is not saved")

        with pytest.raises(NotFinite, match="step 3 has overflowed: start again with a lower --lr"):
            take_steps(tuning, folder, TuningProgress(4), None, "training", look=look, keep=keep)
        saved = folder.load_checkpoint()
        assert saved is not None and saved[1]["step"] == 1

    def test_steps_are_reported_as_saved_only_after_saving(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, tuning = TuningFolder(tmp_path), run()
        folder.claim({})

        def look() -> None:
            if tuning.done:
                raise PeerLost("gone")

        def full() -> None:
            raise DataError("no room")

        with pytest.raises(DataError, match="no room"):
            take_steps(tuning, folder, TuningProgress(4), None, "training", look=look, keep=full)
        assert "saved" not in capsys.readouterr().err

    def test_unwritable_adapters_and_metrics_are_an_error(self, tmp_path: Path) -> None:
        class Full:
            def save_pretrained(self, folder: str, **options: Any) -> None:
                raise SafetensorError("I/O error: No space left on device (os error 28)")

        folder = TuningFolder(tmp_path / "run")
        (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
        for write in (lambda: folder.save_adapter(Full()), lambda: folder.add_metrics({"step": 1})):
            with pytest.raises(DataError, match=r"cannot write .*--resume"):
                write()
        assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]

    def test_a_damaged_checkpoint_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoint.safetensors").write_bytes(b"x" * 40)
        with pytest.raises(DataError, match="is damaged"):
            TuningFolder(tmp_path).load_checkpoint()
