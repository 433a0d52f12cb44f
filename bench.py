# SPDX-License-Identifier: Apache-2.0
"""Measures lightning_attn: `python bench.py`. On a GPU against the memory floor and other implementations, on a CPU a small comparison.

floor    the time to move what must move at the copy rate measured in the same run: q, k, v read and o written (forward); q, k, v, do
         read and dq, dk, dv written (backward)
clock    calls are queued for 0.2 s and waited for once, several rounds, the median; small calls are repeated inside one jit, so that
         Python is not what is measured; inputs rotate where they would fit in L2
"""
import argparse
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = [(8, 4096, 32, 128), (1, 32768, 32, 128), (1, 131072, 8, 128), (16, 2048, 16, 128), (4, 8192, 16, 64), (1, 4096, 16, 128)]
PEERS = ["fla_chunk", "fla_fused_chunk", "fla_recurrent", "ejkernel", "softmax"]
LAYER = 12, 24


def say(*words):
    print(*words, flush=True)


def rounds(queue, seconds=0.2):
    """Median time of a call in ms; queue(n) makes n calls and waits for them."""
    queue(2)
    start = time.perf_counter(); queue(3); one = (time.perf_counter() - start) / 3
    n = max(2, min(5000, int(seconds / one)))
    times = []
    for _ in range(5):
        start = time.perf_counter(); queue(n); times.append((time.perf_counter() - start) / n)
    return float(np.median(times)) * 1e3


def clock(f, sets):
    """Time of f(*inputs) in ms, over rotating sets of inputs. Calls shorter than Python's own are made 20 to a jit."""
    inside = 1 if sum(x.size * x.dtype.itemsize for x in sets[0]) > 2**27 else 20
    if inside == 1:
        f = jax.jit(f)
        def queue(n):
            for i in range(n):
                out = f(*sets[i % len(sets)])
            jax.block_until_ready(out)
        return rounds(queue)
    def repeated(sets):                                          # the barrier keeps XLA from merging equal calls
        return [f(*jax.lax.optimization_barrier(sets[i % len(sets)])) for i in range(inside)]

    many = jax.jit(repeated)
    def queue(n):
        for _ in range(n):
            out = many(sets)
        jax.block_until_ready(out)
    return rounds(queue) / inside


def copy_rate():
    """Bytes a second that a device-to-device copy moves, read and written."""
    x = jnp.ones(2**28, jnp.float32)
    f = jax.jit(lambda x: x + 1)
    def queue(n):
        for _ in range(n):
            out = f(x)
        jax.block_until_ready(out)
    return 2 * x.size * 4 / rounds(queue) * 1e3


def draw(B, T, H, D, dtype, Hk=None, more=1):
    """Sets of q, k, v, do: several where one would stay in L2."""
    size = 4 * B * T * H * D * jnp.dtype(dtype).itemsize
    count = 1 if size > 2**28 else 4
    keys = iter(jax.random.split(jax.random.key(0), 4 * count))
    return [tuple(jax.random.normal(next(keys), (B, T, h, D), dtype) for h in (H, Hk or H, Hk or H, H)) for _ in range(count)]


def calls(attend):
    """Forward (final state included), backward, and both, of attend(q, k, v) -> (o, s)."""
    forward = lambda q, k, v, do: attend(q, k, v)
    both = lambda q, k, v, do: jax.vjp(lambda *x: attend(*x)[0], q, k, v)[1](do)
    def full(q, k, v, do):
        out, back = jax.vjp(lambda *x: attend(*x)[0], q, k, v)
        return out, back(do)
    return forward, both, full


def ours(**kwargs):
    from lightning_attn import lightning_attn
    return lambda q, k, v: lightning_attn(q, k, v, *LAYER, **kwargs)


# Peers, each in a process of its own --------------------------------------------------------------------------------------------

def torch_clock(f, sets):
    import torch
    def queue(n):
        for i in range(n):
            f(*sets[i % len(sets)])
        torch.cuda.synchronize()
    return rounds(queue)


