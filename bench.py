# SPDX-License-Identifier: Apache-2.0
"""Measures lightning_attn: `python bench.py`.

On a GPU: times of forward and backward passes, beside the memory floor and, with --peers, beside
other implementations. On a CPU: the error against the recurrence, and the time beside softmax
attention.

floor         lower bound of a time: the bytes that must be moved over the rate of a copy, measured
              in the same run. Forward reads q, k, v and writes o; backward reads q, k, v, do and
              writes dq, dk, dv
extra memory  what a call takes beside its arguments and results, as a share of q, k, v and o
clock         median of three rounds of 0.2 s, with one wait at the end of each. Short calls are
              made 20 to a jit, so that Python is not what is measured. Small inputs rotate through
              four sets, so that they do not stay in the L2 cache
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

HERE = pathlib.Path(__file__).resolve().parent
LAYER = {"layer_idx": 12, "num_layers": 24}
PEER_SECONDS = 900  # time limit of a peer for all its shapes, tuning and compilation included


def say(text="", end="\n"):
    print(text, end=end, flush=True)


def reason(error):
    """One short line of an exception."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


@contextlib.contextmanager
def noting_failure(failed, what):
    """Whatever fails inside is noted in `failed`, and the other measurements go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        failed[what] = reason(error)


# What is measured -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: what is called, and what is timed of it."""

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
    timed: tuple[str, ...] = ("forward", "backward")  # keys of `calls`
    memory: tuple[str, ...] = ()  # those of them whose extra memory is wanted
    profiled: tuple[str, ...] = ()  # those of them whose kernels are timed alone
    against: str | None = None  # the name of an earlier row to compare with


def minimax_last_layer(heads):
    slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
    return np.float32(-1e-5 * slopes)


# Arguments of lightning_attn that set the decays, by the number of heads.
DECAYS = {
    "layer 12 of 24": lambda heads: LAYER,
    "MiniMax's last layer": lambda heads: {"g_gamma": minimax_last_layer(heads)},
    "g_gamma = 0": lambda heads: {"g_gamma": np.zeros(heads, np.float32)},
}
LAYOUTS = {
    "one": None,
    "batch": PartitionSpec("gpus"),
    "tokens": PartitionSpec(None, "gpus"),
    "heads": PartitionSpec(None, None, "gpus"),
}

SQUARE = (8, 4096, 32, 128)
LONG = (1, 32768, 32, 128)
SHAPES = [
    SQUARE,
    LONG,
    (1, 131072, 8, 128),
    (16, 2048, 16, 128),
    (4, 8192, 16, 64),
    (1, 4096, 16, 128),
    (2, 8192, 16, 96),
    (2, 8192, 16, 192),
    (2, 8192, 16, 256),
]
CPU_SHAPES = [(1, tokens, 4, 64) for tokens in (256, 512, 1024, 2048, 4096)]
DECODE_BATCHES = [1, 64, 256]
DECODE_STEPS = 200  # of a lax.scan
LENGTHS = [2**n for n in range(11, 18)]  # those that peers are measured at
LONGER = 2**20


def shape_cases(shapes, dtype):
    timed = ("forward", "output", "backward", "both")
    return [Case(text_of(s), s, dtype=dtype, timed=timed, memory=("both",)) for s in shapes]


def pack_cases(_):
    pack = Case("one sequence", LONG, final_state=False, memory=("forward", "backward"))
    packed = functools.partial(dataclasses.replace, pack, against=pack.name)
    return [
        pack,
        *(packed(name=f"{n} sequences", sequences=n) for n in (32, 256, 4096)),
        packed(name="32 sequences and their final states", sequences=32, final_state=True),
    ]


def decay_cases(_):
    return [
        Case(decays, shape, decays=decays, against="layer 12 of 24")
        for shape in (LONG, (1, 131072, 8, 128))
        for decays in DECAYS
    ]


def short_cases(_):
    shapes = (1, 4096, 16, 128), (1, 1024, 64, 128), (1, 512, 32, 128), (1, 200, 32, 128)
    return [Case(text_of(s), s, profiled=("forward", "backward")) for s in shapes]


def variant_cases(_):
    grouped = Case("8 key and value heads", LONG, kv_heads=8)
    return [
        Case("plain JAX", SQUARE, backend="xla"),
        Case("float16", (4, 4096, 32, 128), dtype="float16"),
        Case("float32, products in TF32", (4, 4096, 32, 128), dtype="float32"),
        grouped,
        dataclasses.replace(
            grouped, name="the same, repeated first", repeat_kv=True, against=grouped.name
        ),
    ]


def length_cases(_):
    def case(name, tokens, **more):
        both = tokens in (2**15, 2**17, LONGER) and name == "this file"
        timed = ("forward", "backward") if both else ("forward",)
        return Case(name, (1, tokens, 16, 128), timed=timed, **more)

    return [
        *(case("this file", tokens) for tokens in (*LENGTHS, LONGER)),
        *(case("plain JAX", tokens, backend="xla") for tokens in LENGTHS),
    ]


def device_cases(_):
    """No cases where there is one GPU."""
    if jax.device_count() == 1:
        return []
    cases = [Case("one", SQUARE)]
    cases += [Case("one", (1, tokens, 16, 128)) for tokens in (2**15, 2**17, LONGER)]
    layouts = {True: ("batch", "heads"), False: ("tokens",)}
    return [
        dataclasses.replace(case, name=name, layout=name, against="one" if name != "one" else None)
        for case in cases
        for name in ("one", *layouts[case.shape is SQUARE])
    ]


def shrunk(case):
    """A case small enough for a rehearsal on a CPU."""
    limits = 2, 128, 4, 32
    shape = tuple(map(min, case.shape, limits))
    sequences, kv_heads = case.sequences and 8, case.kv_heads and 2
    return dataclasses.replace(case, shape=shape, sequences=sequences, kv_heads=kv_heads)


# The clock --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Clock:
    seconds: float = 0.2  # of a round
    rounds: int = 3
    repeats: int = 20  # of a short call in a jit

    def program_ms(self, program, sets):
        """Median time in ms of one of the calls of a program."""
        return self.ms(functools.partial(program.run, sets)) / program.calls

    def ms(self, run):
        """Median time of a call in ms. run(n) makes n calls and waits for them."""
        run(2)
        start = time.perf_counter()
        run(3)
        n = max(2, min(5000, int(self.seconds / (time.perf_counter() - start) * 3)))
        times = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            run(n)
            times.append((time.perf_counter() - start) / n)
        return float(np.median(times)) * 1e3


