# SPDX-License-Identifier: Apache-2.0
"""Measures lightning_attn: `python bench.py`, on a GPU or, in part, on a CPU.

decays      a row names the model and the layer, counted from 0, whose decays its heads have. The
            last heads forget slowest. "heads 56 to 63" are those of the last of 8 devices. Rows of
            "layer_idx=12, num_layers=24" have the decays that these arguments give
copy speed  100 % is the time of a copy of as many bytes as a call must move, at the rate of a copy
            that the same run measures. Forward must read q, k and v and write o. Backward must read
            q, k, v and do and write dq, dk and dv. A decode step must also read and write the state
memory      the temporary buffers of both passes together, as a share of q, k, v and o
ms          the median of three rounds of 0.2 s. Short calls are made 20 to a jit, so that Python is
            not measured. Inputs below 256 MiB are four sets in turn, so that L2 does not hold them
decode      steps in a lax.scan that carries the state. The state is donated
devices     one GPU beside all: a jit over batch or heads, and a shard_map with seq_axis. Copy speed
            is then that of all GPUs together
peers       measured in the same way, each in a process of its own, once per shape. Backward is the
            time of both passes minus that of forward. * marks a time of fla of which Python takes
            at least seven tenths to launch the kernels: the kernels may take less
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

# lightning_attn is imported where it is called: the processes of peers do without it.

P = jax.sharding.PartitionSpec
HERE = pathlib.Path(__file__).resolve().parent
WAYS = "forward", "backward"
say = functools.partial(print, flush=True)
text_of = lambda shape: ", ".join(map(str, shape))
nbytes = lambda *arrays: sum(x.size * x.dtype.itemsize for x in arrays)
ms_text = lambda ms: f"{ms:#.3g}".rstrip(".") if ms < 1000 else f"{ms:.0f}"
reason = lambda error: f"{type(error).__name__}: {error}".splitlines()[0][:160]

# What is measured -------------------------------------------------------------------------------


def alibi(H, layer, layers):
    """The log decays of released models: ALiBi's slopes, smaller in later layers."""
    n = 1 << H.bit_length() - 1  # the largest power of 2 up to H
    slopes = 2.0 ** (-8 / n * np.r_[1 : n + 1, 0.5 : H - n])
    return -slopes * (1 - layer / (layers - 1) + 1e-5)


MINIMAX, LAST = "MiniMax-01, layer 40 of 80", "MiniMax-01, layer 78 of 80"
EIGHTH = "MiniMax-01, layer 40 of 80, heads 56 to 63"
FLASH, MINI = "Ring-flash-linear, layer 16 of 32", "Ring-mini-linear, layer 10 of 20"
FORMULA, NONE = "layer_idx=12, num_layers=24", "g = 0"
DECAYS = {  # the log decays of H heads
    MINIMAX: lambda H: alibi(H, 40, 80),
    LAST: lambda H: alibi(H, 78, 80),  # layer 79 is softmax attention
    EIGHTH: lambda H: alibi(64, 40, 80)[56:],
    FLASH: lambda H: alibi(H, 16 - 1, 32),  # Ling and Ring count from 1 in this formula
    MINI: lambda H: alibi(H, 10 - 1, 20),
    FORMULA: lambda H: -8 / H * (1 - 12 / 24) * np.arange(H),
    NONE: np.zeros,
}


@dataclasses.dataclass
class Row:
    """A call, and what was measured of it."""

    section: str
    name: str
    shape: tuple  # B, T, H, D
    decays: str = MINIMAX
    dtype: str = "bfloat16"
    op: str = "lightning_attn"  # or a peer
    backend: str | None = None
    kv_heads: int | None = None
    sequences: int | None = None  # of a packed batch
    split: str | None = None  # over all GPUs: "batch", "heads" or "tokens"
    # measured, by "forward" and "backward":
    ms: dict = dataclasses.field(default_factory=dict)
    copy_speed: dict = dataclasses.field(default_factory=dict)  # 1 is 100 %
    python_ms: dict = dataclasses.field(default_factory=dict)  # in which Python launches kernels
    # measured, of both:
    memory: float | None = None
    note: str | None = None  # why nothing was measured
    failed: str | None = None


