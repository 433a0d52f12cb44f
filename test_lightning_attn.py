# SPDX-License-Identifier: Apache-2.0
"""Tests of lightning_attn.py: `python test_lightning_attn.py`, or `pytest test_lightning_attn.py`.

The tests take the lightning_attn.py beside this file, in a package or not. Where no such file lies,
they take the installed one.

Most cases compare results and gradients with a float64 oracle in numpy (`oracle`). They run on
every path that the machine has:

    xla           plain JAX
    gpu           the kernels on a GPU
    interpreter   without a GPU: the Triton kernels in Triton's interpreter
    gluon         without a GPU: the Gluon kernel on the emulator of this file

A script run owns its process, so it gives JAX 8 virtual CPU devices. A run under pytest changes
nothing of its process: cases that want 8 devices then run in a script, as the one case
`test_on_8_devices`. The last lines of a run say how to run each failed case again.

Contents
    Script run               what `python test_lightning_attn.py` does
    File under test
    Paths                    `run_on`: a call on a path
    Oracle                   `oracle`, `check_against_oracle`, `assert_close`
    Results and gradients
    Packs
    Segments and plans
    Properties               random calls
    JAX's transforms
    Ways of calling          ways of calling, times kinds of launch
    Many devices
    Wrong calls
    Versions and fallbacks
    What compiles            for every GPU, without a GPU
    GPU only
    README
    Harness                  interpreters, emulator, recorded launches, order of the cases
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
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from typing import Any

import pytest

# Script run ---------------------------------------------------------------------------------------
# This part must stay above the import of JAX, which reads XLA_FLAGS.

SCRIPT = "LIGHTNING_ATTN_TEST_SCRIPT"  # the variable that tells workers of a script run
DEVICES = "wants 8 CPU devices"
BESIDE = pathlib.Path(__file__).resolve().with_name("lightning_attn.py")
PATH_NAMES = {
    "xla": "plain JAX",
    "gpu": "kernels on a GPU",
    "interpreter": "Triton kernels in Triton's interpreter",
    "gluon": "Gluon kernel on an emulator",
}


def file_under_test():
    spec = None if BESIDE.exists() else importlib.util.find_spec("lightning_attn")
    return pathlib.Path(spec.origin) if spec else BESIDE


def main(arguments):
    """Runs all cases, cases by name (`::NAME`), or with `--devices` those that want 8 devices.

    pytest gets all other arguments.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"python {os.path.relpath(__file__)} [::NAME ...] [--devices] [pytest's arguments]\n")
        print(" ".join(main.__doc__.split()) + "\n")
    devices = "--devices" in arguments
    arguments = [a for a in arguments if a != "--devices"]
    arguments = [__file__ + a if a.startswith("::") else a for a in arguments]
    os.environ[SCRIPT] = "devices" if devices else "all"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = "--xla_force_host_platform_device_count=8 --xla_gpu_autotune_level=0"
    if devices or not (shutil.which("nvidia-smi") or shutil.which("rocm-smi")):
        # on a CPU, compiling takes most of the time
        flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    if devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if not any("::" in a for a in arguments):
        if importlib.util.find_spec("xdist"):
            if not any(a.startswith(("-n", "--numprocesses", "--pdb")) for a in arguments):
                arguments = ["-n", str(len(os.sched_getaffinity(0))), *arguments]
            # By default the first worker gets the first cases, and those are the longest.
            arguments = ["--maxschedchunk", "1", *arguments]
        arguments = [__file__, *arguments]
    style = ["-q", "-p", "no:warnings", "-o", "console_output_style=count"]
    leave(pytest.main([*style, *arguments], [Summary()]))


def leave(code=0):
    """Skips Python's shutdown, in which nanobind lists objects of JAX as leaked."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


class Summary:
    """A pytest plugin that says what passed, and which commands run the failed cases again."""

    def pytest_terminal_summary(self, terminalreporter):
        def reports(outcome):
            found, own = terminalreporter.stats.get(outcome, []), pathlib.Path(__file__).name
            return [r for r in found if r.nodeid.partition("::")[0].endswith(own)]

        def counts(reports, kind):
            counted = collections.Counter(map(kind, reports)).most_common()
            return ", ".join(f"{what}: {n}" for what, n in counted)

        def path(report):
            words = re.split(r"[\[\]-]", report.nodeid.rpartition("::")[2])
            return next((PATH_NAMES[word] for word in words if word in PATH_NAMES), "all else")

        def command(report):
            _, colons, name = report.nodeid.partition("::")
            file, run = os.path.relpath(__file__), os.environ.get(SCRIPT)
            if run is None:
                return shlex.join(["python", "-m", "pytest", file + colons + name])
            devices = ["--devices"] * (run == "devices")
            return shlex.join(["python", file, *devices, *filter(None, [colons + name])])

        passed, skipped = reports("passed"), reports("skipped")
        broken = reports("failed") + reports("error")
        reason = lambda report: report.longrepr[2].removeprefix("Skipped: ")
        total = len(passed) + len(skipped) + len(broken)
        words = [f"Tested {file_under_test()}: {total} cases."]
        words += [f"{len(passed)} passed ({counts(passed, path)})."] if passed else []
        words += [f"{len(broken)} FAILED." if broken else "None failed." if total else "None ran."]
        words += [f"{len(skipped)} skipped ({counts(skipped, reason)})."] if skipped else []
        again = ["To run the failed cases again:"] * bool(broken)
        again += dict.fromkeys(map(command, broken))
        terminalreporter.write_line("\n" + "\n".join([*again, " ".join(words)]))


if __name__ == "__main__":
    main(sys.argv[1:])
if SCRIPT in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(leave)

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
HAS_DEVICES = not HAS_GPU and len(jax.devices()) >= 8
if not HAS_GPU:
    la.GROUP = 128  # tokens that plain JAX unrolls: compiling takes most of the time


def in_project():
    """Whether this file lies in the project. A README beside a copy is somebody else's."""
    about, readme = PROJECT / "pyproject.toml", PROJECT / "README.md"
    if not (about.exists() and readme.exists()):
        return False
    title = re.match(r"# lightning.attn", readme.read_text(), re.IGNORECASE)
    return 'name = "lightning-attn-jax"' in about.read_text() and title is not None


wants_project = pytest.mark.skipif(not in_project(), reason="not in the project's folder")
wants_gpu = pytest.mark.skipif(not HAS_GPU, reason="wants a GPU")
wants_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
wants_8_cpus = pytest.mark.skipif(not HAS_DEVICES, reason=DEVICES)

# Paths --------------------------------------------------------------------------------------------

# The paths on which an interpreter runs the kernels.
INTERPRETED = ["interpreter"] * (HAS_TRITON and not HAS_GPU)
INTERPRETED += ["gluon"] * bool(INTERPRETED and la._HAS_HOPPER)


def path_param(path):
    reason = "the GPU runs these kernels" if HAS_GPU else "no Triton for this path"
    skipped = pytest.mark.skipif(path not in INTERPRETED, reason=reason)
    return param(path, marks={"xla": (), "gpu": wants_gpu}.get(path, skipped))


PATHS = list(map(path_param, ("xla", "interpreter", "gluon", "gpu")))
each_path, each_kernel_path = parametrize("path", PATHS), parametrize("path", PATHS[1:])
each_direction = parametrize("reverse", [False, True], ids=["forward", "reverse"])


def each_row(names, rows, id):
    """Parametrizes by rows of a table. Each id is the format `id` with the values of the row."""
    ids = [id.format(**dict(zip(names.split(", "), row))) for row in rows]
    return parametrize(names, rows, ids=ids)


def both_directions(*values, id):
    """Two cases, one for each direction, which is their last value."""
    directions = {"forward": False, "reverse": True}
    return [param(*values, reverse, id=f"{id}-{name}") for name, reverse in directions.items()]


def module_of(path):
    """The module that runs on a path: lightning_attn.py, or its copy for an interpreter."""
    return interpreted(path) if path in INTERPRETED else la


def run_on(path, *args, **kwargs):
    """Calls lightning_attn on a path."""
    backend = "xla" if path == "xla" else "triton"
    return module_of(path).lightning_attn(*args, **kwargs, backend=backend)


@pytest.fixture
def precise():
    with jax.default_matmul_precision("highest"):
        yield


# Oracle -------------------------------------------------------------------------------------------

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
    assert len(got) == (6 if path in INTERPRETED else 7)
    for dg in got[6:]:
        assert error_of_dg(dg, want, size) < DG_BAR[dtype], (dg, want, size)


