# SPDX-License-Identifier: Apache-2.0
"""Measures lightning_attn: `python bench.py`.

On a GPU: times of forward and backward passes, beside the memory floor and, with --peers, beside
other implementations. On a CPU: the error against the recurrence, and the time beside softmax
attention.

floor         lower bound of a time: the bytes that must be moved over the rate of a copy, measured
              in the same run. Forward reads q, k, v and writes o; backward reads q, k, v, do and
              writes dq, dk, dv; a decode step reads and writes the state
extra memory  what a call takes beside its arguments and results, as a share of q, k, v and o
GPU clock     median of three rounds of 0.2 s, with one wait at the end of each. Short calls are
              made 20 to a jit, so that Python is not what is measured. Inputs of less than 256 MiB
              rotate through four sets, so that fewer of them stay in the L2 cache
CPU clock     shortest call in 0.3 s
peers         timed by the same clock. PyTorch's are called one by one, so their short calls take
              the time of Python; their backward time is that of both passes less forward
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# lightning_attn is imported where it is called: the processes of peers do without it.

HERE = pathlib.Path(__file__).resolve().parent
LAYER = {"layer_idx": 12, "num_layers": 24}
PEER_SECONDS = 1200  # time limit of a peer for all its shapes, tuning and compilation included

Wrong = argparse.ArgumentTypeError
say = functools.partial(print, flush=True)
text_of = lambda shape: ", ".join(map(str, shape))
nbytes = lambda *arrays: sum(x.size * x.dtype.itemsize for x in arrays)
# Why something failed, in one short line: of an exception, and of what a process wrote.
reason = lambda error: f"{type(error).__name__}: {error}".splitlines()[0][:160]
last_line = lambda text: (text.strip().splitlines() or ["it ended early"])[-1][:160]


@contextlib.contextmanager
def noting_failure(failed, what):
    """Notes in `failed` what fails inside, so that the other measurements go on."""
    try:
        yield
    except Exception as error:
        failed[what] = reason(error)


# What is measured -------------------------------------------------------------------------------

PASSES = "forward", "backward"


class Case(NamedTuple):
    """One row: what is called, and what is timed of it. --save writes all the fields."""

    name: str
    shape: tuple[int, ...]  # B, T, H, D
    dtype: str = "bfloat16"
    decays: str = "layer 12 of 24"  # a key of DECAYS
    kv_heads: int | None = None  # None: as many as there are query heads
    repeat_kv: bool = False  # keys and values are repeated for all query heads before the call
    sequences: int | None = None  # of a pack, with traced cu_seqlens
    final_state: bool = True
    backend: str | None = None
    layout: str = "one"  # a key of LAYOUTS: how the arrays lie on the GPUs
    timed: tuple[str, ...] = PASSES  # forward, output (without a final state), backward, both
    memory: tuple[str, ...] = ()  # those of them whose extra memory is wanted
    profiled: tuple[str, ...] = ()  # those of them whose kernels are timed alone
    against: str | None = None  # the name of an earlier row to compare with


# Arguments of lightning_attn that set the decays, by the number of heads.
DECAYS = {
    "layer 12 of 24": lambda H: LAYER,
    "MiniMax's last layer": lambda H: {
        "g_gamma": np.float32(-1e-5 * 2.0 ** (-8 / H * np.arange(1, H + 1)))
    },
    "g_gamma = 0": lambda H: {"g_gamma": np.zeros(H, np.float32)},
}
LAYOUTS = {
    "one": None,
    "batch": P("gpus"),
    "tokens": P(None, "gpus"),
    "heads": P(None, None, "gpus"),
}


def shape_of(text):
    """(B, T, H, D) of "B,T,H,D"."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(n.isdecimal() and int(n) for n in numbers):
        raise Wrong(f"expected B,T,H,D, four positive integers like 1,4096,16,128, got {text!r}")
    return tuple(map(int, numbers))


shapes_of = lambda text: [shape_of(word) for word in text.split()]
BATCHED, LONG, NARROW = (8, 4096, 32, 128), (1, 32768, 32, 128), (1, 131072, 8, 128)
SHAPES = [BATCHED, LONG, NARROW, *shapes_of("16,2048,16,128 4,8192,16,64 1,4096,16,128")]
SHAPES += shapes_of("2,8192,16,96 2,8192,16,192 2,8192,16,256")
SHORT_SHAPES = shapes_of("1,4096,16,128 1,1024,64,128 1,512,32,128 1,200,32,128")
CPU_SHAPES = shapes_of("1,256,4,64 1,512,4,64 1,1024,4,64 1,2048,4,64 1,4096,4,64")
DECODE_BATCHES = [1, 64, 256]
DECODE_STEPS = 200  # of a lax.scan
LENGTHS = [2**n for n in range(11, 18)]  # those that peers are measured at
LONGER = 2**20
BACKWARD_LENGTHS = 2**15, 2**17, LONGER
PACK = Case("one sequence", LONG, final_state=False, memory=PASSES)
packed = functools.partial(PACK._replace, against=PACK.name)
PACKS = [
    PACK,
    *(packed(name=f"{n} sequences", sequences=n) for n in (32, 256, 4096)),
    packed(name="32 sequences and their final states", sequences=32, final_state=True),
]
SLOW_DECAYS = [
    Case(decays, shape, decays=decays, against="layer 12 of 24")
    for shape in (LONG, NARROW)
    for decays in DECAYS
]
SHORT = [Case(text_of(shape), shape, profiled=PASSES) for shape in SHORT_SHAPES]
GROUPED = Case("8 key and value heads", LONG, kv_heads=8)
VARIANTS = [
    Case("plain JAX", BATCHED, backend="xla"),
    Case("float16", (4, 4096, 32, 128), "float16"),
    Case("float32, products in TF32", (4, 4096, 32, 128), "float32"),
    GROUPED,
    GROUPED._replace(name="the same, repeated first", repeat_kv=True, against=GROUPED.name),
]
BY_LENGTH = [
    *(
        Case("this file", (1, T, 16, 128), timed=PASSES if T in BACKWARD_LENGTHS else PASSES[:1])
        for T in (*LENGTHS, LONGER)
    ),
    *(Case("plain JAX", (1, T, 16, 128), backend="xla", timed=PASSES[:1]) for T in LENGTHS),
]
ON_DEVICES = [
    Case(layout, shape, layout=layout, against=None if layout == "one" else "one")
    for shape in (BATCHED, *((1, T, 16, 128) for T in BACKWARD_LENGTHS))
    for layout in (("one", "batch", "heads") if shape is BATCHED else ("one", "tokens"))
]


