# SPDX-License-Identifier: Apache-2.0
"""Measures lightning_attn: `python bench.py`, on a GPU or, in part, on a CPU.

floor    lower bound of a time: the bytes that must be moved, over the rate of a copy measured in
         the same run. Forward reads q, k, v and writes o; backward reads q, k, v, do and writes dq,
         dk, dv; a decode step reads and writes the state. A percentage is floor over time
memory   temporary buffers of forward and backward pass together, as a share of q, k, v and o
clock    median of three rounds of 0.2 s. Short calls are made 20 to a jit, so that Python is not
         measured. Inputs below 256 MiB rotate through four sets, so that L2 does not hold them
peers    timed by the same clock, each in a process of its own. Their backward time is the time of
         both passes minus that of the forward pass. PyTorch's are called from Python one by one
devices  all GPUs beside one GPU: a jit over batch or heads, and a shard_map with seq_axis
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# lightning_attn is imported where it is called: the processes of peers do without it.

P = jax.sharding.PartitionSpec
HERE = pathlib.Path(__file__).resolve().parent
LAYER = {"layer_idx": 12, "num_layers": 24}
WAYS = "forward", "backward"
say = functools.partial(print, flush=True)
text_of = lambda shape: ", ".join(map(str, shape))
nbytes = lambda *arrays: sum(x.size * x.dtype.itemsize for x in arrays)
ms_text = lambda ms: f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 100 else f"{ms:.1f}"
reason = lambda error: f"{type(error).__name__}: {error}".splitlines()[0][:160]

# What is measured -------------------------------------------------------------------------------


class Case(NamedTuple):
    """A row: what is called."""

    section: str
    name: str
    shape: tuple  # B, T, H, D
    dtype: str = "bfloat16"
    decays: str = "layer"  # or "none": g_gamma = 0
    kv_heads: int | None = None
    repeat_kv: bool = False  # keys and values are repeated for all query heads before the call
    sequences: int | None = None  # of a packed batch
    final_state: bool = True
    backend: str | None = None
    ways: tuple = WAYS
    split: str | None = None  # over all GPUs: "batch", "heads" or "tokens"


def shape_of(text):
    numbers = text.split(",")
    if len(numbers) != 4 or not all(n.isdecimal() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f"expected B,T,H,D, four positive integers, got {text!r}")
    return tuple(map(int, numbers))


BATCHED, LONG, LARGE = (8, 4096, 32, 128), (1, 32768, 32, 128), (32, 4096, 32, 128)
SHAPES = "8,4096,32,128 1,32768,32,128 1,131072,8,128 16,2048,16,128 4,8192,16,64 1,4096,16,128"
SHAPES += " 2,8192,16,96 2,8192,16,192 2,8192,16,256"
SHORT = "1,1024,64,128 1,512,32,128 1,200,32,128"
LENGTHS, LONGER = [2**n for n in range(11, 18)], 2**20
DECODE_BATCHES, DECODE_STEPS = (1, 64, 256), 200
SECTIONS = "shapes", "packed", "short", "variants", "lengths", "decode", "devices"


def cases_of(options):
    for shape in options.shapes or map(shape_of, SHAPES.split()):
        yield Case("shapes", text_of(shape), shape, options.dtype)
    if options.shapes:
        return
    for n in None, 32, 256, 4096:
        name = f"{n} sequences" if n else "one sequence"
        yield Case("packed", name, LONG, sequences=n, final_state=False)
    for shape in map(shape_of, SHORT.split()):
        yield Case("short", text_of(shape), shape)
    yield Case("variants", "no head forgets", LONG, decays="none")
    yield Case("variants", "8 key and value heads", LONG, kv_heads=8)
    yield Case("variants", "the same, repeated first", LONG, kv_heads=8, repeat_kv=True)
    yield Case("variants", "float32, in TF32", (4, 4096, 32, 128), "float32")
    yield Case("variants", "plain JAX", BATCHED, backend="xla")
    for T in *LENGTHS, LONGER:
        yield Case("lengths", "lightning_attn", (1, T, 16, 128))
    for T in LENGTHS:
        yield Case("lengths", "plain JAX", (1, T, 16, 128), backend="xla", ways=WAYS[:1])
    for shape, *splits in (LARGE, "batch", "heads"), ((1, LONGER, 16, 128), "tokens"):
        for split in None, *splits:
            yield Case("devices", split or "one GPU", shape, split=split)


# The clock --------------------------------------------------------------------------------------


def clock(run, calls=1, seconds=0.2, rounds=3):
    """Median time of a call in ms. run(n) makes n * calls calls and waits for them."""
    run(2)
    start = time.perf_counter()
    run(3)
    n = int(np.clip(seconds * 3 / (time.perf_counter() - start), 2, 5000))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run(n)
        times.append((time.perf_counter() - start) / n)
    return float(np.median(times)) * 1e3 / calls


def queue(call, sets, n):
    """Makes n calls, over rotating sets of inputs, and waits for the last call."""
    for i in range(n):
        out = call(*sets[i % len(sets)])
    jax.block_until_ready(out)


def ms_of(f, sets, repeats=20):
    """ms of a call of f."""
    if nbytes(*sets[0]) > 2**27:
        return clock(functools.partial(queue, jax.jit(f).lower(*sets[0]).compile(), sets))

    def calls(sets):
        outs = [()]
        for i in range(repeats):  # each waits for the call before: XLA would merge equal calls
            inputs, outs[-1] = jax.lax.optimization_barrier((sets[i % len(sets)], outs[-1]))
            outs.append(f(*inputs))
        return outs

    many = jax.jit(calls).lower(sets).compile()
    return clock(lambda n: queue(many, [(sets,)], n), repeats)


def gpu_ms(run, count=20):
    """ms that the kernels of a call take on the GPU, by JAX's profiler."""
    run(2)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(count)
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines]
        events = [event for line in lines if "Stream" in line.name for event in line.events]
        return sum(event.duration_ns for event in events) / count / 1e6


