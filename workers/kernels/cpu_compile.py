"""How the loops of :mod:`workers.kernels.cpu` are compiled and kept, and the few words of machine that they use.

Nothing is compiled with fast-math, so LLVM may neither fuse nor regroup float32 operations: the bits are those
of torch. Compiled code does not hold the interpreter's lock.

What was compiled is kept in ``NUMBA_CACHE_DIR`` if that is set, else in the package's ``__pycache__``, or where
that cannot be written, in the user's cache directory. It is filed under the digest of these sources and the
processor's features, and written by atomic replacement, so that several processes may compile at once.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit, typeof, types
from numba.extending import intrinsic

from workers.canonical import SURVEY_ELEMENTS

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]
Raw = npt.NDArray[Any]
"""Elements of an input or output as unsigned integers of their width."""
Records = npt.NDArray[np.void]

_SUBNORMAL, _ONE = 5e-324, 1.0

_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy"}
"""Under numpy's error model a division by zero is infinity or NaN, and stays one vector instruction."""

_NO_WRAPPERS: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""What only other compiled functions call can do without."""

_SOURCES = sorted(Path(__file__).parent.glob("cpu*.py"))
_CONSTANTS = f"SURVEY_ELEMENTS={SURVEY_ELEMENTS}".encode()
_DIGEST = hashlib.sha256(b"\0".join([_CONSTANTS, *(path.read_bytes() for path in _SOURCES)])).hexdigest()[:16]
"""Of all that the compiled code is made from."""


_names: set[str] = set()


def inlined(function: _F, name: str | None = None) -> _F:
    """Compile a function for the use of other compiled ones; it is kept as a part of theirs.

    Kernels that different processes compiled meet in a third one, where functions of one name and signature are
    one: of those that a factory makes each needs a ``name`` of its own.
    """
    function.__qualname__ = name or function.__qualname__
    symbol = f"{function.__module__}.{function.__qualname__}"
    if symbol in _names:
        raise ValueError(f"another compiled function is called {symbol}")
    _names.add(symbol)
    return cast(_F, njit(**_OPTIONS, **_NO_WRAPPERS)(function))


class Kernel:
    """A compiled function that Python calls: loaded, or else compiled and kept, at its first call.

    numba looks only at the file that a function is in to see whether what it kept is stale, and replaces the
    index before the code. With the digest of all sources in the function's name neither can give old code.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        function.__qualname__ = f"{function.__name__}_{_DIGEST}"
        self._function = function
        self._compiled: Callable[..., None] | None = None
        self._first = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether it was loaded or compiled."""
        return self._compiled is not None

    def __call__(self, *arguments: object) -> None:
        if self._compiled is None:
            with self._first:
                self._compiled = self._compiled or self._compile(arguments)
        if _SUBNORMAL * _ONE == 0:  # some library has this thread flush them: they are part of the result
            torch.set_flush_denormal(False)
        self._compiled(*arguments)

    def _compile(self, arguments: tuple[object, ...]) -> Callable[..., None]:
        """The function, compiled for arguments of these types: the same ones at every call."""
        signature = tuple(map(typeof, arguments))
        try:
            return cast(Callable[..., None], njit(signature, cache=True, **_OPTIONS)(self._function))
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            # No directory can be written, the disk is full, or what was kept is damaged.
            log.warning("compiled kernels are not kept: %s", error)
            return cast(Callable[..., None], njit(signature, **_OPTIONS)(self._function))


# --- words of machine -------------------------------------------------------------------------------------


def _bits_of(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _float_of(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


def _prefetch(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        bytes_, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        what = ir.FunctionType(ir.VoidType(), [bytes_, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), what)
        to_read, into_second_level, data = flag(0), flag(2), flag(1)
        at = builder.inttoptr(arguments[0], bytes_)
        builder.call(function, [at, to_read, into_second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


bits_of = cast(Callable[[np.float32], np.uint32], intrinsic(_bits_of))
"""The bits of a float32."""

float_of = cast(Callable[[np.uint32], np.float32], intrinsic(_float_of))
"""The float32 that has these bits."""

pointer = cast(Callable[[int], Any], intrinsic(_pointer))
"""An address as a pointer, for ``carray``."""

prefetch = cast(Callable[[int], None], intrinsic(_prefetch))
"""Ask for the cache line of an address, whether or not it may be read."""