def shrunk(case):
    """A case small enough for a rehearsal on a CPU."""
    shape = tuple(map(min, case.shape, (2, 128, 4, 32)))
    return case._replace(shape=shape, sequences=case.sequences and 8, kv_heads=case.kv_heads and 2)


# The clock --------------------------------------------------------------------------------------


class Clock(NamedTuple):
    seconds: float = 0.2  # of a round
    rounds: int = 3
    repeats: int = 20  # of a short call in a jit

    def ms(self, run, calls=1):
        """Median time of a call in ms. run(n) makes n * calls calls and waits for them."""
        run(2)
        start = time.perf_counter()
        run(3)
        seconds_per_run = (time.perf_counter() - start) / 3
        n = int(np.clip(self.seconds / seconds_per_run, 2, 5000))
        times = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            run(n)
            times.append((time.perf_counter() - start) / n)
        return float(np.median(times)) * 1e3 / calls


def queue(call, sets, n):
    """Makes n calls, over rotating sets of inputs, and waits for the last one."""
    for i in range(n):
        out = call(*sets[i % len(sets)])
    jax.block_until_ready(out)


class Program(NamedTuple):
    run: Callable[[list, int], None]  # run(sets, n) makes n * calls calls
    calls: int
    one: Any  # a single call, compiled; None where nobody asked for it

    def ms(self, clock, sets):
        return clock.ms(functools.partial(self.run, sets), self.calls)


def compile_program(f, sets, repeats, want_one=False):
    """A program for such sets of inputs, which may be shapes without values."""
    large = nbytes(*sets[0]) > 2**27
    one = jax.jit(f).lower(*sets[0]).compile() if large or want_one else None
    if large:
        return Program(functools.partial(queue, one), 1, one)

    def calls(sets):
        outs = [()]
        for i in range(repeats):  # each waits for the one before: XLA would merge equal calls
            inputs, outs[-1] = jax.lax.optimization_barrier((sets[i % len(sets)], outs[-1]))
            outs.append(f(*inputs))
        return outs

    many = jax.jit(calls).lower(sets).compile()
    return Program(lambda sets, n: queue(many, [(sets,)], n), repeats, one)


def gpu_time(run, count=20):
    """ms that the kernels of a call take on the GPU, by JAX's profiler."""
    run(2)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(count)
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(trace))
        gpus = [plane for plane in profile.planes if "GPU" in plane.name]
        streams = [line for gpu in gpus for line in gpu.lines if "Stream" in line.name]
        return sum(event.duration_ns for line in streams for event in line.events) / count / 1e6


def copy_rate(clock, values):
    """Bytes per second that a copy on the device moves, read and written."""
    x = jnp.ones(values, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / clock.ms(functools.partial(queue, add, [(x,)])) * 1e3


# The calls of a case ----------------------------------------------------------------------------


@functools.cache
def mesh():
    count = 2 ** (jax.device_count().bit_length() - 1)
    kind = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("gpus",), axis_types=kind, devices=jax.devices()[:count])


def inputs_of(case):
    """Shapes of q, k, v, do, and of cu_seqlens where the case is a pack."""
    B, T, H, D = case.shape
    kv_heads = case.kv_heads or H
    layout = LAYOUTS[case.layout]
    sharding = NamedSharding(mesh(), layout) if layout is not None else None
    arrays = [
        jax.ShapeDtypeStruct((B, T, heads, D), case.dtype, sharding=sharding)
        for heads in (H, kv_heads, kv_heads, H)
    ]
    if case.sequences:
        arrays.append(jax.ShapeDtypeStruct((case.sequences + 1,), jnp.int32))
    return arrays


# Several sets where one would stay in the L2 cache.
count_sets = lambda case: 1 if 4 * nbytes(inputs_of(case)[0]) > 2**28 else 4


@functools.cache
def normal(like):
    """A function of a key, compiled once for each kind of array."""
    sample = functools.partial(jax.random.normal, shape=like.shape, dtype=like.dtype)
    return jax.jit(sample, out_shardings=like.sharding)