def copy_rate(values):
    """Bytes per second that a copy on the device moves, read and written."""
    x = jnp.ones(values, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / clock(functools.partial(queue, add, [(x,)])) * 1e3


# The calls of a case ----------------------------------------------------------------------------


@functools.cache
def mesh():
    return jax.make_mesh((jax.device_count(),), ("gpus",), (jax.sharding.AxisType.Auto,))


def inputs_of(case):
    """Sets of random q, k, v, do and, if packed, cu_seqlens: several if L2 could hold one."""
    B, T, H, D = case.shape
    Hk = case.kv_heads or H
    keys, rest = iter(jax.random.split(jax.random.key(0), 16)), []
    if case.sequences:
        cuts = np.random.default_rng(0).choice(T - 1, case.sequences - 1, replace=False) + 1
        rest = [jnp.asarray(np.r_[0, np.sort(cuts), T], jnp.int32)]
    sharding = None
    if case.split:
        dim = ("batch", "tokens", "heads").index(case.split)
        sharding = jax.NamedSharding(mesh(), P(*(None,) * dim, "gpus"))

    @functools.partial(jax.jit, static_argnums=1, out_shardings=sharding)
    def draw(key, heads):
        return jax.random.normal(key, (B, T, heads, D), case.dtype)

    count = 1 if 4 * B * T * H * D * jnp.dtype(case.dtype).itemsize > 2**28 else 4
    return [[*(draw(next(keys), heads) for heads in (H, Hk, Hk, H)), *rest] for _ in range(count)]


def passes_of(attend):
    """The passes of attend(q, k, v, *rest), as functions of q, k, v, do, *rest."""

    def both(q, k, v, do, *rest):
        output, pull_back = jax.vjp(lambda *qkv: attend(*qkv, *rest)[0], q, k, v)
        return output, pull_back(do)

    forward = lambda q, k, v, do, *rest: attend(q, k, v, *rest)
    # jit leaves out what the gradients do not need of the forward pass
    return {"forward": forward, "backward": lambda *inputs: both(*inputs)[1], "both": both}


def attention(case):
    """attend(q, k, v, [cu_seqlens]) -> (output, final state) as the case wants it."""
    from lightning_attn import lightning_attn

    H = case.shape[2]
    options = LAYER if case.decays == "layer" else {"g_gamma": np.zeros(H, np.float32)}
    options = options | dict(output_final_state=case.final_state, backend=case.backend)

    def attend(q, k, v, cu_seqlens=None):
        if case.repeat_kv:
            k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
        return lightning_attn(q, k, v, cu_seqlens=cu_seqlens, **options)

    if case.split != "tokens":
        return attend
    part = functools.partial(lightning_attn, **options, seq_axis="gpus")
    tokens = P(None, "gpus")
    return jax.shard_map(part, mesh=mesh(), in_specs=(tokens,) * 3, out_specs=(tokens, P()))


def measure_case(case, rate, rows):
    row = case._asdict()
    sets, passes = inputs_of(case), passes_of(attention(case))
    q, k, *_ = map(nbytes, sets[0])
    floors = {"forward": 2 * q + 2 * k, "backward": 3 * q + 4 * k}
    texts = [f"{case.section:<9}{case.name:<26}{text_of(case.shape):<20}"]
    alone = [r for r in rows if r["section"] == "devices" and r["shape"] == case.shape]
    for way in case.ways:
        row[way] = ms = ms_of(passes[way], sets)
        row[f"{way}_of_floor"] = share = floors[way] / rate * 1e3 / ms
        texts.append(f"{way} {ms_text(ms):>7} ms")
        texts[-1] += f"  {alone[0][way] / ms:.2f}x" if case.split and alone else f" {share:4.0%}"
    if case.section in ("shapes", "packed"):
        both = jax.jit(passes["both"]).lower(*sets[0]).compile()
        row["memory"] = both.memory_analysis().temp_size_in_bytes / floors["forward"]
        texts.append(f"memory {row['memory']:.1%}")
    if case.section == "lengths":
        per_token = [f"{row[way] * 1e6 / case.shape[1]:.2f}" for way in case.ways]
        texts.append(f"{' / '.join(per_token)} ns per token")
    if case.section == "short":
        row["gpu"] = [gpu_ms(functools.partial(queue, jax.jit(passes[w]), sets)) for w in WAYS]
        texts.append(f"on the GPU {' / '.join(map(ms_text, row['gpu']))} ms")
    say("  ".join(texts))
    return row


def decode_inputs(B, H=32, D=128):
    """The state, and q, k and v of all steps."""
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key: jax.random.normal(key, (DECODE_STEPS, B, 1, H, D), "bfloat16")
    return jax.random.normal(keys[0], (B, H, D, D)), list(map(draw, keys[1:]))


def ms_of_step(step, state, inputs):
    """ms of a step of a lax.scan that carries the state."""
    loop = jax.jit(lambda state, *inputs: jax.lax.scan(step, state, inputs))
    call = loop.lower(state, *inputs).compile()
    return clock(functools.partial(queue, call, [(state, *inputs)]), DECODE_STEPS)


def measure_decode(B, rate, rows):
    """A decode step: in a lax.scan, and its kernel alone."""
    from lightning_attn import lightning_attn

    step = lambda s, qkv: lightning_attn(*qkv, **LAYER, initial_state=s)[::-1]
    state, tokens = decode_inputs(B)
    ms, (_, H, D, _) = ms_of_step(step, state, tokens), state.shape
    row = dict(section="decode", name=f"B = {B}", shape=(B, 1, H, D), forward=ms)
    row["forward_of_floor"] = share = 2 * state.nbytes / rate * 1e3 / ms
    one = jax.jit(lambda s, *qkv: step(s, qkv), donate_argnums=0)

    def run(n):
        nonlocal state
        for _ in range(n):
            state, _ = one(state, *(x[0] for x in tokens))
        jax.block_until_ready(state)

    row["kernel"] = gpu_ms(run)
    us = [f"{x * 1e3:.1f} us" for x in (ms, row["kernel"])]
    say(f"decode   {row['name']:<26}in a scan {us[0]} {share:4.0%}  kernel alone {us[1]}")
    return row


def measure_slots(way, rate, rows, B=DECODE_BATCHES[-1]):
    """A decode step in a lax.scan, in which 3 of 10 rows keep their state."""
    from lightning_attn import lightning_attn, lightning_g_gamma

    state, tokens = decode_inputs(B)
    H = state.shape[1]
    one = lambda q, k, v, g, s: lightning_attn(
        q[None], k[None], v[None], g_gamma=g, initial_state=s[None]
    )

    def step(state, inputs):
        q, k, v, active = inputs
        if way == "slots by where":
            o, new = lightning_attn(q, k, v, **LAYER, initial_state=state)
            return jnp.where(active[:, None, None, None], new, state), o
        g = jnp.where(active[:, None], lightning_g_gamma(H, *LAYER.values()), 0)
        k = jnp.where(active[:, None, None, None], k, 0)
        o, state = jax.vmap(one)(q, k, v, g, state)
        return state[:, 0], o[:, 0]

    active = jax.random.bernoulli(jax.random.key(1), 0.7, (DECODE_STEPS, B))
    ms = ms_of_step(step, state, (*tokens, active))
    say(f"decode   {B} {way:<22}in a scan {ms * 1e3:.1f} us")
    return dict(section="decode", name=f"{B} {way}", shape=(B, 1, *state.shape[1:3]), forward=ms)


# Peers, each in a process of its own ------------------------------------------------------------


def fla(shape, dtype):
    """flash-linear-attention's chunk_lightning_attn, in PyTorch."""
    import torch
    from fla.ops.lightning_attn import chunk_lightning_attn

    array = lambda: torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)).requires_grad_()
    count = 1 if 4 * np.prod(shape) * 2 > 2**28 else 4
    sets = [[array() for _ in range(4)] for _ in range(count)]
    attend = lambda q, k, v: chunk_lightning_attn(q, k, v, **LAYER, output_final_state=True)[0]

    def run(call, n):
        for i in range(n):
            call(*sets[i % len(sets)])
        torch.cuda.synchronize()

    def forward(n):
        with torch.no_grad():
            run(lambda q, k, v, do: attend(q, k, v), n)

    def both(n):
        run(lambda q, k, v, do: torch.autograd.grad(attend(q, k, v), (q, k, v), do), n)

    return clock(forward), clock(both)


