"""Peers that lie about their blocks are named, answers are right, and honest peers are never named."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.lying_peer import lie
from peers.running_peer import RunningPeer
from splitnet.audit.auditor import SUFFIX, Auditor, evidence_folder
from splitnet.audit.evidence import read_piece
from splitnet.audit.examine import examine
from splitnet.audit.piece import Piece
from splitnet.audit.program import AuditProgram
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.audit import audit as check_evidence
from splitnet.errors import PeerLied
from splitnet.security.identity import Identity
from splitnet.swarm.swarm import Event
from splitnet.wire.messages import FailureCode
from splitnet.wire.sent_log import PAGE
from tests.swarm.generation import GREEDY, Collector
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm
from tests.swarm.test_lying_hops import MODEST_MS, claim

pytestmark = pytest.mark.swarm

OPTIONS: dict[str, Any] = GREEDY | {"max_new_tokens": 12}
ONCE = 1e-9  # a rate at which only peers that are new to the client are examined
IDS = torch.randint(3, 300, (1, 2 * PAGE + 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def here(program: Any, piece: Piece) -> Any:
        return examine(Checkpoint.open(program._source), piece)

    monkeypatch.setattr(AuditProgram, "examine", here)
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path))


@pytest.fixture
def auditors(monkeypatch: pytest.MonkeyPatch) -> list[Auditor]:
    """The auditors of all clients that the test opens."""
    made: list[Auditor] = []
    start = Auditor.__init__

    def init(self: Auditor, *given: Any, **named: Any) -> None:
        start(self, *given, **named)
        made.append(self)

    monkeypatch.setattr(Auditor, "__init__", init)
    return made


@contextmanager
def fresh(honest: LocalSwarm) -> Iterator[LocalSwarm]:
    """A new client, and room for liars beside the honest peers."""
    visitor = LocalSwarm(honest.folder, list(honest.peers), honest.node)
    with visitor._stack:
        yield visitor


def is_banned(swarm: LocalSwarm, peer: RunningPeer) -> bool:
    names: set[str] = swarm.client.bans.keys()
    return peer.record().key.text in names


def lied(swarm: LocalSwarm) -> list[Event]:
    return [event for event in swarm.client.events.since(0) if event.kind == "lied"]


@pytest.fixture(scope="module")
def honest(folder: Path) -> Iterator[LocalSwarm]:
    """One peer for each span, which publishes a modest speed."""
    with local_swarm(folder, SPANS, dtype="float32") as swarm:
        for peer in swarm.peers:
            claim(peer, MODEST_MS)
        yield swarm


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


Lie = Callable[[LocalSwarm, pytest.MonkeyPatch], RunningPeer]


def changes(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    """A peer that changes its outputs, `[positions, hidden]`."""

    def start(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> RunningPeer:
        peer = swarm.add(*SPANS[1], dtype="float32")
        outputs: Any = peer.service.outputs
        add = outputs.add_output
        outputs.add_output = lambda work, values: add(work, change(values))
        return peer

    return start


def of_weights(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Lie:
    """A peer with other weights that says that they are those of the model."""

    def start(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> RunningPeer:
        other = swarm.folder.parent / f"other-{monkeypatch.__hash__()}"
        other.mkdir()
        for file in swarm.folder.iterdir():
            if file.suffix == ".safetensors":
                save_file({name: change(name, each) for name, each in load_file(file).items()}, other / file.name)
            else:
                (other / file.name).write_bytes(file.read_bytes())
        fingerprint = Checkpoint.open(swarm.folder).fingerprint
        monkeypatch.setattr(Checkpoint, "fingerprint", property(lambda _: fingerprint))
        return swarm.add(*SPANS[1], folder=other, dtype="float32")

    return start


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * (1 + 0.03 * torch.randn_like(tensor)) if tensor.ndim == 2 else tensor


def without_a_block(name: str, tensor: torch.Tensor) -> torch.Tensor:
    skipped = f"layers.{SPANS[1][0]}." in name and ("o_proj" in name or "down_proj" in name)
    return torch.zeros_like(tensor) if skipped else tensor


def in_few_bits(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> RunningPeer:
    """A peer that holds int4 and says float32."""
    monkeypatch.setattr(Span, "held_as", property(lambda _: "float32"))
    return swarm.add(*SPANS[1], weights="int4", dtype="float32")


def of_kind(kind: str, span: tuple[int, int]) -> Lie:
    """A peer that lies as in `benchmarks.lying_peer`."""

    def start(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> RunningPeer:
        peer = swarm.add(*span, dtype="float32")
        lie(peer, kind)
        return peer

    return start


LIES: dict[str, Lie] = {
    "noise": of_kind("noise 5 %", SPANS[1]),
    "steering": of_kind("steering 5 %", SPANS[1]),
    "scaled": of_kind("scaled 2 %", SPANS[1]),
    "swapped": changes(lambda values: values.flip(0)),
    "zeros": changes(torch.zeros_like),
    "another fine-tune": of_weights(moved),
    "a block left out": of_weights(without_a_block),
    "int4": in_few_bits,
    "first hop": of_kind("signs other than it was sent", SPANS[0]),
}


@pytest.mark.default_cases(kind=("noise", "int4", "another fine-tune", "first hop"))
@pytest.mark.parametrize("kind", LIES)
def test_a_liar_is_named_and_the_answer_is_right(
    kind: str,
    honest: LocalSwarm,
    local: Any,
    auditors: list[Auditor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with fresh(honest) as swarm:
        liar = LIES[kind](swarm, monkeypatch)
        claim(liar, 0.0)
        model = swarm.model(audit=ONCE)
        assert torch.equal(model.generate(IDS, **OPTIONS), local.generate(IDS, **OPTIONS))
        name = liar.record().key.text
        assert auditors[0].counts["lies"] == 1 and is_banned(swarm, liar)
        assert lied(swarm)
        if kind != "first hop":
            checkpoint = Checkpoint.open(swarm.folder)
            file = evidence_folder(checkpoint.fingerprint) / f"{name}{SUFFIX}"
            assert not examine(checkpoint, read_piece(file.read_bytes())).honest
            check_evidence(str(swarm.folder), file)
            assert f"The peer {name}\nhas signed outputs" in capsys.readouterr().out
            with swarm.newcomer() as later:  # of the same user
                later.model(audit=ONCE)
                assert is_banned(later, liar)


def test_false_pages_are_found(
    honest: LocalSwarm, local: Any, auditors: list[Auditor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(honest) as swarm:
        liar = of_kind("other pages", SPANS[1])(swarm, monkeypatch)
        claim(liar, 0.0)
        model = swarm.model(audit=ONCE)
        expected = local.generate(IDS, **OPTIONS)
        for _ in range(2):
            assert torch.equal(model.generate(IDS, **OPTIONS), expected)
        assert is_banned(swarm, liar) and not lied(swarm)


def test_an_honest_peer_with_pages_of_false_inputs_is_not_named(
    honest: LocalSwarm, local: Any, auditors: list[Auditor]
) -> None:
    with fresh(honest) as swarm:
        liar = swarm.add(*SPANS[1], dtype="float32")
        claim(liar, 0.0)
        model, other = swarm.model(audit=ONCE), IDS.flip(1)
        model.generate(IDS, **OPTIONS)
        audits = auditors[0].counts["audits"]
        end = lie(liar, "noise 5 %")
        model.generate(other, **OPTIONS)  # all hops are known, so that none is examined
        end()
        assert auditors[0].counts["audits"] == audits == len(SPANS)
        assert torch.equal(model.generate(other, **OPTIONS), local.generate(other, **OPTIONS))
        assert auditors[0].counts["audits"] > audits and not auditors[0].counts["lies"]


def test_a_false_link_is_left(
    honest: LocalSwarm, local: Any, auditors: list[Auditor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(honest) as swarm:
        liar = of_kind("sends other than it signs", SPANS[1])(swarm, monkeypatch)
        spare = swarm.add(*SPANS[2], dtype="float32")  # a second neighbour
        for peer in (liar, spare):
            claim(peer, 0.0)
        assert torch.equal(swarm.model(audit=ONCE).generate(IDS, **OPTIONS), local.generate(IDS, **OPTIONS))
        assert auditors[0].counts["disagreements"] >= 1
        assert not any(spare.record().endpoint.address in event.text for event in lied(swarm))


@pytest.mark.parametrize("code", [FailureCode.BAD_MESSAGE, FailureCode.BUSY])
def test_an_answer_is_computed_again_without_a_peer_that_signs_nothing(
    code: FailureCode, honest: LocalSwarm, local: Any, auditors: list[Auditor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(honest) as swarm:
        silent = LIES["zeros"](swarm, monkeypatch)
        service: Any = silent.service
        service._answer_audit = lambda source, message, _: service._refuse_message(source, message, code, "no")
        claim(silent, 0.0)
        assert torch.equal(swarm.model(audit=ONCE).generate(IDS, **OPTIONS), local.generate(IDS, **OPTIONS))
        assert is_banned(swarm, silent) and not auditors[0].counts["lies"]


def test_a_streamed_answer_ends_with_the_error(
    honest: LocalSwarm, auditors: list[Auditor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(honest) as swarm:
        liar = LIES["noise"](swarm, monkeypatch)
        claim(liar, 0.0)
        with pytest.raises(PeerLied, match="not used any more: ask again"):
            swarm.model(audit=ONCE).generate(IDS, **OPTIONS, streamer=Collector())


@pytest.mark.parametrize("codec", ["none", "bf16", "int8"])
def test_honest_peers_are_never_named(codec: str, honest: LocalSwarm, auditors: list[Auditor]) -> None:
    with fresh(honest) as swarm:
        model = swarm.model(codec=codec, audit=1.0)
        for length in (3, 40, 70):
            ids = IDS[:, :length].repeat(2, 1)
            model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
            model.generate(ids[:1], **OPTIONS, speculate="prompt-lookup")
            model.generate(ids[:1], **OPTIONS, num_beams=3)
        [auditor] = auditors
        assert auditor.counts["audits"] >= 3 and not auditor.counts["lies"] + auditor.counts["disagreements"]


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients ask other peers to compute pieces again."""
    monkeypatch.setattr("splitnet.audit.auditor.weights_are_here", lambda _: False)


