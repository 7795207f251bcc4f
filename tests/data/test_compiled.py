"""Compiled code is cached on disk for later processes."""

import pytest

from data import blocks
from data.decoders import ffcv


@pytest.mark.parametrize("function", [ffcv._fill, blocks._encode], ids=["ffcv", "blocks"])
def test_another_process_uses_the_cached_compiled_code(function):
    """Numba's cache key includes closure variables; a compiled function among these has another key in each process."""
    enclosed = [cell.cell_contents for cell in function.py_func.__closure__]
    assert [type(each) for each in enclosed] == [str]