def softmax(shape, dtype):
    """Causal softmax attention by cuDNN."""
    op = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    passes = passes_of(lambda q, k, v: (op(q, k, v), None))
    sets = inputs_of(Case("peers", "softmax", shape, dtype))
    return tuple(ms_of(passes[way], sets) for way in ("forward", "both"))


PEERS = {"fla": fla, "softmax": softmax}


def be_peer(name, shapes, dtype):
    for shape in shapes:
        row = dict(section="peers", name=name, shape=shape)
        try:
            forward, both = PEERS[name](shape, dtype)
            row |= dict(forward=forward, backward=both - forward)
        except Exception as error:
            row["failed"] = reason(error)
        say(json.dumps(row))


def measure_peer(name, shapes, dtype, seconds=1200):
    """Yields the rows of a peer as they come, until its time is up."""
    command = [sys.executable, __file__, "--peer", name, "--dtype", dtype, "--shapes"]
    command += [",".join(map(str, shape)) for shape in shapes]
    peer = subprocess.Popen(["timeout", str(seconds), *command], stdout=subprocess.PIPE, text=True)
    for line in peer.stdout:
        if line.startswith("{"):
            row = json.loads(line)
            texts = [f"{way} {ms_text(row[way])} ms" for way in WAYS if way in row]
            texts += [f"failed: {row['failed']}"] if "failed" in row else []
            say(f"peers    {name:<26}{text_of(row['shape']):<20}{'  '.join(texts)}")
            yield row
    if peer.wait():
        say(f"peers    {name}: ended with status {peer.returncode}")