def queue(call, sets, n):
    """Makes n calls, over rotating sets of inputs, and waits for the last one."""
    for i in range(n):
        out = call(*sets[i % len(sets)])
    jax.block_until_ready(out)


class Program(NamedTuple):
    run: Callable[[list, int], None]  # run(sets, n) makes n * calls calls
    calls: int  # that a run makes
    one: Any  # a single call, compiled; None where nobody asked for it


def compile_one(f, inputs):
    return jax.jit(f).lower(*inputs).compile()


def compile_many(f, sets, repeats):
    """So many calls in one program, each over the next set of inputs."""

    def many(sets):
        outs = [()]
        for i in range(repeats):  # each waits for the one before: XLA would merge equal calls
            inputs, outs[-1] = jax.lax.optimization_barrier((sets[i % len(sets)], outs[-1]))
            outs.append(f(*inputs))
        return outs

    return jax.jit(many).lower(sets).compile()


def compile_program(f, sets, repeats, want_one=False):
    """A program for such sets of inputs, which may be shapes without values."""
    large = sum(x.size * x.dtype.itemsize for x in sets[0]) > 2**27
    one = compile_one(f, sets[0]) if large or want_one else None
    if large:
        return Program(functools.partial(queue, one), 1, one)
    many = compile_many(f, sets, repeats)
    return Program(lambda sets, n: queue(many, [(sets,)], n), repeats, one)


def gpu_time(run, count=20):
    """ms that the kernels of a call take on the GPU, by JAX's profiler."""
    run(2)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(count)
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        streams = [
            line
            for plane in planes
            if "GPU" in plane.name
            for line in plane.lines
            if "Stream" in line.name
        ]
        return sum(event.duration_ns for line in streams for event in line.events) / count / 1e6


def copy_rate(clock, values):
    """Bytes per second that a copy on the device moves, read and written."""
    x = jnp.ones(values, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / clock.ms(functools.partial(queue, add, [(x,)])) * 1e3


# The calls of a case ----------------------------------------------------------------------------


@functools.cache
def mesh():
    count = 2 ** (len(jax.devices()).bit_length() - 1)
    kind = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("gpus",), axis_types=kind, devices=jax.devices()[:count])


def inputs_of(case):
    """Shapes of q, k, v, do, and of cu_seqlens where the case is a pack."""
    B, T, H, D = case.shape
    layout = LAYOUTS[case.layout]
    sharding = None if layout is None else NamedSharding(mesh(), layout)
    kv_heads = case.kv_heads or H
    arrays = [
        jax.ShapeDtypeStruct((B, T, heads, D), case.dtype, sharding=sharding)
        for heads in (H, kv_heads, kv_heads, H)
    ]
    if case.sequences:
        arrays.append(jax.ShapeDtypeStruct((case.sequences + 1,), jnp.int32))
    return tuple(arrays)


def count_sets(case):
    q = inputs_of(case)[0]
    return 1 if 4 * q.size * q.dtype.itemsize > 2**28 else 4


@functools.cache
def normal(shape, dtype, sharding):
    """A function of a key, compiled once for each kind of array."""
    draw = functools.partial(jax.random.normal, shape=shape, dtype=dtype)
    return jax.jit(draw, out_shardings=sharding)


def draw_array(key, like):
    return normal(like.shape, like.dtype, like.sharding)(key)


def draw_boundaries(tokens, sequences):
    cuts = np.random.default_rng(0).choice(np.arange(1, tokens), sequences - 1, replace=False)
    return jnp.asarray(np.r_[0, np.sort(cuts), tokens], jnp.int32)


