"""Image memories kept between requests: those used last, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class MemoryCache:
    """Tensors by the hash of what they were made from; the one not used for longest makes room.

    Args:
        most_bytes: of all tensors together. One that is larger by itself is not kept; 0 keeps none.

    Attributes:
        nbytes: of the tensors that are kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def get(self, key: bytes) -> Tensor | None:
        """The tensor of a key, which is then the one used last."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: bytes, value: Tensor) -> None:
        """Keep a tensor. It should own its storage, of which a view would keep the whole."""
        earlier = self._kept.pop(key, None)
        if earlier is not None:
            self.nbytes -= earlier.nbytes
        if value.nbytes > self.most_bytes:
            return
        self._kept[key] = value
        self.nbytes += value.nbytes
        while self.nbytes > self.most_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= dropped.nbytes
