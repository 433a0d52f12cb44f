# SPDX-License-Identifier: Apache-2.0
"""Tests of lightning_attn.py: `python test_lightning_attn.py`, or `pytest test_lightning_attn.py`.

They test the lightning_attn.py that lies beside this file, in a package or not. Where none lies there
they test the installed one.

Cases are compared with a float64 oracle written here (numpy, O(T^2)) on every path that the machine
has: plain JAX; the kernels on a GPU; where there is none, the Triton kernels in Triton's interpreter
and the Gluon kernel on a machine of this file's own.

As a script this file owns its process, so it gives JAX 8 virtual CPU devices. Under pytest it changes
nothing of the process: cases that want 8 devices then run in a script of their own, which is one case.
"""
import atexit
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from typing import Any

import pytest

BESIDE = pathlib.Path(__file__).resolve().with_name("lightning_attn.py")
SCRIPT = "LIGHTNING_ATTN_TEST_SCRIPT"                            # the variable that tells workers
DEVICES = "wants 8 CPU devices"


# As a script ------------------------------------------------------------------------------------------------------------------

def file_under_test():
    return BESIDE if BESIDE.exists() else pathlib.Path(importlib.util.find_spec("lightning_attn").origin)


# The cases that take longest, on a GPU machine and on a CPU. They start first, so that no long one is
# left when everything else is done.
LONGEST = ("sanitizer", "on_8_devices", "compiles_and_fits[bfloat16-sm_90", "inside_shard_map", "million", "beyond_2_31",
           "many_segments", "compiles_and_fits", "accuracy", "snippets", "shard_map[interpreter", "in_pieces", "several_tiles",
           "vmap[interpreter", "is_its_sequences", "goes_on_from", "eager-pack", "pack-with-states", "small_model", "16_bit",
           "padding_and", "seq_axis", "65536", "packs[interpreter")


class Summary:
    """Chooses and orders the cases, and says at the end what ran, what passed and what was skipped."""

    def pytest_collection_modifyitems(self, config, items):
        if os.environ.get(SCRIPT) == "devices":
            reasons = lambda case: {m.kwargs.get("reason") for m in case.iter_markers("skipif")}
            config.hook.pytest_deselected(items=[case for case in items if DEVICES not in reasons(case)])
            items[:] = [case for case in items if DEVICES in reasons(case)]
        place = lambda case: next((i for i, name in enumerate(LONGEST) if name in case.name), len(LONGEST))
        items.sort(key=place)
        # workers hold two cases at least: a short one beside each long one, which others would wait for
        long = sum(place(case) < len(LONGEST) for case in items)
        short = items[long:][::-1][:long]
        paired = [case for pair in itertools.zip_longest(items[:long], short) for case in pair if case]
        items[:] = paired + items[long:len(items) - len(short)]

    def pytest_terminal_summary(self, terminalreporter):
        own = lambda report: report.nodeid.partition("::")[0].endswith(pathlib.Path(__file__).name)
        of = lambda outcome: list(filter(own, terminalreporter.stats.get(outcome, [])))
        names = {"xla": "plain JAX", "gpu": "kernels on a GPU", "interpreter": "Triton kernels in Triton's interpreter",
                 "gluon": "Gluon kernel on an emulator"}
        def path(report):
            words = re.split(r"[\[\]-]", report.nodeid.rpartition("::")[2])
            return names.get(next((x for x in words if x in names), None), "all else")
        def listed(reports, kind):
            found = collections.Counter(map(kind, reports))
            return ", ".join(f"{what}: {n}" for what, n in found.most_common())
        passed, skipped = of("passed"), of("skipped")
        reason = lambda report: report.longrepr[2].removeprefix("Skipped: ")
        broken = len(of("failed")) + len(of("error"))
        words = [f"Tested {file_under_test()}: {len(passed) + len(skipped) + broken} cases."]
        words += [f"{len(passed)} passed ({listed(passed, path)})."] if passed else []
        words += [f"{broken} FAILED." if broken else "None failed."]
        words += [f"{len(skipped)} skipped ({listed(skipped, reason)})."] if skipped else []
        terminalreporter.write_line("\n" + " ".join(words))


def main(arguments):
    """Runs the tests in a process that is this file's own. `--devices`: only those that want 8 devices."""
    devices = "--devices" in arguments
    arguments = [a for a in arguments if a != "--devices"]
    os.environ[SCRIPT] = "devices" if devices else "all"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", "--xla_gpu_autotune_level=0"]
    if devices or not (shutil.which("nvidia-smi") or shutil.which("rocm-smi")):     # compiling is most of the time on a CPU
        flags += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    if devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
    alone = any(a.startswith(("-n", "--numprocesses", "--pdb")) for a in arguments)
    if importlib.util.find_spec("xdist"):
        # one case at a time: by default the first worker gets the first cases, and those are the longest
        arguments = ["--maxschedchunk", "1", *arguments]
        arguments = arguments if alone else ["-n", str(len(os.sched_getaffinity(0))), *arguments]
    style = "console_output_style=count"
    code = pytest.main([__file__, "-q", "-p", "no:warnings", "-o", style, *arguments], [Summary()])
    leave(code)


def leave(code=0):
    """Ends the process without Python's shutdown, in which nanobind lists objects of JAX as leaked."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":                                       # before JAX is imported, which reads XLA_FLAGS
    main(sys.argv[1:])
if SCRIPT in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(leave)

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st


def load(name):
    """The file under test as a module. The name is not its own: another file may have that."""
    spec = importlib.util.spec_from_file_location(name, file_under_test())
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


la = load("lightning_attn_under_test")
lightning_attn, lightning_attn_reference = la.lightning_attn, la.lightning_attn_reference
lightning_g_gamma = la.lightning_g_gamma

FILE = file_under_test()
HAS_GPU = jax.default_backend() == "gpu"
HAS_TRITON = la.triton is not None
HAS_DEVICES = not HAS_GPU and len(jax.devices()) >= 8


PROJECT = pathlib.Path(__file__).resolve().parent


def ours():
    """Whether this file lies in the project. A README beside a copy is somebody else's."""
    about, readme = PROJECT / "pyproject.toml", PROJECT / "README.md"
    return (about.exists() and readme.exists() and 'name = "lightning-attn-jax"' in about.read_text()
            and re.match(r"# lightning.attn", readme.read_text(), re.IGNORECASE) is not None)


in_the_project = pytest.mark.skipif(not ours(), reason="not in the project's folder")


@pytest.fixture(scope="session", autouse=True)
def closing_sentence(request):
    """Under pytest as well, the last line says which file was tested."""
    plugins = request.config.pluginmanager
    if SCRIPT not in os.environ and not plugins.has_plugin("lightning_attn"):
        plugins.register(Summary(), "lightning_attn")


def pytest_generate_tests(metafunc):
    """pytest calls this while it collects the file, in xdist's workers as well. Those do not get the plugin of `main`, and they
    are who chooses and orders the cases."""
    plugins = metafunc.config.pluginmanager
    if SCRIPT in os.environ and "PYTEST_XDIST_WORKER" in os.environ and not plugins.has_plugin("lightning_attn"):
        plugins.register(Summary(), "lightning_attn")


def python(code, folder, **variables):
    """Runs code in a Python of its own, in a folder that holds a copy of the file and nothing else. Returns what it prints."""
    shutil.copy(FILE, folder / "lightning_attn.py")
    env = {n: x for n, x in os.environ.items() if n != "PYTHONSAFEPATH"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env | variables)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


# The paths ----------------------------------------------------------------------------------------------------------------------

class Host:
    """A numpy array with the few tensor methods that Triton's interpreter calls."""

    def __init__(self, array):
        self.array, self.dtype = array, type("DType", (str,), {"itemsize": array.dtype.itemsize})(array.dtype)

    def data_ptr(self): return self.array.ctypes.data
    def untyped_storage(self): return self
    def cpu(self): return self
    def new_empty(self, *_, **__): return Host(self.array)
    def set_(self, *_): pass
    def copy_(self, _): pass
    def storage_offset(self): return 0
    def size(self): return self.array.shape
    def stride(self): return None


class Tensor(np.ndarray):
    """What a kernel computes with on the machine below."""
    type = types.SimpleNamespace(layout=None)

    def to(self, dtype): return self.astype(dtype)
    def __array_wrap__(self, x, *_): return np.asarray(x).view(Tensor)


class Pointer:
    """An array, and places in it. Reading or writing outside of it is an error."""

    def __init__(self, array, at=0):
        self.array, self.at, self.dtype = array, at, types.SimpleNamespace(element_ty=array.dtype)

    def __add__(self, more): return Pointer(self.array, self.at + more)

    def places(self, mask):
        at, mask = np.broadcast_arrays(self.at, True if mask is None else mask)
        assert ((at >= 0) & (at < self.array.size))[mask].all(), "outside of the array"
        return at, mask


class Shared:
    """Shared memory, and views of it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def index(self, i): return Shared(self.array[int(i)])
    def reshape(self, shape): return Shared(self.array.reshape(shape))
    def permute(self, order): return Shared(self.array.transpose(order))
    def load(self, layout): return self.array.copy().view(Tensor)

    def store(self, x):
        assert x.shape == self.shape and x.dtype == self.dtype
        Machine.now.overwrites(self.array)
        self.array[...] = x


class Machine:
    """Runs one program of a kernel on numpy arrays, as `gl`, `tl` and `hopper` at once. What is asynchronous happens as late
    as it may: a copy leaves NaN until its barrier has been waited for, a product is not there before the wait that covers it, and
    what is still being read must not be overwritten. Warps are one, so it sees no race between them."""
    float32, int32, int64 = np.float32, np.int32, np.int64
    NVMMADistributedLayout = DotOperandLayout = SliceLayout = BlockedLayout = NVMMASharedLayout = staticmethod(lambda *_: None)
    maximum, minimum, static_range = staticmethod(np.maximum), staticmethod(np.minimum), range
    exp2 = staticmethod(lambda x: np.asarray(np.exp2(np.asarray(x, np.float32))).view(Tensor))
    ceil = staticmethod(lambda x: np.asarray(np.ceil(np.asarray(x, np.float32))).view(Tensor))

    def __init__(self, program):
        self.program, self.products, self.mbarrier, self.tma = program, [], self, self
        Machine.now = self

    def debug_barrier(self): pass
    def program_id(self, _): return np.asarray(self.program, np.int32).view(Tensor)
    def arange(self, a, b, layout=None): return np.arange(a, b, dtype=np.int32).view(Tensor)
    def full(self, shape, value, dtype, layout=None): return np.full(shape, value, dtype).view(Tensor)
    def where(self, c, x, y): return np.where(c, x, np.asarray(y, np.asarray(x).dtype)).view(Tensor)
    def convert_layout(self, x, layout): return x
    def allocate_shared_memory(self, dtype, shape, layout): return Shared(np.full(shape, np.nan, dtype))
    def fence_async_shared(self): pass
    def barrier(self): pass
    def trans(self, x): return x.T
    def sum(self, x, axis): return np.asarray(x.sum(axis)).view(Tensor)
    def exp(self, x): return np.asarray(np.exp(x)).view(Tensor)

    def dot(self, a, b, acc=0, input_precision=None):
        return np.asarray(np.asarray(a, np.float32) @ np.asarray(b, np.float32) + acc).view(Tensor)

    def load(self, pointer, mask=None, other=None):
        at, mask = pointer.places(mask)
        return np.where(mask, pointer.array[np.where(mask, at, 0)], np.asarray(other or 0, pointer.array.dtype)).view(Tensor)

    def store(self, pointer, x, mask=None):
        at, mask = pointer.places(mask)
        pointer.array[at[mask]] = np.broadcast_to(x, at.shape)[mask]

    def overwrites(self, array):
        assert not any(np.shares_memory(array, x) for _, _, reads in self.products for x in reads), "overwritten while it is read"

    # barriers
    def allocate_mbarrier(self, batch): return types.SimpleNamespace(index=[types.SimpleNamespace() for _ in range(batch)].__getitem__)
    def init(self, bar, count): bar.phases, bar.bytes, bar.copies = 0, 0, []
    def invalidate(self, bar): assert not bar.copies, "copies that nobody waited for"

    def expect(self, bar, size):
        assert not bar.copies and not bar.bytes
        bar.bytes = size

    def async_load(self, array, where, bar, to):
        self.overwrites(to.array)
        to.array[...] = np.nan
        bar.copies.append((array, where, to.array))

    def wait(self, bar, phase):
        if bar.copies:
            assert bar.bytes == sum(to.nbytes for _, _, to in bar.copies)
            for array, where, to in bar.copies:                  # zeros where it ends
                block = tuple(slice(max(w, 0), w + n) for w, n in zip(where, to.shape))
                part = array[block]
                to[...] = 0
                to[tuple(slice(max(-w, 0), max(-w, 0) + n) for w, n in zip(where, part.shape))] = part
            bar.phases, bar.bytes, bar.copies = bar.phases + 1, 0, []
        assert bar.phases % 2 != phase, "would wait forever"

    # products
    def warpgroup_mma(self, a, b, acc, use_acc=True, is_async=True):
        reads = [x.array for x in (a, b) if isinstance(x, Shared)]
        a, b = (np.asarray(x.array if isinstance(x, Shared) else x, np.float32) for x in (a, b))
        out = object()
        self.products.append((out, (a @ b + (acc if use_acc else 0)).view(Tensor), reads))
        return out

    def warpgroup_mma_wait(self, pending, operands):
        done = {id(out): x for out, x, _ in self.products[:len(self.products) - pending]}
        pairs = [done.get(id(x), x) for x in operands]
        assert all(isinstance(x, np.ndarray) for x in pairs), "not waited for"
        self.products = self.products[len(self.products) - pending:]
        return pairs[0] if len(pairs) == 1 else pairs


class Described(np.ndarray):
    """An array behind a descriptor."""


def run(kernel, module, programs, arrays, constants):
    """A launch of a kernel: its functions once more, with a machine in place of the languages."""
    names = {name: getattr(x, "value", x) if type(x).__name__ == "constexpr" else x for name, x in vars(module).items()}
    for name, f in vars(module).items():
        if isinstance(getattr(f, "fn", None), types.FunctionType):
            names[name] = types.FunctionType(f.fn.__code__, names, name, f.fn.__defaults__)
    names["range"] = lambda *bounds: (np.asarray(i, np.int32).view(Tensor) for i in range(*map(int, bounds)))
    for program in programs:
        names["gl"] = names["tl"] = names["hopper"] = Machine(program)
        names[kernel.fn.__name__](*arrays, **constants)


def interpreted(config, shares_memory):
    """lightning_attn.py once more, its kernels run on the CPU through the file's own launch code: those in Triton by Triton's
    interpreter, those in Gluon, which has none, by the machine above. What may be changed in place is, if it shares memory."""
    import triton
    from triton.runtime import interpreter

    def triton_call(*args, kernel, out_type, grid, num_warps, num_stages, backend_options, in_place={}, **constants):
        leaves, tree = jax.tree.flatten(out_type)
        described = [x if isinstance(x, la.jax_triton.TensorDescriptor) else None for x in args]

        def launch(*arrays):
            arrays = [aligned(np.asarray(x)) for x in arrays]
            out = [aligned(np.full(x.shape, np.nan, x.dtype)) for x in leaves]             # what is not written shows
            for i, o in in_place.items() if shares_memory else ():
                out[o] = arrays[i]
            LAUNCHED.add((kernel.fn.__name__, grid[0]))
            with LOCK, np.errstate(all="ignore"):
                if hasattr(kernel, "is_gluon"):
                    def given(x, d):
                        if d is None:
                            return Pointer(x.reshape(-1))
                        x = x.reshape(d.shape).view(Described)
                        x.nbytes_per_cta, x.layout = int(np.prod(d.block_shape)) * x.itemsize, None
                        return x
                    run(kernel, module, range(grid[0]), [*map(given, arrays, described), *(Pointer(x.reshape(-1)) for x in out)], constants)
                else:
                    with pytest.MonkeyPatch.context() as m:
                        m.setattr(triton.language, "sum", interpreter.InterpretedFunction(triton.language.sum.fn).rewrite())
                        kernel[grid](*map(Host, (*arrays, *out)), **constants)
            return tuple(out)

        operands = [x if d is None else x.base for x, d in zip(args, described)]
        return jax.tree.unflatten(tree, jax.pure_callback(launch, tuple(leaves), *operands))

    triton.knobs.runtime.interpret = True
    try:
        module = load("lightning_attn_interpreted")
    finally:
        triton.knobs.runtime.interpret = False
    module.jax_triton = types.SimpleNamespace(triton_call=triton_call, TensorDescriptor=la.jax_triton.TensorDescriptor)
    module._in_place = lambda call, arrays, in_place: call(*arrays, in_place=in_place)
    module._gpu = lambda: ("sm_90", 132)                          # which the interpreters stand for
    module.SEGMENT = 96                                          # short sequences have segments: interpreters are slow
    module._config = lambda *a: dataclasses.replace(c := config(*a), kernel=getattr(module, c.kernel.fn.__name__))
    for name, f in list(vars(module).items()):                   # what kernels call need not patch the language again, nor for good
        if isinstance(f, interpreter.InterpretedFunction) and not name.endswith("_kernel"):
            plain = f.rewrite()
            plain.fn = f.fn                                      # what the machine above runs
            setattr(module, name, plain)
    return module


LOCK = threading.Lock()                                          # interpreters are one at a time
LAUNCHED = set()                                                 # kernels that they ran, and how many programs


def teach_the_interpreter_bfloat16():
    """It holds bfloat16 as bits: widen what is multiplied, and round to nearest as hardware does."""
    import ml_dtypes
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as builder, TensorHandle
    create_dot, truncate = builder.create_dot, builder.create_fp_trunc

    def dot(self, a, b, acc, *rest):
        def widen(x):
            return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        return create_dot(self, widen(a), widen(b), acc, *rest)

    def fp_trunc(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return truncate(self, src, dst_type)

    builder.create_dot, builder.create_fp_trunc = dot, fp_trunc


def aligned(x):
    """A copy of `x` that starts on 16 bytes, as GPU arrays do."""
    raw = np.empty(x.nbytes + 64, np.uint8)
    out = raw[-raw.ctypes.data % 64:][:x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


INTERPRETED = {}
if HAS_TRITON and not HAS_GPU:
    # neither interpreter minds the dtype: float32 checks the Hopper kernel to 1e-5
    teach_the_interpreter_bfloat16()
    INTERPRETED["interpreter"] = interpreted(lambda arch, *shape: la._config("sm_80", *shape), True)
    if la._HAS_HOPPER:
        # one processor, for which no short sequence's values are cut: tiles stay as large as those of long sequences
        INTERPRETED["gluon"] = interpreted(lambda arch, processors, K, V, dtype, B, H, T, n, dual: la._config(
            "sm_90", 1, -(-K // 8) * 8, -(-V // 8) * 8, np.dtype("float16"), B, H, T if T == 1 else max(T, 64), 1, dual), False)


compiled_reference = jax.jit(lightning_attn_reference, static_argnames=("reverse",))


def attend(path, *args, **kwargs):
    if path in INTERPRETED:
        return INTERPRETED[path].lightning_attn(*args, **kwargs, backend="triton")
    return lightning_attn(*args, **kwargs, backend={"xla": "xla", "gpu": "triton"}[path])


wants_gpu = pytest.mark.skipif(not HAS_GPU, reason="wants a GPU")
PATHS = [pytest.param("xla"),
         *(pytest.param(p, marks=pytest.mark.skipif(p not in INTERPRETED, reason=(
             "the GPU runs these kernels" if HAS_GPU else "no Triton for this path")))
           for p in ("interpreter", "gluon")),
         pytest.param("gpu", marks=wants_gpu)]
each_path = pytest.mark.parametrize("path", PATHS)
P = jax.sharding.PartitionSpec


# The oracle ---------------------------------------------------------------------------------------------------------------------

einsum = functools.partial(np.einsum, optimize=True)                     # in float64, by matrix products


def one_sequence(q, k, v, g, scale, s0, do, ds):
    """Output, final state and all gradients of one sequence, float64: [T, H, D] operands, g [H], s0 and ds [H, K, V].
    Last, for each head, the sum of the squares of the terms that dg sums."""
    T = q.shape[0]
    t = np.arange(T)
    far = t[:, None] - t
    D = np.where(far >= 0, np.exp(g[:, None, None] * np.maximum(far, 0)), 0)                # [H, i, j]
    A, dA = einsum("ihk,jhk->hij", q, k), einsum("ihv,jhv->hij", do, v)
    AD, dAD = A * D, dA * D
    enter, stay = np.exp(g[:, None] * (t + 1)), np.exp(g[:, None] * (T - 1 - t))             # [H, T]
    end = np.exp(g * T)[:, None, None]
    o = scale * (einsum("hij,jhv->ihv", AD, v) + einsum("hi,ihk,hkv->ihv", enter, q, s0))
    s = end * s0 + einsum("hj,jhk,jhv->hkv", stay, k, v)
    dq = scale * (einsum("hij,jhk->ihk", dAD, k) + einsum("hi,ihv,hkv->ihk", enter, do, s0))
    dk = scale * einsum("hij,ihk->jhk", dAD, q) + einsum("hj,jhv,hkv->jhk", stay, v, ds)
    dv = scale * einsum("hij,ihv->jhv", AD, do) + einsum("hj,jhk,hkv->jhv", stay, k, ds)
    ds0 = end * ds + scale * einsum("hi,ihk,ihv->hkv", enter, q, do)
    terms = (scale * AD * dA * np.maximum(far, 0), scale * enter * (t + 1) * einsum("ihk,hkv,ihv->hi", q, s0, do),
             stay * (T - 1 - t) * einsum("jhk,jhv,hkv->hj", k, v, ds), T * end * s0 * ds)
    dg, squares = (sum(f(x).reshape(len(g), -1).sum(1) for x in terms) for f in (np.asarray, np.square))
    return o, s, dq, dk, dv, ds0, dg, squares


def oracle(q, k, v, g, scale, s0, do, ds, reverse=False, cu=None):
    """[o, s, dq, dk, dv, ds0, dg] in float64, whatever the batch, pack, groups and direction, and the root of the sum of the
    squares of dg's terms."""
    q, k, v, g, s0, do, ds = (np.asarray(x, np.float64) for x in (q, k, v, g, s0, do, ds))
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    out = [np.zeros_like(x) for x in (do, ds, q, k, v, s0, g, g)]
    pieces = [(b, b, 0, T) for b in range(B)] if cu is None else [(i, 0, a, b) for i, (a, b) in enumerate(zip(cu, cu[1:]))]
    flip = slice(None, None, -1 if reverse else 1)
    for i, b, start, end in pieces:
        cut = lambda x: x[b, start:end][flip]
        r = one_sequence(cut(q), cut(k), cut(v), g, scale, s0[i], cut(do), ds[i])
        for x, y in zip((out[0], *out[2:5]), (r[0], *r[2:5])):
            x[b, start:end] = y[flip]
        out[1][i], out[5][i] = r[1], r[5]
        out[6] += r[6]
        out[7] += r[7]
    for i in 3, 4:
        out[i] = out[i].reshape(B, T, H // group, group, out[i].shape[-1]).sum(3)
    out[7] = np.sqrt(out[7])
    return out


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    size = np.linalg.norm(want) if want.size and np.any(want) else 1
    off = np.linalg.norm(got - want) / max(size, 1e-30)
    return np.inf if np.isnan(off) else off                      # `max` of a list may pass over NaN


def errors(got, want, name):
    """`error` of each head by itself: of outputs and gradients [B, T, H, D], states [n, H, K, V]."""
    axis = 1 if "state" in name else 2
    return [error(a, b) for a, b in zip(*(np.moveaxis(np.asarray(x), axis, 0) for x in (got, want)), strict=True)]


NAMES = "output final_state dquery dkey dvalue dinitial_state dg_gamma".split()
BAR = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 1e-3}
DG_BAR = {"float32": 2e-3, "bfloat16": 1e-2, "float16": 1e-2}    # of g_gamma's gradient, see `error_of_dg`


