"""Disturbs a swarm for minutes, and checks for wrong or lost tokens, for leaks, and that lost blocks are replaced.

Eight daemons with memory for twelve blocks each and four clients run in hosts of an emulated network (see
docs/netlab.md; needs root on Linux). Every few seconds one daemon is disturbed: kill -9 and a restart, SIGTERM and a
restart, SIGSTOP for a while, or its host is cut off for a while. Once, all daemons of some block are killed and stay
away, so that other daemons must move. The clients compare each answer with that of plain transformers; every second
answer uses drafts. One more client trains, and compares the gradients of a LoRA with the gradients that PEFT computes
on plain transformers. All prompts are such that each likeliest token stands out, so that rounding in batches of
different sizes cannot change a token.

    sudo make soak [MINUTES=10] [MODEL=...]

With `--audit RATE ...` the clients audit the daemons, and with `--liars N` the last N daemons tell changing lies (see
`benchmarks.soak_audits`). Nobody trains then, as audits do not examine training.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.peers import LabPeers
from benchmarks.soak_audits import Audits, Lies
from scheduler.facts import missing_blocks
from splitnet.blocks.backbone import load_whole
from splitnet.blocks.span import block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.demo import demo_checkpoint
from splitnet.cli.demo import EXACT
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.record import DEFAULT_TTL_S, facts_of
from splitnet.errors import SplitnetError
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.swarm.swarm import ModelFacts, Swarm

TEXT = Path(__file__).parent / "data" / "varied_text.txt"
PEERS = 8
CLIENTS = 4
BLOCKS_PER_PEER = 12
LASTING = 2
"""The number of daemons that are never killed, so that their leaks become visible."""
NEW_TOKENS = 32
PROMPTS = 12
MIN_MARGIN = 0.01
"""Minimum difference between the two largest logits of each token: far more than rounding changes."""
PAUSE_S = (2.0, 6.0)
TROUBLE_S = (3.0, 12.0)
AWAY_S = 150.0
"""Seconds that all daemons of some block stay away: longer than their records are valid."""
WAIT_S = 240.0
"""Seconds that clients wait until peers serve all blocks."""
MAX_GROWTH_MIB = 64
MAX_GRADIENT_ERROR = 1e-3
"""Maximum error of a gradient, as a share of the tensor's largest value: there is no codec, but sums have another
order."""

LOOK_S = 0.25
GAP_S = 1.0
"""A pause of this many seconds without any token is reported."""


@dataclass(frozen=True)
class Question:
    """A prompt `[1, seq]` and the answer of plain transformers, prompt included."""

    prompt: torch.Tensor
    answer: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Gradients of the answer's loss with respect to the parameters of a LoRA, by name."""


@dataclass
class Tally:
    """The clients' results."""

    answers: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    repairs_ms: list[float] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)
    gradients: int = 0
    """The number of forward and backward passes with right gradients."""


@dataclass
class Gap:
    """A time without any token."""

    began_s: float
    """Seconds from the begin of the soak."""
    length_s: float = 0.0
    doing: Counter[str] = field(default_factory=Counter)
    """Activities of sessions during the gap, one sample per quarter of a second."""


class TokenClock:
    """The time of the latest token, and the sessions' activities during gaps."""

    def __init__(self) -> None:
        self.gaps: list[Gap] = []
        self.sessions: dict[int, Any] = {}
        """The present session of each client."""
        self._began = self._last = time.monotonic()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def put(self, value: Any) -> None:
        """Like a streamer of `generate()`."""
        self._last = time.monotonic()

    def end(self) -> None:
        pass

    def start(self) -> None:
        self._began = self._last = time.monotonic()
        self._watcher.start()

    def stop(self) -> None:
        self._stop.set()
        self._watcher.join()

    def _watch(self) -> None:
        last = 0.0
        while not self._stop.wait(LOOK_S):
            silent_s = time.monotonic() - self._last
            if silent_s < GAP_S:
                continue
            if self._last != last:
                last = self._last
                self.gaps.append(Gap(last - self._began))
            self.gaps[-1].length_s = silent_s
            for cache in list(self.sessions.values()):
                session = cache.session
                self.gaps[-1].doing[str(session.state) if session is not None else "no session yet"] += 1


