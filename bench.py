# SPDX-License-Identifier: Apache-2.0
"""Measures lightning_attn: `python bench.py`. On a GPU against the memory floor and other implementations, on a CPU a small comparison.

floor    the time to move what must move at the copy rate measured in the same run: q, k, v read and o written (forward); q, k, v, do
         read and dq, dk, dv written (backward)
clock    calls are queued for 0.2 s and waited for once, several rounds, the median; small calls are repeated inside one jit, so that
         Python is not what is measured; inputs rotate where they would fit in L2
"""

import argparse
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
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = [
    (8, 4096, 32, 128),
    (1, 32768, 32, 128),
    (1, 131072, 8, 128),
    (16, 2048, 16, 128),
    (4, 8192, 16, 64),
    (1, 4096, 16, 128),
    (2, 8192, 16, 96),
    (2, 8192, 16, 192),
    (2, 8192, 16, 256),
]
PEERS = ["fla_chunk", "fla_fused_chunk", "fla_recurrent", "ejkernel", "softmax"]
LAYER = 12, 24
PATIENCE = 900  # seconds that a peer has for all its shapes, with what it tunes and compiles


MEASURED = {}  # ms of each case so far: what Ctrl-C leaves


def say(*words, end="\n"):
    print(*words, flush=True, end=end)


def rounds(queue, seconds=0.2, count=3):
    """Median time of a call in ms; queue(n) makes n calls and waits for them."""
    queue(2)
    start = time.perf_counter()
    queue(3)
    one = (time.perf_counter() - start) / 3
    n = max(2, min(5000, int(seconds / one)))
    times = []
    for _ in range(count):
        start = time.perf_counter()
        queue(n)
        times.append((time.perf_counter() - start) / n)
    return float(np.median(times)) * 1e3


def program(f, sets):
    """Compiles f for such sets of inputs; returns a function of sets that gives `rounds` its queue, and how many calls are one there.
    Calls shorter than Python's own are made 20 to a jit."""
    if sum(x.size * x.dtype.itemsize for x in sets[0]) > 2**27:
        one = jax.jit(f).lower(*sets[0]).compile()

        def queue(sets, n):
            for i in range(n):
                out = one(*sets[i % len(sets)])
            jax.block_until_ready(out)

        return queue, 1

    def repeated(sets):  # each call waits for the one before: XLA would merge equal ones
        outs = [()]
        for i in range(20):
            inputs, outs[-1] = jax.lax.optimization_barrier((sets[i % len(sets)], outs[-1]))
            outs.append(f(*inputs))
        return outs

    many = jax.jit(repeated).lower(sets).compile()

    def queue(sets, n):
        for _ in range(n):
            out = many(sets)
        jax.block_until_ready(out)

    return queue, 20


def clock(cases):
    """{name: ms} of cases {name: (f, a function that draws sets of its inputs)}; compiled side by side, as a compiler keeps one core busy,
    and timed one by one, over rotating sets of inputs."""
    with ThreadPoolExecutor() as pool:
        programs = list(
            pool.map(lambda case: program(case[0], jax.eval_shape(case[1])), cases.values())
        )
    times = {}
    for (name, (_, make)), (queue, calls) in zip(cases.items(), programs):
        sets = make()
        times[name] = MEASURED[str(name)] = rounds(functools.partial(queue, sets)) / calls
        say(
            f"    {name if isinstance(name, str) else ' '.join(map(str, name))}: {times[name]:.4f} ms"
        )
    return times


def gpu_time(f, sets, count=20):
    """ms that the kernels of a call take on the GPU, by JAX's profiler: for calls that take longer to launch than to run."""
    one = jax.jit(f)
    jax.block_until_ready(one(*sets[0]))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(count):
                out = one(*sets[i % len(sets)])
            jax.block_until_ready(out)
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        return (
            sum(
                event.duration_ns
                for plane in planes
                if "GPU" in plane.name
                for line in plane.lines
                if "Stream" in line.name
                for event in line.events
            )
            / count
            / 1e6
        )