def error_of_dg(got, want, size):
    """The largest error of a head, of its gradient or, where that cancels, of the root of the sum of its terms' squares."""
    got, size = np.asarray(got, np.float64), np.maximum(np.abs(want), size)
    assert got.shape == want.shape and np.isfinite(got).all()
    return (np.abs(got - want) / np.maximum(size, 1e-30)).max(initial=0)


def check_dg(path, got, want, size, dtype="float32"):
    """Of results of `everything`: the gradient of g, where it is one of them."""
    assert len(got) == (6 if path in INTERPRETED else 7)
    for dg in got[6:]:
        assert error_of_dg(dg, want, size) < DG_BAR[dtype], (dg, want, size)


def inputs(seed, B, T, H, Hk, K, V, dtype="float32", n=None):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    state = lambda: jnp.asarray(rng.standard_normal((n or B, H, K, V)), jnp.float32)
    return draw(B, T, H, K), draw(B, T, Hk, K), draw(B, T, Hk, V), state(), draw(B, T, H, V), state()


@functools.cache
def everything_on(path, **kwargs):
    """Made once, so that calls of the same shapes compile once. The gradient of g is plain JAX on
    every path: where an interpreter runs the kernels it is left to the cases of plain JAX."""
    @jax.jit
    def run(q, k, v, s0, g, do, ds, cu):
        f = lambda q, k, v, s0, g: attend(path, q, k, v, initial_state=s0, g_gamma=g, cu_seqlens=cu, **kwargs)
        if path in INTERPRETED:
            out, back = jax.vjp(lambda *args: f(*args, g), q, k, v, s0)
        else:
            out, back = jax.vjp(f, q, k, v, s0, g)
        return *out, *back((do, ds))
    return run


def everything(path, q, k, v, s0, do, ds, g, cu_seqlens=None, **kwargs):
    """Results and gradients on a path, as `oracle` lists them; without g's where an interpreter runs."""
    with jax.default_matmul_precision("highest"):
        return everything_on(path, **kwargs)(q, k, v, s0, jnp.asarray(g, jnp.float32), do, ds, cu_seqlens)


def compare(path, q, k, v, s0, do, ds, g=None, bar=None, reverse=False, cu=None, **kwargs):
    H, K = q.shape[2:]
    g = np.asarray(lightning_g_gamma(H, 3, 8), np.float64) if g is None else np.asarray(g, np.float64)
    got = everything(path, q, k, v, s0, do, ds, g, reverse=reverse, cu_seqlens=None if cu is None else jnp.asarray(cu), **kwargs)
    want = oracle(q, k, v, g, kwargs.get("softmax_scale") or K**-0.5, s0, do, ds, reverse, cu)
    bar = bar or BAR[str(q.dtype)]
    for name, a, b in zip(NAMES[:6], got, want):
        assert a.dtype == (q.dtype if name in ("output", "dquery", "dkey", "dvalue") else jnp.float32), name
        assert max(errors(a, b, name)) < bar, (name, errors(a, b, name))
    check_dg(path, got, want[6], want[7], str(q.dtype))


# Against the oracle -------------------------------------------------------------------------------------------------------------

@each_path
@pytest.mark.parametrize("B, T, H, Hk, K, V, reverse", [
    *[(*shape, reverse) for shape in [(2, 150, 4, 2, 16, 24), (1, 1, 2, 1, 16, 16), (1, 333, 4, 1, 5, 7), (1, 65, 2, 2, 72, 130)]
      for reverse in (False, True)],
    # gradients go both ways, so each of these does
    (1, 128, 2, 2, 32, 32, False), (3, 17, 2, 2, 8, 40, True), (1, 64, 1, 1, 1, 1, False)])
def test_batch(path, B, T, H, Hk, K, V, reverse):
    compare(path, *inputs(0, B, T, H, Hk, K, V), reverse=reverse)


@each_path
@pytest.mark.parametrize("T, cu, reverse", [
    *[(T, cu, reverse) for T, cu in [(200, [0, 0, 5, 70, 70, 199, 200]), (150, [0, 65, 66, 140])] for reverse in (False, True)],
    (200, [0, 200], True), (20, [0, 0, 0], False), (7, [0, 3, 7], True)])
def test_packed(path, T, cu, reverse):
    compare(path, *inputs(1, 1, T, 4, 2, 16, 24, n=len(cu) - 1), reverse=reverse, cu=cu)


@each_path
@pytest.mark.parametrize("dtype, reverse", [("bfloat16", False), ("float16", True)])
def test_16_bit(path, reverse, dtype):
    compare(path, *inputs(2, 2, 150, 4, 2, 32, 16, dtype), reverse=reverse)
    compare(path, *inputs(2, 1, 150, 4, 2, 32, 16, dtype, n=3), reverse=reverse, cu=[0, 9, 100, 140])


@each_path
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_accuracy_at_4096_tokens(path, dtype):
    B, T, H, K = 1, 4096, 2, 64
    if path in INTERPRETED or path == "xla" and dtype != "float32":
        T = 512                                                  # interpreters take seconds for each; plain JAX adds in float32, whatever it is given
    elif path == "xla" and not HAS_GPU:
        T = 2048
    compare(path, *inputs(3, B, T, H, H, K, K, dtype))


@each_path
def test_default_precision(path):
    args = inputs(4, 1, 300, 2, 1, 64, 64)
    q, k, v, s0, do, ds = args
    g = np.asarray(lightning_g_gamma(2, 3, 8), np.float64)
    o, s = attend(path, q, k, v, 3, 8, initial_state=s0)
    want = oracle(q, k, v, g, 64**-0.5, s0, do, ds)
    assert error(o, want[0]) < 2e-3 and error(s, want[1]) < 2e-3


@each_path
@pytest.mark.parametrize("g", [[0.0, -1e-4], [-50.0, -1e4], [0.0, -1e-30]])
def test_extreme_decays(path, g):
    compare(path, *inputs(5, 1, 130, 2, 2, 16, 16), g=g)


@each_path
def test_a_decay_of_minus_infinity_forgets_at_once(path):
    q, k, v, s0, do, ds = inputs(5, 1, 130, 2, 2, 16, 16)
    infinite, large = (everything(path, q, k, v, s0, do, ds, np.array([g, -0.1])) for g in (-np.inf, -1e4))
    assert all(np.array_equal(a, b) and np.isfinite(a).all() for a, b in zip(infinite[:6], large[:6]))
    for one, other in zip(infinite[6:], large[6:]):                                        # of g_gamma
        assert one[0] == 0 and one[1] == other[1]


@each_path
@pytest.mark.parametrize("scale", [1.0, -2.5, 0.0])
def test_scale(path, scale):
    q, k, v, s0, do, ds = inputs(6, 1, 70, 2, 2, 16, 16)
    o, s = attend(path, q, k, v, 0, 4, softmax_scale=scale, initial_state=s0)
    want = oracle(q, k, v, np.asarray(lightning_g_gamma(2, 0, 4)), scale, s0, do, ds)
    assert error(o, want[0]) < 2e-3 and error(s, want[1]) < 2e-3
    traced, _ = jax.jit(lambda x: attend(path, q, k, v, 0, 4, softmax_scale=x, initial_state=s0))(jnp.float32(scale))
    assert error(traced, np.asarray(o)) < 2e-3


@each_path
@pytest.mark.parametrize("cu, reverse", [(None, False), ([0, 1350, 1360, 1560], True)])
def test_many_segments(path, reverse, cu):
    """Long sequences are cut in segments, 3 of these tokens, for heads that forget nothing, something and everything."""
    LAUNCHED.clear()
    T, cu = (1600, cu) if path == "gpu" else (380, cu and [0, 300, 310, 370])
    compare(path, *inputs(7, 1, T, 3, 1, 16, 24, n=cu and 3), g=[0.0, -0.01, -3.0], reverse=reverse, cu=cu)
    if path in INTERPRETED:                                      # 2 segments that another one follows, of 2 pieces, 3 heads
        assert {("_states_kernel", 12), ("_link_kernel", 3 if cu is None else 6)} < LAUNCHED


@each_path
def test_segments_with_states_of_several_tiles(path, monkeypatch):
    LAUNCHED.clear()
    monkeypatch.setattr(INTERPRETED.get(path, la), "SEGMENT", 160)
    q, k, v, s0, do, ds = inputs(7, 1, 330, 2, 1, 136, 72)
    if path == "interpreter":                                    # takes a minute for the gradients, which the others compare
        g = jnp.array([0.0, -0.01])
        with jax.default_matmul_precision("highest"):
            got = attend(path, q, k, v, g_gamma=g, initial_state=s0)
        for a, b in zip(got, oracle(q, k, v, g, 136**-0.5, s0, do, ds)):
            assert error(a, b) < 1e-5
    else:
        compare(path, q, k, v, s0, do, ds, g=[0.0, -0.01])
    if path in INTERPRETED:                                      # 2 pieces of one segment, 2 heads, 3 x 2 tiles or, for 16 bits, 2 x 2
        assert {("_states_kernel", 24 if path == "interpreter" else 16), ("_link_kernel", 40)} < LAUNCHED


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("cu, reverse", [(None, False), ([0, 20, 2520, 3150], True)])
def test_segments_in_pieces(path, reverse, cu, precise, monkeypatch):
    """On a GPU that holds 9 or 10 programs, 3 segments of 4 pieces each, of which a head may need all, some, or the end of the last."""
    module = INTERPRETED.get(path, la)
    arch, _ = module._gpu()
    LAUNCHED.clear()
    monkeypatch.setattr(module, "_gpu", lambda: (arch, 9 if path == "interpreter" else 5))
    T, cu = (3200, cu) if path == "gpu" else (760, cu and [0, 5, 600, 750])
    q, k, v, s0, *_ = inputs(7, 1, T, 3, 3, 16, 8, n=cu and 3)
    jax.clear_caches()
    got, want = (attend(p, q, k, v, g_gamma=jnp.array([0.0, -0.2 if path == "gpu" else -1.0, -3.0 if reverse else -0.002]), initial_state=s0, reverse=reverse,
                        cu_seqlens=None if cu is None else jnp.array(cu)) for p in (path, "xla"))
    close(got, want, 1e-5)
    if path in INTERPRETED:
        assert {("_states_kernel", 24), ("_link_kernel", 3 if cu is None else 6)} < LAUNCHED
    jax.clear_caches()


@wants_gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_as_many_segments_as_fill_a_gpu(reverse):
    q, k, v, s0, *_ = inputs(7, 1, 70000, 3, 3, 16, 24)
    with jax.default_matmul_precision("highest"):
        got, want = (f(q, k, v, g_gamma=jnp.array([0.0, -0.01, -3.0]), initial_state=s0, reverse=reverse) for f in (lightning_attn, lightning_attn_reference))
    for a, b in zip(got, want):
        assert error(a, b) < 1e-4


@each_path
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_and_neighbours_may_hold_anything(path, reverse):
    """NaN in one sequence, or past the last one, reaches no other output or gradient, and padding has exactly 0 of both."""
    cu = [0, 30, 95, 140]
    q, k, v, s0, do, ds = inputs(8, 1, 160, 2, 2, 16, 16, n=3)
    g = np.asarray(lightning_g_gamma(2, 3, 8), np.float64)
    want = oracle(q, k, v, g, 0.25, s0, do, ds, reverse, cu)
    spoil = lambda x: x.at[:, 30:95].set(jnp.nan).at[:, 140:].set(jnp.inf)
    got = everything(path, spoil(q), spoil(k), spoil(v), s0, do.at[:, 140:].set(jnp.nan), ds, g, reverse=reverse, cu_seqlens=jnp.array(cu))
    for i in 0, 2, 3, 4:
        x, y = np.asarray(got[i]), want[i]
        assert (x[:, 140:] == 0).all()
        for part in slice(0, 30), slice(95, 140):
            assert error(x[:, part], y[:, part]) < 1e-5, NAMES[i]
    for i in 1, 5:
        assert error(np.asarray(got[i])[[0, 2]], want[i][[0, 2]]) < 1e-5, NAMES[i]
    past = lambda x: x.at[:, 140:].set(jnp.nan)
    got = everything(path, past(q), past(k), past(v), s0, past(do), ds, g, reverse=reverse, cu_seqlens=jnp.array(cu))
    check_dg(path, got, want[6], want[7])
    one_head = everything(path, q.at[:, :, 1].set(jnp.nan), k, v, s0, do, ds, g, reverse=reverse, cu_seqlens=jnp.array(cu))
    assert error(np.asarray(one_head[0])[:, :, 0], want[0][:, :, 0]) < 1e-5