def draw(case):
    """Sets of inputs: several where one would stay in the L2 cache."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    like = inputs_of(case)[:4]
    packed = case.sequences is not None
    rest = (draw_boundaries(case.shape[1], case.sequences),) if packed else ()
    return [(*(draw_array(next(keys), x) for x in like), *rest) for _ in range(count_sets(case))]


def attention(case, final_state):
    """attend(q, k, v, [cu_seqlens]) -> (output, final state) as the case wants it."""
    from lightning_attn import lightning_attn

    H = case.shape[2]
    op = functools.partial(
        lightning_attn,
        **DECAYS[case.decays](H),
        backend=case.backend,
        output_final_state=final_state,
    )

    def attend(q, k, v, cu_seqlens=None):
        if case.repeat_kv:
            k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
        return op(q, k, v, cu_seqlens=cu_seqlens)

    if case.layout != "tokens":
        return attend
    tokens = LAYOUTS["tokens"]
    return jax.shard_map(
        functools.partial(op, seq_axis="gpus"),
        mesh=mesh(),
        in_specs=(tokens,) * 3,
        out_specs=(tokens, PartitionSpec() if final_state else None),
    )


def backward_of(attend):
    """The gradients alone: what they do not need of the forward pass is not run."""

    def backward(q, k, v, do, *rest):
        return jax.vjp(lambda *qkv: attend(*qkv, *rest)[0], q, k, v)[1](do)

    return backward


def both_of(attend):
    def both(q, k, v, do, *rest):
        output, pull_back = jax.vjp(lambda *qkv: attend(*qkv, *rest)[0], q, k, v)
        return output, pull_back(do)

    return both


def forward_of(attend):
    def forward(q, k, v, do, *rest):
        return attend(q, k, v, *rest)

    return forward


def calls(case):
    """What may be timed, as functions of q, k, v, do, [cu_seqlens]."""
    attend = attention(case, case.final_state)
    return {
        "forward": forward_of(attend),
        "output": forward_of(attention(case, False)),
        "backward": backward_of(attend),
        "both": both_of(attend),
    }


def sizes(case):
    """Bytes of q (and o, do, dq), and of k (and v, dk, dv)."""
    q, k = inputs_of(case)[:2]
    return q.size * q.dtype.itemsize, k.size * k.dtype.itemsize


def floor_bytes(case, way):
    q, k = sizes(case)
    return 3 * q + 4 * k if way == "backward" else 2 * q + 2 * k


# Tables -----------------------------------------------------------------------------------------


class Column(NamedTuple):
    title: str
    text: Callable[[dict], str]
    width: int = 8


def text_of(shape):
    return ", ".join(map(str, shape))


def ms_text(ms):
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 100 else f"{ms:.1f}"


def column(title, group, way, text):
    """A column of row[group][way]: - where it was not wanted."""

    def cell(row):
        if way in row.get("failed", {}):
            return "failed"
        value = row.get(group, {}).get(way)
        return "-" if value is None else text(value)

    return Column(title, cell)


def ms_column(title, way):
    return column(title, "ms", way, ms_text)


def per_token_column(way):
    def cell(row):
        B, T, _, _ = row["shape"]
        return f"{row['ms'][way] * 1e6 / (B * T):.2f}" if way in row["ms"] else "-"

    return Column("ns/token", cell)


def columns_of(way, *columns):
    """Columns of one way of calling, each named by what it says."""
    known = {
        "ms": ms_column(f"{way} ms", way),
        "output": ms_column("no state", "output"),
        "gpu": column("on the GPU", "gpu_ms", way, ms_text),
        "floor": column("of floor", "of_floor", way, "{:.0%}".format),
        "memory": column("memory", "extra_memory", way, "{:.1%}".format),
        "ratio": column("ratio", "against", way, "{:.2f}x".format),
        "speedup": column("speedup", "against", way, lambda ratio: f"{1 / ratio:.2f}x"),
        "per_token": per_token_column(way),
    }
    return [known[name] for name in columns]


def both_ways(*columns):
    return columns_of("forward", *columns) + columns_of("backward", *columns)


NAME = Column("", lambda row: row["name"], 10)
SHAPE = Column("B, T, H, D", lambda row: text_of(row["shape"]), 18)


class Table:
    """Aligned rows; the first column is flush left, and as wide as the longest of the names."""

    def __init__(self, columns, names=()):
        self.columns = columns
        self.widths = [max(column.width, len(column.title)) for column in columns]
        self.widths[0] = max(self.widths[0], *map(len, names), 0)
        self.line([c.title for c in columns])

    def line(self, cells):
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, self.widths, strict=True))
        )
        say("  " + "  ".join([first, *rest]).rstrip())

    def row(self, row):
        self.line([c.text(row) for c in self.columns])
        for way, why in row.get("failed", {}).items():
            say(f"    {way}: {why}")


# A run ------------------------------------------------------------------------------------------

GROUPS = "ms", "gpu_ms", "of_floor", "extra_memory", "against", "failed"  # of a row, by way


def rows_of(result, section):
    return result["sections"].get(section, {"rows": []})["rows"]


@dataclasses.dataclass
class Run:
    """What was asked for, and what was measured so far."""

    options: argparse.Namespace
    clock: Clock
    result: dict

    def rows(self, section):
        return rows_of(self.result, section)

    def add(self, section, **fields):
        """A new row, whose measurements are to be filled in."""
        row = fields | {group: {} for group in GROUPS}
        self.result["sections"].setdefault(section, {"rows": []})["rows"].append(row)
        return row

    def note_seconds(self, section, start):
        seconds = time.perf_counter() - start
        self.result["sections"].setdefault(section, {"rows": []})["seconds"] = seconds
        say(f"  {section} took {seconds:.0f} s")
        self.save()

    def failures(self):
        """How many rows failed. That a peer cannot be measured is no failure."""
        sections = self.result["sections"].keys() - {"peers"}
        return sum(bool(row["failed"]) for section in sections for row in self.rows(section))

    def save(self):
        """Writes everything that was measured; a reader never sees half a file."""
        if self.options.save:
            part = pathlib.Path(f"{self.options.save}.part")
            part.write_text(json.dumps(self.result, indent=1))
            part.replace(self.options.save)

    def show(self, table, row):
        table.row(row)
        self.save()


def compile_case(case, way, repeats):
    """A Program, or why there is none."""
    failed = {}
    with noting_failure(failed, way):
        shapes = [inputs_of(case)] * count_sets(case)
        want_one = way in case.memory or way in case.profiled
        return compile_program(calls(case)[way], shapes, repeats, want_one)
    return failed[way]


def compile_all(cases, repeats, workers):
    """{(case, way): program or why there is none}, compiled side by side."""
    start = time.perf_counter()
    jobs = [(case, way) for case in cases for way in case.timed]
    say(f"  compiling {len(jobs)} programs:", end=" ")
    pool = ThreadPoolExecutor(workers)
    try:
        programs = pool.map(lambda job: compile_case(*job, repeats), jobs)
        programs = dict(zip(jobs, programs, strict=True))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    say(f"{time.perf_counter() - start:.0f} s")
    return programs


def measure_way(run, case, way, program, sets, row):
    """Adds to the row all that is wanted of one way of calling."""
    row["ms"][way] = ms = run.clock.program_ms(program, sets)
    if way != "both" and case.layout == "one":
        row["of_floor"][way] = floor_bytes(case, way) / run.result["copy_rate"] * 1e3 / ms
    if way in case.memory:
        extra = program.one.memory_analysis().temp_size_in_bytes
        row["extra_memory"][way] = extra / (2 * sum(sizes(case)))
    if way in case.profiled:
        row["gpu_ms"][way] = gpu_time(functools.partial(queue, program.one, sets))


def measure_case(run, section, case, programs):
    """The row of a case."""
    row = run.add(section, **dataclasses.asdict(case))
    with noting_failure(row["failed"], "inputs"):
        sets = draw(case)
        for way in case.timed:
            program = programs[case, way]
            if isinstance(program, str):
                row["failed"][way] = program
                continue
            with noting_failure(row["failed"], way):
                measure_way(run, case, way, program, sets, row)
    for other in run.rows(section):
        if (other["name"], other["shape"]) == (case.against, case.shape):
            common = row["ms"].keys() & other["ms"].keys()
            row["against"] = {way: row["ms"][way] / other["ms"][way] for way in common}
    return row


class CaseSection(NamedTuple):
    """A section whose rows are cases."""

    title: str
    seconds: int  # about what it takes on an H100
    cases: Callable[[argparse.Namespace], list[Case]]
    columns: list[Column]
    workers: int | None = None  # that compile; None: as many as there are cores

    def measure(self, run, name):
        cases = self.cases(run.options)
        if run.options.rehearse:
            cases = [shrunk(case) for case in cases]
        if not cases:
            return say("  skipped: there is one GPU")
        programs = compile_all(cases, run.clock.repeats, self.workers)
        table = Table(self.columns, [case.name for case in cases])
        for case in cases:
            run.show(table, measure_case(run, name, case, programs))


# Sections ---------------------------------------------------------------------------------------


def decode_step(q, k, v, state):
    from lightning_attn import lightning_attn

    return lightning_attn(q, k, v, **LAYER, initial_state=state)


def decode_loop(q, k, v, state):
    """Steps of a lax.scan that carries the state; q, k, v are [steps, B, 1, H, D]."""

    def body(state, token):
        output, state = decode_step(*token, state)
        return state, output

    return jax.lax.scan(body, state, (q, k, v))


def decode_inputs(shape, steps):
    """q, k, v of so many steps, and a state."""
    B, _, H, D = shape
    keys = jax.random.split(jax.random.key(0), 4)
    like = jax.ShapeDtypeStruct((steps, *shape), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((B, H, D, D), jnp.float32)
    return (*(draw_array(key, like) for key in keys[:3]), draw_array(keys[3], state))


def donating(q, k, v, state):
    """run(n) of decode steps that each give the next one their state, in its memory."""
    step = jax.jit(decode_step, donate_argnums=3).lower(q, k, v, state).compile()
    states = [state]

    def run(n):
        for _ in range(n):
            states[0] = step(q, k, v, states[0])[1]
        jax.block_until_ready(states[0])

    return run


def time_loop(run, shape):
    inputs = decode_inputs(shape, DECODE_STEPS)
    loop = compile_one(decode_loop, inputs)
    return run.clock.ms(functools.partial(queue, loop, [inputs])) / DECODE_STEPS


def measure_decode_row(run, shape):
    row = run.add("decode", name=f"B = {shape[0]}", shape=shape, dtype="bfloat16")
    with noting_failure(row["failed"], "scan"):
        row["ms"]["scan"] = ms = time_loop(run, shape)
        state_bytes = 4 * shape[0] * shape[2] * shape[3] ** 2
        row["of_floor"]["scan"] = 2 * state_bytes / run.result["copy_rate"] * 1e3 / ms
    with noting_failure(row["failed"], "step"):
        q, k, v, state = decode_inputs(shape, 1)
        step = donating(q[0], k[0], v[0], state)
        del state  # it was donated
        row["ms"]["step"] = run.clock.ms(step)
        row["gpu_ms"]["step"] = gpu_time(step)
    return row


def measure_decode(run, _):
    def us(ms):
        return f"{ms * 1e3:.2f}"

    table = Table(
        [
            NAME,
            column("in lax.scan, us", "ms", "scan", us),
            column("of copy rate", "of_floor", "scan", "{:.0%}".format),
            column("jit that donates, us", "ms", "step", us),
            column("its kernel, us", "gpu_ms", "step", us),
        ]
    )
    for batch in DECODE_BATCHES:
        shape = (2, 1, 4, 32) if run.options.rehearse else (batch, 1, 32, 128)
        run.show(table, measure_decode_row(run, shape))


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


def measure_first(run, _):
    """Seconds and kernels of the first jitted gradient of a process, which has nothing cached."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_GRADIENT],
        check=False,
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    row = run.add("first", name="first gradient", shape=(1, 4096, 16, 128))
    if done.returncode:
        row["failed"]["first"] = (done.stderr.strip().splitlines() or ["?"])[-1][:160]
        say(f"  failed: {row['failed']['first']}")
    else:
        seconds, kernels = done.stdout.split()[-2:]
        row |= {"first_seconds": float(seconds), "kernels": int(kernels)}
        say(f"  {row['first_seconds']:.2f} s, of which compiling {kernels} kernels is a part")
    run.save()


