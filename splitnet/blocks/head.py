"""The head of a causal model where it generates.

Every token reads all of the head's weight, which for large vocabularies is more than many blocks have. Threads that
generate at the same time read it together, as the peers read their blocks.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from scheduler.batching import BatchingDelay
from splitnet.quant.choose import NARROW, Weights
from splitnet.quant.device import seconds_after_work
from splitnet.quant.floats import FloatForm
from splitnet.quant.linear import QuantizedLinear, sizes_of
from splitnet.quant.native import has_kernel_for, multiply_floats
from splitnet.quant.weight_form import WeightForm

CHANGES_S = 1.0
"""A weight that was not used for so long is looked at as a whole: it may have been changed in ways of which torch does
not tell, such as `weight.data`. If all of it is, that is seen at once; if some rows are, when a call begins.
"""

_SUMMED_ROWS = 256
"""At a time: their sums take little memory."""

_SAMPLE = 1024
"""Numbers that are looked at for every product."""

MOST_ROWS = 16
"""Of all threads together; with more, products of matrices are faster."""


@dataclass(slots=True)
class _Call:
    rows: torch.Tensor
    thread: int
    product: torch.Tensor | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.product is not None or self.error is not None


class SharedProduct:
    """Multiplies the rows of several threads with one weight: those that come together go together.

    After "Flat combining and the synchronization-parallelism tradeoff" (Hendler et al., SPAA 2010): one of those who
    wait does the work of all.

    Args:
        multiply: `[rows, inputs]` -> `[rows, outputs]`; gives each row the same whatever others are with it.
    """

    def __init__(self, multiply: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._multiply = multiply
        self._waiting: deque[_Call] = deque()
        self._working = threading.Lock()
        self._delay = BatchingDelay()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`[rows, inputs]` -> `[rows, outputs]`, without gradients.

        Raises:
            Whatever `multiply` raises.
        """
        call = _Call(rows, threading.get_ident())
        self._waiting.append(call)
        with self._working:
            while not call.done:
                self._work()
        if call.error is not None:
            raise call.error
        assert call.product is not None
        return call.product

    def _work(self) -> None:
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
            # What a thread in inference mode makes, others could not change in place.
            with torch.inference_mode(False), torch.no_grad():
                given = calls[0].rows if len(calls) == 1 else torch.cat([call.rows for call in calls])
                products = self._multiply(given).split([len(call.rows) for call in calls])
            for call, product in zip(calls, products, strict=True):
                call.product = product
        except Exception as error:
            for call in calls:
                call.error = error
        now = seconds_after_work(calls[0].rows.device)
        self._delay.ran((call.thread for call in calls), now - began, time.thread_time() - computed, now)


class _Sharing(nn.Module):
    """A layer whose threads share its products of few rows. Copies share nothing with it."""

    @property
    def shared(self) -> SharedProduct:
        """Multiplies with the weight."""
        return self.__dict__.setdefault("_shared", SharedProduct(self._multiply))

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shared"}


@dataclass(slots=True)
class _Copy:
    """Of a weight: form, None if its values do not allow it; sums: of the bits of each row.

    state, some: its address and its version, and the bits of a number of each row, when it was used last.
    """

    form: WeightForm | None
    sums: torch.Tensor
    state: tuple[int, int]
    some: torch.Tensor
    used_at: float = 0.0


class Head(_Sharing, nn.Linear):
    """A head in the type that the model computes in; its weight may be the embedding's, too, and it may be trained.

    narrows: of a float32 weight there is a copy in 16 bits, which few rows are multiplied with.
    """

    def __init__(self, weight: Any, bias: Any, *, narrows: bool = False) -> None:
        outputs, inputs = weight.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight, self.bias = weight, bias
        self._narrows = narrows
        self._copy: _Copy | None = None
        self._may_have_changed = False

    def expect_changes(self) -> None:
        """The next product looks at each row: before the caller's call some may have been changed."""
        self._may_have_changed = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, self.in_features)
        few = 0 < len(rows) <= MOST_ROWS
        if not few or torch.is_grad_enabled() or not has_kernel_for(self.weight):
            return super().forward(input)
        product = self.shared(rows)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*input.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        narrow = self._narrowed() if self._narrows and self.weight.dtype == torch.float32 else None
        return multiply_floats(rows, self.weight) if narrow is None else narrow.multiply(rows)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_copy": None}

    def _narrowed(self) -> WeightForm | None:
        """The copy, made anew if the weight is another than it was made of."""
        weight, now = self.weight.detach(), time.monotonic()
        copied, bits, looks = self._copy, weight.view(torch.int32), self._may_have_changed
        self._may_have_changed = False
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        some = bits.view(-1)[:: max(1, self.in_features - 1)]  # steps that are shorter than rows leave out none
        every = 1 if looks else max(1, len(some) // _SAMPLE)
        used_at = copied.used_at if copied is not None and copied.state == state else -math.inf
        if copied is None or now - used_at > CHANGES_S or not torch.equal(some[::every], copied.some[::every]):
            sums = torch.cat([rows.sum(-1) for rows in bits.split(_SUMMED_ROWS)])
            same = copied is not None and torch.equal(sums, copied.sums)
            form = copied.form if copied is not None and same else FloatForm.narrowest(weight)
            copied = self._copy = _Copy(form, sums, state, some.clone())
        copied.used_at = now
        return copied.form


class QuantizedHead(_Sharing, QuantizedLinear):
    """A head whose weight is held in another form."""

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > MOST_ROWS or not self.held.alone_as_together:
            return self.held.multiply(rows)
        return self.shared(rows)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return self.held.multiply(rows)


def hold_head(model: PreTrainedModel, weights: Weights) -> None:
    """Gives a causal model a head for threads that generate, which holds its weight as is wished.

    With "auto" it keeps its weight as well, for gradients and many rows. Else an embedding that shares the weight keeps
    its own, if that is another form.
    """
    head: Any = model.get_output_embeddings()
    if isinstance(head, QuantizedLinear):
        if weights.as_stored or (weights.forms and weights.form_for(head.out_features, head.in_features) is None):
            model.set_output_embeddings(QuantizedHead.holding(head, head.held, weights.device))
            return
        head = _of_floats(head)
        model.set_output_embeddings(head)
    sizes = sizes_of(head)
    if sizes is None:
        return
    form = weights.form_for(*sizes)
    if form is not None and not weights.as_stored:
        outputs, inputs = sizes
        held = QuantizedHead(
            inputs, outputs, form, transposed=False, bias=head.bias is not None, dtype=head.weight.dtype
        )
        held.bias = head.bias
        held.weight = head.weight
        model.set_output_embeddings(held)
    elif type(head) is nn.Linear and has_kernel_for(head.weight):
        model.set_output_embeddings(Head(head.weight, head.bias, narrows=form == NARROW))


def _of_floats(head: QuantizedLinear) -> nn.Linear:
    plain: Any = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(head.held.dequantised(head.weight.dtype))
    plain.bias = head.bias
    return plain