@each_path
@pytest.mark.parametrize("cu, good", [
    ([0, 20, -5, 40, 60], [(0, 0, 20), (3, 40, 60)]), ([0, 20, 2**31 - 1, 40, 60], [(0, 0, 20), (3, 40, 60)]), ([0, 50, 30, 60], [(0, 0, 50)]),
    ([5, 30, 60, 2**31 - 1], [(0, 5, 30), (1, 30, 60)]), ([-2**31, 2**31 - 1, -1, 0], []), ([60, 40, 20, 0], [])])
def test_malformed_traced_boundaries(path, cu, good):
    """What cannot be checked does no harm: well-formed sequences of the pack stay right, every other token's output is 0, and
    every other sequence counts as empty: states and their gradients pass through it."""
    q, k, v, s0, do, ds = inputs(9, 1, 60, 2, 2, 16, 16, n=len(cu) - 1)
    g, bad = np.array([-0.1, 0.0]), [i for i in range(len(cu) - 1) if i not in [x[0] for x in good]]
    got = everything(path, q, k, v, s0, do, ds, g, cu_seqlens=jnp.array(cu, jnp.int32))
    assert np.array_equal(got[1][bad,], s0[bad,]) and np.array_equal(got[5][bad,], ds[bad,])
    with jax.default_matmul_precision("highest"):
        want = compiled_reference(q, k, v, g_gamma=jnp.asarray(g), initial_state=s0, cu_seqlens=jnp.array(cu, jnp.int32))
    close(got[:2], want, 1e-5)
    rest, dg, squares = np.ones(60, bool), np.zeros(2), np.zeros(2)
    for i, start, end in good:
        cut = lambda x: x[:, start:end]
        want = oracle(cut(q), cut(k), cut(v), np.array([-0.1, 0.0]), 0.25, s0[i:i + 1], cut(do), ds[i:i + 1])
        for j in 0, 2, 3, 4:
            assert error(cut(got[j]), want[j]) < 1e-5
        for j in 1, 5:
            assert error(got[j][i:i + 1], want[j]) < 1e-5
        rest[start:end], dg, squares = False, dg + want[6], squares + want[7]**2
    check_dg(path, got, dg, np.sqrt(squares))
    for j in 0, 2, 3, 4:
        assert (np.asarray(got[j])[:, rest] == 0).all()


@each_path
@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_sequences_without_tokens_may_hold_anything(path, reverse):
    """NaN in the last sequence, or in the state that an empty or malformed one starts from, reaches nothing else."""
    q, k, v, s0, do, ds = inputs(8, 1, 160, 2, 1, 16, 16, n=4)
    g, cu = np.asarray(lightning_g_gamma(2, 3, 8), np.float64), [0, 70, -3, 100, 100]
    want = oracle(*(x[:, :70] for x in (q, k, v)), g, 0.25, s0[:1], do[:, :70], ds[:1], reverse)
    spoil = lambda x: x.at[1].set(jnp.nan).at[3].set(jnp.inf)
    # the third sequence is malformed as well: it starts at -3
    got = everything(path, q, k, v, spoil(s0).at[2].set(jnp.nan), do, ds, g, reverse=reverse, cu_seqlens=jnp.array(cu))
    for i in 0, 2, 3, 4:
        assert error(np.asarray(got[i])[:, :70], want[i]) < 1e-5 and (np.asarray(got[i])[:, 70:] == 0).all(), NAMES[i]
    assert np.array_equal(got[5][1:], ds[1:]) and error(got[5][:1], want[5]) < 1e-5 and error(got[1][:1], want[1]) < 1e-5
    check_dg(path, got, want[6], want[7])
    last = lambda x: x.at[:, 70:140].set(jnp.nan)
    got = everything(path, last(q), last(k), last(v), s0[:2], do, ds[:2], g, reverse=reverse, cu_seqlens=jnp.array([0, 70, 140]))
    for i in 0, 2, 3, 4:
        assert error(np.asarray(got[i])[:, :70], want[i]) < 1e-5 and (np.asarray(got[i])[:, 140:] == 0).all(), NAMES[i]


@each_path
@pytest.mark.parametrize("T", [0, 1])
def test_hardly_any_tokens(path, T):
    compare(path, *inputs(10, 2, T, 2, 1, 16, 8))
    if T:
        return
    o, s = attend(path, *inputs(10, 2, 0, 2, 1, 16, 8)[:3], 0, 4)
    assert o.shape == (2, 0, 2, 8) and s.shape == (2, 2, 16, 8) and not s.any()


@each_path
@pytest.mark.parametrize("K, V", [(512, 16), (16, 512), (96, 192), (1, 2)])
def test_head_dims(path, K, V):
    compare(path, *inputs(11, 1, 80, 1, 1, K, V))


# Under JAX's transforms ---------------------------------------------------------------------------------------------------------

SMALL = dict(B=2, T=70, H=2, Hk=1, K=8, V=8)


def close(a, b, bar=2e-5):
    """Compares trees of arrays. Of arrays with heads, each head by itself: heads are the axis before the last or the one before it,
    and where both are short, a slice of either must agree."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert error(x, y) < bar, error(x, y)
        for axis in (-2, -3) if x.ndim > 3 else ():
            if x.shape[axis] <= 16:
                for one, other in zip(np.moveaxis(x, axis, 0), np.moveaxis(y, axis, 0)):
                    assert error(one, other) < bar, (axis, error(one, other))


@pytest.fixture
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("path, mapped", [
    *(("xla", mapped) for mapped in ("q", "qkv", "s0", "g", "kv g", "q k v s0 g")),
    # what is mapped is folded before a path is chosen: kernels see one more row, and a decay for each or for all
    *(pytest.param(*path.values, mapped, marks=path.marks) for path in PATHS[1:] for mapped in ("q k v s0 g",))])
def test_vmap(path, precise, mapped):
    N = 2
    q, k, v, s0, do, ds = inputs(20, N * 2, 70, 2, 1, 8, 8)
    fold = lambda x: x.reshape(N, 2, *x.shape[1:])
    args = dict(q=fold(q), k=fold(k), v=fold(v), s0=fold(s0), g=-jnp.arange(4.0).reshape(N, 2) / 9)
    axes = {n: 0 if n in mapped else None for n in args}
    args = {n: x if axes[n] == 0 else x[0] for n, x in args.items()}

    def loss(q, k, v, s0, g):
        o, s = attend(path, q, k, v, initial_state=s0, g_gamma=g)
        return (o * do[:2]).sum() + (s * ds[:2]).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))
    got = jax.jit(jax.vmap(grad, tuple(axes.values())))(*args.values())
    pick = lambda i: [x[i] if axes[n] == 0 else x for n, x in args.items()]
    want = [grad(*pick(i)) for i in range(N)]
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *want))
    total = jax.jit(jax.grad(lambda *a: jax.vmap(loss, tuple(axes.values()))(*a).sum(), (0, 1, 2, 3, 4)))(*args.values())
    close(total, [sum(w[i] for w in want) if axes[n] is None else jnp.stack([w[i] for w in want]) for i, n in enumerate(args)])


@each_path
@pytest.mark.parametrize("mapped, T", [("q s0", "segments"), ("k v g", 1), ("k", 70), ("v", 70)])
def test_rows_that_vmap_does_not_map_are_shared(path, precise, mapped, T):
    """The cotangent of a sum is not mapped, so of the operands of its gradients only one may be."""
    T = T if T != "segments" else 1100 if path == "gpu" else 200
    q, k, v, s0, _, _ = inputs(22, 3, T, 1, 1, 8, 8)
    args = dict(q=q, k=k, v=v, s0=s0, g=-jnp.arange(3.0)[:, None] / 500)
    axes = {n: 0 if n in mapped.split() else None for n in args}
    args = {n: x if axes[n] == 0 else x[0] for n, x in args.items()}

    def one(q, k, v, s0, g):
        f = lambda q, k, v, s0: attend(path, q[None], k[None], v[None], initial_state=s0[None], g_gamma=g)
        return f(q, k, v, s0), jax.grad(lambda *x: f(*x)[0].sum(), (0, 1, 2, 3))(q, k, v, s0)
    want = [jax.jit(one)(*(x if axes[n] is None else x[i] for n, x in args.items())) for i in range(3)]
    close(jax.jit(jax.vmap(one, tuple(axes.values())))(*args.values()), jax.tree.map(lambda *x: jnp.stack(x), *want))


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("T", [1, 1100])
def test_vmap_copies_nothing_that_is_not_mapped(T):
    q, x, s0 = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((4, 1, T, 2, 16), (1, T, 2, 16), (1, 2, 16, 16)))
    one = lambda q, k, v, s0: lightning_attn(q, k, v, 3, 8, initial_state=s0, backend="triton")
    found = launches("sm_80", jax.vmap(one, (0, None, None, None)), q, x, x, s0)
    rows = {kernel.__name__: [array.shape[0] for array in arrays[:5]] for kernel, arrays, *_ in found}
    scan = "_step_kernel" if T == 1 else "_scan_kernel"
    assert rows[scan] == [4, 1, 1, 1, 1], rows                   # q, k, v, g, s0
    assert T == 1 or rows["_states_kernel"][:3] == [1, 1, 1], rows


@each_path
def test_vmap_of_packs(path, precise):
    q, k, v, s0, do, ds = inputs(21, 3, 70, 2, 1, 8, 8)
    cu = jnp.array([[0, 10, 70], [0, 0, 64], [0, 65, 66]])
    one = lambda q, k, v, cu: attend(path, q[None], k[None], v[None], 1, 4, cu_seqlens=cu)
    single = functools.cache(lambda i, j: one(q[i], k[i], v[i], cu[j]))
    stacked = lambda *pairs: jax.tree.map(lambda *x: jnp.stack(x), *[single(i, j) for i, j in pairs])
    close(jax.vmap(one)(q, k, v, cu), stacked((0, 0), (1, 1), (2, 2)))
    close(jax.vmap(one, (0, 0, 0, None))(q, k, v, cu[0]), stacked((0, 0), (1, 0), (2, 0)))
    close(jax.vmap(one, (None, None, None, 0))(q[0], k[0], v[0], cu), stacked((0, 0), (0, 1), (0, 2)))


@each_path
@pytest.mark.parametrize("left", [False, True])
def test_padded_batches(path, precise, left):
    """A row with n real tokens is a pack of one sequence: output, state and gradients are those of its tokens alone."""
    T, lengths = 70, [70, 33, 0]
    q, k, v, s0, do, ds = inputs(50, len(lengths), T, 2, 1, 8, 8)
    g = jnp.array([-0.1, 0.0])
    attend_row = functools.partial(attend, path, g_gamma=g)

    def padded(q, k, v, s0, n, do, ds):
        states = jnp.stack([s0 * 0, s0]) if left else s0[None]
        def f(q, k, v, states):
            cu = jnp.array([0, T - n, T] if left else [0, n])
            o, s = attend_row(q[None], k[None], v[None], initial_state=states, cu_seqlens=cu)
            return o[0], s[-1]
        (o, s), back = jax.vjp(f, q, k, v, states)
        *grads, dstates = back((do, ds))
        return o, s, *grads, dstates[-1]

    real = [slice(T - n, T) if left else slice(0, n) for n in lengths]
    for i, cut in enumerate(real):                               # what padding holds reaches nothing
        outside = jnp.ones(T, bool).at[cut].set(False)[:, None, None]
        q, k, v = (x.at[i].set(jnp.where(outside, 3.0, x[i])) for x in (q, k, v))
        do = do.at[i].set(jnp.where(outside, 0, do[i]))
    got = jax.jit(jax.vmap(padded))(q, k, v, s0, jnp.array(lengths), do, ds)
    for i, cut in enumerate(real):
        row = [x[i:i + 1, cut] for x in (q, k, v)]
        o, s, *grads, ds0, _, _ = oracle(*row, g, 8**-0.5, s0[i:i + 1], do[i:i + 1, cut], ds[i:i + 1])
        for x, want in zip((got[0], *got[2:5]), (o, *grads)):
            assert error(x[i, cut], want[0]) < 1e-5
        close((got[1][i], got[5][i]), (s[0], ds0[0]), 1e-5)
        if not left:
            assert not any(np.asarray(x[i, lengths[i]:]).any() for x in (got[0], *got[2:5]))


@each_path
def test_scan_over_layers_with_remat(path, precise):
    q, k, v, *_ = inputs(22, **SMALL)

    def stack(x, layers, f):
        def layer(x, i):
            return x + f(x, k, v, i)[0], None
        return lax_scan(jax.checkpoint(layer), x, jnp.arange(layers))[0]

    lax_scan = jax.lax.scan
    ours = jax.jit(jax.value_and_grad(lambda x: (stack(x, 3, lambda q, k, v, i: attend(path, q, k, v, i, 3)) ** 2).sum()))(q)
    by_hand = jax.value_and_grad(lambda x: (stack(x, 3, lambda q, k, v, i: lightning_attn_reference(q, k, v, i, 3)) ** 2).sum())(q)
    close(ours, by_hand)


@each_path
@pytest.mark.parametrize("result", [0, 1])
def test_gradients_of_one_result(path, precise, result):
    """The other one has no cotangent, which is not the same as zeros."""
    q, k, v, s0, do, ds = inputs(28, **SMALL)
    g = jnp.linspace(-0.3, 0, q.shape[2])
    gradients = lambda f: jax.jit(jax.grad(lambda q, k, v, s0, g: (f(q, k, v, initial_state=s0, g_gamma=g)[result] * (do, ds)[result]).sum(), (0, 1, 2, 3, 4)))(q, k, v, s0, g)
    close(gradients(functools.partial(attend, path)), gradients(lightning_attn_reference))


@each_path
@pytest.mark.parametrize("cu", [None, [0, 30, 30, 70]])
def test_no_final_state(path, precise, cu):
    """Without one the output and all gradients are those of a final state that nobody reads."""
    q, k, v, s0, do, _ = inputs(28, 1, 70, 2, 1, 8, 8, n=cu and 3)
    cu, g = None if cu is None else jnp.array(cu), jnp.linspace(-0.3, 0, 2)

    def gradients(**kwargs):
        f = lambda q, k, v, s0, g: (attend(path, q, k, v, initial_state=s0, g_gamma=g, cu_seqlens=cu, **kwargs)[0] * do).sum()
        return jax.jit(jax.value_and_grad(f, (0, 1, 2, 3, 4)))(q, k, v, s0, g)

    assert attend(path, q, k, v, g_gamma=g, cu_seqlens=cu, output_final_state=False)[1] is None
    close(gradients(output_final_state=False), gradients(), 1e-6)
    close(attend(path, q[:, :1], k[:, :1], v[:, :1], 1, 2, initial_state=s0[:1], output_final_state=False)[0],
          attend(path, q[:, :1], k[:, :1], v[:, :1], 1, 2, initial_state=s0[:1])[0], 1e-6)


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_states_that_nobody_reads_are_not_written():
    """Of the scans of a gradient, only dv's has a final state, and only for the gradient of an initial state."""
    x, s0 = jax.ShapeDtypeStruct((4, 200, 64, 64), "bfloat16"), jax.ShapeDtypeStruct((4, 64, 64, 64), "float32")
    def written(f, *args):
        found = launches("sm_90", f, *args)
        ways = [la._Params(*arguments["params"]).way for kernel, _, arguments, _ in found if kernel.__name__ == "_hopper_kernel"]
        return [bool(way & la._Way.FINAL_STATE) for way in ways]
    loss = lambda x, s0: lightning_attn(x, x, x, 1, 2, initial_state=s0, output_final_state=False, backend="triton")[0].astype(jnp.float32).sum()
    assert written(jax.grad(loss), x, None) == [0, 0]            # forward and dq, which is the same call; dv and dk
    assert written(jax.grad(loss, (0, 1)), x, s0) == [0, 1]
    both = lambda x: sum(y.astype(jnp.float32).sum() for y in lightning_attn(x, x, x, 1, 2, backend="triton"))
    assert written(jax.grad(both), x) == [1, 0, 0]


@wants_gpu
def test_a_decode_step_takes_the_memory_of_its_state():
    """Donated, or carried through a loop: no second state, and no copy. Not donated, the caller's state is as it was."""
    q, k, v, s0, *_ = inputs(28, 8, 1, 16, 16, 64, 64, "bfloat16")
    f = lambda s0, q, k, v: lightning_attn(q, k, v, 1, 2, initial_state=s0)
    memory = jax.jit(f, donate_argnums=0).lower(s0, q, k, v).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= s0.nbytes and memory.temp_size_in_bytes < s0.nbytes / 8
    loop = jax.jit(lambda s0, q, k, v: jax.lax.scan(lambda s, x: f(s, *x)[::-1], s0, (q, k, v)), donate_argnums=0)
    stacked = [jnp.stack([x, x, x]) for x in (q, k, v)]
    text = loop.lower(s0, *stacked).compile().as_text()
    assert not re.search(r"= f32\[[\d,]*16,64,64\]\S* copy\(", text)
    before = np.asarray(s0)
    want = f(f(f(s0, q, k, v)[1], q, k, v)[1], q, k, v)
    assert np.array_equal(s0, before)
    got = loop(s0, *stacked)
    close((got[1][2], got[0]), want, 1e-6)
    layers = jnp.stack([jnp.asarray(before)] * 3)                # of a model: states are scanned over, and stacked again
    got = jax.jit(lambda s, q, k, v: jax.lax.scan(lambda c, s: (c, f(s, q, k, v)), 0, s)[1])(layers, q, k, v)
    close((got[0][2], got[1][2]), f(layers[0], q, k, v), 1e-6)


@each_path
def test_second_derivatives(path, precise):
    q, k, v, s0, do, ds = inputs(23, 1, 5, 2, 1, 3, 2)
    at, along = (q, k, v, s0, jnp.array([-0.1, -0.7])), (*inputs(29, 1, 5, 2, 1, 3, 2)[:4], jnp.array([0.3, -1.2]))
    dot = lambda xs, ys: sum(jnp.vdot(x, y) for x, y in zip(xs, ys))

    def twice(f):
        first = jax.grad(lambda q, k, v, s0, g: dot(f(q, k, v, initial_state=s0, g_gamma=g), (do, ds)), (0, 1, 2, 3, 4))
        return jax.jit(jax.grad(lambda *x: dot(first(*x), along), (0, 1, 2, 3, 4)))(*at)

    close(twice(functools.partial(attend, path)), twice(lightning_attn_reference), 1e-4)


