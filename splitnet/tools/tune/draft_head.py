"""The work of `tune --draft-head`: an EAGLE-3 head learns the model's next tokens from the model's last hidden states.

The peers run one forward pass per text. The states stay on disk, so that further epochs need no peer. The head of
EAGLE-3 (Li et al., arXiv:2503.01840) is trained only on the last hidden state, which the client receives anyway, and
its output is limited to the most frequent tokens (FR-Spec, arXiv:2502.14856).
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn
from transformers import LlamaConfig

from splitnet.blocks.client_part import ClientPart, client_part_of, load_client_part
from splitnet.checkpoint.chat_template import render
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.connection import ModelConnection
from splitnet.drafts.eagle import EagleHead, Shape
from splitnet.errors import SplitnetError
from splitnet.hf.causal_lm import RemoteCausalLM, attached
from splitnet.paths import public_name
from splitnet.quant.packed_tensor import PackedTensor
from splitnet.tools.tune.data import Examples
from splitnet.tools.tune.folder import WORK, TuningFolder
from splitnet.tools.tune.job import TuningProgress, digest, end_if, stop_signals, take_steps
from splitnet.tools.tune.methods import Schedule, TrainingSettings
from splitnet.tools.tune.run import IGNORED, Encoded, Encoder, TuningRun, collate, pad_of
from splitnet.tools.tune.states import States, parts_of, read, states_of

LONGEST_TEXT = 512  # Default of --max-length, in tokens
TOGETHER = 32  # Number of texts that are generated together, and stored in one file
PASS_POSITIONS = 4096  # Maximum number of positions of texts in one pass through the blocks
ROWS = 64  # Number of rows of logits that are computed at a time, to bound memory
PACK = 512  # Maximum number of positions that the head processes together in training
DEPTH = 5  # Number of consecutive tokens that the head learns to draft
DECAY = 0.8  # Factor by which the weight of the loss decreases from each drafted token to the next
CHAINS = 4  # One of this many positions is continued after the first drafted token
HELD_OUT = 50  # One of this many texts is held out
BATCH = 4  # Packs per step
TEMPERATURE = 0.7  # Temperature of generated answers
BARREN = 5  # Number of rounds without a new prompt after which the search for prompts ends
LEARNING_RATE = 1e-3
WARMUP = 0.05  # Share of the steps in which the learning rate rises


@dataclass(frozen=True, slots=True)
class Pack:
    """Consecutive positions of texts, and access to the model's last hidden states.

    ids: `[n]`, token ids. texts: `[n]`, the number of the text at each position. learned: `[n]`, true for tokens that
    the head learns.
    """

    ids: Tensor
    texts: Tensor
    learned: Tensor
    read: Callable[[], Tensor]  # `[n, hidden]`


def packs_of(states: States) -> tuple[list[Pack], list[Pack]]:
    """Packs to learn from, and held-out packs."""
    learned: list[Pack] = []
    held_out: list[Pack] = []
    number = 0
    for path in states.files:
        ids, flags, lengths = (read(path, name) for name in ("ids", "learned", "lengths"))
        texts = torch.arange(number, number + len(lengths)).repeat_interleave(lengths.long())
        aside = texts % HELD_OUT == HELD_OUT - 1
        for packs, chosen in ((learned, ~aside), (held_out, aside)):
            for places in chosen.nonzero()[:, 0].split(PACK):
                if len(places):
                    states_there = partial(_states_at, path, places)
                    packs.append(Pack(ids[places].long(), texts[places], flags[places], states_there))
        number += len(lengths)
    return learned, held_out


def frequent(states: States, count: int, vocabulary: int) -> Tensor:
    """The ids of the most frequent learned tokens, in ascending order; of equally frequent tokens, the lower ids."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for ids, learned in zip(states.all("ids"), states.all("learned"), strict=True):
        counts += torch.bincount(ids[learned], minlength=vocabulary)
    return counts.argsort(descending=True, stable=True)[:count].sort().values