def peer(name, shape, dtype):
    """{"forward": ms, "backward": ms} of one peer on one shape."""
    B, T, H, D = shape
    if name == "softmax":
        f = lambda q, k, v: (jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"), None)
        sets = draw(B, T, H, D, dtype)
        forward, backward, _ = calls(f)
        return dict(forward=clock(forward, sets), backward=clock(backward, sets) - clock(forward, sets))
    if name == "ejkernel":
        from ejkernel.kernels._triton.lightning_attn import lightning_attn as theirs
        sets = draw(B, T, H, D, dtype)
        f = lambda q, k, v, do: theirs(q, k, v, *LAYER)[0]
        def queue(n):
            for i in range(n):
                out = f(*sets[i % len(sets)])
            jax.block_until_ready(out)
        def both(n):
            for i in range(n):
                q, k, v, do = sets[i % len(sets)]
                out = jax.vjp(lambda *x: f(*x, do), q, k, v)[1](do)
            jax.block_until_ready(out)
        forward = rounds(queue)
        return dict(forward=forward, backward=rounds(both) - forward)
    import torch
    torch.manual_seed(0)
    count = 1 if B * T * H * D > 2**25 else 4
    make = lambda: torch.randn(B, T, H, D, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
    sets = [(make(), make(), make(), torch.randn(B, T, H, D, device="cuda", dtype=getattr(torch, dtype))) for _ in range(count)]
    if name == "fla_chunk":
        from fla.ops.lightning_attn import chunk_lightning_attn as op
        f = lambda q, k, v: op(q, k, v, *LAYER, output_final_state=True)[0]
    elif name == "fla_recurrent":
        from fla.ops.lightning_attn import fused_recurrent_lightning_attn as op
        f = lambda q, k, v: op(q, k, v, *LAYER, output_final_state=True)[0]
    else:
        from fla.ops.simple_gla import fused_chunk_simple_gla as op
        g = -(8 / H) * (1 - LAYER[0] / LAYER[1]) * torch.arange(H, device="cuda", dtype=torch.float32)
        f = lambda q, k, v: op(q, k, v, g_gamma=g, output_final_state=True)[0]
    def forward(q, k, v, do):
        with torch.no_grad():
            f(q, k, v)
    def both(q, k, v, do):
        torch.autograd.grad(f(q, k, v), (q, k, v), do)
    t = torch_clock(forward, sets)
    return dict(forward=t, backward=torch_clock(both, sets) - t)


def peers(names, shape, dtype):
    found = {}
    for name in names:
        say(f"    {name} ...")
        command = [sys.executable, __file__, "--peer", name, "--shapes", ",".join(map(str, shape)), "--dtype", dtype]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=120)
            found[name] = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"failed": (run.stderr.strip().splitlines() or ["?"])[-1][:160]}
        except subprocess.TimeoutExpired:
            found[name] = {"failed": "more than 120 s"}
    return found


# What is measured ---------------------------------------------------------------------------------------------------------------

def memory(f, args):
    """Bytes that a jitted call needs beyond its inputs and outputs."""
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def shapes_table(shapes, dtype, names, rate):
    rows = []
    for shape in shapes:
        B, T, H, D = shape
        say(f"{shape} {dtype}")
        sets = draw(*shape, dtype)
        forward, backward, full = calls(ours())
        size = B * T * H * D * jnp.dtype(dtype).itemsize
        f = clock(forward, sets)
        b = clock(backward, sets)                                # the forward's output is not needed, and not computed, for it
        both = clock(full, sets)
        row = dict(shape=shape, dtype=dtype, forward=f, backward=b, both=both, forward_floor=4 * size / rate * 1e3 / f,
                   backward_floor=7 * size / rate * 1e3 / b, extra_memory=memory(full, sets[0]) / (4 * size))
        del sets
        row["peers"] = peers(names, shape, dtype)
        say(f"    forward {f:.3f} ms ({row['forward_floor']:.0%} of floor), backward {b:.3f} ms ({row['backward_floor']:.0%}), both {both:.3f} ms,"
            f" extra memory {row['extra_memory']:.0%} of q, k, v, o")
        for name, p in row["peers"].items():
            say(f"    {name}: " + (f"not measured, {p['failed']}" if "failed" in p else
                f"forward {p['forward']:.3f} ms ({p['forward'] / f:.2f}x ours), backward {p['backward']:.3f} ms ({p['backward'] / b:.2f}x)"))
        rows.append(row)
    return rows