class OtherSection(NamedTuple):
    title: str
    seconds: int
    measure: Callable[[Run, str], None]


SECTIONS = {
    "shapes": CaseSection(
        "the main shapes; no state: forward without it; memory: that of both, extra",
        65,
        lambda options: shape_cases(options.shapes or SHAPES, options.dtype),
        [
            SHAPE,
            *columns_of("forward", "ms", "floor", "output"),
            *columns_of("backward", "ms", "floor"),
            *columns_of("both", "ms", "memory"),
        ],
    ),
    "packs": CaseSection(
        f"packs in {text_of(LONG)}, traced cu_seqlens, no final states",
        25,
        pack_cases,
        [NAME, *both_ways("ms", "ratio", "memory")],
    ),
    "decode": OtherSection("decode steps of 32 heads of 128, float32 state", 20, measure_decode),
    "decays": CaseSection("slow decays", 20, decay_cases, [NAME, SHAPE, *both_ways("ms", "ratio")]),
    "short": CaseSection(
        "short prompts, whose times are partly those of launching",
        25,
        short_cases,
        [SHAPE, *both_ways("ms", "gpu", "floor")],
    ),
    "variants": CaseSection(
        "plain JAX, dtypes, grouped heads",
        20,
        variant_cases,
        [NAME, SHAPE, *both_ways("ms", "floor", "ratio")],
    ),
    "lengths": CaseSection(
        "time against length", 35, length_cases, [NAME, SHAPE, *both_ways("ms", "per_token")]
    ),
    "first": OtherSection("the first jitted gradient of a process", 15, measure_first),
    # Compiled one at a time: the compiler calls back into Python to partition.
    "devices": CaseSection(
        "all GPUs and one: jit over batch or heads, seq_axis over tokens",
        60,
        device_cases,
        [NAME, SHAPE, *both_ways("ms", "speedup")],
        workers=1,
    ),
}
QUICK = ["shapes", "packs", "decode"]


def measure_section(run, name):
    section = SECTIONS[name]
    say(f"\n{name}: {section.title} (about {section.seconds} s)")
    start = time.perf_counter()
    section.measure(run, name)
    run.note_seconds(name, start)


# Peers, each in a process of its own ------------------------------------------------------------


def by_difference(forward, both):
    """Times of a forward pass and, as what both take more than it, of a backward pass."""
    forward, both = Clock().ms(forward), Clock().ms(both)
    return {"forward": forward, "backward": both - forward}


def softmax(shape, dtype):
    """Causal softmax attention by cuDNN."""
    clock, sets = Clock(), draw(Case("softmax", shape, dtype=dtype))

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"), None

    forward, both = (
        clock.program_ms(compile_program(f, sets, clock.repeats), sets)
        for f in (forward_of(attend), both_of(attend))
    )
    return {"forward": forward, "backward": both - forward}


