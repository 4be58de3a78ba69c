"""One forward pass of a network, recorded: which layers run, in which order, on which tensors."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
Linear = nn.Linear | nn.Conv2d


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        name: name of the layer, as in `model.named_modules()`.
        module: the layer, a Linear, Conv2d, BatchNorm1d, BatchNorm2d or GroupNorm.
        x: its input. An in-place operation may have overwritten the values since; identity and shape are as they were.
        y: its output, likewise.
    """

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


def trace(model: nn.Module, example_BCHW: Tensor) -> list[Call]:
    """Run `model` in eval mode on an example, and list the calls of its layers in the order in which they return.

    A layer that runs twice is listed twice. All inputs and outputs stay in memory as long as the list.
    """
    calls: list[Call] = []
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear | BatchNorm | nn.GroupNorm)]

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> None:
            calls.append(Call(name, module, (*args, *kwargs.values())[0], y))

        return hook

    handles = [module.register_forward_hook(record(name), with_kwargs=True) for name, module in layers]
    with torch.inference_mode(), removing(handles):
        model.eval()(example_BCHW.to(next(model.parameters(), example_BCHW).device))
    return calls


def last_linear(calls: list[Call]) -> str | None:
    """Name of the `nn.Linear` that runs last, the head of a classifier; None where none runs."""
    return next((call.name for call in reversed(calls) if isinstance(call.module, nn.Linear)), None)


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