def inputs(seed, B, T, H, Hk, K, V, dtype="float32", n=None):
    """Random q, k, v, s0, do and ds, of n sequences."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    state = lambda: jnp.asarray(rng.standard_normal((n or B, H, K, V)), jnp.float32)
    q, k, v = draw(B, T, H, K), draw(B, T, Hk, K), draw(B, T, Hk, V)
    return q, k, v, state(), draw(B, T, H, V), state()


def decays(H):
    """The log decays of layer 3 of 8, in float64."""
    return np.asarray(lightning_g_gamma(H, 3, 8), np.float64)


def int32(cu):
    """Boundaries as an array for JAX. A batch has None."""
    return None if cu is None else jnp.asarray(cu, jnp.int32)


@functools.cache
def compiled_on(path, **kwargs):
    """A compiled `results_and_gradients`. The cache lets calls of the same shapes compile once.

    The gradient of g is plain JAX on every path. Where an interpreter runs the kernels, the cases
    of plain JAX cover that gradient.
    """

    @jax.jit
    def run(q, k, v, s0, g, do, ds, cu):
        def f(q, k, v, s0, g):
            options = dict(initial_state=s0, g_gamma=g, cu_seqlens=cu)
            return run_on(path, q, k, v, **options, **kwargs)

        if path in INTERPRETED:
            out, back = jax.vjp(lambda *args: f(*args, g), q, k, v, s0)
        else:
            out, back = jax.vjp(f, q, k, v, s0, g)
        return *out, *back((do, ds))

    return run


def results_and_gradients(path, q, k, v, s0, do, ds, g, cu=None, **kwargs):
    """[o, s, dq, dk, dv, ds0, dg] on a path, as `oracle` lists them. Interpreters leave out dg."""
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
    ],
)
def test_batch(path, B, T, H, Hk, K, V, reverse):
    check_against_oracle(path, *inputs(0, B, T, H, Hk, K, V), reverse=reverse)


@each_path
@parametrize(
    "dtype, reverse", [("bfloat16", False), ("float16", True)], ids=["bfloat16", "float16"]
)
def test_16_bit(path, reverse, dtype):
    batch = inputs(2, 2, 150, 2, 1, 32, 16, dtype)
    check_against_oracle(path, *batch, reverse=reverse)
    pack = inputs(2, 1, 150, 2, 1, 32, 16, dtype, n=3)
    check_against_oracle(path, *pack, reverse=reverse, cu=[0, 9, 100, 140])


WIDE = {  # tokens and boundaries: two lengths whose values are cut, segments, segments of a pack
    "short": (300, None),
    "middle": (2048, None),
    "long": (8192, None),
    "packed": (8192, [0, 20, 20, 5000, 8100]),
}


@wants_gpu
@parametrize("dtype", ["bfloat16", "float32"])
@parametrize("D", [128, 256])
@parametrize("length", WIDE)
def test_heads_of_128_and_256(length, D, dtype):
    """The kernels that models run, against plain JAX in float32."""
    T, cu = WIDE[length]
    operands = inputs(13, 1, T, 4, 2, D, D, dtype, n=cu and len(cu) - 1)
    g = np.array([0, -1e-3, -0.05, -2])
    got = results_and_gradients("gpu", *operands, g, cu)
    wide = [x.astype(jnp.float32) for x in operands]
    want = results_and_gradients("xla", *wide, g, cu)
    for name, a, b in zip(NAMES[:6], got, want):
        assert max(errors(a, b, name)) < (1e-4 if dtype == "float32" else 1e-2), name


@parametrize("path", [path_param("gluon")])
@parametrize("T, cu", [(130, None), (200, [0, 70, 70, 190])], ids=["batch", "packed"])
def test_programs_that_take_half_the_values(path, T, cu, monkeypatch):
    LAUNCHED.clear()
    monkeypatch.setattr(config_of_gluon, "num_sms", 132)
    check_against_oracle(path, *inputs(14, 1, T, 2, 1, 128, 128, n=cu and len(cu) - 1), cu=cu)
    rows = 1 if cu is None else 5  # of a pack: 3 sequences, and the tokens before and after them
    assert ("_hopper_kernel", 2 * rows * 2) in LAUNCHED


@each_path
@parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_accuracy_at_4096_tokens(path, dtype, monkeypatch):
    monkeypatch.setattr(la, "GROUP", 512)
    T = 4096
    if path in INTERPRETED or (path == "xla" and dtype != "float32"):
        T = 512  # interpreters are slow, and plain JAX adds in float32 whatever the dtype
    elif path == "xla" and not HAS_GPU:
        T = 1024
    check_against_oracle(path, *inputs(3, 1, T, 2, 2, 64, 64, dtype))


@each_path
def test_default_precision(path):
    q, k, v, s0, do, ds = inputs(4, 1, 300, 2, 1, 64, 64)
    o, s = run_on(path, q, k, v, 3, 8, initial_state=s0)
    want = oracle(q, k, v, decays(2), 64**-0.5, s0, do, ds)
    assert error(o, want[0]) < 2e-3 and error(s, want[1]) < 2e-3


@each_path
@parametrize(
    "g",
    [[0.0, -1e-4], [-50.0, -1e4], [0.0, -1e-30]],
    ids=["none-and-slow", "fast", "none-and-slowest"],
)
def test_extreme_decays(path, g):
    check_against_oracle(path, *inputs(5, 1, 130, 2, 2, 16, 16), g=g)


@each_path
def test_a_decay_of_minus_infinity_forgets_at_once(path):
    operands = inputs(5, 1, 130, 2, 2, 16, 16)
    of_decay = lambda g: results_and_gradients(path, *operands, np.array([g, -0.1]))
    infinite, large = of_decay(-np.inf), of_decay(-1e4)
    for a, b in zip(infinite[:6], large[:6]):
        assert np.array_equal(a, b) and np.isfinite(a).all()
    for dg, dg_of_large in zip(infinite[6:], large[6:]):
        assert dg[0] == 0 and dg[1] == dg_of_large[1]


@each_path
@parametrize("scale", [1.0, -2.5, 0.0])
def test_scale(path, scale):
    q, k, v, s0, do, ds = inputs(6, 1, 70, 2, 2, 16, 16)
    f = lambda scale: run_on(path, q, k, v, 0, 4, softmax_scale=scale, initial_state=s0)
    o, s = f(scale)
    want = oracle(q, k, v, np.asarray(lightning_g_gamma(2, 0, 4)), scale, s0, do, ds)
    assert error(o, want[0]) < 2e-3 and error(s, want[1]) < 2e-3
    traced, _ = jax.jit(f)(jnp.float32(scale))
    assert error(traced, np.asarray(o)) < 2e-3


@each_path
@parametrize("T", [0, 1])
def test_hardly_any_tokens(path, T):
    check_against_oracle(path, *inputs(10, 2, T, 2, 1, 16, 8))
    if T == 0:
        o, s = run_on(path, *inputs(10, 2, 0, 2, 1, 16, 8)[:3], 0, 4)
        assert o.shape == (2, 0, 2, 8) and s.shape == (2, 2, 16, 8) and not s.any()


@each_path
@parametrize("K, V", [(512, 16), (16, 512), (96, 192), (1, 2)])
def test_head_dims(path, K, V):
    check_against_oracle(path, *inputs(11, 1, 80, 1, 1, K, V))


@each_path
@parametrize(
    "dtype, tiny, huge",
    [("float32", 1e-40, 1e18), ("bfloat16", 1e-40, 1e18), ("float16", 1e-7, 1e2)],
    ids=["float32", "bfloat16", "float16"],
)
def test_tiny_and_huge_values(path, dtype, tiny, huge):
    """Denormal values give zeros or what is right. Nearly infinite products give no NaN."""
    q, k, v, s0, do, ds = inputs(40, 1, 70, 2, 2, 16, 16, dtype)
    g = np.array([0.0, -0.5])

    def got_and_want(q, k, v, s0):
        got = run_on(path, q, k, v, initial_state=s0, g_gamma=jnp.asarray(g, jnp.float32))
        return zip(got, oracle(q, k, v, g, 0.25, s0, do, ds)[:2])

    for a, b in got_and_want(q, k * tiny, v, s0 * 0):
        assert np.isfinite(np.asarray(a, np.float32)).all()
        assert np.abs(np.asarray(a, np.float64) - b).max() <= 200 * tiny
    bar = 2e-3 if dtype == "float32" else BAR[dtype]  # default precision: TF32 on GPUs
    large = [x.astype(dtype) for x in (q * huge, k * huge, v / huge)]
    for a, b in got_and_want(*large, s0):
        assert error(a, b) < bar


def test_float64():
    with jax.enable_x64(True):
        as_float64 = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
        q, k, v, s0, do, ds = map(as_float64, inputs(25, 2, 70, 2, 1, 8, 8))
        g = jnp.array([-0.1, -0.5], jnp.float64)
        f = lambda q, k, v, s0, g: lightning_attn(q, k, v, initial_state=s0, g_gamma=g)
        out, back = jax.vjp(f, q, k, v, s0, g)
        want = oracle(q, k, v, g, 8**-0.5, s0, do, ds)[:7]
        for name, a, b in zip(NAMES, (*out, *back((do, ds))), want, strict=True):
            assert a.dtype == jnp.float64 and error(a, b) < 1e-12, name
        f32 = lightning_attn(*(x.astype(jnp.float32) for x in (q, k, v)), 1, 4)
        assert all(x.dtype == jnp.float32 for x in f32)


def test_float64_layers():
    """Decays of float64 operands are float64, concrete or traced: 1 - 1/3 is no float32."""
    with jax.enable_x64(True):
        x = jnp.ones((1, 40, 3, 2), jnp.float64)
        layer = lambda i: lightning_attn(x, x, x, i, 3)[1]
        want = lightning_attn(x, x, x, g_gamma=(1 - 1 / 3) * -8 / 3 * np.arange(3))[1]
        assert_close([layer(1), jax.jit(layer)(1)], [want, want], 1e-13)
        traced = jax.jit(lightning_g_gamma, static_argnums=0)(3, 1, 3)
        assert lightning_g_gamma(3, 1, 3).dtype == traced.dtype == jnp.float32


def test_reference():
    for reverse in False, True:
        q, k, v, s0, do, ds = inputs(26, 1, 70, 4, 2, 8, 6, n=3)
        cu = [0, 9, 9, 60]
        options = dict(initial_state=s0, reverse=reverse, cu_seqlens=jnp.array(cu))
        got = lightning_attn_reference(q, k, v, 3, 8, **options)
        want = oracle(q, k, v, decays(4), 8**-0.5, s0, do, ds, reverse, cu)
        assert_close(got, want[:2])


def test_gradient_of_the_decay_where_one_chunk_is_all_and_heads_are_shared(precise):
    """XLA before jax 0.12 summed wrongly here, where XLA saw that the key heads were copies."""
    q, k, v, s0, do, ds = inputs(7, 1, 64, 2, 1, 8, 8)
    op = la._Op(8**-0.5, False, "xla", "highest")
    g = jnp.array([[0.0, -0.05]])
    operands = lambda k, v: la._Operands(q, k, v, g, s0[:, None])
    dg = lambda k, v: la._decay_gradient(op, operands(k, v), do, ds[:, None])
    assert_close(dg(k, v), dg(jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)))


def test_decays_that_cannot_be_checked_do_not_grow():
    """A traced decay above 0 counts as 0 and has no gradient. A decay of 0 has its whole gradient.

    Layers past the last layer have decays above 0.
    """
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 70, 4, 8)), "float32")
    g = jnp.array([0, 0.5, np.inf, -0.5])
    loss = lambda g: lightning_attn(x, x, x, g_gamma=g)[1].sum()
    value, dg = jax.jit(jax.value_and_grad(loss))(g)
    want, dwant = jax.value_and_grad(loss)(jnp.minimum(g, 0))
    assert_close(value, want)
    assert_close(dg, dwant * (g <= 0), 1e-3)
    past = jax.jit(lambda layer: lightning_attn(x, x, x, layer, 4)[1])(9)
    assert_close(past, lightning_attn(x, x, x, g_gamma=jnp.zeros(4))[1])


@each_path
def test_a_small_model_learns(path, precise):
    """Two layers learn to say which token came first, 100 tokens ago, across chunks."""
    B, T, H, D, words = 2 if path in INTERPRETED else 16, 100, 2, 16, 4
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, words, (B, T)))
    normal = lambda *shape: rng.standard_normal(shape)
    weights = lambda *shape: jnp.asarray(normal(*shape) / shape[-2] ** 0.5, jnp.float32)
    params = dict(
        embed=weights(words, H * D) * 2,
        place=jnp.asarray(normal(T, H * D), jnp.float32),
        qkv=weights(2, H * D, 3 * H * D),
        head=weights(H * D, words),
    )

    def loss(p, path):
        def layer(x, weights_and_index):
            weights, i = weights_and_index
            q, k, v = jnp.split((x @ weights).reshape(B, T, 3 * H, D), 3, axis=2)
            o, _ = run_on(path, q, k, v, i, 2)
            o = o / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-3)
            return x + o.reshape(B, T, H * D), None

        layers = p["qkv"], jnp.arange(2)
        x, _ = jax.lax.scan(layer, p["embed"][tokens] + p["place"], layers)
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

    if path in INTERPRETED:  # a step takes seconds: the first step must be plain JAX's
        assert np.allclose(losses(path, 1), losses("xla", 1), rtol=1e-5)
    else:
        assert losses(path, 100)[-1] < 0.1


# Packs --------------------------------------------------------------------------------------------


@each_path
@parametrize(
    "T, cu, reverse",
    [
        *both_directions(120, [0, 0, 5, 70, 70, 119, 120], id="empty-sequences"),
        *both_directions(150, [0, 65, 66, 140], id="padding"),
        param(130, [0, 130], True, id="one-sequence"),
        param(20, [0, 0, 0], False, id="padding-only"),
        param(7, [0, 3, 7], True, id="less-than-a-chunk"),
    ],
)
def test_packed(path, T, cu, reverse):
    operands = inputs(1, 1, T, 4, 2, 16, 24, n=len(cu) - 1)
    check_against_oracle(path, *operands, reverse=reverse, cu=cu)


@each_path
@each_direction
def test_padding_and_neighbours_may_hold_anything(path, reverse):
    """NaN in a sequence, or past the last sequence, reaches no other output and no other gradient.

    Outputs and gradients of padding are exactly 0.
    """
    cu = [0, 30, 95, 140]
    q, k, v, s0, do, ds = inputs(8, 1, 160, 2, 2, 16, 16, n=3)
    g = decays(2)
    want = oracle(q, k, v, g, 0.25, s0, do, ds, reverse, cu)

    def run(q, k, v, do):
        return results_and_gradients(path, q, k, v, s0, do, ds, g, cu, reverse=reverse)

    spoil = lambda x: x.at[:, 30:95].set(jnp.nan).at[:, 140:].set(jnp.inf)
    got = run(spoil(q), spoil(k), spoil(v), do.at[:, 140:].set(jnp.nan))
    for i in 0, 2, 3, 4:
        x, y = np.asarray(got[i]), want[i]
        assert (x[:, 140:] == 0).all()
        for part in slice(0, 30), slice(95, 140):
            assert error(x[:, part], y[:, part]) < 1e-5, NAMES[i]
    for i in 1, 5:
        assert error(np.asarray(got[i])[[0, 2]], want[i][[0, 2]]) < 1e-5, NAMES[i]
    past = lambda x: x.at[:, 140:].set(jnp.nan)
    check_dg(path, run(past(q), past(k), past(v), past(do)), want[6], want[7])
    o = run(q.at[:, :, 1].set(jnp.nan), k, v, do)[0]
    assert error(np.asarray(o)[:, :, 0], want[0][:, :, 0]) < 1e-5


@each_path
@parametrize(
    "cu, good",
    [
        param([0, 20, -5, 40, 60], [(0, 0, 20), (3, 40, 60)], id="negative"),
        param([0, 20, 2**31 - 1, 40, 60], [(0, 0, 20), (3, 40, 60)], id="huge"),
        param([0, 50, 30, 60], [(0, 0, 50)], id="overlapping"),
        param([5, 30, 60, 2**31 - 1], [(0, 5, 30), (1, 30, 60)], id="late-start-and-huge-end"),
        param([-(2**31), 2**31 - 1, -1, 0], [], id="extremes"),
        param([60, 40, 20, 0], [], id="decreasing"),
    ],
)
def test_malformed_traced_boundaries(path, cu, good):
    """Traced boundaries cannot be checked. Malformed sequences do no harm to well-formed ones.

    Every token outside of well-formed sequences has an output of 0. Every malformed sequence counts
    as empty: states and their gradients pass through.
    """
    n = len(cu) - 1
    q, k, v, s0, do, ds = inputs(9, 1, 60, 2, 2, 16, 16, n=n)
    g = np.array([-0.1, 0.0])
    bad = sorted(set(range(n)) - {i for i, _, _ in good})
    got = results_and_gradients(path, q, k, v, s0, do, ds, g, cu)
    assert np.array_equal(got[1][bad,], s0[bad,]) and np.array_equal(got[5][bad,], ds[bad,])
    with jax.default_matmul_precision("highest"):
        options = dict(g_gamma=jnp.asarray(g), initial_state=s0, cu_seqlens=int32(cu))
        assert_close(got[:2], compiled_reference(q, k, v, **options), 1e-5)
    rest, dg, squares = np.ones(60, bool), np.zeros(2), np.zeros(2)
    for i, start, end in good:
        cut, own = lambda x: x[:, start:end], slice(i, i + 1)
        want = oracle(cut(q), cut(k), cut(v), g, 0.25, s0[own], cut(do), ds[own])
        for j in 0, 2, 3, 4:
            assert error(cut(got[j]), want[j]) < 1e-5
        for j in 1, 5:
            assert error(got[j][own], want[j]) < 1e-5
        rest[start:end], dg, squares = False, dg + want[6], squares + want[7] ** 2
    check_dg(path, got, dg, np.sqrt(squares))
    for j in 0, 2, 3, 4:
        assert (np.asarray(got[j])[:, rest] == 0).all()


@each_path
@each_direction
def test_states_of_sequences_without_tokens_may_hold_anything(path, reverse):
    """NaN in the last sequence, or in the state of an empty sequence, reaches nothing else."""
    q, k, v, s0, do, ds = inputs(8, 1, 160, 2, 1, 16, 16, n=4)
    g = decays(2)
    first = [x[:, :70] for x in (q, k, v)]
    want = oracle(*first, g, 0.25, s0[:1], do[:, :70], ds[:1], reverse)

    def check(got, padding):
        for i in 0, 2, 3, 4:
            x = np.asarray(got[i])
            assert error(x[:, :70], want[i]) < 1e-5 and (x[:, padding:] == 0).all(), NAMES[i]

    # the second and the fourth sequence are empty, the third starts at -3
    spoiled = s0.at[1].set(jnp.nan).at[3].set(jnp.inf).at[2].set(jnp.nan)
    cu = [0, 70, -3, 100, 100]
    got = results_and_gradients(path, q, k, v, spoiled, do, ds, g, cu, reverse=reverse)
    check(got, 70)
    assert np.array_equal(got[5][1:], ds[1:])
    assert error(got[5][:1], want[5]) < 1e-5 and error(got[1][:1], want[1]) < 1e-5
    check_dg(path, got, want[6], want[7])
    last = [x.at[:, 70:140].set(jnp.nan) for x in (q, k, v)]
    cu = [0, 70, 140]
    got = results_and_gradients(path, *last, s0[:2], do, ds[:2], g, cu, reverse=reverse)
    check(got, 140)


@each_path
@parametrize("left", [False, True], ids=["padded-right", "padded-left"])
def test_padded_batches(path, precise, left):
    """A row with n real tokens is a pack of one sequence: results are those of its tokens alone."""
    T, lengths = 70, [70, 33, 0]
    q, k, v, s0, do, ds = inputs(50, len(lengths), T, 2, 1, 8, 8)
    g = jnp.array([-0.1, 0.0])

    def padded(q, k, v, s0, n, do, ds):
        def f(q, k, v, states):
            cu = jnp.array([0, T - n, T] if left else [0, n])
            options = dict(g_gamma=g, initial_state=states, cu_seqlens=cu)
            o, s = run_on(path, q[None], k[None], v[None], **options)
            return o[0], s[-1]

        states = jnp.stack([s0 * 0, s0]) if left else s0[None]
        (o, s), back = jax.vjp(f, q, k, v, states)
        *grads, dstates = back((do, ds))
        return o, s, *grads, dstates[-1]

    real = [slice(T - n, T) if left else slice(0, n) for n in lengths]
    for i, cut in enumerate(real):  # values of padding must reach nothing
        outside = jnp.ones(T, bool).at[cut].set(False)[:, None, None]
        q, k, v = (x.at[i].set(jnp.where(outside, 3.0, x[i])) for x in (q, k, v))
        do = do.at[i].set(jnp.where(outside, 0, do[i]))
    got = jax.jit(jax.vmap(padded))(q, k, v, s0, jnp.array(lengths), do, ds)
    for i, cut in enumerate(real):
        row, own = [x[i : i + 1, cut] for x in (q, k, v)], slice(i, i + 1)
        want = oracle(*row, g, 8**-0.5, s0[own], do[own, cut], ds[own])
        for j in 0, 2, 3, 4:
            assert error(got[j][i, cut], want[j][0]) < 1e-5
            assert left or not np.asarray(got[j][i, lengths[i] :]).any()
        assert_close((got[1][i], got[5][i]), (want[1][0], want[5][0]), 1e-5)


# Segments and plans -------------------------------------------------------------------------------


@each_path
@parametrize(
    "cu, reverse",
    [param(None, False, id="batch"), param([0, 1350, 1360, 1560], True, id="packed-reverse")],
)
def test_many_segments(path, reverse, cu):
    """Sequences of 3 segments, for heads that forget nothing, something and everything."""
    LAUNCHED.clear()
    T = 1600
    if path != "gpu":
        T, cu = 380, cu and [0, 300, 310, 370]
    operands = inputs(7, 1, T, 3, 1, 16, 24, n=cu and 3)
    check_against_oracle(path, *operands, g=[0.0, -0.01, -3.0], reverse=reverse, cu=cu)
    if path in INTERPRETED:  # 3 heads, and 2 segments of 2 pieces before the last segment
        assert {
            ("_chunk_state_kernel", 12),
            ("_state_passing_kernel", 3 if cu is None else 6),
        } < LAUNCHED


@each_path
def test_segments_with_states_of_several_tiles(path, monkeypatch):
    LAUNCHED.clear()
    monkeypatch.setattr(module_of(path), "SEGMENT", 160)
    q, k, v, s0, do, ds = inputs(7, 1, 330, 2, 1, 136, 72)
    g = [0.0, -0.01]
    if path == "interpreter":  # gradients take a minute here; other paths compare them
        with jax.default_matmul_precision("highest"):
            got = run_on(path, q, k, v, g_gamma=jnp.array(g), initial_state=s0)
        for a, b in zip(got, oracle(q, k, v, jnp.array(g), 136**-0.5, s0, do, ds)):
            assert error(a, b) < 1e-5
    else:
        check_against_oracle(path, q, k, v, s0, do, ds, g=g)
    if path in INTERPRETED:  # 2 pieces of a segment, 2 heads, 3 x 2 tiles or, for 16 bits, 2 x 2
        programs = 24 if path == "interpreter" else 16
        assert {("_chunk_state_kernel", programs), ("_state_passing_kernel", 40)} < LAUNCHED


@each_kernel_path
@parametrize(
    "cu, reverse",
    [param(None, False, id="batch"), param([0, 20, 2520, 3150], True, id="packed-reverse")],
)
def test_segments_in_pieces(path, reverse, cu, precise, monkeypatch):
    """A GPU that holds 9 or 10 programs gets 3 segments of 4 pieces.

    A head may need all pieces, some pieces, or the end of the last piece.
    """
    module = module_of(path)
    arch, _ = module._gpu()
    LAUNCHED.clear()
    num_sms = 9 if path == "interpreter" else 5
    monkeypatch.setattr(module, "_gpu", lambda: (arch, num_sms))
    T = 3200
    if path != "gpu":
        T, cu = 760, cu and [0, 5, 600, 750]
    q, k, v, s0, *_ = inputs(7, 1, T, 3, 3, 16, 8, n=cu and 3)
    g = jnp.array([0.0, -0.2 if path == "gpu" else -1.0, -3.0 if reverse else -0.002])
    options = dict(g_gamma=g, initial_state=s0, reverse=reverse, cu_seqlens=int32(cu))
    jax.clear_caches()
    assert_close(run_on(path, q, k, v, **options), run_on("xla", q, k, v, **options), 1e-5)
    if path in INTERPRETED:
        assert {
            ("_chunk_state_kernel", 24),
            ("_state_passing_kernel", 3 if cu is None else 6),
        } < LAUNCHED
    jax.clear_caches()


@wants_triton
def test_states_that_nobody_reads_are_not_written():
    """Of a gradient's scans only dv's ends in a state, and only for an initial state's gradient."""
    x = jax.ShapeDtypeStruct((4, 200, 64, 64), "bfloat16")
    s0 = jax.ShapeDtypeStruct((4, 64, 64, 64), "float32")

    def written(f, *args):
        found = recorded_launches("sm_90", f, *args)
        scans = [a for kernel, _, a, _ in found if kernel.__name__ == "_hopper_kernel"]
        return [bool(la._Params(*a["params"]).flags & la._Flags.FINAL_STATE) for a in scans]

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
def test_a_scan_and_its_transpose_sum_the_same_states():
    """Where dv and dk are two scans, their states are equal launches: XLA makes one of them."""
    x = jax.ShapeDtypeStruct((1, 4096, 2, 64), "float32")
    s0 = jax.ShapeDtypeStruct((1, 2, 64, 64), "float32")

    def loss(q, k, v, s0):
        return lightning_attn(q, k, v, 1, 2, initial_state=s0, backend="triton")[0].sum()

    found = recorded_launches("sm_80", jax.grad(loss, (0, 1, 2, 3)), x, x, x, s0)
    states = [launch[2:] for launch in found if launch[0].__name__ == "_chunk_state_kernel"]
    assert len(states) == 4 and states[2] == states[3]