def copy_rate():
    """Bytes a second that a device-to-device copy moves, read and written."""
    x = jnp.ones(2**28, jnp.float32)
    f = jax.jit(lambda x: x + 1)

    def queue(n):
        for _ in range(n):
            out = f(x)
        jax.block_until_ready(out)

    return 2 * x.size * 4 / rounds(queue) * 1e3


def draw(B, T, H, D, dtype, Hk=None):
    """Sets of q, k, v, do: several where one would stay in L2."""
    count = 1 if 4 * B * T * H * D * jnp.dtype(dtype).itemsize > 2**28 else 4
    keys = iter(jax.random.split(jax.random.key(0), 4 * count))
    return [
        tuple(jax.random.normal(next(keys), (B, T, h, D), dtype) for h in (H, Hk or H, Hk or H, H))
        for _ in range(count)
    ]


def calls(attend):
    """Forward (final state included), backward, and both, of attend(q, k, v) -> (o, s)."""
    forward = lambda q, k, v, do: attend(q, k, v)
    backward = lambda q, k, v, do: jax.vjp(lambda *x: attend(*x)[0], q, k, v)[1](
        do
    )  # what it does not need of forward is not run

    def both(q, k, v, do):
        out, back = jax.vjp(lambda *x: attend(*x)[0], q, k, v)
        return out, back(do)

    return forward, backward, both


def ours(**kwargs):
    from lightning_attn import lightning_attn

    return lambda q, k, v: lightning_attn(q, k, v, *LAYER, **kwargs)


# Peers, each in a process of its own --------------------------------------------------------------------------------------------


def peer(name, shape, dtype):
    """{"forward": ms, "backward": ms} of one peer on one shape. One token is a decode step, with a state in and out."""
    B, T, H, D = shape
    if name in ("softmax", "ejkernel"):
        sets = draw(*shape, dtype)
        if name == "softmax":
            attend = lambda q, k, v: (
                jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"),
                None,
            )
            times = [
                rounds(functools.partial(queue, sets)) / n
                for queue, n in (program(call, sets) for call in calls(attend)[::2])
            ]
            return dict(forward=times[0], backward=times[1] - times[0])
        from ejkernel.kernels._triton.lightning_attn import lightning_attn as theirs

        f = lambda q, k, v: theirs(q, k, v, *LAYER)[0]  # cannot be jitted

        def queue(call):
            def run(n):
                for i in range(n):
                    out = call(*sets[i % len(sets)])
                jax.block_until_ready(out)

            return run

        t = rounds(queue(lambda q, k, v, do: f(q, k, v)))
        return dict(
            forward=t, backward=rounds(queue(lambda q, k, v, do: jax.vjp(f, q, k, v)[1](do))) - t
        )

    import torch

    torch.manual_seed(0)
    make = lambda *size, dtype=getattr(torch, dtype), grad=T > 1: torch.randn(
        *size, device="cuda", dtype=dtype, requires_grad=grad
    )
    sets = [[make(*shape) for _ in range(4)] for _ in range(1 if B * T * H * D * 8 > 2**28 else 4)]
    extra = dict(initial_state=make(B, H, D, D, dtype=torch.float32, grad=False)) if T == 1 else {}
    if name == "fla_fused_chunk":
        from fla.ops.simple_gla import fused_chunk_simple_gla as op

        g = (
            -(8 / H)
            * (1 - LAYER[0] / LAYER[1])
            * torch.arange(H, device="cuda", dtype=torch.float32)
        )
        f = lambda q, k, v: op(q, k, v, g_gamma=g, output_final_state=True, **extra)[0]
    else:
        import fla.ops.lightning_attn as ops

        op = ops.chunk_lightning_attn if name == "fla_chunk" else ops.fused_recurrent_lightning_attn
        f = lambda q, k, v: op(q, k, v, *LAYER, output_final_state=True, **extra)[0]

    def queue(call):
        def run(n):
            for i in range(n):
                call(*sets[i % len(sets)])
            torch.cuda.synchronize()

        return run

    with torch.no_grad():
        t = rounds(queue(lambda q, k, v, do: f(q, k, v)))
    return (
        dict(forward=t)
        if T == 1
        else dict(
            forward=t,
            backward=rounds(
                queue(lambda q, k, v, do: torch.autograd.grad(f(q, k, v), (q, k, v), do))
            )
            - t,
        )
    )


