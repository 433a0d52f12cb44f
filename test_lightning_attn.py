# SPDX-License-Identifier: Apache-2.0
"""Tests of lightning_attn.py: `python test_lightning_attn.py`, or `pytest test_lightning_attn.py`.

They take the lightning_attn.py beside this file, in a package or not, or else the installed one.
They need pytest; with pytest-xdist they take all cores, and with flatbuffers they test exports.
Most cases compare results and gradients with a float64 oracle in numpy (`oracle`). They run on
every path that the machine has:

    xla      plain JAX
    gpu      the kernels on a GPU
    triton   without a GPU: the Triton kernels on the emulator of this file
    gluon    without a GPU: the Gluon kernel, and the Triton kernels beside it, on the emulator

A script run owns its processes. Without a GPU it gives JAX 8 virtual CPU devices. With several GPUs
it gives each worker one GPU, and then runs the cases of several devices in one process. A run under
pytest changes nothing of its process: without several devices their cases run in a script, as the
one case `test_on_8_devices`.
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
from unittest import mock

import pytest

# Script run ---------------------------------------------------------------------------------------
# This part must stay above the import of JAX, which reads XLA_FLAGS and CUDA_VISIBLE_DEVICES.

SCRIPT = "LIGHTNING_ATTN_TEST_SCRIPT"  # is set in a script run
DEVICES = "wants several devices"
BESIDE = pathlib.Path(__file__).resolve().with_name("lightning_attn.py")
PATH_NAMES = "xla", "gpu", "triton", "gluon"


def file_under_test():
    spec = None if BESIDE.exists() else importlib.util.find_spec("lightning_attn")
    return pathlib.Path(spec.origin) if spec else BESIDE


def visible_gpus():
    """{index: GiB of memory} of the NVIDIA GPUs that JAX may use."""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not shutil.which("nvidia-smi"):
        return {}
    query = ["nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    memory = {index: int(mib) / 1024 for index, mib in (line.split(", ") for line in listed)}
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(memory)).split(",")
    return {index: memory.get(index, 80) for index in asked if index}


def main(arguments):
    """Runs all cases or, with `--devices`, those of several devices. pytest gets all other
    arguments."""
    gpus, devices = visible_gpus(), "--devices" in arguments
    given = arguments = [a for a in arguments if a != "--devices"]
    has_xdist = importlib.util.find_spec("xdist")
    in_two = len(gpus) > 1 and not devices and has_xdist
    if devices or in_two:
        of_devices = f"skipif(reason='{DEVICES}')"
        arguments = ["-m", of_devices if devices else f"not {of_devices}", *arguments]
    os.environ[SCRIPT] = "1"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = "--xla_force_host_platform_device_count=8 --xla_gpu_autotune_level=0"
    if not (gpus or shutil.which("rocm-smi")) or os.environ.get("JAX_PLATFORMS") == "cpu":
        # on a CPU, compiling takes most of the time
        flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    if has_xdist and not (gpus and devices):
        workers = len(os.sched_getaffinity(0))
        workers = min(workers, int(sum(gpus.values()) / 6)) if gpus else workers
        if not any(a.startswith(("-n", "--numprocesses", "--pdb")) for a in arguments):
            arguments = ["-n", str(workers), *arguments]
        arguments = ["--dist", "worksteal", *arguments]
    style = ["-q", "-p", "no:warnings", "-o", "console_output_style=count"]
    code = int(pytest.main([__file__, *style, *arguments], [Summary()]))
    if in_two:
        print("\nCases of several devices:", flush=True)
        code = subprocess.run([sys.executable, __file__, "--devices", *given]).returncode or code
    leave(code)


def leave(code=0):
    """Skips Python's shutdown, in which nanobind lists objects of JAX as leaked."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


class Summary:
    """A pytest plugin that says what passed on which path, and why cases were skipped."""

    def pytest_terminal_summary(self, terminalreporter):
        words = lambda case: re.split(r"[\[\]-]", case.nodeid.rpartition("::")[2])
        path = lambda case: next((word for word in words(case) if word in PATH_NAMES), "all else")
        reason = lambda case: case.longrepr[2].removeprefix("Skipped: ")
        terminalreporter.write_line(f"\nTested {file_under_test()}.")
        for outcome, kind in ("passed", path), ("skipped", reason):
            counted = collections.Counter(map(kind, terminalreporter.stats.get(outcome, [])))
            terminalreporter.write_line(f"{outcome}: {dict(counted.most_common())}")


if __name__ == "__main__":
    main(sys.argv[1:])
if SCRIPT in os.environ and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    atexit.register(leave)
    if len(gpus := list(visible_gpus())) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.removeprefix("gw")) % len(gpus)]

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# File under test ----------------------------------------------------------------------------------

param, parametrize = pytest.param, pytest.mark.parametrize


def load(name):
    """The file under test as a module of another name: "lightning_attn" may be somebody else's."""
    spec = importlib.util.spec_from_file_location(name, file_under_test())
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


la = load("lightning_attn_under_test")
lightning_attn, lightning_attn_reference = la.lightning_attn, la.lightning_attn_reference
lightning_g_gamma = la.lightning_g_gamma
compiled_reference = jax.jit(lightning_attn_reference, static_argnames=("reverse",))

FILE = file_under_test()
PROJECT = pathlib.Path(__file__).resolve().parent
HAS_GPU = jax.default_backend() == "gpu"
HAS_TRITON = la.triton is not None
if not HAS_GPU:
    la.GROUP = 128  # tokens that plain JAX unrolls: compiling takes most of the time


def in_project():
    """Whether this file lies in the project. A README beside a copy is somebody else's."""
    about = PROJECT / "pyproject.toml"
    return about.exists() and 'name = "lightning-attn-jax"' in about.read_text()


wants_project = pytest.mark.skipif(not in_project(), reason="not in the project's folder")
wants_gpu = pytest.mark.skipif(not HAS_GPU, reason="wants a GPU")
wants_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")


def wants_devices(count, gpus=True):
    """A mark of cases that want several devices: GPUs or, without `gpus`, only CPUs."""
    enough = len(jax.devices()) >= count and (gpus or not HAS_GPU)
    return pytest.mark.skipif(not enough, reason=DEVICES)


wants_8_cpus = wants_devices(8, gpus=False)
on_devices = pytest.mark.skipif(len(jax.devices()) < 2 and not HAS_GPU, reason=DEVICES)

# Paths --------------------------------------------------------------------------------------------

EMULATED = ["triton", "gluon"] * (HAS_TRITON and not HAS_GPU)


def path_param(path):
    reason = "the GPU runs these kernels" if HAS_GPU else "no Triton for this path"
    skipped = pytest.mark.skipif(path not in EMULATED, reason=reason)
    return param(path, marks={"xla": (), "gpu": wants_gpu}.get(path, skipped))


PATHS = list(map(path_param, ("xla", "triton", "gluon", "gpu")))
each_path = parametrize("path", PATHS)
each_direction = parametrize("reverse", [False, True], ids=["forward", "reverse"])


def both_directions(*values, id):
    """Two cases, one for each direction, which is their last value."""
    directions = {"forward": False, "reverse": True}
    return [param(*values, reverse, id=f"{id}-{name}") for name, reverse in directions.items()]


# The module that runs on a path: lightning_attn.py, or its copy for the emulator.
module_of = lambda path: emulated(path) if path in EMULATED else la


def run_on(path, *args, **kwargs):
    """Calls lightning_attn on a path."""
    backend = "xla" if path == "xla" else "triton"
    return module_of(path).lightning_attn(*args, **kwargs, backend=backend)


@pytest.fixture
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@contextlib.contextmanager
def setting(name, value):
    """A setting of JAX that has no context of its own."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


# Oracle and inputs --------------------------------------------------------------------------------

einsum = functools.partial(np.einsum, optimize=True)  # by matrix products


def oracle_of_one_sequence(q, k, v, g, scale, s0, do, ds):
    """Output, final state and all gradients of one sequence, in float64.

    The operands are [T, H, D], g is [H], s0 and ds are [H, K, V]. The last result is, per head, the
    sum of the squares of the terms that dg sums.
    """
    T = q.shape[0]
    t = np.arange(T)
    far = t[:, None] - t
    D = np.where(far >= 0, np.exp(g[:, None, None] * np.maximum(far, 0)), 0)  # [H, i, j]
    A, dA = einsum("ihk,jhk->hij", q, k), einsum("ihv,jhv->hij", do, v)
    AD, dAD = A * D, dA * D
    enter, stay = np.exp(g[:, None] * (t + 1)), np.exp(g[:, None] * (T - 1 - t))  # [H, T]
    end = np.exp(g * T)[:, None, None]
    o = scale * (einsum("hij,jhv->ihv", AD, v) + einsum("hi,ihk,hkv->ihv", enter, q, s0))
    s = end * s0 + einsum("hj,jhk,jhv->hkv", stay, k, v)
    dq = scale * (einsum("hij,jhk->ihk", dAD, k) + einsum("hi,ihv,hkv->ihk", enter, do, s0))
    dk = scale * einsum("hij,ihk->jhk", dAD, q) + einsum("hj,jhv,hkv->jhk", stay, v, ds)
    dv = scale * einsum("hij,ihv->jhv", AD, do) + einsum("hj,jhk,hkv->jhv", stay, k, ds)
    ds0 = end * ds + scale * einsum("hi,ihk,ihv->hkv", enter, q, do)
    terms = (
        scale * AD * dA * np.maximum(far, 0),
        scale * enter * (t + 1) * einsum("ihk,hkv,ihv->hi", q, s0, do),
        stay * (T - 1 - t) * einsum("jhk,jhv,hkv->hj", k, v, ds),
        T * end * s0 * ds,
    )
    by_head = lambda f: sum(f(x).reshape(len(g), -1).sum(1) for x in terms)
    return o, s, dq, dk, dv, ds0, by_head(np.asarray), by_head(np.square)


def oracle(q, k, v, g, scale, s0, do, ds, reverse=False, cu=None):
    """[o, s, dq, dk, dv, ds0, dg, size] in float64, of batches, packs and grouped heads.

    `size` is, per head, the root of the sum of the squares of dg's terms.
    """
    q, k, v, g, s0, do, ds = (np.asarray(x, np.float64) for x in (q, k, v, g, s0, do, ds))
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    o, s, dq, dk, dv, ds0, dg, size = (np.zeros_like(x) for x in (do, ds, q, k, v, s0, g, g))
    if cu is None:
        sequences = [(b, b, 0, T) for b in range(B)]
    else:
        sequences = [(i, 0, a, b) for i, (a, b) in enumerate(zip(cu, cu[1:]))]
    flip = slice(None, None, -1 if reverse else 1)
    for i, row, start, end in sequences:
        cut = lambda x: x[row, start:end][flip]
        one = oracle_of_one_sequence(cut(q), cut(k), cut(v), g, scale, s0[i], cut(do), ds[i])
        for whole, part in zip((o, dq, dk, dv), (one[0], *one[2:5])):
            whole[row, start:end] = part[flip]
        s[i], ds0[i] = one[1], one[5]
        dg += one[6]
        size += one[7]
    dk, dv = (x.reshape(B, T, H // group, group, x.shape[-1]).sum(3) for x in (dk, dv))
    return [o, s, dq, dk, dv, ds0, dg, np.sqrt(size)]


def error(got, want):
    """The norm of the difference, relative to the norm of `want`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    size = np.linalg.norm(want) if want.size and np.any(want) else 1
    off = np.linalg.norm(got - want) / max(size, 1e-30)
    return np.inf if np.isnan(off) else off  # `max` of a list may pass over NaN


def errors(got, want, name):
    """`error` per head, of outputs and gradients [B, T, H, D] and of states [n, H, K, V]."""
    heads = lambda x: np.moveaxis(np.asarray(x), 1 if "state" in name else 2, 0)
    return [error(a, b) for a, b in zip(heads(got), heads(want), strict=True)]


NAMES = ["output", "final_state", "dquery", "dkey", "dvalue", "dinitial_state", "dg_gamma"]
BAR = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 1e-3}
DG_BAR = {"float32": 2e-3, "bfloat16": 1e-2, "float16": 1e-2}


def error_of_dg(got, want, size):
    """The largest error of a head of dg, relative to dg or, where its terms cancel, to `size`."""
    got, size = np.asarray(got, np.float64), np.maximum(np.abs(want), size)
    assert got.shape == want.shape and np.isfinite(got).all()
    return (np.abs(got - want) / np.maximum(size, 1e-30)).max(initial=0)


def check_dg(path, got, want, size, dtype="float32"):
    """Checks dg in `got`, the results of `results_and_gradients`, where dg is among them."""
    assert len(got) == (6 if path in EMULATED else 7)
    for dg in got[6:]:
        assert error_of_dg(dg, want, size) < DG_BAR[dtype], (dg, want, size)


def inputs(seed, B, T, H, Hk, K, V, dtype="float32", n=None):
    """Random q, k, v, s0, do and ds, of n sequences."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    state = lambda: jnp.asarray(rng.standard_normal((n or B, H, K, V)), jnp.float32)
    q, k, v = draw(B, T, H, K), draw(B, T, Hk, K), draw(B, T, Hk, V)
    return q, k, v, state(), draw(B, T, H, V), state()


decays = lambda H: np.asarray(lightning_g_gamma(H, 3, 8), np.float64)  # of layer 3 of 8
int32 = lambda cu: None if cu is None else jnp.asarray(cu, jnp.int32)
float32, float64 = (lambda x, kind=kind: x.astype(kind) for kind in (np.float32, np.float64))


@functools.cache
def compiled_on(path, **kwargs):
    """A compiled `results_and_gradients`. The cache lets calls of the same shapes compile once.

    The gradient of g is plain JAX on every path. Where the emulator runs the kernels, the cases of
    plain JAX cover that gradient.
    """

    @jax.jit
    def run(q, k, v, s0, g, do, ds, cu):
        def f(q, k, v, s0, g):
            options = dict(initial_state=s0, g_gamma=g, cu_seqlens=cu)
            return run_on(path, q, k, v, **options, **kwargs)

        if path in EMULATED:
            out, back = jax.vjp(lambda *args: f(*args, g), q, k, v, s0)
        else:
            out, back = jax.vjp(f, q, k, v, s0, g)
        return *out, *back((do, ds))

    return run


def results_and_gradients(path, q, k, v, s0, do, ds, g, cu=None, **kwargs):
    """[o, s, dq, dk, dv, ds0, dg] on a path, as `oracle` lists them. The emulator leaves out dg."""
    with jax.default_matmul_precision("highest"):
        g = jnp.asarray(g, jnp.float32)
        return compiled_on(path, **kwargs)(q, k, v, s0, g, do, ds, int32(cu))


def check_against_oracle(path, q, k, v, s0, do, ds, g=None, reverse=False, cu=None):
    """Compares results and gradients on a path with the oracle's, head by head."""
    g = np.asarray(decays(q.shape[2]) if g is None else g, np.float64)
    got = results_and_gradients(path, q, k, v, s0, do, ds, g, cu, reverse=reverse)
    want = oracle(q, k, v, g, q.shape[3] ** -0.5, s0, do, ds, reverse, cu)
    for name, a, b in zip(NAMES[:6], got, want):
        assert a.dtype == (jnp.float32 if "state" in name else q.dtype), name
        assert max(errors(a, b, name)) < BAR[str(q.dtype)], (name, errors(a, b, name))
    check_dg(path, got, want[6], want[7], str(q.dtype))


def assert_close(got, want, bar=2e-5):
    """Compares trees of arrays, and arrays with heads head by head.

    Heads are the axis before the last axis or the axis before that. Where both axes are short, all
    slices of both must agree.
    """
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert error(x, y) < bar, error(x, y)
        for axis in (-2, -3) if x.ndim > 3 else ():
            if x.shape[axis] <= 16:
                for a, b in zip(np.moveaxis(x, axis, 0), np.moveaxis(y, axis, 0)):
                    assert error(a, b) < bar, (axis, error(a, b))


QKV = (0, 1, 2)


def sum_of_squares(f):
    """A loss: the sum of the squares of all results of f."""
    return lambda *args: sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(f(*args)))


gradients_of = lambda f, operands=QKV: jax.jit(jax.grad(sum_of_squares(f), operands))


# Results and gradients ----------------------------------------------------------------------------


@each_path
@parametrize(
    "B, T, H, Hk, K, V, reverse",
    [
        *both_directions(2, 150, 2, 1, 16, 24, id="grouped-heads"),
        *both_directions(1, 1, 2, 1, 16, 16, id="one-token"),
        *both_directions(1, 170, 2, 1, 5, 7, id="odd-head-dims"),
        *both_directions(1, 65, 2, 2, 72, 130, id="ragged-tiles"),
        # gradients scan in both directions, so one direction is enough here
        param(1, 128, 2, 2, 32, 32, False, id="whole-chunks"),
        param(3, 17, 2, 2, 8, 40, True, id="less-than-a-chunk"),
        param(1, 64, 1, 1, 1, 1, False, id="all-dims-one"),
        param(2, 0, 2, 1, 16, 8, False, id="no-token"),
        param(0, 70, 2, 1, 16, 8, False, id="no-row"),
        *(param(1, 80, 1, 1, *D, False, id=f"K{D[0]}-V{D[1]}") for D in [(512, 16), (16, 512)]),
        *(param(1, 80, 1, 1, *D, False, id=f"K{D[0]}-V{D[1]}") for D in [(96, 192), (1, 2)]),
    ],
)
def test_batch(path, B, T, H, Hk, K, V, reverse):
    check_against_oracle(path, *inputs(0, B, T, H, Hk, K, V), reverse=reverse)


