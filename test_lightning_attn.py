# SPDX-License-Identifier: Apache-2.0
"""Tests of lightning_attn.py: `python test_lightning_attn.py` or `pytest test_lightning_attn.py`, beside the file.

Every case is compared with a float64 oracle written here (numpy, O(T^2)) on every path that the machine has: plain JAX, the Triton
kernels in Triton's interpreter (where there is no GPU), the Triton kernels on a GPU. What wants a GPU and found none is skipped,
and counted at the end.
"""
import importlib.util
import os
import pathlib
import sys
import threading
import types

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lightning_attn as la
from lightning_attn import lightning_attn, lightning_attn_reference, lightning_g_gamma

FILE = pathlib.Path(la.__file__)
HAS_GPU = jax.default_backend() == "gpu"
HAS_TRITON = la.triton is not None


# The paths ----------------------------------------------------------------------------------------------------------------------

class Host:
    """A numpy array with the few tensor methods that Triton's interpreter calls."""

    def __init__(self, array): self.array, self.dtype = array, str(array.dtype)
    def data_ptr(self): return self.array.ctypes.data
    def untyped_storage(self): return self
    def cpu(self): return self
    def new_empty(self, *_, **__): return Host(self.array)
    def set_(self, *_): pass
    def storage_offset(self): return 0
    def size(self): return self.array.shape
    def stride(self): return None
    def copy_(self, _): pass