@pytest.fixture(scope="module")
def crowd(honest: LocalSwarm) -> Iterator[LocalSwarm]:
    """Two honest peers for each span."""
    with fresh(honest) as swarm:
        for span in SPANS:
            claim(swarm.add(*span, dtype="float32"), MODEST_MS)
        yield swarm


@pytest.mark.usefixtures("without_weights")
@pytest.mark.default_cases(kind=("noise", "int4"))
@pytest.mark.parametrize("kind", LIES)
def test_other_peers_name_a_liar(
    kind: str, crowd: LocalSwarm, local: Any, auditors: list[Auditor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(crowd) as swarm:
        liar = LIES[kind](swarm, monkeypatch)
        claim(liar, 0.0)
        model = swarm.model(audit=ONCE)
        assert torch.equal(model.generate(IDS, **OPTIONS), local.generate(IDS, **OPTIONS))
        assert auditors[0].counts["lies"] == 1 and is_banned(swarm, liar) and len(swarm.client.bans.keys()) == 1


@pytest.mark.usefixtures("without_weights")
def test_a_lying_auditor_is_left(
    crowd: LocalSwarm, local: Any, auditors: list[Auditor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(crowd) as swarm:
        liar = LIES["noise"](swarm, monkeypatch)
        claim(liar, 4 * MODEST_MS)  # so that no route needs it
        name, chosen = liar.record().key.text, random.choice
        monkeypatch.setattr(random, "choice", lambda names: name if name in names else chosen(names))
        assert torch.equal(swarm.model(audit=ONCE).generate(IDS, **OPTIONS), local.generate(IDS, **OPTIONS))
        assert auditors[0].counts["audits"] == len(SPANS) and not auditors[0].counts["lies"]
        assert swarm.client.bans.keys() == {name}


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize("codec", ["none", "bf16", "int8"])
def test_other_peers_agree_with_honest_ones(codec: str, crowd: LocalSwarm, auditors: list[Auditor]) -> None:
    with fresh(crowd) as swarm:
        model = swarm.model(codec=codec, audit=1.0)
        for length in (3, 40, 70):
            ids = IDS[:, :length].repeat(2, 1)
            model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
            model.generate(ids[:1], **OPTIONS, speculate="prompt-lookup")
        counts = auditors[0].counts
        assert counts["audits"] >= 3 and not counts["lies"] + counts["disagreements"] and not swarm.client.bans.keys()


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize("listed", [False, True])
def test_only_listed_auditors_are_asked(
    listed: bool, crowd: LocalSwarm, auditors: list[Auditor], tmp_path: Path
) -> None:
    file = tmp_path / "auditors.txt"
    keys = [peer.record().key for peer in crowd.peers] if listed else [Identity.generate().public]
    file.write_text("\n".join(key.text for key in keys))
    with fresh(crowd) as swarm:
        swarm.model(audit=ONCE, auditors=file).generate(IDS, **OPTIONS)
        assert auditors[0].counts["audits"] == (len(SPANS) if listed else 0)


def test_audits_are_off_for_peers_of_this_machine_unless_asked_for(
    honest: LocalSwarm, auditors: list[Auditor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitnet.audit.auditor.STRANGERS_RATE", 1e9)
    with fresh(honest) as swarm:
        swarm.model().generate(IDS, **OPTIONS)
        swarm.model(audit=0).generate(IDS, **OPTIONS)
        assert [auditor.counts["audits"] for auditor in auditors] == [0]