@each_path
def test_other_transforms(path, precise):
    q, k, v, s0, *_ = inputs(24, **SMALL)
    f = lambda q, k, v, s0: attend(path, q, k, v, 1, 4, initial_state=s0)
    want = f(q, k, v, s0)
    shapes = jax.eval_shape(f, q, k, v, s0)
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in want]
    if path == "xla":
        with jax.disable_jit():
            close(f(q, k, v, s0), want)
    if path not in INTERPRETED:                                  # a Python callback cannot be exported
        exported = jax.export.export(jax.jit(f), disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")])(q, k, v, s0)
        close(jax.export.deserialize(exported.serialize()).call(q, k, v, s0), want)
    with jax.debug_nans(True):
        close(jax.jit(f)(q, k, v, s0), want)
    donated = jax.jit(f, donate_argnums=3)(q, k, v, s0 + 0)
    close(donated, want)
    results = []

    def call():
        with jax.default_matmul_precision("highest"):            # a thread starts with the default
            results.append(jax.jit(f)(q, k, v, s0))

    threads = [threading.Thread(target=call) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(results) == 8
    for r in results:
        close(r, want, 1e-12)


def test_float64():
    with jax.enable_x64(True):
        q, k, v, s0, do, ds = (jnp.asarray(np.asarray(x), jnp.float64) for x in inputs(25, 2, 70, 2, 1, 8, 8))
        g = jnp.array([-0.1, -0.5], jnp.float64)
        run = jax.vjp(lambda q, k, v, s0, g: lightning_attn(q, k, v, initial_state=s0, g_gamma=g), q, k, v, s0, g)
        got = *run[0], *run[1]((do, ds))
        for name, a, b in zip(NAMES, got, oracle(q, k, v, g, 8**-0.5, s0, do, ds)[:7], strict=True):
            assert a.dtype == jnp.float64 and error(a, b) < 1e-12, name
        f32 = lightning_attn(*(x.astype(jnp.float32) for x in (q, k, v)), 1, 4)
        assert all(x.dtype == jnp.float32 for x in f32)


def test_reference():
    for reverse in False, True:
        q, k, v, s0, do, ds = inputs(26, 1, 70, 4, 2, 8, 6, n=3)
        g, cu = np.asarray(lightning_g_gamma(4, 3, 8), np.float64), [0, 9, 9, 60]
        got = lightning_attn_reference(q, k, v, 3, 8, initial_state=s0, reverse=reverse, cu_seqlens=jnp.array(cu))
        close(got, oracle(q, k, v, g, 8**-0.5, s0, do, ds, reverse, cu)[:2])


@each_path
def test_a_small_model_learns(path, precise):
    """Two layers learn to say at the end which token came first, 100 tokens ago: that takes memory across chunks."""
    B, T, H, D, words = 2 if path in INTERPRETED else 16, 100, 2, 16, 4
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, words, (B, T)))
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / shape[-2]**0.5, jnp.float32)
    params = dict(embed=draw(words, H * D) * 2, place=jnp.asarray(rng.standard_normal((T, H * D)), jnp.float32), qkv=draw(2, H * D, 3 * H * D), head=draw(H * D, words))

    def loss(p, path):
        def layer(x, w):
            weights, i = w
            q, k, v = jnp.split((x @ weights).reshape(B, T, 3 * H, D), 3, axis=2)
            o, _ = attend(path, q, k, v, i, 2)
            o = o / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-3)
            return x + o.reshape(B, T, H * D), None
        x, _ = jax.lax.scan(layer, p["embed"][tokens] + p["place"], (p["qkv"], jnp.arange(2)))
        return -jax.nn.log_softmax(x[:, -1] @ p["head"])[jnp.arange(B), tokens[:, 0]].mean()

    def losses(path, steps):
        @jax.jit
        def step(p):
            value, grad = jax.value_and_grad(loss)(p, path)
            return jax.tree.map(lambda x, d: x - 0.1 * d, p, grad), value

        p, values = params, []
        for _ in range(steps):
            p, value = step(p)
            values.append(float(value))
        return values

    if path in INTERPRETED:                                      # seconds a step: the same first steps as plain JAX takes
        assert np.allclose(losses(path, 1), losses("xla", 1), rtol=1e-5)
    else:
        assert losses(path, 100)[-1] < 0.1


# Wrong calls --------------------------------------------------------------------------------------------------------------------

def bad_calls():
    """(name, arguments that differ from a good call's, error, words that its message must have)."""
    x = lambda *shape, dtype="float32": np.ones(shape, dtype)
    q, k = x(2, 8, 4, 16), x(2, 8, 2, 16)
    pack = dict(query=x(1, 8, 4, 16), key=x(1, 8, 2, 16), value=x(1, 8, 2, 16))
    cu = lambda *c, dtype="int32": pack | dict(cu_seqlens=np.array(c, dtype))
    gamma = lambda g: dict(layer_idx=None, num_layers=None, g_gamma=g)
    V, T = ValueError, TypeError
    return [
        ("query no array", dict(query=[[1.0]]), T, "query: expected an array, got list"),
        ("key no array", dict(key=3.0), T, "key: expected an array, got float"),
        ("value None", dict(value=None), T, "value: expected an array, got NoneType"),
        ("query rank", dict(query=q[0]), V, "query: expected shape [batch, seq_len, num_heads, qk_head_dim], got (8, 4, 16)"),
        ("key rank", dict(key=k[0]), V, "key: expected shape [2, 8, num_kv_heads, 16], got (8, 2, 16)"),
        ("value rank", dict(value=k[..., None]), V, "value: expected shape [2, 8, 2, v_head_dim], got (2, 8, 2, 16, 1)"),
        ("key batch", dict(key=k[:1]), V, "key: expected shape [2, 8, num_kv_heads, 16], got (1, 8, 2, 16)"),
        ("key tokens", dict(key=k[:, :7]), V, "got (2, 7, 2, 16)"),
        ("key head dim", dict(key=k[..., :8]), V, "got (2, 8, 2, 8)"),
        ("value batch", dict(value=k[:1]), V, "value: expected shape [2, 8, 2, v_head_dim], got (1, 8, 2, 16)"),
        ("value tokens", dict(value=k[:, :7]), V, "value: expected shape"),
        ("value heads", dict(value=k[:, :, :1]), V, "value: expected shape [2, 8, 2, v_head_dim], got (2, 8, 1, 16)"),
        ("heads not a multiple", dict(query=x(2, 8, 3, 16)), V, "key: expected num_kv_heads to divide num_heads, got 2 and 3"),
        ("no kv heads", dict(key=k[:, :, :0], value=k[:, :, :0]), V, "got 0 and 4"),
        ("query integers", dict(query=q.astype("int32")), T, "query: expected floating point, got int32"),
        ("key complex", dict(key=k.astype("complex64")), T, "key: expected floating point, got complex64"),
        ("dtypes differ", dict(key=k.astype("float16")), T, "key: expected the dtype of query, float32, got float16"),
        ("value dtype differs", dict(value=jnp.asarray(k, "bfloat16")), T, "value: expected the dtype of query, float32, got bfloat16"),
        ("float8", dict(query=jnp.asarray(q, "float8_e4m3fn")), T, "query: expected float32, bfloat16, float16 or float64, got float8_e4m3fn"),
        ("qk head dim 513", dict(query=x(2, 8, 4, 513), key=x(2, 8, 2, 513)), V, "query: expected a head dim from 1 to 512, got 513"),
        ("v head dim 600", dict(value=x(2, 8, 2, 600)), V, "value: expected a head dim from 1 to 512, got 600"),
        ("head dim 0", dict(query=q[..., :0], key=k[..., :0]), V, "query: expected a head dim from 1 to 512, got 0"),
        ("layer_idx too large", dict(layer_idx=4), V, "layer_idx: expected 0 to num_layers - 1, got 4 of 4"),
        ("layer_idx negative", dict(layer_idx=-1), V, "layer_idx: expected 0 to num_layers - 1, got -1"),
        ("layer_idx float", dict(layer_idx=1.5), T, "layer_idx: expected an integer, got 1.5"),
        ("layer_idx bool", dict(layer_idx=True), T, "layer_idx: expected an integer, got True"),
        ("layer_idx array", dict(layer_idx=np.array([1, 2])), V, "layer_idx: expected a scalar, got shape (2,)"),
        ("num_layers 0", dict(layer_idx=0, num_layers=0), V, "num_layers: expected 1 to 2**31 - 1, got 0"),
        ("num_layers missing", dict(num_layers=None), V, "num_layers: expected both layer_idx and num_layers"),
        ("layer_idx missing", dict(layer_idx=None), V, "layer_idx: expected both layer_idx and num_layers"),
        ("no decay", dict(layer_idx=None, num_layers=None), V, "layer_idx: expected both"),
        ("two decays", dict(g_gamma=x(4)), V, "g_gamma: expected either g_gamma or layer_idx and num_layers, got both"),
        ("g_gamma positive", gamma(np.array([0, -1, -2, 0.5], "float32")), V, "g_gamma: expected log decays <= 0, got 0.5"),
        ("g_gamma NaN", gamma(np.full(4, np.nan, "float32")), V, "g_gamma: expected log decays <= 0, got nan"),
        ("g_gamma size", gamma(x(3)), V, "g_gamma: expected shape [4], got (3,)"),
        ("g_gamma integers", gamma(np.zeros(4, "int32")), T, "g_gamma: expected floating point, got int32"),
        ("scale vector", dict(softmax_scale=x(4)), V, "softmax_scale: expected a scalar, got shape (4,)"),
        ("scale complex", dict(softmax_scale=1j), T, "softmax_scale: expected a real number, got 1j"),
        ("reverse no bool", dict(reverse="yes"), T, "reverse: expected True or False, got 'yes'"),
        ("final state no bool", dict(output_final_state=1), T, "output_final_state: expected True or False, got 1"),
        ("state rank", dict(initial_state=x(4, 16, 16)), V, "initial_state: expected shape [2, 4, 16, 16], got (4, 16, 16)"),
        ("state heads", dict(initial_state=x(2, 2, 16, 16)), V, "initial_state: expected shape [2, 4, 16, 16]"),
        ("state count", dict(initial_state=x(3, 4, 16, 16)), V, "initial_state: expected 2 states, the batch, got 3"),
        ("state integers", dict(initial_state=x(2, 4, 16, 16, dtype="int32")), T, "initial_state: expected floating point, got int32"),
        ("state count, packed", cu(0, 4, 8) | dict(initial_state=x(1, 4, 16, 16)), V, "initial_state: expected 2 states, the number of packed sequences, got 1"),
        ("boundaries, batch 2", dict(cu_seqlens=np.array([0, 8])), V, "cu_seqlens: expected a batch of 1"),
        ("boundaries rank", pack | dict(cu_seqlens=np.zeros((2, 2), "int32")), V, "cu_seqlens: expected shape [num_seqs + 1], got (2, 2)"),
        ("boundaries float", cu(0, 8, dtype="float32"), T, "cu_seqlens: expected integers, got float32"),
        ("one boundary", cu(0), V, "cu_seqlens: expected at least 2 boundaries, got 1"),
        ("boundaries from 1", cu(1, 8), V, "cu_seqlens: expected to start at 0, got 1"),
        ("boundaries decrease", cu(0, 5, 3), V, "cu_seqlens: expected boundaries that do not decrease, got [0 5 3]"),
        ("boundaries past the end", cu(0, 9), V, "cu_seqlens: expected boundaries up to seq_len, 8, got 9"),
        ("backend", dict(backend="cuda"), V, 'backend: expected None, "triton" or "xla", got \'cuda\''),
        ("seq_axis with a pack", cu(0, 8) | dict(seq_axis="s"), V, "seq_axis: expected None with cu_seqlens"),
        ("backend array", dict(backend=x(2)), V, 'backend: expected None, "triton" or "xla", got array('),
        ("layer_idx text", dict(layer_idx="3"), T, "layer_idx: expected an integer, got '3'"),
        ("layer_idx list", dict(layer_idx=[1]), T, "layer_idx: expected an integer, got [1]"),
        ("layer_idx object", dict(layer_idx=V), T, "layer_idx: expected an integer, got <class 'ValueError'>"),
        ("layer_idx huge", dict(layer_idx=10**400), V, "layer_idx: expected 0 to num_layers - 1, got 1000"),
        ("layer_idx decays", dict(layer_idx=-x(4), num_layers=None), T, "log decays are given by name, as g_gamma="),
        ("num_layers text", dict(num_layers="3"), T, "num_layers: expected an integer, got '3'"),
        ("num_layers list", dict(num_layers=[1]), T, "num_layers: expected an integer, got [1]"),
        ("num_layers object", dict(num_layers=V), T, "num_layers: expected an integer, got <class 'ValueError'>"),
        ("num_layers huge", dict(num_layers=2**31), V, "num_layers: expected 1 to 2**31 - 1, got 2147483648"),
        ("scale text", dict(softmax_scale="big"), T, "softmax_scale: expected a real number, got 'big'"),
        ("scale dict", dict(softmax_scale={}), T, "softmax_scale: expected a real number, got {}"),
        ("scale bool", dict(softmax_scale=True), T, "softmax_scale: expected a real number, got True"),
        *((f"scale {s}", dict(softmax_scale=s), V, f"softmax_scale: expected 0 or a normal number of float32, got {float(s)!r}")
          for s in (1e-40, -1e-40, 1e39, np.inf, np.nan, np.float64(1e39))),
        ("scale huge", dict(softmax_scale=10**400), V, "softmax_scale: expected 0 or a normal number of float32, got inf"),
        ("boundaries ragged", pack | dict(cu_seqlens=[0, [1, 8]]), T, "cu_seqlens: expected integers, got [0, [1, 8]]"),
        ("boundaries object", pack | dict(cu_seqlens=V), T, "cu_seqlens: expected an array, got type"),
        ("boundaries text", pack | dict(cu_seqlens=["0", "8"]), T, "cu_seqlens: expected integers, got ['0', '8']"),
        ("boundaries past int32", cu(0, 2**32 + 5, dtype="int64"), V, "boundaries up to seq_len, 8, got 4294967301"),
        ("boundaries past int32, listed", pack | dict(cu_seqlens=[0, 2**32 + 5]), V, "boundaries up to seq_len, 8, got 4294967301"),
        ("boundaries past int64", pack | dict(cu_seqlens=[0, 2**70]), T, "cu_seqlens: expected integers, got [0, 1180591620717411303424]"),
        ("boundaries uint64", cu(0, 2**63 + 5, dtype="uint64"), V, "boundaries up to seq_len, 8, got 9223372036854775813"),
        ("lengths", cu(3, 5), V, "cu_seqlens: expected to start at 0, got 3 in [3 5]. These look like lengths: it takes boundaries"),
        ("state count, number", dict(initial_state=x(2, 16, 16)), V, "initial_state: expected shape [2, 4, 16, 16], got (2, 16, 16)"),
        ("state count, packed, number", cu(0, 4, 8, 8) | dict(initial_state=x(3, 4, 16)), V, "initial_state: expected shape [3, 4, 16, 16]"),
        ("heads before tokens", gamma(-x(8)), V, "g_gamma: expected shape [4], got (8,). query is [batch, seq_len, num_heads, head_dim], so here seq_len is 8"),
        ("state of heads before tokens", dict(initial_state=x(2, 8, 16, 16)), V, "here seq_len is 8 and num_heads 4"),
        ("seq_axis number", dict(seq_axis=3), T, "seq_axis: expected the name of an axis of a shard_map around this call, got 3"),
        ("seq_axis none", dict(seq_axis=()), T, "seq_axis: expected the name of an axis of a shard_map around this call, got ()"),
        *([("no GPU", dict(backend="triton"), V, 'backend: expected None or "xla" where there is no GPU')] if HAS_TRITON and not HAS_GPU else []),
        ("seq_axis of no mesh", dict(seq_axis="nowhere"), V, "seq_axis: expected an axis of a shard_map around this call, got 'nowhere'"),
    ]


@pytest.mark.parametrize("name, change, kind, words", bad_calls(), ids=lambda x: x if isinstance(x, str) and len(x) < 30 else "")
def test_wrong_calls(name, change, kind, words):
    x = lambda *shape: np.ones(shape, "float32")
    good = dict(query=x(2, 8, 4, 16), key=x(2, 8, 2, 16), value=x(2, 8, 2, 16), layer_idx=1, num_layers=4)
    lightning_attn(**good)
    with pytest.raises(kind) as info:
        lightning_attn(**good | change)
    assert words in str(info.value)


def test_numbers_of_any_make():
    """Python's, numpy's and JAX's, as scalars and as arrays without axes."""
    x = jnp.ones((1, 8, 4, 8))
    want = lightning_attn(x, x, x, 1, 4, 0.5)
    for number in np.int64, np.uint8, np.array, jnp.int32, jnp.uint8:
        close(lightning_attn(x, x, x, number(1), number(4), np.float32(0.5)), want)
    for scale in np.float64(0.5), np.array(0.5), np.float16(0.5), jnp.bfloat16(0.5), jnp.array(0.5):
        close(lightning_attn(x, x, x, 1, 4, scale), want)
    close(lightning_attn(x, x, x, 1, 4, np.int8(2)), lightning_attn(x, x, x, 1, 4, 2))
    want = lightning_attn(x, x, x, 1, 4, cu_seqlens=jnp.array([0, 3, 8]))
    for cu in [0, 3, 8], (np.int64(0), jnp.int32(3), np.array(8)), np.array([0, 3, 8]), np.array([0, 3, 8], "uint64"), jnp.array([0, 3, 8], "int8"):
        close(lightning_attn(x, x, x, 1, 4, cu_seqlens=cu), want)


def test_messages_for_what_is_traced():
    x = jnp.ones((1, 8, 4, 8))
    with pytest.raises(TypeError, match=r"cu_seqlens: expected .* jnp.array\(\[...\]\) or jnp.stack"):
        jax.jit(lambda n: lightning_attn(x, x, x, 1, 4, cu_seqlens=[0, n, 8]))(3)
    with pytest.raises(TypeError, match="reverse: expected True or False, got .*static"):
        jax.jit(lambda r: lightning_attn(x, x, x, 1, 4, reverse=r))(True)
    with pytest.raises(ValueError, match="num_layers: expected 1 to 2"):
        lightning_g_gamma(4, 0, 0)
    with pytest.raises(ValueError, match="num_heads: expected an integer of at least 1, got 0"):
        lightning_g_gamma(0, 0, 1)