def _states_at(path: Path, places: Tensor) -> Tensor:
    first = int(places[0])
    return states_of(path, first, int(places[-1]) + 1 - first)[places - first]


class _UnrolledAttention:
    """Attention of an unrolled head, as in the training-time test of EAGLE-3.

    First, each position attends to earlier positions of the same text. Then chains of drafted tokens continue from some
    positions: each step of a chain attends to the same positions as the first position of the chain, and to earlier
    steps of the chain. masked: `[n, n]`, true where a position does not attend to another.
    """

    def __init__(self, masked: Tensor) -> None:
        self._masked = masked
        self._first: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.beginnings: Tensor | None = None  # first positions of the chains, `[m]`; None: chains have not begun

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        masked, own = self._masked, self._own.setdefault(layer, [])
        if self.beginnings is None:
            self._first[layer] = keys, values
        else:
            own.append((keys, values))
            masked = masked[self.beginnings]
        first_keys, first_values = self._first[layer]
        grouped = queries.unflatten(0, (len(keys), -1)) * keys.shape[-1] ** -0.5
        count = masked.shape[1]
        scores = (grouped.flatten(1, 2) @ first_keys.mT).unflatten(1, grouped.shape[1:3]).float()
        own_scores = [(grouped * one[:, None]).sum(-1, keepdim=True, dtype=torch.float32) for one, _ in own]
        weights = torch.cat((scores.masked_fill(masked, -torch.inf), *own_scores), dim=-1).softmax(dim=-1)
        weights = weights.to(values.dtype)
        mixed = (weights[..., :count].flatten(1, 2) @ first_values).unflatten(1, grouped.shape[1:3])
        for place, (_, one) in enumerate(own, count):
            mixed = mixed + weights[..., place, None] * one[:, None]
        return mixed.flatten(0, 1)


