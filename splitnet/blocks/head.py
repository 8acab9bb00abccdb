"""The head of a causal model in generation, and the loss in training.

Every token reads all of the head's weight, which for large vocabularies is larger than many blocks. Threads that
generate at the same time read it together, as the peers read their blocks.

Logits are by far the largest tensors of a client that trains. So the loss is computed for some positions at a time:
their logits give their loss and, in the same memory, their gradient, which goes back through the head at once. Only the
gradient with respect to the hidden states is kept. Positions without a label are left out.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from scheduler.batching import BatchingDelay
from splitnet.blocks.screen import Screen
from splitnet.quant.choose import NARROW, WeightChoice
from splitnet.quant.device import end_threads, seconds_after_work
from splitnet.quant.forms import FloatForm, WeightForm
from splitnet.quant.linear import QuantizedLinear, sizes_of
from splitnet.quant.native import has_kernel_for, multiply_floats

CHANGES_S = 1.0
"""Seconds without use after which a weight is compared with its copy as a whole, because torch does not report all
changes, such as changes by `weight.data`. A change of the whole weight is seen at once, a change of some rows when a
call begins."""

STATES = 64  # states after which the usual sizes of their numbers are known well enough for a screen
LEAST_NUMBERS = 2**23  # numbers of a head from which a screen saves more than its own steps take
MOST_PAUSE = 64  # most rows without a screen after a row that the screen did not decide
_checking = threading.Lock()
_SUMMED_ROWS = 256  # rows of a weight that are summed at a time, so that intermediate results take little memory
_SAMPLE = 1024  # numbers that are compared before every product
MOST_ROWS = 16  # maximum rows of all threads in a shared product; with more rows, products of matrices are faster


@dataclass(slots=True)
class _ProductCall:
    rows: Tensor
    thread: int
    product: Tensor | None = None
    error: Exception | None = None


class SharedProduct:
    """Multiplies the rows of several threads with one weight, in one product for all threads that wait.

    After "Flat combining and the synchronization-parallelism tradeoff" (Hendler et al., SPAA 2010): one of the waiting
    threads does the work of all. `multiply`, `[rows, inputs]` -> `[rows, outputs]`, must give each row the same result
    whichever other rows are in the product.
    """

    def __init__(self, multiply: Callable[[Tensor], Tensor]) -> None:
        self._multiply = multiply
        self._waiting: deque[_ProductCall] = deque()
        self._working = threading.Lock()
        self._delay = BatchingDelay()

    def __call__(self, rows: Tensor) -> Tensor:
        """`[rows, inputs]` -> `[rows, outputs]`, without gradients. Raises the errors that `multiply` raises."""
        call = _ProductCall(rows, threading.get_ident())
        self._waiting.append(call)
        with self._working:
            while call.product is None and call.error is None:
                self._multiply_waiting()
        if call.error is not None:
            raise call.error
        assert call.product is not None
        return call.product

    def _multiply_waiting(self) -> None:
        waiting = 0
        while len(self._waiting) > waiting and (delay_s := self._delay.delay_s(len(self._waiting))):
            waiting = len(self._waiting)
            time.sleep(delay_s)
        began, computed = time.perf_counter(), time.thread_time()
        calls = [self._waiting.popleft()]
        rows = len(calls[0].rows)
        while self._waiting and rows + len(self._waiting[0].rows) <= MOST_ROWS:
            calls.append(self._waiting.popleft())
            rows += len(calls[-1].rows)
        try:
            # Other threads cannot change tensors that a thread in inference mode makes.
            with torch.inference_mode(False), torch.no_grad():
                given = calls[0].rows if len(calls) == 1 else torch.cat([call.rows for call in calls])
                products = self._multiply(given).split([len(call.rows) for call in calls])
            for call, product in zip(calls, products, strict=True):
                call.product = product
        except Exception as error:
            for call in calls:
                call.error = error
        now = seconds_after_work(calls[0].rows.device)
        self._delay.observe_pass((call.thread for call in calls), now - began, time.thread_time() - computed, now)


class _Sharing(nn.Module):
    """A layer whose threads share its products of few rows. A copy of the layer has its own shared product."""

    def forward(self, input: Tensor) -> Tensor:
        own: Any = self
        rows = input.reshape(-1, own.in_features)
        few = 0 < len(rows) <= MOST_ROWS and not torch.is_grad_enabled()
        multiply = self._multiplier() if few else None
        if multiply is None:
            return super().forward(input)
        product = self.__dict__.setdefault("_shared", SharedProduct(multiply))(rows)
        if own.bias is not None:
            product = product + own.bias
        return product.view(*input.shape[:-1], own.out_features)

    def _multiplier(self) -> Callable[[Tensor], Tensor] | None:
        """The function that multiplies few rows with the weight; None: threads do not share products."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shared"}


@dataclass(slots=True)
class _WeightCopy:
    """A copy of a weight, with the facts by which a change of the weight is found."""

    form: WeightForm | None  # the copy in 16 bits; None if it is not wanted, or the values do not allow it
    sums: Tensor  # of the bits of each row
    state: tuple[int, int]  # the weight's address and version
    some: Tensor  # the bits of a number of each row
    used_at: float = 0.0
    screen: Screen | None = None
    estimate: SharedProduct | None = None  # the product with the copy of `screen`