def test_gradient_of_the_decay_where_one_chunk_is_all_and_heads_are_shared(precise):
    """XLA before jax 0.12 summed wrongly here, where it saw that the key heads were copies of one."""
    q, k, v, s0, do, ds = inputs(7, 1, 64, 2, 1, 8, 8)
    op = la._Op(8**-0.5, False, False, "xla", "highest")
    g = jnp.array([[0.0, -0.05]])
    gradient = lambda k, v: la._decay_gradient(op, q, k, v, g, s0[:, None], None, do, ds[:, None])
    close(gradient(k, v), gradient(jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)))


def test_decays_that_cannot_be_checked_do_not_grow():
    """A traced decay above 0 counts as 0, with no gradient; that of a decay of 0 is whole. So do layers past the last one."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 70, 4, 8)), "float32")
    g = jnp.array([0, 0.5, np.inf, -0.5])
    loss = lambda g: lightning_attn(x, x, x, g_gamma=g)[1].sum()
    value, dg = jax.jit(jax.value_and_grad(loss))(g)
    want, dwant = jax.value_and_grad(loss)(jnp.minimum(g, 0))
    close(value, want)
    close(dg, dwant * (g <= 0), 1e-3)
    past = jax.jit(lambda layer: lightning_attn(x, x, x, layer, 4)[1])(9)
    close(past, lightning_attn(x, x, x, g_gamma=jnp.zeros(4))[1])


def test_float64_layers():
    """Their decays are float64 as well, concrete and traced: 1 - 1/3 is no float32."""
    with jax.enable_x64(True):
        x = jnp.ones((1, 40, 3, 2), jnp.float64)
        layer = lambda i: lightning_attn(x, x, x, i, 3)[1]
        want = lightning_attn(x, x, x, g_gamma=(1 - 1 / 3) * -8 / 3 * np.arange(3))[1]
        close([layer(1), jax.jit(layer)(1)], [want, want], 1e-13)
        assert lightning_g_gamma(3, 1, 3).dtype == jax.jit(lightning_g_gamma, static_argnums=0)(3, 1, 3).dtype == jnp.float32


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["xla", None])
def test_strict_promotion(packed, backend):
    """What a caller forbids in code of their own is not their concern here."""
    q, k = jnp.ones((1, 70, 4, 8), "bfloat16"), jnp.ones((1, 70, 2, 8), "bfloat16")
    cu, s0, g, layer = jnp.array([0, 30, 60]), jnp.ones((2 if packed else 1, 4, 8, 8), "float16"), -jnp.ones(4), jnp.int32(1)
    pack = dict(cu_seqlens=cu) if packed else {}
    total = lambda o, s: o.astype(jnp.float32).sum() + s.sum()
    loss = lambda q, k, s0, g: total(*lightning_attn(q, k, k, initial_state=s0, g_gamma=g, backend=backend, **pack))
    jax.clear_caches()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        run = jax.value_and_grad(loss, (0, 1, 2, 3))
        jax.jit(run)(q, k, s0, g)
        jax.eval_shape(jax.vmap(run), *(x[None] for x in (q, k, s0, g)))
        jax.eval_shape(jax.grad(lambda q: jax.grad(loss)(q, k, s0, g).astype(jnp.float32).sum()), q)
        jax.eval_shape(lambda i, n, scale: lightning_attn(q, k, k, i, n, scale, backend=backend, **pack), layer, layer, jnp.float32(1))
        jax.eval_shape(lambda q: lightning_attn_reference(q, k, k, 1, 4, initial_state=s0, **pack), q)
        lightning_g_gamma(4, layer, np.int16(4))


@pytest.mark.skipif(len(jax.devices()) < 4, reason="fewer than 4 devices")
@pytest.mark.parametrize("seq_axis", [None, "s"])
def test_strict_promotion_on_many_devices(seq_axis):
    mesh = jax.make_mesh((4,), ("s",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    x, g, s0 = jnp.ones((4, 80, 4, 8)), -jnp.ones(4), jnp.ones((4, 4, 8, 8))
    f = lambda x, g, s0: lightning_attn(x, x, x, g_gamma=g, initial_state=s0, seq_axis=seq_axis)
    if seq_axis:
        f = jax.shard_map(f, mesh=mesh, in_specs=(P(None, "s"), P(), P()), out_specs=(P(None, "s"), P()))
    x, s0 = (jax.device_put(y, jax.NamedSharding(mesh, P() if seq_axis else P("s"))) for y in (x, s0))
    jax.clear_caches()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.jit(jax.grad(lambda *a: sum(y.sum() for y in f(*a)), (0, 1, 2)))(x, g, s0)


def test_nothing_is_fetched_while_tracing():
    """A deleted array stands for one whose values are on a device: to read it is an error."""
    x, x8 = jnp.ones((1, 70, 2, 8)), jnp.array([0, 70], jnp.int8)
    g, layer = jnp.array([-0.1, -0.2]), jnp.int32(1)
    for array in g, layer, x8:
        array.delete()
    call = lambda x, *args, **kwargs: lightning_attn(x, x, x, *args, **kwargs)[0].sum()
    jax.eval_shape(jax.grad(lambda x: call(x, g_gamma=g)), x)
    jax.eval_shape(jax.grad(lambda x: call(x, layer, 2)), x)
    jax.eval_shape(jax.grad(lambda x: call(x, 1, 2, cu_seqlens=x8)), x)
    jaxpr = jax.make_jaxpr(jax.jit(jax.grad(lambda x: call(x, 1, 2))))(x)
    assert not any(isinstance(c, jax.Array) for c in jaxpr.consts)


def test_decays_on_other_hosts_are_not_fetched(monkeypatch):
    g = jnp.array([-0.1, 0.2])
    monkeypatch.setattr(type(g), "is_fully_addressable", False)
    assert la._known(g) is None


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_precision_by_name():
    """Whatever is not known to be one pass of TF32 or less is more than that."""
    x = jax.ShapeDtypeStruct((1, 70, 2, 16), "float32")
    precise = "high highest float32 F32_F32_F32 TF32_TF32_F32_X3 BF16_BF16_F32_X3 BF16_BF16_F32_X6 BF16_BF16_F32_X9 F64_F64_F64".split()
    fast = [None, *"default bfloat16 tensorfloat32 TF32_TF32_F32 BF16_BF16_F32 BF16_BF16_BF16 F16_F16_F32 F16_F16_F16 ANY_F8_ANY_F8_F32".split()]
    for name in precise + fast:
        with jax.default_matmul_precision(name):
            (_, _, arguments, _), = launches("sm_80", lambda x: lightning_attn(x, x, x, 1, 4, backend="triton"), x)
        assert arguments["PRECISION"] == ("tf32x3" if name in precise else "tf32"), name


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_gpus_without_matrix_products_in_triton():
    """A T4 takes plain JAX, and says so where it is asked for kernels."""
    x = jax.ShapeDtypeStruct((1, 70, 2, 16), "float32")
    call = lambda backend: launches("sm_75", lambda x: lightning_attn(x, x, x, 1, 4, backend=backend), x)
    assert not call(None)
    with pytest.raises(ValueError, match='backend: expected None or "xla" .*got "triton" and sm_75'):
        call("triton")


@pytest.mark.skipif(not la._HAS_HOPPER, reason="no Gluon kernel in this Triton")
@pytest.mark.parametrize("dtype, H, T, n, forward, backward", [
    ("bfloat16", 2, 8192, 1, "_hopper_kernel 64 128", "_hopper_kernel 64 128 dual"),
    ("bfloat16", 2, 8192, 256, "_hopper_kernel 64 128", "_hopper_kernel 64 128 dual"),
    ("bfloat16", 2, 8192, 1024, "_scan_kernel 16 128", "_scan_kernel 16 128"),
    ("bfloat16", 100, 63, 1, "_scan_kernel 64 128", "_scan_kernel 64 128"),
    ("bfloat16", 2, 1023, 1, "_hopper_kernel 64 64", "_hopper_kernel 64 64"),
    ("bfloat16", 66, 2048, 1, "_hopper_kernel 64 64", "_hopper_kernel 64 128 dual"),
    ("bfloat16", 67, 2048, 1, "_hopper_kernel 64 128", "_hopper_kernel 64 128 dual"),
    ("bfloat16", 8, 1023, 16, "_hopper_kernel 64 128", "_hopper_kernel 64 128 dual"),
    ("float32", 33, 512, 1, "_scan_kernel 32 32", "_scan_kernel 32 32"),
    ("float32", 34, 512, 1, "_scan_kernel 32 64", "_scan_kernel 32 64"),
    ("float32", 2, 1024, 1, "_scan_kernel 32 128", "_scan_kernel 32 128")])
def test_short_sequences_take_short_chunks_and_few_values(dtype, H, T, n, forward, backward):
    """The kernel, its tokens per chunk and its values per program, of the 132 processors of an H100."""
    x, cu = jax.ShapeDtypeStruct((1, T, H, 128), dtype), jax.ShapeDtypeStruct((n + 1,), "int32")
    call = lambda x, cu: lightning_attn(x, x, x, 1, 4, cu_seqlens=cu if n > 1 else None, backend="triton")[0].sum()
    def scans(f):
        return [" ".join(map(str, (kernel.__name__, a["C"], a["BV"]))) + " dual" * a.get("DUAL", False)
                for kernel, _, a, _ in launches("sm_90", f, x, cu) if "scan" in kernel.__name__ or "hopper" in kernel.__name__]
    assert scans(call) == [forward]
    both = [backward] if "dual" in backward else [backward] * 2
    assert scans(jax.grad(call)) == [forward, forward, *both]


def test_vmap_over_nothing():
    x = jnp.ones((0, 1, 70, 2, 8))
    f = lambda x: lightning_attn(x, x, x, 1, 2)
    o, s = jax.vmap(f)(x)
    assert o.shape == x.shape and s.shape == (0, 1, 2, 8, 8)
    assert jax.vmap(jax.grad(lambda x: f(x)[0].sum()))(x).shape == x.shape


@pytest.mark.parametrize("shape, constraints", [("b, 70, 2, 8", []), ("b, t, 2, 8", ["t >= 64"])])
def test_export_of_symbolic_shapes(shape, constraints, precise):
    spec = lambda constraints: jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, constraints=constraints), jnp.float32)
    f = lambda backend: jax.jit(lambda x: lightning_attn(x, x, x, 1, 2, backend=backend))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 70, 2, 8)), "float32")
    close(jax.export.export(f("xla"))(spec(constraints)).call(x), f("xla")(x))
    if HAS_TRITON:
        with pytest.raises(ValueError, match='backend: expected "xla" for symbolic shapes'):
            jax.export.export(f(None))(spec(constraints))
    if constraints:
        with pytest.raises(ValueError, match=r"query: expected a symbolic seq_len that is known to be 64 or more, got t: .*t >= 64"):
            jax.export.export(f("xla"))(spec([]))
    with pytest.raises(ValueError, match="query: expected num_heads and head dims that are numbers"):
        jax.eval_shape(f("xla"), jax.ShapeDtypeStruct(jax.export.symbolic_shape("1, 70, h, 8"), jnp.float32))


def test_without_triton(monkeypatch):
    """Where jax-triton is missing the file works without a warning, and says what "triton" needs."""
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare = load("lightning_attn_bare")
    x = jnp.ones((1, 4, 2, 8))
    bare.lightning_attn(x, x, x, 0, 1)
    with pytest.raises(ValueError, match=re.escape(la._INSTALL)):
        bare.lightning_attn(x, x, x, 0, 1, backend="triton")


@pytest.mark.parametrize("version, fits", [("0.9.2", False), ("0.10.1", False), ("0.10.2", True),
                                           ("0.13.0.dev1", True)])
def test_jax_that_is_too_old(version, fits, monkeypatch):
    """The plain-JAX path runs from jax 0.10.2 on. An older one gets an ImportError."""
    monkeypatch.setattr(jax, "__version__", version)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    if fits:
        load("lightning_attn_old")
        return
    with pytest.raises(ImportError, match=f"needs jax>=0.10.2 and found jax {version}: pip install"):
        load("lightning_attn_old")


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("name, version", [
    ("jax", "0.11.0"), ("jax", "0.13.0"), ("jax_triton", "0.3.1"), ("jax_triton", "0.5.0"),
    ("triton", "3.6.0"), ("triton", "3.10.0"), ("jax_triton", None)])
def test_versions_that_do_not_fit_the_kernels(name, version, monkeypatch):
    """One warning says what was found, what it costs and what to install. Plain JAX runs."""
    found = f"{name.replace('_', '-')} {version}"
    if version is None:                                          # one that breaks when it is imported
        found = "failed with AttributeError: no such thing"
        monkeypatch.delitem(sys.modules, name)
        finder = types.SimpleNamespace(find_spec=lambda n, *_: raise_(AttributeError("no such thing")) if n == name else None)
        monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    else:
        monkeypatch.setattr(importlib.import_module(name), "__version__", version)
    with pytest.warns(UserWarning) as caught:
        other = load("lightning_attn_unfit")
    said, = (str(w.message) for w in caught)
    assert found in said and "plain-JAX path" in said and la._INSTALL in said
    assert other.triton is None
    x = jnp.ones((1, 4, 2, 8))
    other.lightning_attn(x, x, x, 0, 1)


def raise_(error):
    raise error


@pytest.mark.skipif(not la._HAS_HOPPER, reason="no Triton with Gluon for Hopper")
def test_triton_without_gluon_for_hopper(monkeypatch):
    """Triton 3.7 lacks the Gluon kernel's copies: a Hopper GPU gets the Triton kernel and a warning."""
    monkeypatch.delattr(la.hopper.tma, "async_load")
    other = load("lightning_attn_3_7")
    with pytest.warns(UserWarning) as caught:
        config = other._config("sm_90", 132, 128, 128, np.dtype("float16"), 1, 8, 4096, 1, False)
    assert config.kernel is other._scan_kernel
    said, = (str(w.message) for w in caught)
    assert "triton" + la._HOPPER in said and f"found triton {la.triton.__version__}" in said


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_dead_code_beside_a_kernel():
    """jax calls jax-triton's rule for dead code with as many arguments as this jax has. The launch stays, what is dead goes."""
    import triton
    from jax.interpreters import partial_eval

    @triton.jit
    def kernel(x, o):
        pass

    def f(x):
        return la.jax_triton.triton_call(x * 2, kernel=kernel, out_type=x, grid=(1,)), x * 3
    jaxpr = jax.make_jaxpr(f)(jnp.ones(4)).jaxpr
    kept, used = partial_eval.dce_jaxpr(jaxpr, [True, False])
    assert len(jaxpr.eqns) == 3 and len(kept.eqns) == 2 and used == [True]


@in_the_project
def test_versions_agree():
    """The ranges and the version in pyproject.toml, README.md, the guard and the messages are the same."""
    import tomllib
    about = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    readme = (PROJECT / "README.md").read_text()
    project, extras = about["project"], about["project"]["optional-dependencies"]
    kernels = la._KERNELS
    cap = kernels["jax"].partition(",")[2]
    required = dict(re.match(r"([\w-]+)(?:\[\w+\])?(.*)", x.split(";")[0].strip()).groups() for x in project["dependencies"])
    assert required == {"jax": f"{la._JAX},{cap}", "numpy": ""}
    for extra in "cuda13", "cuda12":
        (own, wanted) = extras[extra]
        assert own == "lightning-attn-jax[kernels]" and wanted == f"jax[{extra}]{kernels['jax']}"
    found = dict(re.match(r"([\w-]+)([^;]*)", x.replace(" ", "")).groups() for x in extras["kernels"])
    assert found == {name: kernels[name] for name in ("jax-triton", "triton")}
    assert "version" in project["dynamic"] and re.fullmatch(r"\d+\.\d+\.\d+", la.__version__)
    assert about["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lightning_attn.__version__"}

    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in readme.splitlines() if row.startswith("|")]
    table = {row[0]: row[1:] for row in rows}
    spaced = lambda versions: versions.replace(",", ", ")
    assert table["plain JAX"] == [project["requires-python"], spaced(required["jax"]), "", ""]
    assert table["kernels"] == [">=3.12", *map(spaced, kernels.values())]
    stated = set(re.findall(r"(jax-triton|triton|jax)\s?(>=[\d.]+(?:,\s?<[\d.]+)?)", readme + FILE.read_text()))
    for name, versions in stated:
        allowed = {kernels.get(name), la._HOPPER} if name == "triton" else {kernels.get(name), la._JAX, f"{la._JAX},{cap}"}
        assert versions.replace(" ", "") in allowed, (name, versions)


def test_persistent_compilation_cache(tmp_path):
    code = """
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from lightning_attn import lightning_attn
x = jnp.ones((1, 70, 2, 8))
print(float(jax.jit(jax.grad(lambda x: lightning_attn(x, x, x, 1, 4)[0].sum()))(x).sum()))
"""
    (cache := tmp_path / "cache").mkdir()
    run = lambda: python(code, tmp_path, JAX_COMPILATION_CACHE_DIR=str(cache))
    first, cached = run(), sorted(p.name for p in cache.iterdir() if not p.name.endswith("-atime"))
    assert cached and run() == first
    assert sorted(p.name for p in cache.iterdir() if not p.name.endswith("-atime")) == cached


# What was tried to break it -----------------------------------------------------------------------------------------------------

EXAMPLES = {"xla": 4, "interpreter": 2, "gluon": 3, "gpu": 5}
ROUNDING = {"float32": 3e-5, "bfloat16": 1.5e-2, "float16": 2e-3}


