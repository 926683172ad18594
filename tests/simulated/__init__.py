"""A simulated accelerator, so that what runs on devices other than the CPU is tested on machines that have no other."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["NAME", "rest", "simulate", "unrecorded", "use"]

NAME = "sim"


class _Module:
    """What ``torch.sim`` offers: the functions that torch and libraries ask of any accelerator's module."""

    def __init__(self, extension: Any) -> None:
        self.extension = extension
        self.set_device, self.current_device = extension.set_device, extension.current_device
        self.Stream = functools.partial(torch.Stream, NAME)
        self.default_generators = tuple(map(extension.default_generator, range(self.device_count())))

    @contextmanager
    def device(self, device: torch.device | str | int) -> Iterator[None]:
        before = self.current_device()
        index = device if isinstance(device, int) else torch.device(device).index
        self.set_device(before if index is None else index)
        try:
            yield
        finally:
            self.set_device(before)

    def current_stream(self, device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(device)

    def stream(self, stream: torch.Stream) -> torch.Stream:
        return stream  # a context manager itself

    def synchronize(self, device: Any = None) -> None:
        torch.accelerator.synchronize(device)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 4

    def get_device_name(self, device: Any = None) -> str:
        return "simulated"

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.default_generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self._generator(device).get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self._generator(device).set_state(state)

    def _generator(self, device: Any) -> torch.Generator:
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        return self.default_generators[self.current_device() if index is None else index]

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def simulate(pause_microseconds: int = 0) -> None:
    """Make this process have four devices of type ``"sim"``; compiles them on first use.

    Args:
        pause_microseconds: The longest pause before a copy that nobody waits for.
    """
    from torch.utils import cpp_extension

    extension = cpp_extension.load(
        "lwpm_simulated_device",
        [str(Path(__file__).parent / "device.cpp")],
        extra_cflags=["-O1", "-std=c++20", "-w"],
    )
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module(extension))  # type: ignore[no-untyped-call]
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    extension.pause_copies(pause_microseconds)
    getattr(torch, NAME).manual_seed_all(torch.initial_seed())  # what was seeded before counts, as with CUDA


def use(kind: str, index: int) -> torch.device:
    """Make a device the current one of this process: ``"cuda"`` or a simulated one, whose copies come late."""
    if kind == NAME:
        simulate(2000)
    torch.accelerator.set_device_index(index)
    return torch.device(kind, index)


def rest(kind: str) -> None:
    """Give the current device some milliseconds to do, the host none."""
    if kind == NAME:
        getattr(torch, NAME).extension.sleep(5000)
    else:
        torch.cuda._sleep(10_000_000)


def unrecorded() -> int:
    """How often memory was given back, since the last call, that another stream had used without ``record_stream``."""
    return int(getattr(torch, NAME).extension.unrecorded())
