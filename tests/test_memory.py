"""Tensors in mapped files, and what does not fit; freed memory."""

from __future__ import annotations

import platform

import pytest
import torch

from xfm_fast.errors import DataError, StorageError
from xfm_fast.memory import create_mapped, open_mapped, release_freed_memory, resident_bytes


def test_a_collection_larger_than_the_disk_is_refused_at_once(tmp_path) -> None:
    with pytest.raises(StorageError, match="GB"):
        create_mapped(tmp_path / "huge", (1 << 50,), torch.float32)
    assert not (tmp_path / "huge").exists()


def test_a_mapped_file_of_another_size_is_refused(tmp_path) -> None:
    create_mapped(tmp_path / "m", (3, 2), torch.bfloat16)
    with pytest.raises(DataError, match=r"12 bytes.*\[4, 2\] torch.bfloat16.*16"):
        open_mapped(tmp_path / "m", (4, 2), torch.bfloat16)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="others keep nothing, or cannot be asked"
)
def test_freed_memory_is_given_back() -> None:
    """Blocks of a size that glibc takes from its heap, the last of which stays."""
    blocks = [bytes([1]) * (1 << 16) for _ in range(2000)]
    del blocks[:-1]
    before = resident_bytes()
    release_freed_memory()
    assert before - resident_bytes() > 1000 << 16
    assert len(blocks[0]) == 1 << 16