@st.composite
def drawn_calls(draw):
    """Arguments of a call: batches and packs, both directions, every dtype, grouped heads, decays from none to all."""
    one_of = lambda *x: draw(st.sampled_from(x))
    T, cu = one_of(1, 17, 64, 65, 130, 200), None
    H = one_of(1, 2, 4)
    K, V = one_of((8, 8), (16, 24), (64, 64), (5, 130))
    B = one_of(1, 2)
    if B == 1 and one_of(True, False):
        cu = [0, *sorted(draw(st.lists(st.integers(0, T), min_size=1, max_size=3)))]
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    dtype = one_of("float32", "bfloat16", "float16")
    make = lambda *shape, dtype=dtype: jnp.asarray(rng.standard_normal(shape), dtype)
    Hk = one_of(1, H)
    return dict(q=make(B, T, H, K), k=make(B, T, Hk, K), v=make(B, T, Hk, V), s0=make(B if cu is None else len(cu) - 1, H, K, V, dtype="float32"),
                g=[one_of(0.0, -1e-3, -0.1, -2.0, -50.0) for _ in range(H)], reverse=one_of(False, True), cu=cu)


@functools.cache
def forward_on(path, reverse):
    return jax.jit(lambda q, k, v, s0, g, cu: attend(path, q, k, v, g_gamma=g, initial_state=s0, reverse=reverse, cu_seqlens=cu))


def searched(check):
    """A test of `check(f, call, rng, same)` on every path: f runs a call, `same` compares up to the rounding of its dtype."""
    @each_path
    def test(path):
        def f(q, k, v, s0, g, reverse, cu):
            o, s = forward_on(path, reverse)(q, k, v, s0, jnp.asarray(g, jnp.float32), None if cu is None else jnp.asarray(cu, jnp.int32))
            return np.asarray(o.astype(jnp.float32)), np.asarray(s)

        @settings(max_examples=EXAMPLES[path], deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(drawn_calls())
        def search(call):
            bar = ROUNDING[str(call["q"].dtype)]
            def same(a, b, bar=bar):
                assert np.linalg.norm(a - b) <= bar * max(np.linalg.norm(b), 1e-2 * b.size**0.5)
            with jax.default_matmul_precision("highest"):
                check(f, call, np.random.default_rng(0), same)
        search()
    test.__doc__ = check.__doc__
    return test


@searched
def test_a_cut_sequence_goes_on_from_its_state(f, call, rng, same):
    T = call["q"].shape[1]
    call |= dict(cu=None, s0=call["s0"][:1].repeat(call["q"].shape[0], 0))
    cut = int(rng.integers(0, T + 1))
    part = lambda a, b: call | {n: call[n][:, a:b] for n in "qkv"}
    first, second = (part(cut, T), part(0, cut)) if call["reverse"] else (part(0, cut), part(cut, T))
    o1, s = f(**first)
    o2, s = f(**second | dict(s0=jnp.asarray(s)))
    o, whole = f(**call)
    same(np.concatenate([o2, o1] if call["reverse"] else [o1, o2], 1), o)
    same(s, whole)


@searched
def test_a_pack_is_its_sequences(f, call, rng, same):
    call |= dict(cu=call["cu"] or [0, call["q"].shape[1]], **{n: call[n][:1] for n in "qkv"})
    call["s0"] = call["s0"][:1].repeat(len(call["cu"]) - 1, 0)
    o, s = f(**call)
    for i, (a, b) in enumerate(zip(call["cu"], call["cu"][1:])):
        one, end = f(**call | {n: call[n][:, a:b] for n in "qkv"} | dict(cu=None, s0=call["s0"][i:i + 1]))
        same(o[:, a:b], one)
        same(s[i:i + 1], end)
    assert not o[:, call["cu"][-1]:].any()


@searched
def test_reverse_is_flipping(f, call, rng, same):
    o, s = f(**call)
    T, cu = call["q"].shape[1], call["cu"]
    flipped = {n: call[n][:, ::-1] for n in "qkv"} | dict(reverse=not call["reverse"])
    if cu:                                                       # padding comes first then: an interval of its own
        flipped |= dict(cu=[0, *(T - c for c in cu[::-1])], s0=jnp.concatenate([call["s0"][:1], call["s0"][::-1]]))
    o2, s2 = f(**call | flipped)
    o2, s2 = o2[:, ::-1], s2[:0:-1] if cu else s2
    same(o2[:, :cu[-1]] if cu else o2, o[:, :cu[-1]] if cu else o)
    same(s2, s)


@searched
def test_grouped_heads_are_repeated_ones(f, call, rng, same):
    H = call["q"].shape[2]
    for a, b in zip(f(**call), f(**call | {n: jnp.repeat(call[n], H // call[n].shape[2], 2) for n in "kv"})):
        assert np.array_equal(a, b)


@searched
def test_later_tokens_change_nothing_before_them(f, call, rng, same):
    T = call["q"].shape[1]
    t = int(rng.integers(0, T))
    later = slice(0, t) if call["reverse"] else slice(t, T)
    change = {n: call[n].at[:, later].set(jnp.asarray(rng.standard_normal(call[n][:, later].shape), call[n].dtype)) for n in "qkv"}
    before = slice(t, T) if call["reverse"] else slice(0, t)
    assert np.array_equal(f(**call)[0][:, before], f(**call | change)[0][:, before])


@searched
def test_linear_in_queries_keys_values_and_states(f, call, rng, same):
    call |= {n: call[n].astype(jnp.float32) for n in "qkv"}
    def same(a, b): assert np.linalg.norm(a - b) <= 3e-5 * max(np.linalg.norm(b), b.size**0.5)
    for names in ["q"], ["k", "s0"], ["v", "s0"]:
        other = {n: jnp.asarray(rng.standard_normal(call[n].shape), jnp.float32) for n in names}
        a, b, c = f(**call), f(**call | other), f(**call | {n: call[n] + 2 * other[n] for n in names})
        same(a[0] + 2 * b[0], c[0])
        same(a[1] if names == ["q"] else a[1] + 2 * b[1], c[1])


@searched
def test_nothing_depends_on_its_neighbours(f, call, rng, same):
    """Two runs are bit-identical, and so is a head, a batch row or a packed sequence whatever the others hold, NaN included."""
    first, again = f(**call), f(**call)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    cu, (B, T, H, _), Hk = call["cu"], call["q"].shape, call["k"].shape[2]
    if H == Hk > 1:                                              # another head
        o, s = f(**call | {n: call[n].at[:, :, 0].set(jnp.nan) for n in "qkv"})
        assert np.array_equal(o[:, :, 1:], first[0][:, :, 1:]) and np.array_equal(s[:, 1:], first[1][:, 1:])
    if cu:                                                       # every sequence but the first, and the padding
        o, s = f(**call | {n: call[n].at[:, cu[1]:].set(jnp.inf) for n in "qkv"})
        assert np.array_equal(o[:, :cu[1]], first[0][:, :cu[1]]) and np.array_equal(s[0], first[1][0])
        assert not o[:, cu[-1]:].any()
    elif B > 1:                                                  # another row
        o, s = f(**call | {n: call[n].at[0].set(jnp.nan) for n in "qkv"})
        assert np.array_equal(o[1:], first[0][1:]) and np.array_equal(s[1:], first[1][1:])


@each_path
@pytest.mark.parametrize("dtype, tiny, huge", [("float32", 1e-40, 1e18), ("bfloat16", 1e-40, 1e18), ("float16", 1e-7, 1e2)])
def test_tiny_and_huge_values(path, dtype, tiny, huge):
    """Denormal values give zeros or what is right; products near the largest number give no NaN."""
    q, k, v, s0, do, ds = inputs(40, 1, 70, 2, 2, 16, 16, dtype)
    g = np.array([0.0, -0.5])
    want = lambda q, k, v, s0: oracle(q, k, v, g, 0.25, s0, do, ds)[:2]
    run = lambda *a: attend(path, *a[:3], initial_state=a[3], g_gamma=jnp.asarray(g, jnp.float32))
    bar = 2e-3 if dtype == "float32" else BAR[dtype]             # default precision: TF32 on GPUs
    small = q, k * tiny, v, s0 * 0
    for a, b in zip(run(*small), want(*small)):
        assert np.isfinite(np.asarray(a, np.float32)).all() and np.abs(np.asarray(a, np.float64) - b).max() <= 200 * tiny
    large = (q * huge).astype(dtype), (k * huge).astype(dtype), (v / huge).astype(dtype), s0
    for a, b in zip(run(*large), want(*large)):
        assert error(a, b) < bar


@wants_gpu
def test_arrays_beyond_2_31_elements():
    B, T, H, D = 5, 2**18, 16, 128                               # 2.7e9 elements; the last row lies past 2^31
    draw = jax.jit(lambda key: jax.random.normal(key, (B, T, H, D), jnp.bfloat16))
    q, k, v = map(draw, jax.random.split(jax.random.key(0), 3))
    for reverse in False, True:
        o, s = lightning_attn(q, k, v, 3, 8, reverse=reverse)
        one, end = lightning_attn(*(x[-1:] for x in (q, k, v)), 3, 8, reverse=reverse)
        assert error(o[-1:, -4096:].astype(jnp.float32), one[:, -4096:].astype(jnp.float32)) < 4e-3 and error(s[-1:], end) < 1e-3
        assert error(o[-1:, :4096].astype(jnp.float32), one[:, :4096].astype(jnp.float32)) < 4e-3
        del o, s, one, end


@wants_gpu
def test_four_million_tokens_in_one_sequence():
    """At chosen positions, against sums in float64 over all the tokens before (g = 0) and over those that still count."""
    T, H, D = 2**22, 2, 64
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, T, H, D), np.float32).astype(jnp.bfloat16) for _ in range(3))
    g = np.array([0.0, -0.01])
    o, s = lightning_attn(q, k, v, g_gamma=jnp.asarray(g, jnp.float32), softmax_scale=1.0)
    o = np.asarray(o[0].astype(jnp.float32))
    S, done = np.zeros((D, D)), 0
    for t in 0, 1000, T // 3, T - 1:
        S += k[0, done:t + 1, 0].astype(np.float64).T @ v[0, done:t + 1, 0].astype(np.float64)
        done = t + 1
        assert error(o[t, 0], q[0, t, 0].astype(np.float64) @ S) < 6e-3, t
        near = slice(max(0, t - 8000), t + 1)
        weight = np.exp(g[1] * (t - np.arange(near.start, t + 1)))[:, None]
        assert error(o[t, 1], q[0, t, 1].astype(np.float64) @ ((k[0, near, 1] * weight).astype(np.float64).T @ v[0, near, 1].astype(np.float64))) < 6e-3, t
    assert error(s[0, 0], S) < 1e-3


@wants_gpu
def test_65536_packed_sequences_of_1_to_3_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 4, 65536)
    cu = np.concatenate([[0], np.cumsum(lengths)])
    T, H, D = int(cu[-1]), 2, 16
    q, k, v, do = (rng.standard_normal((1, T, H, D), np.float32) for _ in range(4))
    g = np.array([-0.2, -1.5])
    with jax.default_matmul_precision("highest"):
        run = lambda v: lightning_attn(q, k, v, g_gamma=jnp.asarray(g, jnp.float32), softmax_scale=1.0, cu_seqlens=jnp.asarray(cu, jnp.int32))
        (o, s), back = jax.vjp(run, jnp.asarray(v))
        dv = np.asarray(back((jnp.asarray(do), s * 0))[0])
    want, want_dv = np.zeros((T, H, D)), np.zeros((T, H, D))
    place = np.arange(T) - np.repeat(cu[:-1], lengths)
    for back_by in range(3):
        i = np.flatnonzero(place >= back_by)
        score = np.einsum("thd,thd->th", q[0, i], k[0, i - back_by]) * np.exp(g * back_by)
        want[i] += score[..., None] * v[0, i - back_by]
        want_dv[i - back_by] += score[..., None] * do[0, i]
    assert error(o[0], want) < 1e-5 and error(dv[0], want_dv) < 1e-5
    last = np.einsum("nhk,nhv->nhkv", k[0, cu[1:] - 1], v[0, cu[1:] - 1])
    ones = lengths == 1
    assert error(np.asarray(s)[ones], last[ones]) < 1e-5


@wants_gpu
def test_more_than_65535_programs():
    q, k, v, s0, do, ds = inputs(41, 1100, 20, 64, 64, 16, 16, "bfloat16")
    o, s = lightning_attn(q, k, v, 3, 8, initial_state=s0)
    want, end = lightning_attn(q, k, v, 3, 8, initial_state=s0, backend="xla")
    assert error(o.astype(jnp.float32), want.astype(jnp.float32)) < 6e-3 and error(s, end) < 6e-3


@wants_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_million_tokens_that_no_one_forgets_or_everyone_does(dtype):
    T, D = 2**20, 64
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, T, 2, D), np.float32).astype(dtype) for _ in range(3))
    with jax.default_matmul_precision("highest"):
        o, s = lightning_attn(q, k, v, g_gamma=jnp.array([0.0, -1e4]), softmax_scale=1.0)
    exact = lambda x: x.astype(np.float64)
    assert error(s[0, 0], exact(k[0, :, 0]).T @ exact(v[0, :, 0])) < (1e-3 if dtype == "bfloat16" else 1e-5)
    forgets = (exact(q[0, :, 1]) * exact(k[0, :, 1])).sum(-1, keepdims=True) * exact(v[0, :, 1])
    assert error(o[0, :, 1].astype(jnp.float32), forgets) < (6e-3 if dtype == "bfloat16" else 1e-5)


SANITIZED = """
import sys, jax, numpy as np
from lightning_attn import lightning_attn
rng = np.random.default_rng(0)
# numpy makes every input: each kernel of XLA's is one more to patch, to watch and to report on
def x(*shape, dtype="bfloat16"): return jax.device_put(rng.standard_normal(shape).astype(dtype))
def run(B, T, H, Hk, D, dtype="bfloat16", cu=None, **kw):
    n = B if cu is None else len(cu) - 1
    q, k, v = (x(B, T, h, D, dtype=dtype) for h in (H, Hk, Hk))
    s0, ds, do = x(n, H, D, D, dtype="float32"), x(n, H, D, D, dtype="float32"), x(B, T, H, D, dtype=dtype)
    g = jax.device_put(np.linspace(-1, 0, H, dtype="float32"))
    cu = None if cu is None else jax.device_put(np.array(cu, "int32"))
    @jax.jit
    def everything(q, k, v, s0, g, do, ds, cu):
        f = lambda q, k, v, s0: lightning_attn(q, k, v, g_gamma=g, initial_state=s0, cu_seqlens=cu, **kw)
        out, back = jax.vjp(f, q, k, v, s0)
        return out, back((do, ds))
    jax.block_until_ready(everything(q, k, v, s0, g, do, ds, cu))
    print(B, T, D, dtype, kw, flush=True)
run(2, 128, 2, 1, 128)
run(1, 1100, 2, 2, 64, reverse=True)
run(1, 200, 2, 2, 128, cu=[0, 0, 5, 70, 70, 190])
run(3, 1, 2, 2, 96)
run(1, 100, 1, 1, 192, reverse=True)
if sys.argv[1:] != ["initcheck"]:
    run(1, 200, 2, 2, 64, cu=[0, 2**31 - 1, -5, 150, 100, -2**31], reverse=True)
    run(1, 200, 2, 2, 64, dtype="float32", cu=[200, 2**31 - 1, 0, 150, 1000])
    run(1, 100, 2, 2, 40, dtype="float32")
print("ran")
"""


@wants_gpu
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool, tmp_path):
    """Forward, backward, packed, reverse, decode and ragged, and boundaries that are nonsense, each array an allocation of its own.

    initcheck must see what XLA's kernels write as well, so it watches all of them. What it says of those and of copies is XLA's:
    it prints a line for every thread, and the limit is there so that ours are among the lines. It takes the longest, so it gets
    fewer calls: boundaries that are nonsense read no memory that good ones leave unread.
    """
    limit = 20000
    watched = ["--print-limit", str(limit)] if tool == "initcheck" else ["--kernel-name", "kns=_kernel", "--error-exitcode", "9"]
    shutil.copy(FILE, tmp_path / "lightning_attn.py")
    command = ["compute-sanitizer", "--tool", tool, "--show-backtrace", "no", *watched, sys.executable, "-c", SANITIZED, tool]
    # XLA tunes its own kernels on memory that nothing has written
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=os.environ | {
        "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    said = (ran.stdout + ran.stderr)[-3000:]
    assert ran.returncode == 0 and "ran" in ran.stdout.splitlines(), said
    assert not re.search(r" at _\w+_kernel", ran.stdout), said
    assert ran.stdout.count("Uninitialized") < limit, "more than it may print: those of these kernels may be missing"


# Ways of calling, times kinds of launch ------------------------------------------------------------------------------------------
#
# On a CPU plain JAX computes the results, but the launches are traced as well, so that an error of types, effects or
# partitioning shows. On GPUs the kernels run, on as many devices as there are.

KINDS = {                                                        # the smallest sizes that make each launch
    "one-segment": dict(T=72), "segments": dict(T=1024), "parts-of-keys": dict(T=72, K=136), "decode": dict(T=1),
    "two-gradients-at-once": dict(T=72, K=64, V=64, dtype="bfloat16"), "pack": dict(B=1, T=1100, cu=[0, 20, 20, 1090], state=False),
    "pack-with-states": dict(B=1, T=1100, cu=[0, 20, 20, 1090])}
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
DEVICES_USED = min(8, len(jax.devices()))


@dataclasses.dataclass
class Case:
    """Arguments of a call, weights of its results in a loss, and the names of the arguments that are differentiated."""
    args: dict
    weights: tuple
    cu: Any
    learned: list

    def call(self, seq_axis=None, **args):
        cu = None if self.cu is None else jnp.array(self.cu)
        return lightning_attn(args["q"], args["k"], args["v"], initial_state=args.get("s0"), g_gamma=args["g"], cu_seqlens=cu, seq_axis=seq_axis)

    def step(self, call):
        """Results and gradients, in one function of the arguments."""
        def step(args):
            def loss(learned):
                results = call(**args | learned)
                return sum((x * w).astype(jnp.float32).sum() for x, w in zip(results, self.weights)), results
            return jax.grad(loss, has_aux=True)({name: args[name] for name in self.learned})[::-1]
        return step

    def specs(self, rows, heads):
        """How rows and heads are split over mesh axes: of the arguments and of the results."""
        rows = rows if self.cu is None else None
        token, state = P(rows, None, heads), P(rows, heads)
        return {name: P(heads) if name == "g" else state if name == "s0" else token for name in self.args}, (token, state)


@functools.cache
def case(kind):
    shape = dict(B=8, H=8, Hk=8, K=16, V=16, cu=None, state=True, dtype="float32") | KINDS[kind]
    cu, state, dtype = shape.pop("cu"), shape.pop("state"), shape.pop("dtype")
    q, k, v, s0, do, ds = inputs(50, **shape, dtype=dtype, n=cu and len(cu) - 1)
    args = dict(q=q, k=k, v=v, g=-0.05 * jnp.arange(8.0)) | ({"s0": s0} if state else {})
    # the gradient of g is plain JAX, the same for all launches: these kinds stand for it
    learned = [name for name in args if name != "g" or kind in ("one-segment", "decode", "pack-with-states")]
    made = Case(args, (do, ds), cu, learned)
    with jax.default_matmul_precision("highest"):
        return made, jax.jit(made.step(made.call))(args)


def mesh_of(kind, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=jax.devices()[:math.prod(axes.values())])


def twice(x):
    return jax.tree.map(lambda x: jnp.stack([x, x]), x)


def in_a_loop(loop):
    """A way that calls the step in a loop of two rounds."""
    def way(case):
        step = case.step(case.call)
        return jax.tree.map(lambda x: x[1], jax.jit(lambda args: loop(step, args))(twice(case.args)))
    return way


def by_fori_loop(step, args):
    shapes = jax.eval_shape(step, jax.tree.map(lambda x: x[0], args))
    stacks = jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), shapes)
    body = lambda i, stacks: jax.tree.map(lambda s, x: s.at[i].set(x), stacks, step(jax.tree.map(lambda x: x[i], args)))
    return jax.lax.fori_loop(0, 2, body, stacks)


