"""The matrix products and attention calls of some code, recorded once and made again alone.

recording = Recording()
with recording:
    step()
recording.replay()
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_PRODUCTS = {"aten.mm.default": torch.mm, "aten.bmm.default": torch.bmm}


class Recording(TorchDispatchMode):
    """Notes every matrix product and attention call by shape and layout, and how often each is made.

    Calls of the same shapes share their operands and the memory of their result, so a replay asks for no
    memory but what attention returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()
        self._calls: dict[Any, Callable[[], object]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN204 - torch's own
        """Run an operator and note it."""
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if name in _PRODUCTS or "scaled_dot_product" in name:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            key = name, *((tuple(x.shape), x.stride()) for x in tensors)
            self.counts[key] += 1
            if key not in self._calls:
                own = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
                self._calls[key] = self._again(name, function, own, kwargs or {}, result)
        return result

    @staticmethod
    def _again(
        name: str,
        function: Callable[..., object],
        own: list[Any],
        kwargs: dict[str, Any],
        result: Tensor,
    ) -> Callable[[], object]:
        if name not in _PRODUCTS:
            return lambda: function(*own, **kwargs)
        memory = torch.zeros_like(result)
        return lambda: _PRODUCTS[name](*own, out=memory)

    @torch.no_grad()
    def replay(self) -> None:
        """Make every recorded call again, as often as it was made."""
        for key, count in self.counts.items():
            for _ in range(count):
                self._calls[key]()
