"""The simulated accelerator as Lightning's Trainer takes it."""

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from typing_extensions import override

from simulated import NAME, use

__all__ = ["Simulated"]


class Simulated(Accelerator):
    """``Trainer(accelerator=Simulated(), devices=2)``: two of the four simulated devices."""

    @override
    def setup_device(self, device: torch.device) -> None:
        use(NAME, device.index)

    @override
    def teardown(self) -> None:
        pass

    @override
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {"allocated": torch.accelerator.memory_allocated(device)}

    @staticmethod
    @override
    def parse_devices(devices: Any) -> list[int]:
        return list(range(devices)) if isinstance(devices, int) else list(devices)

    @staticmethod
    @override
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device(NAME, index) for index in devices]

    @staticmethod
    @override
    def auto_device_count() -> int:
        return 4

    @staticmethod
    @override
    def is_available() -> bool:
        return True

    @staticmethod
    @override
    def name() -> str:
        return NAME