class Clients:
    """Threads that ask and compare until they are stopped."""

    def __init__(
        self, checkpoint: Checkpoint, addresses: Sequence[str], questions: Sequence[Question], audits: Audits | None
    ) -> None:
        self.tally = Tally()
        self.clock = TokenClock()
        self._checkpoint, self._addresses, self._questions, self._audits = checkpoint, addresses, questions, audits
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._models = [self._open(number) for number in range(CLIENTS)]
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        if audits is None:
            self._models.append(self._open(CLIENTS))
            self._tuned: Any = with_lora(self._models[CLIENTS])
            self._threads.append(threading.Thread(target=self._train))

    def start(self) -> None:
        self.clock.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Waits for running answers, and leaves."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.clock.stop()
        for model in self._models:
            model.close()

    def _open(self, number: int) -> RemoteCausalLM:
        options: dict[str, Any] = {"codec": "none", "local_weights": "float32", "recovery_timeout_s": WAIT_S}
        if self._audits is not None:
            return self._audits.open(self._checkpoint, self._addresses, number, **options)
        swarm = Swarm(ModelFacts.of(self._checkpoint), self._addresses)
        return attach(self._checkpoint, swarm, **options)

    def _train(self) -> None:
        choices = random.Random(0)
        while not self._stop.is_set():
            question = choices.choice(self._questions)
            self._tuned.zero_grad()
            try:
                self._tuned(input_ids=question.answer, labels=question.answer, use_cache=False).loss.backward()
            except SplitnetError as error:
                with self._lock:
                    self.tally.errors.append(f"training: {error}")
                continue
            error = worst_error(self._tuned, question.gradients)
            with self._lock:
                self.tally.gradients += 1
                if error > MAX_GRADIENT_ERROR:
                    self.tally.wrong.append(f"a gradient differed by {error:.1e} of the largest")

    def _ask(self, number: int) -> None:
        choices = random.Random(number)
        for turn in itertools.count():
            if self._stop.is_set():
                return
            model, question = self._models[number], choices.choice(self._questions)
            try:
                if self._audits is not None and self._audits.is_old(model):
                    self.clock.sessions.pop(id(model), None)
                    model.close()
                    model = self._models[number] = self._open(number)
                ask = partial(self._is_right, model, question, turn)
                ask() if self._audits is None else self._audits.ask(model, turn % 4 < 2, ask)
            except SplitnetError as error:
                with self._lock:
                    self.tally.errors.append(str(error))

    def _is_right(
        self, model: RemoteCausalLM, question: Question, turn: int, *, streamed: bool = True, **how: Any
    ) -> bool:
        """Asks a question and compares the answer. streamed: in a session that is kept. Raises SplitnetError."""
        if streamed:
            how["streamer"] = self.clock
        if turn % 2:
            how["speculate"] = "prompt-lookup"
        with model.session() if streamed else nullcontext() as cache:
            if cache is not None:
                self.clock.sessions[id(model)] = cache
            got = model.generate(
                question.prompt,
                attention_mask=torch.ones_like(question.prompt),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                **how,
            )
            repairs = cache.session.recoveries if cache is not None and cache.session is not None else []
        right = torch.equal(got, question.answer)
        with self._lock:
            self.tally.answers += 1
            self.tally.tokens += NEW_TOKENS
            self.tally.repairs_ms += [repair.total_ms for repair in repairs]
            self.tally.causes.update(kind_of(cause) for repair in repairs for cause in repair.lost)
            if not right:
                self.tally.wrong.append(f"{question.answer.tolist()} became {got.tolist()}")
        return right


