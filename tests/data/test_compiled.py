"""What is compiled is kept on disk, for the processes that come after."""

import pytest

from data import blocks
from data.decoders import ffcv


@pytest.mark.parametrize("function", [ffcv._fill, blocks._encode], ids=["ffcv", "blocks"])
def test_compiled_code_is_found_again_by_another_process(function):
    """Numba's key holds what a function encloses; a compiled function among that has another key in each process."""
    enclosed = [cell.cell_contents for cell in function.py_func.__closure__]
    assert [type(each) for each in enclosed] == [str]
