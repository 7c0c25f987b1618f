"""A bounded cache of what a source reads or opens, one for each process."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Recent:
    """The values used last, as many as fit into `most` by the sum of their `size` (None: 1 each), but always one.

    A forked process does not use its parent's values, which may be open files; a pickled copy is empty.
    """

    def __init__(self, most: int, size: Callable[[Any], int] | None = None) -> None:
        self.most, self.size = most, size
        self.owner, self.total = os.getpid(), 0
        self.values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __reduce__(self) -> tuple:
        return Recent, (self.most, self.size)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`, made if it is not kept."""
        if self.owner != os.getpid():
            self.owner, self.total, self.values = os.getpid(), 0, OrderedDict()
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key][0]
        value = make()
        size = self.size(value) if self.size else 1
        self.values[key] = value, size
        self.total += size
        while self.total > self.most and len(self.values) > 1:
            _, (_, oldest) = self.values.popitem(last=False)
            self.total -= oldest
        return value