def peers(names, shapes, dtype):
    """{peer: {shape: its times, or why there are none}}"""
    found = {}
    for name in names:
        wanted = [
            shape for shape in shapes if shape[1] > 1 or name == "fla_recurrent"
        ]  # the others have no decode step
        command = [
            sys.executable,
            __file__,
            "--peer",
            name,
            "--dtype",
            dtype,
            "--shapes",
            *(",".join(map(str, s)) for s in wanted),
        ]
        # a peer that wants packages of its own finds them where BENCH_PATH_<peer> says
        path = os.environ.get(f"BENCH_PATH_{name}", os.environ.get("PYTHONPATH", ""))
        with (
            tempfile.TemporaryFile("w+") as said,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=os.environ | {"PYTHONPATH": path},
            ) as run,
        ):
            stop = threading.Timer(PATIENCE, run.kill)
            stop.start()
            found[name] = {}
            for line in run.stdout:
                if line.startswith("{"):
                    shape = wanted[len(found[name])]
                    found[name][shape] = times = json.loads(line)
                    say(
                        f"    {name} {shape}: "
                        + ", ".join(
                            f"{n} {t:.3f} ms" if n != "failed" else f"not measured, {t}"
                            for n, t in times.items()
                        )
                    )
            code = run.wait()
            why = f"it took more than {PATIENCE} s" if stop.finished.is_set() else None
            stop.cancel()
            said.seek(0)
            why = why or (said.read().strip().splitlines() or [f"it ended with {code}"])[-1][:160]
        for shape in wanted[len(found[name]) :]:
            found[name][shape] = {"failed": why}
            say(f"    {name} {shape}: not measured, {why}")
    return found


# What is measured ---------------------------------------------------------------------------------------------------------------


def shapes_table(shapes, dtype, rate):
    say("forward, backward, and both")
    times = clock(
        {
            (shape, way): (call, functools.partial(draw, *shape, dtype))
            for shape in shapes
            for way, call in zip(("forward", "backward", "both"), calls(ours()))
        }
    )
    rows = []
    say(
        f"{'B, T, H, D':>30} | forward: ms, of floor | backward: ms, of floor | both: ms | extra memory, of q, k, v, o"
    )
    for shape in shapes:
        f, b, both = (times[shape, way] for way in ("forward", "backward", "both"))
        one = jax.eval_shape(functools.partial(draw, *shape, dtype))[0]
        size = one[0].size * one[0].dtype.itemsize
        extra = jax.jit(calls(ours())[2]).lower(*one).compile().memory_analysis().temp_size_in_bytes
        rows.append(
            dict(
                shape=shape,
                dtype=dtype,
                forward=f,
                backward=b,
                both=both,
                forward_of_floor=4 * size / rate * 1e3 / f,
                backward_of_floor=7 * size / rate * 1e3 / b,
                extra_memory=extra / (4 * size),
            )
        )
        say(
            f"{str(shape):>30} | {f:.3f}, {rows[-1]['forward_of_floor']:.0%} | {b:.3f}, {rows[-1]['backward_of_floor']:.0%} | {both:.3f} | {rows[-1]['extra_memory']:.1%}"
        )
        if f < 0.06:  # where launching may be what takes the time: the kernels alone
            sets = draw(*shape, dtype)
            on_gpu = rows[-1]["on_gpu"] = [gpu_time(call, sets) for call in calls(ours())[:2]]
            say(f"{'on the GPU':>30} | {on_gpu[0]:.4f} | {on_gpu[1]:.4f}")
    return rows


def compare(rows, found):
    """Adds to rows what the peers took for them, and says how many times our time that is."""
    ways = "forward", "backward"
    for row in rows:
        row["peers"] = {
            name: times[row["shape"]] for name, times in found.items() if row["shape"] in times
        }
        row["against_fastest_peer"] = {
            way: min((p[way] for p in row["peers"].values() if way in p), default=float("nan"))
            / row[way]
            for way in ways
        }
        against = row["peers"] | {
            "the fastest": {way: x * row[way] for way, x in row["against_fastest_peer"].items()}
        }
        say(
            f"{str(row['shape']):>30} | times ours, forward / backward: "
            + ", ".join(
                name
                + " "
                + (
                    " / ".join(f"{p[way] / row[way]:.2f}" for way in ways)
                    if "forward" in p
                    else "not measured"
                )
                for name, p in against.items()
            )
        )