def shape_of(text):
    numbers = text.split(",")
    if len(numbers) != 4 or not all(n.isdecimal() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f"expected B,T,H,D, four positive integers, got {text!r}")
    return tuple(map(int, numbers))


MODELS = {
    MINIMAX: "8,4096,64,128 1,4096,64,128 1,8192,64,128 1,32768,64,128 1,131072,64,128",
    LAST: "1,8192,64,128 1,32768,64,128",
    EIGHTH: "1,32768,8,128 1,131072,8,128",
    FLASH: "1,8192,32,128 1,32768,32,128",
    MINI: "1,8192,16,128 1,32768,16,128",
}
OF_FORMULA = "8,4096,32,128 1,32768,32,128 1,131072,8,128 1,4096,16,128"
OF_FORMULA += " 4,8192,16,64 2,8192,16,96 2,8192,16,192 2,8192,16,256"
SHORT = "1,1024,64,128 1,512,32,128 1,200,32,128"
LONGER = 2**20
DECODED = 200  # tokens that a loop of decode steps reads
DECODE = [(1, 1), *((B, n) for B in (64, 256) for n in (1, 2, 4, 8))]  # rows, tokens of a step
SECTIONS = "models", "packed", "formula", "variants", "short", "decode", "devices"
WITH_PEERS = "models", "formula"  # in this order: the last take fla longest


def rows_of(shapes, dtype, gpu):
    if not gpu:
        shapes = shapes or [(1, T, 4, 64) for T in (256, 1024)]
        calls = itertools.product(shapes, ("lightning_attn", "softmax"))
        yield from (Row("cpu", op, shape, dtype=dtype, op=op) for shape, op in calls)
        return
    if shapes:
        yield from (Row("models", MINIMAX, shape, dtype=dtype) for shape in shapes)
        return
    for decays, text in MODELS.items():
        yield from (Row("models", decays, shape_of(s), decays, dtype) for s in text.split())
    for n in 32, 256, 4096:
        yield Row("packed", f"{n} sequences", (1, 32768, 64, 128), sequences=n)
    yield from (Row("formula", FORMULA, shape_of(s), FORMULA) for s in OF_FORMULA.split())
    long, large = (1, 32768, 32, 128), (32, 4096, 32, 128)
    yield Row("variants", "no head forgets", long, NONE)
    yield Row("variants", "8 key and value heads", long, FLASH, kv_heads=8)
    yield Row("variants", "float32, in TF32", (4, 4096, 32, 128), FLASH, "float32")
    yield Row("variants", "plain JAX", (8, 4096, 32, 128), FLASH, backend="xla")
    yield from (Row("short", MINIMAX, shape_of(s)) for s in SHORT.split())
    for B, n in DECODE:
        yield Row("decode", f"{n} token{'s' * (n > 1)} a step", (B, n, 32, 128), FLASH)
    for shape, *splits in (large, "batch", "heads"), ((1, LONGER, 16, 128), "tokens"):
        for split in None, *splits:
            name = f"{split} over {jax.device_count()} GPUs" if split else "one GPU"
            yield Row("devices", name, shape, FLASH, split=split)


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
    if nbytes(*sets[0]) > 2**27 or jax.default_backend() == "cpu":
        return clock(functools.partial(queue, jax.jit(f).lower(*sets[0]).compile(), sets))

    def calls(sets):
        outs = [()]
        for i in range(repeats):  # each waits for the call before: XLA would merge equal calls
            inputs, outs[-1] = jax.lax.optimization_barrier((sets[i % len(sets)], outs[-1]))
            outs.append(f(*inputs))
        return outs

    many = jax.jit(calls).lower(sets).compile()
    return clock(lambda n: queue(many, [(sets,)], n), repeats)


