"""What an engine has learned, parameter by parameter: the fp32 weight and Adam's two moments, in the pieces that each
rank holds.

DeepSpeed keeps these in flat buffers that depend on the ZeRO stage and the number of ranks. A :class:`ParameterSlice`
says where in which parameter of the whole model some values belong, whatever the layout, so that a checkpoint of slices
can be read by any other layout. Reading and filling need no communication, but for the low-precision weights of ZeRO
1-2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dualtok.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn

    from dualtok.distributed.ranks import Ranks

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class ParameterSlice:
    """A contiguous part of a parameter."""

    name: str
    """The parameter's name in the whole model."""
    shape: tuple[int, ...]
    """The whole parameter's."""
    start: int
    """Place of the first value in the flattened parameter."""
    values: dict[str, torch.Tensor]
    """Kind (:data:`KINDS`) -> float32 [n] in host memory, a copy."""

    @property
    def length(self) -> int:
        """Number of values of each kind."""
        return len(self.values[WEIGHT])


class Source(Protocol):
    """Where the values come from when an engine is filled."""

    def read(self, name: str, kind: str, start: int, length: int) -> torch.Tensor:
        """Return float32 [length] values of a parameter from ``start`` on.

        Raises:
            CheckpointError: there is no such parameter, or it has another shape.
        """


class States(ABC):
    """The learned values of one engine on this rank.

    Args:
        engine: the DeepSpeed engine.
        parameters: name in the whole model -> this rank's parameter; those that are not trained are left out.
        ranks: the data-parallel ranks, among which the values are spread.
        copies: names of parameters that another rank writes: weights shared with another pipeline stage.
    """

    def __init__(
        self, engine: Any, parameters: Mapping[str, nn.Parameter], ranks: Ranks, copies: frozenset[str]
    ) -> None:
        self._engine, self._ranks, self._copies = engine, ranks, copies
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}

    def pieces(self) -> Iterator[ParameterSlice]:
        """Yield what this rank has to write; together the ranks yield every value once."""
        for name, parameter in self._parameters.items():
            if name not in self._copies:
                yield from self._pieces_of(name, parameter)

    def optimizer_steps(self) -> int:
        """Return the steps that changed the weights."""
        return int(self._engine.global_steps - self._engine.skipped_steps)

    @torch.no_grad()
    def fill(self, source: Source, *, steps: int, skipped: int) -> None:
        """Take over the values of a checkpoint.

        Args:
            source: where they come from.
            steps: steps done, of which
            skipped: steps that changed nothing.

        Raises:
            CheckpointError: a parameter is missing or has another shape, or states on NVMe cannot be filled.
        """
        for flat in self._trained_tensors():
            self._optimizer.state[flat] = self._fresh_moments(flat, steps - skipped)
        for name, parameter in self._parameters.items():
            self._fill_one(name, parameter, source)
        self._publish()
        self._engine.global_steps, self._engine.skipped_steps = steps, skipped
        self._engine.global_samples = steps * self._engine.train_batch_size()
        scheduler = self._engine.lr_scheduler
        # A schedule is a function of the step alone: stepping onto it sets the rates of all groups.
        scheduler.load_state_dict(
            scheduler.state_dict() | {"last_epoch": steps - skipped - 1, "_step_count": steps - skipped + 1}
        )
        scheduler.step()

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimizer under DeepSpeed's."""
        inner: torch.optim.Optimizer = self._engine.basic_optimizer
        return inner

    def _fresh_moments(self, flat: torch.Tensor, steps: int) -> dict[str, Any]:
        # torch counts in a tensor, DeepSpeed's host Adam in a number.
        counts_in_tensor = isinstance(self._optimizer, torch.optim.AdamW)
        count: Any = torch.tensor(float(steps), device=flat.device) if counts_in_tensor else steps
        return {"step": count, **{kind: torch.zeros_like(flat) for kind in MOMENTS}}

    @abstractmethod
    def _pieces_of(self, name: str, parameter: nn.Parameter) -> Iterator[ParameterSlice]:
        """Yield the pieces of one parameter that this rank writes: one or none."""

    @abstractmethod
    def _trained_tensors(self) -> Iterable[torch.Tensor]:
        """Return the tensors that the inner optimizer works on."""

    @abstractmethod
    def _fill_one(self, name: str, parameter: nn.Parameter, source: Source) -> None:
        """Take over this rank's values of one parameter."""

    def _publish(self) -> None:  # noqa: B027  # at ZeRO-0 they are the same
        """Bring the weights that forward passes use up to date with the fp32 ones."""


class ReplicatedStates(States):
    """ZeRO-0 in fp32: every rank holds everything, and writes its share of it."""

    def _pieces_of(self, name: str, parameter: nn.Parameter) -> Iterator[ParameterSlice]:
        size, rank, world = parameter.numel(), self._ranks.rank, self._ranks.world_size
        start, stop = size * rank // world, size * (rank + 1) // world
        if start < stop:
            state = self._optimizer.state.get(parameter, {})
            whole = {WEIGHT: parameter, **{kind: state[kind] for kind in MOMENTS if kind in state}}
            mine = {kind: tensor.flatten()[start:stop] for kind, tensor in whole.items()}
            yield _piece(name, parameter.shape, start, stop - start, mine)

    def _trained_tensors(self) -> Iterable[torch.Tensor]:
        return self._parameters.values()

    def _fill_one(self, name: str, parameter: nn.Parameter, source: Source) -> None:
        state = self._optimizer.state[parameter]
        for kind, target in ((WEIGHT, parameter), *((kind, state[kind]) for kind in MOMENTS)):
            target.copy_(source.read(name, kind, 0, target.numel()).view(target.shape))