def by_cond(step, args):
    zeros = lambda args: jax.tree.map(jnp.zeros_like, step(args))
    return jax.lax.map(lambda args: jax.lax.cond(args["q"][0, 0, 0, 0] < 1e9, step, zeros, args), args)


def by_layers(case):
    """A loss over a scan of two layers, which sees the arguments as they are in the second: remat recomputes them."""
    def call(**args):
        layer = jax.checkpoint(lambda carry, i: (carry, case.call(**args | {"q": args["q"] * (i > 0)})))
        return jax.tree.map(lambda x: x[1], jax.lax.scan(layer, 0, jnp.arange(2).astype(args["q"].dtype))[1])
    return jax.jit(case.step(call))(case.args)


def by_vmap(case):
    return jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(case.step(case.call)))(twice(case.args)))


def by_jit(kind, is_set, rows=None, heads=None):
    def way(case):
        axes = {axis: DEVICES_USED // (2 if rows and heads and DEVICES_USED > 1 else 1) if i == 0 else min(2, DEVICES_USED)
                for i, axis in enumerate(filter(None, (rows, heads)))}
        mesh = mesh_of(kind, **axes)
        specs, _ = case.specs(rows, heads)
        put = {name: jax.device_put(x, jax.NamedSharding(mesh, specs[name])) for name, x in case.args.items()}
        with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
            return jax.jit(case.step(case.call))(put)
    return way


def by_shard_map(rows=None, heads=None, tokens=None, others=None, kind=AUTO, check=True):
    """Manual over one axis. `others`: the axis of a mesh that is left to the compiler."""
    def way(case):
        if tokens and (case.cu is not None or case.args["q"].shape[1] % DEVICES_USED):
            pytest.skip("these tokens cannot be split over the devices")
        axis = rows or heads or tokens
        second = 2 if others and DEVICES_USED > 2 else 1           # XLA cannot sum over a manual axis of one device beside others
        mesh = mesh_of(kind, **{axis: DEVICES_USED // second} | ({others: second} if others else {}))
        specs, results = case.specs(rows, heads)
        if tokens:
            specs |= {name: P(None, axis) for name in "qkv"}
            results = P(None, axis), P()
        part = jax.shard_map(lambda args: case.call(**args, seq_axis=tokens), mesh=mesh, in_specs=(specs,), out_specs=results, check_vma=check,
                             axis_names={axis})
        put = case.args
        if others:                                               # the compiler splits heads, or rows
            more, _ = case.specs(None if rows else others, others if rows else None)
            put = {name: jax.device_put(x, jax.NamedSharding(mesh, P(*(a or b for a, b in itertools.zip_longest(specs[name], more[name])))))
                   for name, x in put.items()}
        with jax.set_mesh(mesh):
            return jax.jit(case.step(lambda **args: part(args)))(put)
    return way


def by_export(case):
    checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
    exported = jax.export.export(jax.jit(case.step(case.call)), disabled_checks=checks)(case.args)
    return jax.export.deserialize(exported.serialize()).call(case.args)


WAYS = {
    "eager": lambda case: case.step(case.call)(case.args), "vmap": by_vmap, "remat-of-layers": by_layers, "export": by_export,
    "scan": in_a_loop(lambda step, args: jax.lax.scan(lambda carry, x: (carry, step(x)), 0, args)[1]),
    "fori-loop": in_a_loop(by_fori_loop), "cond": in_a_loop(by_cond),
    "jit-rows": by_jit(AUTO, False, rows="a"), "jit-heads": by_jit(AUTO, True, heads="a"), "jit-both": by_jit(AUTO, False, "a", "b"),
    "jit-explicit-rows": by_jit(EXPLICIT, False, rows="a"), "jit-explicit-heads-set-mesh": by_jit(EXPLICIT, True, heads="a"),
    "jit-explicit-both": by_jit(EXPLICIT, False, "a", "b"),
    "shard_map-rows": by_shard_map(rows="a"), "shard_map-heads-unchecked": by_shard_map(heads="a", check=False),
    "shard_map-tokens": by_shard_map(tokens="a"), "shard_map-tokens-unchecked": by_shard_map(tokens="a", check=False),
    "shard_map-rows-of-auto": by_shard_map(rows="a", others="b"), "shard_map-heads-of-explicit": by_shard_map(heads="a", others="b", kind=EXPLICIT),
    "shard_map-tokens-of-auto-unchecked": by_shard_map(tokens="a", others="b", check=False),
    "shard_map-tokens-of-explicit": by_shard_map(tokens="a", others="b", kind=EXPLICIT)}


# On a CPU the other ways cover these: a jit over rows and heads, and a scan, which loops as these loops do.
GPU_WAYS = "jit-rows", "jit-explicit-rows", "fori-loop", "cond"


@pytest.mark.skipif(not (HAS_DEVICES or HAS_GPU), reason=DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [way for way in WAYS if HAS_GPU or way not in GPU_WAYS])
def test_ways_of_calling(way, kind, precise, monkeypatch):
    monkeypatch.setattr(la, "GROUP", 128)                        # tokens that plain JAX unrolls: less to compile
    made, want = case(kind)
    got = WAYS[way](made)
    bar = 2e-2 if made.args["q"].dtype == jnp.bfloat16 else 2e-5
    for name, a, b in zip(("output", "final_state"), got[0], want[0], strict=True):
        assert max(errors(a.astype(jnp.float32), b.astype(jnp.float32), name)) < bar, name
    for name, b in want[1].items():
        a = got[1][name]
        assert a.dtype == b.dtype and a.shape == b.shape
        if name == "g":
            assert error(a, b) < 5 * bar
        else:
            assert max(errors(a.astype(jnp.float32), b.astype(jnp.float32), "state" if name == "s0" else name)) < bar, name


# Many devices: 8 virtual CPUs ---------------------------------------------------------------------------------------------------

eight_cpus = pytest.mark.skipif(not HAS_DEVICES, reason=DEVICES)


if not HAS_DEVICES:
    def test_on_8_devices():
        """The cases that want 8 CPU devices, in a script of their own: this process has no such devices."""
        env = {n: x for n, x in os.environ.items() if not n.startswith("PYTEST_") and n != SCRIPT}
        ran = subprocess.run([sys.executable, __file__, "--devices"], capture_output=True, text=True, env=env)
        assert ran.returncode == 0 and DEVICES not in ran.stdout, ran.stdout + ran.stderr


COLLECTIVE = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def collectives(compiled):
    """(operation, elements of its largest result) of every collective in compiled HLO."""
    size = lambda shapes: max(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes))
    return [(op, size(shapes)) for shapes, op in re.findall(COLLECTIVE, compiled.as_text())]


def step_of(attend):
    def loss(q, k, v, s0, g, do, ds):
        o, s = attend(q, k, v, s0, g)
        return (o * do).sum() + (s * ds).sum(), (o, s)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True))


@eight_cpus
@pytest.mark.parametrize("kind, shape, spec", [
    *[("Auto", *mesh) for mesh in [((8,), P("a")), ((4,), P(None, None, "a")), ((2, 4), P("a", None, "b")), ((4, 2), P(("a", "b"))),
                                   ((2, 4), P("a", "b")), ((2, 4), P("a", None, None, "b"))]],
    ("Explicit", (2, 4), P("a", None, "b")), ("Explicit", (2, 4), P("a", "b"))])
def test_sharded_by_jit(precise, kind, shape, spec):
    """The sharding rule is outside of the choice of platform: what is seen here holds for GPUs."""
    q, k, v, s0, do, ds = inputs(30, 8, 72, 8, 4, 8, 8)
    g = lightning_g_gamma(8, 1, 4)
    step = step_of(lambda q, k, v, s0, g: lightning_attn(q, k, v, initial_state=s0, g_gamma=g))
    want = step(q, k, v, s0, g, do, ds)
    mesh = jax.make_mesh(shape, tuple("ab"[:len(shape)]), axis_types=(getattr(jax.sharding.AxisType, kind),) * len(shape))
    b, t, h = (*spec, None, None)[:3]
    state = P(b, h)
    with jax.set_mesh(mesh):
        put = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip((q, k, v, s0, g, do, ds), (spec, spec, spec, state, P(h), spec, state))]
        compiled = step.lower(*put).compile()
        got = compiled(*put)
    close(got, want, 1e-5)
    if len(spec) == 4:                                           # a head dim that is sharded is gathered; where to, XLA may choose
        return
    for x, s in zip((*got[0][1], *got[1]), ((spec if t is None else None), state, spec, spec, spec, state, P(h))):
        if s is not None:
            assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, s), x.ndim)
    if t is None:                                                # the loss and g_gamma's gradient are summed; nothing larger moves
        assert all(op == "all-reduce" and size <= 8 for op, size in collectives(compiled)), collectives(compiled)


def loss_of(f):
    """The sum of the squares of all results of f."""
    return lambda *args: sum((x.astype(jnp.float32)**2).sum() for x in jax.tree.leaves(f(*args)))


@eight_cpus
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("H, Hk", [(16, 4), (24, 3)])
def test_more_devices_than_kv_heads(precise, kind, H, Hk):
    """Queries stay where they are, and each device takes its key head. Where the 3 heads of a device are of two groups, they are right."""
    q, k, v, *_ = inputs(33, 2, 72, H, Hk, 8, 8)
    f = lambda q, k, v: lightning_attn(q, k, v, 1, 4)
    mesh = mesh_of(kind, h=8)
    put = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip((q, k, v), (P(None, None, "h"), P(), P()))]
    compiled = jax.jit(f).lower(*put).compile()
    close(compiled(*put), f(q, k, v), 1e-6)
    assert H == 24 or not collectives(compiled)
    close(jax.jit(jax.grad(loss_of(f), (0, 1, 2)))(*put), jax.jit(jax.grad(loss_of(f), (0, 1, 2)))(q, k, v), 1e-5)


@eight_cpus
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=lambda kind: kind.name)
def test_one_axis_for_rows_of_queries_and_heads_of_keys(precise, kind):
    q, k, v, *_ = inputs(33, 8, 72, 8, 8, 8, 8)
    f = lambda q, k, v: lightning_attn(q, k, v, 1, 4)
    mesh = mesh_of(kind, a=8)
    put = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip((q, k, v), (P("a"), P(None, None, "a"), P(None, None, "a")))]
    close(jax.jit(f)(*put), f(q, k, v), 1e-6)


@eight_cpus
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("what", ["numpy", "constants", "constraints"])
def test_a_mesh_that_is_set_and_arguments_that_are_not_committed(precise, kind, what):
    if what == "constraints" and kind == EXPLICIT:
        pytest.skip("shardings of Explicit axes are types, not constraints")
    arrays = [np.asarray(x) for x in inputs(35, 8, 72, 4, 2, 8, 8)[:3]]
    f = lambda q, k, v: lightning_attn(q, k, v, 1, 4)
    split = lambda x: jax.lax.with_sharding_constraint(x, P("a", None, "b")) if what == "constraints" else x
    step = jax.grad(loss_of(lambda *args: f(*map(split, args))), (0, 1, 2))
    want = step(*arrays) if what != "constraints" else jax.jit(jax.grad(loss_of(f), (0, 1, 2)))(*arrays)
    with jax.set_mesh(mesh_of(kind, a=4, b=2)):
        got = jax.jit(lambda: step(*map(jnp.asarray, arrays)))() if what == "constants" else jax.jit(step)(*arrays)
    close(got, want, 1e-5)


@eight_cpus
@pytest.mark.parametrize("check", [True, False])
def test_seq_axis_with_a_state_that_is_the_same_on_all_devices(precise, check):
    """The state is made inside, or given replicated, beside a second axis that rows are split over."""
    q, k, v, s0, *_ = inputs(36, 2, 128, 4, 2, 8, 8)
    mesh = mesh_of(AUTO, d=2, t=4)
    tokens = P("d", "t")
    for state in s0[:1], None:
        here = lambda q, s: jnp.zeros((q.shape[0], 4, 8, 8)) if s is None else s
        whole = lambda q, k, v, s: lightning_attn(q, k, v, 1, 4, initial_state=jnp.zeros_like(s0) if s is None else jnp.repeat(s, 2, 0))
        part = jax.shard_map(lambda q, k, v, s: lightning_attn(q, k, v, 1, 4, initial_state=here(q, s), seq_axis="t"), mesh=mesh, check_vma=check,
                             in_specs=(tokens, tokens, tokens, P()), out_specs=(tokens, P("d")))
        of = (0, 1, 2) if state is None else (0, 1, 2, 3)
        close(jax.jit(jax.grad(loss_of(part), of))(q, k, v, state), jax.jit(jax.grad(loss_of(whole), of))(q, k, v, state), 1e-5)


@eight_cpus
@pytest.mark.parametrize("check", [True, False])
def test_seq_axis_of_two_axes(precise, check):
    q, k, v, s0, *_ = inputs(37, 2, 128, 4, 2, 8, 8)
    tokens = P(None, ("a", "b"))
    whole = lambda q, k, v, s: lightning_attn(q, k, v, 1, 4, initial_state=s)
    part = jax.shard_map(lambda q, k, v, s: lightning_attn(q, k, v, 1, 4, initial_state=s, seq_axis=("a", "b")), mesh=mesh_of(AUTO, a=2, b=4),
                         check_vma=check, in_specs=(tokens, tokens, tokens, P()), out_specs=(tokens, P()))
    close(jax.jit(part)(q, k, v, s0), whole(q, k, v, s0), 1e-5)
    close(jax.jit(jax.grad(loss_of(part), (0, 1, 2, 3)))(q, k, v, s0), jax.jit(jax.grad(loss_of(whole), (0, 1, 2, 3)))(q, k, v, s0), 1e-5)
    only = jax.shard_map(lambda q, k, v, s: lightning_attn(q, k, v, 1, 4, initial_state=s, seq_axis=("a", "b"), output_final_state=False)[0],
                         mesh=mesh_of(AUTO, a=2, b=4), check_vma=check, in_specs=(tokens, tokens, tokens, P()), out_specs=tokens)
    close(jax.jit(jax.grad(loss_of(only), (0, 1, 2, 3)))(q, k, v, s0),
          jax.jit(jax.grad(loss_of(lambda *args: whole(*args)[0]), (0, 1, 2, 3)))(q, k, v, s0), 1e-5)


def test_seq_axis_of_vmap():
    """Only a shard_map splits a sequence: the gradient would not know an axis that vmap names."""
    x = jnp.ones((4, 1, 8, 2, 8))
    with pytest.raises(ValueError, match="seq_axis: expected an axis of a shard_map around this call, got 'i'"):
        jax.vmap(lambda x: lightning_attn(x, x, x, 0, 1, seq_axis="i"), axis_name="i")(x)


@eight_cpus
def test_states_of_2_31_tokens_before_a_device():
    """The number of tokens before a device is past int32: a decay must not wrap."""
    mesh, own, g = mesh_of(AUTO, t=8), jnp.ones((1, 1, 2, 1, 1)), jnp.array([[0.0, -1e-9]])
    op = la._Op(1.0, False, False, "xla", None)
    states = jax.shard_map(lambda own: la._states_around(op, ("t",), 2**30, own, g, None)[1], mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    want = np.exp(np.array([0.0, -1e-9])[:, None] * 2**30 * np.arange(8)).sum(1)
    assert error(states(own)[0, 0, :, 0, 0], want) < 1e-5


@eight_cpus
def test_no_tracer_leaks_and_no_constants(precise):
    q, k, v, *_ = inputs(38, 8, 72, 4, 2, 8, 8)
    f = lambda q, k, v: lightning_attn(q, k, v, 1, 4)
    mesh = mesh_of(AUTO, a=8)
    put = [jax.device_put(x, jax.NamedSharding(mesh, P("a"))) for x in (q, k, v)]
    jax.clear_caches()
    with jax.checking_leaks():
        got = jax.jit(jax.grad(loss_of(f), (0, 1, 2)))(*put)
    close(got, jax.jit(jax.grad(loss_of(f), (0, 1, 2)))(q, k, v), 1e-5)

    def folded(x):
        with jax.ensure_compile_time_eval():
            return x + f(q, k, v)[0]
    close(jax.jit(folded)(q), q + f(q, k, v)[0], 1e-5)


@eight_cpus
@pytest.mark.parametrize("spec", [P("a"), P(None, None, "a")])
def test_one_kv_head_sharded_by_jit(precise, spec):
    """Every device has the one key head: rows and query heads stay where they are."""
    q, k, v, s0, do, ds = inputs(34, 4, 72, 8, 1, 8, 8)
    g = lightning_g_gamma(8, 1, 4)
    step = step_of(lambda q, k, v, s0, g: lightning_attn(q, k, v, initial_state=s0, g_gamma=g))
    want = step(q, k, v, s0, g, do, ds)
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    b, _, h = (*spec, None, None)[:3]
    specs = spec, P(b), P(b), P(b, h), P(h), spec, P(b, h)
    put = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip((q, k, v, s0, g, do, ds), specs)]
    compiled = step.lower(*put).compile()
    close(compiled(*put), want, 1e-5)
    assert all(op == "all-reduce" for op, _ in collectives(compiled)), collectives(compiled)     # sums over query heads


