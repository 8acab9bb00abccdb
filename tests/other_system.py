"""Removes from a test's program the features that another system lacks, because only Linux is available for tests.

The standard library and other packages are imported first, because they choose their own code by the system.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import pathlib
import select
import signal
import socket
import sys
from types import ModuleType
from typing import Any, Never

ROOT = pathlib.Path(__file__).resolve().parents[1]

NO_WHEEL = {"hivemind", "multiaddr", "uvloop"}
"""Packages without a wheel for some systems."""

OF_UNIX = {"fcntl", "grp", "pwd", "resource", "termios", "tty"}
"""Modules of Python that exist on Unix only."""

FREE_BYTES = 3 << 30
"""Free memory that the emulated Windows reports, in bytes."""

_LIBRARIES = """
asyncio ctypes.util multiprocessing.pool platform shutil subprocess tempfile uuid zipfile
filelock fastapi gguf huggingface_hub ifaddr jinja2 llguidance matplotlib.pyplot msgpack nacl.bindings numpy peft
platformdirs prometheus_client psutil rich.progress safetensors.torch torch transformers transformers.modeling_utils
typer.testing uvicorn yaml zeroconf zmq
"""

_LACKING: dict[str, dict[ModuleType | type, str]] = {
    "win32": {
        signal: """
            SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 pthread_kill pthread_sigmask
            setitimer sigwait
        """,
        os: """
            eventfd fchmod fork getloadavg getpgid getuid geteuid killpg mkfifo set_blocking setsid sched_getaffinity
            sched_setaffinity statvfs sysconf uname
        """,
        socket: "AF_UNIX SO_REUSEPORT TCP_INFO",
        select: "epoll poll",
        mmap: "MADV_HUGEPAGE MAP_ANONYMOUS MAP_PRIVATE PROT_READ PROT_WRITE",
    },
    "darwin": {
        os: "eventfd sched_getaffinity sched_setaffinity",
        socket: "TCP_INFO",
        select: "epoll",
        mmap: "MADV_HUGEPAGE",
    },
    "android": {},
}


class _Without:
    """A module finder that does not find the given modules."""

    def __init__(self, finder: Any, names: set[str]) -> None:
        self._finder = finder
        self._names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        return None if fullname.partition(".")[0] in self._names else self._finder.find_spec(fullname, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


class _Kernel32:
    @staticmethod
    def GlobalMemoryStatusEx(status: Any) -> int:
        assert status._obj.bytes == 64
        status._obj.available = FREE_BYTES
        return 1


class _Windll:
    kernel32 = _Kernel32()


def become(system: str) -> None:
    """Emulates `system`, named as in `sys.platform`, without hivemind; "here": no other change.

    Call this before splitnet is imported.
    """
    assert not {name.partition(".")[0] for name in sys.modules} & {"hivemind", "peers", "scheduler", "splitnet"}
    for name in _LIBRARIES.split():
        importlib.import_module(name)
    missing = NO_WHEEL | (OF_UNIX if system == "win32" else set())
    for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
        del sys.modules[name]
    sys.meta_path[:] = [_Without(finder, missing) for finder in sys.meta_path]
    if system == "here":
        return
    for module, names in _LACKING[system].items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    if system == "win32":
        _only_named_libraries()
        ctypes.windll = _Windll()  # pyright: ignore[reportAttributeAccessIssue]
        socket.socketpair = _loopback_pair
    _hide_files(("/sys",) if system == "android" else ("/proc", "/sys"))
    if system != "darwin":
        os.link = _no_links
    sys.platform = system


def modules() -> list[str]:
    """The names of all modules of splitnet."""
    files = [
        file for folder in ("scheduler", "splitnet", "peers", "simulator") for file in (ROOT / folder).rglob("*.py")
    ]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return sorted(name for name in names if not name.endswith("__main__"))


def _only_named_libraries() -> None:
    """Makes `CDLL(None)` fail, as on Windows, where the process itself cannot be opened as a library."""
    load = ctypes.CDLL.__init__

    def named(self: ctypes.CDLL, name: Any, *args: Any, **options: Any) -> None:
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        load(self, name, *args, **options)

    ctypes.CDLL.__init__ = named


def _loopback_pair() -> tuple[socket.socket, socket.socket]:
    """A socket pair made of a TCP connection, as Python makes it on Windows."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


def _hide_files(folders: tuple[str, ...]) -> None:
    """Hides the system files of Linux, or the files that Android hides from programs."""
    read = pathlib.Path.read_text

    def unless_hidden(self: pathlib.Path, *args: Any, **options: Any) -> str:
        if str(self).startswith(folders):
            raise PermissionError(13, "Permission denied")
        return read(self, *args, **options)

    pathlib.Path.read_text = unless_hidden


def _no_links(*_: Any, **__: Any) -> Never:
    """Fails like a file system without hard links: FAT, or Android's."""
    raise PermissionError(1, "Operation not permitted")