def interpreted():
    """lightning_attn.py once more, its kernels run by Triton's interpreter through the file's own launch code."""
    import triton
    from triton.runtime import interpreter

    # the interpreter holds bfloat16 as bits: widen what is multiplied, and round to nearest as hardware does
    builder, lock = interpreter.InterpreterBuilder, threading.Lock()
    create_dot, cast = builder.create_dot, interpreter._convert_float

    def dot(self, a, b, acc, *rest):
        import triton.language as tl
        def widen(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return create_dot(self, widen(a), widen(b), acc, *rest)

    def fp_trunc(self, src, dst_type):
        import ml_dtypes
        import triton.language as tl
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return truncate(self, src, dst_type)

    truncate = builder.create_fp_trunc
    builder.create_dot, builder.create_fp_trunc = dot, fp_trunc

    def triton_call(*args, kernel, out_type, grid, num_warps, num_stages, backend_options, **constants):
        leaves, tree = jax.tree.flatten(out_type)
        is_array = [isinstance(x, jax.Array) for x in args]

        def run(*arrays):
            arrays = iter(arrays)
            host = [Host(aligned(np.asarray(next(arrays)))) if a else x for a, x in zip(is_array, args)]
            out = [aligned(np.full(x.shape, np.nan, x.dtype)) for x in leaves]             # what is not written shows
            with lock, np.errstate(all="ignore"):
                kernel[grid](*host, *map(Host, out), **constants)
            return tuple(out)

        out = jax.pure_callback(run, tuple(leaves), *(x for a, x in zip(is_array, args) if a))
        return jax.tree.unflatten(tree, out)

    triton.knobs.runtime.interpret = True
    try:
        spec = importlib.util.spec_from_file_location("lightning_attn_interpreted", FILE)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        triton.knobs.runtime.interpret = False
    module.jax_triton = types.SimpleNamespace(triton_call=triton_call)
    return module


def aligned(x):
    """A copy of `x` that starts on 16 bytes, as GPU arrays do."""
    raw = np.empty(x.nbytes + 64, np.uint8)
    out = raw[-raw.ctypes.data % 64:][:x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


INTERPRETED = interpreted() if HAS_TRITON and not HAS_GPU else None


def attend(path, *args, **kwargs):
    if path == "interpreter":
        return INTERPRETED.lightning_attn(*args, **kwargs, backend="triton")
    return lightning_attn(*args, **kwargs, backend={"xla": "xla", "gpu": "triton"}[path])


wants_gpu = pytest.mark.skipif(not HAS_GPU, reason="wants a GPU")
PATHS = [pytest.param("xla"),
         pytest.param("interpreter", marks=pytest.mark.skipif(INTERPRETED is None, reason="the GPU runs these kernels" if HAS_GPU else "no Triton")),
         pytest.param("gpu", marks=wants_gpu)]
each_path = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(scope="session", autouse=True)
def say_what_wants_a_gpu(request):
    yield
    count = sum(any(m.name == "skipif" and m.kwargs.get("reason") == "wants a GPU" and m.args[0] for m in item.iter_markers())
                for item in request.session.items)
    request.config.pluginmanager.get_plugin("terminalreporter").write_line(f"\n{count} cases want a GPU and were not run")


# The oracle ---------------------------------------------------------------------------------------------------------------------

def one_sequence(q, k, v, g, scale, s0, do, ds):
    """Output, final state and all gradients of one sequence, float64: [T, H, D] operands, g [H], s0 and ds [H, K, V]."""
    T = q.shape[0]
    t = np.arange(T)
    far = t[:, None] - t
    D = np.where(far >= 0, np.exp(g[:, None, None] * np.maximum(far, 0)), 0)                # [H, i, j]
    A, dA = np.einsum("ihk,jhk->hij", q, k), np.einsum("ihv,jhv->hij", do, v)
    enter, stay = np.exp(g[:, None] * (t + 1)), np.exp(g[:, None] * (T - 1 - t))             # [H, T]
    end = np.exp(g * T)[:, None, None]
    o = scale * (np.einsum("hij,jhv->ihv", A * D, v) + np.einsum("hi,ihk,hkv->ihv", enter, q, s0))
    s = end * s0 + np.einsum("hj,jhk,jhv->hkv", stay, k, v)
    dq = scale * (np.einsum("hij,jhk->ihk", dA * D, k) + np.einsum("hi,ihv,hkv->ihk", enter, do, s0))
    dk = scale * np.einsum("hij,ihk->jhk", dA * D, q) + np.einsum("hj,jhv,hkv->jhk", stay, v, ds)
    dv = scale * np.einsum("hij,ihv->jhv", A * D, do) + np.einsum("hj,jhk,hkv->jhv", stay, k, ds)
    ds0 = end * ds + scale * np.einsum("hi,ihk,ihv->hkv", enter, q, do)
    dg = (scale * np.einsum("hij,hij,ij->h", A * D, dA, np.maximum(far, 0))
          + scale * np.einsum("hi,i,ihk,hkv,ihv->h", enter, t + 1, q, s0, do, optimize=True)
          + np.einsum("hj,j,jhk,jhv,hkv->h", stay, T - 1 - t, k, v, ds, optimize=True) + T * np.einsum("hkv,hkv->h", end * s0, ds))
    return o, s, dq, dk, dv, ds0, dg


def oracle(q, k, v, g, scale, s0, do, ds, reverse=False, cu=None):
    """[o, s, dq, dk, dv, ds0, dg] in float64, whatever the batch, pack, groups and direction."""
    q, k, v, g, s0, do, ds = (np.asarray(x, np.float64) for x in (q, k, v, g, s0, do, ds))
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    out = [np.zeros_like(x) for x in (do, ds, q, k, v, s0, g)]
    pieces = [(b, b, 0, T) for b in range(B)] if cu is None else [(i, 0, a, b) for i, (a, b) in enumerate(zip(cu, cu[1:]))]
    flip = slice(None, None, -1 if reverse else 1)
    for i, b, start, end in pieces:
        cut = lambda x: x[b, start:end][flip]
        r = one_sequence(cut(q), cut(k), cut(v), g, scale, s0[i], cut(do), ds[i])
        for x, y in zip((out[0], *out[2:5]), (r[0], *r[2:5])):
            x[b, start:end] = y[flip]
        out[1][i], out[5][i] = r[1], r[5]
        out[6] += r[6]
    for i in 3, 4:
        out[i] = out[i].reshape(B, T, H // group, group, -1).sum(3)
    return out


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30) if want.size and np.any(want) else np.abs(got).max(initial=0)


NAMES = "output final_state dquery dkey dvalue dinitial_state dg_gamma".split()
BAR = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 1e-3}


def inputs(seed, B, T, H, Hk, K, V, dtype="float32", n=None):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    state = lambda: jnp.asarray(rng.standard_normal((n or B, H, K, V)), jnp.float32)
    return draw(B, T, H, K), draw(B, T, Hk, K), draw(B, T, Hk, V), state(), draw(B, T, H, V), state()


def everything(path, q, k, v, s0, do, ds, g, **kwargs):
    """Results and gradients on a path, as `oracle` lists them."""
    @jax.jit
    def run(q, k, v, s0, g):
        out, back = jax.vjp(lambda q, k, v, s0, g: attend(path, q, k, v, initial_state=s0, g_gamma=g, **kwargs), q, k, v, s0, g)
        return *out, *back((do, ds))
    with jax.default_matmul_precision("highest"):
        return run(q, k, v, s0, jnp.asarray(g, jnp.float32))


def compare(path, q, k, v, s0, do, ds, g=None, bar=None, reverse=False, cu=None, **kwargs):
    H, K = q.shape[2:]
    g = np.asarray(lightning_g_gamma(H, 3, 8), np.float64) if g is None else np.asarray(g, np.float64)
    got = everything(path, q, k, v, s0, do, ds, g, reverse=reverse, cu_seqlens=None if cu is None else jnp.asarray(cu), **kwargs)
    want = oracle(q, k, v, g, kwargs.get("softmax_scale") or K**-0.5, s0, do, ds, reverse, cu)
    bar = bar or BAR[str(q.dtype)]
    for name, a, b in zip(NAMES, got, want):
        if name == "dg_gamma":
            if q.dtype == jnp.float32:
                assert error(a, b) < 1e-3, (name, error(a, b))
        else:
            assert a.dtype == (q.dtype if name in ("output", "dquery", "dkey", "dvalue") else jnp.float32), name
            assert error(a, b) < bar, (name, error(a, b))


# Against the oracle -------------------------------------------------------------------------------------------------------------

@each_path
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("B, T, H, Hk, K, V", [
    (1, 128, 2, 2, 32, 32), (2, 150, 4, 2, 16, 24), (1, 1, 2, 1, 16, 16), (3, 17, 2, 2, 8, 40), (1, 64, 1, 1, 1, 1), (1, 333, 4, 1, 5, 7),
    (1, 65, 2, 2, 72, 130)])
def test_batch(path, reverse, B, T, H, Hk, K, V):
    compare(path, *inputs(0, B, T, H, Hk, K, V), reverse=reverse)


@each_path
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T, cu", [(200, [0, 200]), (200, [0, 0, 5, 70, 70, 199, 200]), (150, [0, 65, 66, 140]), (20, [0, 0, 0]), (7, [0, 3, 7])])
def test_packed(path, reverse, T, cu):
    compare(path, *inputs(1, 1, T, 4, 2, 16, 24, n=len(cu) - 1), reverse=reverse, cu=cu)


@each_path
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit(path, reverse, dtype):
    compare(path, *inputs(2, 2, 150, 4, 2, 32, 16, dtype), reverse=reverse)
    compare(path, *inputs(2, 1, 150, 4, 2, 32, 16, dtype, n=3), reverse=reverse, cu=[0, 9, 100, 140])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
