"""How fast a training step is, against the floor of its own network: `make bench`.
"""
import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Operators(TorchDispatchMode):
    """Counts what would be launched on a GPU, and the bytes read and written: every operator on tensors but views of storage and bare
    allocations. Random numbers are drawn on the host, and are not counted either."""

    FREE = ("aten::empty", "aten::new_empty", "aten::rand", "aten::_unsafe_view", "aten::detach", "aten::promote_types", "prim::")

    def __init__(self):
        super().__init__()
        self.names, self.bytes = collections.Counter(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in operator._schema.returns)
        if not view and not operator.name().startswith(self.FREE):
            self.names[operator.name()] += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor))
        return result


def count_operators(function) -> tuple[int, int]:
    """(operators launched, bytes moved) by the forward pass of a call."""
    with torch.no_grad(), _Operators() as counted:
        function()
    return sum(counted.names.values()), counted.bytes