def ejkernel(shape, dtype):
    """Its op cannot be jitted."""
    from ejkernel.kernels._triton.lightning_attn import lightning_attn

    sets = draw(Case("ejkernel", shape, dtype=dtype))

    def attend(q, k, v):
        return lightning_attn(q, k, v, *LAYER.values())

    forward, both = forward_of(attend), backward_of(attend)  # eager: backward runs forward as well
    return by_difference(
        functools.partial(queue, forward, sets), functools.partial(queue, both, sets)
    )


def torch_array(shape, dtype):
    import torch

    dtype, grad = getattr(torch, dtype), shape[1] > 1
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=grad)


def torch_state(shape):
    """Arguments of a decode step: its state."""
    import torch

    B, T, H, D = shape
    return {"initial_state": torch.randn(B, H, D, D, device="cuda")} if T == 1 else {}


def torch_times(attend, shape, dtype):
    """Times of a PyTorch implementation; of a decode step only those of a forward pass."""
    import torch

    torch.manual_seed(0)
    count = 1 if 8 * np.prod(shape) > 2**28 else 4
    sets = [[torch_array(shape, dtype) for _ in range(4)] for _ in range(count)]

    def run(call, n):
        for i in range(n):
            call(*sets[i % len(sets)])
        torch.cuda.synchronize()

    def forward(n):
        with torch.no_grad():
            run(lambda q, k, v, do: attend(q, k, v), n)

    def both(n):
        run(lambda q, k, v, do: torch.autograd.grad(attend(q, k, v), (q, k, v), do), n)

    if shape[1] == 1:
        return {"forward": Clock().ms(forward)}
    return by_difference(forward, both)


def fla_lightning(op, shape, dtype):
    extra = torch_state(shape)

    def attend(q, k, v):
        return op(q, k, v, *LAYER.values(), output_final_state=True, **extra)[0]

    return torch_times(attend, shape, dtype)


def fla_chunk(shape, dtype):
    from fla.ops.lightning_attn import chunk_lightning_attn

    return fla_lightning(chunk_lightning_attn, shape, dtype)


def fla_recurrent(shape, dtype):
    from fla.ops.lightning_attn import fused_recurrent_lightning_attn

    return fla_lightning(fused_recurrent_lightning_attn, shape, dtype)


def fla_fused_chunk(shape, dtype):
    import torch
    from fla.ops.simple_gla import fused_chunk_simple_gla

    heads = shape[2]
    rate = 8 / heads * (1 - LAYER["layer_idx"] / LAYER["num_layers"])
    g_gamma = -rate * torch.arange(heads, device="cuda", dtype=torch.float32)
    extra = torch_state(shape)

    def attend(q, k, v):
        return fused_chunk_simple_gla(q, k, v, g_gamma=g_gamma, output_final_state=True, **extra)[0]

    return torch_times(attend, shape, dtype)


PEERS = {
    "fla_chunk": fla_chunk,
    "fla_fused_chunk": fla_fused_chunk,
    "fla_recurrent": fla_recurrent,
    "ejkernel": ejkernel,
    "softmax": softmax,
}


def be_peer(name, shapes, dtype):
    """The process of a peer: prints a line of JSON for each shape."""
    for shape in shapes:
        times = {}
        with noting_failure(times, "failed"):
            times = PEERS[name](shape, dtype)
        say(json.dumps(times))


def start_peer(name, shapes, dtype, errors):
    command = [sys.executable, __file__, "--peer", name, "--dtype", dtype, "--shapes"]
    command += [",".join(map(str, shape)) for shape in shapes]
    # A peer that wants packages of its own finds them where BENCH_PATH_<peer> says.
    path = os.environ.get(f"BENCH_PATH_{name}", os.environ.get("PYTHONPATH", ""))
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def read_peer(process, shapes):
    """Yields the times of one shape after the other, as far as the process gets in its time."""
    stop = threading.Timer(PEER_SECONDS, process.kill)
    stop.start()
    try:
        lines = (line for line in process.stdout if line.startswith("{"))
        for _, line in zip(shapes, lines, strict=False):
            yield json.loads(line)
        process.wait()
    finally:
        late = stop.finished.is_set()
        stop.cancel()
        process.kill()
        process.wait()
    if late:
        raise TimeoutError(f"it took more than {PEER_SECONDS} s")


def peer_times(name, shapes, dtype):
    """Yields (shape, times) for all shapes; times are {"failed": why} where there are none."""
    left = list(shapes)
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = start_peer(name, shapes, dtype, errors)
            with contextlib.closing(read_peer(process, shapes)) as lines:
                for times in lines:
                    yield left.pop(0), times
            errors.seek(0)
            why = (errors.read().strip().splitlines() or ["it ended early"])[-1][:160]
        except TimeoutError as error:
            why = str(error)
    for shape in left:
        yield shape, {"failed": why}


def own_times(run):
    """{shape: ms of forward and backward} of what peers are compared with."""
    found = {}
    for name in ("lengths", "decode", "shapes"):
        for row in run.rows(name):
            ms = row["ms"]
            too_long = name == "lengths" and row["shape"][1] == LONGER
            wanted = row["name"] != "plain JAX" and not too_long
            if ms and wanted and row["dtype"] == run.options.dtype:
                found[tuple(row["shape"])] = {"forward": ms["step"]} if "step" in ms else ms
    return found


def measure_peers(run, names):
    own = own_times(run)
    say(f"\npeers: other implementations, {run.options.dtype}, each in a process of its own")
    start = time.perf_counter()
    table = Table([NAME, SHAPE, *both_ways("ms", "ratio")], names)
    for name in names:
        # the others have no decode step
        shapes = [shape for shape in own if shape[1] > 1 or name == "fla_recurrent"]
        with contextlib.closing(peer_times(name, shapes, run.options.dtype)) as found:
            for shape, times in found:
                run.show(table, add_peer_row(run, name, shape, times, own[shape]))
    run.note_seconds("peers", start)


def add_peer_row(run, name, shape, times, own):
    why = times.pop("failed", None)
    row = run.add("peers", name=name, shape=shape, dtype=run.options.dtype)
    row["ms"] = times
    row["against"] = {way: ms / own[way] for way, ms in times.items() if way in own}
    if why:
        row["failed"]["forward"] = why
    return row


def fastest_other(result, shape, way):
    """(ms, name) of the fastest peer at a shape, or None."""
    times = [
        (row["ms"][way], row["name"])
        for row in rows_of(result, "peers")
        if tuple(row["shape"]) == tuple(shape) and way in row["ms"]
    ]
    return min(times, default=None)