@each_path
@parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_and_heads_do_not_mix(path, dtype):
    """NaN in other rows and heads changes no bit. Neither does a second run."""
    operands = inputs(9, 2, 150, 2, 2, 16, 40, dtype)
    run = lambda operands: results_and_gradients(path, *operands, decays(2))[:6]
    own_row = lambda x: np.s_[:1]
    own_head = lambda x: np.s_[:, :1] if x.shape[1] == 2 else np.s_[:, :, :1]
    first = run(operands)
    for own in own_row, own_head:
        spoiled = [jnp.full_like(x, jnp.nan).at[own(x)].set(x[own(x)]) for x in operands]
        for again, other, x in zip(run(operands), run(spoiled), first):
            assert np.array_equal(again, x) and np.array_equal(other[own(x)], x[own(x)])


@parametrize("path", [path_param("gluon")])
@parametrize("T, cu", [(450, None), (200, [0, 70, 70, 190])], ids=["batch", "packed"])
def test_programs_that_take_half_the_values(path, T, cu, monkeypatch):
    LAUNCHED.clear()
    monkeypatch.setattr(config_of_gluon, "num_sms", 132)
    monkeypatch.setattr(module_of(path), "SEGMENT", 512)  # 8 chunks fill each buffer twice
    check_against_oracle(path, *inputs(14, 1, T, 2, 1, 128, 128, n=cu and len(cu) - 1), cu=cu)
    rows = 1 if cu is None else 5  # of a pack: 3 sequences, and the tokens before and after them
    assert ("_hopper_kernel", 2 * rows * 2) in LAUNCHED


@each_path
@parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_accuracy_of_long_sequences(path, dtype, monkeypatch):
    monkeypatch.setattr(la, "GROUP", 512)  # as users run plain JAX
    T = 4096 if HAS_GPU else 1024 if path == "xla" else 512
    check_against_oracle(path, *inputs(3, 1, T, 2, 2, 64, 64, dtype))


@each_path
@parametrize(
    "g",
    [[0.0, -1e-4], [-50.0, -1e4], [0.0, -1e-30], [-np.inf, -0.1]],
    ids=["none-and-slow", "fast", "none-and-slowest", "infinite"],
)
def test_extreme_decays(path, g):
    operands = inputs(5, 1, 130, 2, 2, 16, 16)
    check_against_oracle(path, *operands, g=np.maximum(g, -1e4))
    infinite, large = (results_and_gradients(path, *operands, x) for x in (g, np.maximum(g, -1e4)))
    for a, b in zip(infinite, large):
        assert np.array_equal(a, b) and np.isfinite(a).all()