def further(rate):
    rows = {}
    def note(name, value):
        rows[name] = value
        say(f"  {name}: {value:.4g}")
    from lightning_attn import lightning_attn
    T, H, D = 32768, 32, 128
    rng = np.random.default_rng(0)
    sets = draw(1, T, H, D, "bfloat16")
    cu = jnp.asarray(np.r_[0, np.sort(rng.integers(1, T, 31)), T], jnp.int32)
    single = calls(ours())
    note("one sequence of 32768, forward ms", one := clock(single[0], sets))
    note("one sequence of 32768, backward ms", one_back := clock(single[1], sets))
    packed = [(*s, cu) for s in sets]
    f = lambda q, k, v, cu: lightning_attn(q, k, v, *LAYER, cu_seqlens=cu)
    note("32 packed sequences, forward / one", clock(lambda q, k, v, do, cu: f(q, k, v, cu), packed) / one)
    note("32 packed sequences, backward / one", clock(lambda q, k, v, do, cu: jax.vjp(lambda *x: f(*x, cu)[0], q, k, v)[1](do), packed) / one_back)
    grouped = draw(1, T, 32, D, "bfloat16", Hk=8)
    group, repeated = calls(ours()), calls(lambda q, k, v: ours()(q, jnp.repeat(k, 4, 2), jnp.repeat(v, 4, 2)))
    note("grouped heads, repeated first / ours, forward", clock(repeated[0], grouped) / clock(group[0], grouped))
    note("grouped heads, repeated first / ours, backward", clock(repeated[1], grouped) / clock(group[1], grouped))
    del sets, packed, grouped
    for B in 1, 64, 256:
        sets = [(*s[:3], jax.random.normal(jax.random.key(1), (B, H, D, D))) for s in draw(B, 1, H, D, "bfloat16")]
        if B > 1:
            sets = sets[:1]
        t = clock(lambda q, k, v, s: lightning_attn(q, k, v, *LAYER, initial_state=s), sets)
        note(f"decode B={B}, us", t * 1e3)
        note(f"decode B={B}, of the copy rate", 2 * B * H * D * D * 4 / rate * 1e3 / t)
    for D in 96, 192, 256:
        sets = draw(2, 8192, 16, D, "bfloat16")
        f, b, _ = calls(ours())
        note(f"head dim {D} (2, 8192, 16), forward ms", clock(f, sets))
        note(f"head dim {D} (2, 8192, 16), backward ms", clock(b, sets))
    for dtype in "float16", "float32":
        sets = draw(4, 4096, 32, 128, dtype)
        f, b, _ = calls(ours())
        note(f"{dtype} (4, 4096, 32, 128), forward ms", clock(f, sets))
        note(f"{dtype} (4, 4096, 32, 128), backward ms", clock(b, sets))
    for T in 2**15, 2**17, 2**20:
        sets = draw(1, T, 16, 128, "bfloat16")
        f, b, _ = calls(ours())
        note(f"T={T} H=16, forward ns a token", clock(f, sets) / T * 1e6)
        note(f"T={T} H=16, backward ns a token", clock(b, sets) / T * 1e6)
    code = ("import time, jax, jax.numpy as jnp\nfrom lightning_attn import lightning_attn\nx = jnp.ones((1, 4096, 16, 128), jnp.bfloat16)\n"
            "jax.block_until_ready(x + 1)\nt = time.perf_counter()\n"
            "jax.block_until_ready(jax.jit(jax.grad(lambda q, k, v: lightning_attn(q, k, v, 12, 24)[0].astype(jnp.float32).sum(), (0, 1, 2)))(x, x, x))\n"
            "print(time.perf_counter() - t)")
    note("first jitted gradient of a process, s", float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()[-1]))
    return rows


