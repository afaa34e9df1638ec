"""What tests of kernels run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cuda_device import Device, emulated_device, gpu_device


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    device = emulated_device() if request.param == "emulated" else gpu_device()
    device.arrange()
    yield device
    device.arrange()