@wants_triton
@each_row(
    "B, T, H, D",
    [
        (1, 32768, 32, 128),
        (1, 131072, 8, 128),
        (4, 8192, 16, 64),
        (1, 4096, 16, 128),
        (2, 8192, 16, 96),
        (2, 8192, 16, 256),
        (1, 4096, 4, 512),
    ],
    id="B{B}-T{T}-H{H}-D{D}",
)
def test_states_of_segments_take_little_memory(B, T, H, D):
    """States take a seventh of q, k, v and o at most. All these shapes have segments on an
    H100."""
    x = jax.ShapeDtypeStruct((B, T, H, D), "bfloat16")
    f = lambda q, k, v: lightning_attn(q, k, v, 12, 24, backend="triton")
    found = recorded_launches("sm_90", f, x, x, x)
    (z,) = (arrays[-1] for kernel, arrays, *_ in found if kernel.__name__ == "_chunk_state_kernel")
    assert z.dtype == "float32" and 4 * z.size <= 4 * 2 * B * T * H * D / 7


@pytest.mark.skipif(not la._HAS_HOPPER, reason="no Gluon kernel in this Triton")
@each_row(
    "dtype, H, T, n, forward, backward",
    [
        ("bfloat16", 2, 8192, 1, "_hopper_kernel 64 128", "_hopper_kernel 64 128 fused"),
        ("bfloat16", 2, 8192, 256, "_hopper_kernel 64 128", "_hopper_kernel 64 128 fused"),
        ("bfloat16", 2, 8192, 1024, "_chunk_scan_kernel 16 128", "_chunk_scan_kernel 16 128"),
        ("bfloat16", 100, 63, 1, "_chunk_scan_kernel 64 128", "_chunk_scan_kernel 64 128"),
        ("bfloat16", 2, 1023, 1, "_hopper_kernel 64 64", "_hopper_kernel 64 64"),
        ("bfloat16", 66, 2048, 1, "_hopper_kernel 64 64", "_hopper_kernel 64 128 fused"),
        ("bfloat16", 67, 2048, 1, "_hopper_kernel 64 128", "_hopper_kernel 64 128 fused"),
        ("bfloat16", 8, 1023, 16, "_hopper_kernel 64 128", "_hopper_kernel 64 128 fused"),
        ("float32", 33, 512, 1, "_chunk_scan_kernel 32 32", "_chunk_scan_kernel 32 32"),
        ("float32", 34, 512, 1, "_chunk_scan_kernel 32 64", "_chunk_scan_kernel 32 64"),
        ("float32", 2, 1024, 1, "_chunk_scan_kernel 32 128", "_chunk_scan_kernel 32 128"),
    ],
    id="{dtype}-H{H}-T{T}-n{n}",
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
        found = [(name, a) for name, a in found if "scan" in name or "hopper" in name]
        return [
            f"{name} {a['C']} {a['BV']}" + " fused" * a.get("FUSED", False) for name, a in found
        ]

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
    for precision, listed in names.items():
        for name in [*listed.split(), *([None] if precision == "tf32" else [])]:
            with jax.default_matmul_precision(name):
                ((_, _, arguments, _),) = recorded_launches("sm_80", f, x)
            assert arguments["PRECISION"] == precision, name


# Properties ---------------------------------------------------------------------------------------

EXAMPLES = {"xla": 3, "interpreter": 2, "gluon": 2, "gpu": 5}
ROUNDING = {"float32": 3e-5, "bfloat16": 1.5e-2, "float16": 2e-3}


@st.composite
def random_calls(draw):
    """Arguments of batches and packs, of all dtypes, grouped heads, and decays from none to all."""
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
    Hk, n = one_of(1, H), B if cu is None else len(cu) - 1
    q, k, v = make(B, T, H, K), make(B, T, Hk, K), make(B, T, Hk, V)
    s0 = make(n, H, K, V, dtype="float32")
    g = [one_of(0.0, -1e-3, -0.1, -2.0, -50.0) for _ in range(H)]
    return dict(q=q, k=k, v=v, s0=s0, g=g, reverse=one_of(False, True), cu=cu)


@functools.cache
def forward_on(path, reverse):
    def f(q, k, v, s0, g, cu):
        options = dict(g_gamma=g, initial_state=s0, reverse=reverse, cu_seqlens=cu)
        return run_on(path, q, k, v, **options)

    return jax.jit(f)


def property_test(check):
    """A test of `check(f, call, rng, same)` on every path.

    f runs a call, and `same` compares up to the rounding of the call's dtype.
    """

    @each_path
    def test(path):
        def f(q, k, v, s0, g, reverse, cu):
            g = jnp.asarray(g, jnp.float32)
            o, s = forward_on(path, reverse)(q, k, v, s0, g, int32(cu))
            return np.asarray(o.astype(jnp.float32)), np.asarray(s)

        @settings(
            max_examples=EXAMPLES[path],
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(random_calls())
        def search(call):
            bar = ROUNDING[str(call["q"].dtype)]

            def same(a, b):
                norm = np.linalg.norm
                assert norm(a - b) <= bar * max(norm(b), 1e-2 * b.size**0.5)

            with jax.default_matmul_precision("highest"):
                check(f, call, np.random.default_rng(0), same)

        search()

    test.__doc__ = check.__doc__
    return test


@property_test
def test_a_cut_sequence_goes_on_from_its_state(f, call, rng, same):
    B, T = call["q"].shape[:2]
    call |= dict(cu=None, s0=call["s0"][:1].repeat(B, 0))
    cut = int(rng.integers(0, T + 1))
    part = lambda a, b: call | {n: call[n][:, a:b] for n in "qkv"}
    parts = [part(0, cut), part(cut, T)]
    first, second = parts[::-1] if call["reverse"] else parts
    o1, s = f(**first)
    o2, s = f(**second | dict(s0=jnp.asarray(s)))
    o, whole = f(**call)
    same(np.concatenate([o2, o1] if call["reverse"] else [o1, o2], 1), o)
    same(s, whole)


@property_test
def test_a_pack_is_its_sequences(f, call, rng, same):
    cu = call["cu"] or [0, call["q"].shape[1]]
    call |= dict(cu=cu, **{n: call[n][:1] for n in "qkv"})
    call["s0"] = call["s0"][:1].repeat(len(cu) - 1, 0)
    o, s = f(**call)
    for i, (a, b) in enumerate(zip(cu, cu[1:])):
        tokens = {n: call[n][:, a:b] for n in "qkv"}
        o_alone, s_alone = f(**call | tokens | dict(cu=None, s0=call["s0"][i : i + 1]))
        same(o[:, a:b], o_alone)
        same(s[i : i + 1], s_alone)
    assert not o[:, cu[-1] :].any()


@property_test
def test_reverse_is_flipping(f, call, rng, same):
    o, s = f(**call)
    T, cu = call["q"].shape[1], call["cu"]
    flipped = {n: call[n][:, ::-1] for n in "qkv"} | dict(reverse=not call["reverse"])
    if cu:  # padding then comes first, as a sequence
        states = jnp.concatenate([call["s0"][:1], call["s0"][::-1]])
        flipped |= dict(cu=[0, *(T - c for c in cu[::-1])], s0=states)
    o2, s2 = f(**call | flipped)
    o2, s2 = o2[:, ::-1], s2[:0:-1] if cu else s2
    same(o2[:, : cu[-1]] if cu else o2, o[:, : cu[-1]] if cu else o)
    same(s2, s)


@property_test
def test_grouped_heads_are_repeated_ones(f, call, rng, same):
    group = call["q"].shape[2] // call["k"].shape[2]
    repeated = {n: jnp.repeat(call[n], group, 2) for n in "kv"}
    for a, b in zip(f(**call), f(**call | repeated)):
        assert np.array_equal(a, b)


@property_test
def test_later_tokens_change_nothing_before_them(f, call, rng, same):
    T = call["q"].shape[1]
    t = int(rng.integers(0, T))
    parts = [slice(0, t), slice(t, T)]
    before, later = parts[::-1] if call["reverse"] else parts
    other = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
    change = {n: call[n].at[:, later].set(other(call[n][:, later])) for n in "qkv"}
    assert np.array_equal(f(**call)[0][:, before], f(**call | change)[0][:, before])


@property_test
def test_linear_in_queries_keys_values_and_states(f, call, rng, same):
    call |= {n: call[n].astype(jnp.float32) for n in "qkv"}

    def close(a, b):
        assert np.linalg.norm(a - b) <= 3e-5 * max(np.linalg.norm(b), b.size**0.5)

    for names in ["q"], ["k", "s0"], ["v", "s0"]:
        other = {n: jnp.asarray(rng.standard_normal(call[n].shape), jnp.float32) for n in names}
        both = {n: call[n] + 2 * other[n] for n in names}
        a, b, c = f(**call), f(**call | other), f(**call | both)
        close(a[0] + 2 * b[0], c[0])
        close(a[1] if names == ["q"] else a[1] + 2 * b[1], c[1])


@property_test
def test_nothing_depends_on_its_neighbours(f, call, rng, same):
    """Two runs are bit-identical. So is a head, a row or a sequence whose neighbours become NaN."""
    (first_o, first_s), again = f(**call), f(**call)
    assert np.array_equal(first_o, again[0]) and np.array_equal(first_s, again[1])
    cu, (B, _, H, _), Hk = call["cu"], call["q"].shape, call["k"].shape[2]
    spoiled = lambda at, x: f(**call | {n: call[n].at[at].set(x) for n in "qkv"})
    if H == Hk > 1:  # the first head
        o, s = spoiled(np.s_[:, :, 0], jnp.nan)
        assert np.array_equal(o[:, :, 1:], first_o[:, :, 1:])
        assert np.array_equal(s[:, 1:], first_s[:, 1:])
    if cu:  # every sequence but the first, and the padding
        o, s = spoiled(np.s_[:, cu[1] :], jnp.inf)
        assert np.array_equal(o[:, : cu[1]], first_o[:, : cu[1]])
        assert np.array_equal(s[0], first_s[0])
        assert not o[:, cu[-1] :].any()
    elif B > 1:  # the first row
        o, s = spoiled(0, jnp.nan)
        assert np.array_equal(o[1:], first_o[1:]) and np.array_equal(s[1:], first_s[1:])


# JAX's transforms ---------------------------------------------------------------------------------

SMALL = dict(B=2, T=70, H=2, Hk=1, K=8, V=8)
ALL_OPERANDS = (0, 1, 2, 3, 4)  # q, k, v, s0 and g


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@parametrize(
    "path, mapped",
    [
        *(param("xla", mapped, id=f"xla-{mapped}") for mapped in ("q", "qkv", "s0", "g")),
        param("xla", "kv g", id="xla-kv-g"),
        # mapped operands are folded before a path is chosen: kernels see more rows and decays
        *(
            param(*path.values, "q k v s0 g", marks=path.marks, id=f"{path.values[0]}-all")
            for path in PATHS
        ),
    ],
)
def test_vmap(path, precise, mapped):
    N = 2
    q, k, v, s0, do, ds = inputs(20, N * 2, 70, 2, 1, 8, 8)
    fold = lambda x: x.reshape(N, 2, *x.shape[1:])
    g = -jnp.arange(4.0).reshape(N, 2) / 9
    args = dict(q=fold(q), k=fold(k), v=fold(v), s0=fold(s0), g=g)
    is_mapped = [n in mapped for n in args]
    axes = tuple(0 if m else None for m in is_mapped)
    args = [x if m else x[0] for m, x in zip(is_mapped, args.values())]

    def loss(q, k, v, s0, g):
        o, s = run_on(path, q, k, v, initial_state=s0, g_gamma=g)
        return (o * do[:2]).sum() + (s * ds[:2]).sum()

    grad = jax.jit(jax.grad(loss, ALL_OPERANDS))
    want = [grad(*(x[i] if m else x for m, x in zip(is_mapped, args))) for i in range(N)]
    assert_close(jax.jit(jax.vmap(grad, axes))(*args), stacked(want))
    total = jax.jit(jax.grad(lambda *a: jax.vmap(loss, axes)(*a).sum(), ALL_OPERANDS))(*args)
    assert_close(total, [jnp.stack(w) if m else sum(w) for m, w in zip(is_mapped, zip(*want))])


@each_path
@parametrize(
    "mapped, T",
    [
        param("q s0", "segments", id="q-s0-in-segments"),
        param("k v g", 1, id="k-v-g-decode"),
        param("k", 70, id="k"),
        param("v", 70, id="v"),
    ],
)
def test_rows_that_vmap_does_not_map_are_shared(path, precise, mapped, T):
    """vmap does not map the cotangent of a sum, so gradients have operands that are not mapped."""
    T = T if T != "segments" else 1100 if path == "gpu" else 200
    q, k, v, s0, _, _ = inputs(22, 3, T, 1, 1, 8, 8)
    args = dict(q=q, k=k, v=v, s0=s0, g=-jnp.arange(3.0)[:, None] / 500)
    is_mapped = [n in mapped.split() for n in args]
    axes = tuple(0 if m else None for m in is_mapped)
    args = [x if m else x[0] for m, x in zip(is_mapped, args.values())]

    def row(q, k, v, s0, g):
        def f(q, k, v, s0):
            return run_on(path, q[None], k[None], v[None], initial_state=s0[None], g_gamma=g)

        return f(q, k, v, s0), jax.grad(lambda *x: f(*x)[0].sum(), (0, 1, 2, 3))(q, k, v, s0)

    rows = [[x[i] if m else x for m, x in zip(is_mapped, args)] for i in range(3)]
    want = stacked([jax.jit(row)(*operands) for operands in rows])
    assert_close(jax.jit(jax.vmap(row, axes))(*args), want)


@wants_triton
@parametrize("T", [1, 1100])
def test_vmap_copies_nothing_that_is_not_mapped(T):
    shapes = (4, 1, T, 2, 16), (1, T, 2, 16), (1, 2, 16, 16)
    q, x, s0 = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    f = lambda q, k, v, s0: lightning_attn(q, k, v, 3, 8, initial_state=s0, backend="triton")
    found = recorded_launches("sm_80", jax.vmap(f, (0, None, None, None)), q, x, x, s0)
    rows = {
        kernel.__name__: [array.shape[0] for array in arrays[:5]] for kernel, arrays, *_ in found
    }
    scan = "_step_kernel" if T == 1 else "_chunk_scan_kernel"
    assert rows[scan] == [4, 1, 1, 1, 1], rows  # q, k, v, g, s0
    assert T == 1 or rows["_chunk_state_kernel"][:3] == [1, 1, 1], rows


@each_path
def test_vmap_of_packs(path, precise):
    q, k, v, s0, do, ds = inputs(21, 3, 70, 2, 1, 8, 8)
    cu = jnp.array([[0, 10, 70], [0, 0, 64], [0, 65, 66]])
    f = lambda q, k, v, cu: run_on(path, q[None], k[None], v[None], 1, 4, cu_seqlens=cu)
    single = functools.cache(lambda i, j: f(q[i], k[i], v[i], cu[j]))
    want = lambda *pairs: stacked([single(i, j) for i, j in pairs])
    assert_close(jax.vmap(f)(q, k, v, cu), want((0, 0), (1, 1), (2, 2)))
    assert_close(jax.vmap(f, (0, 0, 0, None))(q, k, v, cu[0]), want((0, 0), (1, 0), (2, 0)))
    shared = jax.vmap(f, (None, None, None, 0))(q[0], k[0], v[0], cu)
    assert_close(shared, want((0, 0), (0, 1), (0, 2)))


def test_vmap_over_nothing():
    x = jnp.ones((0, 1, 70, 2, 8))
    f = lambda x: lightning_attn(x, x, x, 1, 2)
    o, s = jax.vmap(f)(x)
    assert o.shape == x.shape and s.shape == (0, 1, 2, 8, 8)
    assert jax.vmap(jax.grad(lambda x: f(x)[0].sum()))(x).shape == x.shape


@each_path
def test_scan_over_layers_with_remat(path, precise):
    q, k, v, *_ = inputs(22, **SMALL)

    def loss(f):
        def layer(x, i):
            return x + f(x, k, v, i, 3)[0], None

        return lambda x: (jax.lax.scan(jax.checkpoint(layer), x, jnp.arange(3))[0] ** 2).sum()

    got = jax.jit(jax.value_and_grad(loss(functools.partial(run_on, path))))(q)
    assert_close(got, jax.value_and_grad(loss(lightning_attn_reference))(q))


@each_path
@parametrize("result", [0, 1], ids=["output", "final-state"])
def test_gradients_of_one_result(path, precise, result):
    """The other result has no cotangent, which is not the same as zeros."""
    q, k, v, s0, do, ds = inputs(28, **SMALL)
    g = jnp.linspace(-0.3, 0, q.shape[2])

    def gradients(f):
        def loss(q, k, v, s0, g):
            return (f(q, k, v, initial_state=s0, g_gamma=g)[result] * (do, ds)[result]).sum()

        return jax.jit(jax.grad(loss, ALL_OPERANDS))(q, k, v, s0, g)

    got, want = gradients(functools.partial(run_on, path)), gradients(lightning_attn_reference)
    assert_close(got, want)


@each_path
@parametrize("cu", [None, [0, 30, 30, 70]], ids=["batch", "packed"])
def test_no_final_state(path, precise, cu):
    """The output and all gradients are those of a call whose final state nobody reads."""
    q, k, v, s0, do, _ = inputs(28, 1, 70, 2, 1, 8, 8, n=cu and 3)
    cu, g = int32(cu), jnp.linspace(-0.3, 0, 2)

    def gradients(**final):
        def loss(q, k, v, s0, g):
            options = dict(initial_state=s0, g_gamma=g, cu_seqlens=cu)
            return (run_on(path, q, k, v, **options, **final)[0] * do).sum()

        return jax.jit(jax.value_and_grad(loss, ALL_OPERANDS))(q, k, v, s0, g)

    none = dict(output_final_state=False)
    assert run_on(path, q, k, v, g_gamma=g, cu_seqlens=cu, **none)[1] is None
    assert_close(gradients(**none), gradients(), 1e-6)
    token = [x[:, :1] for x in (q, k, v)]
    step = lambda **final: run_on(path, *token, 1, 2, initial_state=s0[:1], **final)[0]
    assert_close(step(**none), step(), 1e-6)


@each_path
def test_second_derivatives(path, precise):
    q, k, v, s0, do, ds = inputs(23, 1, 5, 2, 1, 3, 2)
    at = q, k, v, s0, jnp.array([-0.1, -0.7])
    along = (*inputs(29, 1, 5, 2, 1, 3, 2)[:4], jnp.array([0.3, -1.2]))
    dot = lambda xs, ys: sum(jnp.vdot(x, y) for x, y in zip(xs, ys))

    def second(f):
        loss = lambda q, k, v, s0, g: dot(f(q, k, v, initial_state=s0, g_gamma=g), (do, ds))
        first = jax.grad(loss, ALL_OPERANDS)
        return jax.jit(jax.grad(lambda *x: dot(first(*x), along), ALL_OPERANDS))(*at)

    assert_close(second(functools.partial(run_on, path)), second(lightning_attn_reference), 1e-4)


KERNEL_CALL = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")


def exported_and_back(f, *args):
    """What f(*args) returns after an export. jax.export must be told that kernels are allowed."""
    exported = jax.export.export(jax.jit(f), disabled_checks=[KERNEL_CALL])(*args)
    return jax.export.deserialize(exported.serialize()).call(*args)


@each_path
def test_other_transforms(path, precise):
    q, k, v, s0, *_ = inputs(24, **SMALL)
    f = lambda q, k, v, s0: run_on(path, q, k, v, 1, 4, initial_state=s0)
    want = f(q, k, v, s0)
    shapes = jax.eval_shape(f, q, k, v, s0)
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in want]
    if path == "xla":
        with jax.disable_jit():
            assert_close(f(q, k, v, s0), want)
    if path not in INTERPRETED:  # a Python callback cannot be exported
        assert_close(exported_and_back(f, q, k, v, s0), want)
    with jax.debug_nans(True):
        assert_close(jax.jit(f)(q, k, v, s0), want)
    donated = jax.jit(f, donate_argnums=3)(q, k, v, s0 + 0)
    assert_close(donated, want)
    results = []

    def call():
        with jax.default_matmul_precision("highest"):  # a thread starts with the default
            results.append(jax.jit(f)(q, k, v, s0))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for r in results:
        assert_close(r, want, 1e-12)


@parametrize(
    "shape, constraints",
    [param("b, 70, 2, 8", [], id="rows"), param("b, t, 2, 8", ["t >= 64"], id="rows-and-tokens")],
)
def test_export_of_symbolic_shapes(shape, constraints, precise):
    def symbolic(shape, constraints=()):
        shape = jax.export.symbolic_shape(shape, constraints=constraints)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    f = lambda backend: jax.jit(lambda x: lightning_attn(x, x, x, 1, 2, backend=backend))
    export = lambda backend, x: jax.export.export(f(backend))(x)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 70, 2, 8)), "float32")
    assert_close(export("xla", symbolic(shape, constraints)).call(x), f("xla")(x))
    if HAS_TRITON:
        with pytest.raises(ValueError, match='backend: expected "xla" for symbolic shapes'):
            export(None, symbolic(shape, constraints))
    if constraints:
        words = (
            r"query: expected a symbolic seq_len that is known to be 64 or more, got t: .*t >= 64"
        )
        with pytest.raises(ValueError, match=words):
            export("xla", symbolic(shape))
    with pytest.raises(
        ValueError, match="query: expected num_heads and head dims that are numbers"
    ):
        jax.eval_shape(f("xla"), symbolic("1, 70, h, 8"))