def show_fastest(run):
    say("\nthe fastest other implementation at the main shapes, and how many times ours it takes")
    for row in run.rows("shapes"):
        texts = []
        for way in ("forward", "backward"):
            other = fastest_other(run.result, row["shape"], way)
            if other and way in row["ms"]:
                texts.append(f"{way} {other[1]} {other[0] / row['ms'][way]:.2f}x")
        say(f"  {text_of(row['shape']):<18}  {', '.join(texts) or 'none was measured'}")


# Launch configurations --------------------------------------------------------------------------


def configurations(head_dim, dtype, hopper):
    """Fields of `_Config` that are tried, for the Hopper kernel or for the Triton kernel."""
    for C in (32, 64):
        for BV in (b for b in (32, 64, 128) if b <= head_dim):
            for warps in (4, 8):
                for stages in (1, 2, 3, 4):
                    fits = C == 64 and warps * 16 == BV and stages > 1 and dtype != "float32"
                    if fits or not hopper:
                        yield {"C": C, "BV": BV, "num_warps": warps, "num_stages": stages}


def time_configuration(la, case, sets, fields):
    """ms of a forward pass that is launched so."""
    chosen = la._config
    la._config = lambda *args: dataclasses.replace(chosen(*args), **fields)
    jax.clear_caches()
    try:
        program = compile_program(calls(case)["forward"], sets, Clock().repeats)
        return Clock().program_ms(program, sets)
    finally:
        la._config = chosen


def tune_case(case):
    """Times every configuration; returns [(ms, its text)]."""
    import lightning_attn as la

    sets, found, failed = draw(case), [], {}
    for kernel in (la._hopper_kernel, la._scan_kernel):
        for fields in configurations(case.shape[3], case.dtype, kernel is la._hopper_kernel):
            text = f"{kernel.__name__} " + " ".join(f"{k}={v}" for k, v in fields.items())
            with noting_failure(failed, text):
                found.append(
                    (time_configuration(la, case, sets, {"kernel": kernel} | fields), text)
                )
    for text, why in failed.items():
        say(f"    {text}: {why[:80]}")
    return found