def draw_inputs(case):
    """Sets of random inputs."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    like, rest = inputs_of(case)[:4], []
    if case.sequences:
        T = case.shape[1]
        cuts = np.random.default_rng(0).choice(T - 1, case.sequences - 1, replace=False) + 1
        rest = [jnp.asarray(np.r_[0, np.sort(cuts), T], jnp.int32)]
    return [[*(normal(x)(next(keys)) for x in like), *rest] for _ in range(count_sets(case))]


def attention(case):
    """attend(q, k, v, [cu_seqlens]) -> (output, final state) as the case wants it."""
    from lightning_attn import lightning_attn

    H = case.shape[2]
    fixed = DECAYS[case.decays](H) | {"output_final_state": case.final_state}
    op = functools.partial(lightning_attn, **fixed, backend=case.backend)

    def attend(q, k, v, cu_seqlens=None):
        if case.repeat_kv:
            k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
        return op(q, k, v, cu_seqlens=cu_seqlens)

    if case.layout != "tokens":
        return attend
    # seq_axis takes neither packs nor, here, repeated heads
    tokens = LAYOUTS["tokens"]
    out_specs = tokens, P() if case.final_state else None
    op = functools.partial(op, seq_axis="gpus")
    return jax.shard_map(op, mesh=mesh(), in_specs=(tokens,) * 3, out_specs=out_specs)


def ways_of(attend):
    """What may be timed of attend, as functions of q, k, v, do, [cu_seqlens]."""

    def forward(q, k, v, do, *rest):
        return attend(q, k, v, *rest)

    def both(q, k, v, do, *rest):
        output, pull_back = jax.vjp(lambda *qkv: attend(*qkv, *rest)[0], q, k, v)
        return output, pull_back(do)

    def backward(*inputs):
        """The gradients alone: jit leaves out what they do not need of the forward pass."""
        return both(*inputs)[1]

    return {"forward": forward, "both": both, "backward": backward}


def call_of(case, way):
    if way == "output":
        case, way = case._replace(final_state=False), "forward"
    return ways_of(attention(case))[way]


def floor_bytes(case, way):
    """Bytes of q, k, v, o, or of q, k, v, do, dq, dk, dv."""
    q, k, *_ = map(nbytes, inputs_of(case))
    return 3 * q + 4 * k if way == "backward" else 2 * q + 2 * k


# Tables -----------------------------------------------------------------------------------------

us_text = lambda ms: f"{ms * 1e3:.2f}"
ms_text = lambda ms: f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 100 else f"{ms:.1f}"
# A column is kind, of a row, or way:kind, of one way of calling. By kind: title, group of the row
# that holds the value, text of the value. Without a group the value is the row.
KINDS = {
    "name": ("", None, lambda row: row["name"]),
    "shape": ("B, T, H, D", None, lambda row: text_of(row["shape"])),
    "error": ("error", None, lambda row: f"{row['error']:.1e}" if "error" in row else "-"),
    "ms": ("{} ms", "ms", ms_text),
    "no_state": ("no state", "ms", ms_text),
    "ns_per_token": ("ns/token", "ms", "{:.2f}".format),
    "gpu": ("on the GPU", "gpu_ms", ms_text),
    "floor": ("of floor", "of_floor", "{:.0%}".format),
    "memory": ("memory", "extra_memory", "{:.1%}".format),
    "ratio": ("ratio", "against", "{:.2f}x".format),
    "speedup": ("speedup", "against", lambda ratio: f"{1 / ratio:.2f}x"),
    "loop_us": ("in lax.scan, us", "ms", us_text),
    "step_us": ("jit that donates, us", "ms", us_text),
    "kernel_us": ("its kernel, us", "gpu_ms", us_text),
}
LEAST_WIDTH = {"name": 10, "shape": 18}  # 8 for the others
both_ways = lambda *kinds: [f"{way}:{kind}" for way in PASSES for kind in kinds]


def cell(row, column):
    """Text of a column of a row: - where it was not wanted."""
    way, _, kind = column.rpartition(":")
    _, group, text = KINDS[kind]
    if not group:
        return text(row)
    if way in row["failed"]:
        return "failed"
    if way not in row[group]:
        return "-"
    scale = 1e6 / np.prod(row["shape"][:2]) if kind == "ns_per_token" else 1
    return text(scale * row[group][way])


# A run ------------------------------------------------------------------------------------------

GROUPS = "ms", "gpu_ms", "of_floor", "extra_memory", "against", "failed"  # of a row, by way
rows_of = lambda result, section: result["sections"].get(section, {"rows": []})["rows"]
ratios = lambda ms, other: {way: ms[way] / other[way] for way in ms if way in other}


@dataclasses.dataclass
class Run:
    """What is asked for, and what was measured so far."""

    options: argparse.Namespace
    clock: Clock
    result: dict

    def section(self, name):
        return self.result["sections"].setdefault(name, {"rows": []})

    def add(self, section, **fields):
        """A new row, whose measurements are to be filled in."""
        row = fields | {group: {} for group in GROUPS}
        self.section(section)["rows"].append(row)
        return row

    def of_copy(self, count, ms):
        """The time of a copy that moves so many bytes, as a share of ms."""
        return count / self.result["copy_rate"] * 1e3 / ms

    def save(self):
        """Writes everything that was measured; a reader never sees half a file."""
        if self.options.save:
            part = pathlib.Path(f"{self.options.save}.part")
            part.write_text(json.dumps(self.result, indent=1))
            part.replace(self.options.save)

    def table(self, columns, names=()):
        """Prints titles. Returns a function that prints a row and saves the run."""
        parts = [column.rpartition(":") for column in columns]
        titles = [KINDS[kind][0].format(way) for way, _, kind in parts]
        first, *rest = (
            max(LEAST_WIDTH.get(column, 8), len(title))
            for column, title in zip(columns, titles, strict=True)
        )
        first = max(first, *map(len, names), 0)

        def line(cells):
            right = map(str.rjust, cells[1:], rest)
            say("  " + "  ".join([cells[0].ljust(first), *right]).rstrip())

        def show(row):
            line([cell(row, column) for column in columns])
            for way, why in row["failed"].items():
                say(f"    {way}: {why}")
            self.save()

        line(titles)
        return show

    def measure(self, name, title, measure):
        """Measures a section: measure(run, name)."""
        say(f"\n{name}: {title}")
        start = time.perf_counter()
        measure(self, name)
        self.section(name)["seconds"] = seconds = time.perf_counter() - start
        say(f"  {name} took {seconds:.0f} s")
        self.save()


def compile_case(case, way, repeats):
    shapes = [inputs_of(case)] * count_sets(case)
    want_one = way in case.memory or way in case.profiled
    return compile_program(call_of(case, way), shapes, repeats, want_one)


def compile_all(cases, repeats, workers):
    """{(case, way): a future of its program}, compiled side by side."""
    start = time.perf_counter()
    jobs = [(case, way) for case in cases for way in case.timed]
    say(f"  compiling {len(jobs)} programs:", end=" ")
    pool = ThreadPoolExecutor(workers)
    try:
        programs = {job: pool.submit(compile_case, *job, repeats) for job in jobs}
        wait(programs.values())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    say(f"{time.perf_counter() - start:.0f} s")
    return programs


def measure_way(run, case, way, program, sets, row):
    """Adds to the row all that is wanted of one way of calling."""
    row["ms"][way] = ms = program.ms(run.clock, sets)
    if way != "both" and case.layout == "one":
        row["of_floor"][way] = run.of_copy(floor_bytes(case, way), ms)
    if way in case.memory:
        extra = program.one.memory_analysis().temp_size_in_bytes
        row["extra_memory"][way] = extra / floor_bytes(case, "forward")
    if way in case.profiled:
        row["gpu_ms"][way] = gpu_time(functools.partial(queue, program.one, sets))


def measure_case(run, section, case, programs):
    """The row of a case."""
    row = run.add(section, **case._asdict())
    with noting_failure(row["failed"], "inputs"):
        sets = draw_inputs(case)
        for way in case.timed:
            with noting_failure(row["failed"], way):
                program = programs[case, way].result()
                measure_way(run, case, way, program, sets, row)
    for other in rows_of(run.result, section):
        if (other["name"], other["shape"]) == (case.against, case.shape):
            row["against"] = ratios(row["ms"], other["ms"])
    return row


def measure_cases(run, name, cases, columns):
    if name == "devices" and jax.device_count() == 1:
        say("  skipped: there is one GPU")
        return
    if run.options.rehearse:
        cases = [shrunk(case) for case in cases]
    # Programs for many GPUs are compiled one at a time: the compiler calls back into Python.
    workers = 1 if name == "devices" else None
    programs = compile_all(cases, run.clock.repeats, workers)
    show = run.table(columns, [case.name for case in cases])
    for case in cases:
        show(measure_case(run, name, case, programs))


# Sections ---------------------------------------------------------------------------------------


def decode_step(q, k, v, state):
    from lightning_attn import lightning_attn

    return lightning_attn(q, k, v, **LAYER, initial_state=state)


def decode_inputs(shape, steps=()):
    """A state, and q, k, v of one step or, with steps = (n,), of n steps."""
    B, _, H, D = shape
    token = jax.ShapeDtypeStruct((*steps, *shape), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((B, H, D, D), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    return [normal(like)(key) for like, key in zip([state] + [token] * 3, keys, strict=True)]


def decode_loop_ms(clock, shape):
    """Time of a step of a lax.scan that carries the state."""
    inputs = decode_inputs(shape, (DECODE_STEPS,))

    def loop(state, *tokens):
        return jax.lax.scan(lambda state, qkv: decode_step(*qkv, state)[::-1], state, tokens)

    loop = jax.jit(loop).lower(*inputs).compile()
    return clock.ms(functools.partial(queue, loop, [inputs]), DECODE_STEPS)


def donating_step(shape):
    """run(n) of decode steps that each give the next one their state, in its memory."""
    state, *qkv = decode_inputs(shape)
    step = jax.jit(decode_step, donate_argnums=3).lower(*qkv, state).compile()

    def run(n):
        nonlocal state
        for _ in range(n):
            state = step(*qkv, state)[1]
        jax.block_until_ready(state)

    return run


def measure_decode(run, name):
    columns = "name", "scan:loop_us", "scan:floor", "step:step_us", "step:kernel_us"
    show = run.table(columns)
    for batch in DECODE_BATCHES:
        shape = B, _, H, D = (2, 1, 4, 32) if run.options.rehearse else (batch, 1, 32, 128)
        row = run.add(name, name=f"B = {B}", shape=shape, dtype="bfloat16")
        with noting_failure(row["failed"], "scan"):
            row["ms"]["scan"] = ms = decode_loop_ms(run.clock, shape)
            state = 4 * B * H * D * D  # bytes of float32
            row["of_floor"]["scan"] = run.of_copy(2 * state, ms)
        with noting_failure(row["failed"], "step"):
            step = donating_step(shape)
            row["ms"]["step"] = run.clock.ms(step)
            row["gpu_ms"]["step"] = gpu_time(step)
            del step  # and its state
        show(row)


FIRST_GRADIENT = """
import time, jax, jax.numpy as jnp, jax_triton.triton_lib as lib
from lightning_attn import lightning_attn
x = jnp.ones((1, 4096, 16, 128), jnp.bfloat16)
jax.block_until_ready(x + 1)
compile, kernels = lib.compile_ttir_inplace, []
lib.compile_ttir_inplace = lambda *args: kernels.append(1) or compile(*args)
def loss(q, k, v):
    return lightning_attn(q, k, v, 12, 24)[0].astype(jnp.float32).sum()
