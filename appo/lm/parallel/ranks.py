"""Several processes that train one agent, each with a copy of the models: who does what, and how their results meet.

All processes ("ranks") run the same program on the same data. Only what takes long is divided: sampling, passes over
rollouts, scoring, and gradients. Its results are gathered, so that every rank holds all of them and goes on as a
process on its own would. Whatever follows from them (advantages, fault checks, the anchor's decision) is then the same
everywhere without being sent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Work = Callable[[slice], Sequence[Any]]  # from rows to columns: tensors or lists with an entry for each row


class RanksError(RuntimeError):
    """The processes of a job cannot go on together: one of them has ended, or they have come apart."""


class Ranks:
    """A process on its own: every share is everything, and every verb returns what it is given.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
    """

    rank, size = 0, 1

    def share(self, count: int) -> slice:
        """Which of `count` rows are this rank's: consecutive ones, nearly as many as any other rank's."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def parts(self, count: int, size: int = 0) -> list[tuple[Tensor, float]]:
        """This rank's share of `count` rows, at most `size` at a time (0: all at once), and the weight of each part."""
        rows = torch.arange(count, device="cpu")[self.share(count)]
        return [(part, 1.0) for part in rows.split(size or count)] if len(rows) else []

    def divide(self, count: int, work: Work) -> Sequence[Any]:
        """What `work` makes of `count` rows; each rank does its share, and gets the whole.

        Columns are tensors, which are padded with zeros to the longest of all ranks', or lists.
        """
        return work(slice(count))

    def gather(self, part: list[Any]) -> list[Any]:
        """The lists of all ranks, one after another."""
        return part

    def sum_gradients(self, parameters: Sequence[nn.Parameter], numbers: dict[str, float]) -> dict[str, float]:
        """Adds the gradients of all ranks up, in place, and returns the sums of their numbers.

        Args:
            parameters: in the same order on all ranks; one without a gradient counts as zeros.
            numbers: under the same names on all ranks.
        """
        return numbers

    def clip_gradients(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Scales the gradients, in place, to a norm of at most `limit`; returns the norm that they had together."""
        return nn.utils.clip_grad_norm_(parameters, limit).item()

    def begin(self, *modules: nn.Module) -> None:
        """Makes the modules ready to be trained: their trained weights become rank 0's. May replace parameters."""

    def gathered(self) -> AbstractContextManager[None]:
        """Within this block ranks may make passes without gradients, each as many as it likes."""
        return nullcontext()

    def swap(self, parameter: nn.Parameter, other: Tensor) -> Tensor:
        """Gives the parameter the values of `other`; returns a tensor with those that it had. `other` is used up."""
        before, parameter.data = parameter.data, other
        return before

    def equal(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Whether the tensors of each pair, of one shape and dtype, are equal, on all ranks."""
        return all(torch.equal(one, other) for one, other in pairs)

    def whole(self, state: Any) -> Any:
        """A nested state for the first rank to save: with whole tensors where ranks hold parts."""
        return state

    def part(self, state: Any) -> Any:
        """The reverse of `whole`, for every rank: what this rank holds of a saved state."""
        return state

    def check_same(self, what: str, found: object) -> None:
        """Raises RanksError, which names `what`, if another rank has found something else."""

    def check_weights(self, tensors: Sequence[Tensor]) -> None:
        """Raises RanksError if another rank's tensors differ in a bit."""

    def largest(self, number: int) -> int:
        """The largest of the numbers of all ranks."""
        return number


class Joined(Ranks):
    """One process of several, in torch.distributed's default group, which exists.

    Every verb but `share` may be a meeting, so all ranks call them in the same order. A meeting raises RanksError if a
    rank has ended.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def divide(self, count: int, work: Work) -> Sequence[Any]:
        """As `Ranks.divide`. Where there are fewer rows than ranks, every rank does them all."""
        if count < self.size:
            return work(slice(count))
        return [self._joined(column) for column in work(self.share(count))]

    def gather(self, part: list[Any]) -> list[Any]:
        """As `Ranks.gather`."""
        parts: list[list[Any]] = [[] for _ in range(self.size)]
        with meeting():
            dist.all_gather_object(parts, part)
        return [entry for entries in parts for entry in entries]

    def _joined(self, column: Any) -> Any:
        """The column of all ranks."""
        if not isinstance(column, Tensor):
            return self.gather(list(column))
        sizes = torch.tensor(column.shape, device=column.device)
        shapes = [torch.empty_like(sizes) for _ in range(self.size)]
        with meeting():
            dist.all_gather(shapes, sizes)
        padded = column.new_zeros(torch.stack(shapes).amax(0).tolist())
        padded[tuple(map(slice, column.shape))] = column
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with meeting():
            dist.all_gather([_as_bytes(part) for part in parts], _as_bytes(padded))
        return torch.cat([part[: int(shape[0])] for part, shape in zip(parts, shapes, strict=True)])

    def sum_gradients(self, parameters: Sequence[nn.Parameter], numbers: dict[str, float]) -> dict[str, float]:
        """As `Ranks.sum_gradients`, in one all-reduce; needs the memory of the gradients once more."""
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        told = torch.tensor(list(numbers.values()), dtype=parts[0].dtype, device=parts[0].device)
        together = torch.cat([*parts, told])
        with meeting():
            dist.all_reduce(together)
        *sums, told = together.split([*map(len, parts), len(told)])
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.view_as(parameter)
        return dict(zip(numbers, told.tolist(), strict=True))

    def begin(self, *modules: nn.Module) -> None:
        """As `Ranks.begin`."""
        self.copy_first([p for module in modules for p in module.parameters() if p.requires_grad])

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites the tensors with those of rank 0, and checks that they arrived."""
        with meeting():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)
        self.check_weights(tensors)

    def equal(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """As `Ranks.equal`."""
        return not self.largest(int(not super().equal(pairs)))

    def check_same(self, what: str, found: object) -> None:
        """As `Ranks.check_same`."""
        others = self.gather([repr(found)])  # as text: NaN is the same as NaN
        if any(other != others[0] for other in others):
            seen = "; ".join(f"process {rank}: {other[:80]}" for rank, other in enumerate(others))
            raise RanksError(f"the processes of this job have come apart: {what} differ ({seen})")

    def check_weights(self, tensors: Sequence[Tensor]) -> None:
        """As `Ranks.check_weights`."""
        self.check_same("the trained weights", _digest(tensors))

    def largest(self, number: int) -> int:
        """As `Ranks.largest`."""
        return int(max(self.gather([number])))


@contextmanager
def meeting() -> Iterator[None]:
    """Turns the errors of a meeting that some rank does not come to into RanksError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        line, _, _ = str(error).partition("\n")
        reason = re.sub(r"^\[\S*\] |\. This is.*", "", line)  # without gloo's file and guess
        raise RanksError(f"another process of this job has ended, or does not answer ({reason[:100]})") from error


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, whatever its type: not every backend gathers booleans."""
    return tensor.view(-1).view(torch.uint8)


def _digest(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors, equal for the same bits only."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(_as_bytes(tensor.detach().contiguous()).cpu().numpy().data)
    return found.hexdigest()