def further(rate):
    from lightning_attn import lightning_attn

    T, H, D = 32768, 32, 128
    rng = np.random.default_rng(0)
    cu = jnp.asarray(np.r_[0, np.sort(rng.integers(1, T, 31)), T], jnp.int32)
    ways = dict(zip(("forward", "backward"), calls(ours())))
    repeated = dict(
        zip(ways, calls(lambda q, k, v: ours()(q, jnp.repeat(k, 4, 2), jnp.repeat(v, 4, 2))))
    )
    packed = lambda way: (
        lambda q, k, v, do, cu: calls(ours(cu_seqlens=cu))[list(ways).index(way)](q, k, v, do)
    )
    step = lambda q, k, v, s: lightning_attn(q, k, v, *LAYER, initial_state=s)
    states = lambda B: [
        (*s[:3], jax.random.normal(jax.random.key(1), (B, H, D, D)))
        for s in draw(B, 1, H, D, "bfloat16")[: 1 if B > 1 else 4]
    ]
    cases = {}
    for way, call in ways.items():
        cases[f"one sequence of {T}, {way}"] = call, lambda: draw(1, T, H, D, "bfloat16")
        cases[f"32 packed sequences, {way}"] = (
            packed(way),
            lambda: [(*s, cu) for s in draw(1, T, H, D, "bfloat16")],
        )
        cases[f"32 query, 8 kv heads, {way}"] = call, lambda: draw(1, T, 32, D, "bfloat16", Hk=8)
        cases[f"keys and values repeated for 32 heads first, {way}"] = (
            repeated[way],
            lambda: draw(1, T, 32, D, "bfloat16", Hk=8),
        )
        for dtype in "float16", "float32":
            cases[f"{dtype} (4, 4096, 32, 128), {way}"] = (
                call,
                functools.partial(draw, 4, 4096, 32, 128, dtype),
            )
        for t in 2**15, 2**17, 2**20:
            cases[f"{t} tokens of 16 heads of 128, {way}"] = (
                call,
                functools.partial(draw, 1, t, 16, 128, "bfloat16"),
            )
    for B in 1, 64, 256:
        cases[f"decode step, B={B}"] = step, functools.partial(states, B)
    rows = dict(ms=(times := clock(cases)), ratios={})

    def note(name, value):
        rows["ratios"][name] = value
        say(f"  {name}: {value:.4g}")

    for way in ways:
        note(
            f"packed / one sequence, {way}",
            times[f"32 packed sequences, {way}"] / times[f"one sequence of {T}, {way}"],
        )
        note(
            f"repeated / grouped heads, {way}",
            times[f"keys and values repeated for 32 heads first, {way}"]
            / times[f"32 query, 8 kv heads, {way}"],
        )
        note(
            f"time a token, 2^20 / 2^15 tokens, {way}",
            times[f"{2**20} tokens of 16 heads of 128, {way}"]
            / times[f"{2**15} tokens of 16 heads of 128, {way}"]
            / 32,
        )
    for B in 1, 64, 256:
        note(
            f"decode step, B={B}, of the copy rate",
            2 * B * H * D * D * 4 / rate * 1e3 / times[f"decode step, B={B}"],
        )
    note("decode step, B=1, us on the GPU", 1e3 * gpu_time(step, states(1)))
    first = subprocess.run(
        [sys.executable, "-c", FIRST_GRADIENT],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.abspath(__file__)),
    )
    seconds, kernels = map(
        float, first.stdout.split()[-2:] if first.returncode == 0 else ("nan",) * 2
    )
    note("first jitted gradient of a process, s", seconds)
    note("kernels compiled for it", kernels)
    return rows