@parametrize("tokens, boundaries", [("t", 4), (150, "m"), ("t", "m")])
def test_export_of_symbolic_packs(tokens, boundaries, precise):
    """Packs of symbolic lengths and counts are exported once, with gradients, for all sizes."""
    symbols = {"t": "t >= 64", "m": "m >= 2"}

    def export(f, constraints):
        scope = jax.export.SymbolicScope(constraints)
        dims = [jax.export.symbolic_shape(str(x), scope=scope)[0] for x in (tokens, boundaries)]
        q = jax.ShapeDtypeStruct((1, dims[0], 2, 8), jnp.float32)
        return jax.export.export(jax.jit(f))(q, jax.ShapeDtypeStruct(dims[1:], jnp.int32))

    f = lambda x, cu: lightning_attn(x, x, x, 1, 2, cu_seqlens=cu, backend="xla")
    gradient = jax.grad(lambda x, cu: sum((y**2).sum() for y in f(x, cu)))
    rng = np.random.default_rng(0)
    known = [symbols[x] for x in (tokens, boundaries) if x in symbols]
    cuts = [[0, 70, 70, 140], [0, 1, 90, 150] if boundaries == 4 else [0, 9, 10, 80, 150]]
    for call in f, gradient:
        exported = export(call, known)
        for T, cu in zip([150, 1300 if tokens == "t" else 150], map(jnp.array, cuts)):
            x = jnp.asarray(rng.standard_normal((1, T, 2, 8)), "float32")
            assert_close(exported.call(x, cu * (T // 150)), call(x, cu * (T // 150)))
    if boundaries == "m":
        words = r"cu_seqlens: expected .* boundaries that is known to be 2 or more, got m: .*m >= 2"
        with pytest.raises(ValueError, match=words):
            export(f, known[:-1])
    if tokens == "t":  # boundaries that are known, in tokens that may be fewer
        known_cu = lambda x, cu: lightning_attn(x, x, x, 1, 2, cu_seqlens=[0, 140], backend="xla")
        assert_close(export(known_cu, known).call(x, cu), known_cu(x, cu))


@contextlib.contextmanager
def strict():
    """What a caller forbids in their own code is allowed in lightning_attn's."""
    jax.clear_caches()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@parametrize("packed", [False, True], ids=["batch", "packed"])
@parametrize("backend", ["xla", None], ids=["plain", "any-backend"])
def test_strict_promotion(packed, backend):
    q, k = jnp.ones((1, 70, 4, 8), "bfloat16"), jnp.ones((1, 70, 2, 8), "bfloat16")
    s0 = jnp.ones((2 if packed else 1, 4, 8, 8), "float16")
    g, layer = -jnp.ones(4), jnp.int32(1)
    pack = dict(cu_seqlens=jnp.array([0, 30, 60])) if packed else {}
    options = pack | dict(backend=backend)

    def loss(q, k, s0, g):
        o, s = lightning_attn(q, k, k, initial_state=s0, g_gamma=g, **options)
        return o.astype(jnp.float32).sum() + s.sum()

    with strict():
        run = jax.value_and_grad(loss, (0, 1, 2, 3))
        jax.jit(run)(q, k, s0, g)
        jax.eval_shape(jax.vmap(run), *(x[None] for x in (q, k, s0, g)))
        gradient = lambda q: jax.grad(loss)(q, k, s0, g).astype(jnp.float32).sum()
        jax.eval_shape(jax.grad(gradient), q)
        scaled = lambda i, n, scale: lightning_attn(q, k, k, i, n, scale, **options)
        jax.eval_shape(scaled, layer, layer, jnp.float32(1))
        reference = lambda q: lightning_attn_reference(q, k, k, 1, 4, initial_state=s0, **pack)
        jax.eval_shape(reference, q)
        lightning_g_gamma(4, layer, np.int16(4))


def test_nothing_is_fetched_while_tracing():
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


def test_decays_on_other_hosts_are_not_fetched(monkeypatch):
    g = jnp.array([-0.1, 0.2])
    monkeypatch.setattr(type(g), "is_fully_addressable", False)
    assert la._known(g) is None


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
    files = lambda: sorted(p.name for p in cache.iterdir() if not p.name.endswith("-atime"))
    first, cached = run(), files()
    assert cached and run() == first
    assert files() == cached


# Ways of calling ----------------------------------------------------------------------------------
#
# Every way of calling meets every kind of launch. On a CPU plain JAX computes the results, but the
# launches are traced as well, so that errors of types, effects or partitioning show. On GPUs the
# kernels run, on as many devices as there are.

# The smallest sizes that make each kind of launch.
KINDS = {
    "one-segment": dict(T=72),
    "segments": dict(T=1024),
    "parts-of-keys": dict(T=72, K=136),
    "decode": dict(T=1),
    "two-gradients-at-once": dict(T=72, K=64, V=64, dtype="bfloat16"),
    "pack": dict(B=1, T=1100, cu=[0, 20, 20, 1090], state=False),
    "pack-with-states": dict(B=1, T=1100, cu=[0, 20, 20, 1090]),
}
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
DEVICES_USED = min(8, len(jax.devices()))


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


def twice(tree):
    return jax.tree.map(lambda x: jnp.stack([x, x]), tree)


def second_of(tree):
    return jax.tree.map(lambda x: x[1], tree)


def in_a_loop(loop):
    """A way that calls the step in a loop of two rounds."""

    def way(case):
        step = case.step(case.call)
        return second_of(jax.jit(lambda args: loop(step, args))(twice(case.args)))

    return way


def by_scan(step, args):
    return jax.lax.scan(lambda carry, x: (carry, step(x)), 0, args)[1]


def by_fori_loop(step, args):
    at = lambda i: jax.tree.map(lambda x: x[i], args)
    shapes = jax.eval_shape(step, at(0))
    stacks = jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), shapes)
    body = lambda i, stacks: jax.tree.map(lambda s, x: s.at[i].set(x), stacks, step(at(i)))
    return jax.lax.fori_loop(0, 2, body, stacks)


def by_cond(step, args):
    zeros = lambda args: jax.tree.map(jnp.zeros_like, step(args))
    choose = lambda args: jax.lax.cond(args["q"][0, 0, 0, 0] < 1e9, step, zeros, args)
    return jax.lax.map(choose, args)


def by_layers(case):
    """A loss over a scan of two layers with remat. The second layer has the case's arguments."""

    def call(**args):
        def layer(carry, i):
            return carry, case.call(**args | {"q": args["q"] * (i > 0)})

        layers = jnp.arange(2).astype(args["q"].dtype)
        return second_of(jax.lax.scan(jax.checkpoint(layer), 0, layers)[1])

    return jax.jit(case.step(call))(case.args)


def by_vmap(case):
    return second_of(jax.jit(jax.vmap(case.step(case.call)))(twice(case.args)))


def by_jit(kind, is_set, rows=None, heads=None):
    """A jit whose arguments are split over rows, heads or both. `is_set`: the mesh is set."""

    def way(case):
        names = [axis for axis in (rows, heads) if axis]
        second = min(2, DEVICES_USED)
        sizes = [DEVICES_USED // (second if len(names) > 1 else 1), second]
        mesh = mesh_of(kind, **dict(zip(names, sizes)))
        args = put_args(mesh, case.specs(rows, heads)[0], case.args)
        with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
            return jax.jit(case.step(case.call))(args)

    return way


def by_shard_map(rows=None, heads=None, tokens=None, others=None, kind=AUTO, check=True):
    """Manual over one axis. `others`: the axis of a mesh that is left to the compiler."""

    def way(case):
        if tokens and (case.cu is not None or case.args["q"].shape[1] % DEVICES_USED):
            pytest.skip("these tokens cannot be split over the devices")
        axis = rows or heads or tokens
        # XLA cannot sum over a manual axis of one device beside others
        second = 2 if others and DEVICES_USED > 2 else 1
        axes = {axis: DEVICES_USED // second} | ({others: second} if others else {})
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
        args = case.args
        if others:  # the compiler splits heads, or rows
            more, _ = case.specs(None if rows else others, others if rows else None)
            both = lambda a, b: P(*(x or y for x, y in itertools.zip_longest(a, b)))
            args = put_args(mesh, {name: both(specs[name], more[name]) for name in specs}, args)
        with jax.set_mesh(mesh):
            return jax.jit(case.step(lambda **args: part(args)))(args)

    return way


WAYS = {
    "eager": lambda case: case.step(case.call)(case.args),
    "vmap": by_vmap,
    "remat-of-layers": by_layers,
    "export": lambda case: exported_and_back(case.step(case.call), case.args),
    "scan": in_a_loop(by_scan),
    "fori-loop": in_a_loop(by_fori_loop),
    "cond": in_a_loop(by_cond),
    "jit-rows": by_jit(AUTO, False, rows="a"),
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
    "shard_map-heads-of-explicit": by_shard_map(heads="a", others="b", kind=EXPLICIT),
    "shard_map-tokens-of-auto-unchecked": by_shard_map(tokens="a", others="b", check=False),
    "shard_map-tokens-of-explicit": by_shard_map(tokens="a", others="b", kind=EXPLICIT),
}


def on_cpus(way, kind):
    """Whether a CPU runs the case. Other cases cover the rest there: a jit over rows and heads, a
    scan, which is a loop as well, and for eager calls the jits that a call is made of."""
    if way == "eager":
        return kind in ("decode", "pack")
    return way not in ("jit-rows", "jit-explicit-rows", "fori-loop", "cond")


@pytest.mark.skipif(not (HAS_DEVICES or HAS_GPU), reason=DEVICES)
@parametrize(
    "way, kind",
    [
        param(way, kind, id=f"{way}-{kind}")
        for kind, way in itertools.product(KINDS, WAYS)
        if HAS_GPU or on_cpus(way, kind)
    ],
)
def test_ways_of_calling(way, kind, precise, monkeypatch):
    monkeypatch.setattr(la, "GROUP", 128)
    made, (results, gradients) = case(kind)
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


# Many devices -------------------------------------------------------------------------------------

if not HAS_DEVICES:

    def test_on_8_devices():
        """Runs the cases that want 8 CPU devices as a script: this process has no such devices."""
        env = {n: x for n, x in os.environ.items() if not n.startswith("PYTEST_") and n != SCRIPT}
        command = [sys.executable, __file__, "--devices"]
        ran = subprocess.run(command, capture_output=True, text=True, env=env)
        assert ran.returncode == 0 and DEVICES not in ran.stdout, ran.stdout + ran.stderr


each_axis_type = parametrize("kind", [AUTO, EXPLICIT], ids=lambda kind: kind.name)
each_check = parametrize("check", [True, False], ids=["checked", "unchecked"])
QKV = (0, 1, 2)

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(compiled):
    """(operation, elements of its largest result) of every collective in compiled HLO."""

    def size(shapes):
        dims = [dims.split(",") for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        return max(math.prod(int(n) for n in numbers if n) for numbers in dims)

    return [(op, size(shapes)) for shapes, op in COLLECTIVE.findall(compiled.as_text())]


def loss_and_gradients(f):
    """A compiled function that returns ((loss, results), gradients) of f(q, k, v, s0, g)."""

    def loss(q, k, v, s0, g, do, ds):
        o, s = f(q, k, v, s0, g)
        return (o * do).sum() + (s * ds).sum(), (o, s)

    return jax.jit(jax.value_and_grad(loss, ALL_OPERANDS, has_aux=True))


def sum_of_squares(f):
    """A loss: the sum of the squares of all results of f."""
    return lambda *args: sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(f(*args)))


def gradients_of(f, operands=QKV):
    return jax.jit(jax.grad(sum_of_squares(f), operands))


def of_layer_1(q, k, v, **kwargs):
    return lightning_attn(q, k, v, 1, 4, **kwargs)


def with_state_and_decay(q, k, v, s0, g, **kwargs):
    return lightning_attn(q, k, v, initial_state=s0, g_gamma=g, **kwargs)


@wants_8_cpus
@parametrize(
    "kind, shape, spec",
    [
        param("Auto", (8,), P("a"), id="rows"),
        param("Auto", (4,), P(None, None, "a"), id="heads"),
        param("Auto", (2, 4), P("a", None, "b"), id="rows-and-heads"),
        param("Auto", (4, 2), P(("a", "b")), id="rows-over-two-axes"),
        param("Auto", (2, 4), P("a", "b"), id="rows-and-tokens"),
        param("Auto", (2, 4), P("a", None, None, "b"), id="rows-and-head-dims"),
        param("Explicit", (2, 4), P("a", None, "b"), id="explicit-rows-and-heads"),
        param("Explicit", (2, 4), P("a", "b"), id="explicit-rows-and-tokens"),
    ],
)
def test_sharded_by_jit(precise, kind, shape, spec):
    """The sharding rule lies outside of the choice of platform, so these results hold for GPUs."""
    q, k, v, s0, do, ds = inputs(30, 8, 72, 8, 4, 8, 8)
    operands = q, k, v, s0, lightning_g_gamma(8, 1, 4), do, ds
    step = loss_and_gradients(with_state_and_decay)
    want = step(*operands)
    mesh = mesh_of(getattr(jax.sharding.AxisType, kind), **dict(zip("ab", shape)))
    row, tokens, head = (*spec, None, None)[:3]
    state, decay = P(row, head), P(head)
    with jax.set_mesh(mesh):
        args = put(mesh, (spec, spec, spec, state, decay, spec, state), operands)
        compiled = step.lower(*args).compile()
        got = compiled(*args)
    assert_close(got, want, 1e-5)
    if len(spec) == 4:  # a sharded head dim is gathered, and XLA may choose where
        return
    (_, results), gradients = got
    specs = None if tokens else spec, state, spec, spec, spec, state, decay
    for x, s in zip((*results, *gradients), specs):
        assert s is None or x.sharding.is_equivalent_to(NamedSharding(mesh, s), x.ndim)
    if tokens is None:  # the loss and g_gamma's gradient are summed; nothing larger moves
        found = collectives(compiled)
        assert all(op == "all-reduce" and size <= 8 for op, size in found), found


@wants_8_cpus
@each_axis_type
@parametrize("H, Hk", [(16, 4), (24, 3)])
def test_more_devices_than_kv_heads(precise, kind, H, Hk):
    """Queries stay where they are, and each device takes its key head.

    Of 24 query heads a device has 3, which may share 2 key heads: only their results are checked.
    """
    arrays = inputs(33, 2, 72, H, Hk, 8, 8)[:3]
    args = put(mesh_of(kind, h=8), (P(None, None, "h"), P(), P()), arrays)
    compiled = jax.jit(of_layer_1).lower(*args).compile()
    assert_close(compiled(*args), of_layer_1(*arrays), 1e-6)
    assert H == 24 or not collectives(compiled)
    assert_close(gradients_of(of_layer_1)(*args), gradients_of(of_layer_1)(*arrays), 1e-5)


@wants_8_cpus
@each_axis_type
def test_one_axis_for_rows_of_queries_and_heads_of_keys(precise, kind):
    arrays = inputs(33, 8, 72, 8, 8, 8, 8)[:3]
    heads = P(None, None, "a")
    args = put(mesh_of(kind, a=8), (P("a"), heads, heads), arrays)
    assert_close(jax.jit(of_layer_1)(*args), of_layer_1(*arrays), 1e-6)


@wants_8_cpus
@each_axis_type
@parametrize("what", ["numpy", "constants", "constraints"])
def test_a_mesh_that_is_set_and_arguments_that_are_not_committed(precise, kind, what):
    if what == "constraints" and kind == EXPLICIT:
        pytest.skip("shardings of Explicit axes are types, not constraints")
    arrays = [np.asarray(x) for x in inputs(35, 8, 72, 4, 2, 8, 8)[:3]]

    def f(*args):
        if what == "constraints":
            args = (jax.lax.with_sharding_constraint(x, P("a", None, "b")) for x in args)
        return of_layer_1(*args)

    step = jax.grad(sum_of_squares(f), QKV)
    want = step(*arrays) if what != "constraints" else gradients_of(of_layer_1)(*arrays)
    with jax.set_mesh(mesh_of(kind, a=4, b=2)):
        if what == "constants":
            got = jax.jit(lambda: step(*map(jnp.asarray, arrays)))()
        else:
            got = jax.jit(step)(*arrays)
    assert_close(got, want, 1e-5)


@wants_8_cpus
@each_check
def test_seq_axis_with_a_state_that_is_the_same_on_all_devices(precise, check):
    """The state is made inside, or is replicated, beside a second axis that splits rows."""
    q, k, v, s0, *_ = inputs(36, 2, 128, 4, 2, 8, 8)
    mesh, tokens = mesh_of(AUTO, d=2, t=4), P("d", "t")

    def whole(q, k, v, s):
        state = jnp.zeros_like(s0) if s is None else jnp.repeat(s, 2, 0)
        return of_layer_1(q, k, v, initial_state=state)

    def part(q, k, v, s):
        state = jnp.zeros((q.shape[0], 4, 8, 8)) if s is None else s
        return of_layer_1(q, k, v, initial_state=state, seq_axis="t")

    specs = dict(in_specs=(tokens, tokens, tokens, P()), out_specs=(tokens, P("d")))
    part = jax.shard_map(part, mesh=mesh, check_vma=check, **specs)
    for state in s0[:1], None:
        operands = QKV if state is None else (0, 1, 2, 3)
        got, want = (gradients_of(f, operands)(q, k, v, state) for f in (part, whole))
        assert_close(got, want, 1e-5)


@wants_8_cpus
@each_check
def test_seq_axis_of_two_axes(precise, check):
    arrays = inputs(37, 2, 128, 4, 2, 8, 8)[:4]
    tokens = P(None, ("a", "b"))
    mesh = dict(mesh=mesh_of(AUTO, a=2, b=4), check_vma=check)
    specs = tokens, tokens, tokens, P()
    whole = lambda q, k, v, s, **kw: of_layer_1(q, k, v, initial_state=s, **kw)
    part = functools.partial(whole, seq_axis=("a", "b"))
    part_output = lambda *args: part(*args, output_final_state=False)[0]
    both = jax.shard_map(part, in_specs=specs, out_specs=(tokens, P()), **mesh)
    output = jax.shard_map(part_output, in_specs=specs, out_specs=tokens, **mesh)
    gradients = lambda f: gradients_of(f, (0, 1, 2, 3))(*arrays)
    assert_close(jax.jit(both)(*arrays), whole(*arrays), 1e-5)
    assert_close(gradients(both), gradients(whole), 1e-5)
    assert_close(gradients(output), gradients(lambda *args: whole(*args)[0]), 1e-5)


def test_seq_axis_of_vmap():
    """Only a shard_map splits a sequence: the gradient would not know an axis that vmap names."""
    x = jnp.ones((4, 1, 8, 2, 8))
    f = lambda x: lightning_attn(x, x, x, 0, 1, seq_axis="i")
    words = "seq_axis: expected an axis of a shard_map around this call, got 'i'"
    with pytest.raises(ValueError, match=words):
        jax.vmap(f, axis_name="i")(x)


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
def test_no_tracer_leaks_and_no_constants(precise):
    q, k, v = arrays = inputs(38, 8, 72, 4, 2, 8, 8)[:3]
    args = put(mesh_of(AUTO, a=8), [P("a")] * 3, arrays)
    jax.clear_caches()
    with jax.checking_leaks():
        got = gradients_of(of_layer_1)(*args)
    assert_close(got, gradients_of(of_layer_1)(*arrays), 1e-5)

    def folded(x):
        with jax.ensure_compile_time_eval():
            return x + of_layer_1(q, k, v)[0]

    assert_close(jax.jit(folded)(q), q + of_layer_1(q, k, v)[0], 1e-5)


@wants_8_cpus
@parametrize("spec", [P("a"), P(None, None, "a")], ids=["rows", "heads"])
def test_one_kv_head_sharded_by_jit(precise, spec):
    """Every device has the only key head: rows and query heads stay where they are."""
    q, k, v, s0, do, ds = inputs(34, 4, 72, 8, 1, 8, 8)
    operands = q, k, v, s0, lightning_g_gamma(8, 1, 4), do, ds
    step = loss_and_gradients(with_state_and_decay)
    row, _, head = (*spec, None, None)[:3]
    specs = spec, P(row), P(row), P(row, head), P(head), spec, P(row, head)
    args = put(mesh_of(AUTO, a=4), specs, operands)
    compiled = step.lower(*args).compile()
    assert_close(compiled(*args), step(*operands), 1e-5)
    found = collectives(compiled)
    assert all(op == "all-reduce" for op, _ in found), found  # sums over query heads


@wants_8_cpus
def test_packed_sharded_by_heads(precise):
    q, k, v, s0, do, ds = inputs(31, 1, 70, 8, 4, 8, 8, n=3)
    f = jax.jit(lambda *a: of_layer_1(*a[:3], initial_state=a[3], cu_seqlens=a[4]))
    operands, heads = (q, k, v, s0, jnp.array([0, 20, 20, 66])), P(None, None, "h")
    args = put(mesh_of(AUTO, h=4), (heads, heads, heads, P(None, "h"), P()), operands)
    compiled = f.lower(*args).compile()
    assert_close(compiled(*args), f(*operands), 1e-6)
    assert not collectives(compiled)


@wants_8_cpus
@parametrize(
    "path, shape, axes, reverse, check",
    [
        param("xla", (8,), (None, "a", None), False, False, id="xla-tokens-unchecked"),
        param("xla", (8,), (None, "a", None), True, True, id="xla-tokens-reverse"),
        param("xla", (2, 2, 2), ("a", "b", "c"), False, True, id="xla-all"),
        param("xla", (2, 2, 2), ("a", "b", "c"), True, False, id="xla-all-reverse-unchecked"),
        param("xla", (4,), ("a", None, None), False, True, id="xla-rows"),
        param(
            *("interpreter", (2, 2), (None, "a", "b"), True, True),
            id="interpreter-tokens-and-heads",
            marks=wants_triton,
        ),
    ],
)
def test_shard_map(precise, shape, axes, reverse, check, path):
    B, T = (1, 64) if path in INTERPRETED else (4, 128)
    q, k, v, s0, do, ds = inputs(32, B, T, 4, 2, 8, 8)
    row, token, head = axes
    operands = q, k, v, s0, -0.05 * jnp.arange(4), do, ds

    def whole(q, k, v, s0, g, **kw):
        return run_on(path, q, k, v, initial_state=s0, g_gamma=g, reverse=reverse, **kw)

    want = loss_and_gradients(whole)(*operands)
    mesh = mesh_of(AUTO, **dict(zip("abc", shape)))
    tokens, state = P(row, token, head), P(row, head)
    part = jax.shard_map(
        functools.partial(whole, seq_axis=token),
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, state, P(head)),
        out_specs=(tokens, state),
        check_vma=check,
    )
    compiled = loss_and_gradients(part).lower(*operands).compile()
    assert_close(compiled(*operands), want, 1e-5)
    if check and path == "xla":
        # states are gathered once in each direction; the loss and g's gradient are summed
        states = s0.size // (1 if token == "a" else 4) * mesh.shape[token] if token else 0
        found = collectives(compiled)
        gathered = [size for op, size in found if op == "all-gather"]
        assert gathered == ([states] * 2 if token else []), found
        others = [(op, size) for op, size in found if op != "all-gather"]
        assert all(op == "all-reduce" and size <= 8 for op, size in others), found


@wants_8_cpus
def test_everything_inside_shard_map(precise):
    """vmap, second derivatives of layers with remat, vmap of shard_map, and packs per device."""
    mesh = mesh_of(AUTO, b=2, h=2, t=2)
    g, rng = -0.05 * jnp.arange(4), np.random.default_rng(34)
    draw = lambda *shape: [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3)]
    square = lambda f: lambda *a: sum((y**2).sum() for y in jax.tree.leaves(f(*a)))
    gradient = lambda f: jax.grad(square(f), (0, 1, 2, 3))
    whole = lambda q, k, v, g, **kw: lightning_attn(q, k, v, g_gamma=g, **kw)
    tokens, state = P("b", "t", "h"), P("b", "h")

    def split(f, qkv, *more, out, **kw):
        specs = dict(in_specs=(qkv, qkv, qkv, P("h"), *more), out_specs=out)
        return jax.shard_map(functools.partial(f, **kw), mesh=mesh, check_vma=True, **specs)

    args = *draw(3, 4, 32, 4, 8), g
    many = lambda q, k, v, g, **kw: jax.vmap(lambda *qkv: whole(*qkv, g, **kw))(q, k, v)
    mapped_tokens, mapped_state = P(None, *tokens), P(None, *state)
    inside = split(many, mapped_tokens, out=(mapped_tokens, mapped_state), seq_axis="t")
    outside = split(whole, tokens, out=(tokens, state), seq_axis="t")
    outside = jax.vmap(outside, (0, 0, 0, None))
    results, gradients = jax.jit(many)(*args), jax.jit(gradient(many))(*args)
    for f in inside, outside:
        assert_close(jax.jit(f)(*args), results, 1e-5)
        assert_close(jax.jit(gradient(f))(*args), gradients, 1e-5)

    def layers(q, k, v, g, **kw):
        def layer(x, i):
            return x + whole(x, k, v, g * (1 - i / 3), **kw)[0], None

        return jax.lax.scan(jax.checkpoint(layer), q, jnp.arange(2.0))[0]

    args = *draw(2, 32, 4, 8), g
    inside = split(layers, tokens, out=tokens, seq_axis="t")
    assert_close(jax.jit(gradient(inside))(*args), jax.jit(gradient(layers))(*args), 1e-5)
    second = lambda f: jax.jit(gradient(gradient(f)))(*args)
    assert_close(second(inside), second(layers), 1e-5)

    q, k, v = draw(2, 70, 4, 8)
    cu = jnp.array([[0, 10, 70], [0, 64, 66]])
    pack = lambda q, k, v, g, cu: whole(q, k, v, g, cu_seqlens=cu[0])
    rows = P("b", None, "h")
    got = jax.jit(split(pack, rows, P("b"), out=(rows, state)))(q, k, v, g, cu)
    row = lambda i: [x[i : i + 1] for x in (q, k, v)]
    want = [whole(*row(i), g, cu_seqlens=cu[i]) for i in range(2)]
    assert_close(got, jax.tree.map(lambda *x: jnp.concatenate(x), *want), 1e-5)


@wants_8_cpus
def test_training_step_on_data_tensor_and_sequence_parallel_devices(precise):
    B, T, H, D = 4, 64, 4, 8
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((2, 3, H, D, H, D)) / 6, jnp.float32)
    x, y = (jnp.asarray(rng.standard_normal((B, T, H, D)), jnp.float32) for _ in range(2))

    def training_step(attention):
        def loss(w, x, y):
            def layer(x, weights_and_index):
                w, i = weights_and_index
                q, k, v = jnp.einsum("bthd,chdge->cbtge", x, w)
                return x + attention(q, k, v, i), None

            out, _ = jax.lax.scan(layer, x, (w, jnp.arange(2)))
            return ((out - y) ** 2).mean()

        return jax.jit(lambda w, x, y: w - 0.1 * jax.grad(loss)(w, x, y))

    mesh, tokens = mesh_of(AUTO, data=2, tensor=2, seq=2), P("data", "seq", "tensor")
    parallel = jax.shard_map(
        lambda q, k, v, g: lightning_attn(q, k, v, g_gamma=g, seq_axis="seq")[0],
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, P("tensor")),
        out_specs=tokens,
    )
    # the decays of all heads are cut among devices
    on_devices = lambda q, k, v, i: parallel(q, k, v, lightning_g_gamma(H, i, 2))
    want = training_step(lambda q, k, v, i: lightning_attn(q, k, v, i, 2)[0])(w, x, y)
    args = put(mesh, (P(None, None, "tensor"), tokens, tokens), (w, x, y))
    assert_close(training_step(on_devices)(*args), want, 1e-5)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="fewer than 4 devices")