def copy_rate(values):
    """Bytes per second that a copy on the device moves, read and written."""
    x = jnp.ones(values, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / clock(functools.partial(queue, add, [(x,)])) * 1e3


# The calls of a row -----------------------------------------------------------------------------


@functools.cache
def mesh():
    return jax.make_mesh((jax.device_count(),), ("gpus",), (jax.sharding.AxisType.Auto,))


def inputs_of(row):
    """Sets of random q, k, v, do and, if packed, cu_seqlens: several if L2 could hold one."""
    B, T, H, D = row.shape
    Hk = row.kv_heads or H
    keys, rest = iter(jax.random.split(jax.random.key(0), 16)), []
    if row.sequences:
        cuts = np.random.default_rng(0).choice(T - 1, row.sequences - 1, replace=False) + 1
        rest = [jnp.asarray(np.r_[0, np.sort(cuts), T], jnp.int32)]
    sharding = None
    if row.split:
        dim = ("batch", "tokens", "heads").index(row.split)
        sharding = jax.NamedSharding(mesh(), P(*(None,) * dim, "gpus"))

    @functools.partial(jax.jit, static_argnums=1, out_shardings=sharding)
    def draw(key, heads):
        return jax.random.normal(key, (B, T, heads, D), row.dtype)

    count = 1 if 4 * B * T * H * D * jnp.dtype(row.dtype).itemsize > 2**28 else 4
    return [[*(draw(next(keys), heads) for heads in (H, Hk, Hk, H)), *rest] for _ in range(count)]


def passes_of(attend):
    """The passes of attend(q, k, v, *rest), as functions of q, k, v, do, *rest."""

    def both(q, k, v, do, *rest):
        output, pull_back = jax.vjp(lambda *qkv: attend(*qkv, *rest)[0], q, k, v)
        return output, pull_back(do)

    forward = lambda q, k, v, do, *rest: attend(q, k, v, *rest)
    # jit leaves out what the gradients do not need of the forward pass
    return {"forward": forward, "backward": lambda *inputs: both(*inputs)[1], "both": both}


def attention(row):
    """attend(q, k, v, [cu_seqlens]) -> (output, final state) as the row wants it."""
    if row.op == "softmax":
        by = "xla" if jax.default_backend() == "cpu" else "cudnn"
        op = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=by)
        return lambda q, k, v: (op(q, k, v), None)

    from lightning_attn import lightning_attn

    H = row.shape[2]
    options = dict(g_gamma=DECAYS[row.decays](H).astype(np.float32), backend=row.backend)
    options["output_final_state"] = not row.sequences

    if row.split != "tokens":
        return lambda q, k, v, at=None: lightning_attn(q, k, v, cu_seqlens=at, **options)
    part = functools.partial(lightning_attn, **options, seq_axis="gpus")
    tokens = P(None, "gpus")
    return jax.shard_map(part, mesh=mesh(), in_specs=(tokens,) * 3, out_specs=(tokens, P()))


def measure(row, rate):
    """Both passes. `rate` is that of a copy, or None."""
    sets, passes = inputs_of(row), passes_of(attention(row))
    q, k, *_ = map(nbytes, sets[0])
    for way, moved in zip(WAYS, (2 * q + 2 * k, 3 * q + 4 * k)):
        if row.op == "lightning_attn" or way == "forward":
            row.ms[way] = ms_of(passes[way], sets)
        else:
            row.ms[way] = ms_of(passes["both"], sets) - row.ms["forward"]
        if rate:
            rate_of_all = rate * (jax.device_count() if row.split else 1)
            row.copy_speed[way] = moved / rate_of_all * 1e3 / row.ms[way]
    if row.section in ("models", "packed", "formula"):
        both = jax.jit(passes["both"]).lower(*sets[0]).compile()
        row.memory = both.memory_analysis().temp_size_in_bytes / (2 * q + 2 * k)