def fastest_other(rows, shape, way):
    """(ms, name) of the fastest peer."""
    same = lambda row: row["section"] == "peers" and tuple(row["shape"]) == tuple(shape)
    return min(((row[way], row["name"]) for row in rows if same(row) and way in row), default=None)


def show_fastest(rows):
    for row in rows:
        for way in WAYS if row["section"] == "shapes" else ():
            if (other := fastest_other(rows, row["shape"], way)) and way in row:
                factor = f"{other[1]} {other[0] / row[way]:.1f}x"
                say(f"{text_of(row['shape']):<20}{way:<9} the fastest other: {factor}")


# A CPU ------------------------------------------------------------------------------------------


def measure_cpu(shapes, dtype):
    """Error against the recurrence, and times beside softmax attention."""
    from lightning_attn import lightning_attn, lightning_attn_reference

    ours, recurrence = (
        lambda q, k, v, f=f: f(q, k, v, **LAYER) for f in (lightning_attn, lightning_attn_reference)
    )
    softmax = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    for shape in shapes or [(1, T, 4, 64) for T in (256, 1024, 4096)]:
        inputs = inputs_of(Case("cpu", "", shape, dtype))[0]
        got, want = (jax.jit(f)(*inputs[:3])[0].astype(jnp.float32) for f in (ours, recurrence))
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        texts = [f"{text_of(shape):<20}error {error:.0e}"]
        for way in WAYS:
            of_ours = jax.jit(passes_of(ours)[way])
            of_softmax = jax.jit(passes_of(lambda *qkv: (softmax(*qkv), None))[way])
            ms = [
                clock(functools.partial(queue, f, [inputs]), 1, 0.1) for f in (of_ours, of_softmax)
            ]
            texts.append(f"{way} {ms_text(ms[0]):>7} ms, softmax {ms_text(ms[1]):>7} ms")
        say("  ".join(texts))