@parametrize("seq_axis", [None, "s"], ids=["rows", "tokens"])
def test_strict_promotion_on_many_devices(seq_axis):
    mesh = mesh_of(AUTO, s=4)
    x, g, s0 = jnp.ones((4, 80, 4, 8)), -jnp.ones(4), jnp.ones((4, 4, 8, 8))

    def f(x, g, s0):
        return lightning_attn(x, x, x, g_gamma=g, initial_state=s0, seq_axis=seq_axis)

    if seq_axis:
        tokens = P(None, "s")
        f = jax.shard_map(f, mesh=mesh, in_specs=(tokens, P(), P()), out_specs=(tokens, P()))
    spec = P() if seq_axis else P("s")
    x, s0 = put(mesh, (spec, spec), (x, s0))
    with strict():
        jax.jit(jax.grad(lambda *a: sum(y.sum() for y in f(*a)), QKV))(x, g, s0)


# Wrong calls --------------------------------------------------------------------------------------


def wrong_calls():
    """Cases of (arguments that differ from a good call's, error, words of its message)."""
    V, T = ValueError, TypeError
    x = lambda *shape, dtype="float32": np.ones(shape, dtype)
    q, k = x(2, 8, 4, 16), x(2, 8, 2, 16)
    pack = dict(query=q[:1], key=k[:1], value=k[:1])
    cu = lambda *c, dtype="int32": np.array(c, dtype)
    no_layer = dict(layer_idx=None, num_layers=None)

    def wrong(id, error, words, **change):
        return param(change, error, words, id=id)

    def each(argument, *cases, **others):
        """Cases (id, error, expected words, value) of an argument, beside other arguments."""
        for id, error, words, value in cases:
            words = f"{argument}: expected {words}"
            yield wrong(f"{argument}-{id}", error, words, **others, **{argument: value})

    float8 = jnp.asarray(q, "float8_e4m3fn")
    listed, wide = [0, 2**32 + 5], cu(0, 2**32 + 5, dtype="int64")
    unsigned = cu(0, 2**63 + 5, dtype="uint64")
    class_for_integer = "an integer, got <class 'ValueError'>"
    scale, end = "0 or a normal number of float32, got", "boundaries up to seq_len, 8, got"
    axis = "axis of a shard_map around this call, got"
    backends = 'None, "triton" or "xla", got'
    lengths = "These look like lengths: it takes boundaries"
    no_gpu = [("no-GPU", V, 'None or "xla" where there is no GPU', "triton")]
    no_gpu = no_gpu if HAS_TRITON and not HAS_GPU else []
    tokens_first = "query is [batch, seq_len, num_heads, head_dim], so here seq_len is 8"
    return [
        *each(
            "query",
            ("is-no-array", T, "an array, got list", [[1.0]]),
            ("rank", V, "shape [batch, seq_len, num_heads, qk_head_dim], got (8, 4, 16)", q[0]),
            ("integers", T, "floating point, got int32", q.astype("int32")),
            ("float8", T, "float32, bfloat16, float16 or float64, got float8_e4m3fn", float8),
        ),
        *each(
            "query",
            ("head-dim-513", V, "a head dim from 1 to 512, got 513", x(2, 8, 4, 513)),
            key=x(2, 8, 2, 513),
        ),
        *each(
            "query",
            ("head-dim-0", V, "a head dim from 1 to 512, got 0", q[..., :0]),
            key=k[..., :0],
        ),
        *each(
            "key",
            ("is-no-array", T, "an array, got float", 3.0),
            ("rank", V, "shape [2, 8, num_kv_heads, 16], got (8, 2, 16)", k[0]),
            ("batch", V, "shape [2, 8, num_kv_heads, 16], got (1, 8, 2, 16)", k[:1]),
            ("complex", T, "floating point, got complex64", k.astype("complex64")),
            ("dtype", T, "the dtype of query, float32, got float16", k.astype("float16")),
        ),
        wrong("key-tokens", V, "got (2, 7, 2, 16)", key=k[:, :7]),
        wrong("key-head-dim", V, "got (2, 8, 2, 8)", key=k[..., :8]),
        wrong("key-without-heads", V, "got 0 and 4", key=k[:, :, :0], value=k[:, :, :0]),
        *each(
            "key",
            ("heads-that-do-not-divide", V, "num_kv_heads to divide num_heads, got 2 and 3", k),
            query=x(2, 8, 3, 16),
        ),
        *each(
            "value",
            ("is-none", T, "an array, got NoneType", None),
            ("rank", V, "shape [2, 8, 2, v_head_dim], got (2, 8, 2, 16, 1)", k[..., None]),
            ("batch", V, "shape [2, 8, 2, v_head_dim], got (1, 8, 2, 16)", k[:1]),
            ("tokens", V, "shape", k[:, :7]),
            ("heads", V, "shape [2, 8, 2, v_head_dim], got (2, 8, 1, 16)", k[:, :, :1]),
            ("dtype", T, "the dtype of query, float32, got bfloat16", jnp.asarray(k, "bfloat16")),
            ("head-dim-600", V, "a head dim from 1 to 512, got 600", x(2, 8, 2, 600)),
        ),
        *each(
            "layer_idx",
            ("too-large", V, "0 to num_layers - 1, got 4 of 4", 4),
            ("negative", V, "0 to num_layers - 1, got -1", -1),
            ("huge", V, "0 to num_layers - 1, got 1000", 10**400),
            ("float", T, "an integer, got 1.5", 1.5),
            ("bool", T, "an integer, got True", True),
            ("text", T, "an integer, got '3'", "3"),
            ("list", T, "an integer, got [1]", [1]),
            ("class", T, class_for_integer, V),
            ("array", V, "a scalar, got shape (2,)", np.array([1, 2])),
            ("missing", V, "layer_idx and num_layers, or g_gamma", None),
        ),
        *each(
            "layer_idx",
            ("and-num_layers-missing", V, "layer_idx and num_layers, or", None),
            num_layers=None,
        ),
        wrong(
            *("layer_idx-is-decays", T, "log decays are given by name, as g_gamma="),
            layer_idx=-x(4),
            num_layers=None,
        ),
        *each("num_layers", ("0", V, "1 to 2**31 - 1, got 0", 0), layer_idx=0),
        *each(
            "num_layers",
            ("huge", V, "1 to 2**31 - 1, got 2147483648", 2**31),
            ("text", T, "an integer, got '3'", "3"),
            ("list", T, "an integer, got [1]", [1]),
            ("class", T, class_for_integer, V),
            ("missing", V, "layer_idx and num_layers, or g_gamma", None),
        ),
        *each(
            "g_gamma",
            ("and-layer", V, "either g_gamma or layer_idx and num_layers, got both", x(4)),
        ),
        *each(
            "g_gamma",
            ("positive", V, "log decays <= 0, got 0.5", np.array([0, -1, -2, 0.5], "float32")),
            ("nan", V, "log decays <= 0, got nan", np.full(4, np.nan, "float32")),
            ("integers", T, "floating point, got int32", np.zeros(4, "int32")),
            ("size", V, "shape [4], got (3,)", x(3)),
            ("of-heads-before-tokens", V, f"shape [4], got (8,). {tokens_first}", -x(8)),
            **no_layer,
        ),
        *each(
            "softmax_scale",
            ("vector", V, "a scalar, got shape (4,)", x(4)),
            ("complex", T, "a real number, got 1j", 1j),
            ("text", T, "a real number, got 'big'", "big"),
            ("dict", T, "a real number, got {}", {}),
            ("bool", T, "a real number, got True", True),
            *((str(s), V, f"{scale} {s!r}", s) for s in (1e-40, -1e-40, 1e39, np.inf, np.nan)),
            ("numpy-1e39", V, f"{scale} 1e+39", np.float64(1e39)),
            ("huge", V, f"{scale} inf", 10**400),
        ),
        *each("reverse", ("is-no-bool", T, "True or False, got 'yes'", "yes")),
        *each("output_final_state", ("is-no-bool", T, "True or False, got 1", 1)),
        *each(
            "initial_state",
            ("rank", V, "shape [2, 4, 16, 16], got (4, 16, 16)", x(4, 16, 16)),
            ("rank-of-batch", V, "shape [2, 4, 16, 16], got (2, 16, 16)", x(2, 16, 16)),
            ("heads", V, "shape [2, 4, 16, 16]", x(2, 2, 16, 16)),
            ("count", V, "2 states, the batch, got 3", x(3, 4, 16, 16)),
            ("integers", T, "floating point, got int32", x(2, 4, 16, 16, dtype="int32")),
        ),
        wrong(
            *("initial_state-of-heads-before-tokens", V, "here seq_len is 8 and num_heads 4"),
            initial_state=x(2, 8, 16, 16),
        ),
        *each(
            "initial_state",
            ("count-packed", V, "2 states, the number of packed sequences, got 1", x(1, 4, 16, 16)),
            cu_seqlens=cu(0, 4, 8),
            **pack,
        ),
        *each(
            "initial_state",
            ("rank-packed", V, "shape [3, 4, 16, 16]", x(3, 4, 16)),
            cu_seqlens=cu(0, 4, 8, 8),
            **pack,
        ),
        *each("cu_seqlens", ("of-a-batch", V, "a batch of 1", np.array([0, 8]))),
        *each(
            "cu_seqlens",
            ("class", T, "an array, got type", V),
            ("rank", V, "shape [num_seqs + 1], got (2, 2)", np.zeros((2, 2), "int32")),
            ("float", T, "integers, got float32", cu(0, 8, dtype="float32")),
            ("text", T, "integers, got ['0', '8']", ["0", "8"]),
            ("ragged", T, "integers, got [0, [1, 8]]", [0, [1, 8]]),
            ("past-int64", T, "integers, got [0, 1180591620717411303424]", [0, 2**70]),
            ("past-int64-numpy", T, "integers, got [0, np.uint64(92", [0, np.uint64(2**63)]),
            ("of-one-boundary", V, "at least 2 boundaries, got 1", cu(0)),
            ("from-1", V, "to start at 0, got 1", cu(1, 8)),
            ("of-lengths", V, f"to start at 0, got 3 in [3 5]. {lengths}", cu(3, 5)),
            ("decreasing", V, "boundaries that do not decrease, got [0 5 3]", cu(0, 5, 3)),
            ("past-the-end", V, f"{end} 9", cu(0, 9)),
            ("past-int32", V, f"{end} 4294967301", wide),
            ("past-int32-listed", V, f"{end} 4294967301", listed),
            ("uint64", V, f"{end} 9223372036854775813", unsigned),
            **pack,
        ),
        *each(
            "backend",
            ("unknown", V, f"{backends} 'cuda'", "cuda"),
            ("array", V, f"{backends} array(", x(2)),
            *no_gpu,
        ),
        *each(
            "seq_axis",
            ("with-a-pack", V, "None with cu_seqlens", "s"),
            cu_seqlens=cu(0, 8),
            **pack,
        ),
        *each(
            "seq_axis",
            ("number", T, f"the name of an {axis} 3", 3),
            ("empty", T, f"the name of an {axis} ()", ()),
            ("of-no-mesh", V, f"an {axis} 'nowhere'", "nowhere"),
        ),
    ]