def tune():
    """Prints the fastest launch configurations: what `_config` should choose."""
    for D, dtype in (64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "float32"):
        case = Case("tune", (4, 4096, 4096 // D, D), dtype=dtype)
        say(f"{text_of(case.shape)} {dtype}")
        for ms, text in sorted(tune_case(case))[:6]:
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


@jax.jit
def cpu_lightning(q, k, v):
    from lightning_attn import lightning_attn

    return lightning_attn(q, k, v, **LAYER)[0]


@jax.jit
def cpu_recurrence(q, k, v):
    from lightning_attn import lightning_attn_reference

    return lightning_attn_reference(q, k, v, **LAYER)[0]


@jax.jit
def cpu_softmax(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def cpu_error(q, k, v):
    """Of the outputs, relative to those of the recurrence."""
    got, want = (f(q, k, v).astype(jnp.float32) for f in (cpu_lightning, cpu_recurrence))
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def measure_cpu_row(run, shape):
    row = run.add("cpu", name=text_of(shape), shape=shape, dtype=run.options.dtype)
    with noting_failure(row["failed"], "inputs"):
        q, k, v, _ = draw(Case("cpu", shape, dtype=run.options.dtype))[0]
        for way, f in {"lightning": cpu_lightning, "softmax": cpu_softmax}.items():
            with noting_failure(row["failed"], way):
                row["ms"][way] = cpu_time(f, q, k, v)
        with noting_failure(row["failed"], "error"):
            row["error"] = cpu_error(q, k, v)
    return row


def measure_cpu(run):
    say(f"no GPU: plain JAX on the CPU, {run.options.dtype}, forward\n")

    def error(row):
        return f"{row['error']:.1e}" if "error" in row else "-"

    table = Table(
        [
            SHAPE,
            ms_column("lightning ms", "lightning"),
            ms_column("softmax ms", "softmax"),
            Column("error", error),
        ]
    )
    for shape in run.options.shapes or CPU_SHAPES:
        run.show(table, measure_cpu_row(run, shape))
    show_growth(*(run.rows("cpu")[i] for i in (0, -1)))


def show_growth(first, last):
    """How the times grew with the tokens, where these are all that grew."""
    (B, T, *heads), (last_B, last_T, *last_heads) = first["shape"], last["shape"]
    ways = [way for way in ("lightning", "softmax") if way in first["ms"] and way in last["ms"]]
    if (B, heads) == (last_B, last_heads) and last_T > T and ways:
        growth = [f"{way} {last['ms'][way] / first['ms'][way]:.0f} times the time" for way in ways]
        say(f"\n  {last_T / T:g} times the tokens: {', '.join(growth)}")


# The plot ---------------------------------------------------------------------------------------

INK, GREY, FAINT = "#22272e", "#768390", "#e4e8ec"
OURS = "#0a5fb4"
LINES = {  # label, colour
    "this file": ("this file", OURS),
    "fla_chunk": ("fla chunk", "#c4622d"),
    "fla_fused_chunk": ("fla fused chunk", "#d9a066"),
    "fla_recurrent": ("fla recurrent", "#a3907c"),
    "softmax": ("cuDNN softmax", "#7a5195"),
    "CPU softmax": ("softmax attention", "#7a5195"),
    "plain JAX": ("plain JAX", "#8b98a5"),
    "ejkernel": ("ejkernel", "#5f8f6b"),
    "CPU lightning": ("this file", OURS),
}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "svg.hashsalt": "lightning_attn",
}


def length_lines(result):
    """{contestant: [(tokens, ms)]} of forward passes of one batch row, sorted by tokens."""
    lengths = rows_of(result, "lengths")
    shapes = {tuple(row["shape"]) for row in lengths}
    peers = [row for row in rows_of(result, "peers") if tuple(row["shape"]) in shapes]
    points = [(row["name"], row, "forward") for row in lengths + peers]
    points += [(f"CPU {way}", row, way) for row in rows_of(result, "cpu") for way in row["ms"]]
    lines = {}
    for name, row, way in points:
        if way in row["ms"]:
            lines.setdefault(name, []).append((row["shape"][1], row["ms"][way]))
    return {name: sorted(points) for name, points in lines.items()}


def bars(result):
    """[(shape, ours, floor, other)] of forward passes at the main shapes; other is (ms, name)."""
    return [
        (
            tuple(row["shape"]),
            row["ms"]["forward"],
            row["ms"]["forward"] * row["of_floor"]["forward"],
            fastest_other(result, row["shape"], "forward"),
        )
        for row in rows_of(result, "shapes")
        if "forward" in row["of_floor"]
    ]


def short_number(value):
    """65536 as 64k, 1048576 as 1M."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if value >= unit and value % unit == 0:
            return f"{value // unit}{name}"
    return str(value)


def spread(heights, gap):
    """The heights, moved apart so that neighbours are a gap apart, and no further than need be."""
    order = np.argsort(heights)
    moved = np.array(heights, float)[order]
    for _ in range(100):
        for i in range(len(moved) - 1):
            lack = gap - (moved[i + 1] - moved[i])
            if lack > 1e-9:
                moved[i] -= lack / 2
                moved[i + 1] += lack / 2
    back = np.empty(len(moved))
    back[order] = moved
    return back


def line_style(contestant):
    """(label, colour)"""
    return LINES.get(contestant, (contestant, GREY))


def panel_title(axes, title, subtitle):
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=26)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=GREY, fontsize=9.5)


def label_lines(axes, lines):
    """Names at the ends of the lines; those that end at about the same place are moved apart."""
    ends = {name: points[-1] for name, points in lines.items()}
    low, high = np.log10(axes.get_ylim())
    for tokens in {end[0] for end in ends.values()}:
        names = [name for name in ends if ends[name][0] == tokens]
        heights = spread([np.log10(ends[name][1]) for name in names], (high - low) / 21)
        for name, height in zip(names, heights, strict=True):
            label, colour = line_style(name)
            axes.annotate(
                label,
                (tokens, 10**height),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontweight="bold" if colour == OURS else "normal",
            )


def draw_lines(axes, lines):
    """Left: time against sequence length."""
    for name in lines:
        _, colour = line_style(name)
        ours = colour == OURS
        axes.loglog(
            *zip(*lines[name], strict=True),
            color=colour,
            linewidth=2.6 if ours else 1.5,
            marker="o",
            markersize=5.5 if ours else 3.8,
            zorder=3 if ours else 2,
            solid_capstyle="round",
        )
    tokens = sorted({point[0] for points in lines.values() for point in points})
    ticks = tokens[::2] if len(tokens) > 6 else tokens
    ticks = ticks if ticks[-1] == tokens[-1] else [*ticks, tokens[-1]]
    axes.set_xticks(ticks, [short_number(t) for t in ticks])
    axes.set_xlim(tokens[0] / 1.25, tokens[-1] * 4.5)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g} ms")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel("tokens", loc="left")
    label_lines(axes, lines)


def draw_bar(axes, y, contestant, ms, floor, more=""):
    """A bar as long as the time is in memory floors, with its time beside it."""
    label, colour = line_style(contestant)
    ours = colour == OURS
    axes.barh(y, ms / floor, height=0.36, color=colour, alpha=1 if ours else 0.38)
    axes.annotate(
        f"{ms:#.3g}".rstrip(".") + " ms" + ("" if ours else f"  {label}{more}"),
        (ms / floor, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=OURS if ours else GREY,
        fontweight="bold" if ours else "normal",
    )


def draw_floor(axes):
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate(
        "memory floor",
        (1, -0.72),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
    )


def draw_bars(axes, found):
    """Right: ours and the fastest other, as multiples of the memory floor."""
    for i, (_, ours, floor, other) in enumerate(found):
        draw_bar(axes, i - 0.2, "this file", ours, floor)
        if other:
            ms, name = other
            draw_bar(axes, i + 0.2, name, ms, floor, f", {ms / ours:.1f}x")
    draw_floor(axes)
    widest = max(max(ours, other[0] if other else 0) / floor for _, ours, floor, other in found)
    axes.set_ylim(len(found) - 0.4, -1.05)
    axes.set_xlim(0, widest * 1.55)
    axes.set_yticks(range(len(found)), [text_of(shape) for shape, *_ in found])
    axes.set_xlabel("time, in memory floors", loc="left")
    axes.locator_params(axis="x", integer=True)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def caption(result):
    """Machine, versions, date, and what the floor is."""
    machine = result["machine"]
    found = {name: result["versions"][name] for name in ("jax", "triton")}
    versions = [f"{name} {version}" for name, version in found.items() if version]
    words = [machine["device"], *versions, result["date"]]
    if result.get("copy_rate"):
        rate = result["copy_rate"] / 1e12
        words.append(
            f"floor: q, k, v read and o written once at the rate of a copy, {rate:.2f} TB/s"
        )
    return "   ·   ".join(words)


def draw_panels(result, figure):
    lines, found = length_lines(result), bars(result)
    count = bool(lines) + bool(found)
    panels = list(figure.subplots(1, count, squeeze=False, width_ratios=[1, 1][:count])[0])
    if lines:
        first = (rows_of(result, "lengths") or rows_of(result, "cpu"))[0]
        B, _, H, D = first["shape"]
        what = f"batch {B}, {H} heads of {D}, {first['dtype']}"
        panel_title(panels[0], "Forward pass against sequence length", what)
        draw_lines(panels[0], lines)
    if found:
        dtype = rows_of(result, "shapes")[0]["dtype"]
        panel_title(
            panels[-1],
            "Forward pass at the main shapes",
            f"batch, tokens, heads, head dim; {dtype}; this file and the fastest other",
        )
        draw_bars(panels[-1], found)
    return count


def plot(source, target):
    """Draws what a file of --save holds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(pathlib.Path(source).read_text())
    with plt.rc_context(STYLE):
        figure = plt.figure(layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        count = draw_panels(result, figure)
        figure.set_size_inches(6.6 * count, 5.4)
        figure.supxlabel(caption(result), x=0.01, ha="left", fontsize=8.5, color=GREY)
        pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if target.endswith(".svg") else {}
        figure.savefig(target, dpi=150, facecolor="white", metadata=metadata)
    say(f"plotted in {target}")


# The command line -------------------------------------------------------------------------------


def shape_of(text):
    """(B, T, H, D) of "B,T,H,D"."""
    try:
        shape = tuple(map(int, text.split(",")))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"expected B,T,H,D, four positive integers like 1,4096,16,128, got {text!r}"
        )
    return shape


def sections_of(text):
    names = text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(SECTIONS)}, got {','.join(unknown)!r}"
        )
    return names