FIRST_GRADIENT = """
import time, jax, jax.numpy as jnp, jax_triton.triton_lib as lib
from lightning_attn import lightning_attn
x = jnp.ones((1, 4096, 16, 128), jnp.bfloat16)
jax.block_until_ready(x + 1)
compile, kernels = lib.compile_ttir_inplace, []
lib.compile_ttir_inplace = lambda *args: kernels.append(1) or compile(*args)
start = time.perf_counter()
jax.block_until_ready(jax.jit(jax.grad(lambda q, k, v: lightning_attn(q, k, v, 12, 24)[0].astype(jnp.float32).sum(), (0, 1, 2)))(x, x, x))
print(time.perf_counter() - start, len(kernels))
"""


def tune():
    """Times the scan's launch configurations and prints the fastest first: what `_config` should choose."""
    import dataclasses
    import lightning_attn as la

    chosen = la._config
    for D, dtype in (64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "float32"):
        rows, sets = [], draw(4, 4096, 4096 // D, D, dtype)
        for kernel in la._hopper_kernel, la._scan_kernel:
            for C, BV, warps, stages in (
                (c, b, w, n)
                for c in (32, 64)
                for b in (32, 64, 128)
                if b <= D
                for w in (4, 8)
                for n in (1, 2, 3, 4)
            ):
                if kernel is la._hopper_kernel and (
                    dtype == "float32" or C != 64 or warps * 16 != BV or stages == 1
                ):
                    continue
                la._config = lambda *a: dataclasses.replace(
                    chosen(*a), kernel=kernel, C=C, BV=BV, num_warps=warps, num_stages=stages
                )
                jax.clear_caches()
                try:
                    queue, n = program(calls(ours())[0], sets)
                    rows.append(
                        (
                            rounds(functools.partial(queue, sets)) / n,
                            kernel.__name__,
                            C,
                            BV,
                            warps,
                            stages,
                        )
                    )
                except Exception as error:  # does not fit
                    say(
                        "   ",
                        kernel.__name__,
                        C,
                        BV,
                        warps,
                        stages,
                        str(error).splitlines()[0][:80],
                    )
        la._config = chosen
        for t, kernel, C, BV, warps, stages in sorted(rows)[:6]:
            say(
                f"D={D} {dtype}: {t:.3f} ms, {kernel} C={C} BV={BV} num_warps={warps} num_stages={stages}"
            )


def plot(path, lines, device, what="batch 1, 16 heads of 128, bfloat16"):
    """Draws {contestant: {tokens: ms}}, log axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, times in lines.items():
        label = name if times else f"{name}: not measured"
        plt.loglog([int(tokens) for tokens in times], list(times.values()), marker="o", label=label)
    plt.xlabel(f"tokens ({what})")
    plt.ylabel(f"forward on {device}, ms")
    plt.legend()
    plt.grid(alpha=0.3)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    plt.savefig(path, dpi=120, bbox_inches="tight")
    say(f"plotted in {path}")


def cpu_time(f, *inputs):
    """Shortest time of a call in ms, of as many calls as fit in 0.3 s, two at least."""
    times, start = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - start < 0.3:
        begin = time.perf_counter()
        jax.block_until_ready(f(*inputs))
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3


def on_a_cpu(result, shapes, dtype):
    """Under two minutes: the error against the recurrence, and the time beside that of softmax attention.

    Lightning attention's time grows with T, softmax attention's with T^2. A row is printed part by part.
    """
    from lightning_attn import lightning_attn, lightning_attn_reference

    ours = jax.jit(lambda q, k, v: lightning_attn(q, k, v, *LAYER)[0])
    softmax = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    recurrence = jax.jit(lambda q, k, v: lightning_attn_reference(q, k, v, *LAYER)[0])
    say(f"no GPU: plain JAX on the CPU, {dtype}, forward")
    say(f"{'B, T, H, D':>18} {'lightning ms':>13} {'softmax ms':>11} {'error':>9}")
    rows = result["cpu"] = []
    for shape in shapes:
        say(f"{', '.join(map(str, shape)):>18}", end=" ")
        q, k, v, _ = draw(*shape, dtype)[0]
        rows.append(row := dict(shape=shape, dtype=dtype))
        got = jax.block_until_ready(ours(q, k, v)).astype(jnp.float32)  # compiles
        row["lightning"] = cpu_time(ours, q, k, v)
        say(f"{row['lightning']:>13.2f}", end=" ")
        jax.block_until_ready(softmax(q, k, v))
        row["softmax"] = cpu_time(softmax, q, k, v)
        say(f"{row['softmax']:>11.2f}", end=" ")
        want = recurrence(q, k, v).astype(jnp.float32)
        row["error"] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        say(f"{row['error']:>9.1e}")
    a, b = rows[0], rows[-1]
    lengthened = a["shape"][:1] + a["shape"][2:] == b["shape"][:1] + b["shape"][2:]
    if lengthened and b["shape"][1] > a["shape"][1]:
        more = lambda name: f"{name} {b[name] / a[name]:.0f} times the time"
        say(
            f"{b['shape'][1] / a['shape'][1]:g} times the tokens: {more('lightning')}, {more('softmax')}"
        )


def on_a_gpu(result, options, shapes):
    rate = copy_rate()
    result.update(device=jax.devices()[0].device_kind, jax=jax.__version__, copy_rate=rate)
    say(f"{result['device']}, jax {jax.__version__}, copy rate {rate / 1e12:.2f} TB/s")
    result["shapes"] = shapes_table(shapes, options.dtype, rate)
    wanted, lengths = list(shapes), []
    if not options.shapes:
        result["further"] = further(rate)
        wanted += [(B, 1, 32, 128) for B in (1, 64, 256)]
    if options.plot:
        say("forward against sequence length")
        lengths = [(1, 2**n, 16, 128) for n in range(11, 18)]
        forward = calls(ours())[0]
        times = clock({s: (forward, functools.partial(draw, *s, "bfloat16")) for s in lengths})
        wanted += [s for s in lengths if s not in wanted]
    found = peers(PEERS if options.peers is None else options.peers, wanted, options.dtype)
    compare(result["shapes"], found)
    result["peers"] = {name: {str(s): t for s, t in row.items()} for name, row in found.items()}
    if options.plot:
        own = {"lightning_attn (this file)": {s: {"forward": t} for s, t in times.items()}}
        result["plot"] = {
            name: {s[1]: row[s]["forward"] for s in lengths if "forward" in row[s]}
            for name, row in (own | found).items()
        }


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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="B,T,H,D")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16; float32 on a CPU"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="other implementations, on a GPU; all of them"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="time against sequence length, all contestants"
    )
    parser.add_argument(
        "--tune", action="store_true", help="measure the launch configurations, on a GPU"
    )
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    shapes = options.shapes or (
        SHAPES if gpu else [(1, T, 4, 64) for T in (512, 1024, 2048, 4096, 8192)]
    )
    if options.peer:
        for shape in shapes:
            try:
                say(json.dumps(peer(options.peer, shape, options.dtype)))
            except Exception as error:
                say(
                    json.dumps({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:160]})
                )
        return
    if not gpu and (options.tune or options.peers is not None):
        parser.error(
            f"{'--tune' if options.tune else '--peers'} wants a GPU, and JAX found {jax.devices()[0].platform} only"
        )
    if options.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot wants matplotlib: pip install matplotlib")
    if options.tune:
        return tune()
    result = {}
    try:
        if gpu:
            on_a_gpu(result, options, shapes)
        else:
            on_a_cpu(result, shapes, options.dtype)
    except KeyboardInterrupt:
        result["interrupted"], result["measured"] = True, MEASURED
        say(
            "\ninterrupted; what is above was measured"
            + (f", and is in {options.json}" if options.json else "")
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    if result.get("interrupted"):
        sys.exit(130)
    if options.plot and gpu:
        plot(options.plot, result["plot"], result["device"])
    elif options.plot:
        lines = {
            name: {row["shape"][1]: row[name] for row in result["cpu"]}
            for name in ("lightning", "softmax")
        }
        plot(options.plot, lines, "a CPU", f"shapes as measured, {options.dtype}")


if __name__ == "__main__":
    main()
