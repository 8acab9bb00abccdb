"""Replayed decode steps, on the CPU: the operations of a graph are listed and run again."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitnet.blocks.fast import graph_step
from splitnet.blocks.fast.graph_step import SIZES, CannotBeRecorded, GraphStep, OnDeviceAlone, size_for
from splitnet.blocks.fast.torch_step import TorchStep
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.quant import native
from tests.unit.random_models import random_checkpoint
from tests.unit.recorded_operations import OperationRecorder

MOST = SIZES[-1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(random_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"), blocks=4))


@pytest.fixture(autouse=True)
def of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_fast_kernels", lambda: False)
    graphs_are(monkeypatch, faster=True)


def graphs_are(monkeypatch: pytest.MonkeyPatch, *, faster: bool) -> None:
    times = itertools.count(1000, -1 if faster else 1)
    monkeypatch.setattr(graph_step, "milliseconds", lambda device, work, count: float(next(times)))


def load(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    recorder: OperationRecorder | None,
    dtype: str = "float32",
) -> Span:
    monkeypatch.setattr(graph_step, "recorder_for", lambda device: recorder)
    return Span.load(checkpoint, 1, 4, dtype=dtype)


def session(span: Span, rows: int = 5) -> torch.Tensor:
    """Runs steps of all rows and of some; the memory of rows moves, shrinks, is cropped and forked."""
    noise = torch.Generator().manual_seed(0)
    lengths = [250 + row for row in range(rows)]
    held = [span.new_row(None if row % 2 else 300) for row in range(rows)]
    outputs: list[torch.Tensor] = []

    def run(*counts: tuple[int, int]) -> None:
        hidden = torch.randn(sum(count for _, count in counts), span.hidden_size, generator=noise)
        parts = [RowChunk(held[row], held[row].length, count) for row, count in counts]
        outputs.append(span.forward(hidden, parts).float())

    run(*enumerate(lengths))
    for _ in range(8):  # past the first 256 positions
        run(*((row, 1) for row in range(rows)))
    held[0].crop(17)
    held[1] = held[1].fork(100)
    held[2].room = held[2].length
    for count in (1, 2, 3, rows):
        run(*((row, 1) for row in range(count)))
    run((0, 3), (1, 1))
    run(*((row, 1) for row in reversed(range(rows))))
    for row in held:
        outputs += [torch.cat((keys, values)).flatten(1) for _, keys, values in row.keys_and_values(row.length)]
    return torch.cat([output.flatten() for output in outputs])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_steps_equal_computed_steps(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    expected = load(checkpoint, monkeypatch, None, dtype)
    assert type(expected._lean) is TorchStep
    recorder = OperationRecorder()
    span = load(checkpoint, monkeypatch, recorder, dtype)
    assert isinstance(span._lean, GraphStep) and span.replayed_positions == MOST
    before = recorder.replays
    torch.testing.assert_close(session(span), session(expected), rtol=2e-2 if dtype == "bfloat16" else 1e-4, atol=1e-2)
    steps = 8 + 4 + 1  # each with the rotary embedding, and two pieces of every block
    assert recorder.replays - before == steps * (1 + 2 * 3)


def test_taps_are_kept_between_replays(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = OperationRecorder()
    span, plain = load(checkpoint, monkeypatch, recorder), load(checkpoint, monkeypatch, None)
    hidden = torch.randn(3, span.hidden_size, generator=torch.Generator().manual_seed(0))
    before = recorder.replays
    got, expected = (
        each.forward(hidden, [RowChunk(each.new_row(), 0, 1) for _ in range(3)], (2, 3)) for each in (span, plain)
    )
    assert recorder.replays > before and got.shape == (3, 3 * span.hidden_size)
    torch.testing.assert_close(got, expected)
    assert len({float(states.sum()) for states in got.chunk(3, dim=1)}) == 3


def test_more_positions_than_recorded_run_without_graphs(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = OperationRecorder()
    span, plain = load(checkpoint, monkeypatch, recorder), load(checkpoint, monkeypatch, None)
    before = recorder.replays
    hidden = torch.randn(MOST + 1, span.hidden_size, generator=torch.Generator().manual_seed(0))
    got, expected = (
        each.forward(hidden, [RowChunk(each.new_row(), 0, 1) for _ in range(MOST + 1)]) for each in (span, plain)
    )
    torch.testing.assert_close(got, expected)
    assert recorder.replays == before


def test_views_replay_the_same_recordings(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = OperationRecorder()
    span, plain = load(checkpoint, monkeypatch, recorder), load(checkpoint, monkeypatch, None)
    made, before = recorder.recordings, recorder.replays
    for start, end in ((2, 3), (1, 4), (2, 4)):
        torch.testing.assert_close(
            session(span.view(start, end)), session(plain.view(start, end)), rtol=1e-4, atol=1e-4
        )
    assert recorder.recordings == made and recorder.replays > before


def test_a_recording_with_wrong_outputs_is_named_and_left_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    span = load(checkpoint, monkeypatch, OperationRecorder(spoils=0.5))
    assert type(span._lean) is TorchStep and span.replayed_positions == 0
    (record,) = caplog.records
    assert "block 1 adds a wrong result" in record.getMessage()


def test_a_recording_that_stores_wrong_values_is_named_and_left_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = graph_step.Recorded.run

    def run(self: graph_step.Recorded, blocks: object, hidden: object, parts: list[RowChunk]) -> torch.Tensor:
        output = own(self, blocks, hidden, parts)  # pyright: ignore[reportArgumentType]
        parts[-1].row._blocks[2].values[:, :, parts[-1].row.length] += 0.1
        return output

    monkeypatch.setattr(graph_step.Recorded, "run", run)
    assert type(load(checkpoint, monkeypatch, OperationRecorder())._lean) is TorchStep
    (record,) = caplog.records
    assert "block 3 stores in values a wrong result" in record.getMessage()


def test_a_recording_that_is_not_faster_is_left_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs_are(monkeypatch, faster=False)
    assert type(load(checkpoint, monkeypatch, OperationRecorder())._lean) is TorchStep
    assert not caplog.records


def test_a_failed_recording_is_named_and_left_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(OperationRecorder):
        def record(self, work):
            if self.recordings == 20:  # recordings of the first size are finished by then
                raise RuntimeError("out of graphs\nat some address")
            return super().record(work)

    span = load(checkpoint, monkeypatch, Fails())
    assert span.replayed_positions == 2
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "steps of more than 2 through blocks 1..3 on cpu are not replayed from graphs: out of graphs"
    )


def test_a_replay_that_fails_is_the_last(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = OperationRecorder()
    span, plain = load(checkpoint, monkeypatch, recorder), load(checkpoint, monkeypatch, None)
    view = span.view(1, 3)
    recorder.fails = recorder.replays + 10  # in the middle of the second step
    torch.testing.assert_close(session(span), session(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(session(view), session(plain.view(1, 3)), rtol=1e-4, atol=1e-4)
    assert recorder.replays == recorder.fails + 1 and span.replayed_positions == 0
    (record,) = caplog.records
    assert "not replayed from graphs any more: the driver is gone" in record.getMessage()


def test_weights_that_move_end_the_replays(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = OperationRecorder()
    span, plain = load(checkpoint, monkeypatch, recorder), load(checkpoint, monkeypatch, None)
    for parameter in span._backbone.parameters():
        parameter.data = parameter.data.clone()
    torch.testing.assert_close(session(span), session(plain), rtol=1e-4, atol=1e-4)
    (record,) = caplog.records
    assert "any more: weights have moved" in record.getMessage()


@given(st.integers(1, 40), st.sets(st.integers(1, 32)))
def test_a_step_takes_the_smallest_recording_that_has_room(count: int, sizes: set[int]) -> None:
    size = size_for(count, dict.fromkeys(sizes))
    if size is None:
        assert all(other < count for other in sizes)
    else:
        assert size in sizes and size >= count and not any(count <= other < size for other in sizes)


@pytest.mark.parametrize(
    "work",
    [
        lambda values: values.nonzero(),
        lambda values: torch.where(values > 0),
        lambda values: values[values > 0],
        lambda values: values.index_put((values > 0,), values.new_zeros(())),
        lambda values: float(values.sum()),
        lambda values: values.long().unique_consecutive(),
        lambda values: values.to("meta"),
        lambda values: torch.ops.splitnet_tests.unknown(values),
        lambda values: torch.ops.aten._grouped_mm(
            values[None], values[None, :, None], torch.ones(1, dtype=torch.int32)
        ),
    ],
)
def test_operations_that_wait_are_refused_by_name(work) -> None:
    values = torch.ones(4)
    with pytest.raises(CannotBeRecorded, match=r"\w+\.\w+"), torch.inference_mode(), OnDeviceAlone(values.device):
        work(values)


def test_operations_that_do_not_wait_are_accepted() -> None:
    with torch.inference_mode(), OnDeviceAlone(torch.device("cpu")):
        values = torch.arange(4.0)
        found = values[values.long()].sort().values
    assert torch.equal(found, values)


@torch.library.custom_op("splitnet_tests::unknown", mutates_args=())
def _unknown(values: torch.Tensor) -> torch.Tensor:
    return values.clone()
