"""Build and bind ``zloop.c``, the faster main loop, where the machine has a C compiler.

It is compiled once into pz's cache folder (about a second; jericho itself needed a compiler to be
installed) and loaded from there by every process. Without a compiler everything works as before,
only slower: nothing that is listed or played depends on it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from pz_envs.datasets import cache_dir

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("zloop.c")
_FLAGS = ("-O2", "-fno-strict-aliasing", "-shared", "-fPIC")
_COMPILE_SECONDS = 120.0

_VARIABLES = ("zmp", "pcp", "sp", "fp", "stack", "next_opcode", "frame_count", "emulator_halted")
_CHANGES = ("move_diff_cnt", "attr_diff_cnt", "attr_clr_cnt", "ram_diff_cnt")
_FUNCTIONS = (
    *("run_opcode", "get_next_opcode", "dumb_set_next_action", "update_special_ram"),
    *("update_ram_diff", "dumb_get_screen", "clean_observation", "dumb_clear_screen", "setRng"),
    *("get_score", "get_moves", "game_over", "victory", "world_changed"),
    *("clean_world_objs", "get_special_ram"),
)


class LoopState(ctypes.Structure):
    """The C side's ``engine``: addresses in the interpreter, then the remembered state."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_VARIABLES, *_CHANGES, "world", *_FUNCTIONS)),
        ("saved_memory", ctypes.c_void_p),
        ("saved_stack", ctypes.c_void_p),
        ("memory_size", ctypes.c_size_t),
        ("stack_size", ctypes.c_size_t),
        ("saved_pc", ctypes.c_void_p),
        ("saved_sp", ctypes.c_void_p),
        ("saved_fp", ctypes.c_void_p),
        ("random_a", ctypes.c_long),
        ("random_interval", ctypes.c_int),
        ("random_counter", ctypes.c_int),
        ("score", ctypes.c_int),
        ("moves", ctypes.c_int),
        ("decoded", ctypes.c_void_p),
        ("world_buffer", ctypes.c_void_p),
        ("objects_size", ctypes.c_size_t),
        ("world_size", ctypes.c_size_t),
        ("object_count", ctypes.c_size_t),
        ("raw_start", ctypes.c_size_t),
        ("raw_size", ctypes.c_size_t),
        ("saved_frame_count", ctypes.c_ushort),
        ("saved_opcode", ctypes.c_ubyte),
    )


def bind(frotz_library: Any) -> LoopState | None:
    """Return the loop's view of one loaded interpreter, or None when the loop cannot be had."""
    library = loop()
    if library is None:
        return None
    state = LoopState()
    state.decoded = library.zloop_open()
    if not state.decoded:
        return None
    weakref.finalize(state, library.zloop_close, state.decoded)
    for name in (*_VARIABLES, *_CHANGES, "world"):
        setattr(state, name, ctypes.addressof(ctypes.c_char.in_dll(frotz_library, name)))
    for name in _FUNCTIONS:
        function = ctypes.cast(getattr(frotz_library, name), ctypes.c_void_p)
        setattr(state, name, function.value)
    return state


@functools.lru_cache(maxsize=1)
def loop() -> ctypes.CDLL | None:
    """Return the compiled loop, building it when needed; None without a working compiler."""
    if not sys.platform.startswith("linux"):
        return None
    source = _SOURCE.read_bytes() + _SOURCE.with_name("zdecode.h").read_bytes()
    name = hashlib.blake2b(source + platform.machine().encode(), digest_size=8).hexdigest()
    path = cache_dir() / "jericho" / f"zloop-{name}.so"
    try:
        if not path.exists():
            _compile(path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.info("the faster Z-machine loop is not used: %s", error)
        return None
    library.zloop_open.argtypes = []
    library.zloop_open.restype = ctypes.c_void_p
    library.zloop_close.argtypes = [ctypes.c_void_p]
    library.zloop_close.restype = None
    library.zloop_step.argtypes = [ctypes.POINTER(LoopState), ctypes.c_char_p]
    library.zloop_step.restype = ctypes.c_char_p
    library.zloop_try.argtypes = [
        ctypes.POINTER(LoopState),
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_ubyte),
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
    ]
    library.zloop_identity.argtypes = [ctypes.POINTER(LoopState), ctypes.POINTER(ctypes.c_uint64)]
    library.zloop_identity.restype = None
    library.zloop_world.argtypes = [ctypes.POINTER(LoopState)]
    library.zloop_world.restype = None
    library.zloop_restore.argtypes = [ctypes.POINTER(LoopState)]
    library.zloop_restore.restype = None
    return library


def _compile(path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise OSError("no C compiler (cc, gcc) is on PATH")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run(
            [*compiler.split(), *_FLAGS, "-o", str(built), str(_SOURCE)],
            check=True,
            capture_output=True,
            timeout=_COMPILE_SECONDS,
        )
        # Two processes may build at once; either file is good, and a rename is never half done.
        built.replace(path)