start = time.perf_counter()
jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(x, x, x))
print(time.perf_counter() - start, len(kernels))
"""


def measure_first(run, name):
    """Seconds and kernels of the first jitted gradient of a process, which has nothing cached."""
    command = [sys.executable, "-c", FIRST_GRADIENT]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=HERE)
    row = run.add(name, name="first gradient", shape=(1, 4096, 16, 128))
    if done.returncode:
        row["failed"]["first"] = last_line(done.stderr)
        say(f"  failed: {row['failed']['first']}")
    else:
        seconds, kernels = done.stdout.split()[-2:]
        row |= {"first_seconds": float(seconds), "kernels": int(kernels)}
        say(f"  {row['first_seconds']:.2f} s, in which {kernels} kernels were compiled")


def measure_shapes(run, name):
    columns = ["shape", "forward:ms", "forward:floor", "output:no_state"]
    columns += ["backward:ms", "backward:floor", "both:ms", "both:memory"]
    timed = ("forward", "output", "backward", "both")
    case = functools.partial(Case, dtype=run.options.dtype, timed=timed, memory=("both",))
    shapes = run.options.shapes or SHAPES
    measure_cases(run, name, [case(text_of(shape), shape) for shape in shapes], columns)


class Section(NamedTuple):
    title: str
    seconds: int  # about what it takes on an H100
    measure: Callable[[Run, str], None]  # of a run and the section's name


def of_cases(cases, columns, *kinds):
    """A section that measures these cases, and shows these kinds of both ways."""
    columns = columns.split() + both_ways(*kinds)
    return lambda run, name: measure_cases(run, name, cases, columns)


SECTIONS = {
    "shapes": Section(
        "the main shapes; no state: forward without it; memory: that of both, extra",
        45,
        measure_shapes,
    ),
    "packs": Section(
        f"packs in {text_of(LONG)}, traced cu_seqlens, no final states",
        15,
        of_cases(PACKS, "name", "ms", "ratio", "memory"),
    ),
    "decode": Section("decode steps of 32 heads of 128, float32 state", 10, measure_decode),
    "decays": Section("slow decays", 10, of_cases(SLOW_DECAYS, "name shape", "ms", "ratio")),
    "short": Section(
        "short prompts, whose times are partly those of launching",
        10,
        of_cases(SHORT, "shape", "ms", "gpu", "floor"),
    ),
    "variants": Section(
        "plain JAX, dtypes, grouped heads",
        15,
        of_cases(VARIANTS, "name shape", "ms", "floor", "ratio"),
    ),
    "lengths": Section(
        "time against length", 25, of_cases(BY_LENGTH, "name shape", "ms", "ns_per_token")
    ),
    "first": Section("the first jitted gradient of a process", 10, measure_first),
    "devices": Section(
        "all GPUs and one: jit over batch or heads, seq_axis over tokens",
        40,
        of_cases(ON_DEVICES, "name shape", "ms", "speedup"),
    ),
}
QUICK = ["shapes", "packs", "decode"]


# Peers, each in a process of its own ------------------------------------------------------------


def by_difference(forward, both):
    """Times of a forward pass and, as what both take more than it, of a backward pass."""
    return {"forward": forward, "backward": both - forward}


def torch_times(op, shape, dtype):
    """Times of a PyTorch implementation; of a decode step only those of a forward pass."""
    import torch

    B, T, H, D = shape
    torch.manual_seed(0)
    randn = functools.partial(torch.randn, device="cuda")
    state = {"initial_state": randn(B, H, D, D)} if T == 1 else {}
    array = functools.partial(randn, shape, dtype=getattr(torch, dtype), requires_grad=T > 1)
    sets = [[array() for _ in range(4)] for _ in range(count_sets(Case("torch", shape, dtype)))]

    def attend(q, k, v):
        return op(q, k, v, output_final_state=True, **state)[0]

    def run(call, n):
        for i in range(n):
            call(*sets[i % len(sets)])
        torch.cuda.synchronize()

    def forward(n):
        with torch.no_grad():
            run(lambda q, k, v, do: attend(q, k, v), n)

    def both(n):
        run(lambda q, k, v, do: torch.autograd.grad(attend(q, k, v), (q, k, v), do), n)

    forward_ms = Clock().ms(forward)
    return {"forward": forward_ms} if T == 1 else by_difference(forward_ms, Clock().ms(both))


def fla_chunk(shape, dtype):
    from fla.ops.lightning_attn import chunk_lightning_attn

    return torch_times(functools.partial(chunk_lightning_attn, **LAYER), shape, dtype)


def fla_fused_chunk(shape, dtype):
    import torch
    from fla.ops.simple_gla import fused_chunk_simple_gla

    rate = 8 / shape[2] * (1 - LAYER["layer_idx"] / LAYER["num_layers"])
    g_gamma = -rate * torch.arange(shape[2], device="cuda", dtype=torch.float32)
    return torch_times(functools.partial(fused_chunk_simple_gla, g_gamma=g_gamma), shape, dtype)


def fla_recurrent(shape, dtype):
    from fla.ops.lightning_attn import fused_recurrent_lightning_attn

    return torch_times(functools.partial(fused_recurrent_lightning_attn, **LAYER), shape, dtype)


def ejkernel(shape, dtype):
    """Its op cannot be jitted."""
    from ejkernel.kernels._triton.lightning_attn import lightning_attn

    sets = draw_inputs(Case("ejkernel", shape, dtype))
    ways = ways_of(lambda q, k, v: lightning_attn(q, k, v, *LAYER.values()))
    runs = [functools.partial(queue, ways[way], sets) for way in ("forward", "both")]
    return by_difference(*map(Clock().ms, runs))


def softmax(shape, dtype):
    """Causal softmax attention by cuDNN."""
    clock, sets = Clock(), draw_inputs(Case("softmax", shape, dtype))
    op = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    ways = ways_of(lambda q, k, v: (op(q, k, v), None))
    programs = [compile_program(ways[way], sets, clock.repeats) for way in ("forward", "both")]
    return by_difference(*(program.ms(clock, sets) for program in programs))


ALL_PEERS = fla_chunk, fla_fused_chunk, fla_recurrent, ejkernel, softmax
PEERS = {peer.__name__: peer for peer in ALL_PEERS}


def be_peer(name, shapes, dtype):
    """The process of a peer: prints a line of JSON for each shape."""
    for shape in shapes:
        times = {}
        with noting_failure(times, "failed"):
            times = PEERS[name](shape, dtype)
        say(json.dumps(times))


def measure_peer(name, shapes, dtype, add):
    """Calls add(shape, times) for all shapes; times are {"failed": why} where there are none."""
    command = [sys.executable, __file__, "--peer", name, "--dtype", dtype, "--shapes"]
    command += [",".join(map(str, shape)) for shape in shapes]
    # A peer that wants packages of its own finds them where BENCH_PATH_<peer> says.
    path = os.environ.get(f"BENCH_PATH_{name}", os.environ.get("PYTHONPATH", ""))
    left = list(shapes)
    with tempfile.TemporaryFile("w+") as errors:
        env = os.environ | {"PYTHONPATH": path}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=errors, text=True, env=env)
        stop = threading.Timer(PEER_SECONDS, process.kill)
        stop.start()
        try:
            lines = (line for line in process.stdout if line.startswith("{"))
            for _, line in zip(shapes, lines, strict=False):
                add(left.pop(0), json.loads(line))
            process.wait()
            late = stop.finished.is_set()
        finally:
            stop.cancel()
            process.kill()
            process.wait()
        errors.seek(0)
        why = f"it took more than {PEER_SECONDS} s" if late else last_line(errors.read())
    for shape in left:
        add(shape, {"failed": why})


def own_times(run):
    """{shape: ms of forward and backward} of what peers are compared with. Peers would take minutes
    for LONGER. Where two sections have a shape, shapes counts."""
    found = {}
    for section in ("lengths", "decode", "shapes"):
        for row in rows_of(run.result, section):
            shape, ms = row["shape"], row["ms"]
            ours = row["name"] != "plain JAX" and row["dtype"] == run.options.dtype
            if ms and ours and (section, shape[1]) != ("lengths", LONGER):
                found[shape] = {"forward": ms["step"]} if "step" in ms else ms
    return found


def measure_peers(run, section):
    own, dtype, names = own_times(run), run.options.dtype, run.options.peers or list(PEERS)
    show = run.table(["name", "shape", *both_ways("ms", "ratio")], names)

    def add(name, shape, times):
        row = run.add(section, name=name, shape=shape, dtype=dtype)
        if "failed" in times:
            row["failed"]["forward"] = times.pop("failed")
        row |= {"ms": times, "against": ratios(times, own[shape])}
        show(row)

    for name in names:
        # The others have no decode step.
        shapes = [shape for shape in own if shape[1] > 1 or name == "fla_recurrent"]
        measure_peer(name, shapes, dtype, functools.partial(add, name))


def fastest_other(result, shape, way):
    """(ms, name) of the fastest peer at a shape, or None."""
    rows = [row for row in rows_of(result, "peers") if row["shape"] == shape and way in row["ms"]]
    return min(((row["ms"][way], row["name"]) for row in rows), default=None)


def show_fastest(result):
    say("\nthe fastest other implementation at the main shapes, and how many times ours it takes")
    for row in rows_of(result, "shapes"):
        texts = []
        for way in PASSES:
            other = fastest_other(result, row["shape"], way)
            if other and way in row["ms"]:
                texts.append(f"{way} {other[1]} {other[0] / row['ms'][way]:.2f}x")
        say(f"  {text_of(row['shape']):<18}  {', '.join(texts) or 'none was measured'}")


# Launch configurations --------------------------------------------------------------------------


def configurations(la, case):
    """The kernels, and fields of `_Config`, that are tried."""
    sizes = (32, 64), (32, 64, 128), (4, 8), (1, 2, 3, 4)
    for kernel in (la._hopper_kernel, la._scan_kernel):
        for C, BV, warps, stages in itertools.product(*sizes):
            hopper_takes = (
                C == la.HOPPER_CHUNK and warps * 16 == BV and stages > 1 and case.dtype != "float32"
            )
            if case.shape[3] >= BV and (hopper_takes or kernel is la._scan_kernel):
                yield kernel, {"C": C, "BV": BV, "num_warps": warps, "num_stages": stages}


def time_configuration(la, case, sets, fields):
    """ms of a forward pass that is launched so."""
    chosen, clock = la._config, Clock()
    la._config = lambda *args: dataclasses.replace(chosen(*args), **fields)
    jax.clear_caches()
    try:
        return compile_program(call_of(case, "forward"), sets, clock.repeats).ms(clock, sets)
    finally:
        la._config = chosen


def tune():
    """Prints the fastest launch configurations: what `_config` should choose."""
    import lightning_attn as la

    for D, dtype in (64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "float32"):
        case = Case("tune", (4, 4096, 4096 // D, D), dtype)
        say(f"{text_of(case.shape)} {dtype}")
        sets, found, failed = draw_inputs(case), [], {}
        for kernel, fields in configurations(la, case):
            text = f"{kernel.__name__} " + " ".join(f"{k}={v}" for k, v in fields.items())
            with noting_failure(failed, text):
                ms = time_configuration(la, case, sets, {"kernel": kernel} | fields)
                found.append((ms, text))
        for text, why in failed.items():
            say(f"    {text}: {why[:80]}")
        for ms, text in sorted(found)[:6]:
            say(f"  {ms:.3f} ms  {text}")


# A CPU ------------------------------------------------------------------------------------------


def cpu_time(f, *inputs):
    """Shortest time of a call in ms, of as many calls as fit in 0.3 s, two at least."""
    jax.block_until_ready(f(*inputs))  # compiles
    times, start = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - start < 0.3:
        begin = time.perf_counter()
        jax.block_until_ready(f(*inputs))
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3


def measure_cpu(run):
    from lightning_attn import lightning_attn, lightning_attn_reference

    ours = jax.jit(lambda q, k, v: lightning_attn(q, k, v, **LAYER)[0])
    recurrence = jax.jit(lambda q, k, v: lightning_attn_reference(q, k, v, **LAYER)[0])
    softmax = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))
    dtype, shapes = run.options.dtype, run.options.shapes or CPU_SHAPES
    say(f"no GPU: plain JAX on the CPU, {dtype}, forward\n")
    show = run.table(["shape", "lightning:ms", "softmax:ms", "error"])
    for shape in shapes:
        row = run.add("cpu", name=text_of(shape), shape=shape, dtype=dtype)
        with noting_failure(row["failed"], "inputs"):
            q, k, v, _ = draw_inputs(Case("cpu", shape, dtype))[0]
            for way, f in {"lightning": ours, "softmax": softmax}.items():
                with noting_failure(row["failed"], way):
                    row["ms"][way] = cpu_time(f, q, k, v)
            with noting_failure(row["failed"], "error"):
                got, want = (f(q, k, v).astype(jnp.float32) for f in (ours, recurrence))
                row["error"] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        show(row)
    rows = rows_of(run.result, "cpu")
    show_growth(rows[0], rows[-1])


def show_growth(first, last):
    """How the times grew with the tokens, where these are all that grew."""
    (B, T, *heads), (last_B, last_T, *last_heads) = first["shape"], last["shape"]
    growth = ratios(last["ms"], first["ms"])
    if (B, heads) == (last_B, last_heads) and last_T > T and growth:
        texts = [f"{way} {ratio:.0f} times the time" for way, ratio in growth.items()]
        say(f"\n  {last_T / T:g} times the tokens: {', '.join(texts)}")


# The plot ---------------------------------------------------------------------------------------

INK, GREY, FAINT = "#22272e", "#768390", "#e4e8ec"
OURS = "#0a5fb4"
LINES = {  # label, colour
    "this file": ("lightning_attn", OURS),
    "fla_chunk": ("fla chunk", "#c4622d"),
    "fla_fused_chunk": ("fla fused chunk", "#d9a066"),
    "fla_recurrent": ("fla recurrent", "#a3907c"),
    "softmax": ("cuDNN softmax", "#7a5195"),
    "CPU softmax": ("softmax attention", "#7a5195"),
    "plain JAX": ("plain JAX", "#8b98a5"),
    "ejkernel": ("ejkernel", "#5f8f6b"),
    "CPU lightning": ("lightning_attn", OURS),
}
GREY_PARTS = "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"
NO_TICKS = [f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")]
STYLE = dict.fromkeys(GREY_PARTS, GREY) | dict.fromkeys(NO_TICKS, 0)
STYLE |= {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "svg.hashsalt": "lightning_attn",
    "xaxis.labellocation": "left",
}


def length_lines(result):
    """{contestant: [(tokens, ms)]} of forward passes of one batch row, sorted by tokens."""
    lengths = rows_of(result, "lengths")
    shapes = [row["shape"] for row in lengths]
    peers = [row for row in rows_of(result, "peers") if row["shape"] in shapes]
    points = [(row["name"], row, "forward") for row in lengths + peers]
    points += [(f"CPU {way}", row, way) for row in rows_of(result, "cpu") for way in row["ms"]]
    lines = {}
    for name, row, way in points:
        if way in row["ms"]:
            lines.setdefault(name, []).append((row["shape"][1], row["ms"][way]))
    return {name: sorted(points) for name, points in lines.items()}


def bars(result):
    """[(shape, ours, floor, other)] of forward passes at the main shapes; other is (ms, name)."""
    found = []
    for row in rows_of(result, "shapes"):
        if "forward" in row["of_floor"]:
            ms, shape = row["ms"]["forward"], row["shape"]
            floor, other = ms * row["of_floor"]["forward"], fastest_other(result, shape, "forward")
            found.append((shape, ms, floor, other))
    return found


# 64k for 65536, 1M for 1048576.
short = lambda n: f"{n >> 20}M" if n % 2**20 == 0 else f"{n >> 10}k" if n % 2**10 == 0 else f"{n}"


def spread(heights, gap):
    """The heights, moved apart so that neighbours are a gap apart, and no further than need be."""
    order = np.argsort(heights)
    moved = np.array(heights, float)[order]
    for _ in range(100):
        for i in range(len(moved) - 1):
            lack = max(0, gap - (moved[i + 1] - moved[i]))
            moved[i] -= lack / 2
            moved[i + 1] += lack / 2
    return moved[np.argsort(order)]


def panel_title(axes, title, subtitle):
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=26)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=GREY, fontsize=9.5)


def note(axes, text, point, color, **more):
    """A text to the right of a point."""
    weight = "bold" if color == OURS else "normal"
    style = {"xytext": (6, 0), "fontsize": 9, "fontweight": weight, "color": color} | more
    axes.annotate(text, point, textcoords="offset points", va="center", **style)


def label_lines(axes, lines):
    """Names at the ends of the lines; those that end at about the same place are moved apart."""
    ends = {name: points[-1] for name, points in lines.items()}
    low, high = np.log10(axes.get_ylim())
    for tokens in {end[0] for end in ends.values()}:
        names = [name for name in ends if ends[name][0] == tokens]
        heights = spread([np.log10(ends[name][1]) for name in names], (high - low) / 21)
        for name, height in zip(names, heights, strict=True):
            label, colour = LINES.get(name, (name, GREY))
            # clear of our line, which goes on where the others end
            offset = (-12, -17) if colour == OURS and len(names) == 1 else (5, 13)
            note(axes, label, (tokens, 10**height), colour, xytext=offset, fontsize=10)


def draw_lines(axes, lines):
    """Left: time against sequence length."""
    for name, points in lines.items():
        _, colour = LINES.get(name, (name, GREY))
        width, size, order = (2.6, 5.5, 3) if colour == OURS else (1.5, 3.8, 2)
        style = {"linewidth": width, "markersize": size, "zorder": order, "color": colour}
        axes.loglog(*zip(*points, strict=True), marker="o", solid_capstyle="round", **style)
    tokens = sorted({point[0] for points in lines.values() for point in points})
    ticks = tokens[::2] if len(tokens) > 6 else tokens
    ticks = ticks if ticks[-1] == tokens[-1] else [*ticks, tokens[-1]]
    axes.set_xticks(ticks, [short(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(tokens[0] / 1.25, tokens[-1] * 5)  # room for names
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g} ms")
    axes.grid(axis="y")
    axes.set_xlabel("tokens")
    label_lines(axes, lines)


def draw_bars(axes, found):
    """Right: ours and the fastest other, as multiples of the memory floor."""

    def bar(y, ms, floor, colour, alpha, text=""):
        """A bar as long as the time is in memory floors, with its time beside it."""
        axes.barh(y, ms / floor, height=0.36, color=colour, alpha=alpha)
        text = f"{ms:#.3g}".rstrip(".") + " ms" + text
        note(axes, text, (ms / floor, y), OURS if alpha == 1 else GREY)

    for i, (_, ours, floor, other) in enumerate(found):
        bar(i - 0.2, ours, floor, OURS, 1)
        if other:
            label, colour = LINES.get(other[1], (other[1], GREY))
            text = f"  {label}, {other[0] / ours:.1f}x"
            bar(i + 0.2, other[0], floor, colour, 0.38, text)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    note(axes, "memory floor", (1, -0.72), INK)
    widest = max(max(ours, other[0] if other else 0) / floor for _, ours, floor, other in found)
    axes.set_ylim(len(found) - 0.4, -1.05)
    axes.set_xlim(0, widest * 1.7)
    axes.set_yticks(range(len(found)), [text_of(shape) for shape, *_ in found])
    axes.set_xlabel("time, as a multiple of the memory floor")
    axes.locator_params(axis="x", integer=True)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def caption(result):
    """Machine, versions, date, and what the floor is."""
    versions = {name: result["versions"][name] for name in ("jax", "triton")}
    words = [f"{name} {version}" for name, version in versions.items() if version]
    words = [result["machine"]["device"], *words, result["date"]]
    if "copy_rate" in result:
        rate = f"{result['copy_rate'] / 1e12:.2f} TB/s"
        words.append(f"floor: q, k, v read and o written once at the rate of a copy, {rate}")
    return "   ·   ".join(words)


def plot(result, target):
    """Draws what a file of --save holds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines, found = length_lines(result), bars(result)
    count = bool(lines) + bool(found)
    with plt.rc_context(STYLE):
        figure, (panels,) = plt.subplots(1, count, squeeze=False, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        figure.set_size_inches(5.7 * count, 4.9)
        if lines:
            row = (rows_of(result, "lengths") or rows_of(result, "cpu"))[0]
            B, _, H, D = row["shape"]
            what = f"batch {B}, {H} heads of {D}, {row['dtype']}"
            panel_title(panels[0], "Forward pass against sequence length", what)
            draw_lines(panels[0], lines)
        if found:
            dtype = rows_of(result, "shapes")[0]["dtype"]
            what = f"batch, tokens, heads, head dim; {dtype}"
            panel_title(panels[-1], "Forward pass at the main shapes", what)
            draw_bars(panels[-1], found)
        figure.supxlabel(caption(result), x=0.01, ha="left", fontsize=8.5, color=GREY)
        pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if target.endswith(".svg") else {}
        figure.savefig(target, dpi=150, facecolor="white", metadata=metadata)
    say(f"plotted in {target}")


# The command line -------------------------------------------------------------------------------


def sections_of(text):
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise Wrong(f"expected some of {','.join(SECTIONS)}, got {','.join(unknown)!r}")
    return names


def path_to_save(path):
    if not pathlib.Path(path).absolute().parent.is_dir():
        raise Wrong(f"there is no folder for {path!r}")
    return path


def path_to_draw(path):
    if not path.endswith((".png", ".svg")):
        raise Wrong(f"expected a name that ends with .png or .svg, got {path!r}")
    return path


def saved_result(path):
    """What --save wrote there, if it can be drawn."""
    try:
        result = json.loads(pathlib.Path(path).read_text())
        drawable = length_lines(result) or bars(result)
    except Exception as error:
        what = f"expected a file that --save wrote, got {path!r}: {reason(error)}"
        raise Wrong(what) from error
    if not drawable:
        raise Wrong(f"{path!r} has no rows of the sections lengths and shapes")
    return result


GPU_SECONDS = sum(section.seconds for name, section in SECTIONS.items() if name != "devices")
EPILOG = "\n".join(
    [
        "sections on one H100 (--only), with compilation:",
        *(f"  {name:<9} about {s.seconds:>2} s  {s.title}" for name, s in SECTIONS.items()),
        f"All take about {GPU_SECONDS} s on one GPU. The CPU comparison takes under a minute.",
    ]
)
QUICK_SECONDS = sum(SECTIONS[name].seconds for name in QUICK) * 2 // 3  # rounds are fewer
HELP = {
    "--only": "these sections alone (GPU); their times are below",
    "--quick": f"only {', '.join(QUICK)}, one round each (GPU): about {QUICK_SECONDS} s",
    "--shapes": "these shapes alone: on a GPU about 5 s each",
    "--dtype": "of the main shapes and the peers, by default bfloat16; on a CPU of all that is "
    "measured, by default float32. Costs no time",
    "--peers": f"also other implementations (GPU), all or some of {', '.join(PEERS)}, at the "
    "shapes of those of the sections shapes, lengths and decode that run: one to fifteen minutes "
    f"each, because some tune themselves, and {PEER_SECONDS // 60} at most. A peer that wants "
    "packages of its own finds them in the folder that BENCH_PATH_<peer> names",
    "--tune": "time the launch configurations of the kernels and nothing else (GPU): ten minutes "
    "or more",
    "--save": "write all that is measured, row by row: no time",
    "--plot": "draw a file of --save and measure nothing: 5 s",
    "--plot-out": "where --plot draws to, .png or .svg, by default assets/speed.png",
    "--peer": argparse.SUPPRESS,  # be the process of a peer
    "--rehearse": argparse.SUPPRESS,  # the sections of a GPU, tiny, on a CPU
}


def make_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=raw)

    def add(name, to=parser, **more):
        to.add_argument(name, help=HELP[name], **more)

    choice = parser.add_mutually_exclusive_group()
    add("--only", choice, type=sections_of, metavar="NAME[,NAME]")
    add("--quick", choice, action="store_true")
    add("--shapes", nargs="+", type=shape_of, metavar="B,T,H,D")
    add("--dtype", choices=["bfloat16", "float16", "float32"])
    add("--peers", nargs="*", choices=list(PEERS), metavar="NAME")
    add("--tune", action="store_true")
    add("--peer", choices=list(PEERS))
    add("--rehearse", action="store_true")
    add("--save", type=path_to_save, metavar="FILE.json")
    add("--plot", type=saved_result, metavar="FILE.json")
    add("--plot-out", type=path_to_draw, metavar="FILE")
    return parser