def measure_decode(row, rate):
    """A step of a lax.scan that carries the state."""
    from lightning_attn import lightning_attn

    B, n, H, D = row.shape
    g = DECAYS[row.decays](H).astype(np.float32)
    steps = DECODED // n
    *keys, key = jax.random.split(jax.random.key(0), 4)
    tokens = [jax.random.normal(key, (steps, B, n, H, D), row.dtype) for key in keys]
    state = jax.random.normal(key, (B, H, D, D))
    step = lambda s, qkv: lightning_attn(*qkv, g_gamma=g, initial_state=s)[::-1]
    loop = jax.jit(lambda s, *qkv: jax.lax.scan(step, s, qkv), donate_argnums=0)
    call = loop.lower(state, *tokens).compile()

    def run(calls):
        nonlocal state
        for _ in range(calls):
            state, _ = call(state, *tokens)
        jax.block_until_ready(state)

    row.ms["forward"] = ms = clock(run, steps)
    moved = 2 * nbytes(state) + 4 * nbytes(tokens[0]) / steps
    row.copy_speed["forward"] = moved / rate * 1e3 / ms


def attempt(f, row, *more):
    try:
        f(row, *more)
    except Exception as error:
        row.failed = reason(error)


def line_of(row):
    texts = [f"{row.section:<9}{row.name:<43}{text_of(row.shape):<19}"]
    for way, ms in row.ms.items():
        share = f" {row.copy_speed[way]:4.0%}" if way in row.copy_speed else ""
        texts.append(f"{way} {ms_text(ms):>6} ms{'*' * by_python(row, way)}{share}")
    texts += [f"memory {row.memory:.1%}"] if row.memory is not None else []
    texts += [row.note] if row.note else []
    texts += [f"failed: {row.failed}"] if row.failed else []
    return "  ".join(texts)


# Peers, each in a process of its own ------------------------------------------------------------


def measure_fla(row, rate=None):
    """flash-linear-attention's chunk_simple_gla, which its chunk_lightning_attn calls."""
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    B, T, H, D = row.shape
    dtype = getattr(torch, row.dtype)
    array = lambda: torch.randn(row.shape, device="cuda", dtype=dtype).requires_grad_()
    count = 1 if 4 * B * T * H * D * dtype.itemsize > 2**28 else 4
    sets = [[array() for _ in range(4)] for _ in range(count)]
    g = torch.tensor(DECAYS[row.decays](H), device="cuda", dtype=torch.float32)
    attend = lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=g, output_final_state=True)[0]

    @torch.no_grad()
    def forward(q, k, v, do):
        attend(q, k, v)

    def both(q, k, v, do):
        torch.autograd.grad(attend(q, k, v), (q, k, v), do)

    def run(call, n):
        start = time.perf_counter()
        for i in range(n):
            call(*sets[i % len(sets)])
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        return seconds

    for way, call in zip(WAYS, (forward, both)):
        row.ms[way] = clock(functools.partial(run, call))
        # so few calls do not fill the GPU's queue: Python does not wait for the GPU
        row.python_ms[way] = min(run(call, 20) for _ in range(3)) / 20 * 1e3
    for ms in row.ms, row.python_ms:
        ms["backward"] -= ms["forward"]


def by_python(row, way):
    """Whether a time is Python's, not that of the kernels."""
    return way in row.python_ms and row.python_ms[way] >= 0.7 * row.ms[way]


PEERS = {"fla": measure_fla, "softmax": measure}


def be_peer(op, shapes, dtype):
    for shape in shapes:
        row = Row("peers", op, shape, dtype=dtype, op=op)
        B, T, H, D = shape
        if op == "softmax" and (ms := 2 * B * H * T**2 * D / 6e11) > 150:  # at 600 Tflop/s
            row.note = f"skipped: its forward pass would take {ms:.0f} ms"
        else:
            attempt(PEERS[op], row, None)
        say(json.dumps(dataclasses.asdict(row)))


def row_of(json_row):
    return Row(**json_row | dict(shape=tuple(json_row["shape"])))


def measure_peer(op, shapes, dtype, seconds=1200):
    """Yields the rows of a peer as they come, until its time is up."""
    command = [sys.executable, __file__, "--peer", op, "--dtype", dtype, "--shapes"]
    command += [",".join(map(str, shape)) for shape in shapes]
    peer = subprocess.Popen(["timeout", str(seconds), *command], stdout=subprocess.PIPE, text=True)
    for line in peer.stdout:
        if line.startswith("{"):
            yield row_of(json.loads(line))
    if peer.wait():
        say(f"peers    {op}: ended with status {peer.returncode}")