class Trouble:
    """The daemons' trouble."""

    def __init__(self, lab: Lab, peers: LabPeers, seed: int) -> None:
        self.happened: Counter[str] = Counter()
        self._lab = lab
        self._peers = peers
        self._random = random.Random(seed)
        self._hosts = list(lab.hosts[1:])
        self._busy: dict[str, threading.Thread] = {}
        self._ends = threading.Event()

    def one(self) -> None:
        """Disturbs a daemon, unless two daemons are disturbed already."""
        self._busy = {host: thread for host, thread in self._busy.items() if thread.is_alive()}
        if len(self._busy) >= 2:
            return
        host = self._random.choice([host for host in self._hosts if host not in self._busy])
        kinds = ["hang", "cut"] if host in self._hosts[:LASTING] else ["kill", "leave", "hang", "cut"]
        kind = self._random.choice(kinds)
        self._begin(host, kind, self._random.uniform(*TROUBLE_S))

    def take_away(self, hosts: Sequence[str]) -> None:
        """Kills daemons for a long time."""
        for host in hosts:
            if host in self._busy:
                self._busy[host].join()
            self._begin(host, "kill", AWAY_S)

    def end(self) -> None:
        """Ends all trouble."""
        self._ends.set()
        for thread in self._busy.values():
            thread.join()

    def _begin(self, host: str, kind: str, seconds: float) -> None:
        self.happened[kind] += 1
        self._busy[host] = threading.Thread(target=getattr(self, f"_{kind}"), args=(host, seconds))
        self._busy[host].start()

    def _kill(self, host: str, seconds: float) -> None:
        self._peers.kill(host)
        self._ends.wait(seconds)
        self._peers.start(host)

    def _leave(self, host: str, seconds: float) -> None:
        self._peers.stop(host)
        self._ends.wait(seconds)
        self._peers.start(host)

    def _hang(self, host: str, seconds: float) -> None:
        self._peers.freeze(host)
        self._ends.wait(seconds)
        self._peers.thaw(host)

    def _cut(self, host: str, seconds: float) -> None:
        self._lab.down(host)
        self._ends.wait(seconds)
        self._lab.up(host)


@dataclass(frozen=True)
class Sample:
    """The resources of a process, at one time or at their maximum over some time."""

    rss_mib: float
    threads: int
    descriptors: int

    def most(self, other: Sample) -> Sample:
        return Sample(
            max(self.rss_mib, other.rss_mib),
            max(self.threads, other.threads),
            max(self.descriptors, other.descriptors),
        )

    @classmethod
    def of(cls, pid: int | None = None) -> Sample:
        process = psutil.Process(pid)
        return cls(process.memory_info().rss / 2**20, process.num_threads(), process.num_fds())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="GGUF file, folder or hub id (default: the demo's model)")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--liars", type=int, default=0, help="daemons that lie")
    parser.add_argument("--audit", type=float, nargs="+", default=[], help="rates of audits, for the clients in turn")
    arguments = parser.parse_args()
    if arguments.liars and not arguments.audit:
        parser.error("--liars needs --audit: without audits a liar is not found")
    torch.set_num_threads(1)
    folder = arguments.checkpoint or str(demo_checkpoint())
    checkpoint = Checkpoint.open(folder)
    say(f"the answers of plain transformers to {PROMPTS} prompts")
    questions = ask_locally(checkpoint)
    hosts = [f"peer{number}" for number in range(PEERS)]
    block = block_bytes(checkpoint, None, "float32")
    memory = f"{BLOCKS_PER_PEER * block // 2**20 + 1}MiB"
    options = (*EXACT, "--memory", memory, "--kv-memory", "128MiB", "--drain", "10")
    failures: list[str] = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="splitnet-soak-") as caches,
            Lab(["client", *hosts]) as lab,
            lab.inside("client"),
        ):
            lies = Lies(Path(caches), hosts[PEERS - arguments.liars :])
            audits = Audits(lies, arguments.audit, Path(caches)) if arguments.audit else None
            directory = DhtDirectory.start(listen=[f"/ip4/{lab.address('client')}/tcp/0"])
            say(f"starting {PEERS} daemons")
            facts = lab, folder, dict.fromkeys(hosts), options, directory.addresses[0], lies.programs()
            with LabPeers(*facts, own_caches=audits is not None) as peers:
                failures = soak(lab, peers, checkpoint, directory, questions, audits, arguments)
            directory.close()
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for failure in failures:
        print(f"FAILED: {failure}")
    print("soak failed" if failures else "soak passed")
    return 1 if failures else 0


