"""A graphics card for tests: the array functions of CuPy with CuPy's strictness, on NumPy, and a runner for kernels.

An array of the card takes no part in anything with an array of this machine: that raises, as on a card. The bytes of
all arrays that are alive are counted. A kernel's source is compiled by g++ with stand-ins for the words of CUDA; each
thread of a block is a fiber, and fibers change where threads wait for each other."""

import ctypes
import shutil
import subprocess
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

CXX = shutil.which("g++")

EMULATOR = r"""
#include <stdint.h>
#include <stdlib.h>
#include <ucontext.h>
#define __global__
#define __shared__ static
static struct { int x; } threadIdx, blockIdx;
static ucontext_t scheduler, fibers[1024];
static char ended[1024];
static float exchanged[1024];
static int threads, arrived, gone;

static void pause_fiber() { int own = threadIdx.x; swapcontext(&fibers[own], &scheduler); }
static void __syncthreads() { int wanted = (arrived++/threads + 1)*threads; while (arrived < wanted) pause_fiber(); }
static float __shfl_xor_sync(unsigned, float value, int far) { /* all lanes of a warp call it equally often */
    int own = threadIdx.x;
    exchanged[own] = value;
    pause_fiber();
    float other = exchanged[own ^ far];
    pause_fiber();
    return other;
}
#line 1 "kernel"
KERNEL_SOURCE
typedef void (*body)(void);
static void *given[16];
static float scalars[4];
static int pieces;
static void begin() {
    sums_of_cells((const float *)given[0], (const int *)given[1], (const float *)given[2], (const long long *)given[3],
                  (const long long *)given[4], (const float *)given[5], (const float *)given[6], scalars[0], scalars[1],
                  scalars[2], scalars[3], pieces, (float *)given[7]);
    ended[threadIdx.x] = 1;
    gone++;
    setcontext(&scheduler);
}
extern "C" void run(int blocks, int block, void **arrays, const float *numbers, int count) {
    const size_t stack = 1 << 16;
    char *stacks = (char *)malloc(stack*block);
    threads = block; pieces = count;
    for (int i = 0; i < 8; i++) given[i] = arrays[i];
    for (int i = 0; i < 4; i++) scalars[i] = numbers[i];
    for (int b = 0; b < blocks; b++) {
        blockIdx.x = b; arrived = 0; gone = 0;
        for (int i = 0; i < block; i++) {
            ended[i] = 0;
            getcontext(&fibers[i]);
            fibers[i].uc_stack.ss_sp = stacks + stack*i; fibers[i].uc_stack.ss_size = stack; fibers[i].uc_link = 0;
            makecontext(&fibers[i], (void (*)())begin, 0);
        }
        while (gone < block)
            for (int i = 0; i < block; i++)
                if (!ended[i]) { threadIdx.x = i; swapcontext(&scheduler, &fibers[i]); }
    }
    free(stacks);
}
"""


@cache
def built(source, options, folder):
    "The kernel as a library of this machine."
    path = Path(folder) / f"kernel{abs(hash((source, options)))}"
    path.with_suffix(".cpp").write_text(EMULATOR.replace("KERNEL_SOURCE", source))
    subprocess.run(
        [CXX, "-O1", "-shared", "-fPIC", "-w", *options, "-o", f"{path}.so", f"{path}.cpp"], check=True, timeout=120
    )
    return ctypes.CDLL(f"{path}.so")


def host_only(value):
    return isinstance(value, np.ndarray) and value.ndim > 0


def opened(value):
    "What an operation gets: the values of arrays of the card; an array of this machine is refused."
    if isinstance(value, CardArray):
        return value.values
    if isinstance(value, (tuple, list)):
        return type(value)(map(opened, value))
    if host_only(value):
        raise TypeError(f"an array of this machine, of shape {value.shape}, in an operation of the card")
    return value


class CardArray:
    "An array in the memory of the card."

    __hash__ = None

    def __init__(self, values, card):
        self.values, self.card = np.asarray(values), card
        if self.values.base is None:
            card.alive += self.values.nbytes
            card.peak = max(card.peak, card.alive)
            weakref.finalize(self, card.release, self.values.nbytes)

    def __array__(self, *_, **__):
        raise TypeError("an array of the card becomes an array of this machine by .get() alone")

    def __array_ufunc__(self, ufunc, method, *given, **named):
        assert method == "__call__"
        return self.card.closed(ufunc(*map(opened, given), **named))

    def get(self):
        return self.values.copy()

    def __getitem__(self, key):
        return self.card.closed(self.values[opened(key)])

    def __setitem__(self, key, value):
        self.values[opened(key)] = opened(value)

    def __getattr__(self, name):
        part = getattr(self.values, name)
        if not callable(part):
            return self.card.closed(part) if isinstance(part, np.ndarray) else part
        return lambda *given, **named: self.card.closed(
            part(*opened(given), **{k: opened(v) for k, v in named.items()})
        )

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return (self[place] for place in range(len(self)))

    def __bool__(self):
        return bool(self.values)

    def __float__(self):
        return float(self.values)

    def __int__(self):
        return int(self.values)


def operation(name):
    def of(self, *others):
        answer = getattr(self.values, name)(*opened(others))
        if name.startswith("__i"):
            return self
        return answer if answer is NotImplemented else self.card.closed(answer)

    return of


for word in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"),
    *("radd", "rsub", "rmul", "rtruediv", "rpow", "rand", "ror", "iadd", "isub", "imul", "itruediv", "iand", "ior"),
    *("neg", "invert", "abs", "lt", "le", "gt", "ge", "eq", "ne"),
):
    setattr(CardArray, f"__{word}__", operation(f"__{word}__"))


class Card:
    "What `import cupy` gives."

    def __init__(self, folder, free=8 << 30):
        self.folder, self.alive, self.peak, self.launches = folder, 0, 0, 0
        runtime = SimpleNamespace(
            memGetInfo=lambda: (free - self.alive, free),
            getDevice=lambda: 0,
            getDeviceProperties=lambda number: {"name": b"card for tests"},
        )
        self.cuda = SimpleNamespace(runtime=runtime)

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=lambda: None)

    def release(self, size):
        self.alive -= size

    def closed(self, answer):
        if isinstance(answer, tuple):
            return tuple(map(self.closed, answer))
        return CardArray(answer, self) if isinstance(answer, (np.ndarray, np.generic)) else answer

    def __getattr__(self, name):
        function = getattr(np, name)
        if isinstance(function, type) or not callable(function):
            return function
        if name in ("array", "asarray"):
            return lambda values, *given: (
                values if isinstance(values, CardArray) else self.closed(np.array(values, *given, order="C"))
            )
        return lambda *given, **named: self.closed(
            function(*opened(given), **{key: opened(value) for key, value in named.items()})
        )

    def RawKernel(self, source, name, options):
        library = built(source, options, self.folder)

        def launch(grid, block, given):
            arrays = [value for value in given if isinstance(value, CardArray)]
            numbers = [value for value in given if isinstance(value, np.float32)]
            (pieces,) = (value for value in given if isinstance(value, np.int32))
            assert len(arrays) == 8 and len(numbers) == 4 and len(given) == 13
            assert [array.values.dtype.name for array in arrays] == [
                *("float32", "int32", "float32", "int64", "int64", "float32", "float32", "float32")
            ]
            assert all(array.values.flags.c_contiguous for array in arrays)
            addresses = (ctypes.c_void_p * 8)(*(array.values.ctypes.data for array in arrays))
            library.run(grid[0], block[0], addresses, (ctypes.c_float * 4)(*numbers), int(pieces))
            self.launches += 1

        return launch