# The plot ---------------------------------------------------------------------------------------

COLOURS = {"lightning_attn": "#0a5fb4", "fla": "#c4622d", "softmax": "#7a5195"}
LABELS = {"lightning_attn": "lightning_attn", "fla": "fla", "softmax": "cuDNN softmax"}
GREY, DARK = "#6b7683", "#22272e"


def plot_lengths(axes, rows):
    """Time against the number of tokens, forward (solid) and backward (dashed)."""
    lines = [r for r in rows if r["section"] in ("lengths", "peers") and r["name"] in COLOURS]
    lines = [r for r in lines if (r["shape"][0], *r["shape"][2:]) == (1, 16, 128)]
    for name, colour in COLOURS.items():
        for way, style in zip(WAYS, ("-", "--")):
            points = sorted(
                (r["shape"][1], r[way]) for r in lines if r["name"] == name and way in r
            )
            points = [point for point in points if point[0] <= LENGTHS[-1]]
            if points:
                width = 2.6 if name == "lightning_attn" else 1.6
                label = f"{LABELS[name]}, {way}"
                axes.loglog(*zip(*points), style, color=colour, lw=width, label=label)
    for row in lines:
        if row["name"] == "fla" and row["shape"][1] == LENGTHS[0] and "forward" in row:
            at, offset = (LENGTHS[0], row["forward"]), (4, 6)
            text = "the time that Python takes to launch fla"
            axes.annotate(text, at, offset, textcoords="offset points", color=GREY, fontsize=8.5)
    axes.set_xticks(LENGTHS, [f"{T // 1024}k" for T in LENGTHS])
    axes.minorticks_off()
    axes.set(xlabel="tokens", ylabel="ms", title="Time against length, 16 heads of 128")
    axes.legend(frameon=False, fontsize=9)


