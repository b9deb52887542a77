"""Fixtures shared by all tests."""

import pytest
import torch

from vtc.testing import tiny


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models are faster on one thread, and tests run beside each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["sdpa", "eager"])
def llava(request):
    """A tiny LLaVA with random weights, on both attention back ends."""
    return tiny("llava", request.param)


@pytest.fixture
def sdpa_llava():
    return tiny("llava")