def unrolled(head: EagleHead, pack: Pack, states: Tensor, followed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields outputs of the head, `[m, hidden]`, and positions `[m]`, for the first to the last drafted token.

    The model's states at these positions determine the right tokens. followed: `[n]`, true for positions from which
    more than one token is drafted, if the text is long enough.
    """
    ids, texts = pack.ids.to(states.device), pack.texts.to(states.device)
    places = torch.arange(len(ids) - 1, device=states.device)
    masked = (texts[:-1, None] != texts[None, :-1]) | (places[:, None] < places)
    attention = _UnrolledAttention(masked)
    cosines, sines = head.rotary(0, len(ids) + DEPTH)
    outputs = head(
        head.embed(ids[1:]), head.embed_features(states[:-1]), (cosines[places], sines[places]), attention.attend
    )
    learned = pack.learned.to(states.device)

    def goes_on(depth: int) -> Tensor:
        """Positions after which `depth` drafted tokens and one more token belong to the same text."""
        last = len(ids) - depth - 2
        if last <= 0:
            return places[:0]
        begin = places[:last]
        return begin[(texts[begin] == texts[begin + depth + 2]) & learned[begin + 2]]

    first = goes_on(0)
    yield outputs[first], first + 1
    beginnings = goes_on(DEPTH - 1)
    beginnings = beginnings[followed.to(states.device)[beginnings]]
    if not len(beginnings):
        return
    attention.beginnings = beginnings
    hidden = outputs[beginnings]
    for depth in range(1, DEPTH):
        at = beginnings + depth
        hidden = head(head.embed(ids[at + 1]), hidden, (cosines[at], sines[at]), attention.attend)
        yield hidden, at + 1


class HeadRun(TuningRun):
    """Trains a draft head; rows are packs.

    unembedding: `[draft vocabulary, hidden]`, rows of the model's own head, which computes the target logits from the
    model's states.
    """

    def __init__(
        self,
        head: EagleHead,
        packs: Sequence[Pack],
        settings: TrainingSettings,
        unembedding: Tensor,
        halves: bool | None = None,
    ) -> None:
        rows: Any = packs
        super().__init__(head, rows, settings, pad=0, device=unembedding.device)
        self._unembedding = unembedding
        self.halves = self._are_halves_faster() if halves is None else halves

    def _loss(self, rows: Sequence[Any], *, backward: bool) -> float:
        total = 0.0
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.done)
        device = self._unembedding.device.type
        for pack in rows:
            with torch.set_grad_enabled(backward), torch.autocast(device, torch.bfloat16, self.halves):
                loss = self._loss_of(pack, generator)
                if backward and loss.requires_grad:
                    (loss / len(rows)).backward()
            total += float(loss.detach()) / len(rows)
        return self._finite(total)

    def _loss_of(self, pack: Pack, generator: torch.Generator) -> Tensor:
        states = pack.read().to(self._unembedding.device)
        expected = expected_logits(self.model.model, self._unembedding, states)
        followed = torch.rand(len(states), generator=generator) < 1 / CHAINS
        outputs, places = zip(*unrolled(self.model, pack, states, followed), strict=True)
        counts = [(DECAY**depth, len(each)) for depth, each in enumerate(places) if len(each)]
        if not counts:
            return states.new_zeros(())
        weights = [states.new_full((count,), counted / count) for counted, count in counts]
        # One matrix product for all outputs, because the product with the output head is most of the work.
        logits = self.model.logits(torch.cat(outputs))
        return divergence(logits, expected, torch.cat(places), torch.cat(weights))

    def _are_halves_faster(self) -> bool:
        """Whether a step in bfloat16 takes less time than in float32, on this machine."""
        seconds = [0.0, 0.0]
        for halves in (True, False, True, False):  # the first two steps also allocate memory
            self.halves, began = halves, time.perf_counter()
            self._loss(self._rows_of(0)[:1], backward=True)
            seconds[halves] = time.perf_counter() - began
        self.model.zero_grad()
        return seconds[True] < seconds[False]


def expected_logits(model: ClientPart, unembedding: Tensor, states: Tensor) -> Tensor:
    """The model's logits of the draft vocabulary, `[n, draft vocabulary]`."""
    with torch.no_grad():
        return model.norm(states).to(unembedding.dtype) @ unembedding.T


class _Divergence(torch.autograd.Function):
    """The divergence. Gradients are computed in the forward pass, some rows at a time, because logits are by far the
    largest tensors."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, expected: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        gradient, total = torch.empty_like(logits), torch.zeros((), device=logits.device)
        pieces = (each.split(ROWS) for each in (logits, places, weights[:, None], gradient))
        for rows, some, weight, out in zip(*pieces, strict=True):
            wanted = expected[some].float().log_softmax(dim=-1)
            found, shares = rows.float().log_softmax(dim=-1), wanted.exp()
            total += (shares * wanted.sub_(found)).sum(dim=-1) @ weight[:, 0]
            out.copy_(found.exp_().sub_(shares).mul_(weight))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def divergence(logits: Tensor, expected: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of the distributions of `logits`, `[m, v]`, from the distributions of the rows
    `places` of the logits `expected`, `[n, v]`. The sum over rows is weighted with `weights`, `[m]`.
    """
    divergence: Any = _Divergence.apply(logits, expected, places, weights)
    return divergence


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality on held-out texts.

    acceptance: for each drafted token, how often the model chooses the same token, if all earlier drafted tokens were
    right. per_trip: tokens per round trip with all drafted tokens, including the model's own token.
    """

    loss: float
    acceptance: tuple[float, ...]
    per_trip: float

    def __str__(self) -> str:
        shares = " ".join(f"{share:.2f}" for share in self.acceptance)
        return f"held-out loss {self.loss:.3f}, acceptance {shares}, {self.per_trip:.2f} tokens per round trip"


@torch.no_grad()
def evaluate(head: EagleHead, packs: Sequence[Pack], unembedding: Tensor) -> Quality:
    model = head.model
    reached, right, loss = torch.zeros(DEPTH), torch.zeros(DEPTH), 0.0
    for pack in packs:
        states = pack.read().to(unembedding.device)
        expected = expected_logits(model, unembedding, states)
        chosen = torch.cat([model.logits(some).argmax(dim=-1) for some in states.split(64)])
        # The index is the position before a drafted token.
        alive = torch.ones(len(states), dtype=torch.bool, device=states.device)
        for depth, (outputs, places) in enumerate(unrolled(head, pack, states, alive)):
            logits = head.logits(outputs)
            drafted = logits.argmax(dim=-1)
            ids = drafted if head.draft_vocabulary is None else head.draft_vocabulary[drafted]
            reached[depth] += int(alive[places - 1].sum())
            now = alive[places - 1] & (ids == chosen[places])
            right[depth] += int(now.sum())
            alive = torch.zeros_like(alive).index_fill_(0, places[now], True)
            if not depth and len(places):
                loss += float(divergence(logits, expected, places, states.new_ones(len(places))))
    acceptance = (right / reached.clamp(min=1)).tolist()
    per_trip = 1 + sum(torch.tensor(acceptance).cumprod(0).tolist())
    return Quality(loss / max(1.0, float(reached[0])), tuple(acceptance), per_trip)


@torch.no_grad()
def unembedding_of(model: ClientPart, ids: Tensor, device: torch.device) -> Tensor:
    """The rows of the model's own head for tokens `ids`, `[len(ids), hidden]` float32, for any format of the head."""
    unit = torch.eye(model.hidden_size, device=device)
    base = model.head(torch.zeros(1, model.hidden_size, device=device))
    columns = [(model.head(rows) - base)[:, ids].float() for rows in unit.split(64)]
    return torch.cat(columns).T.contiguous()


@torch.no_grad()
def new_head(model: ClientPart, config: Any, ids: Tensor, unembedding: Tensor) -> EagleHead:
    """A new draft head for tokens `ids`.

    Weights are initialized with torch's random numbers, except for the projection of the features, which is the
    identity, and the output head, which is the model's.
    """
    hidden, all_heads = model.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // all_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or all_heads
    if hidden % all_heads or all_heads % kv_heads or size % 2:
        all_heads, kv_heads, size = 1, 1, hidden - hidden % 2
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 1e4)
    layer = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=getattr(config, "intermediate_size", None) or 3 * hidden,
        num_hidden_layers=1,
        num_attention_heads=all_heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        vocab_size=model.vocabulary,
        rms_norm_eps=1e-5,
        max_position_embeddings=getattr(config, "max_position_embeddings", None) or 4096,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
    )
    head = EagleHead(Shape(layer, (model.num_blocks,), len(ids)), model, ids if len(ids) < model.vocabulary else None)
    for parameter in head.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    head.fc.weight.copy_(torch.eye(hidden))
    head.lm_head.weight.copy_(unembedding)
    ones = torch.ones(1, hidden, device=unembedding.device)
    gain = model.norm(ones)
    if torch.allclose(model.norm(-ones), -gain):  # a norm without a bias
        head.norm.weight.copy_(gain[0])
    return head.to(unembedding.device)