def check_options(parser, options, gpu):
    """Options that exclude each other, or want something. `gpu` says whether there is one."""

    def given(*names):
        values = vars(options)
        return [f"--{name}" for name in names if values[name] not in (None, False)]

    if options.plot:
        if others := given("only", "quick", "shapes", "dtype", "peers", "save", "tune"):
            parser.error(f"--plot draws a file and measures nothing: leave out {', '.join(others)}")
        if not importlib.util.find_spec("matplotlib"):
            parser.error("--plot wants matplotlib: pip install matplotlib")
        return
    if options.plot_out:
        parser.error("--plot-out wants --plot FILE.json, a file that --save wrote")
    if options.shapes and options.only not in (None, ["shapes"]):
        parser.error("--shapes sets the shapes of the section shapes: leave out --only")
    wants_gpu = given("only", "quick", "peers", "tune")
    if wants_gpu and not gpu:
        parser.error(f"{wants_gpu[0]} wants a GPU, and JAX found {jax.default_backend()} only")


def versions():
    """Of what is measured and of what it runs on. None for what is not installed."""
    importlib.import_module("lightning_attn")
    names = "lightning_attn", "jax", "jaxlib", "jax_triton", "triton"
    return {name: getattr(sys.modules.get(name), "__version__", None) for name in names}