def tune(rate):
    """Times the scan's launch configurations at head dims 64, 128 and 256 (bfloat16) and prints the fastest first."""
    import lightning_attn as la
    chosen = la._config
    for D in 64, 128, 256:
        rows, sets = [], draw(8, 4096, 4096 // D, D, "bfloat16")
        for C, BV, warps, stages in ((c, b, w, s) for c in (32, 64) for b in (32, 64, 128) if b <= D for w in (4, 8) for s in (1, 2, 3)):
            la._config = lambda *_: la._Config(C, BV, warps, stages)
            jax.clear_caches()
            try:
                rows.append((clock(lambda q, k, v, do: ours()(q, k, v), sets), C, BV, warps, stages))
            except Exception as error:                           # does not fit
                say("   ", C, BV, warps, stages, str(error).splitlines()[0][:80])
        la._config = chosen
        for t, *config in sorted(rows)[:6]:
            say(f"D={D} C={config[0]} BV={config[1]} num_warps={config[2]} num_stages={config[3]}: {t:.3f} ms")


def plot(path, lengths, names):
    """Time of a forward pass against sequence length, all contestants, log axes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = {"lightning_attn (this file)": []} | {n: [] for n in names}
    for T in lengths:
        say(f"plot: {T} tokens")
        lines["lightning_attn (this file)"].append(clock(calls(ours())[0], draw(1, T, 16, 128, "bfloat16")))
        for name, p in peers(names, (1, T, 16, 128), "bfloat16").items():
            lines[name].append(p.get("forward", np.nan))
    for name, times in lines.items():
        plt.loglog(lengths, times, marker="o", label=name)
    plt.xlabel("tokens (batch 1, 16 heads of 128, bfloat16)"); plt.ylabel("forward, ms"); plt.legend(); plt.grid(alpha=0.3)
    plt.savefig(path, dpi=120, bbox_inches="tight")


def on_a_cpu():
    """Under two minutes: the error against the recurrence, and time that grows with T beside softmax attention's, which grows with T^2."""
    from lightning_attn import lightning_attn, lightning_attn_reference
    say("no GPU: plain JAX on the CPU, float32, 4 heads of 64, forward")
    say(f"{'tokens':>8} {'lightning ms':>13} {'softmax ms':>11} {'error':>9}")
    rows = []
    for T in 512, 1024, 2048, 4096, 8192:
        q, k, v, _ = draw(1, T, 4, 64, "float32")[0]
        time_of = lambda f: min(rounds(lambda n: [jax.block_until_ready(f(q, k, v)) for _ in range(n)], 0.1) for _ in range(2))
        fast = jax.jit(lambda q, k, v: lightning_attn(q, k, v, *LAYER)[0])
        slow = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
        want = jax.jit(lambda q, k, v: lightning_attn_reference(q, k, v, *LAYER)[0])(q, k, v)
        error = float(jnp.linalg.norm(fast(q, k, v) - want) / jnp.linalg.norm(want))
        rows.append(dict(tokens=T, lightning=time_of(fast), softmax=time_of(slow), error=error))
        say(f"{T:>8} {rows[-1]['lightning']:>13.2f} {rows[-1]['softmax']:>11.2f} {error:>9.1e}")
    a, b = rows[0], rows[-1]
    say(f"16 times the tokens: lightning {b['lightning'] / a['lightning']:.0f} times the time, softmax {b['softmax'] / a['softmax']:.0f} times")
    return dict(cpu=rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="B,T,H,D ...")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--peers", nargs="*", default=PEERS, help=f"of {PEERS}")
    parser.add_argument("--json"), parser.add_argument("--plot"), parser.add_argument("--tune", action="store_true")
    parser.add_argument("--no-further", action="store_true", help="only the table of shapes")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = [tuple(int(x) for x in s.split(",")) for s in options.shapes] if options.shapes else SHAPES
    if options.peer:
        return print(json.dumps(peer(options.peer, shapes[0], options.dtype)))
    if jax.default_backend() != "gpu":
        result = on_a_cpu()
    else:
        rate = copy_rate()
        say(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, copy rate {rate / 1e12:.2f} TB/s")
        if options.tune:
            return tune(rate)
        result = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, copy_rate=rate, shapes=shapes_table(shapes, options.dtype, options.peers, rate))
        if not options.no_further:
            result["further"] = further(rate)
        if options.plot:
            plot(options.plot, [2**n for n in range(11, 18)], [n for n in options.peers if n != "ejkernel"])
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