@torch.no_grad()
def begin_as_last_block(head: EagleHead, checkpoint: Checkpoint) -> None:
    """Initializes the head's first layer with weights of the model's last block that have the same name and size.

    The head then learns faster. Only columns for features are initialized; the columns for the embedding stay random.
    """
    own = dict(head.layers[0].named_parameters())
    own["input_layernorm.weight"] = own.pop("hidden_norm.weight")
    names = {tensor.rest: tensor.name for tensor in checkpoint.block_tensors[-1] if tensor.rest in own}
    with checkpoint.store.load_tensors(names, torch.float32) as tensors:
        for name in names:
            given = tensors[name][...]
            given = given.to_floats() if isinstance(given, PackedTensor) else given
            if given.shape[-1] <= own[name].shape[-1] and given.shape[:-1] == own[name].shape[:-1]:
                own[name][..., -given.shape[-1] :] = given.to(own[name])


@torch.no_grad()
def client_part(checkpoint: Checkpoint, device: str) -> ClientPart:
    """Loads the client part.

    Raises SplitnetError if models of the family have more than a norm and a head after their blocks, because then the
    meaning of the hidden states is unknown.
    """
    blocks, shown = nn.Identity(), list[Tensor]()
    model = load_client_part(checkpoint, blocks, dtype=torch.float32, device=device)
    part = client_part_of(model)
    blocks.register_forward_hook(lambda *called: shown.append(called[-1]))
    ids = torch.arange(min(64, part.vocabulary), device=model.device)[None]
    chosen = model(input_ids=ids, use_cache=False).logits[0].argmax(dim=-1)
    known = part.norm is not None and part.head is not None
    told = part.logits(shown[0][0]).argmax(dim=-1) if known else None
    if told is None or int((told != chosen).sum()) > len(told) // 20:
        raise SplitnetError(
            f"models of the family {checkpoint.model_type!r} process the last hidden state in unknown ways, so "
            "no draft head can be trained for them: draft from the prompt (--speculate prompt-lookup)"
        )
    return part