@parametrize("change, kind, words", wrong_calls())
def test_wrong_calls(change, kind, words):
    x = lambda *shape: np.ones(shape, "float32")
    operands = dict(query=x(2, 8, 4, 16), key=x(2, 8, 2, 16), value=x(2, 8, 2, 16))
    good = operands | dict(layer_idx=1, num_layers=4)
    lightning_attn(**good)
    with pytest.raises(kind) as info:
        lightning_attn(**good | change)
    assert words in str(info.value)


def test_numbers_of_any_make():
    """Numbers may be Python's, numpy's and JAX's, as scalars and as arrays without axes."""
    x = jnp.ones((1, 8, 4, 8))
    f = functools.partial(lightning_attn, x, x, x)
    want = f(1, 4, 0.5)
    for number in np.int64, np.uint8, np.array, jnp.int32, jnp.uint8:
        assert_close(f(number(1), number(4), np.float32(0.5)), want)
    for scale in np.float64(0.5), np.array(0.5), np.float16(0.5), jnp.bfloat16(0.5), jnp.array(0.5):
        assert_close(f(1, 4, scale), want)
    assert_close(f(1, 4, np.int8(2)), f(1, 4, 2))
    assert_close(lightning_g_gamma(np.int64(4), 1, 4), lightning_g_gamma(4, 1, 4))
    boundaries = [
        [0, 3, 8],
        (np.int64(0), jnp.int32(3), np.array(8)),
        np.array([0, 3, 8]),
        np.array([0, 3, 8], "uint64"),
        jnp.array([0, 3, 8], "int8"),
    ]
    want = f(1, 4, cu_seqlens=jnp.array([0, 3, 8]))
    for cu in boundaries:
        assert_close(f(1, 4, cu_seqlens=cu), want)