def fastest_other(rows, row, way):
    """The row of the fastest peer, or None."""
    same = [r for r in rows if r.section == "peers" and r.shape == row.shape and way in r.ms]
    same = [r for r in same if r.dtype == row.dtype and row.section in WITH_PEERS]
    return min(same, key=lambda r: r.ms[way], default=None)


def show_table(rows):
    """README's table, in Markdown."""
    per_way = "{0}, ms | % of copy speed | fastest other"
    say(f"\n| what | B, T, H, D | {' | '.join(map(per_way.format, WAYS))} | memory |")
    say("| --- " * 9 + "|")
    for row in (r for r in rows if r.copy_speed):
        cells = [", ".join(dict.fromkeys((row.decays, row.name))), text_of(row.shape)]
        for way in WAYS:
            shown = ["", "", ""]
            if way in row.ms:
                shown[:2] = ms_text(row.ms[way]), f"{row.copy_speed[way] * 100:.0f} %"
                if other := fastest_other(rows, row, way):
                    factor = f"{other.ms[way] / row.ms[way]:.1f}"
                    shown[2] = f"{other.op} {factor}{'*' * by_python(other, way)}"
            cells += shown
        memory = "" if row.memory is None else f"{row.memory * 100:.0f} %"
        say(f"| {' | '.join([*cells, memory])} |")


# The picture ------------------------------------------------------------------------------------

COLOURS = {"lightning_attn": "#0a5fb4", "fla": "#c4622d", "softmax": "#7a5195"}
NOTES = """100 %: the time of a copy of as many bytes as the pass must read and write
White points and bars of fla: at least seven tenths of the time is Python's, launching kernels
"""
PICTURED = [shape_of(text) for text in MODELS[MINIMAX].split()]


def plot_lengths(axes, rows):
    """Time against the number of tokens of one sequence, forward (solid) and backward (dashed)."""
    long = {shape[1]: shape for shape in PICTURED if shape[0] == 1}
    rows = sorted((r for r in rows if r.shape in long.values()), key=lambda r: r.shape)
    rows = [r for r in rows if r.section == "peers" or r.decays == MINIMAX]
    for op, colour in COLOURS.items():
        for way, style in zip(WAYS, ("-", "--")):
            of_way = [r for r in rows if r.op == op and way in r.ms and not r.sequences]
            T, ms = [r.shape[1] for r in of_way], [r.ms[way] for r in of_way]
            width = 2.8 if op == "lightning_attn" else 1.8
            if T:
                axes.loglog(T, ms, style, color=colour, lw=width, label=f"{op}, {way}")
            ms = [r.ms[way] if by_python(r, way) else np.nan for r in of_way]
            axes.loglog(T, ms, "o", color=colour, mfc="white", ms=6, mew=1.5)
    axes.set_xticks(list(long), [f"{T // 1024}k" for T in long])
    axes.set_yticks([0.1, 1, 10], ["0.1 ms", "1 ms", "10 ms"])
    axes.minorticks_off()
    axes.set(xlabel="tokens", title=f"Time of one sequence, {MINIMAX}, 64 heads of 128")
    axes.legend(frameon=False, loc="upper left", ncols=2)


def plot_models(axes, rows, way):
    """Percent of copy speed with the decays of MiniMax-01, beside the fastest other."""
    axes.set(xlim=(0, 1), title=f"{way.capitalize()} pass, percent of copy speed")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(visible=False, axis="y")
    labels = [f"{B} x {T} tokens" if B > 1 else f"{T} tokens" for B, T, *_ in PICTURED]
    axes.set_yticks(range(len(PICTURED)), labels)
    axes.invert_yaxis()

    def bar(at, share, label, colour, fill):
        axes.barh(at, share, 0.35, color=fill, ec=colour, lw=1.5)
        inside = dict(ha="right", color="white" if fill == colour else colour)
        place = inside if share > 0.4 else dict(color=colour)
        axes.text(share, at, f" {label} ", va="center", **place)

    for i, shape in enumerate(PICTURED):
        for row in (
            r for r in rows if (r.section, r.decays, r.shape) == ("models", MINIMAX, shape)
        ):
            ms, share, blue = row.ms[way], row.copy_speed[way], COLOURS["lightning_attn"]
            bar(i - 0.2, share, f"{share * 100:.0f} %, {ms_text(ms)} ms", blue, blue)
            if other := fastest_other(rows, row, way):
                slower, colour = other.ms[way] / ms, COLOURS[other.op]
                fill = "white" if by_python(other, way) else colour
                label = f"{other.op}: {slower:.1f} times as long"
                bar(i + 0.2, share / slower, label, colour, fill)