@each_path
@parametrize(
    "scale, dtype",
    [(-2.5, "float32"), (0.0, "float32"), (1.0, "float32"), (1.0, "bfloat16"), (-2.5, "float16")],
)
def test_scale(path, scale, dtype):
    """A number or traced, in the default precision: TF32 on GPUs. The gradient of a traced scale
    sums over all of query, in float32 whatever the dtype."""
    q, k, v, s0, do, ds = inputs(6, 1, 256, 2, 1, 32, 32, dtype)
    g = np.array([-0.05, -0.6])

    def f(scale):
        options = dict(initial_state=s0, g_gamma=jnp.asarray(g, jnp.float32))
        o, s = run_on(path, q, k, v, softmax_scale=scale, **options)
        return (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(), (o, s)

    (_, traced), gradient = jax.jit(jax.value_and_grad(f, has_aux=True))(jnp.float32(scale))
    bar = 2e-3 if dtype == "float32" else 1e-2
    want = oracle(q, k, v, g, scale, s0, do, ds)
    for o, s in f(scale)[1], traced:
        assert error(o, want[0]) < bar and error(s, want[1]) < bar
    terms = oracle(q, k, v, g, 1.0, s0, do, ds)[0] * float64(do)
    assert abs(float(gradient) - terms.sum()) < 2 * bar * np.linalg.norm(terms)


@parametrize("cu", [None, [0, 500, 1000]], ids=["batch", "packed"])
@parametrize("f", [lightning_attn, lightning_attn_reference], ids=["op", "reference"])
def test_nothing_sums_in_16_bits(f, cu):
    """Of gradients and second derivatives. Without this flag such sums are silent."""
    q, k, v, *_ = inputs(6, 1, 1024, 4, 2, 32, 32, "bfloat16")
    s0, g = jnp.ones((1 if cu is None else 2, 4, 32, 32)), -jnp.arange(4.0) / 9

    def results(scale, q, k, v, s0, g):
        options = dict(softmax_scale=scale, initial_state=s0, cu_seqlens=int32(cu), g_gamma=g)
        return f(q, k, v, **options)

    gradients = jax.grad(sum_of_squares(results), tuple(range(6)))
    second = jax.grad(sum_of_squares(gradients), tuple(range(6)))
    with setting("jax_allow_f16_reductions", False):
        traced = second if f is lightning_attn else gradients
        jax.eval_shape(traced, jnp.float32(1), q, k, v, s0, g)


def test_float64():
    """Decays are float64 as well, concrete or traced: 1 - 1/3 is no float32."""
    with jax.enable_x64(True):
        as_float64 = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
        q, k, v, s0, do, ds = map(as_float64, inputs(25, 2, 70, 2, 1, 8, 8))
        g = jnp.array([-0.1, -0.5], jnp.float64)
        f = lambda q, k, v, s0, g: lightning_attn(q, k, v, initial_state=s0, g_gamma=g)
        out, back = jax.vjp(f, q, k, v, s0, g)
        want = oracle(q, k, v, g, 8**-0.5, s0, do, ds)[:7]
        for name, a, b in zip(NAMES, (*out, *back((do, ds))), want, strict=True):
            assert a.dtype == jnp.float64 and error(a, b) < 1e-12, name
        f32 = lightning_attn(*map(float32, (q, k, v)), 1, 4)
        assert all(x.dtype == jnp.float32 for x in f32)
        x = jnp.ones((1, 40, 3, 2), jnp.float64)
        layer = lambda i: lightning_attn(x, x, x, i, 3)[1]
        want = lightning_attn(x, x, x, g_gamma=(1 - 1 / 3) * -8 / 3 * np.arange(3))[1]
        assert_close([layer(1), jax.jit(layer)(1)], [want, want], 1e-13)
        traced = jax.jit(lightning_g_gamma, static_argnums=0)(3, 1, 3)
        assert lightning_g_gamma(3, 1, 3).dtype == traced.dtype == jnp.float32


@each_direction
def test_reference(reverse):
    q, k, v, s0, do, ds = inputs(26, 1, 70, 4, 2, 8, 6, n=3)
    options = dict(initial_state=s0, reverse=reverse, cu_seqlens=jnp.array([0, 9, 9, 60]))
    got = lightning_attn_reference(q, k, v, 3, 8, **options)
    want = oracle(q, k, v, decays(4), 8**-0.5, s0, do, ds, reverse, [0, 9, 9, 60])
    assert_close(got, want[:2])


def test_decays_that_cannot_be_checked_do_not_grow():
    """A traced decay above 0, as of a layer past the last, counts as 0 and has no gradient."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 70, 4, 8)), "float32")
    g = jnp.array([0, 0.5, np.inf, -0.5])
    loss = lambda g: lightning_attn(x, x, x, g_gamma=g)[1].sum()
    value, dg = jax.jit(jax.value_and_grad(loss))(g)
    want, dwant = jax.value_and_grad(loss)(jnp.minimum(g, 0))
    assert_close(value, want)
    assert_close(dg, dwant * (g <= 0), 1e-3)
    past = jax.jit(lambda i: (lightning_attn(x, x, x, i, 4)[1], lightning_g_gamma(4, i, 4)))
    assert_close(past(9), (lightning_attn(x, x, x, g_gamma=jnp.zeros(4))[1], jnp.zeros(4)))


def test_profiles_name_the_passes():
    q, k, v, *_ = inputs(6, 1, 70, 2, 2, 16, 16)
    loss = lambda q, k, v, g: (lightning_attn(q, k, v, g_gamma=g)[0] ** 2).sum()
    text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(q, k, v, -jnp.ones(2)).compile().as_text()
    found = set(re.findall(r"lightning_attn_(\w+)", text))
    assert found == {"forward", "dq", "dk_dv", "dg"}, found
    # an eager call runs all that it traces: dg only if somebody wants it
    for operands in QKV, (0, 1, 2, 3):
        traced = jax.make_jaxpr(jax.grad(loss, operands))(q, k, v, -jnp.ones(2))
        assert ("lightning_attn_dg" in traced.pretty_print(name_stack=True)) == (3 in operands)


# Packed batches -----------------------------------------------------------------------------------


@each_path
@parametrize(
    "T, cu, dtype, reverse",
    [
        *both_directions(120, [0, 0, 5, 70, 70, 119, 120], "float32", id="empty-sequences"),
        *both_directions(150, [0, 65, 66, 140], "float32", id="padding"),
        param(150, [0, 65, 66, 140], "bfloat16", False, id="bfloat16"),
        param(150, [0, 65, 66, 140], "float16", True, id="float16"),
        param(130, [0, 130], "float32", True, id="one-sequence"),
        param(20, [0, 0, 0], "float32", False, id="padding-only"),
        param(7, [0, 3, 7], "float32", True, id="less-than-a-chunk"),
        param(
            70, [0, *[30] * 20, *[64] * 300], "float32", False, id="boundaries-padded-to-a-count"
        ),
    ],
)
def test_packed(path, T, cu, dtype, reverse):
    if path in EMULATED and len(cu) > 100:
        cu = cu[:30]  # the emulator is slow
    operands = inputs(1, 1, T, 4, 2, 16, 24, dtype, n=len(cu) - 1)
    check_against_oracle(path, *operands, reverse=reverse, cu=cu)


@each_path
@each_direction
@parametrize("what", ["neighbours", "empty-sequences", "last-sequence"])
def test_what_a_sequence_does_not_read_may_hold_anything(path, reverse, what):
    """NaN in other sequences, in padding, and in states of sequences without tokens.

    Outputs and gradients of padding are exactly 0. Sequence 0 has tokens 0 to 70.
    """
    cu, padding, others = {
        "neighbours": ([0, 70, 110, 140], 140, slice(70, 110)),
        "empty-sequences": ([0, 70, 70, 70, 70], 70, slice(0)),
        "last-sequence": ([0, 70, 140], 140, slice(70, 160)),
    }[what]
    n, g = len(cu) - 1, decays(2)
    q, k, v, s0, do, ds = inputs(8, 1, 160, 2, 1, 16, 16, n=n)
    own = [x[:, :70] for x in (q, k, v)]
    want = oracle(*own, g, 0.25, s0[:1], do[:, :70], ds[:1], reverse)
    spoil = lambda x: x.at[:, 140:].set(jnp.inf).at[:, others].set(jnp.nan)
    states = s0.at[1:].set(jnp.nan) if what == "empty-sequences" else s0
    spoiled = [spoil(x) for x in (q, k, v)]
    cotangents = do.at[:, 140:].set(jnp.nan), ds
    got = results_and_gradients(path, *spoiled, states, *cotangents, g, cu, reverse=reverse)
    for i in 0, 2, 3, 4:
        x = np.asarray(got[i])
        assert error(x[:, :70], want[i]) < 1e-5 and (x[:, padding:] == 0).all(), NAMES[i]
    assert error(got[1][:1], want[1]) < 1e-5 and error(got[5][:1], want[5]) < 1e-5
    if what == "empty-sequences":  # states pass through, and the decay's gradient is finite
        assert np.array_equal(got[1][1:], states[1:], equal_nan=True)
        assert np.array_equal(got[5][1:], ds[1:])
        check_dg(path, got, want[6], want[7])
    if what == "neighbours":  # so is the last sequence
        last = [x[:, 110:140] for x in (q, k, v)]
        want = oracle(*last, g, 0.25, s0[2:], do[:, 110:140], ds[2:], reverse)
        for i in 0, 2, 3, 4:
            assert error(np.asarray(got[i])[:, 110:140], want[i]) < 1e-5, NAMES[i]


@each_path
@parametrize(
    "cu",
    [
        param([0, 20, -5, 40, 60], id="negative"),
        param([5, 30, 60, 2**31 - 1], id="late-start-and-huge-end"),
        param([-(2**31), 2**31 - 1, -1, 0], id="extremes"),
        param([60, 40, 20, 0], id="decreasing"),
    ],
)
def test_malformed_traced_boundaries(path, cu):
    """Traced boundaries cannot be checked. No kernel leaves its arrays: the emulator would raise.
    Every path reads the boundaries alike."""
    n, g = len(cu) - 1, jnp.array([-0.1, 0.0])
    q, k, v, s0, do, ds = inputs(9, 1, 60, 2, 2, 16, 16, n=n)
    got = results_and_gradients(path, q, k, v, s0, do, ds, g, cu)
    with jax.default_matmul_precision("highest"):
        options = dict(g_gamma=g, initial_state=s0, cu_seqlens=int32(cu))
        f = lambda q, k, v, s0: compiled_reference(q, k, v, **options | dict(initial_state=s0))
        out, back = jax.vjp(f, q, k, v, s0)
    assert_close(got[:6], (*out, *back((do, ds))), 1e-5)


def test_boundaries_padded_to_a_count_cost_what_the_sequences_cost():
    """In plain JAX. More boundaries add no products. The two boundaries of a padded row add no
    chunk."""
    op = la._Op(1.0, False, "xla", None)
    scan = lambda x, cu: la._scan_xla(op, la._Operands(x, x, x, -jnp.ones((1, 2)), None, cu))
    boundaries = lambda count, length, T: jnp.minimum(jnp.arange(count) * length, T)

    def products(count):  # without jit each step of a loop that is not skipped calls einsum anew
        with jax.disable_jit(), mock.patch.object(jnp, "einsum", wraps=jnp.einsum) as einsum:
            scan(jnp.ones((1, 256, 2, 8)), boundaries(count, 16, 256)[None])
        return einsum.call_count

    assert 0 < products(128) <= products(17)

    def chunks(T, cu):
        with mock.patch.object(jax.lax, "scan", wraps=jax.lax.scan) as loop:
            jax.eval_shape(scan, jnp.ones((1, T, 2, 8)), cu)
        return loop.call_args.args[2].size // 7  # a work item per chunk

    for T in 64, 65, 640:
        assert chunks(T, jnp.array([[0, T // 2]])) == chunks(T, None) == -(-T // la.CHUNK)


# Segments and plans -------------------------------------------------------------------------------


@each_path
@parametrize("in_splits", [False, True], ids=["whole", "in-splits"])
@parametrize("packed, reverse", [(False, False), (True, True)], ids=["batch", "packed-reverse"])
def test_many_segments(path, packed, reverse, in_splits, monkeypatch):
    """Sequences of 3 segments, for heads that forget nothing, something and everything.

    A GPU that holds 9 or 10 programs cuts segments in 4 splits. A head may then need all splits,
    some splits, or the end of the last split.
    """
    LAUNCHED.clear()
    T, cu, g, programs = 380, [0, 300, 310, 370], [0.0, -0.01, -3.0], 12
    if in_splits:
        arch, _ = module_of(path)._gpu() or ("sm_90", 0)
        gpu = arch, 9 if path == "triton" else 5
        monkeypatch.setattr(module_of(path), "_gpu", lambda: gpu if path != "xla" else None)
        T, cu, programs = 760, [0, 5, 600, 750], 24
        g = [0.0, -0.2 if path == "gpu" else -1.0, -3.0 if reverse else -0.002]
    if path == "gpu":
        T, cu = (3200, [0, 20, 2520, 3150]) if in_splits else (1600, [0, 1350, 1360, 1560])
    operands = inputs(7, 1, T, 3, 3 if in_splits else 1, 16, 8, n=3 if packed else None)
    check_against_oracle(path, *operands, g=g, reverse=reverse, cu=cu if packed else None)
    if path in EMULATED:  # 3 heads, and 2 segments of 2 or 4 splits before the last segment
        passing = "_state_passing_kernel", 6 if packed else 3
        assert {("_chunk_state_kernel", programs), passing} < LAUNCHED


@each_path
def test_segments_with_states_of_several_tiles(path, monkeypatch):
    LAUNCHED.clear()
    monkeypatch.setattr(module_of(path), "SEGMENT", 160)
    check_against_oracle(path, *inputs(7, 1, 330, 2, 1, 136, 72), g=[0.0, -0.01])
    if path in EMULATED:  # 2 splits of a segment, 2 heads, 3 x 2 tiles or, for 16 bits, 2 x 2
        programs = 24 if path == "triton" else 16
        assert {("_chunk_state_kernel", programs), ("_state_passing_kernel", 40)} < LAUNCHED


@wants_triton
def test_states_that_nobody_reads_are_not_written():
    """Of a gradient's scans only dv's ends in a state, and only for an initial state's gradient."""
    x = jax.ShapeDtypeStruct((4, 200, 64, 64), "bfloat16")
    s0 = jax.ShapeDtypeStruct((4, 64, 64, 64), "float32")

    def written(f, *args):
        found = recorded_launches("sm_90", f, *args)
        scans = [a for kernel, _, a, _ in found if kernel.__name__ == "_hopper_kernel"]
        return [la._unpack_flags.fn(la._Params(*a["params"]).flags)[3] for a in scans]

    def f(x, s0, final):
        options = dict(initial_state=s0, output_final_state=final, backend="triton")
        return lightning_attn(x, x, x, 1, 2, **options)

    total = lambda x: x.astype(jnp.float32).sum()
    loss = lambda x, s0: total(f(x, s0, False)[0])
    # forward, dq, and both dv and dk
    assert written(jax.grad(loss), x, None) == [0, 0, 0]
    assert written(jax.grad(loss, (0, 1)), x, s0) == [0, 0, 1]
    assert written(jax.grad(lambda x: sum(map(total, f(x, None, True)))), x) == [1, 0, 0]


@wants_triton
@parametrize(
    "T, H, n, sharing",
    [
        *((T, 128, 1, True) for T in (1, 2, 16, 200)),  # a decode step, and both scan kernels
        *((64 * T, 16, 64, True) for T in (4, 16)),  # pools of one sequence per slot
        (4096, 2, 1, False),  # segments: several programs read a state
        (4096, 16, 8, False),
    ],
)
@parametrize("arch", ["sm_80", "sm_90"])
def test_final_states_take_the_memory_of_initial_states(arch, T, H, n, sharing):
    """Unless several segments read a state."""
    x = jax.ShapeDtypeStruct((1, T, H, 64), "bfloat16")
    s0 = jax.ShapeDtypeStruct((n, H, 64, 64), "float32")
    cu = jnp.arange(n + 1) * (T // n) if n > 1 else None
    f = lambda x, s0: lightning_attn(x, x, x, 1, 2, None, s0, cu_seqlens=cu, backend="triton")
    found = recorded_launches(arch, f, x, s0)
    shared = [kernel.__name__ for kernel, *_, options in found if options["in_place"]]
    scan = "_step_kernel" if T == 1 else "_chunk_scan_kernel"
    scan = "_hopper_kernel" if arch == "sm_90" and T // n > 32 else scan
    assert shared == ([scan] if sharing else ["_state_passing_kernel"])


@wants_triton
def test_a_scan_and_its_transpose_sum_the_same_states():
    """Where dv and dk are two scans, their states are equal launches: XLA makes one of them."""
    x = jax.ShapeDtypeStruct((1, 4096, 2, 64), "float32")
    s0 = jax.ShapeDtypeStruct((1, 2, 64, 64), "float32")

    def loss(q, k, v, s0):
        return lightning_attn(q, k, v, 1, 2, initial_state=s0, backend="triton")[0].sum()

    found = recorded_launches("sm_80", jax.grad(loss, (0, 1, 2, 3)), x, x, x, s0)
    states = [launch[1:] for launch in found if launch[0].__name__ == "_chunk_state_kernel"]
    (of_dv, *same), (of_dk, *again) = states[2:]
    assert len(states) == 4 and same == again
    assert all(a is b for a, b in zip(of_dv[:2], of_dk[:2]))  # keys and values


@wants_triton
@parametrize(
    "B, T, H, D",
    [
        *((1, 32768, 32, 128), (1, 131072, 8, 128), (4, 8192, 16, 64), (1, 4096, 16, 128)),
        *((2, 8192, 16, 96), (2, 8192, 16, 256), (1, 4096, 4, 512)),
    ],
)
def test_states_of_segments_take_little_memory(B, T, H, D):
    """At most a seventh of q, k, v and o. All these shapes have segments on an H100."""
    x = jax.ShapeDtypeStruct((B, T, H, D), "bfloat16")
    f = lambda q, k, v: lightning_attn(q, k, v, 12, 24, backend="triton")
    found = recorded_launches("sm_90", f, x, x, x)
    (z,) = (arrays[-1] for kernel, arrays, *_ in found if "chunk_state" in kernel.__name__)
    assert z.dtype == "float32" and 4 * z.size <= 4 * 2 * x.size / 7


@wants_triton
@parametrize(
    "dtype, H, T, n, forward, backward",
    [
        ("bfloat16", 2, 8192, 1, "_hopper_kernel 64 128", "_hopper_kernel 64 128 fused"),
        ("bfloat16", 2, 8192, 256, "_hopper_kernel 64 128", "_hopper_kernel 64 128 fused"),
        ("bfloat16", 2, 8192, 1024, "_chunk_scan_kernel 16 128", "_chunk_scan_kernel 16 128"),
        ("bfloat16", 100, 63, 1, "_chunk_scan_kernel 64 128", "_chunk_scan_kernel 64 128"),
        ("bfloat16", 2, 1023, 1, "_hopper_kernel 64 64", "_hopper_kernel 64 64"),
        ("bfloat16", 66, 2048, 1, "_hopper_kernel 64 64", "_hopper_kernel 64 128 fused"),
        ("bfloat16", 67, 2048, 1, "_hopper_kernel 64 128", "_hopper_kernel 64 128 fused"),
        *(
            ("bfloat16", H, T, 1, f"_hopper_kernel 64 {BV}", "_hopper_kernel 64 128 fused")
            for H, most in [(8, 4096), (24, 8192), (64, 21504)]
            for T, BV in [(most, 64), (most + 1, 128)]
        ),
        ("bfloat16", 8, 1023, 16, "_hopper_kernel 64 128", "_hopper_kernel 64 128 fused"),
        ("float32", 33, 512, 1, "_chunk_scan_kernel 32 32", "_chunk_scan_kernel 32 32"),
        ("float32", 34, 512, 1, "_chunk_scan_kernel 32 64", "_chunk_scan_kernel 32 64"),
        ("float32", 2, 1024, 1, "_chunk_scan_kernel 32 128", "_chunk_scan_kernel 32 128"),
    ],
)
def test_short_sequences_take_short_chunks_and_few_values(dtype, H, T, n, forward, backward):
    """The kernel, its tokens per chunk and its values per program, on an H100."""
    x = jax.ShapeDtypeStruct((1, T, H, 128), dtype)
    cu = jax.ShapeDtypeStruct((n + 1,), "int32")

    def call(x, cu):
        cu = cu if n > 1 else None
        return lightning_attn(x, x, x, 1, 4, cu_seqlens=cu, backend="triton")[0].sum()

    def scans(f):
        found = [(kernel.__name__, a) for kernel, _, a, _ in recorded_launches("sm_90", f, x, cu)]
        text = lambda name, a: f"{name} {a['C']} {a['BV']}" + " fused" * a.get("FUSED", False)
        return [text(name, a) for name, a in found if "scan" in name or "hopper" in name]

    assert scans(call) == [forward]
    both = [backward] if "fused" in backward else [backward] * 2
    assert scans(jax.grad(call)) == [forward, forward, *both]


@wants_triton
def test_precision_by_name():
    """Every precision counts as more than one pass of TF32, unless its name says otherwise."""
    x = jax.ShapeDtypeStruct((1, 70, 2, 16), "float32")
    f = lambda x: lightning_attn(x, x, x, 1, 4, backend="triton")
    names = {
        "tf32x3": "high highest float32 F32_F32_F32 TF32_TF32_F32_X3 BF16_BF16_F32_X3"
        " BF16_BF16_F32_X6 BF16_BF16_F32_X9 F64_F64_F64",
        "tf32": "default bfloat16 tensorfloat32 TF32_TF32_F32 BF16_BF16_F32 BF16_BF16_BF16"
        " F16_F16_F32 F16_F16_F16 ANY_F8_ANY_F8_F32",
    }
    pairs = [(precision, name) for precision, listed in names.items() for name in listed.split()]
    for precision, name in [*pairs, ("tf32", None)]:
        with jax.default_matmul_precision(name):
            ((_, _, arguments, _),) = recorded_launches("sm_80", f, x)
        assert arguments["PRECISION"] == precision, name


# JAX's transforms ---------------------------------------------------------------------------------

ALL_OPERANDS = (0, 1, 2, 3, 4)  # q, k, v, s0 and g


stacked = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)


@parametrize(
    "path, mapped, T",
    [
        *(param("xla", m, 70, id=f"xla-{m}") for m in ("q", "k", "v", "s0", "g")),
        # mapped operands are folded before a path is chosen: kernels see more rows and decays
        *(
            param(*path.values, mapped, T, marks=path.marks, id=f"{path.values[0]}-{mapped}-{T}")
            for path in PATHS
            for mapped, T in [("q k v s0 g", 70), ("q s0", "segments"), ("k v g", 1)]
            + [("q k v cu", "packed"), ("cu", "packed")]
        ),
    ],
)
def test_vmap(path, precise, mapped, T):
    """Also of gradients, which share what vmap does not map, such as the cotangent of a sum."""
    # an operand of one row that is not mapped is not copied: kernels then get a stride of 0
    N, rows, packed = 2, 2 if T == 70 else 1, T == "packed"
    T = {"packed": 70, "segments": 1100 if path == "gpu" else 200}.get(T, T)
    q, k, v, s0, do, ds = inputs(20, N * rows, T, 2, 1, 8, 8, n=2 * N if packed else None)
    fold = lambda x: x.reshape(N, -1, *x.shape[1:])
    g, cu = -jnp.arange(4.0).reshape(N, 2) / 9, jnp.array([[0, 10, 70], [0, 65, 66]])
    args = dict(q=fold(q), k=fold(k), v=fold(v), s0=fold(s0), g=g, cu=cu)
    is_mapped = [n in mapped.split() for n in args]
    axes = tuple(0 if m else None for m in is_mapped)
    args = [x if m else x[0] for m, x in zip(is_mapped, args.values())]

    def loss(q, k, v, s0, g, cu):
        packs = dict(cu_seqlens=cu) if packed else {}
        o, s = run_on(path, q, k, v, initial_state=s0, g_gamma=g, **packs)
        return (o * do[:rows]).sum() + (s * ds[: len(s)]).sum(), (o, s)

    argnums = ALL_OPERANDS[:4] if path in EMULATED else ALL_OPERANDS
    grad = jax.jit(jax.grad(loss, argnums, has_aux=True))
    want = [grad(*(x[i] if m else x for m, x in zip(is_mapped, args))) for i in range(N)]
    assert_close(jax.jit(jax.vmap(grad, axes))(*args), stacked(want))
    total = jax.jit(jax.grad(lambda *a: jax.vmap(loss, axes)(*a)[0].sum(), argnums))(*args)
    by_operand = zip(is_mapped, zip(*(gradients for gradients, _ in want)))
    assert_close(total, [jnp.stack(w) if m else sum(w) for m, w in by_operand])


@wants_triton
@parametrize("T", [1, 1100])
def test_vmap_copies_nothing_that_is_not_mapped(T):
    shapes = (4, 1, T, 2, 16), (1, T, 2, 16), (1, 2, 16, 16)
    q, x, s0 = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    f = lambda q, k, v, s0: lightning_attn(q, k, v, 3, 8, initial_state=s0, backend="triton")
    found = recorded_launches("sm_80", jax.vmap(f, (0, None, None, None)), q, x, x, s0)
    rows = {kernel.__name__: [x.shape[0] for x in arrays[:5]] for kernel, arrays, *_ in found}
    scan = "_step_kernel" if T == 1 else "_chunk_scan_kernel"
    assert rows[scan] == [1, 4, 1, 1, 1], rows  # s0, q, k, v, g
    assert T == 1 or rows["_chunk_state_kernel"][:3] == [1, 1, 1], rows


@each_path
@parametrize("what", ["final-state", "no-final-state"])
@parametrize("cu", [None, [0, 30, 30, 70]], ids=["batch", "packed"])
def test_gradients_of_one_result(path, precise, what, cu):
    """The other result has no cotangent, which is not the same as zeros, or is not asked for."""
    q, k, v, s0, do, ds = inputs(28, 1, 70, 2, 1, 8, 8, n=cu and 3)
    final = dict(output_final_state=False) if what == "no-final-state" else {}

    def gradients(f, **final):
        def loss(q, k, v, s0, g):
            o, s = f(q, k, v, initial_state=s0, g_gamma=g, cu_seqlens=int32(cu), **final)
            assert (s is None) == bool(final)
            return (s * ds).sum() if what == "final-state" else (o * do).sum()

        return jax.jit(jax.value_and_grad(loss, ALL_OPERANDS))(q, k, v, s0, jnp.array([-0.3, 0]))

    got = gradients(functools.partial(run_on, path), **final)
    assert_close(got, gradients(lightning_attn_reference))
    if final and cu is None:  # a decode step
        token = [x[:, :1] for x in (q, k, v)]
        step = lambda **final: run_on(path, *token, 1, 2, initial_state=s0, **final)[0]
        assert_close(step(**final), step(), 1e-6)


@each_path
@parametrize("Hk", [1, 2])
def test_second_derivatives(path, precise, Hk):
    q, k, v, s0, do, ds = inputs(23, 1, 5, 4, Hk, 3, 2)
    at = q, k, v, s0, jnp.array([-0.1, -0.7, 0, -0.3])
    along = (*inputs(29, 1, 5, 4, Hk, 3, 2)[:4], jnp.array([0.3, -1.2, -0.5, 0.7]))
    dot = lambda xs, ys: sum(jnp.vdot(x, y) for x, y in zip(xs, ys))

    def second(f):
        loss = lambda q, k, v, s0, g: dot(f(q, k, v, initial_state=s0, g_gamma=g), (do, ds))
        first = jax.grad(loss, ALL_OPERANDS)
        return jax.jit(jax.grad(lambda *x: dot(first(*x), along), ALL_OPERANDS))(*at)

    assert_close(second(functools.partial(run_on, path)), second(lightning_attn_reference), 1e-4)


def exported_and_back(f, *args):
    """What f(*args) returns after an export. jax.export must be told that kernels are allowed."""
    pytest.importorskip("flatbuffers")
    kernels = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")
    exported = jax.export.export(jax.jit(f), disabled_checks=[kernels])(*args)
    return jax.export.deserialize(exported.serialize()).call(*args)


@parametrize(
    "rows, tokens, boundaries",
    [("b", 70, 0), ("b", "t", 0), (1, "t", 4), (1, 150, "m"), (1, "t", "m")],
)
def test_export_of_symbolic_shapes(rows, tokens, boundaries, precise):
    """Calls of symbolic sizes are exported once, with gradients, for all sizes."""
    known = ["m >= 2"] if boundaries == "m" else []

    def export(f, constraints):
        scope = jax.export.SymbolicScope(constraints)
        size = lambda x: jax.export.symbolic_shape(str(x), scope=scope)[0]
        q = jax.ShapeDtypeStruct((size(rows), size(tokens), 2, 8), jnp.float32)
        cu = jax.ShapeDtypeStruct((size(boundaries),), jnp.int32) if boundaries else None
        return jax.export.export(jax.jit(f))(q, cu)

    f = lambda x, cu, backend="xla": lightning_attn(x, x, x, 1, 2, cu_seqlens=cu, backend=backend)
    gradient = jax.grad(lambda x, cu: sum((y**2).sum() for y in f(x, cu)))
    rng, B = np.random.default_rng(0), 1 if rows == 1 else 3
    cuts = [[0, 70, 70, 140], [0, 1, 90, 150] if boundaries == 4 else [0, 9, 10, 80, 150]]
    for call in f, gradient:
        exported = export(call, known)
        for T, cut in zip([1300, 3] if tokens == "t" else [tokens] * 2, cuts):
            x = jnp.asarray(rng.standard_normal((B, T, 2, 8)), "float32")
            cu = jnp.minimum(jnp.array(cut) * max(1, T // 150), T) if boundaries else None
            assert_close(exported.call(x, cu), call(x, cu))
    refused = lambda words: pytest.raises(ValueError, match=words)
    if HAS_TRITON:
        with refused('backend: expected "xla" for symbolic shapes'):
            export(lambda x, cu: f(x, cu, None), known)
    if tokens == "t" and boundaries:  # boundaries that are known, in tokens that may be fewer
        assert_close(export(lambda x, cu: f(x, [0, 2]), known).call(x, cu), f(x, [0, 2]))
    if boundaries == "m":  # JAX asks whether these are two boundaries or more
        with pytest.raises(jax.errors.InconclusiveDimensionOperation, match="'m' .* '2'"):
            export(f, [])
    with refused("query: expected num_heads and head dims that are numbers"):
        heads = jax.ShapeDtypeStruct(jax.export.symbolic_shape("1, 70, h, 8"), jnp.float32)
        jax.eval_shape(lambda x: f(x, None), heads)


def test_nothing_is_fetched_while_tracing(monkeypatch):
    """A deleted array stands for values on a device: reading a deleted array is an error."""
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
    monkeypatch.setattr(type(g), "is_fully_addressable", False)  # some of it lies on other hosts
    assert la._known(jnp.array([-0.1, 0.2])) is None


# Ways of calling ----------------------------------------------------------------------------------
#
# On GPUs every way of calling meets every kind of launch, on as many devices as there are. On a CPU
# most do: plain JAX computes the results, but the launches are traced as well, so that errors of
# types, effects or partitioning show.

# The smallest sizes that make each kind of launch.
KINDS = {
    "one-segment": dict(T=72),
    "segments": dict(T=1024),
    "blocks-of-keys": dict(T=72, K=136),
    "decode": dict(T=1),
    "two-gradients-at-once": dict(T=72, K=64, V=64, dtype="bfloat16"),
    "pack": dict(B=1, T=1100, cu=[0, 20, 20, 1090], state=False),
    "pack-with-states": dict(B=1, T=1100, cu=[0, 20, 20, 1090]),
}
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
DEVICES_USED = min(8, len(jax.devices()))
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(compiled):
    """(operation, elements of its largest result) of every collective in compiled HLO."""

    def size(shapes):
        dims = [dims.split(",") for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        return max(math.prod(int(n) for n in numbers if n) for numbers in dims)

    return [(op, size(shapes)) for shapes, op in COLLECTIVE.findall(compiled.as_text())]


def assert_sends_only_sums(compiled, elements):
    """The gradients of decays, the loss and the like are summed. Nothing larger moves."""
    found = collectives(compiled)
    assert all(op == "all-reduce" and size <= elements for op, size in found), found


@dataclasses.dataclass
class Case:
    """Arguments of a call, weights of its results in a loss, and arguments with gradients."""

    args: dict
    weights: tuple
    cu: Any
    learned: list

    def call(self, seq_axis=None, **args):
        options = dict(initial_state=args.get("s0"), g_gamma=args["g"], seq_axis=seq_axis)
        return lightning_attn(args["q"], args["k"], args["v"], cu_seqlens=int32(self.cu), **options)

    def step(self, call):
        """A function of the arguments that returns (results, gradients)."""

        def step(args):
            def loss(learned):
                results = call(**args | learned)
                weighted = (x * w for x, w in zip(results, self.weights))
                return sum(x.astype(jnp.float32).sum() for x in weighted), results

            learned = {name: args[name] for name in self.learned}
            return jax.grad(loss, has_aux=True)(learned)[::-1]

        return step

    def specs(self, rows, heads):
        """How mesh axes split rows and heads: of the arguments, and of the results."""
        rows = rows if self.cu is None else None
        token, state = P(rows, None, heads), P(rows, heads)
        special = {"g": P(heads), "s0": state}
        return {name: special.get(name, token) for name in self.args}, (token, state)


@functools.cache
def case(kind):
    """The case of a kind, with its results and gradients."""
    shape = dict(B=8, H=8, Hk=8, K=16, V=16, cu=None, state=True, dtype="float32") | KINDS[kind]
    cu, state, dtype = shape.pop("cu"), shape.pop("state"), shape.pop("dtype")
    q, k, v, s0, do, ds = inputs(50, **shape, dtype=dtype, n=cu and len(cu) - 1)
    args = dict(q=q, k=k, v=v, g=-0.05 * jnp.arange(8.0)) | ({"s0": s0} if state else {})
    # The gradient of g is plain JAX, the same for all launches. These kinds stand for all.
    with_dg = kind in ("one-segment", "decode", "pack-with-states")
    made = Case(args, (do, ds), cu, [name for name in args if name != "g" or with_dg])
    with jax.default_matmul_precision("highest"):
        return made, jax.jit(made.step(made.call))(args)


def mesh_of(kind, **axes):
    sizes = tuple(axes.values())
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, tuple(axes), axis_types=(kind,) * len(axes), devices=devices)


def put(mesh, specs, arrays):
    """The arrays on the devices of a mesh, split by their specs."""
    return [jax.device_put(x, NamedSharding(mesh, s)) for s, x in zip(specs, arrays, strict=True)]


def put_args(mesh, specs, args):
    return dict(zip(args, put(mesh, [specs[name] for name in args], args.values())))


@contextlib.contextmanager
def strict():
    """What a caller forbids in their own code is allowed in lightning_attn's."""
    promotion = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with promotion[0], promotion[1], jax.auto_pcast(False):
        yield


twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
second_of = lambda tree: jax.tree.map(lambda x: x[1], tree)


def donated(case):
    """A jit that may write to the arguments."""
    copies = jax.tree.map(jnp.copy, case.args)
    return jax.jit(case.step(case.call), donate_argnums=0)(copies)


def by_scan(case):
    """The second of two steps of a scan."""
    step = case.step(case.call)
    loop = jax.jit(lambda args: jax.lax.scan(lambda carry, x: (carry, step(x)), 0, args)[1])
    return second_of(loop(twice(case.args)))


def by_layers(case):
    """A loss over a scan of two layers with remat. The second layer has the case's arguments."""

    def call(**args):
        def layer(carry, i):
            return carry, case.call(**args | {"q": args["q"] * i})

        layers = jnp.arange(2).astype(args["q"].dtype)
        return second_of(jax.lax.scan(jax.checkpoint(layer), 0, layers)[1])

    return jax.jit(case.step(call))(case.args)


def eagerly(case):
    return case.step(case.call)(case.args)


def within(context, way):
    """A way of calling in a context of JAX."""

    def inside(case):
        with context():
            return way(case)

    return inside


def by_vmap(kind=None, mapped=None, rows=None):
    """A vmap of two copies. If `kind` is given, devices split the mapped axis or the rows."""

    def way(case):
        step, args = jax.jit(jax.vmap(case.step(case.call))), twice(case.args)
        if kind:
            axis = mapped or rows
            specs = case.specs(rows, None)[0]
            specs = {name: P(mapped, *spec) for name, spec in specs.items()}
            mesh = mesh_of(kind, **{axis: min(2, DEVICES_USED) if mapped else DEVICES_USED})
            args = put_args(mesh, specs, args)
        compiled = step.lower(args).compile()
        if kind and not HAS_GPU:
            assert_sends_only_sums(compiled, 16)
            if case.cu is None or mapped:
                spec = compiled(args)[0][0].sharding.spec
                assert spec[: 1 + bool(rows)] == (mapped, rows)[: 1 + bool(rows)], spec
        return second_of(jax.device_get(compiled(args)))

    return way


def by_jit(kind, is_set, rows=None, heads=None):
    """A jit whose arguments are split over rows, heads or both. `is_set`: the mesh is set."""

    def way(case):
        names = [axis for axis in (rows, heads) if axis]
        second = min(2, DEVICES_USED)
        sizes = [DEVICES_USED // (second if len(names) > 1 else 1), second]
        mesh = mesh_of(kind, **dict(zip(names, sizes)))
        specs, out = case.specs(rows, heads)
        args = put_args(mesh, specs, case.args)
        with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
            compiled = jax.jit(case.step(case.call)).lower(args).compile()
            results, gradients = compiled(args)
        if not HAS_GPU:
            assert_sends_only_sums(compiled, 8)
            pairs = [*zip(results, out), *((x, specs[name]) for name, x in gradients.items())]
            for x, spec in pairs:
                assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), x.sharding
        return results, gradients

    return way


def by_shard_map(rows=None, heads=None, tokens=None, others=None, kind=AUTO, check=True, second=2):
    """Manual over one axis. `others`: the axis, of size `second`, that is left to the compiler."""

    def way(case):
        if tokens and (case.cu is not None or case.args["q"].shape[1] % DEVICES_USED):
            pytest.skip("these tokens cannot be split over the devices")
        axis = rows or heads or tokens
        # XLA cannot sum over a manual axis of one device beside others
        left = second if others and DEVICES_USED > 2 else 1
        axes = {axis: DEVICES_USED // left} | ({others: left} if others else {})
        mesh = mesh_of(kind, **axes)
        specs, results = case.specs(rows, heads)
        if tokens:
            specs |= {name: P(None, axis) for name in "qkv"}
            results = P(None, axis), P()
        part = jax.shard_map(
            lambda args: case.call(**args, seq_axis=tokens),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=results,
            check_vma=check,
            axis_names={axis},
        )
        part = jax.jit(part) if check else part  # rules then run when the call is over
        args = case.args
        if others:  # the compiler splits heads, or rows
            more, _ = case.specs(None if rows else others, others if rows else None)
            both = lambda a, b: P(*(x or y for x, y in itertools.zip_longest(a, b)))
            args = put_args(mesh, {name: both(specs[name], more[name]) for name in specs}, args)
        with jax.set_mesh(mesh):
            lowered = jax.jit(case.step(lambda **args: part(args))).lower(args)
            compiled = lowered.compile()
            out = compiled(args)
        # the sharding rule is for devices that are left to the compiler
        assert ("CustomSPMDPartitioning" in lowered.as_text()) == (left > 1)
        if check and not HAS_GPU and not others:
            gathered = [size for op, size in collectives(compiled) if op == "all-gather"]
            # states are gathered once in each direction; the gradient of g is summed
            states = [DEVICES_USED * case.args["s0"].size] * 2 if tokens else []
            assert sorted(gathered) == states, gathered
        return out

    return way


without_shardy = lambda: setting("jax_use_shardy_partitioner", False)
ONE_DEVICE = {
    "eager": eagerly,
    "vmap": by_vmap(),
    "remat-of-layers": by_layers,
    "export": lambda case: exported_and_back(case.step(case.call), case.args),
    "scan": by_scan,
    "donated": donated,
    "debug-nans": within(lambda: jax.debug_nans(True), donated),
}
WAYS = ONE_DEVICE | {
    "vmap-rows": by_vmap(AUTO, rows="a"),
    "vmap-explicit-rows": by_vmap(EXPLICIT, rows="a"),
    "vmap-mapped-axis": by_vmap(AUTO, mapped="a"),
    "vmap-explicit-mapped-axis": by_vmap(EXPLICIT, mapped="a"),
    "jit-rows": by_jit(AUTO, False, rows="a"),
    "jit-rows-leaks": within(jax.checking_leaks, by_jit(AUTO, False, rows="a")),
    "jit-rows-without-shardy": within(without_shardy, by_jit(AUTO, False, rows="a")),
    "jit-heads": by_jit(AUTO, True, heads="a"),
    "jit-both": by_jit(AUTO, False, "a", "b"),
    "jit-explicit-rows": by_jit(EXPLICIT, False, rows="a"),
    "jit-explicit-heads-set-mesh": by_jit(EXPLICIT, True, heads="a"),
    "jit-explicit-both": by_jit(EXPLICIT, False, "a", "b"),
    "shard_map-rows": by_shard_map(rows="a"),
    "shard_map-heads-unchecked": by_shard_map(heads="a", check=False),
    "shard_map-tokens": by_shard_map(tokens="a"),
    "shard_map-tokens-unchecked": by_shard_map(tokens="a", check=False),
    "shard_map-rows-of-auto": by_shard_map(rows="a", others="b"),
    "shard_map-rows-of-one": by_shard_map(rows="a", others="b", second=1),
    "shard_map-heads-of-explicit": by_shard_map(heads="a", others="b", kind=EXPLICIT),
    "shard_map-tokens-of-auto-unchecked": by_shard_map(tokens="a", others="b", check=False),
    "shard_map-tokens-of-explicit": by_shard_map(tokens="a", others="b", kind=EXPLICIT),
}


def on_cpus(way, kind):
    """Whether a CPU runs the case. Other cases cover the rest there: a jit over rows and heads, and
    for eager calls the jits that a call is made of."""
    if way == "eager":
        return kind in ("decode", "pack")
    if way in ("donated", "debug-nans") or way.startswith("jit-rows-"):
        return kind == "one-segment"
    return way not in ("jit-rows", "jit-explicit-rows")


@parametrize(
    "way, kind",
    [
        param(way, kind, id=f"{way}-{kind}", marks=() if way in ONE_DEVICE else on_devices)
        for kind, way in itertools.product(KINDS, WAYS)
        if HAS_GPU or on_cpus(way, kind)
    ],
)
def test_ways_of_calling(way, kind, precise, monkeypatch):
    monkeypatch.setattr(la, "GROUP", 128)
    made, (results, gradients) = case(kind)
    # without casts JAX cannot transpose the selects of decays that vary
    with strict(), jax.auto_pcast(way == "shard_map-heads-of-explicit"):
        got_results, got_gradients = WAYS[way](made)
    bar = 2e-2 if made.args["q"].dtype == jnp.bfloat16 else 2e-5

    def check(got, want, name):
        assert max(errors(got.astype(jnp.float32), want.astype(jnp.float32), name)) < bar, name

    for name, got, want in zip(NAMES[:2], got_results, results, strict=True):
        check(got, want, name)
    for name, want in gradients.items():
        got = got_gradients[name]
        assert got.dtype == want.dtype and got.shape == want.shape
        if name == "g":
            assert error(got, want) < 5 * bar
        else:
            check(got, want, "state" if name == "s0" else name)


@parametrize("packed", [False, True], ids=["batch", "packed"])
def test_strict_promotion(packed):
    """What `test_ways_of_calling` leaves out."""
    q, k = jnp.ones((1, 80, 4, 8), "bfloat16"), jnp.ones((1, 80, 2, 8), "bfloat16")
    s0, layer = jnp.ones((2 if packed else 1, 4, 8, 8), "float16"), jnp.int32(1)
    pack = dict(cu_seqlens=jnp.array([0, 30, 60])) if packed else {}
    options = pack | dict(initial_state=s0)

    def loss(q, g):
        o, s = lightning_attn(q, k, k, g_gamma=g, **options)
        return o.astype(jnp.float32).sum() + s.sum()

    with strict():
        gradient = lambda q, g: jax.grad(loss)(q, g).astype(jnp.float32).sum()
        jax.eval_shape(jax.grad(gradient, (0, 1)), q, -jnp.ones(4))
        scaled = lambda i, n, scale: lightning_attn(q, k, k, i, n, scale, **options)
        jax.eval_shape(scaled, layer, layer, jnp.float32(1))
        jax.eval_shape(lambda q: lightning_attn_reference(q, k, k, 1, 4, **options), q)
        of_axis = dict(mesh=mesh_of(AUTO, a=1), in_specs=P("a"), out_specs=P("a"))
        decays = jax.shard_map(lambda i: lightning_g_gamma(4, i.reshape(()), 4), **of_axis)
        jax.eval_shape(decays, layer[None])


# Many devices -------------------------------------------------------------------------------------

if HAS_GPU or len(jax.devices()) < 8:

    def test_on_8_devices():
        """Runs the cases of several devices on 8 virtual CPU devices, in a script."""
        env = {n: x for n, x in os.environ.items() if not n.startswith("PYTEST_") and n != SCRIPT}
        command = [sys.executable, __file__, "--devices"]
        env |= {"JAX_PLATFORMS": "cpu"}
        ran = subprocess.run(command, capture_output=True, text=True, env=env)
        assert ran.returncode == 0 and DEVICES not in ran.stdout, ran.stdout + ran.stderr


each_axis_type = parametrize("kind", [AUTO, EXPLICIT], ids=lambda kind: kind.name)
each_check = parametrize("check", [True, False], ids=["checked", "unchecked"])


def of_layer_1(q, k, v, *state, **kwargs):
    state = dict(initial_state=state[0]) if state else {}
    return lightning_attn(q, k, v, 1, 4, **state, **kwargs)


@parametrize("rows", [1, 2])
@parametrize("parts, minor", [(2, 1), (3, 1), (4, 1), (6, 1), (8, 1), (6, 3), (8, 2)])
def test_devices_have_the_heads_that_they_read(rows, parts, minor):
    """Whatever the heads are, and where the heads are split over two axes of a mesh, of which the
    minor axis has the larger steps."""
    row, place = np.divmod(np.arange(rows * parts), parts)
    wanted = np.stack([row, place % minor * (parts // minor) + place // minor], -1)
    pairs = [(H, Hk) for H in range(1, 25) for Hk in range(1, H + 1) if H % Hk == 0]
    for H, Hk in pairs:
        axes, heads, shared = la._device_axes(wanted, H, Hk)
        sizes, steps = zip(*axes)
        index = np.indices(sizes).reshape(len(sizes), -1).T
        row, part, shared_part = (index @ np.array(steps)).T
        assert (row == wanted[:, 0]).all() and H % heads == Hk % shared == 0
        if H % parts == 0:
            assert (part == wanted[:, 1]).all() and heads == H // parts
        first = part * heads
        read = (first[:, None] + np.arange(heads)) // (H // Hk) - shared_part[:, None] * shared
        assert (0 <= read).all() and (read < shared).all(), (H, Hk, axes)


@parametrize(
    "sizes, H, Hk, what, kind",
    [
        param(sizes, H, Hk, what, kind, marks=wants_devices(math.prod(sizes)), id=id)
        for sizes, what, kind, heads in [  # sizes of a mesh (tensor,) or (batch, tensor)
            ((4,), "batch", AUTO, [(8, 2), (12, 6), (12, 3), (6, 6), (3, 1)]),
            ((6,), "batch", AUTO, [(12, 3)]),
            ((2, 4), "batch", AUTO, [(12, 3)]),
            ((2, 3), "over-both-axes", AUTO, [(12, 6)]),
            ((2, 4), "over-both-axes", AUTO, [(12, 6)]),
            ((4,), "decode", AUTO, [(8, 2)]),
            ((4,), "packed", AUTO, [(12, 6)]),
            ((4,), "batch", EXPLICIT, [(12, 6), (12, 3)]),
            ((2,), "batch", EXPLICIT, [(16, 4), (6, 3)]),
            ((2, 4), "packed", EXPLICIT, [(16, 4)]),
            ((2, 4), "rest-of-shard_map", AUTO, [(12, 3)]),
        ]
        for H, Hk in heads
        for id in [f"{'x'.join(map(str, sizes))}-{H}-{Hk}-{what}-{kind.name}"]
    ],
)
def test_heads_from_projections(sizes, H, Hk, what, kind, precise):
    """Columns of projections are split over devices. Heads that fit the devices stay in place."""
    T, D, M = {"decode": 1, "packed": 60}.get(what, 40), 24, 16
    B, n, cu = (1, 3, [0, 20, 20, 50]) if what == "packed" else (2, 2, None)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.standard_normal(shape))
    args = draw(B, T, M), *(draw(M, heads * D) / 4 for heads in (H, Hk, Hk)), draw(n, H, D, D)

    def f(x, wq, wk, wv, s0):
        q, k, v = ((x @ w).reshape(len(x), T, -1, D) for w in (wq, wk, wv))
        return of_layer_1(q, k, v, s0, cu_seqlens=int32(cu))

    both = lambda *args: (f(*args), jax.grad(sum_of_squares(f), (0, 1, 2, 3, 4))(*args))
    axes, want = list(zip(("d", "t")[-len(sizes) :], sizes)), jax.jit(both)(*args)
    in_shard_map = what == "rest-of-shard_map"
    mesh = mesh_of(kind, **dict(reversed(axes) if in_shard_map else axes))
    if in_shard_map:  # whose devices do not follow one another
        specs, whole = (P("d"), P(), P(), P(), P("d")), f
        f = jax.shard_map(whole, mesh=mesh, in_specs=specs, out_specs=P("d"), axis_names={"d"})
    over = ("d", "t") if what == "over-both-axes" else "t"
    rows = "d" if len(sizes) > 1 and cu is None and over == "t" else None
    parts = sizes[-1] if over == "t" else math.prod(sizes)
    fits, kv_fits = H % parts == 0, Hk % parts == 0
    of_kv = P(None, over if kind == AUTO or kv_fits else None)  # Explicit axes split whole heads
    of_s = P(rows, over if fits else None)
    on_mesh = put(mesh, (P(rows), P(None, over), of_kv, of_kv, of_s), args)
    with contextlib.nullcontext() if kind == AUTO else jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(*on_mesh).compile()
        assert_close(compiled(*on_mesh), want, 1e-5)
    if fits and not HAS_GPU:
        # at most all key heads are sent or, where a device has parts of groups, all heads
        own, group = H // parts, H // Hk
        heads = Hk if own % group == 0 or group % own == 0 else H
        most = 0 if kv_fits else B // (sizes[0] if rows else 1) * T * heads * D
        assert all(size <= most or op == "all-reduce" for op, size in collectives(compiled)), most


@parametrize(
    "kind, sizes, spec",
    [
        param(*case, marks=wants_8_cpus, id=id)
        for id, *case in [
            ("rows-over-two-axes", AUTO, (4, 2), P(("a", "b"))),
            ("rows-and-tokens", AUTO, (2, 4), P("a", "b")),
            ("rows-and-head-dims", AUTO, (2, 4), P("a", None, None, "b")),
            ("explicit-rows-and-tokens", EXPLICIT, (2, 4), P("a", "b")),
            ("rows-of-queries-heads-of-keys", AUTO, (8,), P("a")),
            ("explicit-rows-of-queries-heads-of-keys", EXPLICIT, (8,), P("a")),
            # JAX's transposes of some indexing forget the names of such axes
            ("explicit-axes-of-size-1", EXPLICIT, (1, 2, 1), P("a", None, "c")),
            ("numpy", AUTO, (4, 2), None),
            ("explicit-numpy", EXPLICIT, (4, 2), None),
        ]
    ],
)
def test_sharded_by_jit(precise, kind, sizes, spec):
    """The sharding rule lies outside of the choice of platform, so these results hold for GPUs."""
    mesh = mesh_of(kind, **dict(zip("abc", sizes)))
    for launch in ("one-segment", "pack-with-states") if 1 in sizes else ("one-segment",):
        made, want = case(launch)
        step = jax.jit(made.step(made.call))
        with jax.set_mesh(mesh):
            if spec is None:  # arguments that are not committed, and constants
                args = jax.tree.map(np.asarray, made.args)
                assert_close(jax.jit(lambda: step(args))(), want, 1e-5)
            else:
                of_keys = P(None, None, "a") if len(sizes) == 1 else spec
                state = P(spec[0] if made.cu is None else None, *spec[2:3])
                specs = dict(q=spec, k=of_keys, v=of_keys, s0=state, g=P())
                args = put_args(mesh, specs, made.args)
            got = step(args)
        assert_close(got, want)
        if 1 in sizes:
            assert [got[1][name].sharding.spec[2] for name in "qkv"] == [spec[2]] * 3


@wants_devices(4)
@each_check
@parametrize("what", ["state-made-inside", "constants", "split-over-one-of-two"])
def test_seq_axis_of_operands_that_are_the_same_on_all_devices(precise, check, what):
    """The state is made inside, or all tokens are. Or two devices have the same tokens."""
    q, k, v, s0, *_ = inputs(36, 2, 64, 4, 2, 8, 8)
    twice_seen, own_state = what == "split-over-one-of-two", what == "state-made-inside"
    rows, axes = (None, ("d", "t")) if twice_seen else ("d", "t")

    def whole(q, k, v, s):  # the tokens as the devices see them together
        parts = {"constants": [slice(None)] * 2, "state-made-inside": [slice(None)]}
        parts = parts.get(what, [slice(32)] * 2 + [slice(32, None)] * 2)
        q, k, v = (jnp.concatenate([x[:, part] for part in parts], 1) for x in (q, k, v))
        return of_layer_1(q, k, v, jnp.zeros_like(s0) if own_state else jnp.repeat(s, 2, 0))

    def part(q, k, v, s):
        if what == "constants":
            q = k = v = jnp.ones((1, 64, 4, 8))
        s = jnp.zeros((1, 4, 8, 8)) if own_state else jnp.repeat(s, 2, 0) if twice_seen else s
        return of_layer_1(q, k, v, s, seq_axis=axes)

    if what == "constants":
        q = k = v = jnp.ones((2, 64, 4, 8))
    own = P(rows, {"constants": None, "state-made-inside": "t"}.get(what, "d"))
    specs = dict(in_specs=(own, own, own, P()), out_specs=(P(rows, axes), P(rows)))
    part = jax.shard_map(part, mesh=mesh_of(AUTO, d=2, t=2), check_vma=check, **specs)
    args = q, k, v, s0[:1]
    assert_close(jax.jit(part)(*args), whole(*args), 1e-5)
    learned = {"constants": (3,), "state-made-inside": QKV}.get(what, (0, 1, 2, 3))
    assert_close(gradients_of(part, learned)(*args), gradients_of(whole, learned)(*args), 1e-5)


@wants_devices(4)
def test_seq_axis_beside_an_axis_of_decays_and_states(precise):
    """Devices along an axis have decays or states of their own, and share queries."""
    q, k, v, s0, *_ = inputs(36, 2, 64, 4, 2, 8, 8)
    g, tokens = -0.05 * jnp.arange(8.0).reshape(2, 4), P(None, "t")
    call = lambda q, k, v, s, g, **kw: lightning_attn(
        q, k, v, initial_state=s[0], g_gamma=g[0], **kw
    )
    states = jnp.stack([s0, 2 * s0])
    for own_g, own_s in ("e", None), (None, "e"):
        args = q, k, v, states if own_s else states[:1], g if own_g else g[:1]
        specs = tokens, tokens, tokens, P(own_s), P(own_g)
        part = lambda *x: jax.tree.map(lambda y: y[None], call(*x, seq_axis="t"))
        out = P("e", None, "t"), P("e")
        part = jax.shard_map(part, mesh=mesh_of(AUTO, e=2, t=2), in_specs=specs, out_specs=out)
        row = lambda i, *x: call(*x[:3], x[3][i * bool(own_s) :], x[4][i * bool(own_g) :])
        whole = lambda *x: stacked([row(i, *x) for i in range(2)])
        assert_close(jax.jit(part)(*args), whole(*args), 1e-5)
        got, want = (gradients_of(f, ALL_OPERANDS)(*args) for f in (part, whole))
        assert_close(got, want, 1e-5)


@wants_devices(4)
@each_check
@parametrize("path, reverse", [("xla", False), ("kernels", True)])
def test_seq_axis_of_two_axes_beside_heads(precise, path, reverse, check):
    if path == "kernels":
        path = "gpu" if HAS_GPU else "triton" if HAS_TRITON else pytest.skip("no Triton")
    # 161 tokens are splits of 96 and 65, and the last chunk has one token: at g = -3 the chunk
    # before it still weighs 5 %
    axes = ("a", "b") if len(jax.devices()) >= 8 else ("a",)
    B, T = (2, 32) if path == "xla" else (1, 161)  # of a device
    q, k, v, s0, *_ = inputs(37, B, T * 2 ** len(axes), 4, 2, 8, 8)
    g, tokens, state = -1.0 * jnp.arange(4), P(None, axes, "h"), P(None, "h")
    whole = lambda q, k, v, s, g, **kw: run_on(
        path, q, k, v, initial_state=s, g_gamma=g, reverse=reverse, **kw
    )
    part = functools.partial(whole, seq_axis=axes)
    output = lambda *args: part(*args, output_final_state=False)[0]
    mesh = mesh_of(AUTO, **dict.fromkeys(axes, 2), h=2)
    specs = dict(mesh=mesh, in_specs=(tokens, tokens, tokens, state, P("h")), check_vma=check)
    gradients = lambda f: gradients_of(f, ALL_OPERANDS)(q, k, v, s0, g)
    both = jax.shard_map(part, out_specs=(tokens, state), **specs)
    assert_close(jax.jit(both)(q, k, v, s0, g), whole(q, k, v, s0, g), 1e-5)
    assert_close(gradients(both), gradients(whole), 1e-5)
    if path == "xla":
        of_output = gradients(jax.shard_map(output, out_specs=tokens, **specs))
        assert_close(of_output, gradients(lambda *args: whole(*args)[0]), 1e-5)


@wants_8_cpus
def test_states_of_2_31_tokens_before_a_device():
    """The number of tokens before a device is past int32, and decays must not wrap."""
    mesh, own, g = mesh_of(AUTO, t=8), jnp.ones((1, 1, 2, 1, 1)), jnp.array([[0.0, -1e-9]])
    op = la._Op(1.0, False, "xla", None)
    before = lambda own: la._states_around(op, ("t",), 2**30, own, g, None)[1]
    states = jax.shard_map(before, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    want = np.exp(np.array([0.0, -1e-9])[:, None] * 2**30 * np.arange(8)).sum(1)
    assert error(states(own)[0, 0, :, 0, 0], want) < 1e-5


@wants_8_cpus
def test_everything_inside_shard_map(precise):
    """vmap, second derivatives of layers with remat, and packs per device."""
    mesh = mesh_of(AUTO, b=2, h=2, t=2)
    g, rng = -0.05 * jnp.arange(4), np.random.default_rng(34)
    draw = lambda *shape: [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3)]
    gradient = lambda f: jax.grad(sum_of_squares(f), (0, 1, 2, 3))
    whole = lambda q, k, v, g, **kw: lightning_attn(q, k, v, g_gamma=g, **kw)
    tokens, state, rows = P("b", "t", "h"), P("b", "h"), P("b", None, "h")

    def split(f, qkv, *more, out, **kw):
        specs = dict(in_specs=(qkv, qkv, qkv, P("h"), *more), out_specs=out)
        return jax.shard_map(functools.partial(f, **kw), mesh=mesh, **specs)

    def check(got, want, *args):
        assert_close(jax.jit(got)(*args), jax.jit(want)(*args), 1e-5)

    many = lambda q, k, v, g, **kw: jax.vmap(lambda *qkv: whole(*qkv, g, **kw))(q, k, v)
    mapped = [P(None, *spec) for spec in (tokens, state)]
    inside = split(many, mapped[0], out=tuple(mapped), seq_axis="t")
    check(gradient(inside), gradient(many), *draw(3, 4, 32, 4, 8), g)

    def layers(q, k, v, g, **kw):
        def layer(x, i):
            return x + whole(x, k, v, g * (1 - i / 3), **kw)[0], None

        return jax.lax.scan(jax.checkpoint(layer), q, jnp.arange(2.0))[0]

    inside = split(layers, tokens, out=tokens, seq_axis="t")
    check(gradient(gradient(inside)), gradient(gradient(layers)), *draw(2, 32, 4, 8), g)

    cu, qkv = jnp.array([[0, 10, 70], [0, 64, 66]]), draw(2, 70, 4, 8)
    want = [whole(*(x[i : i + 1] for x in qkv), g, cu_seqlens=cu[i]) for i in range(2)]
    want = jax.tree.map(lambda *x: jnp.concatenate(x), *want)
    for op in lightning_attn, lightning_attn_reference:
        pack = lambda q, k, v, g, cu, op=op: op(q, k, v, g_gamma=g, cu_seqlens=cu[0])
        packs = split(pack, rows, P("b"), out=(rows, state))
        for call in packs, jax.jit(packs):
            assert_close(call(*qkv, g, cu), want, 1e-5)


@wants_8_cpus
@parametrize("spec", [P("a"), P(None, None, "a")], ids=["rows", "heads"])
def test_meshes_without_devices(spec):
    """Plain JAX is lowered for any platform. The README's test runs such an export."""
    f = functools.partial(of_layer_1, backend="xla")
    mesh = jax.sharding.AbstractMesh((4,), ("a",), axis_types=(AUTO,))
    x = jax.ShapeDtypeStruct((4, 64, 8, 8), "float32", sharding=NamedSharding(mesh, spec))
    for call in f, gradients_of(f):
        for platform in "cpu", "tpu", "cuda":
            jax.jit(call).trace(x, x, x).lower(lowering_platforms=(platform,))


@wants_8_cpus
@parametrize("axis", ["seq", "tp", None])
@parametrize("is_set", [False, True], ids=["mesh-given", "mesh-set"])
def test_nested_shard_maps(precise, is_set, axis):
    """The inner one leaves an axis to the compiler. JAX knows its devices if the mesh is set."""
    q, k, v = inputs(31, 4, 64, 4, 2, 8, 8)[:3]
    spec = {"seq": P(None, "seq"), "tp": P(None, None, "tp"), None: P()}[axis]
    g = -0.05 * jnp.arange(4)
    seq_axis = "seq" if axis == "seq" else None
    call = lambda q, k, v, g: lightning_attn(q, k, v, g_gamma=g, seq_axis=seq_axis)[0]
    both = lambda *args: (call(*args), gradients_of(call)(*args) if axis != "seq" else args[:3])
    mesh, rows = mesh_of(AUTO, pipe=2, seq=2, tp=2), P("pipe")
    of_g = P("tp") if axis == "tp" else P()
    specs = dict(in_specs=(spec, spec, spec, of_g), out_specs=(spec, (spec,) * 3))
    inner = lambda *args: jax.shard_map(both, axis_names={axis or "seq"}, **specs)(*args)
    of_rows = dict(in_specs=(rows, rows, rows, P()), out_specs=(rows, (rows,) * 3))
    outer = jax.shard_map(inner, mesh=mesh, axis_names={"pipe"}, **of_rows)
    want = lightning_attn(q, k, v, g_gamma=g)[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
            got, gradients = jax.jit(outer)(q, k, v, g)
    warned = any("Call with jax.set_mesh(mesh)" in str(w.message) for w in said)
    assert warned == (HAS_TRITON and not is_set)
    assert_close(got, want, 1e-5)
    if axis != "seq":
        whole = gradients_of(lambda *args: lightning_attn(*args, g_gamma=g)[0])
        assert_close(gradients, whole(q, k, v), 1e-5)


# Wrong calls, and arguments of any make -----------------------------------------------------------


def wrong_calls():
    """Cases of (arguments that differ from a good call's, error, words of its message)."""
    V, T = ValueError, TypeError
    x = lambda *shape, dtype="float32": np.ones(shape, dtype)
    q, k = x(2, 8, 4, 16), x(2, 8, 2, 16)
    cu = lambda *c, dtype="int32": np.array(c, dtype)
    float8, bfloat16 = jnp.asarray(q, "float8_e4m3fn"), jnp.asarray(k, "bfloat16")
    integer, scale = "an integer, got", "0 or a normal number of float32, got"
    axis = "the name of an axis of a shard_map around this call, or a tuple of different names, got"
    layer = "layer_idx and num_layers, or g_gamma"
    hint = ", where query is [batch, seq_len, num_heads, qk_head_dim]"
    no_layer, packed = dict(layer_idx=None, num_layers=None), dict(query=q[:1], key=k[:1])
    packed |= dict(value=k[:1])
    no_gpu = [("triton", V, 'None or "xla" without a GPU for the kernels')]
    # fmt: off
    table = [  # argument, other arguments, and (value, error, what the argument is expected to be)
        ("query", {}, [
            ([[1.0]], T, "an array, got list"),
            (q[0], V, "shape [batch, seq_len, num_heads, qk_head_dim], got (8, 4, 16)"),
            (q.astype("int32"), T, "floating point, got int32"),
            (float8, T, "float32, bfloat16, float16 or float64, got float8_e4m3fn")]),
        ("query", dict(key=x(2, 8, 2, 513)), [
            (x(2, 8, 4, 513), V, "a head dim from 1 to 512, got 513")]),
        ("query", dict(key=k[..., :0]), [(q[..., :0], V, "a head dim from 1 to 512, got 0")]),
        ("key", {}, [
            (k[..., :8], V, "shape [2, 8, num_kv_heads, 16], got (2, 8, 2, 8)"),
            (k.astype("float16"), T, "the dtype of query, float32, got float16")]),
        ("key", dict(value=k[:, :, :0]), [
            (k[:, :, :0], V, "num_kv_heads to divide num_heads, got 0 and 4")]),
        ("key", dict(query=x(2, 8, 3, 16)), [
            (k, V, "num_kv_heads to divide num_heads, got 2 and 3")]),
        ("value", {}, [
            (k[:, :, :1], V, "shape [2, 8, 2, v_head_dim], got (2, 8, 1, 16)"),
            (bfloat16, T, "the dtype of query, float32, got bfloat16"),
            (x(2, 8, 2, 600), V, "a head dim from 1 to 512, got 600")]),
        ("layer_idx", {}, [
            (4, V, "0 to num_layers - 1, got 4 of 4"), (-1, V, "0 to num_layers - 1, got -1"),
            (10**400, V, "0 to num_layers - 1, got 1000"), (1.5, T, f"{integer} 1.5"),
            (True, T, f"{integer} True"), (V, T, f"{integer} <class 'ValueError'>"),
            (np.array([1, 2]), V, "a scalar, got shape (2,)")]),
        ("layer_idx", dict(num_layers=None), [
            (None, V, layer)]),
        ("num_layers", {}, [
            (2**31, V, "1 to 2**31 - 1, got 2147483648"), (None, V, layer)]),
        ("num_layers", dict(layer_idx=0), [(0, V, "1 to 2**31 - 1, got 0")]),
        ("g_gamma", {}, [(x(4), V, "either g_gamma or layer_idx and num_layers, got both")]),
        ("g_gamma", no_layer, [
            (np.array([0, -1, -2, 0.5], "float32"), V, "log decays <= 0 (-slopes), got 0.5"),
            (np.full(4, np.nan, "float32"), V, "log decays <= 0 (-slopes), got nan"),
            (np.zeros(4, "int32"), T, "floating point, got int32"),
            (x(3), V, f"shape [4], got (3,){hint}")]),
        ("softmax_scale", {}, [
            (x(4), V, "a scalar, got shape (4,)"), (1j, T, "a real number, got 1j"),
            (True, T, "a real number, got True"), (10**400, V, f"{scale} inf"),
            *((s, V, f"{scale} {s!r}") for s in (-1e-40, 1e39, np.inf, np.nan))]),
        ("reverse", {}, [("yes", T, "True or False, got 'yes'")]),
        ("output_final_state", {}, [(1, T, "True or False, got 1")]),
        ("initial_state", {}, [
            (x(3, 4, 16, 16), V, "got (3, 4, 16, 16): a state per batch row" + hint)]),
        ("initial_state", dict(cu_seqlens=cu(0, 4, 8), **packed), [
            (x(1, 4, 16, 16), V, "got (1, 4, 16, 16): a state per packed sequence"),
            (x(3, 4, 16), V, "shape [2, 4, 16, 16], got (3, 4, 16)")]),
        ("cu_seqlens", {}, [(cu(0, 8), V, "a batch of 1 to hold the packed sequences, got 2")]),
        ("cu_seqlens", packed, [
            (V, T, "an array, got type"),
            (np.zeros((2, 2), "int32"), V, "shape [num_seqs + 1], got (2, 2)"),
            (cu(0, 8, dtype="float32"), T, "integers, got float32"),
            ([0, [1, 8]], T, "an integer, got [1, 8]"), ([0, 2**70], T, "integers, got object"),
            (cu(0), V, "at least 2 boundaries, got 1"), ([], V, "at least 2 boundaries, got 0"),
            (cu(3, 5), V, "boundaries that start at 0, got [3 5]"),
            (cu(0, 5, 3), V, "boundaries that do not decrease, got [0 5 3]"),
            (cu(0, 9), V, "boundaries up to seq_len, 8, got 9"),
            ([0, 2**32 + 5], V, "boundaries up to seq_len, 8, got 4294967301"),
            (cu(0, 2**63 + 5, dtype="uint64"), V, "boundaries up to seq_len, 8, got 9223372036")]),
        ("backend", {}, [
            ("cuda", V, "None, \"triton\" or \"xla\", got 'cuda'"),
            (x(2), V, 'None, "triton" or "xla", got array('),
            *(no_gpu if HAS_TRITON and not HAS_GPU else [])]),
        ("seq_axis", dict(cu_seqlens=cu(0, 64), **packed), [
            ("s", V, "None with cu_seqlens, got 's'")]),
        ("seq_axis", {}, [
            (3, T, f"{axis} 3"), ((), T, f"{axis} ()"), ("nowhere", V, f"{axis} 'nowhere'")]),
    ]
    # fmt: on
    for argument, others, rows in table:
        for i, (value, error, words) in enumerate(rows):
            change = others | {argument: value}
            named = "-".join([argument, *sorted(others), str(i)])
            yield param(change, error, (argument, words), id=named)


@parametrize("change, kind, words", [*wrong_calls()])
def test_wrong_calls(change, kind, words):
    x = lambda *shape: np.ones(shape, "float32")
    operands = dict(query=x(2, 8, 4, 16), key=x(2, 8, 2, 16), value=x(2, 8, 2, 16))
    good = operands | dict(layer_idx=1, num_layers=4)
    lightning_attn(**good)
    with pytest.raises(kind) as info:
        lightning_attn(**good | change)
    argument, expected = words
    said = str(info.value)
    assert said.startswith(f"{argument}: expected") and expected in said, said


class Wrapped:
    """What flax.nnx.Param is to JAX: an object that says which array it holds."""

    def __init__(self, x):
        self.x = x

    __jax_array__ = lambda self: self.x
    __getattr__ = lambda self, name: getattr(self.x, name)


wrapped_int32 = lambda x: Wrapped(jnp.int32(x))


def test_numbers_of_any_make():
    """Numbers may be Python's, numpy's and JAX's, as scalars and as arrays without axes."""
    x = jnp.ones((1, 8, 4, 8))
    f = functools.partial(lightning_attn, x, x, x)
    for number in np.int64, np.uint8, np.array, jnp.int32, jnp.uint8, wrapped_int32:
        assert_close(f(number(1), number(4), np.float32(0.5)), f(1, 4, 0.5))
    for scale in np.float64(0.5), np.array(0.5), np.float16(0.5), jnp.bfloat16(0.5), jnp.array(0.5):
        assert_close(f(1, 4, scale), f(1, 4, 0.5))
    assert_close(f(1, 4, np.int8(2)), f(1, 4, 2))
    assert_close(lightning_g_gamma(np.int64(4), wrapped_int32(1), 4), lightning_g_gamma(4, 1, 4))
    last = lambda i: lightning_g_gamma(4, i, 99, "bfloat16")
    assert_close(jax.jit(last)(98), last(98), 4e-3)
    listed, array = (np.int64(0), jnp.int32(3), np.array(8)), np.array([0, 3, 8])
    want = f(1, 4, cu_seqlens=jnp.array([0, 3, 8]))
    for cu in [0, 3, 8], listed, array, array.astype("uint64"), jnp.array([0, 3, 8], "int8"):
        assert_close(f(1, 4, cu_seqlens=cu), want)
    assert_close(jax.jit(lambda n: f(1, 4, cu_seqlens=[0, n, 8]))(3), want)


@parametrize("f", [lightning_attn, lightning_attn_reference], ids=["op", "reference"])
def test_objects_that_hold_arrays(f, precise):
    q, k, v, s0, do, _ = inputs(12, 1, 20, 2, 2, 8, 8, n=2)
    g, scale, cu = jnp.array([-0.1, -0.5]), jnp.float32(0.3), jnp.array([0, 9, 20])
    args = dict(initial_state=s0, cu_seqlens=cu, softmax_scale=scale, g_gamma=g)
    wrapped = lambda tree: jax.tree.map(Wrapped, tree)
    call = lambda args, *x: f(*wrapped(x), **wrapped(args))
    for way in call, jax.jit(call):
        assert_close(way(args, q, k, v), f(q, k, v, **args))
    dg = lambda wrap: jax.grad(lambda g: (f(q, k, v, g_gamma=wrap(g))[0] * do).sum())(g)
    assert_close(dg(Wrapped), dg(lambda g: g), 1e-6)
    with pytest.raises(ValueError, match="g_gamma: expected log decays <= 0 .-slopes., got 0.5"):
        f(q, k, v, g_gamma=Wrapped(jnp.array([0.0, 0.5])))


def test_wrong_calls_of_what_is_traced():
    x = jnp.ones((1, 8, 4, 8))
    f = functools.partial(lightning_attn, x, x, x, 1, 4)
    axis = "seq_axis: expected the name of an axis of a shard_map around this call, .*, got "
    on = dict(mesh=mesh_of(AUTO, s=1), in_specs=P(), out_specs=P())
    for error, words, call in [
        (TypeError, "reverse: expected True or False, got .*static", lambda r: f(reverse=r)),
        (ValueError, "num_heads: .* static .*Tracer", lambda H: lightning_g_gamma(H, 0, 1)),
        (ValueError, "got -1 of a traced number", lambda n: lightning_g_gamma(4, -1, n)),
        (ValueError, "num_layers: expected 1 to 2", lambda n: lightning_g_gamma(4, 0, 0)),
        (ValueError, "num_heads: expected a static .* got 0", lambda n: lightning_g_gamma(0, 0, 1)),
        # the gradient would not know an axis that vmap names
        (ValueError, axis, lambda n: jax.vmap(lambda x: f(seq_axis="i"), axis_name="i")(x)),
        (ValueError, axis, lambda n: jax.shard_map(lambda x: f(seq_axis=("s", "s")), **on)(x)),
    ]:
        with pytest.raises(error, match=words):
            jax.jit(call)(4)


# Versions and fallbacks ---------------------------------------------------------------------------


@wants_triton
def test_gpus_without_matrix_products_in_triton():
    """A T4 takes plain JAX, and says so if kernels are asked for."""
    x = jax.ShapeDtypeStruct((1, 70, 2, 16), "float32")
    f = lambda backend: lambda x: lightning_attn(x, x, x, 1, 4, backend=backend)
    assert not recorded_launches("sm_75", f(None), x)
    with pytest.raises(ValueError, match='expected None or "xla" .*got "triton" and sm_75'):
        recorded_launches("sm_75", f("triton"), x)


@parametrize("version", ["0.9.2", "0.10.1", "0.10.2", "0.13.0.dev1"])
def test_jax_that_is_too_old(version, monkeypatch):
    """Plain JAX runs from jax 0.10.2 on. An older jax gets an ImportError."""
    monkeypatch.setattr(jax, "__version__", version)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    refused = pytest.raises(ImportError, match=f"needs jax>=0.10.2 and found jax {version}: pip")
    with refused if version in ("0.9.2", "0.10.1") else contextlib.nullcontext():
        load("lightning_attn_old")


@parametrize(
    "name, version",
    [
        ("jax_triton", "missing"),
        *(param("jax", v, marks=wants_triton) for v in ("0.11.0", "0.13.0")),
        *(param("jax_triton", v, marks=wants_triton) for v in ("0.3.1", "0.5.0", "broken")),
        *(param("triton", v, marks=wants_triton) for v in ("3.7.1", "3.10.0")),
    ],
)
def test_versions_that_do_not_fit_the_kernels(name, version, monkeypatch):
    """Plain JAX runs. Only calls on GPUs warn: what was found, what it costs, what to install."""
    found = {"missing": "ModuleNotFoundError: ", "broken": "AttributeError: "}
    found = found.get(version, f"{name.replace('_', '-')} {version}")
    if version == "missing":
        monkeypatch.setitem(sys.modules, name, None)
    elif version == "broken":
        monkeypatch.delattr(importlib.import_module(name), "__version__")
    else:
        monkeypatch.setattr(importlib.import_module(name), "__version__", version)
    x = jnp.ones((1, 4, 2, 8))
    with warnings.catch_warnings(action="error"):
        other = load("lightning_attn_unfit")
        other._gpu = lambda: None
        other.lightning_attn(x, x, x, 0, 1)
        other._gpu = lambda: ("sm_90", 132)
        other.lightning_attn(x, x, x, 0, 1, backend="xla")
    with pytest.raises(ValueError, match=re.escape(la._INSTALL)):
        other.lightning_attn(x, x, x, 0, 1, backend="triton")
    with pytest.warns(UserWarning) as caught:
        other.lightning_attn(x, x, x, 0, 1)
    (said,) = (str(w.message) for w in caught)
    assert found in said and "plain-JAX path" in said and la._INSTALL in said


@wants_project
def test_versions_agree():
    """The ranges in pyproject.toml are those of the guard."""
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras, cap = project["optional-dependencies"], la._KERNELS["jax"].partition(",")[2]
    assert project["dependencies"] == [f"jax{la._JAX},{cap}", "numpy"]
    for extra in "cuda13", "cuda12":
        assert extras[extra][1] == f"jax[{extra}]{la._KERNELS['jax']}"
    kernels = [x.partition(";")[0] for x in extras["kernels"]]
    assert kernels == [f"{name}{la._KERNELS[name]}" for name in ("jax-triton", "triton")]


# Huge arrays, and what compiles -------------------------------------------------------------------


@wants_triton
@parametrize("H", [64, 2**17], ids=["rows", "tokens"])
@parametrize("arch, T", [("sm_90", 140), ("sm_80", 140), ("sm_80", 1)])
def test_offsets_past_2_31(arch, T, H):
    """The last program of arrays of 2^32 elements stays inside of them and writes its own rows.

    The arrays are `Endless`: nothing so large is made. Many heads put the tokens of a row that far
    apart.
    """
    B, D = 2**32 // (T * H * 128) + 1, 128
    x = jax.ShapeDtypeStruct((B, T, H, D), "bfloat16")
    s0 = jax.ShapeDtypeStruct((B, H, D, D), "float32")
    f = lambda q, k, v, s0: lightning_attn(q, k, v, 3, 8, initial_state=s0, backend="triton")[0]
    ((kernel, arrays, arguments, options),) = recorded_launches(arch, f, x, x, x, s0)

    def endless(x):
        if isinstance(x, la.jax_triton.TensorDescriptor):
            # other tests check whole chunks, and no descriptor is used past 2^31 rows
            return described(np.broadcast_to(np.ones((), x.base.dtype), x.shape), x)
        return Pointer(Endless(x.shape, x.dtype))

    pointers = list(map(endless, arrays))
    with np.errstate(all="ignore"):
        emulate(kernel, la, [options["programs"] - 1], pointers, arguments)
    s, o = (p.array.written for p in pointers[-2:])
    assert {at // D for at in o} == {((B - 1) * T + t) * H + H - 1 for t in range(T)}
    assert {at // D**2 for at in s} == {B * H - 1}
    # descriptors count rows in int32
    past = la._config(arch, 132, D, D, np.dtype("float16"), 2**31 // T + 1, H, T, 1, False)
    assert past.kernel is la._chunk_scan_kernel


@wants_triton
@parametrize(
    "arch, dtype",
    [
        *itertools.product(
            ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"], ["bfloat16", "float32"]
        ),
        ("sm_80", "float16"),
        ("sm_90", "float16"),
    ],
)
def test_compiles_and_fits(arch, dtype):
    """Launches compile, fit shared memory, and hardly spill.

    The launches are those of long sequences, with their gradients for some head dims, and those of
    a decode step.
    """
    import triton

    amd = pathlib.Path(triton.__file__).parent / "backends/amd/lib/libtriton_amd_codegen.so"
    is_3_9 = la._fits(triton.__version__, ">=3.9")
    if arch.startswith("gfx") and is_3_9 and not amd.exists():
        pytest.skip("a slim Triton, without the code generator for AMD")
    is_16_bit_hopper = arch == "sm_90" and dtype != "float32"
    # float16 launches equal those of bfloat16, and registers are counted for the Hopper kernel
    # alone: elsewhere fewer sizes will do
    all_sizes = arch in ("sm_80", "sm_90") and dtype != "float16"
    sizes = (16, 64, 128, 192, 512) if all_sizes else (128, 512)
    shapes = [(1, 4096, 2, D, None) for D in sizes] + [(1, 1, 2, 128, None)]
    if arch == "sm_90" and dtype != "float16":
        # arguments that are 1 become constants of the kernels: no argument is 1, or all are
        shapes += [(2, 300, 4, 64, None), (2, 300, 4, 128, None)]
        shapes += [(1, 4096, 1, 64, [0, 10, 4096]), (1, 80, 1, 1, None), (1, 1, 1, 16, None)]
    names = "BK", "BV", "BE", "C", "IS_VARLEN", "SEGMENTED", "HAS_S0", "FUSED"
    table = {}
    for B, T, H, D, cu in shapes:
        x = jnp.zeros((B, T, H, D), dtype)
        s0 = None if H == 2 else jnp.zeros((len(cu) - 1 if cu else B, H, D, D))
        options = dict(softmax_scale=1.0, cu_seqlens=cu, backend="triton")

        def f(q, s0):
            return lightning_attn(q, x, x, 12, 24, initial_state=s0, **options)[0].sum()

        if H == 1:
            f = jax.grad(f, (0, 1))
        elif D in (64, 128) and T > 1:
            f = jax.value_and_grad(f)
        for launch in recorded_launches(arch, lambda: f(x, s0)):
            kernel, _, arguments, options = launch
            tile = [arguments.get(n) for n in names]
            edges = [arguments[d] % arguments["B" + d] > 0 for d in "KVE" if d in arguments]
            warps_and_stages = options["num_warps"], options["num_stages"]
            key = kernel.__name__, B, H, *tile, *edges, *warps_and_stages
            if key in table:
                continue
            table[key] = shared, spilled = compile_as_jax_triton(*launch, arch)
            assert shared <= la._SHARED_MEMORY[arch] * 1024, (key, shared)
            # Two scans at once for head dims of 64, and programs of half the values for 128, use
            # all registers. Parts of the keys want more. Versions of ptxas and Triton differ.
            full = arguments.get("FUSED") if D == 64 else D == 128 and arguments.get("BV") == 64
            few = 44 if full else 512 if D > 128 else 0
            assert spilled <= few or not (kernel.is_gluon() and is_3_9), (key, spilled)
    assert len(table) >= 4
    has_hopper = any(key[0] == "_hopper_kernel" for key in table)
    assert has_hopper == is_16_bit_hopper


# GPU only -----------------------------------------------------------------------------------------


@wants_gpu
@parametrize(
    "tokens, pool",
    [(1, False), (2, False), (16, False), (100, False), (1, True), (4, True), (16, True)],
    ids=lambda x: {True: "pool", False: "rows"}.get(x, x) if isinstance(x, bool) else f"{x}-tokens",
)
def test_a_step_takes_the_memory_of_its_state(tokens, pool):
    """A donated state, or a loop's, is neither doubled nor copied. Other states do not change."""
    q, k, v, s0, *_ = inputs(28, 16, tokens, 16, 16, 64, 64, "bfloat16")
    cu = jnp.arange(17) * tokens if pool else None  # a pool: one sequence in each slot
    if pool:
        q, k, v = (x.reshape(1, -1, 16, 64) for x in (q, k, v))
    f = lambda s0, q, k, v: lightning_attn(q, k, v, 1, 2, initial_state=s0, cu_seqlens=cu)
    memory = jax.jit(f, donate_argnums=0).lower(s0, q, k, v).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= s0.nbytes and memory.temp_size_in_bytes < s0.nbytes / 8

    def steps(s0, q, k, v):
        return jax.lax.scan(lambda s, x: f(s, *x)[::-1], s0, (q, k, v))

    loop = jax.jit(steps, donate_argnums=0)
    three = [jnp.stack([x, x, x]) for x in (q, k, v)]
    text = loop.lower(s0, *three).compile().as_text()
    assert not re.search(r"= f32\[[\d,]*16,64,64\]\S* copy\(", text)
    before = np.asarray(s0)
    want = f(f(f(s0, q, k, v)[1], q, k, v)[1], q, k, v)
    assert np.array_equal(s0, before)
    got = loop(s0, *three)
    assert_close((got[1][2], got[0]), want, 1e-6)
    state = jnp.asarray(before)

    def layers(states, q, k, v):  # states of a model are scanned over, and stacked again
        return jax.lax.scan(lambda c, s: (c, f(s, q, k, v)), 0, states)[1]

    got = jax.jit(layers)(jnp.stack([state] * 3), q, k, v)
    once = f(state, q, k, v)
    assert_close((got[0][2], got[1][2]), once, 1e-6)

    def used_again(state, q, k, v):
        return f(state, q, k, v), f(state, k, q, v), state * 2

    got = jax.jit(used_again, donate_argnums=0)(state + 0, q, k, v)
    assert_close(got, (once, f(state, k, q, v), state * 2), 1e-6)


@wants_gpu
def test_arrays_beyond_2_31_elements():
    B, T, H, D = 5, 2**18, 16, 128  # 2.7e9 elements; the last row lies past 2^31
    draw = jax.jit(lambda key: jax.random.normal(key, (B, T, H, D), jnp.bfloat16))
    q, k, v = map(draw, jax.random.split(jax.random.key(0), 3))
    for reverse in False, True:
        o, s = lightning_attn(q, k, v, 3, 8, reverse=reverse)
        last = [x[-1:] for x in (q, k, v)]
        want, end = lightning_attn(*last, 3, 8, reverse=reverse)
        for part in slice(-4096, None), slice(0, 4096):
            assert error(float32(o[-1:, part]), float32(want[:, part])) < 4e-3
        assert error(s[-1:], end) < 1e-3
        del o, s, want, end


@wants_gpu
@parametrize(
    "B, T, H, D, dtype, cu",
    [
        param(1, 70000, 3, 16, "float32", None, id="as-many-segments-as-fill-a-gpu"),
        param(1, 2**22, 2, 32, "bfloat16", None, id="four-million-tokens"),
        param(1100, 20, 64, 16, "bfloat16", None, id="more-than-65535-programs"),
        param(1, 2**17, 2, 16, "float32", 65536, id="65536-sequences-of-1-to-3-tokens"),
        *(  # the kernels that models run
            param(1, T, 4, D, dtype, cu, id=f"T{T}-D{D}-{dtype}" + "-packed" * bool(cu))
            for T, cu in [(300, 0), (2048, 0), (8192, 0), (8192, [0, 20, 20, 5000, 8100])]
            for D, dtype in itertools.product((128, 256), ("bfloat16", "float32"))
        ),
    ],
)
@each_direction
def test_kernels_against_plain_jax(B, T, H, D, dtype, cu, reverse, precise):
    """Plain JAX is in float32."""
    if cu == 65536:
        cu = [0, *np.minimum(np.cumsum(np.random.default_rng(0).integers(1, 4, cu)), T)]
    n, Hk = len(cu) - 1 if cu else B, H // 2 if H % 2 == 0 else H
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    operands = [draw(i, B, T, heads, D).astype(dtype) for i, heads in enumerate((H, Hk, Hk, H))]
    states = draw(4, n, H, D, D), draw(5, n, H, D, D)
    g = jnp.array([0, -1e-3, -0.05, -2])[:H] if H < 5 else jnp.linspace(0, -3, H)

    def run(backend, q, k, v, do, s0, ds):
        options = dict(g_gamma=g, reverse=reverse, cu_seqlens=int32(cu or None), backend=backend)
        f = lambda q, k, v, s0: lightning_attn(q, k, v, initial_state=s0, **options)
        out, back = jax.vjp(f, q, k, v, s0)
        return *out, *back((do, ds))

    got = jax.jit(functools.partial(run, "triton"))(*operands, *states)
    want = jax.jit(functools.partial(run, "xla"))(*map(float32, operands), *states)
    for name, a, b in zip(NAMES, got, want):
        assert max(errors(float32(a), b, name)) < (1e-4 if dtype == "float32" else 1e-2), name


@wants_gpu
@parametrize("dtype", ["bfloat16", "float32"])
def test_a_million_tokens_that_no_one_forgets_or_everyone_does(dtype):
    """Against sums in float64."""
    rng, T, D = np.random.default_rng(0), 2**20, 64
    q, k, v = (rng.standard_normal((1, T, 2, D), np.float32).astype(dtype) for _ in range(3))
    with jax.default_matmul_precision("highest"):
        o, s = lightning_attn(q, k, v, g_gamma=jnp.array([0.0, -1e4]), softmax_scale=1.0)
    bar_of_s, bar = (1e-3, 6e-3) if dtype == "bfloat16" else (1e-5, 1e-5)
    state = float64(k[0, :, 0]).T @ float64(v[0, :, 0])
    assert error(s[0, 0], state) < bar_of_s
    assert error(o[0, -1, 0], float64(q[0, -1, 0]) @ state) < bar
    score = (float64(q[0, :, 1]) * float64(k[0, :, 1])).sum(-1, keepdims=True)
    assert error(float32(o[0, :, 1]), score * float64(v[0, :, 1])) < bar


SANITIZED = """
import jax, numpy as np
import lightning_attn as la
rng = np.random.default_rng(0)
# numpy makes every input: each of XLA's own kernels would be patched, watched and reported on
def x(*shape, dtype="float32"): return jax.device_put(rng.standard_normal(shape).astype(dtype))
def run(B, T, H, Hk, D, dtype="bfloat16", cu=None, **kw):
    n = B if cu is None else len(cu) - 1
    q, k, v, do = (x(B, T, h, D, dtype=dtype) for h in (H, Hk, Hk, H))
    g = jax.device_put(np.linspace(-1, 0, H, dtype="float32"))
    cu = None if cu is None else jax.device_put(np.array(cu, "int32"))
    def results_and_gradients(q, k, v, s0, g, do, ds, cu):
        def f(q, k, v, s0):
            return la.lightning_attn(q, k, v, g_gamma=g, initial_state=s0, cu_seqlens=cu, **kw)
        out, back = jax.vjp(f, q, k, v, s0)
        return out, back((do, ds))
    args = q, k, v, x(n, H, D, D), g, do, x(n, H, D, D), cu
    jax.block_until_ready(jax.jit(results_and_gradients)(*args))
"""

CALLS_TO_SANITIZE = {
    "batches": ["1, 1100, 2, 2, 64, reverse=True", "2, 128, 2, 1, 128", "1, 100, 1, 1, 192"],
    "as-in-long-sequences": ["2, 128, 2, 1, 128", "1, 200, 2, 2, 128, cu=[0, 0, 5, 70, 70, 190]"],
    "decode-and-float32": ["3, 1, 2, 2, 96", "1, 100, 2, 2, 40, 'float32'"],
    "wrong-boundaries": [
        "1, 200, 2, 2, 64, cu=[0, 2**31 - 1, -5, 150, 100, -2**31], reverse=True",
        "1, 200, 2, 2, 64, 'float32', cu=[200, 2**31 - 1, 0, 150, 1000]",
    ],
}


@wants_gpu
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer")
@parametrize("calls", CALLS_TO_SANITIZE)
@parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool, calls, tmp_path):
    """Each array is an allocation of its own.

    initcheck watches all kernels, since XLA's kernels write as well. initcheck prints a line for
    every thread, also about XLA's kernels and copies. The limit is high enough that lines about our
    kernels are printed.
    """
    limit = 20000
    watched = ["--kernel-name", "kns=_kernel", "--error-exitcode", "9"]
    if tool == "initcheck":
        watched = ["--print-limit", str(limit)]
    # compute-sanitizer 2025.3 crashes at times when it follows the compilers that Triton starts
    watched += ["--target-processes", "application-only", "--show-backtrace", "no"]
    watched += ["--launch-timeout", "0"]  # while other cases run, Python may take long to start
    shutil.copy(FILE, tmp_path / "lightning_attn.py")
    # without autotuning: XLA tunes its own kernels on memory that nothing has written
    flags = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"}
    flags |= {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    code = [SANITIZED, *(f"run({call})" for call in CALLS_TO_SANITIZE[calls]), "print('ran')"]
    if calls == "as-in-long-sequences":  # programs of short sequences then take all values
        code.insert(1, "la.SEGMENT = 16")
    command = ["compute-sanitizer", "--tool", tool, *watched, sys.executable, "-c", "\n".join(code)]
    # a file, not a pipe: a program that outlives a tool that crashed would keep the pipe open
    with open(tmp_path / "output", "w+") as output:
        options = dict(stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path, timeout=300)
        ran = subprocess.run(command, **options, env=os.environ | flags)
        output.seek(0)
        said = output.read()
    assert ran.returncode == 0 and "ran" in said.splitlines(), (ran.returncode, said[-3000:])
    assert not re.search(r" at _\w+_kernel", said), said[-3000:]
    few = "more lines than initcheck may print: lines about our kernels may be missing"
    assert said.count("Uninitialized") < limit, few


# README -------------------------------------------------------------------------------------------


@wants_project
@wants_8_cpus
def test_snippets_of_the_readme(monkeypatch):
    import inspect

    text = (PROJECT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    has_flax = bool(importlib.util.find_spec("flax"))
    blocks = [block for block in blocks if has_flax or "flax" not in block]

    def run(blocks, lightning_attn=la.lightning_attn, names=()):
        module = types.SimpleNamespace(**vars(la) | {"lightning_attn": lightning_attn})
        monkeypatch.setitem(sys.modules, "lightning_attn", module)
        names = dict(names)
        exec("".join(blocks), names)
        return types.SimpleNamespace(**names)

    def recurrence(*args, output_final_state=True, **kwargs):
        return lightning_attn_reference(*args, **kwargs)

    # results, beside those of the same program with the recurrence. One bit of bfloat16 is 8e-3
    R, close = run(blocks), functools.partial(assert_close, bar=1e-2)
    plain = [block for block in blocks if "export" not in block and "make_mesh" not in block]
    E = run(plain, recurrence)
    results = "output final_state dq dk dv y states drafts packed pack_states padded row_states"
    for name in f"{results} slot_outputs slots hessian_times_ones".split():
        close(getattr(R, name), getattr(E, name))
    close(R.dw, E.dw, bar=2e-2)  # of three layers
    whole, g, qkv = (E.output, E.final_state), R.g[1], (R.q, R.k, R.v)
    explicit = run([blocks[-1].replace("AxisType.Auto", "AxisType.Explicit")], names=vars(R))
    for S in R, explicit:
        close([S.by_jit, S.by_heads, S.by_tokens], [whole[0], whole[0], whole])
    assert "Explicit" in str(explicit.by_jit.sharding.mesh)

    # generation: the model as a whole, a prompt in parts, the states in place
    model = R.model(R.w, R.x)
    assert model.dtype == R.y.dtype == jnp.bfloat16
    _, states = R.step(R.w, jnp.zeros_like(R.states), R.x[:, :128])
    y, states = R.step(R.w, states, R.x[:, 128:206])
    close([R.y, R.drafts], [model[:, 204:206], model[:, 204:208]])
    close([y[:, -2:], states], [R.y, R.states])
    for tokens in 1, 4:
        compiled = R.step.lower(R.w, R.states, R.x[:, :tokens]).compile()
        assert compiled.memory_analysis().alias_size_in_bytes == R.states.nbytes
        assert not re.search(r"f32\[3,2,4,32,32\]\S* copy\(", compiled.as_text())
    whole_layer = jax.checkpoint(lambda x, wg: (R.attention(x, *wg)[0], None))
    for repeats, remat in (False, R.remat), (True, whole_layer):
        gradient = jax.grad(lambda w: jax.lax.scan(remat, R.x, (w, R.g))[0].sum().astype("float32"))
        again = 'rematted_computation[^"]*/lightning_attn_forward'
        compiled = jax.jit(gradient).lower(R.w).compile().as_text()
        assert bool(re.search(again, compiled)) == repeats

    # padding and idle slots
    part = lambda row, tokens: recurrence(*(a[row, tokens] for a in qkv), g_gamma=g)
    right, left = part(slice(0, 1), slice(100)), part(slice(1, 2), slice(56, None))
    close([R.padded[0, :, :100], R.row_states[0]], right)
    close([R.padded[1, :, 56:], R.row_states[1]], left)
    close(la.lightning_attn(*(a[:1] for a in qkv), g_gamma=g, cu_seqlens=[0, 100])[1], right[1])
    outside = R.padded[0, :, 100:], R.padded[1, :, :56]
    assert (R.slots[::2] == 1).all() and not any(a.any() for a in outside)

    # export, flax, second derivatives
    close(R.reloaded, whole)
    checks = [eval(re.search(r"disabled_checks=\[(.*?)\]", text)[1], vars(R))]
    fixed = R.export.export(jax.jit(R.row), disabled_checks=checks)(*(a[0] for a in qkv), 0, 100)
    close(R.export.deserialize(fixed.serialize()).call(*(a[0] for a in qkv), 0, 100)[1], right[1])
    mesh = jax.sharding.AbstractMesh((2,), ("rows",))
    shape = jax.ShapeDtypeStruct(R.q.shape, R.q.dtype, sharding=NamedSharding(mesh, P("rows")))
    assert R.export.export(R.f)(shape, shape, shape).serialize()
    local = lambda q, k, v: la.lightning_attn(q, k, v, g_gamma=g)[0]
    by_rows = jax.jit(jax.shard_map(local, mesh=R.mesh, in_specs=P("data"), out_specs=P("data")))
    rows = R.put(R.mesh, P("data"), *qkv)
    by_rows = R.export.export(by_rows)(*rows).serialize()
    close(R.export.deserialize(by_rows).call(*rows), whole[0])
    if has_flax:
        layers = [S.Attention(S.nnx.Rngs(0)) for S in (R, E)]
        close(*([f(R.x), R.nnx.grad(lambda f: f(R.x).sum())(f).w[...]] for f in layers))
        close(la.lightning_attn(*qkv, g_gamma=R.nnx.Param(jnp.asarray(g))), whole)
    squares = lambda op: lambda q: (op(q, q, q, 0, 1)[0] ** 2).sum()
    hessian = jax.jacrev(jax.jacrev(squares(la.lightning_attn)))
    close(hessian(jnp.ones((1, 3, 1, 2))), jax.hessian(squares(recurrence))(jnp.ones((1, 3, 1, 2))))

    # decays, beside the formulas of the released code
    def alibi(n):
        if math.log2(n).is_integer():
            start = 2 ** -(2 ** -(math.log2(n) - 3))
            return [start * start**i for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return alibi(closest) + alibi(2 * closest)[::2][: n - closest]

    for H, L in (64, 80), (16, 20), (32, 32), (4, 3), (12, 12), (24, 6), (40, 10), (48, 80):
        sizes = re.sub("D, L = .*", f"D, L = 1, 1, {H}, 1, {L}", blocks[0].split("q, k, v =")[0])
        S, heads, layers = run([sizes, blocks[1]]), range(H), range(L)
        factor = lambda l, tiny=0: 1 - l / (L - 1 + tiny) + 1e-5
        base = 1 / (2 ** (8 / H))
        formulas = {
            "g": [[-slope * factor(l) for slope in alibi(H)] for l in layers],
            "ling": [[-slope * factor(l - 1) for slope in alibi(H)] for l in layers],
            "retnet": [math.log(1 - 2.0 ** (-5 - h)) for h in heads],
            "paper": [[-8 / H * (1 - l / L) * h for h in heads] for l in layers],
            "transformers": [[-(base ** (h + 1)) * factor(l, 1e-5) for h in heads] for l in layers],
        }
        for name, formula in formulas.items():
            np.testing.assert_allclose(getattr(S, name), formula, 1e-6, 1e-15, err_msg=name)
        differs = not np.allclose(S.transformers[:-1], S.g[:-1], rtol=1e-3)
        assert differs == bool(H & (H - 1)) and (S.paper < -0.5).mean() > 0.5

    # the arguments with their defaults, and messages
    table = re.findall(r"^\| ((?:`\w+`,? )+)\| (\w*)", text.split("## Arguments")[1], re.M)
    listed = [(name, default) for names, default in table for name in re.findall(r"\w+", names)]
    for (name, default), p in zip(listed, inspect.signature(la.lightning_attn).parameters.values()):
        assert (name, default) == (p.name, "" if p.default is p.empty else str(p.default))
    x = jnp.ones((1, 3, 1, 2))
    for call, words in (
        (lambda: la.lightning_attn(x, x, x, 0, 1, mask=x), "got an unexpected keyword argument"),
        (lambda: la.lightning_attn(x, x, x, 0, 1).sum(), "'tuple' object has no attribute"),
        (
            lambda: jax.hessian(squares(la.lightning_attn))(x),
            "can't apply forward-mode autodiff (jvp) to a custom_vjp function",
        ),
        (lambda: la.lightning_attn(x, x, x, 0, 1, backend="triton"), "backend"),
    ):
        assert words in text
        with pytest.raises((AttributeError, TypeError, ValueError), match=re.escape(words)):
            call()
    assert sum(not line.startswith("|") for line in text.splitlines()) <= 190


# Harness ------------------------------------------------------------------------------------------


# The emulator: `emulated` is lightning_attn.py once more, whose own launch code runs its kernels on
# numpy arrays.

LOCK = threading.Lock()  # only one kernel may run at a time
LAUNCHED = set()  # (name, number of programs) of the kernels that ran


@functools.cache
def emulated(path):
    """The copy of lightning_attn.py for a path. It is made when a case first needs it."""
    module = load("lightning_attn_emulated_" + path)

    def config(*args):
        config = {"triton": config_of_triton, "gluon": config_of_gluon}[path](*args)
        return dataclasses.replace(config, kernel=getattr(module, config.kernel.fn.__name__))

    module._config = config
    module._gpu = lambda: ("sm_90", 132)  # the GPU for which the emulator stands
    module.SEGMENT = 96  # emulation is slow: short sequences have segments too
    module.GROUP = la.GROUP
    module._in_place = lambda call, arrays: call(*arrays, in_place=True)
    # an output in place may be its input or another array: both ways are run
    call = functools.partial(emulated_call, module, path == "triton")
    TensorDescriptor = la.jax_triton.TensorDescriptor
    module.jax_triton = types.SimpleNamespace(triton_call=call, TensorDescriptor=TensorDescriptor)
    return module


config_of_triton = lambda arch, *shape: la._config("sm_80", *shape)


def config_of_gluon(arch, _, K, V, dtype, B, H, T, n, fused):
    """The Hopper kernel whatever the dtype: float32 checks this kernel to 1e-5. With one SM short
    sequences take all values per program, as long sequences do."""
    K, V = (-(-size // 8) * 8 for size in (K, V))
    T, dtype = T if T == 1 else max(T, 64), np.dtype("float16")
    config = la._config("sm_90", config_of_gluon.num_sms, K, V, dtype, B, H, T, 1, fused)
    assert T == 1 or config.kernel is la._hopper_kernel
    return config


config_of_gluon.num_sms = 1


def emulated_call(
    module, shares_memory, *args, kernel, out_type, grid, in_place=False, **constants
):
    """Stands for jax_triton.triton_call. `shares_memory`: outputs in place are their inputs, as
    those of the Hopper kernel always are."""
    for option in "num_warps", "num_stages", "backend_options":
        del constants[option]
    leaves, tree = jax.tree.flatten(out_type)
    is_described = [isinstance(x, la.jax_triton.TensorDescriptor) for x in args]
    flat = lambda x: Pointer(x.reshape(-1))

    def launch(*arrays):
        arrays = list(map(np.array, arrays))
        out = [np.full(x.shape, np.nan, x.dtype) for x in leaves]  # unwritten parts show
        if in_place and (shares_memory or "hopper" in kernel.fn.__name__):
            out[0] = arrays[0]
        LAUNCHED.add((kernel.fn.__name__, grid[0]))
        given = [
            described(x.reshape(arg.shape), arg) if is_descriptor else flat(x)
            for x, arg, is_descriptor in zip(arrays, args, is_described)
        ]
        programs = reversed(range(grid[0]))  # their order must not matter
        with LOCK, np.errstate(all="ignore"):
            emulate(kernel, module, programs, [*given, *map(flat, out)], constants)
        return tuple(out)

    operands = [x.base if is_descriptor else x for x, is_descriptor in zip(args, is_described)]
    return jax.tree.unflatten(tree, jax.pure_callback(launch, tuple(leaves), *operands))


def emulate(kernel, module, programs, arrays, constants):
    """A launch of a kernel: its functions once more, with a machine in place of the languages."""
    is_constexpr = lambda x: type(x).__name__ == "constexpr"
    names = {name: x.value if is_constexpr(x) else x for name, x in vars(module).items()}
    for name, f in vars(module).items():
        if isinstance(getattr(f, "fn", None), types.FunctionType):
            names[name] = types.FunctionType(f.fn.__code__, names, name, f.fn.__defaults__)
    names["range"] = lambda *bounds: map(tensor_of_index, range(*map(int, bounds)))
    for program in programs:
        names["gl"] = names["tl"] = names["hopper"] = machine = Machine(program)
        names[kernel.fn.__name__](*arrays, **constants)
        assert not any(bar.copies for bar in machine.bars), "copies that nobody waited for"


class Tensor(np.ndarray):
    """An array that a kernel computes with."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype):
        return self.astype(dtype)

    def __mod__(self, x):  # integers are divided as in C
        return tensor(np.fmod(self, x))

    def __floordiv__(self, x):
        return tensor(np.floor_divide(self - self % x, x))

    def __array_wrap__(self, x, *_):
        return tensor(x)


tensor = lambda x, dtype=None: np.asarray(x, dtype).view(Tensor)
tensor_of_index = lambda i: tensor(i, np.int32)


class Pointer:
    """An array, and places in it. Reading or writing outside of the array is an error."""

    def __init__(self, array, at=0):
        self.array, self.at = array, at
        self.dtype = types.SimpleNamespace(element_ty=array.dtype)

    def __add__(self, more):
        return Pointer(self.array, self.at + more)

    def to(self, dtype, bitcast):
        return self.array.ctypes.data

    def places(self, mask):
        at, mask = np.broadcast_arrays(self.at, True if mask is None else mask)
        assert ((at >= 0) & (at < self.array.size))[mask].all(), "outside of the array"
        return at, mask


class Endless:
    """An array without memory: each value is 1, and `written` holds the places that are written."""

    def __init__(self, shape, dtype):
        self.shape, self.size = shape, int(np.prod(shape))
        self.dtype, self.itemsize = np.dtype(dtype), np.dtype(dtype).itemsize
        self.written = set()

    def __getitem__(self, at):
        return np.ones(at.shape, self.dtype)

    def __setitem__(self, at, x):
        self.written.update(at.reshape(-1).tolist())


def described(array, descriptor):
    """An array behind a descriptor."""
    array = array.view(type("Described", (np.ndarray,), {}))
    array.nbytes_per_cta = int(np.prod(descriptor.block_shape)) * array.itemsize
    array.layout = None
    return array


class Shared:
    """Shared memory, and views of it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    index = lambda self, i: Shared(self.array[int(i)])
    reshape = lambda self, shape: Shared(self.array.reshape(shape))
    permute = lambda self, order: Shared(self.array.transpose(order))
    load = lambda self, layout: tensor(self.array.copy())

    def store(self, x):
        assert x.shape == self.shape and x.dtype == self.dtype
        Machine.now.overwrites(self.array)
        self.array[...] = x


class Machine:
    """Runs a program of a kernel on numpy arrays, as `gl`, `tl` and `hopper` at once.

    Asynchronous work happens as late as it may. A copy leaves NaN until the program has waited for
    the copy's barrier. A product is absent before the wait that covers the product, and its
    operands must not be overwritten until then. All warps are one, so no race between warps shows.
    """

    float32, int32, int64 = np.float32, np.int32, np.int64
    maximum, minimum, static_range = staticmethod(np.maximum), staticmethod(np.minimum), range
    no_layout = staticmethod(lambda *_: None)
    BlockedLayout = DotOperandLayout = SliceLayout = no_layout
    NVMMADistributedLayout = NVMMASharedLayout = no_layout
    debug_barrier = fence_async_shared = barrier = lambda self: None
    range = lambda self, *bounds, num_stages: map(tensor_of_index, range(*map(int, bounds)))
    invalidate = lambda self, bar: None  # its copies are checked when the program ends

    def __init__(self, program):
        self.program, self.products, self.bars = program, [], []
        self.mbarrier = self.tma = Machine.now = self

    program_id = lambda self, _: tensor_of_index(self.program)
    arange = lambda self, a, b, layout=None: tensor(np.arange(a, b), np.int32)
    full = lambda self, shape, value, dtype, layout=None: tensor(np.full(shape, value, dtype))
    convert_layout = lambda self, x, layout: x
    static_assert = lambda self, holds: None if holds else pytest.fail("static_assert")
    trans = lambda self, x: x.T
    sum = lambda self, x, axis: tensor(x.sum(axis))
    exp = lambda self, x: tensor(np.exp(x))
    exp2 = lambda self, x: tensor(np.exp2(np.asarray(x, np.float32)))
    ceil = lambda self, x: tensor(np.ceil(np.asarray(x, np.float32)))

    def where(self, c, x, y):
        return tensor(np.where(c, x, np.asarray(y, np.asarray(x).dtype)))

    def dot(self, a, b, acc=0, input_precision=None):
        return tensor(np.asarray(a, np.float32) @ np.asarray(b, np.float32) + acc)

    def load(self, pointer, mask=None, other=None):
        at, mask = pointer.places(mask)
        other = np.asarray(other or 0, pointer.array.dtype)
        return tensor(np.where(mask, pointer.array[np.where(mask, at, 0)], other))

    def store(self, pointer, x, mask=None):
        at, mask = pointer.places(mask)
        pointer.array[at[mask]] = np.broadcast_to(x, at.shape)[mask]

    # shared memory, barriers and copies

    def allocate_shared_memory(self, dtype, shape, layout):
        return Shared(np.full(shape, np.nan, dtype))

    def overwrites(self, array):
        being_read = [x for _, _, reads in self.products for x in reads]
        assert not any(np.shares_memory(array, x) for x in being_read), "overwritten while read"

    def allocate_mbarrier(self, batch):
        bars = [types.SimpleNamespace() for _ in range(batch)]
        self.bars += bars
        return types.SimpleNamespace(index=bars.__getitem__)

    def init(self, bar, count):
        bar.phases, bar.bytes, bar.copies = 0, 0, []

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
            for array, where, to in bar.copies:
                block = tuple(slice(max(w, 0), w + n) for w, n in zip(where, to.shape))
                part = array[block]
                starts = [max(-w, 0) for w in where]
                to[...] = 0  # outside of the array
                to[tuple(slice(a, a + n) for a, n in zip(starts, part.shape))] = part
            bar.phases, bar.bytes, bar.copies = bar.phases + 1, 0, []
        assert bar.phases % 2 != phase, "would wait forever"

    # products

    def warpgroup_mma(self, a, b, acc, use_acc=True, is_async=True):
        reads = [x.array for x in (a, b) if isinstance(x, Shared)]
        a, b = (np.asarray(getattr(x, "array", x), np.float32) for x in (a, b))
        out = object()
        self.products.append((out, tensor(a @ b + (acc if use_acc else 0)), reads))
        return out

    def warpgroup_mma_wait(self, pending, operands):
        finished = len(self.products) - pending
        done = {id(out): x for out, x, _ in self.products[:finished]}
        found = [done.get(id(x), x) for x in operands]
        assert all(isinstance(x, np.ndarray) for x in found), "not waited for"
        self.products = self.products[finished:]
        return found[0] if len(found) == 1 else found


# Launches that are recorded or compiled, for any GPU.


def recorded_launches(arch, f, *args):
    """Launches that f(*args) makes on a GPU: (kernel, arrays, other arguments, options)."""
    found, TensorDescriptor = [], la.jax_triton.TensorDescriptor

    def record(*arrays, kernel, out_type, grid, backend_options, in_place=False, **arguments):
        options = {n: arguments.pop(n) for n in ("num_warps", "num_stages")} | backend_options
        options |= dict(programs=grid[0], in_place=in_place)
        found.append((kernel, (*arrays, *jax.tree.leaves(out_type)), arguments, options))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

    recorder = types.SimpleNamespace(triton_call=record, TensorDescriptor=TensorDescriptor)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(la, "jax_triton", recorder)
        m.setattr(la, "_in_place", lambda call, arrays: call(*arrays, in_place=True))
        m.setattr(la, "_gpu", lambda: (arch, 132))
        jax.clear_caches()
        jax.eval_shape(f, *args)
    jax.clear_caches()
    return found


def compile_as_jax_triton(kernel, arrays, arguments, options, arch):
    """Compiles a launch as jax-triton does. Returns the bytes of shared memory and of spills.

    Spills are those of registers of the Hopper kernel, and 0 for other kernels.
    """
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
            block = ",".join(map(str, x.block_shape))
            return f"tensordesc<{kind[str(x.base.dtype)]}[{block}],{x.layout!r}>"
        if hasattr(x, "shape"):
            return "*" + kind[str(x.dtype)]
        return "fp32" if isinstance(x, float) else "i32" if x < 2**31 else "i64"

    names = kernel.arg_names
    values = dict(zip((n for n in names if n not in arguments), arrays)) | arguments
    fixed = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    ones = [n for n in names if type(values[n]) in (int, float) and values[n] == 1]
    fixed = {n: fixed.get(n, 1) for n in names if n in fixed or n in ones}
    signature = {n: "constexpr" if n in fixed else type_of(values[n]) for n in names}
    # Arrays are aligned. jax-triton never says what integers are divisible by.
    pointers = [i for i, n in enumerate(names) if signature[n][0] == "*"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    options = {n: x for n, x in options.items() if n not in ("programs", "in_place")}
    make_source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make_source(kernel, signature, fixed, attributes)
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
        return triton.compile(source, target=target, options=options).metadata.shared, 0
    number = int(arch[3:])
    target = GPUTarget("cuda", number, 32)
    backend, context, about = make_backend(target), ir.context(), {}
    options = backend.parse_options(options)
    ir.load_dialects(context), backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    code = source.make_ir(target, options, functions, modules, context)
    for step in backend.make_ttir, backend.make_ttgir, backend.make_llir, backend.make_ptx:
        code = step(code, about, options, number)
    if number != 90 or not kernel.is_gluon():
        return about["shared"], 0
    ptxas = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
    with tempfile.TemporaryDirectory() as folder:
        (ptx := pathlib.Path(folder, "kernel.ptx")).write_text(code)
        command = [ptxas, "-arch=sm_90a", "-v", ptx, "-o", ptx.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return about["shared"], int(re.search(r"(\d+) bytes spill stores", said.stderr)[1])