def test_messages_for_what_is_traced():
    x = jnp.ones((1, 8, 4, 8))
    f = functools.partial(lightning_attn, x, x, x, 1, 4)
    with pytest.raises(
        TypeError, match=r"cu_seqlens: expected .* jnp.array\(\[...\]\) or jnp.stack"
    ):
        jax.jit(lambda n: f(cu_seqlens=[0, n, 8]))(3)
    with pytest.raises(TypeError, match="reverse: expected True or False, got .*static"):
        jax.jit(lambda r: f(reverse=r))(True)
    with pytest.raises(ValueError, match="num_layers: expected 1 to 2"):
        lightning_g_gamma(4, 0, 0)
    with pytest.raises(ValueError, match="num_heads: expected a static integer .* 1, got 0"):
        lightning_g_gamma(0, 0, 1)
    with pytest.raises(ValueError, match="num_heads: expected a static integer .*Tracer"):
        jax.jit(lambda H: lightning_g_gamma(H, 0, 1))(4)
    with pytest.raises(ValueError, match="got -1 of a traced number"):
        jax.jit(lambda n: lightning_g_gamma(4, -1, n))(4)


def test_states_of_a_decode_step_get_no_hint_at_swapped_axes():
    """A wrong shape is a hint at [B, H, T, D] only where heads stand in the place of tokens."""
    x = jnp.ones((2, 1, 4, 16))
    with pytest.raises(ValueError) as info:
        lightning_attn(x, x, x, 1, 4, initial_state=jnp.ones((2, 1, 4, 16, 16)))
    assert str(info.value).endswith("got (2, 1, 4, 16, 16)")


# Versions and fallbacks ---------------------------------------------------------------------------


def test_without_triton(monkeypatch):
    """Without jax-triton the file works, and says what "triton" needs. Only GPUs get a warning."""
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare = load("lightning_attn_bare")
        bare._gpu = lambda: None
        x = jnp.ones((1, 4, 2, 8))
        bare.lightning_attn(x, x, x, 0, 1)
        bare._gpu = lambda: ("sm_90", 132)
        bare.lightning_attn(x, x, x, 0, 1, backend="xla")
    with pytest.raises(ValueError, match=re.escape(la._INSTALL)):
        bare.lightning_attn(x, x, x, 0, 1, backend="triton")
    with pytest.warns(UserWarning, match="plain-JAX path.*" + re.escape(la._INSTALL)):
        bare.lightning_attn(x, x, x, 0, 1)


@wants_triton
def test_gpus_without_matrix_products_in_triton():
    """A T4 takes plain JAX, and says so where kernels are asked for."""
    x = jax.ShapeDtypeStruct((1, 70, 2, 16), "float32")

    def call(backend):
        f = lambda x: lightning_attn(x, x, x, 1, 4, backend=backend)
        return recorded_launches("sm_75", f, x)

    assert not call(None)
    with pytest.raises(
        ValueError, match='backend: expected None or "xla" .*got "triton" and sm_75'
    ):
        call("triton")


@parametrize(
    "version, fits",
    [("0.9.2", False), ("0.10.1", False), ("0.10.2", True), ("0.13.0.dev1", True)],
)
def test_jax_that_is_too_old(version, fits, monkeypatch):
    """The plain-JAX path runs from jax 0.10.2 on. An older jax gets an ImportError."""
    monkeypatch.setattr(jax, "__version__", version)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    words = f"needs jax>=0.10.2 and found jax {version}: pip install"
    refused = pytest.raises(ImportError, match=words)
    with contextlib.nullcontext() if fits else refused:
        load("lightning_attn_old")


@wants_triton
@parametrize(
    "name, version",
    [
        ("jax", "0.11.0"),
        ("jax", "0.13.0"),
        ("jax_triton", "0.3.1"),
        ("jax_triton", "0.5.0"),
        ("triton", "3.6.0"),
        ("triton", "3.10.0"),
        param("jax_triton", None, id="jax_triton-fails-to-import"),
    ],
)
def test_versions_that_do_not_fit_the_kernels(name, version, monkeypatch):
    """One warning says what was found, what it costs and what to install. Plain JAX runs."""
    found = f"{name.replace('_', '-')} {version}"
    if version is None:
        found = "AttributeError: no such thing"

        def find_spec(module, *_):
            if module == name:
                raise AttributeError("no such thing")

        monkeypatch.delitem(sys.modules, name)
        finder = types.SimpleNamespace(find_spec=find_spec)
        monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    else:
        monkeypatch.setattr(importlib.import_module(name), "__version__", version)
    with pytest.warns(UserWarning) as caught:
        other = load("lightning_attn_unfit")
    (said,) = (str(w.message) for w in caught)
    assert found in said and "plain-JAX path" in said and la._INSTALL in said
    assert other.triton is None
    x = jnp.ones((1, 4, 2, 8))
    other.lightning_attn(x, x, x, 0, 1)


@pytest.mark.skipif(not la._HAS_HOPPER, reason="no Triton with Gluon for Hopper")
def test_triton_without_gluon_for_hopper(monkeypatch):
    """Triton 3.7 lacks the Gluon kernel's copies: Hopper gets the Triton kernel and a warning."""
    monkeypatch.delattr(la.hopper.tma, "async_load")
    other = load("lightning_attn_3_7")
    with pytest.warns(UserWarning) as caught:
        dtype = np.dtype("float16")
        config = other._config("sm_90", 132, 128, 128, dtype, 1, 8, 4096, 1, False)
    assert config.kernel is other._chunk_scan_kernel
    (said,) = (str(w.message) for w in caught)
    assert "triton" + la._HOPPER in said and f"found triton {la.triton.__version__}" in said
    other._gpu = lambda: None
    x = jnp.ones((1, 64, 2, 64), "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.lightning_attn(x, x, x, 0, 1)


@wants_triton
def test_dead_code_beside_a_kernel():
    """jax-triton's rule for dead code fits this jax: the launch stays, and dead code goes."""
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


@wants_project
def test_versions_agree():
    """The ranges and the version in pyproject.toml, README.md, the guard and the messages agree."""
    import tomllib

    about = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    readme = (PROJECT / "README.md").read_text()
    project, extras = about["project"], about["project"]["optional-dependencies"]
    kernels = la._KERNELS
    cap = kernels["jax"].partition(",")[2]
    dependencies = [x.split(";")[0].strip() for x in project["dependencies"]]
    required = dict(re.match(r"([\w-]+)(?:\[\w+\])?(.*)", x).groups() for x in dependencies)
    assert required == {"jax": f"{la._JAX},{cap}", "numpy": ""}
    for extra in "cuda13", "cuda12":
        own, wanted = extras[extra]
        assert own == "lightning-attn-jax[kernels]" and wanted == f"jax[{extra}]{kernels['jax']}"
    listed = [x.replace(" ", "") for x in extras["kernels"]]
    found = dict(re.match(r"([\w-]+)([^;]*)", x).groups() for x in listed)
    assert found == {name: kernels[name] for name in ("jax-triton", "triton")}
    assert "version" in project["dynamic"] and re.fullmatch(r"\d+\.\d+\.\d+", la.__version__)
    dynamic = about["tool"]["setuptools"]["dynamic"]
    assert dynamic["version"] == {"attr": "lightning_attn.__version__"}

    rows = [row.strip("|").split("|") for row in readme.splitlines() if row.startswith("|")]
    table = {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}
    spaced = lambda versions: versions.replace(",", ", ")
    assert table["plain JAX"] == [project["requires-python"], spaced(required["jax"]), "", ""]
    assert table["kernels"] == [">=3.12", *map(spaced, kernels.values())]
    stated = r"(jax-triton|triton|jax)\s?(>=[\d.]+(?:,\s?<[\d.]+)?)"
    for name, versions in set(re.findall(stated, readme + FILE.read_text())):
        others = [la._HOPPER] if name == "triton" else [la._JAX, f"{la._JAX},{cap}"]
        assert versions.replace(" ", "") in (kernels.get(name), *others), (name, versions)


# What compiles ------------------------------------------------------------------------------------


@wants_triton
@parametrize("arch, T", [("sm_90", 140), ("sm_80", 140), ("sm_80", 1)])
def test_offsets_past_2_31(arch, T):
    """The last program of arrays of 2^32 elements stays inside of them and writes its own rows.

    The arrays are `Endless`: nothing so large is made.
    """
    B, H, D = 2**32 // (T * 64 * 128) + 1, 64, 128
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
    """Every configuration that can be chosen compiles, fits shared memory, and hardly spills.

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
    if is_16_bit_hopper:
        sizes = (128, 192) if dtype == "float16" else (16, 64, 128, 192, 512)
    elif dtype == "float16":
        sizes = (128,)
    else:
        sizes = (16, 128, 192, 512) if arch in ("sm_80", "sm_90") else (128, 512)
    shapes = [(1, 4096, 2, D) for D in sizes] + [(1, 1, 2, 128)]
    if arch == "sm_90" and dtype != "float16":  # no argument is 1, which would be a constant
        shapes += [(2, 300, 4, 64), (2, 300, 4, 128)]
    names = "BK", "BV", "BE", "C", "IS_VARLEN", "SEGMENTED", "HAS_S0", "FUSED"
    table = {}
    for B, T, H, D in shapes:
        x = jnp.zeros((B, T, H, D), dtype)
        f = lambda q: lightning_attn(q, x, x, 12, 24, backend="triton")[0].sum()
        if D in (64, 128) and T > 1 and (arch == "sm_90" or dtype != "float16"):
            f = jax.value_and_grad(f)
        for launch in recorded_launches(arch, lambda: f(x)):
            kernel, _, arguments, options = launch
            tile = [arguments.get(n) for n in names]
            edges = [arguments[d] % arguments["B" + d] > 0 for d in "KVE" if d in arguments]
            warps_and_stages = options["num_warps"], options["num_stages"]
            key = kernel.__name__, B, *tile, *edges, *warps_and_stages
            if key in table:
                continue
            table[key] = shared, spilled = compile_as_jax_triton(*launch, arch)
            assert shared <= la._SHARED_MEMORY[arch] * 1024, (key, shared)
            # Two scans at once for head dims of 64, and programs of half the values for 128, use
            # all registers. Parts of the keys want more. Versions of ptxas and Triton differ.
            half_the_values = arguments.get("BV") == 64 and D == 128
            if (arguments.get("FUSED") and D == 64) or half_the_values:
                few = 44
            else:
                few = 512 if D > 128 else 0
            if kernel.is_gluon() and is_3_9:
                assert spilled <= few, (key, spilled)
    assert len(table) >= 4
    has_hopper = any(key[0] == "_hopper_kernel" for key in table)
    assert has_hopper == (la._HAS_HOPPER and is_16_bit_hopper)


@wants_triton
@parametrize(
    "dtype, T, D, cu",
    [
        param("bfloat16", 4096, 64, None, id="bfloat16"),
        param("bfloat16", 4096, 64, [0, 10, 4096], id="bfloat16-packed"),
        param("float32", 80, 1, None, id="float32"),
        param("float32", 1, 16, None, id="float32-decode"),
    ],
)
def test_compiles_where_all_is_one(dtype, T, D, cu):
    """One row, one head, a scale of 1: arguments that are 1 become constants of the kernels."""
    x, s0 = jnp.zeros((1, T, 1, D), dtype), jnp.zeros((1 if cu is None else 2, 1, D, D))

    def loss(x, s0):
        options = dict(cu_seqlens=None if cu is None else jnp.array(cu), backend="triton")
        return lightning_attn(x, x, x, 12, 24, 1.0, s0, **options)[0].astype(jnp.float32).sum()

    built = {}
    for launch in recorded_launches("sm_90", lambda: jax.grad(loss, (0, 1))(x, s0)):
        kernel, _, arguments, _ = launch
        # numbers in the tuple of parameters compile the same, whatever they are
        key = kernel.__name__, str(arguments | dict(params=None))
        if key not in built:
            built[key], _ = compile_as_jax_triton(*launch, "sm_90")
    assert len(built) == (4 if T > 80 else 2)  # with states given, and without


# GPU only -----------------------------------------------------------------------------------------


def normal_arrays(n, *shape, dtype="float32"):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(n)]


def float32(x):
    return x.astype(jnp.float32)


def float64(x):
    return x.astype(np.float64)


@wants_gpu
@each_direction
def test_as_many_segments_as_fill_a_gpu(reverse):
    q, k, v, s0, *_ = inputs(7, 1, 70000, 3, 3, 16, 24)
    g = jnp.array([0.0, -0.01, -3.0])
    options = dict(g_gamma=g, initial_state=s0, reverse=reverse)
    with jax.default_matmul_precision("highest"):
        got, want = (f(q, k, v, **options) for f in (lightning_attn, lightning_attn_reference))
    for a, b in zip(got, want):
        assert error(a, b) < 1e-4


@wants_gpu
def test_a_decode_step_takes_the_memory_of_its_state():
    """A donated state, or a loop's, is neither doubled nor copied. Other states do not change."""
    q, k, v, s0, *_ = inputs(28, 8, 1, 16, 16, 64, 64, "bfloat16")
    f = lambda s0, q, k, v: lightning_attn(q, k, v, 1, 2, initial_state=s0)
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

    def layers(states, q, k, v):  # states of a model are scanned over, and stacked again
        return jax.lax.scan(lambda c, s: (c, f(s, q, k, v)), 0, states)[1]

    states = jnp.stack([jnp.asarray(before)] * 3)
    got = jax.jit(layers)(states, q, k, v)
    assert_close((got[0][2], got[1][2]), f(states[0], q, k, v), 1e-6)


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
def test_four_million_tokens_in_one_sequence():
    """At chosen positions, compares with float64 sums over all tokens before that still count."""
    T, H, D = 2**22, 2, 64
    q, k, v = normal_arrays(3, 1, T, H, D, dtype=jnp.bfloat16)
    g = np.array([0.0, -0.01])
    o, s = lightning_attn(q, k, v, g_gamma=jnp.asarray(g, jnp.float32), softmax_scale=1.0)
    o = np.asarray(float32(o[0]))
    S, done = np.zeros((D, D)), 0
    for t in 0, 1000, T // 3, T - 1:
        S += float64(k[0, done : t + 1, 0]).T @ float64(v[0, done : t + 1, 0])
        done = t + 1
        assert error(o[t, 0], float64(q[0, t, 0]) @ S) < 6e-3, t
        near = slice(max(0, t - 8000), t + 1)
        weight = np.exp(g[1] * (t - np.arange(near.start, t + 1)))[:, None]
        near_S = float64(k[0, near, 1] * weight).T @ float64(v[0, near, 1])
        assert error(o[t, 1], float64(q[0, t, 1]) @ near_S) < 6e-3, t
    assert error(s[0, 0], S) < 1e-3


@wants_gpu
def test_65536_packed_sequences_of_1_to_3_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 4, 65536)
    cu = np.concatenate([[0], np.cumsum(lengths)])
    T, H, D = int(cu[-1]), 2, 16
    q, k, v, do = (rng.standard_normal((1, T, H, D), np.float32) for _ in range(4))
    g = np.array([-0.2, -1.5])

    def run(v):
        options = dict(g_gamma=jnp.asarray(g, jnp.float32), softmax_scale=1.0)
        return lightning_attn(q, k, v, cu_seqlens=int32(cu), **options)

    with jax.default_matmul_precision("highest"):
        (o, s), back = jax.vjp(run, jnp.asarray(v))
        dv = np.asarray(back((jnp.asarray(do), s * 0))[0])
    want, want_dv = np.zeros((T, H, D)), np.zeros((T, H, D))
    place = np.arange(T) - np.repeat(cu[:-1], lengths)
    for far in range(3):
        i = np.flatnonzero(place >= far)
        score = np.einsum("thd,thd->th", q[0, i], k[0, i - far]) * np.exp(g * far)
        want[i] += score[..., None] * v[0, i - far]
        want_dv[i - far] += score[..., None] * do[0, i]
    assert error(o[0], want) < 1e-5 and error(dv[0], want_dv) < 1e-5
    last = np.einsum("nhk,nhv->nhkv", k[0, cu[1:] - 1], v[0, cu[1:] - 1])
    of_one_token = lengths == 1
    assert error(np.asarray(s)[of_one_token], last[of_one_token]) < 1e-5