class Head(_Sharing, nn.Linear):
    """A head in the type that the model computes in. Its weight may be shared with the embedding and may be trained.
    `narrows`: few rows are multiplied with a 16-bit copy of a float32 weight."""

    def __init__(self, weight: Any, bias: Any, *, narrows: bool = False) -> None:
        outputs, inputs = weight.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight, self.bias = weight, bias
        self._narrows = narrows
        self._copy: _WeightCopy | None = None
        self._may_have_changed = False
        self._squares = torch.zeros(inputs, device="cpu")  # sums of squares of the states that it has seen
        self._unscreened = 0  # their number since the weight was new
        self._pause = self._waits = 0  # rows without a screen after rows that the screen did not decide

    def expect_changes(self) -> None:
        """Makes the next product look at each row of the weight, because some rows may have changed before the caller's
        call."""
        self._may_have_changed = True

    def best_logits(self, input: Tensor, count: int) -> Tensor:
        """As the call, `[..., inputs]` -> `[..., outputs]`, except that some logits are -inf: those that are less than
        the `count` largest of their row, also after a division by a temperature. See `splitnet.blocks.screen`."""
        rows = input.reshape(-1, self.in_features)
        plain = (
            self.bias is None
            and self.weight.numel() >= LEAST_NUMBERS
            and not self._forward_hooks
            and not self._forward_pre_hooks
        )
        few = 0 < len(rows) <= MOST_ROWS and not torch.is_grad_enabled()
        copied = self._screened(rows) if few and plain and has_kernel_for(self.weight) else None
        if copied is None or copied.screen is None or copied.estimate is None:
            return self(input)
        found: list[Tensor] = []
        for row, estimates in zip(rows, copied.estimate(rows.float()), strict=True):
            logits = copied.screen.best_logits(row, estimates, count)
            self._pause = 0 if logits is not None else min(MOST_PAUSE, 2 * self._pause + 1)
            self._waits = self._pause
            found.append(self(row) if logits is None else logits)
        return torch.stack(found).view(*input.shape[:-1], self.out_features)

    def _screened(self, rows: Tensor) -> _WeightCopy | None:
        """The copy of the weight that has a screen, which a thread makes when enough states were seen; None: none."""
        with _checking:
            if self._waits:
                self._waits -= 1
                return None
            screened = self._copy is not None and self._copy.screen is not None
            if screened and (copied := self._checked()).screen is not None:
                return copied
            self._squares = self._squares + rows.float().square().sum(0)
            before, self._unscreened = self._unscreened, self._unscreened + len(rows)
            if before < STATES <= self._unscreened:
                weight, sizes = self._checked(), self._squares.sqrt()
                threading.Thread(target=self._make_screen, args=(weight, sizes), daemon=True).start()
        return None

    def _make_screen(self, copied: _WeightCopy, sizes: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            weight = copied.form.weight if isinstance(copied.form, FloatForm) else self.weight.detach()
            screen = Screen.if_faster(weight, sizes)
        if screen is not None:
            copied.estimate, copied.screen = SharedProduct(screen.copy.multiply), screen
        end_threads()

    def _multiplier(self) -> Callable[[Tensor], Tensor] | None:
        return self._multiply if has_kernel_for(self.weight) else None

    def _multiply(self, rows: Tensor) -> Tensor:
        if not self._narrows or self.weight.dtype != torch.float32:
            return multiply_floats(rows, self.weight)
        with _checking:
            narrow = self._checked().form
        return multiply_floats(rows, self.weight) if narrow is None else narrow.multiply(rows)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_copy": None, "_unscreened": 0}

    def _checked(self) -> _WeightCopy:
        """The copy of the weight, made again if the weight has changed."""
        weight, now = self.weight.detach(), time.monotonic()
        bits = weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)
        copied, looks = self._copy, self._may_have_changed
        self._may_have_changed = False
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        some = bits.view(-1)[:: max(1, self.in_features - 1)]  # a step shorter than a row samples every row
        every = 1 if looks else max(1, len(some) // _SAMPLE)
        used_at = copied.used_at if copied is not None and copied.state == state else -math.inf
        if copied is None or now - used_at > CHANGES_S or not torch.equal(some[::every], copied.some[::every]):
            sums = torch.cat([rows.sum(-1) for rows in bits.split(_SUMMED_ROWS)])
            if copied is not None and torch.equal(sums, copied.sums):
                copied.state, copied.some = state, some.clone()
            else:
                narrows = self._narrows and weight.dtype == torch.float32
                form = FloatForm.narrowest(weight) if narrows else None
                copied = self._copy = _WeightCopy(form, sums, state, some.clone())
                self._unscreened = 0
        copied.used_at = now
        return copied


class QuantizedHead(_Sharing, QuantizedLinear):
    """A head that holds its weight in another weight format."""

    def _multiplier(self) -> Callable[[Tensor], Tensor] | None:
        return self.held.multiply if self.held.rows_are_independent else None


def hold_head(model: PreTrainedModel, weights: WeightChoice) -> None:
    """Gives a causal model a head for threads that generate, in the weight format of `weights`.

    With "auto" the head also keeps its weight, for gradients and many rows. Otherwise, an embedding that shares the
    weight keeps a separate weight, if the format differs.
    """
    head: Any = model.get_output_embeddings()
    if isinstance(head, QuantizedLinear):
        if weights.as_stored or (weights.forms and weights.form_for(head.out_features, head.in_features) is None):
            model.set_output_embeddings(QuantizedHead.holding(head, head.held, weights.device))
            return
        plain: Any = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(head.held.dequantised(head.weight.dtype)), head.bias
        model.set_output_embeddings(head := plain)
    sizes = sizes_of(head)
    if sizes is None:
        return
    form = weights.form_for(*sizes)
    if form is not None and not weights.as_stored:
        bias = head.bias is not None
        held = QuantizedHead(sizes[1], sizes[0], form, transposed=False, bias=bias, dtype=head.weight.dtype)
        held.bias, held.weight = head.bias, head.weight
        model.set_output_embeddings(held)
    elif type(head) is nn.Linear and has_kernel_for(head.weight):
        model.set_output_embeddings(Head(head.weight, head.bias, narrows=form == NARROW))


IGNORED = -100  # the label of a position without loss, as in transformers
# Bytes of the logits of a part in float32. Some families make several tensors of that size from the logits.
PART_BYTES = 32 * 2**20
Score = Callable[[Tensor], Tensor]
"""Hidden states `[positions, hidden]` -> logits `[positions, vocabulary]`."""


def loss_in_parts(
    hidden: Tensor,
    labels: Tensor,
    score: Score,
    vocabulary: int,
    *,
    trained: Sequence[Tensor] = (),
    items: Tensor | float | None = None,
    part_bytes: int = PART_BYTES,
) -> Tensor:
    """The cross-entropy of each position and the label of the next one, as in `ForCausalLMLoss` of transformers.

    Args:
        hidden, labels: `[batch, positions, hidden]`; `[batch, positions]`, `IGNORED` where nothing is learned.
        score: applies the head to each position; it records gradients where they are enabled.
        vocabulary: the number of logits of a position.
        trained: tensors that `score` may train; a tensor gets a gradient if `score` uses it.
        items: the divisor of the sum; None: the number of labels.

    Returns a scalar, float32. Raises ValueError if labels have another shape.
    """
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels must be [batch, positions] = {list(hidden.shape[:2])}, not {list(labels.shape)}")
    if not torch.is_grad_enabled():
        hidden, trained = hidden.detach(), ()
    following = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(hidden.device)
    learned = following != IGNORED
    positions = max(1, part_bytes // (vocabulary * torch.float32.itemsize))
    total: Any = _Sum.apply(score, positions, hidden[learned], following[learned], *trained)
    if items is None:
        return total / learned.sum()
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


class _Sum(torch.autograd.Function):
    """The sum over positions. Gradients are computed in the forward pass, for a sum whose own gradient is 1."""

    @staticmethod
    def forward(ctx: Any, score: Score, positions: int, hidden: Tensor, labels: Tensor, *trained: Tensor) -> Tensor:
        _, _, by_hidden, _, *by_trained = ctx.needs_input_grad
        wanted = [tensor for tensor, needed in zip(trained, by_trained, strict=True) if needed]
        gradient = torch.empty_like(hidden) if by_hidden else None
        found: list[Tensor | None] = [None] * len(wanted)
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(labels), positions):
            part = slice(begin, begin + positions)
            given = hidden[part].detach().requires_grad_(by_hidden)
            with torch.set_grad_enabled(by_hidden or bool(wanted)):
                logits = score(given)
            losses[part], by_logits = _entropy(logits, labels[part])
            if not logits.requires_grad:
                continue
            leaves = [*([given] if by_hidden else []), *wanted]
            grown = list(torch.autograd.grad(logits, leaves, by_logits.to(logits.dtype), allow_unused=True))
            if gradient is not None:
                gradient[part] = grown.pop(0)
            for index, one in enumerate(grown):
                before = found[index]
                found[index] = one if before is None or one is None else before.add_(one)
        ctx.save_for_backward(gradient, *found)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (factor,) = gradients
        gradient, *found = (None if saved is None else saved * factor for saved in ctx.saved_tensors)
        by_trained = [found.pop(0) if needed else None for needed in ctx.needs_input_grad[4:]]
        return None, None, gradient, None, *by_trained


def _entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each position, and the gradient of their sum with respect to the logits, which overwrites the
    logits."""
    # torch raises an error if the backward pass needs the logits: changes of a detached tensor count as its changes.
    scores = logits.detach().float()
    labels = labels[:, None]
    largest = scores.amax(dim=-1, keepdim=True)
    chosen = scores.gather(1, labels) - largest
    total = scores.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    scores.div_(total).scatter_add_(1, labels, torch.full_like(chosen, -1))
    return (total.log() - chosen)[:, 0], scores