def soak(
    lab: Lab,
    peers: LabPeers,
    checkpoint: Checkpoint,
    directory: DhtDirectory,
    questions: Sequence[Question],
    audits: Audits | None,
    arguments: argparse.Namespace,
) -> list[str]:
    """Runs the soak and returns the failures."""
    failures: list[str] = []
    lasting = list(lab.hosts[1 : 1 + LASTING])
    clients = Clients(checkpoint, directory.addresses, questions, audits)
    trouble = Trouble(lab, peers, arguments.seed)
    choices = random.Random(arguments.seed)
    clients.start()
    began = time.monotonic()
    ends = began + 60 * arguments.minutes
    gone_at = began + (ends - began) * 0.4
    seen: list[tuple[float, dict[str, Sample]]] = []
    restored_s: float | None = None
    while time.monotonic() < ends:
        time.sleep(choices.uniform(*PAUSE_S))
        trouble.one()
        seen.append((time.monotonic(), samples(peers, lasting)))
        if restored_s is None and time.monotonic() > gone_at:
            restored_s = lose_blocks(lab, peers, directory, checkpoint, trouble, choices)
            ends = max(ends, time.monotonic() + 60)
        tally = clients.tally
        say(
            f"{time.monotonic() - began:.0f} s: {tally.answers} answers, {len(tally.wrong)} wrong, {len(tally.errors)} "
            f"errors, {len(tally.repairs_ms)} repairs; {dict(trouble.happened)}"
        )
    trouble.end()
    clients.stop()
    gc.collect()
    tally = clients.tally
    kv_left = wait_for_free_kv(checkpoint, directory)
    before, after = compared(seen, began, time.monotonic(), samples(peers, lasting))
    minutes = (time.monotonic() - began) / 60
    print(f"{minutes:.1f} minutes, {PEERS} daemons, {CLIENTS} clients: {tally.answers} answers of {NEW_TOKENS} tokens")
    print(f"trouble: {dict(trouble.happened)}; repairs: {len(tally.repairs_ms)}, by cause {dict(tally.causes)}")
    if tally.repairs_ms:
        print(f"a repair took {statistics.median(tally.repairs_ms):.0f} ms (median), {max(tally.repairs_ms):.0f} (max)")
    print(f"blocks that no daemon served were served again after {restored_s:.0f} s")
    print(f"gradients of a LoRA that were compared: {tally.gradients}")
    print("| nobody got a token from, s | for, s | what sessions did (share of samples) |\n|---|---|---|")
    for gap in sorted(clients.clock.gaps, key=lambda gap: -gap.length_s)[:5]:
        looks = max(1, gap.doing.total())
        doing = ", ".join(f"{what} {100 * count // looks} %" for what, count in gap.doing.most_common(3))
        print(f"| {gap.began_s:.0f} | {gap.length_s:.1f} | {doing} |")
    print(f"wrong answers: {len(tally.wrong)}; answers lost by an error: {len(tally.errors)}")
    print(f"sessions left on daemons after the clients had left: {kv_left}")
    some = seen[:: max(1, len(seen) // 12)]
    print("| MiB held after so many s |", *(f"{at - began:.0f} |" for at, _ in some))
    print("|---" * (len(some) + 1) + "|")
    for name in before:
        print(f"| {name} |", *(f"{held[name].rss_mib:.0f} |" for _, held in some))
    print("before: the maximum in the third quarter; after: at the end")
    print("| process | MiB before | after | threads before | after | descriptors before | after |")
    print("|---|---|---|---|---|---|---|")
    for name, sample in before.items():
        later = after[name]
        print(
            f"| {name} | {sample.rss_mib:.0f} | {later.rss_mib:.0f} | {sample.threads} | {later.threads} "
            f"| {sample.descriptors} | {later.descriptors} |"
        )
        if later.rss_mib > sample.rss_mib + MAX_GROWTH_MIB:
            failures.append(f"{name} grew by {later.rss_mib - sample.rss_mib:.0f} MiB")
        if later.threads > sample.threads + 4 or later.descriptors > sample.descriptors + 16:
            failures.append(f"{name} has more threads or descriptors than before")
    failures += tally.errors + (tally.wrong if audits is None else audits.report())
    failures += [f"{kv_left} sessions were never freed"] if kv_left else []
    failures += ["blocks that were lost were never served again"] if restored_s is None else []
    return failures


def lose_blocks(
    lab: Lab,
    peers: LabPeers,
    directory: DhtDirectory,
    checkpoint: Checkpoint,
    trouble: Trouble,
    choices: random.Random,
) -> float:
    """Kills all daemons of some block. Returns the seconds until other daemons serve the block."""
    records = [record for record in directory.peers(checkpoint.fingerprint) if record.serves]
    hosts = {record.key.text: peers.host_of(record) for record in records}
    lasting = lab.hosts[1 : 1 + LASTING]
    servers = {
        block: {hosts[record.key.text] for record in records if record.start <= block < record.end}
        for block in range(checkpoint.num_blocks)
    }
    losable = [block for block, names in servers.items() if names.isdisjoint(lasting)]
    # Few enough that the others have memory for all blocks.
    losable.sort(key=lambda block: len(servers[block]))
    if not losable:
        say("every block is served by a daemon that is never killed: no block can be lost")
        return 0.0
    doomed = servers[losable[0]]
    say(f"killing {', '.join(sorted(doomed))}, which all serve block {losable[0]}")
    began = time.monotonic()
    trouble.take_away(sorted(doomed))
    gone = {key for key, host in hosts.items() if host in doomed}
    while True:
        living = [
            facts_of(record)
            for record in directory.peers(checkpoint.fingerprint)
            if record.serves and record.key.text not in gone
        ]
        if not missing_blocks(living, checkpoint.num_blocks):
            return time.monotonic() - began
        time.sleep(1.0)


def wait_for_free_kv(checkpoint: Checkpoint, directory: DhtDirectory) -> int:
    """The number of sessions that are still on daemons after all sessions should have ended."""
    deadline = time.monotonic() + 2 * DEFAULT_TTL_S
    while True:
        left = sum(record.sessions for record in directory.peers(checkpoint.fingerprint))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1.0)


def compared(
    seen: Sequence[tuple[float, dict[str, Sample]]], began: float, now: float, at_end: dict[str, Sample]
) -> tuple[dict[str, Sample], dict[str, Sample]]:
    """The maximum resources of each process in the third quarter of the time, and its resources at the end.

    In the third quarter the daemons have settled on their blocks and have met every size of message. Earlier growth
    says nothing about leaks, and takes longer on slower machines.
    """
    half, last = (began + share * (now - began) for share in (0.5, 0.75))
    before = dict(at_end)
    third = [held for at, held in seen if half <= at < last] or [at_end]
    for name in at_end:
        before[name] = functools.reduce(Sample.most, (held[name] for held in third))
    return before, at_end


def samples(peers: LabPeers, hosts: Sequence[str]) -> dict[str, Sample]:
    return {"client": Sample.of(), **{host: Sample.of(peers.pid(host)) for host in hosts}}


def ask_locally(checkpoint: Checkpoint) -> list[Question]:
    """Prompts with answers whose every token is the likeliest by a margin."""
    model: Any = load_whole(checkpoint, torch.float32)
    ids = checkpoint.tokenizer()(TEXT.read_text(), return_tensors="pt").input_ids
    choices = random.Random(1)
    questions: list[Question] = []
    while len(questions) < PROMPTS:
        length = choices.randrange(8, 200)
        begin = choices.randrange(0, ids.shape[1] - length)
        prompt = ids[:, begin : begin + length]
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(output.logits).topk(2).values
        if float((best[..., 0] - best[..., 1]).min()) > MIN_MARGIN:
            questions.append(Question(prompt, output.sequences))
    tuned: Any = with_lora(model)
    for question in questions:
        tuned.zero_grad()
        tuned(input_ids=question.answer, labels=question.answer, use_cache=False).loss.backward()
        question.gradients.update(gradients_of(tuned))
    return questions


def with_lora(model: Any) -> Any:
    """A model with a LoRA whose initial values are always the same."""
    torch.manual_seed(7)
    options = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, options)


def gradients_of(tuned: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in tuned.named_parameters() if value.grad is not None}


def worst_error(tuned: Any, wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference from the expected gradients, as a share of the largest value of the tensor."""
    got = gradients_of(tuned)
    if got.keys() != wanted.keys():
        return float("inf")
    return max(float((got[name] - value).abs().max() / value.abs().max()) for name, value in wanted.items())


def kind_of(cause: str) -> str:
    """The cause of a repair, without the address in it."""
    return " ".join(word for word in cause.split() if not word.startswith("tcp://"))


def say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