@dataclass(frozen=True)
class DraftHeadTuning:
    """One call of the command, see its options. texts: the texts to learn from; with `generate`, prompts, if any."""

    texts: Examples | None
    generate: int
    epochs: int
    draft_vocabulary: int
    states_limit: int
    max_length: int | None
    learning_rate: float
    seed: int
    output: Path
    resume: bool
    join_args: Sequence[str]  # the arguments with which commands reach the model

    def run(self, connection: ModelConnection) -> None:
        """Trains to the last epoch, or until a signal stops the training. Raises SplitnetError; keeps finished work."""
        checkpoint = connection.checkpoint()
        room = checkpoint.max_positions or math.inf
        longest = self.max_length or int(min(LONGEST_TEXT, room))
        if longest > room:
            raise SplitnetError(f"{longest:,} tokens are more than the model's context of {room:,}: lower --max-length")
        writer = _Writer(self, checkpoint.tokenizer(), longest)
        facts = connection.facts_of(checkpoint)
        folder = TuningFolder(self.output / WORK)
        description = self._description(facts.fingerprint)
        folder.check_settings(description, resume=self.resume)
        device = connection.options.device
        part = client_part(checkpoint, device)
        folder.claim(description)
        states, progress = States(folder), TuningProgress(0)
        with stop_signals("file of states") as stopped:
            if not writer.has_all(states):
                with connection.swarm_of(facts) as swarm:
                    writer.write_states(states, attached(checkpoint, swarm, connection.options), progress, stopped)
        end_if(stopped, "Stopped")
        self._train(part, checkpoint, states, folder, torch.device(device))

    def _train(
        self, part: ClientPart, checkpoint: Checkpoint, states: States, folder: TuningFolder, device: torch.device
    ) -> None:
        packs, held_out = packs_of(states)
        if not packs or not held_out:
            raise SplitnetError(
                f"{states.texts} texts are too few to learn from and to hold out: give {HELD_OUT} or more"
            )
        torch.manual_seed(self.seed)
        ids = frequent(states, min(self.draft_vocabulary, part.vocabulary), part.vocabulary).to(device)
        unembedding = unembedding_of(part, ids, device)
        head = new_head(part, checkpoint.config, ids, unembedding)
        begin_as_last_block(head, checkpoint)
        size = max(1, min(BATCH, len(packs) // 8))
        steps = -(-self.epochs * len(packs) // size)
        settings = TrainingSettings(
            steps,
            self.learning_rate,
            batch_size=size,
            warmup_steps=int(WARMUP * steps),
            schedule=Schedule.COSINE,
            seed=self.seed,
        )
        saved = folder.load_checkpoint() if self.resume else None
        run = HeadRun(head, packs, settings, unembedding, saved[1]["halves"] if saved else None)
        best = saved[1]["best"] if saved else -1.0
        progress = TuningProgress(steps)

        def keep() -> None:
            tensors, facts = run.saved_state()
            folder.save_checkpoint(tensors, facts | {"halves": run.halves, "best": best})

        def look() -> None:
            nonlocal best
            epoch, former = (done * size // len(packs) for done in (run.done, run.done - 1))
            if epoch == former and run.done < steps:
                return
            if any(line["step"] == run.done and "epoch" in line for line in folder.metrics()):
                return
            quality = evaluate(head, held_out, unembedding)
            folder.add_metrics({"step": run.done, "epoch": epoch, **asdict(quality)})
            progress.say(f"epoch {epoch} of {self.epochs}: {quality}")
            if quality.per_trip > best:
                best = quality.per_trip
                head.save(self.output, public_name(checkpoint.source), checkpoint.config.architectures or [])
            keep()

        positions = sum(len(pack.ids) for pack in packs)
        told = f"draft head: {positions:,} positions, {'bfloat16' if run.halves else 'float32'}"
        take_steps(run, folder, progress, saved, told, look=look, keep=keep)
        command = ["splitnet", "generate", *self.join_args, "--speculate", f"eagle={self.output}", "..."]
        typer.echo(f"{best:.2f} tokens per round trip on held-out texts. The head is in {self.output}.")
        typer.echo(states.told_size)
        typer.echo(f"Use it: {shlex.join(command)}")

    def _description(self, fingerprint: str) -> dict[str, Any]:
        """The settings that identify a run."""
        left_out = ("texts", "output", "resume", "join_args")
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in left_out}
        return {"model": fingerprint, "data": digest(self.texts.path) if self.texts else None, **own}


class _Writer:
    """Provides the texts of a run, file by file: texts of the data, or texts that the model writes."""

    def __init__(self, tuning: DraftHeadTuning, tokenizer: Any, longest: int) -> None:
        self._tuning = tuning
        self._longest = longest
        self._encoder = Encoder(tokenizer, longest)
        self._tokenizer = tokenizer
        self._rows: list[Encoded] = []
        self._prompts: list[list[int]] = []
        texts = tuning.texts
        if texts is not None and tuning.generate:
            self._prompts = [self._prompt(texts, row) for row in texts.rows]
        elif texts is not None:
            self._rows = self._encoder.encode_file(texts)
        self._pad = pad_of(tokenizer)

    @property
    def wanted(self) -> int:
        return self._tuning.generate or len(self._rows)

    def has_all(self, states: States) -> bool:
        return states.texts >= self.wanted or states.nbytes >= self._tuning.states_limit

    def write_states(
        self, states: States, model: RemoteCausalLM, progress: TuningProgress, stopped: Sequence[int]
    ) -> None:
        """Writes files of states until all texts are done, no more states fit, or `stopped` is not empty."""
        began, before = time.monotonic(), states.texts
        progress.say(f"{self.wanted - before:,} texts, {TOGETHER} at a time: peers compute their states ...")
        while not self.has_all(states) and not stopped:
            number = len(states.files)
            if self._tuning.generate:
                rows = self._generated(model, number)[: self.wanted - states.texts]
            else:
                rows = self._rows[number * TOGETHER : (number + 1) * TOGETHER]
            states.add_texts(rows, last_states(model, rows, self._pad))
            done, seconds = states.texts, time.monotonic() - began
            left = (self.wanted - done) * seconds / (done - before)
            size = states.nbytes / 2**20
            progress.say(f"states of {done:,} of {self.wanted:,} texts, {size:,.0f} MiB, {left / 60:.0f} minutes left")
        if states.texts < self.wanted and not stopped:
            progress.say(f"--states-limit is reached: the head learns from {states.texts:,} of {self.wanted:,} texts")

    def _generated(self, model: RemoteCausalLM, number: int) -> list[Encoded]:
        """The texts of a file: prompts from the data in turn, or generated prompts, and the model's answers to them.

        Generated prompts: Magpie (Xu et al., arXiv:2406.08464).
        """
        for attempt in range(BARREN):
            torch.manual_seed((self._tuning.seed * 1_000_003 + number) * BARREN + attempt)
            if self._prompts:
                first = number * TOGETHER
                prompts = [self._prompts[(first + place) % len(self._prompts)] for place in range(TOGETHER)]
            elif self._tokenizer.chat_template:
                prompts = self._imagined(model)
            else:
                begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
                prompts = [[begin if begin is not None else end or 0]] * TOGETHER
            if prompts:
                answers = self._sample(model, prompts, self._longest // 2)
                return [
                    Encoded(prompt + answer, [IGNORED] * len(prompt) + answer)
                    for prompt, answer in zip(prompts, answers, strict=True)
                ]
        raise SplitnetError("the model writes no prompts of its own: give prompts with --data")

    def _imagined(self, model: RemoteCausalLM) -> list[list[int]]:
        """Generated prompts that are complete, including the text of the chat template before and after each prompt."""
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        whole = render(self._tokenizer, [{"role": "user", "content": mark}], answer=True)
        before, found, after = whole.partition(mark)
        if not found:
            raise SplitnetError("the model's chat template hides what a user says: give prompts with --data")
        opening = self._encoder.ids_of(before)
        written = self._sample(model, [opening] * TOGETHER, self._longest // 4, temperature=1.0)
        ended = [row[:-1] for row in written if row and row[-1] in self._ends(model)]
        texts = [self._tokenizer.decode(row, skip_special_tokens=True).strip() for row in ended]
        return [self._encoder.ids_of(before + text + after) for text in texts if text]

    def _sample(
        self, model: RemoteCausalLM, prompts: Sequence[list[int]], most: int, temperature: float = TEMPERATURE
    ) -> list[list[int]]:
        """The model's text after each prompt, including the end token if the text ends."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        output = model.generate(ids, attention_mask=mask, max_new_tokens=most, pad_token_id=self._pad, **how)
        ends = self._ends(model)
        answers: list[list[int]] = []
        for row in output[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            answers.append(row[: end + 1])
        return answers

    def _ends(self, model: RemoteCausalLM) -> set[int]:
        told = model.generation_config.eos_token_id
        return {self._tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])} - {None}

    def _prompt(self, texts: Examples, row: Any) -> list[int]:
        if texts.form != "chat" and not self._tokenizer.chat_template:
            ids = self._tokenizer(row.fields["prompt"])["input_ids"]
        else:
            prompt = [{"role": "user", "content": row.fields.get("prompt")}]
            messages = self._encoder.turns(texts, row) if texts.form == "chat" else prompt
            while messages[-1]["role"] == "assistant":
                messages.pop()
            ids = self._encoder.ids_of(self._encoder.rendered(texts, row, messages, True))
        if not 0 < len(ids) <= self._longest // 2:
            half = self._longest // 2
            texts.fail(row, f"{len(ids):,} tokens leave no room for an answer, {half:,} would: raise --max-length")
        return ids


def last_states(model: RemoteCausalLM, rows: Sequence[Encoded], pad: int) -> list[Tensor]:
    """The output of the last block for texts, `[len(ids), hidden]` each."""
    states: list[Tensor] = []
    for some in parts_of(rows, PASS_POSITIONS):
        batch = collate(some, pad, device=model.device)
        hidden = model.last_states(batch["input_ids"], batch["attention_mask"])
        states += [one[: len(row.ids)] for one, row in zip(hidden, some, strict=True)]
    return states