def sections_help():
    lines = [
        f"  {name:<9} about {section.seconds:>2} s  {section.title}"
        for name, section in SECTIONS.items()
    ]
    total = sum(section.seconds for name, section in SECTIONS.items() if name != "devices")
    return "\n".join(
        [
            "sections on one H100 (--only), with compilation:",
            *lines,
            f"All take about {total} s on one GPU. The CPU comparison takes under a minute.",
        ]
    )


def add_choices(add):
    """Options that say what is measured."""
    quick = sum(SECTIONS[name].seconds for name in QUICK)
    add(
        "--only",
        type=sections_of,
        metavar="NAME[,NAME]",
        help="these sections alone (GPU); their times are below",
    )
    add(
        "--quick",
        action="store_true",
        help=f"only {', '.join(QUICK)}, one round each (GPU): about {quick * 2 // 3} s",
    )
    add(
        "--shapes",
        nargs="+",
        type=shape_of,
        metavar="B,T,H,D",
        help="these shapes alone: on a GPU about 5 s each",
    )
    add(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the main shapes and the peers, by default bfloat16; on a CPU of all that is "
        "measured, by default float32. Costs no time",
    )
    add(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        metavar="NAME",
        help=f"also other implementations (GPU), all or some of {', '.join(PEERS)}, at the shapes "
        "of those of the sections shapes, lengths and decode that run: one to five minutes each, "
        f"and {PEER_SECONDS // 60} at most",
    )
    add(
        "--tune",
        action="store_true",
        help="time the launch configurations of the kernels and nothing else (GPU): ten minutes "
        "or more",
    )
    add("--peer", choices=list(PEERS), help=argparse.SUPPRESS)  # be the process of a peer
    add("--rehearse", action="store_true", help=argparse.SUPPRESS)  # GPU sections, tiny, on a CPU


def add_files(add):
    """Options that say what is written."""
    add("--save", metavar="FILE.json", help="write all that is measured, row by row: no time")
    add("--plot", metavar="FILE.json", help="draw a file of --save and measure nothing: 5 s")
    add(
        "--plot-out",
        metavar="FILE",
        help="where --plot draws to, .png or .svg, by default assets/speed.png",
    )


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=sections_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_choices(parser.add_argument)
    add_files(parser.add_argument)
    return parser


def given(options, names):
    """Those of the options that the command line has."""
    return [f"--{name}" for name in names if getattr(options, name) not in (None, False)]


def can_be_drawn(path):
    result = json.loads(pathlib.Path(path).read_text())
    return bool(length_lines(result) or bars(result))


def check_plot(parser, options):
    """--plot measures nothing, and must be able to draw."""
    names = "only", "quick", "shapes", "dtype", "peers", "save", "tune"
    if others := given(options, names):
        parser.error(f"--plot draws a file and measures nothing: leave out {', '.join(others)}")
    if not importlib.util.find_spec("matplotlib"):
        parser.error("--plot wants matplotlib: pip install matplotlib")
    options.plot_out = options.plot_out or str(HERE / "assets" / "speed.png")
    if not options.plot_out.endswith((".png", ".svg")):
        parser.error(
            f"--plot-out: expected a name that ends with .png or .svg, got {options.plot_out!r}"
        )
    try:
        drawable = can_be_drawn(options.plot)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(
            f"--plot: expected a file that --save wrote, got {options.plot!r}: {reason(error)}"
        )
    if not drawable:
        parser.error(f"--plot: {options.plot!r} has no rows of the sections lengths and shapes")


def check_options(parser, options, gpu):
    """Options that exclude each other, or want a GPU."""
    if options.plot_out:
        parser.error("--plot-out wants --plot FILE.json, a file that --save wrote")
    wants_gpu = given(options, ("only", "quick", "peers", "tune"))
    if wants_gpu and not gpu:
        parser.error(f"{wants_gpu[0]} wants a GPU, and JAX found {jax.default_backend()} only")
    if options.shapes and options.only not in (None, ["shapes"]):
        parser.error("--shapes sets the shapes of the section shapes: leave out --only")
    if options.quick and options.only:
        parser.error("--quick chooses its sections: leave out --only")
    if options.save and not pathlib.Path(options.save).absolute().parent.is_dir():
        parser.error(f"--save: there is no folder for {options.save!r}")


def chosen_sections(options):
    if options.shapes:
        return ["shapes"]
    return options.only or (QUICK if options.quick else list(SECTIONS))


def versions():
    """Of what is measured and of what it runs on; None for what is not installed."""
    import lightning_attn

    names = "jax", "jaxlib", "jax_triton", "triton"
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in names}
    return {"lightning_attn": lightning_attn.__version__} | found


def describe(options):
    """The head of a result: machine, versions, date."""
    device = jax.devices()[0]
    return {
        "machine": {"device": device.device_kind, "count": jax.device_count()},
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "arguments": sys.argv[1:],
        "sections": {},
    }


def measure_gpu(run):
    run.result["copy_rate"] = copy_rate(run.clock, 2**16 if run.options.rehearse else 2**28)
    say(f"a copy moves {run.result['copy_rate'] / 1e12:.2f} TB/s")
    for name in chosen_sections(run.options):
        measure_section(run, name)
    if run.options.peers is not None:
        measure_peers(run, run.options.peers or list(PEERS))
        show_fastest(run)
    else:
        say("\nother implementations were not measured: --peers")


def show_head(result):
    found = [f"{name} {version}" for name, version in result["versions"].items() if version]
    machine = result["machine"]
    say(f"{machine['count']} x {machine['device']}, {', '.join(found)}, {result['date']}")


def measure(options, gpu):
    """Returns the exit code."""
    clock = Clock(rounds=1) if options.quick else Clock()
    clock = Clock(0.001, 1, 2) if options.rehearse else clock
    run = Run(options, clock, describe(options))
    show_head(run.result)
    try:
        (measure_gpu if gpu else measure_cpu)(run)
    except KeyboardInterrupt:
        run.result["interrupted"] = True
        run.save()
        where = f", and is in {options.save}" if options.save else ""
        say(f"\ninterrupted: what is above was measured{where}")
        return 130
    if failed := run.failures():
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
    if options.plot:
        check_plot(parser, options)
        return plot(options.plot, options.plot_out)
    gpu = jax.default_backend() == "gpu" or options.rehearse
    check_options(parser, options, gpu)
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    if options.tune:
        return tune()
    return measure(options, gpu)


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
