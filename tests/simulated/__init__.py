"""A simulated accelerator, so that what runs on devices other than the CPU is tested on machines that have no other.

``LWPM_TEST_DEVICE=sim python -m pytest tests/training tests/transparency`` runs those tests on it that otherwise
compare runs on the CPU. A few fail there because of the test (an LSTM cell, which has a kernel of its own outside the
CPU, files that one device saved, read where there is no such device, Lightning's DDP, for which gloo has no such
device); the others hold the device to the numbers of a single one, to the bit.
"""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

__all__ = ["NAME", "can_simulate", "rest", "simulate", "unrecorded", "use", "waits"]

NAME = "sim"
_EXTENSION = "lwpm_simulated_device"
_COMPILER = os.environ.get("CXX") or shutil.which("c++")


def can_simulate() -> bool:
    """Whether there is what it takes to compile the device."""
    return _COMPILER is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def _compiled() -> Path:
    """The compiled device; whoever comes first compiles it, the others wait."""
    source = Path(__file__).parent / "device.cpp"
    digest = sha256(source.read_bytes() + f"{torch.__version__} {sys.version} {sys.prefix}".encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir(), f"lwpm-simulated-{os.getuid()}-{digest}.so")
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            made = target.with_suffix(".tmp")
            subprocess.run([str(_COMPILER), str(source), "-o", str(made), *_flags()], check=True)
            made.rename(target)
    return target


def _flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    include = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries += [f"-l{name}" for name in ("torch_python", "torch_cpu", "torch", "c10")]
    defined = ["-DTORCH_API_INCLUDE_EXTENSION_H", f"-DTORCH_EXTENSION_NAME={_EXTENSION}"]
    return ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", *defined, *include, *libraries]


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
    loader = ExtensionFileLoader(_EXTENSION, str(_compiled()))
    spec = spec_from_file_location(_EXTENSION, loader=loader)
    assert spec is not None
    extension = module_from_spec(spec)
    loader.exec_module(extension)
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


@contextmanager
def waits(found: list[int]) -> Iterator[None]:
    """Note the thread wherever the host waits for a device meanwhile."""
    tell = getattr(torch, NAME).extension.on_wait
    tell(lambda: found.append(threading.get_ident()))
    try:
        yield
    finally:
        tell(None)


def unrecorded() -> int:
    """How often memory was given back, since the last call, that another stream had used without ``record_stream``."""
    return int(getattr(torch, NAME).extension.unrecorded())