def measure_gpu(run):
    options = run.options
    run.result["copy_rate"] = rate = copy_rate(run.clock, 2**16 if options.rehearse else 2**28)
    say(f"a copy moves {rate / 1e12:.2f} TB/s")
    sections = options.only or (QUICK if options.quick else list(SECTIONS))
    for name in ["shapes"] if options.shapes else sections:
        title, seconds, measure = SECTIONS[name]
        run.measure(name, f"{title} (about {seconds} s)", measure)
    if options.peers is None:
        say("\nother implementations were not measured: --peers")
    else:
        title = f"other implementations, {options.dtype}, each in a process of its own"
        run.measure("peers", title, measure_peers)
        show_fastest(run.result)


def measure(options, gpu):
    """Returns the exit code."""
    clock = Clock(rounds=1) if options.quick else Clock()
    clock = Clock(0.001, 1, 2) if options.rehearse else clock
    device, count, found = jax.devices()[0].device_kind, jax.device_count(), versions()
    result = {
        "machine": {"device": device, "count": count},
        "versions": found,
        "date": datetime.date.today().isoformat(),
        "arguments": sys.argv[1:],
        "sections": {},
    }
    texts = [f"{name} {version}" for name, version in found.items() if version]
    say(f"{count} x {device}, {', '.join(texts)}, {result['date']}")
    run = Run(options, clock, result)
    try:
        (measure_gpu if gpu else measure_cpu)(run)
    except KeyboardInterrupt:
        result["interrupted"] = True
        run.save()
        where = f", and is in {options.save}" if options.save else ""
        say(f"\ninterrupted: what is above was measured{where}")
        return 130
    # That a peer cannot be measured is no failure.
    sections = result["sections"].keys() - {"peers"}
    failed = sum(bool(row["failed"]) for name in sections for row in rows_of(result, name))
    if failed:
        say(f"\n{failed} rows failed")
    if options.save:
        say(f"\nsaved in {options.save}")
    return 1 if failed else 0


def main():
    # The processes of peers share the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = make_parser()
    options = parser.parse_args()
    if options.peer:  # before JAX looks for a GPU, which PyTorch may want for itself
        return be_peer(options.peer, options.shapes, options.dtype)
    gpu = not options.plot and (options.rehearse or jax.default_backend() == "gpu")
    check_options(parser, options, gpu)
    if options.plot:
        return plot(options.plot, options.plot_out or str(HERE / "assets" / "speed.png"))
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    return tune() if options.tune else measure(options, gpu)


if __name__ == "__main__":
    try:
        code = main() or 0
    except KeyboardInterrupt:
        say("\ninterrupted")
        code = 130
    if code == 130:
        sys.stderr.flush()
        os._exit(code)  # does not wait for threads that still compile
    sys.exit(code)