class FlatStates(States):
    """ZeRO 1-2 and DeepSpeed's BF16 optimizer: one flat fp32 tensor per parameter group, cut by ranks."""

    def _pieces_of(self, name: str, parameter: nn.Parameter) -> Iterator[ParameterSlice]:
        here: Any = getattr(parameter, "_hp_mapping", None)
        if here is not None:  # else all of it lies on other ranks
            address = here.lp_fragment_address
            yield _piece(name, parameter.shape, address.start, address.numel, self._views(here))

    def _views(self, here: Any) -> dict[str, torch.Tensor]:
        """Return this rank's values where they lie.

        Not through DeepSpeed's own links to the moments: 0.19.8 makes them after the step of the first parameter group,
        when the others have no moments yet, and never again.
        """
        flat = list(self._trained_tensors())[here.param_group_index]
        moments = {kind: t for kind, t in self._optimizer.state.get(flat, {}).items() if kind in MOMENTS}
        address = here.hp_fragment_address
        return {kind: t.narrow(0, address.start, address.numel) for kind, t in {WEIGHT: flat, **moments}.items()}

    def _trained_tensors(self) -> Iterable[torch.Tensor]:
        outer = self._engine.optimizer
        flat: Any = getattr(outer, "single_partition_of_fp32_groups", None)
        tensors: list[torch.Tensor] = flat if flat is not None else outer.fp32_groups_flat_partition
        return tensors

    def _fill_one(self, name: str, parameter: nn.Parameter, source: Source) -> None:
        here: Any = getattr(parameter, "_hp_mapping", None)
        if here is not None:
            address = here.lp_fragment_address
            for kind, target in self._views(here).items():
                target.copy_(source.read(name, kind, address.start, address.numel))

    def _publish(self) -> None:
        self._engine.optimizer.update_lp_params()


class ShardedStates(States):
    """ZeRO-3: each parameter is cut evenly by ranks, the last pieces are padded."""

    def _pieces_of(self, name: str, parameter: nn.Parameter) -> Iterator[ParameterSlice]:
        start, length = self._extent(parameter)
        if length > 0:
            here = {kind: self._local(parameter, kind) for kind in KINDS}
            values = {kind: tensor for kind, tensor in here.items() if tensor is not None}
            yield _piece(name, _shape(parameter), start, length, values)

    def _extent(self, parameter: Any) -> tuple[int, int]:
        """Return where this rank's part of a parameter starts, and how long it is without the padding."""
        each = parameter.ds_tensor.numel()
        start = self._ranks.rank * each
        return start, min(each, parameter.ds_numel - start)

    def _local(self, parameter: nn.Parameter, kind: str) -> torch.Tensor | None:
        zero = self._engine.optimizer
        try:
            found: torch.Tensor = zero.get_local_fp32_param(parameter, None if kind == WEIGHT else kind)
        except KeyError:  # no moments before the first step
            return None
        return found

    def _trained_tensors(self) -> Iterable[torch.Tensor]:
        zero = self._engine.optimizer
        if zero.swap_optimizer:
            raise CheckpointError(
                "train.deepspeed: optimizer states on NVMe cannot be filled from a checkpoint; resume with "
                "offload_optimizer.device: cpu"
            )
        tensors: list[torch.Tensor] = zero.fp32_partitioned_groups_flat
        return tensors

    def _fill_one(self, name: str, parameter: Any, source: Source) -> None:
        start, length = self._extent(parameter)
        for kind in KINDS:
            values = torch.zeros(parameter.ds_tensor.numel())
            if length > 0:
                values[:length] = source.read(name, kind, start, length)
            self._engine.optimizer.set_local_hp_param(values, parameter, None if kind == WEIGHT else kind)

    def _publish(self) -> None:
        zero = self._engine.optimizer
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def states_of(
    engine: Any, parameters: Mapping[str, nn.Parameter], ranks: Ranks, copies: frozenset[str] = frozenset()
) -> States:
    """Return the states of a DeepSpeed engine of any ZeRO stage; arguments as for :class:`States`."""
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return ReplicatedStates(engine, parameters, ranks, copies)
    sharded = engine.zero_optimization_stage() == 3
    return (ShardedStates if sharded else FlatStates)(engine, parameters, ranks, copies)


def _piece(
    name: str, shape: Iterable[int], start: int, length: int, values: Mapping[str, torch.Tensor]
) -> ParameterSlice:
    """Copy values to the host; moments that there are none of yet are zeros."""
    copies = {
        kind: values[kind].detach()[:length].to("cpu", torch.float32, copy=True)
        if kind in values
        else torch.zeros(length)
        for kind in KINDS
    }
    return ParameterSlice(name, tuple(shape), start, copies)


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape)