@eight_cpus
def test_packed_sharded_by_heads(precise):
    q, k, v, s0, do, ds = inputs(31, 1, 70, 8, 4, 8, 8, n=3)
    cu = jnp.array([0, 20, 20, 66])
    f = jax.jit(lambda *a: lightning_attn(*a[:3], 1, 4, initial_state=a[3], cu_seqlens=a[4]))
    mesh = jax.make_mesh((4,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
    put = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip((q, k, v, s0, cu), (P(None, None, "h"),) * 3 + (P(None, "h"), P()))]
    compiled = f.lower(*put).compile()
    close(compiled(*put), f(q, k, v, s0, cu), 1e-6)
    assert not collectives(compiled)


@eight_cpus
@pytest.mark.parametrize("path, shape, axes, reverse, check", [
    *[("xla", *mesh, reverse, reverse == check) for mesh, check in [(((8,), (None, "a", None)), True), (((2, 2, 2), ("a", "b", "c")), False)]
      for reverse in (False, True)],
    ("xla", (4,), ("a", None, None), False, True),
    pytest.param("interpreter", (2, 2), (None, "a", "b"), True, True, marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton"))])
def test_shard_map(precise, shape, axes, reverse, check, path):
    q, k, v, s0, do, ds = inputs(32, 4, 128, 4, 2, 8, 8)
    b, t, h = axes
    g = -0.05 * jnp.arange(4)
    whole = lambda q, k, v, s0, g, **kw: attend(path, q, k, v, initial_state=s0, g_gamma=g, reverse=reverse, **kw)
    want = step_of(whole)(q, k, v, s0, g, do, ds)
    mesh = jax.make_mesh(shape, tuple("abc"[:len(shape)]), axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    tokens, state = P(b, t, h), P(b, h)
    part = jax.shard_map(lambda *a: whole(*a, seq_axis=t), mesh=mesh, in_specs=(tokens,) * 3 + (state, P(h)), out_specs=(tokens, state), check_vma=check)
    compiled = step_of(part).lower(q, k, v, s0, g, do, ds).compile()
    close(compiled(q, k, v, s0, g, do, ds), want, 1e-5)
    if check and path == "xla":                                  # one gathering of states each way; sums of the loss and of g's gradient
        states = int(np.prod(s0.shape)) // (1 if t == "a" else 4) * mesh.shape[t] if t else 0
        found = collectives(compiled)
        assert [size for op, size in found if op == "all-gather"] == ([states] * 2 if t else []), found
        assert all(size <= 8 for op, size in found if op != "all-gather") and {op for op, _ in found} <= {"all-gather", "all-reduce"}, found


@eight_cpus
def test_everything_inside_shard_map(precise, check=True):
    """vmap, a scan over layers with remat and its second derivative, vmap of shard_map, and a pack on each device."""
    mesh = jax.make_mesh((2, 2, 2), ("b", "h", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    g, rng = -0.05 * jnp.arange(4), np.random.default_rng(34)
    draw = lambda *shape: [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3)]
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=check)
    square = lambda f: lambda *a: sum((y**2).sum() for y in jax.tree.leaves(f(*a)))
    attend = lambda q, k, v, g, **kw: lightning_attn(q, k, v, g_gamma=g, **kw)
    tokens, state = P("b", "t", "h"), P("b", "h")

    q, k, v = draw(3, 4, 32, 4, 8)
    many = lambda q, k, v, g, **kw: jax.vmap(lambda q, k, v: attend(q, k, v, g, **kw))(q, k, v)
    inside = mapped(lambda *a: many(*a, seq_axis="t"), in_specs=(P(None, *tokens),) * 3 + (P("h"),), out_specs=(P(None, *tokens), P(None, *state)))
    outside = jax.vmap(mapped(lambda *a: attend(*a, seq_axis="t"), in_specs=(tokens,) * 3 + (P("h"),), out_specs=(tokens, state)), (0, 0, 0, None))
    want = jax.jit(jax.grad(square(many), (0, 1, 2, 3)))(q, k, v, g)
    results = jax.jit(many)(q, k, v, g)
    for f in inside, outside:
        close(jax.jit(f)(q, k, v, g), results, 1e-5)
        close(jax.jit(jax.grad(square(f), (0, 1, 2, 3)))(q, k, v, g), want, 1e-5)

    def stack(q, k, v, g, **kw):
        def layer(x, i):
            return x + attend(x, k, v, g * (1 - i / 3), **kw)[0], None
        return jax.lax.scan(jax.checkpoint(layer), q, jnp.arange(2.0))[0]

    q, k, v = draw(2, 32, 4, 8)
    inside = mapped(lambda *a: stack(*a, seq_axis="t"), in_specs=(tokens,) * 3 + (P("h"),), out_specs=tokens)
    twice = lambda f: jax.jit(jax.grad(square(jax.grad(square(f), (0, 1, 2, 3))), (0, 1, 2, 3)))(q, k, v, g)
    close(jax.jit(jax.grad(square(inside), (0, 1, 2, 3)))(q, k, v, g), jax.jit(jax.grad(square(stack), (0, 1, 2, 3)))(q, k, v, g), 1e-5)
    close(twice(inside), twice(stack), 1e-5)

    q, k, v = draw(2, 70, 4, 8)
    cu = jnp.array([[0, 10, 70], [0, 64, 66]])
    packs = mapped(lambda q, k, v, g, cu: attend(q, k, v, g, cu_seqlens=cu[0]), in_specs=(P("b", None, "h"),) * 3 + (P("h"), P("b")),
                   out_specs=(P("b", None, "h"), state))
    want = [attend(q[i:i + 1], k[i:i + 1], v[i:i + 1], g, cu_seqlens=cu[i]) for i in range(2)]
    close(jax.jit(packs)(q, k, v, g, cu), jax.tree.map(lambda *x: jnp.concatenate(x), *want), 1e-5)


@eight_cpus
def test_training_step_on_data_tensor_and_sequence_parallel_devices(precise):
    B, T, H, D = 4, 64, 4, 8
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((2, 3, H, D, H, D)) / 6, jnp.float32)
    x, y = (jnp.asarray(rng.standard_normal((B, T, H, D)), jnp.float32) for _ in range(2))

    def loss(attend):
        def value(w, x, y):
            def layer(x, inputs):
                w, i = inputs
                q, k, v = jnp.einsum("bthd,chdge->cbtge", x, w)
                return x + attend(q, k, v, i), None
            out, _ = jax.lax.scan(layer, x, (w, jnp.arange(2)))
            return ((out - y) ** 2).mean()
        return jax.jit(lambda w, x, y: jax.tree.map(lambda a, b: a - 0.1 * b, w, jax.grad(value)(w, x, y)))

    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "seq"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    tokens = P("data", "seq", "tensor")
    decay = lambda i: lightning_g_gamma(H, i, 2)                 # of all heads, cut among devices
    parallel = jax.shard_map(lambda q, k, v, g: lightning_attn(q, k, v, g_gamma=g, seq_axis="seq")[0], mesh=mesh,
                             in_specs=(tokens,) * 3 + (P("tensor"),), out_specs=tokens)
    want = loss(lambda q, k, v, i: lightning_attn(q, k, v, i, 2)[0])(w, x, y)
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    got = loss(lambda q, k, v, i: parallel(q, k, v, decay(i)))(place(w, P(None, None, "tensor")), place(x, tokens), place(y, tokens))
    close(got, want, 1e-5)


# The README ---------------------------------------------------------------------------------------------------------------------

@in_the_project
@eight_cpus
def test_snippets_of_the_readme(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_attn", la)
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL):
        exec(snippet, names)
    assert names["states"].shape == (3, 4, 32, 32) and np.isfinite(names["gradient"]).all()
    whole = lightning_attn(names["q"], names["k"], names["v"], 0, 3)
    close([names["output"], names["state"]], whole, 4e-3)


# Every GPU, without one ---------------------------------------------------------------------------------------------------------

def launches(arch, f, *args):
    """What tracing f(*args) would launch on a GPU of that architecture: (kernel, arrays, other arguments, options)."""
    found, TensorDescriptor = [], la.jax_triton.TensorDescriptor

    def record(*arrays, kernel, out_type, grid, backend_options, **arguments):
        options = {n: arguments.pop(n) for n in ("num_warps", "num_stages")} | backend_options
        found.append((kernel, (*arrays, *jax.tree.leaves(out_type)), arguments, options | {"programs": grid[0]}))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(la, "jax_triton", types.SimpleNamespace(triton_call=record, TensorDescriptor=TensorDescriptor))
        m.setattr(la, "_in_place", lambda call, arrays, in_place: call(*arrays))
        m.setattr(la, "_gpu", lambda: (arch, 132))
        jax.clear_caches()
        jax.eval_shape(f, *args)
    jax.clear_caches()
    return found


def build(kernel, arrays, arguments, options, arch):
    """Compiles a launch as jax-triton does: bytes of shared memory, and for the Hopper kernel the bytes of registers that are spilled."""
    import triton
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    kind = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}

    def type_of(x):
        if isinstance(x, tuple):
            return tuple(map(type_of, x))
        if isinstance(x, la.jax_triton.TensorDescriptor):
            return f"tensordesc<{kind[str(x.base.dtype)]}[{','.join(map(str, x.block_shape))}],{x.layout!r}>"
        return "*" + kind[str(x.dtype)] if hasattr(x, "shape") else "fp32" if isinstance(x, float) else "i32" if x < 2**31 else "i64"

    constants = {p.name for p in kernel.params if p.is_constexpr}
    values = dict(zip((n for n in kernel.arg_names if n not in arguments), arrays)) | arguments
    fixed = {n: values[n] if n in constants else 1 for n in kernel.arg_names if n in constants or type(values[n]) in (int, float) and values[n] == 1}
    signature = {n: "constexpr" if n in fixed else type_of(values[n]) for n in kernel.arg_names}
    # arrays are aligned; of integers jax-triton says nothing, whatever they are divisible by
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"}
    options = {n: x for n, x in options.items() if n != "programs"}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, fixed, attributes)
    if arch.startswith("gfx"):
        return triton.compile(source, target=GPUTarget("hip", arch, 64), options=options).metadata.shared, 0
    number = int(arch[3:])
    target = GPUTarget("cuda", number, 32)
    backend, context, about = make_backend(target), ir.context(), {}
    options = backend.parse_options(options)
    ir.load_dialects(context), backend.load_dialects(context)
    code = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    for step in backend.make_ttir, backend.make_ttgir, backend.make_llir, backend.make_ptx:
        code = step(code, about, options, number)
    if number != 90 or not kernel.is_gluon():                    # whose registers nobody counts
        return about["shared"], 0
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        (ptx := pathlib.Path(folder, "kernel.ptx")).write_text(code)
        said = subprocess.run([tools / "ptxas-blackwell", "-arch=sm_90a", "-v", ptx, "-o", ptx.with_suffix(".cubin")], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return about["shared"], int(re.search(r"(\d+) bytes spill stores", said.stderr)[1])


class Endless:
    """An array that takes no memory: it holds the place of each value, and keeps the places that are written."""

    def __init__(self, shape, dtype):
        self.shape, self.size, self.dtype, self.itemsize, self.written = shape, int(np.prod(shape)), np.dtype(dtype), np.dtype(dtype).itemsize, set()

    def __getitem__(self, at): return np.ones(at.shape, self.dtype)
    def __setitem__(self, at, x): self.written.update(at.reshape(-1).tolist())


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("arch, T", [("sm_90", 140), ("sm_80", 140), ("sm_80", 1)])
def test_offsets_past_2_31(arch, T):
    """The last program of arrays of 2^32 elements reads nothing outside of them and writes its own rows. Nothing so large is made."""
    B, H, D = 2**32 // (T * 64 * 128) + 1, 64, 128
    x, s0 = jax.ShapeDtypeStruct((B, T, H, D), "bfloat16"), jax.ShapeDtypeStruct((B, H, D, D), "float32")
    attend = lambda q, k, v, s0: lightning_attn(q, k, v, 3, 8, initial_state=s0, backend="triton")
    (kernel, arrays, arguments, options), = launches(arch, lambda *a: attend(*a)[0], x, x, x, s0)
    def endless(x):
        described = isinstance(x, la.jax_triton.TensorDescriptor)
        return Pointer(Endless(x.base.shape if described else x.shape, x.base.dtype if described else x.dtype))
    pointers = list(map(endless, arrays))
    for i, x in enumerate(arrays):
        if isinstance(x, la.jax_triton.TensorDescriptor):        # whole chunks are as they are in the other tests: no descriptor past 2^31 rows
            pointers[i] = np.broadcast_to(np.ones((), x.base.dtype), x.shape).view(Described)
            pointers[i].nbytes_per_cta, pointers[i].layout = int(np.prod(x.block_shape)) * 2, None
    with np.errstate(all="ignore"):
        run(kernel, la, [options["programs"] - 1], pointers, arguments)
    s, o = (p.array.written for p in pointers[-2:])
    rows = {((B - 1) * T + t) * H + H - 1 for t in range(T)}
    assert {at // D for at in o} == rows
    assert {at // D**2 for at in s} == {B * H - 1}


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("arch, dtype", [
    *itertools.product(["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"], ["bfloat16", "float32"]),
    ("sm_80", "float16"), ("sm_90", "float16")])
def test_compiles_and_fits(arch, dtype):
    """Each configuration that can be chosen: long sequences, with their gradients for one head dim, and a decode step."""
    import triton
    amd = pathlib.Path(triton.__file__).parent / "backends/amd/lib"
    if arch.startswith("gfx") and la._fits(triton.__version__, ">=3.9") and not (amd / "libtriton_amd_codegen.so").exists():
        pytest.skip("a slim Triton, without the code generator for AMD")
    table = {}
    # float16 is launched as bfloat16 is, and registers are counted for the Hopper kernel alone: elsewhere fewer sizes will do
    if arch == "sm_90" and dtype != "float32":
        sizes = (128, 192) if dtype == "float16" else (16, 64, 96, 128, 192, 256, 512)
    else:
        sizes = (128,) if dtype == "float16" else (16, 128, 192, 512) if arch in ("sm_80", "sm_90") else (128, 512)
    shapes = [(1, 4096, 2, D) for D in sizes] + [(1, 1, 2, 128)]
    if arch == "sm_90" and dtype != "float16":                   # no argument is 1 here, which would be a constant
        shapes += [(2, 300, 4, 64), (2, 300, 4, 128)]
    for B, T, H, D in shapes:
        x = jnp.zeros((B, T, H, D), dtype)
        forward = lambda q: lightning_attn(q, x, x, 12, 24, backend="triton")[0].sum()
        with_gradient = D in (64, 128) and T > 1 and (arch == "sm_90" or dtype != "float16")
        for launch in launches(arch, lambda: jax.value_and_grad(forward)(x) if with_gradient else forward(x)):
            kernel, _, arguments, options = launch
            tile = {n: arguments.get(n) for n in ("BK", "BV", "BE", "C", "PACKED", "LINKED", "HAS_S0", "DUAL")}
            edges = [arguments[d] % arguments["B" + d] > 0 for d in "KVE" if d in arguments]
            key = kernel.__name__, B, *tile.values(), *edges, options["num_warps"], options["num_stages"]
            if key in table:
                continue
            table[key] = shared, spilled = build(*launch, arch)
            assert shared <= la._SHARED_MEMORY[arch] * 1024, (key, shared)
            # two scans at once for head dims of 64 use all registers, parts of the keys want more; each ptxas finds another number
            half = arguments.get("BV") == 64 and D == 128         # of the values of a short sequence
            few = 44 if arguments.get("DUAL") and D == 64 or half else 512 if D > 128 else 0
            counted = kernel.is_gluon() and la._fits(triton.__version__, ">=3.9")             # 3.8 spills 120 bytes for two scans
            assert not counted or spilled <= few, (key, spilled)
    assert len(table) >= 4
    assert any(key[0] == "_hopper_kernel" for key in table) == (la._HAS_HOPPER and arch == "sm_90" and dtype != "float32")


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("B, T, H, D", [(1, 32768, 32, 128), (1, 131072, 8, 128), (4, 8192, 16, 64), (1, 4096, 16, 128), (2, 8192, 16, 96), (2, 8192, 16, 256), (1, 4096, 4, 512)])
def test_states_of_segments_take_little_memory(B, T, H, D):
    """A seventh of q, k, v and o at most. There are states: none of these shapes fills an H200 without segments."""
    x = jax.ShapeDtypeStruct((B, T, H, D), "bfloat16")
    found = launches("sm_90", lambda q, k, v: lightning_attn(q, k, v, 12, 24, backend="triton"), x, x, x)
    z, = (arrays[-1] for kernel, arrays, *_ in found if kernel.__name__ == "_states_kernel")
    assert z.dtype == "float32" and 4 * z.size <= 4 * 2 * B * T * H * D / 7


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("dtype, T, D, cu", [("bfloat16", 4096, 64, None), ("bfloat16", 4096, 64, [0, 10, 4096]), ("float32", 80, 1, None), ("float32", 1, 16, None)])
def test_compiles_where_all_is_one(dtype, T, D, cu):
    """One row, one head, a scale of 1: arguments that are 1 become constants of the kernels, and are typed as such."""
    x, s0 = jnp.zeros((1, T, 1, D), dtype), jnp.zeros((1 if cu is None else 2, 1, D, D))
    f = lambda x, s0: lightning_attn(x, x, x, 12, 24, 1.0, s0, cu_seqlens=None if cu is None else jnp.array(cu), backend="triton")[0].astype(jnp.float32).sum()
    built = {}
    for launch in launches("sm_90", lambda: jax.grad(f, (0, 1))(x, s0)):
        key = launch[0].__name__, str(launch[2] | dict(params=None))                     # numbers are not compiled in
        if key not in built:
            built[key], _ = build(*launch, "sm_90")
    assert len(built) == (4 if T > 80 else 2)                       # with states given, and without