def plot_shapes(axes, rows, way):
    """Percent of copy speed at the main shapes, beside the fastest other implementation."""
    shapes = [r for r in rows if r["section"] == "shapes" and way in r]
    for i, row in enumerate(shapes):
        share, other = row[f"{way}_of_floor"], fastest_other(rows, row["shape"], way)
        axes.barh(i - 0.2, share, 0.38, color=COLOURS["lightning_attn"])
        axes.text(
            share + 0.01, i - 0.2, f"{share:.0%}, {row[way]:#.3g} ms", va="center", fontsize=9
        )
        if other:
            ms, name = other
            axes.barh(i + 0.2, share * row[way] / ms, 0.38, color=COLOURS[name], alpha=0.75)
            text = f"{LABELS[name]}, {ms / row[way]:.1f}x the time"
            place = share * row[way] / ms + 0.01
            axes.text(place, i + 0.2, text, va="center", fontsize=9, color=COLOURS[name])
    axes.set_yticks(range(len(shapes)), [text_of(row["shape"]) for row in shapes])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.35), title=f"{way.capitalize()}, percent of copy speed")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.axvline(1, color=DARK, lw=1, ls=":")


def plot(result, target):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11.5}
    style |= {"axes.grid": True, "grid.color": "#e4e8ec", "axes.axisbelow": True}
    with plt.rc_context(style | {"axes.titleweight": "bold", "axes.titlelocation": "left"}):
        figure, axes = plt.subplots(1, 3, figsize=(15.5, 5.6), layout="constrained")
        plot_lengths(axes[0], result["rows"])
        for way, of_way in zip(WAYS, axes[1:]):
            plot_shapes(of_way, result["rows"], way)
            of_way.text(
                -0.03, 1.0, "B, T, H, D", transform=of_way.transAxes, ha="right", color=GREY
            )
        figure.supxlabel(result["about"], x=0.01, ha="left", fontsize=9, color=GREY)
        figure.savefig(target, dpi=130)
    say(f"plotted in {target}")


# The command line -------------------------------------------------------------------------------


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections alone")
    add("--shapes", nargs="+", type=shape_of, metavar="B,T,H,D", help="these shapes alone")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--peers", nargs="*", choices=list(PEERS), help="also these, or all: minutes each")
    add("--save", metavar="FILE.json", help="write all that is measured, row by row")
    add("--plot", metavar="FILE.json", help="draw such a file and measure nothing")
    add("--plot-out", metavar="FILE", default=str(HERE / "assets" / "speed.png"))
    add("--peer", choices=list(PEERS), help=argparse.SUPPRESS)  # be the process of a peer
    return parser


def main():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers share the memory
    options = make_parser().parse_args()
    if options.peer:
        return be_peer(options.peer, options.shapes, options.dtype)
    if options.plot:
        return plot(json.loads(pathlib.Path(options.plot).read_text()), options.plot_out)
    device = jax.devices()[0].device_kind
    about = f"{device}, jax {jax.__version__}, {datetime.date.today().isoformat()}"
    if jax.default_backend() != "gpu":
        say(about)
        return measure_cpu(options.shapes, options.dtype)
    rate = copy_rate(2**28)
    about += f", a copy moves {rate / 1e12:.2f} TB/s"
    say(about)
    rows = []

    def add(row):
        rows.append(row)
        if options.save:
            pathlib.Path(options.save).write_text(json.dumps(dict(about=about, rows=rows)))

    jobs = [(case.section, measure_case, case) for case in cases_of(options)]
    if not options.shapes:
        jobs += [("decode", measure_decode, B) for B in DECODE_BATCHES]
        jobs += [("decode", measure_slots, way) for way in ("slots", "slots by where")]
    for section, measure, case in jobs:
        if section in options.only and (section != "devices" or jax.device_count() > 1):
            try:
                add(measure(case, rate, rows))
            except Exception as error:
                add(dict(section=section, name=str(case), shape=(), failed=reason(error)))
                say(f"{section:<9}{case}: failed: {rows[-1]['failed']}")
    own = [row["shape"] for row in rows if row["section"] in ("shapes", "lengths")]
    for name in options.peers or PEERS if options.peers is not None else ():
        for row in measure_peer(
            name, dict.fromkeys(x for x in own if x[1] < LONGER), options.dtype
        ):
            add(row)
    show_fastest(rows)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