def plot(results, target):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row_of(row) for result in results for row in result["rows"]]
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    style |= {"axes.grid": True, "grid.color": "#e4e8ec", "axes.axisbelow": True}
    style |= {"axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    with plt.rc_context(style | {"legend.fontsize": 9}):
        # 838 pixels wide, as GitHub shows it, at twice the resolution
        figure, axes = plt.subplot_mosaic("LL;FB", figsize=(8.38, 7.4), layout="constrained")
        plot_lengths(axes["L"], rows)
        plot_models(axes["F"], rows, "forward")
        plot_models(axes["B"], rows, "backward")
        axes["B"].set_yticklabels([])
        figure.supxlabel(NOTES + results[0]["about"], x=0.01, ha="left", fontsize=9)
        figure.savefig(target, dpi=200)
    show_table(rows)
    say(f"plotted in {target}")


# The command line -------------------------------------------------------------------------------


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    only = "these sections alone; with none: nothing but their peers"
    add("--only", nargs="+", choices=[*SECTIONS, "none"], default=SECTIONS, help=only)
    add("--shapes", nargs="+", type=shape_of, metavar="B,T,H,D", help="these shapes alone")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--peers", nargs="*", choices=list(PEERS), help="also these, or all: minutes each")
    add("--save", metavar="FILE.json", help="write all that is measured, row by row")
    add("--plot", nargs="+", metavar="FILE.json", help="draw such files and measure nothing")
    add("--plot-out", metavar="FILE", default=str(HERE / "assets" / "speed.png"))
    add("--peer", choices=list(PEERS), help=argparse.SUPPRESS)  # be the process of a peer
    return parser


def main():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers share the memory
    options = make_parser().parse_args()
    if options.peer:
        return be_peer(options.peer, options.shapes, options.dtype)
    if options.plot:
        results = [json.loads(pathlib.Path(file).read_text()) for file in options.plot]
        return plot(results, options.plot_out)
    device, gpu = jax.devices()[0].device_kind, jax.default_backend() == "gpu"
    about = f"{device}, jax {jax.__version__}, {datetime.date.today().isoformat()}"
    rate = copy_rate(2**28) if gpu else None
    about += f", a copy moves {rate / 1e12:.2f} TB/s" if gpu else ""
    say(about)
    rows = []

    def add(row):
        rows.append(row)
        say(line_of(row))
        if options.save:
            result = dict(about=about, copy_rate=rate, rows=list(map(dataclasses.asdict, rows)))
            pathlib.Path(options.save).write_text(json.dumps(result))

    sections = [section for section in options.only if section != "none"] or SECTIONS
    todo = [
        r for r in rows_of(options.shapes, options.dtype, gpu) if r.section in (*sections, "cpu")
    ]
    for row in todo:
        if "none" not in options.only and (row.section != "devices" or jax.device_count() > 1):
            attempt(measure_decode if row.section == "decode" else measure, row, rate)
            add(row)
    compared = [r.shape for section in WITH_PEERS for r in todo if r.section == section]
    shapes = dict.fromkeys(shape for shape in compared if shape[1] < LONGER)
    for op in options.peers or PEERS if shapes and options.peers is not None else ():
        for row in measure_peer(op, shapes, options.dtype):
            add(row)
    if any(row.copy_speed for row in rows):
        show_table(rows)
    return int(any(row.failed for row in rows if row.section != "peers"))


if __name__ == "__main__":
    sys.exit(main())