@wants_gpu
def test_more_than_65535_programs():
    q, k, v, s0, do, ds = inputs(41, 1100, 20, 64, 64, 16, 16, "bfloat16")
    o, s = lightning_attn(q, k, v, 3, 8, initial_state=s0)
    want, end = lightning_attn(q, k, v, 3, 8, initial_state=s0, backend="xla")
    assert error(float32(o), float32(want)) < 6e-3 and error(s, end) < 6e-3


@wants_gpu
@parametrize("dtype", ["bfloat16", "float32"])
def test_a_million_tokens_that_no_one_forgets_or_everyone_does(dtype):
    T, D = 2**20, 64
    q, k, v = normal_arrays(3, 1, T, 2, D, dtype=dtype)
    with jax.default_matmul_precision("highest"):
        o, s = lightning_attn(q, k, v, g_gamma=jnp.array([0.0, -1e4]), softmax_scale=1.0)
    state = float64(k[0, :, 0]).T @ float64(v[0, :, 0])
    assert error(s[0, 0], state) < (1e-3 if dtype == "bfloat16" else 1e-5)
    score = (float64(q[0, :, 1]) * float64(k[0, :, 1])).sum(-1, keepdims=True)
    forgets = score * float64(v[0, :, 1])
    assert error(float32(o[0, :, 1]), forgets) < (6e-3 if dtype == "bfloat16" else 1e-5)


SANITIZED = """
import jax, numpy as np
import lightning_attn as la
rng = np.random.default_rng(0)
# numpy makes every input: each of XLA's own kernels would be patched, watched and reported on
def x(*shape, dtype="bfloat16"): return jax.device_put(rng.standard_normal(shape).astype(dtype))
def run(B, T, H, Hk, D, dtype="bfloat16", cu=None, **kw):
    n = B if cu is None else len(cu) - 1
    q, k, v = (x(B, T, h, D, dtype=dtype) for h in (H, Hk, Hk))
    s0, ds = x(n, H, D, D, dtype="float32"), x(n, H, D, D, dtype="float32")
    do = x(B, T, H, D, dtype=dtype)
    g = jax.device_put(np.linspace(-1, 0, H, dtype="float32"))
    cu = None if cu is None else jax.device_put(np.array(cu, "int32"))
    @jax.jit
    def results_and_gradients(q, k, v, s0, g, do, ds, cu):
        def f(q, k, v, s0):
            return la.lightning_attn(q, k, v, g_gamma=g, initial_state=s0, cu_seqlens=cu, **kw)
        out, back = jax.vjp(f, q, k, v, s0)
        return out, back((do, ds))
    jax.block_until_ready(results_and_gradients(q, k, v, s0, g, do, ds, cu))
"""

CALLS_TO_SANITIZE = {
    "batches": """
run(1, 1100, 2, 2, 64, reverse=True)
run(2, 128, 2, 1, 128)  # its programs take half of the values
run(1, 100, 1, 1, 192, reverse=True)
""",
    "as-in-long-sequences": """
la.SEGMENT = 16  # with it the programs of short sequences take all values
run(2, 128, 2, 1, 128)
run(1, 200, 2, 2, 128, cu=[0, 0, 5, 70, 70, 190])
""",
    "decode-and-float32": """
run(3, 1, 2, 2, 96)
run(1, 100, 2, 2, 40, "float32")
""",
    "wrong-boundaries": """
run(1, 200, 2, 2, 64, cu=[0, 2**31 - 1, -5, 150, 100, -2**31], reverse=True)
run(1, 200, 2, 2, 64, "float32", cu=[200, 2**31 - 1, 0, 150, 1000])
""",
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
    variables = {
        # without autotuning: XLA tunes its own kernels on memory that nothing has written
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    code = SANITIZED + CALLS_TO_SANITIZE[calls] + "print('ran')"
    # a file, not a pipe: a program that outlives a tool that crashed would keep the pipe open
    with open(tmp_path / "output", "w+") as output:
        ran = subprocess.run(
            ["compute-sanitizer", "--tool", tool, *watched, sys.executable, "-c", code],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            timeout=300,
            env=os.environ | variables,
        )
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
    monkeypatch.setitem(sys.modules, "lightning_attn", la)
    names, readme = {}, (PROJECT / "README.md").read_text()
    for snippet in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(snippet, names)
    assert names["states"].shape == (3, 4, 32, 32) and np.isfinite(names["gradient"]).all()
    whole = lightning_attn(names["q"], names["k"], names["v"], 0, 3)
    assert_close([names["output"], names["state"]], whole, 4e-3)


# Harness ------------------------------------------------------------------------------------------


def python(code, folder, **variables):
    """What code prints in a Python of its own, in a folder with a copy of the file."""
    shutil.copy(FILE, folder / "lightning_attn.py")
    env = {n: x for n, x in os.environ.items() if n != "PYTHONSAFEPATH"} | variables
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


# Interpreters: `interpreted` is lightning_attn.py once more, whose own launch code runs its kernels
# on the CPU. Triton's interpreter runs Triton kernels, and `emulate` runs Gluon kernels.

LOCK = threading.Lock()  # only one interpreter may run at a time
LAUNCHED = set()  # (name, number of programs) of the kernels that interpreters ran


@functools.cache
def interpreted(path):
    """The copy of lightning_attn.py for a path. It is made when a case first needs it."""
    import triton
    from triton.runtime import interpreter

    teach_the_interpreter_bfloat16()
    triton.knobs.runtime.interpret = True
    try:
        module = load("lightning_attn_interpreted_by_" + path)
    finally:
        triton.knobs.runtime.interpret = False

    def config(*args):
        config = {"interpreter": config_of_triton, "gluon": config_of_gluon}[path](*args)
        return dataclasses.replace(config, kernel=getattr(module, config.kernel.fn.__name__))

    module._config = config
    module._gpu = lambda: ("sm_90", 132)  # the GPU for which the interpreters stand
    module.SEGMENT = 96  # interpreters are slow: short sequences have segments too
    module.GROUP = la.GROUP
    module._in_place = lambda call, arrays, in_place: call(*arrays, in_place=in_place)
    # An output may be its input or another array. Each path takes one way.
    call = functools.partial(interpreted_call, module, path == "interpreter")
    TensorDescriptor = la.jax_triton.TensorDescriptor
    module.jax_triton = types.SimpleNamespace(triton_call=call, TensorDescriptor=TensorDescriptor)
    for name, f in list(vars(module).items()):
        # Functions that kernels call need not patch the language again, nor for good.
        if isinstance(f, interpreter.InterpretedFunction) and not name.endswith("_kernel"):
            plain = f.rewrite()
            plain.fn = f.fn  # `emulate` takes this function
            setattr(module, name, plain)
    return module


def config_of_triton(arch, *shape):
    return la._config("sm_80", *shape)


def config_of_gluon(arch, _, K, V, dtype, B, H, T, n, fused):
    """The Hopper kernel whatever the dtype: float32 checks this kernel to 1e-5.

    With one processor no short sequence's values are cut: tiles stay as large as long sequences'.
    """
    num_sms = config_of_gluon.num_sms
    K, V = (-(-size // 8) * 8 for size in (K, V))
    T = T if T == 1 else max(T, la.HOPPER_CHUNK)
    config = la._config("sm_90", num_sms, K, V, np.dtype("float16"), B, H, T, 1, fused)
    assert T == 1 or config.kernel is la._hopper_kernel
    return config


config_of_gluon.num_sms = 1


def interpreted_call(
    module,
    shares_memory,
    *args,
    kernel,
    out_type,
    grid,
    num_warps,
    num_stages,
    backend_options,
    in_place=None,
    **constants,
):
    """Stands for jax_triton.triton_call. `shares_memory`: outputs in place are their inputs."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    leaves, tree = jax.tree.flatten(out_type)
    is_described = [isinstance(x, la.jax_triton.TensorDescriptor) for x in args]
    flat = lambda x: Pointer(x.reshape(-1))

    def launch(*arrays):
        arrays = [aligned(np.asarray(x)) for x in arrays]
        out = [aligned(np.full(x.shape, np.nan, x.dtype)) for x in leaves]  # unwritten parts show
        for i, o in (in_place or {}).items() if shares_memory else ():
            out[o] = arrays[i]
        LAUNCHED.add((kernel.fn.__name__, grid[0]))
        with LOCK, np.errstate(all="ignore"), pytest.MonkeyPatch.context() as m:
            if hasattr(kernel, "is_gluon"):
                given = [
                    described(x.reshape(arg.shape), arg) if is_descriptor else flat(x)
                    for x, arg, is_descriptor in zip(arrays, args, is_described)
                ]
                emulate(kernel, module, range(grid[0]), [*given, *map(flat, out)], constants)
            else:
                sums = InterpretedFunction(triton.language.sum.fn).rewrite()
                m.setattr(triton.language, "sum", sums)
                kernel[grid](*map(Host, (*arrays, *out)), **constants)
        return tuple(out)

    operands = [x.base if is_descriptor else x for x, is_descriptor in zip(args, is_described)]
    return jax.tree.unflatten(tree, jax.pure_callback(launch, tuple(leaves), *operands))


@functools.cache
def teach_the_interpreter_bfloat16():
    """The interpreter holds bfloat16 as bits: this widens factors, and rounds as hardware does."""
    import ml_dtypes
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as builder
    from triton.runtime.interpreter import TensorHandle

    create_dot, truncate = builder.create_dot, builder.create_fp_trunc

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, acc, *rest):
        return create_dot(self, widened(a), widened(b), acc, *rest)

    def fp_trunc(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return truncate(self, src, dst_type)

    builder.create_dot, builder.create_fp_trunc = dot, fp_trunc


def aligned(x):
    """A copy of `x` that starts at a multiple of 64 bytes, as GPU arrays do."""
    raw = np.empty(x.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start:][: x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


class Host:
    """A numpy array with the tensor methods that Triton's interpreter calls."""

    def __init__(self, array):
        self.array = array
        self.dtype = type("DType", (str,), {"itemsize": array.dtype.itemsize})(array.dtype)

    data_ptr = lambda self: self.array.ctypes.data
    cpu = untyped_storage = lambda self: self
    new_empty = lambda self, *_, **__: Host(self.array)
    size = lambda self: self.array.shape
    storage_offset = lambda self: 0
    set_ = copy_ = stride = lambda self, *_: None


# The emulator: `Machine` runs Gluon and Triton kernels on numpy arrays.


def emulate(kernel, module, programs, arrays, constants):
    """A launch of a kernel: its functions once more, with a machine in place of the languages."""
    is_constexpr = lambda x: type(x).__name__ == "constexpr"
    names = {name: x.value if is_constexpr(x) else x for name, x in vars(module).items()}
    for name, f in vars(module).items():
        if isinstance(getattr(f, "fn", None), types.FunctionType):
            names[name] = types.FunctionType(f.fn.__code__, names, name, f.fn.__defaults__)
    names["range"] = lambda *bounds: map(tensor_of_index, range(*map(int, bounds)))
    for program in programs:
        names["gl"] = names["tl"] = names["hopper"] = Machine(program)
        names[kernel.fn.__name__](*arrays, **constants)


class Tensor(np.ndarray):
    """An array that a kernel computes with."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype):
        return self.astype(dtype)

    def __array_wrap__(self, x, *_):
        return tensor(x)


def tensor(x, dtype=None):
    return np.asarray(x, dtype).view(Tensor)


def tensor_of_index(i):
    return tensor(i, np.int32)


class Pointer:
    """An array, and places in it. Reading or writing outside of the array is an error."""

    def __init__(self, array, at=0):
        self.array, self.at = array, at
        self.dtype = types.SimpleNamespace(element_ty=array.dtype)

    def __add__(self, more):
        return Pointer(self.array, self.at + more)

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


class Described(np.ndarray):
    """An array behind a descriptor."""


def described(array, descriptor):
    array = array.view(Described)
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

    def __init__(self, program):
        self.program, self.products, self.mbarrier, self.tma = program, [], self, self
        Machine.now = self

    program_id = lambda self, _: tensor_of_index(self.program)
    arange = lambda self, a, b, layout=None: tensor(np.arange(a, b), np.int32)
    full = lambda self, shape, value, dtype, layout=None: tensor(np.full(shape, value, dtype))
    convert_layout = lambda self, x, layout: x
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
        return types.SimpleNamespace(index=bars.__getitem__)

    def init(self, bar, count):
        bar.phases, bar.bytes, bar.copies = 0, 0, []

    def invalidate(self, bar):
        assert not bar.copies, "copies that nobody waited for"

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

    def record(*arrays, kernel, out_type, grid, backend_options, **arguments):
        options = {n: arguments.pop(n) for n in ("num_warps", "num_stages")} | backend_options
        arrays = *arrays, *jax.tree.leaves(out_type)
        found.append((kernel, arrays, arguments, options | {"programs": grid[0]}))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

    recorder = types.SimpleNamespace(triton_call=record, TensorDescriptor=TensorDescriptor)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(la, "jax_triton", recorder)
        m.setattr(la, "_in_place", lambda call, arrays, in_place: call(*arrays))
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
    options = {n: x for n, x in options.items() if n != "programs"}
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


# The order of the cases, and pytest's hooks.

# Substrings of the names of cases that take long, on a GPU machine and on a CPU. These cases start
# first, so that none of them is left when the others are done.
LONGEST = [
    "on_8_devices",
    "four_million",
    "sanitizer",
    "compiles_and_fits[sm_90-bfloat16",
    "inside_shard_map",
    "million",
    "beyond_2_31",
    "many_segments",
    "compiles_and_fits",
    "accuracy",
    "snippets",
    "shard_map[interpreter",
    "in_pieces",
    "several_tiles",
    "vmap[interpreter",
    "is_its_sequences",
    "goes_on_from",
    "eager-pack",
    "pack-with-states",
    "small_model",
    "16_bit",
    "padding_and",
    "seq_axis",
    "65536",
    "packs[interpreter",
]


class Order:
    """A pytest plugin that chooses and orders the cases of a script run."""

    def pytest_collection_modifyitems(self, config, items):
        if os.environ[SCRIPT] == "devices":
            wants_devices = lambda case: any(
                m.kwargs.get("reason") == DEVICES for m in case.iter_markers("skipif")
            )
            others = [case for case in items if not wants_devices(case)]
            config.hook.pytest_deselected(items=others)
            items[:] = filter(wants_devices, items)

        def place(case):
            found = (i for i, name in enumerate(LONGEST) if name in case.name)
            return next(found, len(LONGEST))

        items.sort(key=place)
        # A worker holds two cases at least. Beside each long case stands a short one, since a case
        # beside a long one waits.
        long = sum(place(case) < len(LONGEST) for case in items)
        short = items[long:][::-1][:long]
        pairs = itertools.zip_longest(items[:long], short)
        paired = [case for pair in pairs for case in pair if case]
        items[:] = paired + items[long : len(items) - len(short)]


def pytest_generate_tests(metafunc):
    """Adds `Order` to a script run. pytest calls this hook wherever it collects this file.

    xdist's workers choose and order the cases, and plugins of `main` do not reach workers.
    """
    plugins = metafunc.config.pluginmanager
    if SCRIPT in os.environ and not plugins.has_plugin("lightning_attn_order"):
        plugins.register(Order(), "lightning_attn_order")


@pytest.fixture(scope="session", autouse=True)
def closing_sentence(request):
    """Adds `Summary` to a run under pytest. A script run has it from `main`."""
    plugins = request.config.pluginmanager
    if SCRIPT not in os.environ and not plugins.has_plugin("lightning_attn_summary"):
        plugins.register(Summary(), "lightning_attn_summary")
