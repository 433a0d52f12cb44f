# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The lightning-attn-jax authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in
# compliance with the License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is
# distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and limitations under the License.
"""Lightning attention for JAX: linear attention with a fixed decay per head. Triton and Gluon kernels for GPUs, plain JAX elsewhere.

For one sequence and one head, with log decay g <= 0 and scale s, a state S of shape [K, V] is carried along the tokens:

    S_t = e^g S_{t-1} + k_t v_t^T              o_t = s q_t S_t

TransNormerLLM (arXiv:2307.14995) introduced it, Lightning Attention-2 (arXiv:2401.04658) computes it in chunks and MiniMax-01
(arXiv:2501.08313) trained it at scale. Time grows linearly with the sequence length; the state is all that is remembered.

Copy this file; nothing else is needed. It needs jax and numpy; on NVIDIA and AMD GPUs also `jax-triton` and `triton`.

Glossary (kernels and formulas share these letters)
    B, T          batch rows; tokens of a batch row
    H, h          number of heads; index of a head
    K, V          head dims: of queries and keys; of values
    n             sequences of a batch row: 1 unless packed
    q, k, v, o    queries, keys, values, outputs
    g, gm         log decay of a head: in nats (`g_gamma`); in bits
    S             state [K, V]; the kernels hold S^T [V, K]
    s0, s         initial and final states of the sequences
    C             tokens per chunk, which is one step of a loop
    L, R          tokens per segment (or piece), which is one program; number of them
    M             pieces per segment
    z, Z          states that pieces leave behind; number of them
    P, D          scores q_i.k_j; their decays
    dq, dk, dS    in kernels, factors for reading the state, adding a key, carrying the state over a chunk; elsewhere, gradients
    w, y          queries that read S^T; what they read
    rank i, j     position of a token in its chunk, counted in scan direction
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding, PartitionSpec

__version__ = "0.1.0"

# The plain-JAX path needs the first range, the kernels need the others.
_JAX = ">=0.10.2"
_KERNELS = {"jax": ">=0.11.1,<0.13", "jax-triton": ">=0.4.1,<0.5", "triton": ">=3.7,<3.10"}
_HOPPER = ">=3.8,<3.10"                                          # the Triton of `_hopper_kernel`
_INSTALL = "pip install " + " ".join(f"'{name}{versions}'" for name, versions in _KERNELS.items())


def _fits(found, versions):
    """Whether the version `found` lies in `versions`: ">=a" or ">=a,<b". Only leading numbers count."""
    def numbers(text):
        return tuple(int(n) for n in text.split(".")[:3] if n.isdigit())
    low, _, high = versions.removeprefix(">=").partition(",<")
    return numbers(low) <= numbers(found) and (not high or numbers(found) < numbers(high))


if not _fits(jax.__version__, _JAX):
    raise ImportError(f"lightning_attn needs jax{_JAX} and found jax {jax.__version__}: "
                      f"pip install 'jax{_JAX}'")

_unfit = None                                                    # why installed kernels cannot run
try:
    import jax_triton
    import triton
    import triton.language as tl
except Exception as error:
    triton = None
    # macOS and TPU hosts have no Triton. Plain JAX is all there is, and no warning is due.
    absent = isinstance(error, ModuleNotFoundError) and error.name in ("jax_triton", "triton")
    if not absent:
        _unfit = f"importing jax_triton failed with {type(error).__name__}: {error}"
else:
    _found = dict(zip(_KERNELS, (jax.__version__, jax_triton.__version__, triton.__version__)))
    if all(_fits(_found[name], versions) for name, versions in _KERNELS.items()):
        from triton.experimental import gluon
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.language.nvidia import hopper
        if _fits(_found["jax"], ">=0.12") and _found["jax-triton"] == "0.4.1":
            # jax 0.12 hands a rule for dead code three arguments, jax-triton 0.4.1's takes two.
            partial_eval.dce_rules[jax_triton.triton_lib.triton_kernel_call_p] = (
                lambda used, live, eqn: ([True] * len(eqn.invars), eqn))
    else:
        triton = None
        _unfit = "found " + ", ".join(f"{name} {version}" for name, version in _found.items())
if _unfit:
    warnings.warn("lightning_attn: GPUs take the plain-JAX path, which is many times slower, because "
                  f"the kernels cannot run: {_unfit}. They need: {_INSTALL}")
_HAS_HOPPER = triton is not None and hasattr(hopper.tma, "async_load")      # Triton 3.7 lacks it

__all__ = ["lightning_attn", "lightning_attn_reference", "lightning_g_gamma"]


# Types for callers. Checkers cannot follow what Triton compiles: they report nothing of this file.
# mypy: ignore-errors
# pyright: basic, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportPossiblyUnboundVariable=false
Array = jax.Array | np.ndarray
Integer = int | np.integer | Array
Real = float | np.floating | Integer

_F = TypeVar("_F", bound=Callable[..., Any])


def _promotes(f: _F) -> _F:
    """`f`, in which ranks and dtypes are promoted whatever jax_numpy_rank_promotion and
    jax_numpy_dtype_promotion ask of the caller's code. JAX calls back the rules of a transformation
    when the caller's settings hold again, so each rule that promotes is marked as well."""
    @functools.wraps(f)
    def promotes(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return f(*args, **kwargs)
    return cast(_F, promotes)


# The API ------------------------------------------------------------------------------------------------------------------------

@_promotes
def lightning_attn(
    query: Array, key: Array, value: Array, layer_idx: Integer | None = None,
    num_layers: Integer | None = None, softmax_scale: Real | None = None,
    initial_state: Array | None = None, reverse: bool = False,
    cu_seqlens: Array | Sequence[int] | None = None, *, g_gamma: Array | None = None,
    backend: Literal["triton", "xla"] | None = None, seq_axis: str | tuple[str, ...] | None = None,
    output_final_state: bool = True,
) -> tuple[jax.Array, jax.Array | Any]:                          # Any: None where that is False
    """Lightning attention (arXiv:2307.14995, 2401.04658, 2501.08313): o_t = scale q_t S_t, S_t = e^g S_{t-1} + k_t v_t^T.

    Works under jit, grad (to any order), vmap, scan, remat, export and sharding. Differentiable with respect to `query`, `key`,
    `value`, `initial_state` and `g_gamma`; both results may carry gradients. Derivatives are reverse mode only: `jax.jvp` and
    `jax.jacfwd` raise. `jax.export` of symbolic shapes takes backend="xla" and a symbolic `seq_len` that is known to be 64 or more;
    the batch may be symbolic as well. A jit over sharded arrays cannot be exported, because JAX cannot serialize its partitioning:
    export a `jax.shard_map` instead.

    Args:
      query: [batch, seq_len, num_heads, qk_head_dim], float32, bfloat16 or float16 (float64 in x64 mode: plain JAX everywhere).
        Head dims are 1 to 512, `seq_len` is 0 to 2**30.
      key: [batch, seq_len, num_kv_heads, qk_head_dim], in the dtype of `query`. `num_kv_heads` divides `num_heads`; query head h
        reads key and value head h // (num_heads / num_kv_heads).
      value: [batch, seq_len, num_kv_heads, v_head_dim], in the dtype of `query`.
      layer_idx, num_layers: integers, possibly traced: the layer, from 0, and the number of layers. They give head h the log decay
        g = -(8 / num_heads) (1 - layer_idx / num_layers) h. Leave both out to give `g_gamma` instead. Values that are traced, or on
        a device while something is traced, cannot be checked: no head forgets in a layer from `num_layers` on. Inside a
        `jax.shard_map` that splits the heads the formula would number each device's heads from 0, which is wrong and cannot be seen
        from inside: there, give each device its part of `lightning_g_gamma(num_heads of all devices, ...)` as `g_gamma`.
      softmax_scale: scale of the outputs, 0 or a normal number of float32; None means qk_head_dim ** -0.5. A number is a constant of
        the compiled program: another number compiles another program. A traced scale multiplies `query`, in its dtype, and is
        not checked.
      initial_state: [n, num_heads, qk_head_dim, v_head_dim], floating: the states that the sequences start from. n is the batch or
        the number of packed sequences. None means zeros.
      reverse: a static bool. True runs from the last token to the first: `initial_state` enters at the end, `final_state` is left at the start.
      cu_seqlens: [num_seqs + 1] integers, concrete or traced: boundaries of sequences packed in a batch of 1, from 0 up. Equal
        neighbours are an empty sequence. Tokens past the last boundary belong to none: their outputs and gradients are 0,
        whatever they hold. A traced `cu_seqlens` cannot be checked: a sequence that runs backwards, outside of the tokens or into
        an earlier one counts as empty.
      g_gamma: [num_heads], log decay in nats for each token, <= 0, possibly traced. What is above 0 raises where the values are at
        hand. Elsewhere it counts as 0, and its gradient is 0.
      backend: None picks when the computation is lowered: Triton for cuda and rocm, plain JAX for anything else. "triton" and
        "xla" force one. GPUs older than sm_80 take plain JAX.
      seq_axis: name of a `jax.shard_map` mesh axis, or a tuple of names, over which `seq_len` is split evenly, in order: one
        sequence on many devices. Only states cross it, never tokens; `initial_state` and `final_state` are those of the whole
        sequence.
      output_final_state: a static bool. False returns None for the final state, and no kernel writes one.

    Returns:
      output: [batch, seq_len, num_heads, v_head_dim] in the dtype of `query`.
      final_state: [n, num_heads, qk_head_dim, v_head_dim], float32 (float64 for float64 inputs). In a decode step, seq_len 1 with
        an `initial_state` that the caller donates or carries through a loop, it takes the memory of that state.

    Accuracy: states, decays and sums are float32. float32 inputs follow `jax.default_matmul_precision`: TF32 by default on GPUs,
    float32 for "high" and "highest". Gradients have the dtype of what they are gradients of. The gradient of `g_gamma` is float32 throughout. Its
    error for each head, relative to its value or, where its terms cancel, to the root of the sum of their squares, is at most 2e-3
    for float32 at "highest", and 1e-2 for 16 bits and TF32. It takes a scan in plain JAX on any backend, and nothing where nobody
    differentiates `g_gamma`. float16 states and scaled scores, q_i.k_j times `softmax_scale`, round to float16 where they are
    multiplied, and overflow there past 65504.

    Raises:
      TypeError, ValueError: naming the argument, what was expected and what came, before anything runs.
    """
    q, k, v, g, scale, s0, cu = _check(query, key, value, layer_idx, num_layers, softmax_scale, initial_state, reverse, cu_seqlens,
                                       g_gamma)
    if not (backend is None or isinstance(backend, str) and backend in ("triton", "xla")):
        raise ValueError(f'backend: expected None, "triton" or "xla", got {backend!r}')
    if backend == "triton" and triton is None:
        raise ValueError('backend="triton" needs jax-triton and triton, which cannot be used here: '
                         f"{_unfit or 'not installed'}. They need Linux, Python >= 3.12 and: {_INSTALL}")
    arch = _gpu()[0] if _gpu() else None
    # Triton has no matrix products for GPUs before sm_80: its code spills there, and wants twice their shared memory.
    old = arch is not None and arch.startswith("sm_") and int(arch[3:]) < 80
    if backend == "triton" and (arch is None or old):
        raise ValueError('backend: expected None or "xla" where there is no GPU for the kernels (NVIDIA from sm_80 on, AMD), '
                         f'got "triton" and {arch or jax.default_backend()}')
    if triton is None or q.dtype == jnp.float64 or old:
        backend = "xla"
    if backend != "xla" and not all(isinstance(d, int) for x in (q, cu) if x is not None for d in x.shape):
        raise ValueError('backend: expected "xla" for symbolic shapes (jax.export), because kernels are launched for shapes '
                         f"that are numbers, got {backend!r}")
    if seq_axis is not None and cu is not None:
        raise ValueError("seq_axis: expected None with cu_seqlens, because a pack cannot be cut inside its sequences; got "
                         f"{seq_axis!r}. Give each device whole sequences instead: a pack of its own in shard_map")
    if seq_axis is not None:
        axes = seq_axis if isinstance(seq_axis, tuple) else (seq_axis,)
        if not (axes and all(isinstance(name, str) for name in axes)):
            raise TypeError(f"seq_axis: expected the name of an axis of a shard_map around this call, got {seq_axis!r}")
        if not set(axes) <= set(jax.sharding.get_abstract_mesh().manual_axes):
            raise ValueError(f"seq_axis: expected an axis of a shard_map around this call, got {seq_axis!r}")
    _static("output_final_state", output_final_state)
    op = _Op(scale, bool(reverse), False, backend, jax.config.jax_default_matmul_precision, final_state=bool(output_final_state))
    s0 = None if s0 is None else s0[:, None] if cu is None else s0[None]
    g, cu = g[None], None if cu is None else cu[None]
    if seq_axis is None:
        o, s = _attend(op, *_vary((q, k, v, g, s0, cu), q, k, v, g, s0, cu))
    else:
        q, k, v = _vary((q, k, v), q, k, v)
        o, s = _attend_across(op, axes, q, k, v, g, _vary(s0, q, but=axes))
    return o, None if s is None else s[:, 0] if cu is None else s[0]


@_promotes
def lightning_attn_reference(
    query: Array, key: Array, value: Array, layer_idx: Integer | None = None,
    num_layers: Integer | None = None, softmax_scale: Real | None = None,
    initial_state: Array | None = None, reverse: bool = False,
    cu_seqlens: Array | Sequence[int] | None = None, *, g_gamma: Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence, one token at a time, in plain JAX. Arguments and results are those of `lightning_attn`, less the last three."""
    q, k, v, g, scale, s, cu = _check(query, key, value, layer_idx, num_layers, softmax_scale, initial_state, reverse, cu_seqlens,
                                      g_gamma)
    (B, T, H, K), V, dtype = q.shape, v.shape[-1], jnp.promote_types(q.dtype, jnp.float32)
    n = B if cu is None else cu.shape[0] - 1
    s = jnp.zeros((n, H, K, V), dtype) if s is None else s
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    token = jnp.arange(T)
    member = jnp.ones((T, B), bool)                              # [T, n]
    if cu is not None:
        bounds, is_sequence = _intervals(T, cu)
        member = is_sequence[1:-1] & (bounds[1:-2] <= token[:, None]) & (token[:, None] < bounds[2:-1])

    def step(s, x):
        q, k, v, member = x                                      # [B, H, K], [B, H, K], [B, H, V], [n]
        q, k, v = (y.astype(dtype) for y in (q, k, v))
        member = member[:, None, None]
        s = jnp.where(member[..., None], jnp.exp(g)[:, None, None] * s + k[..., None] * v[..., None, :], s)
        o = scale * jnp.einsum("bhk,bhkv->bhv", jnp.broadcast_to(q, (n, H, K)), s, precision="highest")
        return s, o if cu is None else jnp.where(member, o, 0).sum(0, keepdims=True)

    s, o = lax.scan(step, s, (*(jnp.moveaxis(x, 1, 0) for x in (q, k, v)), member), reverse=reverse)
    return jnp.moveaxis(o, 0, 1).astype(q.dtype), s


@_promotes
def lightning_g_gamma(num_heads: int, layer_idx: Integer, num_layers: Integer,
                      dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Log decay per token in nats, [num_heads]: -(8 / num_heads) (1 - layer_idx / num_layers) head.

    The formula is that of arXiv:2307.14995. `layer_idx` and `num_layers` are integers, possibly
    traced. They are checked as `lightning_attn` checks them.
    """
    if type(num_heads) is not int or num_heads < 1:
        raise ValueError(f"num_heads: expected an integer of at least 1, got {num_heads!r}")
    layer_idx, num_layers = _layer(layer_idx, num_layers)
    slopes = -8 / num_heads * np.arange(num_heads)
    if isinstance(layer_idx, int) and isinstance(num_layers, int):
        return jnp.asarray((1 - layer_idx / num_layers) * slopes, dtype)
    layer_idx, num_layers = (jnp.asarray(x).astype(dtype) for x in (layer_idx, num_layers))
    return (1 - layer_idx / num_layers) * jnp.asarray(slopes, dtype)


# Its checks ---------------------------------------------------------------------------------------------------------------------
#
# Messages are "argument: expected ..., got ...". A check of values must not wait for a device while
# something is traced: it looks only at values that are at hand.

def _known(x):
    """`x` as numpy where its values are at hand, else None.

    They are not where `x` is traced, where some of it lies on other hosts, and where `x` lies on a
    device while something else is traced.
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return None
    # An operation on a concrete array gives a tracer where a jit is being traced.
    return None if isinstance(lax.neg(x), jax.core.Tracer) else jax.device_get(x)


def _array(name, x, shape, dtype_kind, hint=""):
    """`x` as a JAX array of that shape ("batch" etc. name a free size) and kind of dtype, or an error that says what came."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}")
    if len(x.shape) != len(shape) or any(not isinstance(want, str) and want != got for want, got in zip(shape, x.shape)):
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {tuple(x.shape)}{hint}")
    if not jnp.issubdtype(x.dtype, dtype_kind):
        raise TypeError(f"{name}: expected {'integers' if dtype_kind is jnp.integer else 'floating point'}, got {x.dtype}")
    return jnp.asarray(x)


def _is_number(x, kind):
    """Whether `x` is a Python, numpy or JAX number (or an array of them) of that kind."""
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return jnp.issubdtype(x.dtype, kind)
    return type(x) is int or type(x) is float and kind is not jnp.integer


def _integer(name, x):
    """A scalar integer argument: as an int where its value is at hand."""
    if isinstance(x, (jax.Array, np.ndarray)) and x.shape != ():
        raise ValueError(f"{name}: expected a scalar, got shape {x.shape}")
    if not _is_number(x, jnp.integer):
        raise TypeError(f"{name}: expected an integer, got {x!r}")
    if type(x) is int:                                           # of any size
        return x
    value = _known(x)
    return x if value is None else int(value)


def _layer(layer_idx, num_layers):
    """`layer_idx` and `num_layers`, checked: as ints where their values are at hand."""
    if isinstance(layer_idx, (jax.Array, np.ndarray)) and jnp.issubdtype(layer_idx.dtype, jnp.floating) and layer_idx.ndim:
        raise TypeError(f"layer_idx: expected an integer, got an array of {layer_idx.dtype} and shape {layer_idx.shape}: "
                        "log decays are given by name, as g_gamma=")
    for name, x in ("layer_idx", layer_idx), ("num_layers", num_layers):
        if x is None:
            raise ValueError(f"{name}: expected both layer_idx and num_layers where g_gamma is not given, got None")
    layer_idx, num_layers = _integer("layer_idx", layer_idx), _integer("num_layers", num_layers)
    known = type(num_layers) is int
    if known and not 1 <= num_layers < 2**31:
        raise ValueError(f"num_layers: expected 1 to 2**31 - 1, got {num_layers}")
    if type(layer_idx) is int and not 0 <= layer_idx < (num_layers if known else 2**31):
        raise ValueError(f"layer_idx: expected 0 to num_layers - 1, got {layer_idx} of {num_layers if known else 'traced'}")
    return layer_idx, num_layers


def _scale(scale, K):
    """The scale as a float, or as the scalar array that came where its value is not at hand."""
    if scale is None:
        return K**-0.5
    if isinstance(scale, (jax.Array, np.ndarray)) and scale.shape != ():
        raise ValueError(f"softmax_scale: expected a scalar, got shape {scale.shape}")
    if not (_is_number(scale, jnp.floating) or _is_number(scale, jnp.integer)):
        raise TypeError(f"softmax_scale: expected a real number, got {scale!r}")
    if isinstance(scale, int):                                   # of any size: too large ones are infinite
        return _scale(float(scale) if abs(scale) < 2**200 else math.inf, K)
    if (value := _known(scale)) is None:
        return scale
    value, normal = float(value), jnp.finfo(jnp.float32)
    # Kernels compute with it as a float32, and some flush what is not a normal number.
    if not (value == 0 or float(normal.tiny) <= abs(value) <= float(normal.max)):
        raise ValueError(f"softmax_scale: expected 0 or a normal number of float32, got {value!r}")
    return value


def _static(name, x):
    """Raises where `x` is not a bool."""
    if not isinstance(x, (bool, np.bool_)):
        traced = isinstance(x, jax.core.Tracer)
        hint = ": it is static, so a jit must not trace it (static_argnames)" if traced else ""
        raise TypeError(f"{name}: expected True or False, got {x!r}{hint}")


def _boundaries(cu, B, T):
    """`cu_seqlens` as int32, checked where its values are at hand."""
    if isinstance(cu, (list, tuple)):
        if any(isinstance(x, jax.core.Tracer) for x in cu):
            raise TypeError("cu_seqlens: expected an array or a list of numbers, got a list with a traced value: "
                            "write jnp.array([...]) or jnp.stack([...])")
        if not all(_is_number(x, jnp.integer) and np.shape(x) == () and (type(x) is not int or abs(x) < 2**63) for x in cu):
            raise TypeError(f"cu_seqlens: expected integers, got {cu!r}")
        cu = np.array([int(x) for x in cu], np.int64)
    # Its values are read before they become int32, which would wrap large ones.
    array = _array("cu_seqlens", cu, ("num_seqs + 1",), jnp.integer)
    if B != 1:
        raise ValueError(f"cu_seqlens: expected a batch of 1 to hold the packed sequences, got {B}")
    if isinstance(array.shape[0], int) and array.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected at least 2 boundaries, got {array.shape[0]}")
    if (value := _known(cu)) is not None:
        value = [int(x) for x in value]
        if value[0] != 0:
            lengths = min(value) >= 0 and sum(value) == T
            hint = ". These look like lengths: it takes boundaries, not lengths" if lengths else ""
            raise ValueError(f"cu_seqlens: expected to start at 0, got {value[0]} in {np.asarray(value)}{hint}")
        if any(a > b for a, b in zip(value, value[1:])):
            raise ValueError(f"cu_seqlens: expected boundaries that do not decrease, got {np.asarray(value)}")
        if value[-1] > T:
            raise ValueError(f"cu_seqlens: expected boundaries up to seq_len, {T}, got {value[-1]}")
        return array.astype(jnp.int32)
    # Traced values past the end stay past the end as int32, and negative ones negative.
    if jnp.iinfo(array.dtype).max > 2**31 - 1:
        low, high = max(jnp.iinfo(array.dtype).min, -1), 2**31 - 1
        array = jnp.clip(array, jnp.asarray(low, array.dtype), jnp.asarray(high, array.dtype))
    return array.astype(jnp.int32)


def _swapped(x, axis, T, H):
    """What to add to a message where `x` has as many heads, along `axis`, as there are tokens: query is [B, H, T, D] then."""
    if getattr(x, "shape", ())[axis:axis + 1] != (T,) or T == H:
        return ""
    return f". query is [batch, seq_len, num_heads, head_dim], so here seq_len is {T} and num_heads {H}"


def _check(q, k, v, layer_idx, num_layers, scale, s0, reverse, cu, g):
    """Raises for wrong arguments; returns q, k, v, g [H], the scale as a float, initial states and int32 boundaries."""
    q = _array("query", q, ("batch", "seq_len", "num_heads", "qk_head_dim"), jnp.floating)
    B, T, H, K = q.shape
    k = _array("key", k, (B, T, "num_kv_heads", K), jnp.floating)
    v = _array("value", v, (B, T, k.shape[2], "v_head_dim"), jnp.floating)
    V = v.shape[3]
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise TypeError(f"query: expected float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, x in ("key", k), ("value", v):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of query, {q.dtype}, got {x.dtype}")
    if not all(isinstance(d, int) for d in (H, K, k.shape[2], V)):
        raise ValueError(f"query: expected num_heads and head dims that are numbers, got {q.shape}, {k.shape} and {v.shape}")
    if H == 0 or k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"key: expected num_kv_heads to divide num_heads, got {k.shape[2]} and {H}")
    for name, d in ("query", K), ("value", V):
        if not 1 <= d <= 512:
            raise ValueError(f"{name}: expected a head dim from 1 to 512, got {d}")
    if not isinstance(T, int):                                   # jax.export
        try:
            long = bool(T >= 64)
        except jax.errors.InconclusiveDimensionOperation:
            long = False
        if not long:
            raise ValueError(f"query: expected a symbolic seq_len that is known to be 64 or more, got {T}: "
                             f'jax.export.symbolic_shape(..., constraints=["{T} >= 64"])')
    elif T > 2**30:
        raise ValueError(f"query: expected seq_len of at most 2**30, got {T}")

    state_dtype = jnp.promote_types(q.dtype, jnp.float32)
    if g is not None and (layer_idx is not None or num_layers is not None):
        raise ValueError("g_gamma: expected either g_gamma or layer_idx and num_layers, got both")
    if g is None:
        g = lightning_g_gamma(H, layer_idx, num_layers, state_dtype)
    else:
        given, g = g, _array("g_gamma", g, (H,), jnp.floating, _swapped(g, 0, T, H))
        if (value := _known(given)) is not None and not (value <= 0).all():
            raise ValueError(f"g_gamma: expected log decays <= 0, got {value.max()}")
    # What could not be checked must not grow. (jnp.minimum would halve the gradient of those that are 0.)
    g = jnp.where(g > 0, 0, g)
    g = jnp.maximum(g.astype(state_dtype), -1e5)                 # e^g is 0 from far before; -inf would give NaN where no token is between

    scale = _scale(scale, K)
    if not isinstance(scale, float):                             # kernels take a number: a traced scale goes into the query
        q, scale = q * lax.convert_element_type(scale, q.dtype), 1.0
    _static("reverse", reverse)

    n, count = B, "the batch"
    if cu is not None:
        cu = _boundaries(cu, B, T)
        n, count = cu.shape[0] - 1, "the number of packed sequences"
    if s0 is not None:
        if getattr(s0, "shape", ())[1:] == (H, K, V) and s0.shape[0] != n:
            raise ValueError(f"initial_state: expected {n} states, {count}, got {s0.shape[0]}")
        s0 = _array("initial_state", s0, (n, H, K, V), jnp.floating, _swapped(s0, 1, T, H)).astype(state_dtype)
    return q, k, v, g, scale, s0, cu


# The scan that everything is made of --------------------------------------------------------------------------------------------
#
# Internally every batch row is a pack of n sequences; a row of a plain batch is a pack of one. The op is a scan over them:
#
#     _scan(op, q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], g [B, H], s0 [B, n, H, K, V] | None, cu [B, n+1] | None)
#         -> o [B, T, H, V], s [B, n, H, K, V] | None, y | None
#
# An operand may have one row in place of B: then all rows share it. It may have fewer heads than the decay: then groups of heads
# share them. The op is linear in q, k, v and s0, so its gradients are scans as well:
#
#     dq = scan(do, v, k, from s0^T)     dk = scan back(v, do, q, from ds^T)     dv = scan back(k, q, do, from ds)     ds0 = its end
#
# A forward scan decays the state before it adds a token. Its adjoint runs backwards, and decays the state after the token was read
# (`post`). It starts from the cotangent of the final state and ends with the cotangent of s0.
#
# The scans for dk and dv have the same state, transposed. A scan given w [B, T, Hw, V] also returns y_i = scale S_i w_i [B, T, H, K],
# so one scan with w = v yields both.

@dataclasses.dataclass(frozen=True)
class _Op:
    scale: float                                                 # multiplies outputs or, if post, what enters the state
    reverse: bool
    post: bool                                                   # decay the state after the token is read, not before it is added
    backend: str | None
    precision: Any                                               # jax.default_matmul_precision where the op was called
    only_state: bool = False                                     # o is [B, 0, H, V]
    final_state: bool = True                                     # False: s is None

    def adjoint(self):
        return dataclasses.replace(self, reverse=not self.reverse, post=not self.post)


def _transposed(s):
    return None if s is None else jnp.swapaxes(s, -1, -2)


def _to_heads(x, heads, dtype):
    """Sums the gradient [B, T, H, D] of an operand over the query heads that read each of its `heads`."""
    B, T, H, D = x.shape
    return x if heads == H else x.reshape(B, T, heads, H // heads, D).sum(3, dtype=jnp.promote_types(dtype, jnp.float32)).astype(dtype)


def _attend(op, *operands):
    """The scan with its gradients. An unused final state gets no cotangent, except inside shard_map, which requires zeros."""
    return (_attend_local if jax.sharding.get_abstract_mesh().manual_axes else _attend_anywhere)(op, *operands)


@functools.partial(jax.jit, static_argnums=0)
def _forward(op, *operands):
    specs = list(map(_spec, operands[:3]))
    rows = next((spec[0] for spec in specs if spec[0] is not None), None)
    taken = jax.tree.leaves(rows)
    heads = next((spec[2] for spec in specs if spec[2] is not None and not set(taken) & set(jax.tree.leaves(spec[2]))), None)
    out = PartitionSpec(rows, None, heads)
    return _in_auto_mode(lambda *operands: _scan(op, *operands)[:2], operands, (out, out if op.final_state else None))


def _attend_fwd(op, *operands):
    """What is saved ends with () where the gradient of g is wanted: it costs a scan of its own."""
    wanted = () if operands[3].perturbed else None
    operands = custom_vjp_primal_tree_values(operands)
    return _attend(op, *operands), (*operands, wanted)


def _attend_bwd(op, saved, cotangents):
    return _gradients(op, saved, *(None if isinstance(x, SymbolicZero) else x for x in cotangents))


@_promotes
@functools.partial(jax.jit, static_argnums=0)
def _gradients(op, saved, do, ds):
    q, k, v, g, s0, _, wants_dg = saved
    specs = *map(_spec, (q, k, v, g if wants_dg is not None else None, s0)), None
    return _in_auto_mode(functools.partial(_gradients_by_scans, op), (saved, do, ds), specs)


def _gradients_by_scans(op, saved, do, ds):
    q, k, v, g, s0, cu, wants_dg = saved
    do = jnp.zeros((*q.shape[:2], g.shape[1], v.shape[3]), v.dtype) if do is None or op.only_state else do
    op = dataclasses.replace(op, only_state=False, final_state=False)
    dq, _ = _attend(op, do, v, k, g, _transposed(s0), cu)
    dv, ds0, dk = _attend_both(dataclasses.replace(op.adjoint(), final_state=s0 is not None), k, q, do, g, ds, cu, v)

    dg = None
    if wants_dg is not None:
        dg = _decay_gradient(op, q, k, v, g, s0, cu, do, ds)
        dg = dg if g.shape[0] > 1 else dg.sum(0, keepdims=True)
    dq, dk, dv = (_to_heads(dx, x.shape[2], x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, dg, ds0, None


_attend_anywhere, _attend_local = (jax.custom_vjp(_forward, nondiff_argnums=(0,)) for _ in range(2))
_attend_anywhere.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
_attend_local.defvjp(lambda op, *operands: (_attend(op, *operands), (*operands, ())), _attend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_both(op, q, k, v, g, s0, cu, w):
    """The scan, plus what w reads from the transposed states."""
    return _scan(op, q, k, v, g, s0, cu, w)


def _one_by_one(op, q, k, v, g, s0, cu, w):
    transposed = dataclasses.replace(op, final_state=False)
    return *_attend(op, q, k, v, g, s0, cu), _attend(transposed, w, v, k, g, _transposed(s0), cu)[0]


_attend_both.defvjp(lambda op, *operands: (_attend_both(op, *operands), operands),
                    lambda op, operands, cotangents: jax.vjp(functools.partial(_one_by_one, op), *operands)[1](cotangents))


# One sequence on many devices: each device starts from the state that the devices before it leave. Only states are sent, once each way.

@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_across(op, axes, q, k, v, g, s0):
    return _across_fwd(op, axes, q, k, v, g, s0)[0]


@_promotes
def _across_fwd(op, axes, q, k, v, g, s0):
    s_in, s = _exchange(op, axes, k, v, g, s0)
    o, _ = _attend(dataclasses.replace(op, final_state=False), q, k, v, _vary(g, q), s_in, None)
    return (o, s if op.final_state else None), (q, k, v, g, s0, s_in)


@_promotes
def _across_bwd(op, axes, saved, cotangents):
    q, k, v, g, s0, s_in = saved
    do, ds = cotangents
    checked = set(axes) <= _varying(q)                                 # with check_vma=False shard_map itself sums what devices return
    devices = lax.axis_size(axes)                                # and gives each device its part of a shared cotangent
    r_in, ds0 = _exchange(op.adjoint(), axes, q, do, g, ds if checked else lax.psum(ds, axes))
    dq, dk, dv, dg, *_ = _gradients(op, (q, k, v, _vary(g, q), s_in, None, ()), do, r_in)
    if checked:
        dg = lax.psum(dg, tuple(_varying(dg) - _varying(g)))
    return dq, dk, dv, dg, None if s0 is None else ds0 if checked else ds0 / devices


_attend_across.defvjp(_across_fwd, _across_bwd)


def _exchange(op, axes, k, v, g, s0):
    """The state that this device's tokens start from, and the final state of the whole sequence, which all devices have."""
    own = _attend(dataclasses.replace(op, only_state=True, final_state=True), k, k, v, _vary(g, k), None, None)[1]
    spec = _spec(own)
    return _in_auto_mode(functools.partial(_states_around, op, axes, k.shape[1]), (own, g, s0), (spec, spec))


def _states_around(op, axes, T, own, g, s0):
    devices = lax.axis_size(axes)
    varies = set(axes) <= _varying(own)
    every = lax.all_gather(own, axes, **({"to": "invarying"} if varies else {}))             # [devices, B, 1, H, K, V]
    every = jnp.flip(every, 0) if op.reverse else every          # in scan order
    every = every if s0 is None else jnp.concatenate([s0[None], every])
    first = 0 if s0 is None else 1
    rank = lax.axis_index(axes)
    rank = devices - 1 - rank if op.reverse else rank

    def after(devices_before):                                   # the state after so many devices, s0 included
        age = devices_before - 1 + first - jnp.arange(every.shape[0])
        weight = jnp.where(age >= 0, jnp.exp(g[..., None] * T * jnp.maximum(age, 0)), 0)    # [B | 1, H, devices (+ 1)]
        return jnp.einsum("bhd,dbnhkv->bnhkv", jnp.broadcast_to(weight, (own.shape[0], *weight.shape[1:])), every, precision="highest")

    return after(rank), after(devices)


def _vary(x, *like, but=()):
    """`x`, varying over every shard_map axis that one of `like` varies over, save for some."""
    axes = frozenset().union(*map(_varying, jax.tree.leaves(like))) - set(but)
    return jax.tree.map(lambda x: lax.pcast(x, tuple(axes - _varying(x)), to="varying"), x)


def _varying(x):
    """The shard_map axes that `x` varies over; none where shard_map does not check."""
    return jax.typeof(x).manual_axis_type.varying


def _spec(x):
    return None if x is None else jax.typeof(x).sharding.spec


def _in_auto_mode(f, operands, out_specs):
    """f(*operands). On a mesh with Explicit axes, f runs in Auto mode, and `out_specs` shard its results."""
    meshes = jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands))
    mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])                    # arrays know their mesh where none is set
    explicit = tuple(a for a, kind in zip(mesh.axis_names, mesh.axis_types) if kind == jax.sharding.AxisType.Explicit)
    if not explicit:
        return f(*operands)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, axes=explicit, out_sharding=out_specs)(*operands)


def _scan(op, q, k, v, g, s0, cu, w=None):
    """The entry point of every scan: it adds the rules of vmap, sharding and platform. Returns o, s and y, or None for what is not asked for."""
    return _folded(op)(q, k, v, g, s0, cu, w)


@functools.cache
def _folded(op):
    """The scan with a vmap rule: the mapped axis is folded into the batch."""
    @jax.custom_batching.custom_vmap
    def scan(*operands):
        return _sharded(op, *operands)

    @scan.def_vmap
    def _(N, mapped, q, k, v, g, s0, cu, w):
        operands = q, k, v, g, s0, cu, w
        mapped = *mapped[:4], *map(bool, mapped[4:])             # of None, custom_vmap says an empty tree
        B = _shared(x.shape[int(is_mapped)] for x, is_mapped in zip(operands, mapped) if x is not None)

        def fold(x, is_mapped):
            if x is None or not is_mapped and x.shape[0] == 1:
                return x                                         # all rows share it
            x = x if is_mapped else jnp.broadcast_to(x, (N, *x.shape))
            x = jnp.broadcast_to(x, (N, B, *x.shape[2:]))
            return x.reshape(N * B, *x.shape[2:])

        results = _scan(op, *map(fold, operands, mapped))
        return jax.tree.map(lambda x: x.reshape(N, B, *x.shape[1:]), results), jax.tree.map(lambda _: True, results)

    return scan


# The dims of the operands and results of a scan: batch rows, tokens, heads, head dims K and V, sequences, boundaries.
_OPERANDS = dict(q="b t h k", k="b t h k", v="b t h v", g="b h", s0="b n h k v", cu="b m", w="b t h v")
_RESULTS = dict(o="b t h v", s="b n h k v", y="b t h k")


def _sharded(op, *operands):
    """The scan with a sharding rule: each device scans its own batch rows and heads, and nothing is sent."""
    shapes = {name: x.shape for name, x in zip(_OPERANDS, operands) if x is not None}
    mesh = jax.sharding.get_abstract_mesh()
    left = math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)    # devices that the compiler may use
    if not all(x.size for x in operands if x is not None) or mesh.manual_axes and left == 1:
        return _on_platform(op, *operands)
    # jit, because custom_partitioning takes no constants: those that a call folds become its own
    call = custom_partitioning(jax.jit(functools.partial(_on_platform, op)))
    call.def_partition(functools.partial(_partition, op, shapes, mesh), **_sharding_rule(op, shapes))
    return call(*operands)


def _head_count(name, shape):
    return shape[_OPERANDS[name].split().index("h")] if name != "cu" else 1


def _sharding_rule(op, shapes):
    """What the compiler may split: batch rows, and heads, which operands share in groups. A factor of
    the heads is named by the count that it completes: with 2 key heads and 8 query heads, keys have
    h2 and queries (h2 h8), where h8 is 4."""
    B, H = _shared(shape[0] for shape in shapes.values()), shapes["g"][1]
    counts = sorted({1} | {_head_count(*item) for item in shapes.items()})
    sizes = {f"h{count}": count // fewer for fewer, count in zip(counts, counts[1:])}
    # a dim of size 1 where others have more is a factor of its own, which nothing splits
    own = map("one{}".format, itertools.count())

    def write(pattern, rows, heads):
        parts = [factor for factor in sizes if int(factor[1:]) <= heads]
        words = {"b": "b" if rows == B else next(own), "h": " ".join(parts) or next(own)}
        words["h"] = f"({words['h']})" if len(parts) > 1 else words["h"]
        return [words.get(dim, dim) for dim in pattern.split()]

    tensors = [write(_OPERANDS[name], shape[0], _head_count(name, shape)) for name, shape in shapes.items()]
    wanted = dict(o=True, s=op.final_state, y="w" in shapes)
    results = [write(_RESULTS[name], B, H) for name in _RESULTS if wanted[name]]
    if op.only_state:
        results[0][1] = "no_tokens"
    rule = " -> ".join(", ".join(map(" ".join, side)) for side in (tensors, results))
    dims = [dim for tensor in tensors + results for dim in tensor]
    # in order of appearance, as the compiler wants them
    whole = tuple(dict.fromkeys(dim for dim in dims if dim in ("t", "no_tokens", "k", "v", "n", "m")))
    return dict(sharding_rule=rule, need_replication_factors=whole,
                **{factor: size for factor, size in sizes.items() if factor not in dims})


def _partition(op, shapes, traced_mesh, mesh, _, results):
    """How one device scans its part: mesh, function, shardings of the results and of the operands."""
    mesh, rows, heads = _split_of(results[0], mesh, traced_mesh)
    devices, H = math.prod(mesh.shape[axis] for axis in heads), shapes["g"][1]
    B = _shared(shape[0] for shape in shapes.values())
    fewer = {name for name in ("q", "k", "v", "w") if name in shapes and shapes[name][2] > 1 and shapes[name][2] % devices}
    # heads that devices share are chosen by the device's number, which a part of a mesh does not know
    if H % devices or fewer and traced_mesh.manual_axes:
        heads, devices, fewer = (), 1, set()

    def put(pattern, split_rows=True, split_heads=True):
        split = {"b": rows if split_rows else (), "h": heads if split_heads else ()}
        return NamedSharding(mesh, PartitionSpec(*(split.get(dim) or None for dim in pattern.split())))

    def one_device(*operands):
        operands = [_heads_of_device(x, H // devices, devices, lax.axis_index(heads)) if name in fewer else x
                    for name, x in zip(_OPERANDS, operands)]
        # the mesh at hand is not that of what a device has for itself
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return _on_platform(op, *operands)

    by_operand = [put(pattern, shapes[name][0] == B, name not in fewer and _head_count(name, shapes[name]) > 1)
                  if name in shapes else None for name, pattern in _OPERANDS.items()]
    by_result = [None if x is None else put(pattern) for x, pattern in zip(results, _RESULTS.values())]
    return mesh, one_device, tuple(by_result), tuple(by_operand)


def _split_of(x, mesh, traced_mesh):
    """The mesh, and the axes of it over which the rows and heads of a result `x` are split."""
    if isinstance(x.sharding, NamedSharding):
        rows, _, heads, *_ = *x.sharding.spec, *(None,) * 4
        axes = lambda entry: () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        return x.sharding.mesh, axes(rows), axes(heads)
    # The compiler named no mesh: its devices are those of the mesh of the call, less the axes that a shard_map around the call took.
    # The same sharding is looked for among all that split rows and heads over them.
    free = [axis for axis in traced_mesh.axis_names if axis not in traced_mesh.manual_axes]
    sizes = [traced_mesh.shape[axis] for axis in free]
    mesh = jax.sharding.Mesh(np.array([*x.sharding.device_set][:math.prod(sizes)]).reshape(sizes), free)
    wanted = x.sharding._to_xla_hlo_sharding(len(x.shape))
    for count in range(len(free) + 1):
        for axes in itertools.permutations(free, count):
            for cut in range(count + 1):
                rows, heads = axes[:cut], axes[cut:]
                if NamedSharding(mesh, PartitionSpec(rows or None, None, heads or None))._to_xla_hlo_sharding(len(x.shape)) == wanted:
                    return mesh, rows, heads
    return mesh, (), ()


def _heads_of_device(x, heads, devices, device):
    """The heads of x [B, T, heads of x, D] that the `heads` heads of a device read: one, or one for each."""
    group = heads * devices // x.shape[2]
    if group % heads == 0:
        return lax.dynamic_slice_in_dim(x, device * heads // group, 1, axis=2)
    return jnp.take(x, (device * heads + jnp.arange(heads)) // group, axis=2)


@_promotes
def _on_platform(op, *operands):
    """Triton or plain JAX, chosen when the computation is lowered unless `op.backend` names one."""
    q, k, v, g, s0, cu, w = operands
    if not (q.size and k.size and v.size):                       # no tokens, or no batch: nothing to launch
        return _vary(_scan_nothing(op, *operands), operands)

    def on(scan):
        def run(*operands):
            return _vary(scan(op, *operands), operands)
        return run

    plain, kernels = on(_scan_xla), on(_scan_triton)
    if op.backend is None:
        return lax.platform_dependent(*operands, cuda=kernels, rocm=kernels, default=plain)
    return (kernels if op.backend == "triton" else plain)(*operands)


def _batch(*operands):
    """B of a scan's operands, each of which has B rows or one that all share."""
    return _shared(x.shape[0] for x in operands if x is not None)


def _shared(sizes):
    """The size that all have which are not 1."""
    return next((size for size in sizes if size != 1), 1)


def _scan_nothing(op, q, k, v, g, s0, cu, w):
    """The scan of no tokens, or of no batch rows."""
    B, (T, _, K), H, V, n = _batch(q, k, v, g, s0, cu, w), q.shape[1:], g.shape[1], v.shape[3], 1 if cu is None else cu.shape[1] - 1
    s = jnp.zeros((B, n, H, K, V), g.dtype) if s0 is None else jnp.broadcast_to(s0, (B, n, H, K, V))
    return (jnp.zeros((B, 0 if op.only_state else T, H, V), v.dtype), s if op.final_state else None,
            None if w is None else jnp.zeros((B, T, H, K), v.dtype))


# Where sequences begin and end --------------------------------------------------------------------------------------------------

def _intervals(T, cu):
    """Splits T tokens at boundaries cu [n+1], which may hold anything, into n+2 intervals: before the first sequence, each sequence,
    after the last. Returns bounds [n+3] that never decrease, and which intervals are sequences. A sequence that runs backwards,
    outside of the tokens or into an earlier one is not: it counts as empty, and the tokens of its interval belong to no sequence."""
    zero, last = jnp.zeros(1, jnp.int32), jnp.full(1, T, jnp.int32)
    start, end = jnp.concatenate([zero, cu]), jnp.concatenate([cu, last])
    fits = (0 <= start) & (start <= end) & (end <= T)
    latest = jnp.concatenate([zero, lax.cummax(jnp.where(fits, end, 0))[:-1]])               # the end of the last valid sequence so far
    fits &= start >= latest
    i = jnp.arange(start.shape[0])
    return jnp.concatenate([jnp.where(fits, start, latest), last]), fits & (0 < i) & (i < start.shape[0] - 1)


def _table(T, cu, L, reverse, M=0):
    """Rows of work, [R, 7] int32: first token, tokens, tokens that belong to a sequence (all or none), sequence or -1, how many rows
    of its interval come before it in scan order and how many after it, and how many segments of all intervals before it another one
    follows. Rows are segments of L tokens, anchored where the scan starts: T // L + intervals are always enough. With M, rows are
    pieces of L tokens, M to each of those segments that another one follows. Rows without work have -1 tokens."""
    if cu is None:                                               # one sequence, and nothing around it
        bounds, is_sequence = T * jnp.arange(2), jnp.ones(1, bool)
    else:
        bounds, is_sequence = _intervals(T, cu)
    length, intervals = bounds[1:] - bounds[:-1], is_sequence.shape[0]
    segments = jnp.maximum(1, -(-length // (L * max(M, 1))))
    rows, R = ((segments - 1) * M, (T - 1) // (L * M) * M) if M else (segments, -(-T // L) if cu is None else T // L + intervals)
    ends = jnp.cumsum(rows)
    row = jnp.arange(R)
    of = jnp.cumsum(jnp.zeros(R, jnp.int32).at[ends].add(1, mode="drop"))
    used, of = of < intervals, jnp.minimum(of, intervals - 1)
    place = row - (ends - rows)[of]
    tokens = jnp.clip(length[of] - place * L, 0, L)
    first = bounds[1:][of] - place * L - tokens if reverse else bounds[of] + place * L
    sequence = of if cu is None else jnp.where((0 < of) & (of < intervals - 1), of - 1, -1)  # interval 1 is sequence 0
    columns = first, jnp.where(used, tokens, -1), jnp.where(is_sequence[of], tokens, 0), sequence, place, rows[of] - 1 - place, row - of
    return jnp.stack([x.astype(jnp.int32) for x in columns], -1)


def _tables(T, cu, *rest):
    """`_table` for each row of cu [B | 1, n+1]: [B | 1, R, 7]; for a plain batch, of one row."""
    return _table(T, None, *rest)[None] if cu is None else jax.vmap(lambda cu: _table(T, cu, *rest))(cu)


# The scan in plain JAX ----------------------------------------------------------------------------------------------------------
#
# Chunks of C tokens are rows of `_table`, and G groups of N chunks are the steps of a `lax.scan`. A
# group multiplies for all its chunks at once; only states pass from chunk to chunk, in an inner scan
# of sums. Chunks lie in the order of their tokens: a scan that goes back starts with the last one.

CHUNK, GROUP = 64, 512                                          # tokens per chunk, and per group


def _chunks(T, cu, widest):
    """C and the work of all groups, [G, B | 1, N, 7]: rows of `_table`, and of -1 to fill the last.
    `widest`: the larger head dim. Chunks of its size cost as much as their states."""
    if not isinstance(T, int):                                   # in an export: of a symbolic length little is known
        C, groups_of = CHUNK, 1
    else:
        C = CHUNK if widest <= CHUNK else 2 * CHUNK
        # chunks of equal length leave the fewest tokens to pad
        groups_of, C = GROUP // C, -(-T // -(-T // C))
    # a sequence that is shorter than a chunk wastes the rest of it
    if cu is not None:
        C = min(C, max(16, _block(T // (cu.shape[1] - 1))))
    table = _tables(T, cu, C, False)
    R = table.shape[1]
    G, N = (R, 1) if groups_of == 1 else (-(-R // groups_of), -(-R // -(-R // groups_of)))
    if groups_of > 1:
        table = jnp.pad(table, ((0, 0), (0, G * N - R), (0, 0)), constant_values=-1)
    return C, jnp.moveaxis(table.reshape(-1, G, N, 7), 1, 0)


def _columns(op, work):
    """Of chunks, [B | 1, N]: first token, tokens to read, whether a sequence starts and ends with them,
    and which one (or -1)."""
    first, _, read, sequence, place, after, _ = jnp.moveaxis(work, -1, 0)
    begins, ends = (after == 0, place == 0) if op.reverse else (place == 0, after == 0)
    return first, jnp.maximum(read, 0), begins, ends, sequence


def _by_chunk(xs):
    """What an inner scan walks: arrays [B | 1, N, ...] with the chunks first."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs)


def _rows_at(x, index):
    """x[b, index[b]] of x [B | 1, ...] and index [B | 1, ...]. vmap tells the compiler that no row reads another's."""
    if x.shape[0] == 1:
        return x[0].at[index].get(mode="clip")
    return jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(x, jnp.broadcast_to(index, (x.shape[0], *index.shape[1:])))


def _load_chunks(x, first, read, C, B, H, packed):
    """Tokens of x [B | 1, T, Hx, D] in the chunks at first [B | 1, N] as [B, N, H, C, D]: 0 where no
    sequence has tokens."""
    (rows, _, Hx, D), N, i = x.shape, first.shape[1], jnp.arange(C)
    if packed:
        x = _rows_at(x, first[..., None] + i)
        x = jnp.where((i < read[..., None])[..., None, None], x, 0)
    else:                                                        # padded with zeros to whole groups
        x = lax.dynamic_slice_in_dim(x, first[0, 0], N * C, 1).reshape(rows, N, C, Hx, D)
    x = jnp.repeat(x.swapaxes(2, 3), H // Hx, axis=2)
    return jnp.broadcast_to(x, (B, N, H, C, D))


def _decays(op, g, read, C):
    """How chunks with so many tokens [B | 1, N] decay what queries read of the state and what keys
    leave in it, as exponents [B | 1, N, 1, C, 1] and as powers [B | 1, N, H, C, 1], and the state
    itself [B | 1, N, H, 1, 1]."""
    i = jnp.arange(C)
    rank = read[..., None] - 1 - i if op.reverse else jnp.broadcast_to(i, (*read.shape, C))
    reads, leaves = rank + (not op.post), read[..., None] - 1 - rank + op.post
    reads, leaves = (x[:, :, None, :, None] for x in (reads, leaves))
    # XLA would put them where they multiply, and take a power for each number there
    exponents = reads, leaves, read[:, :, None, None, None]
    eq, ek, eS = lax.optimization_barrier(tuple(_power(g, x) for x in exponents))
    return reads, leaves, eq, ek, eS


def _power(g, x):
    """e^{g x}, or 1 where x < 0, for decays g [B | 1, H] and exponents [B | 1, N, 1, ., .]."""
    return jnp.exp(g[:, None, :, None, None] * jnp.maximum(x, 0))


def _distances(op, C):
    """From token j to token i in scan order, [i, j]: the same in all chunks, full or not."""
    i = jnp.arange(C)
    return (i[:, None] - i) * (-1 if op.reverse else 1)


def _states_of(x, sequence):
    """x[b, sequence[b]] of states x [B | 1, n, H, K, V] as [B | 1, H, K, V]; 0 for what is no sequence
    (-1)."""
    return jnp.where((sequence >= 0)[:, None, None, None], _rows_at(x, jnp.maximum(sequence, 0)), 0)


def _whole_groups(x, work, C, packed):
    """x [B, T, ...], padded to the tokens of all groups where chunks are not gathered."""
    G, _, N, _ = work.shape
    rest = -x.shape[1] % (N * C) if isinstance(G, int) else -x.shape[1] % C
    return x if packed or isinstance(rest, int) and not rest else jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0)))


def _scan_xla(op, q, k, v, g, s0, cu, w=None):
    """A group of chunks at a time; results as `_scan`'s."""
    B, T, H, K, V = _batch(q, k, v, g, s0, cu, w), q.shape[1], g.shape[1], q.shape[3], v.shape[3]
    sequences = 1 if cu is None else cu.shape[1] - 1
    # XLA would fold decays that it knows into large constants, and be slower
    g = lax.optimization_barrier(g)
    packed, wide = cu is not None, g.dtype
    C, works = _chunks(T, cu, max(K, V))

    # a product of two 16-bit numbers is exact in float32: to ask for more passes would change nothing
    precision = op.precision if v.dtype == wide else "default"

    def dot(indices, x, y):                                      # rounds what it multiplies, as the kernels do
        return jnp.einsum(indices, x.astype(v.dtype), y.astype(v.dtype), precision=precision, preferred_element_type=wide)

    scale_q, scale_k = (1.0, op.scale) if op.post else (op.scale, 1.0)
    q, k, v, w = (x if x is None else _whole_groups(x, works, C, packed) for x in (q, k, v, w))
    far = _distances(op, C)
    D = jnp.where(far >= 0, op.scale * _power(g, far[None, None, None]), 0)    # [B | 1, 1, H, i, j]

    def outputs(q, k, v, eq, S):
        """What queries read of the keys and values of their chunks, and of the states before them."""
        P = dot("bnhik,bnhjk->bnhij", q, k) * D
        O = dot("bnhij,bnhjv->bnhiv", P, v) + scale_q * eq * dot("bnhik,bnhkv->bnhiv", q, S)
        return O.swapaxes(2, 3).astype(v.dtype)                  # [B, N, C, H, V]

    def group(carry, work):                                      # [B | 1, N, 7]
        S, s = carry
        first, read, begins, ends, sequence = _columns(op, work)
        qs, ks, vs, ws = (x if x is None else _load_chunks(x, first, read, C, B, H, packed) for x in (q, k, v, w))
        _, _, eq, ek, eS = _decays(op, g, read, C)
        Z = dot("bnhjk,bnhjv->bnhkv", ks * (scale_k * ek), vs)
        N = read.shape[1]
        before, after = [None] * N, [None] * N
        for n in reversed(range(N)) if op.reverse else range(N):    # unrolled: a loop would launch a kernel per chunk
            if packed:
                entering = 0 if s0 is None else _states_of(s0, sequence[:, n])
                S = jnp.where(begins[:, n, None, None, None], entering, S)
            before[n] = S
            after[n] = S = eS[:, n] * S + Z[:, n]
        before, after = jnp.stack(before, 1), jnp.stack(after, 1)   # [B, N, H, K, V]
        if packed:
            to = jnp.where(ends & (sequence >= 0), sequence, sequences)
            to = jnp.broadcast_to(to, (B, to.shape[1]))
            s = jax.vmap(lambda s, to, S: s.at[to].set(S, mode="drop"))(s, to, after)
        o = outputs(qs, ks, vs, eq, before)
        return (S, s), (o, None if w is None else outputs(ws, vs, ks, eq, _transposed(before)))

    S = jnp.zeros((B, H, K, V), wide) if packed or s0 is None else jnp.broadcast_to(s0[:, 0], (B, H, K, V))
    # every sequence has a chunk that ends it, so no 0 of these remains
    s = jnp.zeros((B, sequences, H, K, V), wide) if packed else None

    def group_or_nothing(carry, work):                           # half of a pack's rows may be without work
        shapes = jax.eval_shape(group, carry, work)[1]
        nothing = lambda carry, work: (carry, _vary(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), q, k, v, g, s0, w, works))
        return lax.cond((work[..., 1] >= 0).any(), group, nothing, carry, work)

    def by_token(o):
        o = jnp.moveaxis(o, 0, 1).reshape(B, -1, H, o.shape[-1])    # [B, G N C, H, V]
        return _from_chunks(o, works, T, C) if packed else o[:, :T]

    carry = _vary((S, s), q, k, v, g, s0, works)
    (S, s), (o, y) = lax.scan(group_or_nothing if packed else group, carry, works, reverse=op.reverse)
    o = jnp.zeros((B, 0, H, V), v.dtype) if op.only_state else by_token(o)
    s = s if packed else S[:, None]
    return o, s if op.final_state else None, None if y is None else by_token(y)


def _from_chunks(o, works, T, C):
    """Outputs of chunks [B, G N C, H, V] for tokens, [B, T, H, V]: 0 for those of no sequence."""
    rows = jnp.moveaxis(works[..., :3], (3, 1), (0, 1))          # [3, B | 1, G, N]
    first, tokens, read = rows.reshape(3, works.shape[1], -1)

    def row(o, first, tokens, read):
        t = jnp.arange(T)
        ends = jnp.where(tokens < 0, T, first + tokens)          # ascending: a token's chunk is the number of ends up to it
        of = jnp.cumsum(jnp.zeros(T, jnp.int32).at[ends].add(1, mode="drop"))
        return jnp.where((read[of] > 0)[:, None, None], o[of * C + t - first[of]], 0)

    axis = 0 if works.shape[1] > 1 else None
    first, tokens, read = (x if axis == 0 else x[0] for x in (first, tokens, read))
    return jax.vmap(row, (0, axis, axis, axis))(o, first, tokens, read)


def _decay_gradient(op, q, k, v, g, s0, cu, do, ds):
    """The gradient of g for cotangents do and ds (or None), [B, H], in forward mode: the derivatives of
    o and s along dg = 1, times do and ds. Reverse mode sums p_i q_i.dq_i - p_j k_j.dk_j over positions
    p, which cancels to noise where a head forgets.

    Along dg = 1 the states have the derivatives W: over a chunk of C tokens
        S' = e^{gC} S + sum_j e^{g c_j} k_j v_j^T
        W' = e^{gC} (W + C S) + sum_j c_j e^{g c_j} k_j v_j^T
    and the outputs' derivatives, which are never made, add to the result
        sum_i e^{g r_i} q_i (W + r_i S) do_i^T
        + sum_{j<=i} (p_i - p_j) e^{g (p_i - p_j)} (q_i.k_j) (v_j.do_i)
    """
    B, T, H, K, V = *q.shape[:2], g.shape[1], q.shape[3], v.shape[3]
    # without tokens states end as they start
    if not (q.size and v.size):
        return _vary(jnp.zeros((B, H), g.dtype), q, k, v, g, s0, do, ds)
    packed, wide = cu is not None, g.dtype
    C, works = _chunks(T, cu, max(K, V))
    dot = functools.partial(jnp.einsum, precision=op.precision, preferred_element_type=wide)
    scale_q, scale_k = (1.0, op.scale) if op.post else (op.scale, 1.0)
    q, k, v, do = (_whole_groups(x, works, C, packed) for x in (q, k, v, do))
    far = _distances(op, C)
    D = far * jnp.where(far > 0, op.scale * _power(g, far[None, None, None]), 0)    # [B | 1, 1, H, i, j]

    def link(carry, chunk):
        S, W, total = carry                                      # [B, H, K, V] twice, [B, H]
        (Z, Zw, Q, Qw), keep, read, begins, ends, sequence = chunk
        # states of an empty sequence may be NaN
        entered = jnp.where(read > 0, sequence, -1)
        if packed:
            begins = begins[:, None, None, None]
            S = jnp.where(begins, 0 if s0 is None else _states_of(s0, entered), S)
            W = jnp.where(begins, 0, W)
        total += (Qw * S + Q * W).sum((-1, -2))
        S, W = keep * S + Z, keep * (W + read[:, None, None, None].astype(wide) * S) + Zw
        if ds is not None:
            left = jnp.where(ends[:, None, None, None], _states_of(ds, entered), 0)
            total += jnp.where(ends[:, None, None, None], left * W, 0).sum((-1, -2))
        return (S, W, total), None

    def group(carry, work):
        S, W, total = carry
        first, read, begins, ends, sequence = _columns(op, work)
        qs, ks, vs, dos = (_load_chunks(x, first, read, C, B, H, packed).astype(wide) for x in (q, k, v, do))
        reads, leaves, eq, ek, eS = _decays(op, g, read, C)
        # XLA before jax 0.12 sums products wrongly on CPUs where it sees that heads are copies
        scores, other = lax.optimization_barrier((dot("bnhik,bnhjk->bnhij", qs, ks), dot("bnhiv,bnhjv->bnhij", dos, vs)))
        total += (D * scores * other).sum((1, 3, 4))
        ks, qs = ks * (scale_k * ek), qs * (scale_q * eq)
        pairs = (ks, vs), (leaves.astype(wide) * ks, vs), (qs, dos), (reads.astype(wide) * qs, dos)
        sums = [dot("bnhjk,bnhjv->nbhkv", x, y) for x, y in pairs]
        chunks = sums, *_by_chunk((eS, read, begins, ends, sequence))
        return lax.scan(link, (S, W, total), chunks, reverse=op.reverse)[0], None

    S = jnp.zeros((B, H, K, V), wide) if packed or s0 is None else s0[:, 0]
    carry = _vary((S, jnp.zeros_like(S), jnp.zeros((B, H), wide)), q, k, v, g, s0, works, do, ds)
    return lax.scan(group, carry, works, reverse=op.reverse)[0][2]


# The kernels --------------------------------------------------------------------------------------------------------------------
#
# Kernels keep the state transposed, S^T [V, K]. The accumulator is then the left operand of o^T = S^T q^T as it is, and only the
# [C, C] scores go through shared memory. z is private to the kernels and has the same layout.
#
# One binary serves scans in all directions. Flags are the bits of an argument, `way`: 2 if reverse, 4 if post, 8 if z lies as [K, V],
# 16 if the final state is wanted. Bit 1 stays 0, because jax-triton compiles in an argument that is 1 (as an integer: hence `scale * 1.0`).
#
# Head dims above 128 are scanned in parts of the keys, one after another: the scan is linear in them, and each part adds to the outputs.
# A program rereads only outputs that its own threads wrote, so no launch depends on what XLA does with the memory between launches.
# Operands may have one row that all share: QT, KT, VT and WT are the tokens from one row to the next, and S_STRIDE the states of s0,
# or 0 where there is one row.
# An array that a launch may change in place (`_launch`) is passed twice, as an input and as an output: a kernel is right where they are
# one array, and where they are two.

_kernel, _gluon = (triton.jit, gluon.jit) if triton else (lambda f: f,) * 2


def _work(table, NK, NV, H, R, T, L, TABLE_STRIDE, reverse, PACKED: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """Which tiles of the values and keys, head, batch row, r and row r of its `_table` a program handles. A pack reads the row; a plain
    batch computes it, which saves a launch and a load. Consecutive programs share tokens or, if ROWS_FIRST, a head."""
    i = tl.program_id(0)
    i_v, i = i % NV, i // NV
    i_k, i = i % NK, i // NK
    if ROWS_FIRST:
        r, i = i % R, i // R
        h, b = i % H, (i // H).to(tl.int64)
    else:
        h, i = i % H, i // H
        r, b = i % R, (i // R).to(tl.int64)
    if PACKED:
        row = table + b * TABLE_STRIDE + r * 7
        return (i_v, i_k, h, b, r, tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5),
                tl.load(row + 6))
    else:
        tokens = tl.minimum(T - r * L, L)
        first = r * L + reverse * (T - tokens - 2 * r * L)
        return i_v, i_k, h, b, r, first, tokens, tokens, 0, r, R - 1 - r, r


def _enter(S, z, s0, zT, state, inside, place, sequence, swap, gL, HAS_S0: tl.constexpr):
    """Adds the state at the start of a segment to S: the linked state of the segments before it, and the decayed initial state.
    `zT` and `state` are offsets in [V, K] and [K, V] layout; with `swap`, z has the latter."""
    if place > 0:
        if swap > 0:
            S += tl.load(z + state, mask=inside, other=0.0)
        else:
            S += tl.load(z + zT, mask=inside, other=0.0)
    if HAS_S0:
        if sequence >= 0:
            S += tl.exp2(gL * place) * tl.load(s0 + state, mask=inside, other=0.0)
    return S


_work_gluon, _enter_gluon = _gluon(_work), _gluon(_enter)
_work, _enter = _kernel(_work), _kernel(_enter)


@_kernel
def _load(x, t, read, stride, column, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows t .. t+C and columns column .. column+BD of x, whose rows are `stride` apart: 0 outside of [read, D]."""
    row, col = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    inside = (t + row >= 0) & (t + row < read)
    if D % BD != 0:
        inside = inside & (column + col < D)
    return tl.load(x + (t.to(tl.int64) * stride + column) + row * stride + col, mask=inside, other=0.0)


@_kernel
def _states_kernel(k, v, g, table, z, T, L, H, R, KT, VT, HK, HV, TABLE_STRIDE, G_STRIDE, M, scale, way,
                   K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   PACKED: tl.constexpr, PRECISION: tl.constexpr):
    """z^T = sum_j e^{g(L-1-j)} v_j k_j^T over a piece of L tokens (post: e^{g(L-j)}, times the scale).

    Tokens whose weight at the end of the segment underflows float32 are skipped, and pieces that consist of such tokens are not
    written. For most heads that is most of the segment."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    reverse, post = way // 2 % 2, way // 4 % 2
    turn = 1 - 2 * reverse
    # the first heads forget least and take longest, so all of their rows start first
    i_v, i_k, h, b, r, first, tokens, read, sequence, place, after, slot = _work(table, NK, NV, H, R, T, L, TABLE_STRIDE, reverse, PACKED, True)
    gm = (tl.load(g + b * G_STRIDE + h) * 1.4426950408889634).to(tl.float32)
    if tokens < 0 or gm * L * (M - 1 - place % M) <= -150.0:
        return
    k += ((b * KT + first) * HK + h // (H // HK)) * K
    v += ((b * VT + first) * HV + h // (H // HV)) * V
    rank = (C - 1) * reverse + turn * tl.arange(0, C)
    scale_k = scale * 1.0 if post > 0 else 1.0
    c_end = (tokens + C - 1) // C
    live = tl.minimum(tl.ceil(150.0 / tl.maximum(-gm, 1e-6) / C) + 1, c_end * 1.0).to(tl.int32)
    S = tl.full([BV, BK], 0.0, tl.float32)
    for c in range(c_end - live, c_end):
        m = tl.minimum(tokens - c * C, C)
        t = (tokens - C) * reverse + turn * C * c
        ks, vs = _load(k, t, read, HK * K, i_k * BK, C, K, BK), _load(v, t, read, HV * V, i_v * BV, C, V, BV)
        dk = tl.exp2(gm * tl.maximum(m - 1 - rank + post, 0)) * scale_k
        S = tl.dot(tl.trans((vs * dk[:, None]).to(vs.dtype)), ks, S * tl.exp2(gm * m), input_precision=PRECISION)
    ck, cv = i_k * BK + tl.arange(0, BK)[None, :], i_v * BV + tl.arange(0, BV)[:, None]
    tl.store(z + ((b * R + r) * H + h) * K * V + cv * K + ck, S, mask=(ck < K) & (cv < V))


@_kernel
def _link_kernel(z, g, table, linked, L, H, R, TABLE_STRIDE, G_STRIDE, Z, M: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
                 PACKED: tl.constexpr):
    """linked, at the last piece of each segment, is the state that the next segment starts from: along a sequence,
    S' = e^{gLM} S + sum_j e^{gL(M-1-j)} z_j over the M pieces of a segment; BE of the E numbers of a state."""
    NE: tl.constexpr = (E + BE - 1) // BE
    i = tl.program_id(0)
    i_e, i = i % NE, i // NE
    h, i = i % H, i // H
    r, b = i % R * M, (i // R).to(tl.int64)
    segments = Z // M
    if PACKED:                                                   # only the program of the first piece walks the sequence
        row = table + b * TABLE_STRIDE + r * 7
        segments = tl.where((tl.load(row + 1) < 0) | (tl.load(row + 4) > 0), 0, (tl.load(row + 5) + 1) // M)
    gL = (tl.load(g + b * G_STRIDE + h) * 1.4426950408889634).to(tl.float32) * L
    if (gL <= -150.0) & (z.to(tl.int64, bitcast=True) == linked.to(tl.int64, bitcast=True)):
        return                                                   # nothing survives a segment: z is final
    j, e = tl.arange(0, M)[:, None], i_e * BE + tl.arange(0, BE)
    offset = ((b * Z + r) * H + h) * E
    stride = tl.full([], H * E, tl.int64)
    S = tl.full([BE], 0.0, tl.float32)
    for c in tl.range(0, segments, num_stages=3):                # pipelined loads never overtake these stores
        zs = tl.load(z + offset + j * stride + e[None, :], mask=(e[None, :] < E) & (gL * (M - 1 - j) > -150.0), other=0.0)
        offset += (M - 1) * stride
        S = S * tl.exp2(gL * M) + tl.sum(zs * tl.exp2(gL * (M - 1 - j)), 0)
        tl.store(linked + offset + e, S, mask=e < E)
        offset += stride


@_kernel
def _scan_kernel(q, k, v, g, s0, z, table, s, o, B, T, L, H, R, n, QT, KT, VT, S_STRIDE, HQ, HK, HV, TABLE_STRIDE, G_STRIDE, M, Z, scale, way,
                 K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                 PACKED: tl.constexpr, HAS_S0: tl.constexpr, PRECISION: tl.constexpr):
    """o_i = scale (e^{g(i+1)} q_i S + sum_{j<=i} e^{g(i-j)} (q_i.k_j) v_j), S' = e^{gm} S + sum_j e^{g(m-1-j)} k_j v_j^T, chunk
    by chunk over one segment, for one head, BV of the V columns, and BK of the K that are summed over after another.
    i, j in scan order, m tokens in the chunk (post: e^{gi} q_i S and e^{g(m-j)} k_j v_j^T, and the scale is of what enters S).

    Loads outside of the segment return 0, and stores are masked, whatever the table holds."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    reverse, post = way // 2 % 2, way // 4 % 2
    turn = 1 - 2 * reverse
    i_v, _, h, b, r, first, tokens, read, sequence, place, after, slot = _work(table, 1, NV, H, R, T, L, TABLE_STRIDE, reverse, PACKED, False)
    if tokens < 0:
        return
    gm = (tl.load(g + b * G_STRIDE + h) * 1.4426950408889634).to(tl.float32)
    start = b * T + first
    q += ((b * QT + first) * HQ + h // (H // HQ)) * K
    k += ((b * KT + first) * HK + h // (H // HK)) * K
    v += ((b * VT + first) * HV + h // (H // HV)) * V
    o += (start * H + h) * V
    s0 += ((b * S_STRIDE + sequence) * H + h) * K * V
    s += ((b * n + sequence) * H + h) * K * V
    z += ((b * Z + slot * M - 1) * H + h) * K * V

    rank = (C - 1) * reverse + turn * tl.arange(0, C)
    far = rank[None, :] - rank[:, None]                          # [j, i]
    scale_q, scale_k = 1.0 if post > 0 else scale * 1.0, scale * 1.0 if post > 0 else 1.0
    D = tl.where(far >= 0, tl.exp2(gm * tl.maximum(far, 0)) * scale, 0.0)
    dq = tl.exp2(gm * (rank + 1 - post)) * scale_q
    row, col = tl.arange(0, C)[:, None], i_v * BV + tl.arange(0, BV)[None, :]
    for part in range(NK):
        ck, cv = part * BK + tl.arange(0, BK)[None, :], i_v * BV + tl.arange(0, BV)[:, None]
        inside = (ck < K) & (cv < V)
        state = ck * V + cv
        # a sequence that reads nothing, tokens that belong to none included, ends with what it starts from, whatever that holds
        enters = tl.where(read > 0, sequence, -1)
        S = _enter(tl.full([BV, BK], 0.0, tl.float32), z, s0, cv * K + ck, state, inside, place, enters, way // 8 % 2, gm * L, HAS_S0)
        for c in range((tokens + C - 1) // C):
            m = tl.minimum(tokens - c * C, C)
            t = (tokens - C) * reverse + turn * C * c
            qs, ks = _load(q, t, read, HQ * K, part * BK, C, K, BK), _load(k, t, read, HK * K, part * BK, C, K, BK)
            vs = _load(v, t, read, HV * V, i_v * BV, C, V, BV)
            P = tl.dot(ks, tl.trans(qs), input_precision=PRECISION) * D
            O = tl.dot(S.to(qs.dtype), tl.trans(qs), input_precision=PRECISION) * dq[None, :]
            O = tl.dot(tl.trans(vs), P.to(vs.dtype), O, input_precision=PRECISION)
            O, to, mine = tl.trans(O), o + t.to(tl.int64) * (H * V) + row * (H * V) + col, (t + row >= 0) & (t + row < tokens) & (col < V)
            if NK > 1:
                O += tl.load(to, mask=mine & (part > 0), other=0.0).to(tl.float32)
            tl.store(to, O.to(vs.dtype), mask=mine)
            dk = tl.exp2(gm * tl.maximum(m - 1 - rank + post, 0)) * scale_k
            S = tl.dot(tl.trans((vs * dk[:, None]).to(vs.dtype)), ks, S * tl.exp2(gm * m), input_precision=PRECISION)
        if (after == 0) & (way // 16 % 2 > 0):
            if sequence >= 0:
                if HAS_S0:
                    if read <= 0:
                        S = tl.load(s0 + state, mask=inside, other=0.0)
                tl.store(s + state, S, mask=inside)
        if NK > 1:
            tl.debug_barrier()                                   # threads reread outputs that others of the program wrote


# The same scan for 16-bit operands on Hopper, in Gluon. Triton waits for each product, and for each copy through shared memory,
# before it starts the next. Here the tensor memory accelerator prefetches chunks, and products overlap with independent work. Each
# warp owns 16 rows of S^T. [C, BV] outputs are transposed in shared memory, so that stores are coalesced.

@_gluon
def _fetch(qd, kd, vd, wd, full, qs, ks, vs, ws, t, row_q, row_k, row_v, row_w, hq, hk, hv, hw, column_k, column_v, BOTH: gl.constexpr):
    hopper.mbarrier.expect(full, qd.nbytes_per_cta + kd.nbytes_per_cta + vd.nbytes_per_cta + (wd.nbytes_per_cta if BOTH else 0))
    hopper.tma.async_load(qd, [row_q + t, hq, column_k], full, qs)
    hopper.tma.async_load(kd, [row_k + t, hk, column_k], full, ks)
    hopper.tma.async_load(vd, [row_v + t, hv, column_v], full, vs)
    if BOTH:
        hopper.tma.async_load(wd, [row_w + t, hw, column_v], full, ws)


@_gluon
def _multiply(qs, ks, vs, ws, sb, ps, pw, S, D, dq, dk, dS, LO: gl.constexpr, LP: gl.constexpr, BOTH: gl.constexpr):
    """Issues the products of one chunk. o^T, y^T and S'^T are still being summed when it returns, in this order. The operands that they
    read from registers are returned as well, so that they stay alive until the wait."""
    C: gl.constexpr = ks.shape[0]
    BV: gl.constexpr = vs.shape[1]
    dtype: gl.constexpr = ks.dtype
    AO: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    AS: gl.constexpr = gl.DotOperandLayout(0, S.type.layout, 2)
    qt = qs.permute((1, 0))
    wt = ws.permute((1, 0))
    if not BOTH:                                                 # two scans lack the registers, and read the state from sb
        Sb = gl.convert_layout(S.to(dtype), AO)
    P = hopper.warpgroup_mma(ks, qt, gl.full([C, C], 0.0, gl.float32, LP), use_acc=False, is_async=True)
    O = hopper.warpgroup_mma(sb if BOTH else Sb, qt, gl.full([BV, C], 0.0, gl.float32, LO), use_acc=False, is_async=True)
    P = hopper.warpgroup_mma_wait(1, [P])
    ps.store((P * D).to(dtype))
    if BOTH:
        P = hopper.warpgroup_mma(vs, wt, gl.full([C, C], 0.0, gl.float32, LP), use_acc=False, is_async=True)
        Y = hopper.warpgroup_mma(sb.permute((1, 0)), wt, gl.full([BV, C], 0.0, gl.float32, LO), use_acc=False, is_async=True)
        O, P = hopper.warpgroup_mma_wait(1, [O, P])
        pw.store((P * D).to(dtype))
    vt = vs.permute((1, 0)).load(AS)
    vw = (vt.to(gl.float32) * dk[None, :]).to(dtype)
    vt = gl.convert_layout(vt, AO)
    if not BOTH:
        O, Sb = hopper.warpgroup_mma_wait(0, [O, Sb])
        Y = O
    gl.barrier()                                                 # all warps have stored their scores (the compiler fences them)
    O = hopper.warpgroup_mma(vs.permute((1, 0)) if BOTH else vt, ps, O * dq[None, :], is_async=True)
    if BOTH:
        Y = hopper.warpgroup_mma_wait(1, [Y])
        Y = hopper.warpgroup_mma(ks.permute((1, 0)), pw, Y * dq[None, :], is_async=True)
    S = hopper.warpgroup_mma(vw, ks, S * dS, is_async=True)
    return O, vw if BOTH else vt, Y, S, vw


@_gluon
def _rows(x, t, read, stride, column, D: gl.constexpr, C: gl.constexpr, BD: gl.constexpr, W: gl.constexpr):
    """Pointers to rows t .. t+C, columns column .. column+BD of x, whose rows are `stride` apart, and a mask of those inside [read, D]."""
    LB: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [W, 1], [1, 0])
    row = t + gl.arange(0, C, gl.SliceLayout(1, LB))[:, None]
    col = column + gl.arange(0, BD, gl.SliceLayout(0, LB))[None, :]
    return x + row.to(gl.int64) * stride + col, (row >= 0) & (row < read) & (col < D)


@_gluon
def _read(x, t, read, stride, column, D: gl.constexpr, C: gl.constexpr, BD: gl.constexpr, W: gl.constexpr):
    at, inside = _rows(x, t, read, stride, column, D, C, BD, W)
    return gl.load(at, mask=inside, other=0.0)


@_gluon
def _clear(x, t, read, W: gl.constexpr):
    """Sets the rows of a chunk in shared memory, which starts at t, to 0 where they are outside of [0, read]."""
    C: gl.constexpr = x.shape[0]
    BD: gl.constexpr = x.shape[1]
    LB: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [W, 1], [1, 0])
    row = t + gl.arange(0, C, gl.SliceLayout(1, LB))[:, None]
    chunk = x.load(LB)
    x.store(gl.where((row >= 0) & (row < read), chunk, 0.0))


@_gluon
def _put(o, os, O, old, t, tokens, stride, column, D: gl.constexpr, W: gl.constexpr, ADD: gl.constexpr):
    """Stores O^T, plus `old` if ADD: [BV, C] -> [C, BV]."""
    at, inside = _rows(o, t, tokens, stride, column, D, os.shape[0], os.shape[1], W)
    os.permute((1, 0)).store(O.to(os.dtype))
    out = os.load(gl.BlockedLayout([1, 8], [256 // os.shape[1], os.shape[1] // 8], [W, 1], [1, 0]))
    if ADD:
        out = (out.to(gl.float32) + old.to(gl.float32)).to(out.dtype)
    gl.store(at, out, mask=inside)


@_gluon
def _hopper_kernel(qd, kd, vd, wd, g, s0, z, table, s, o, y, B, T, L, H, R, n, QT, KT, VT, WT, S_STRIDE, HQ, HK, HV, HW,
                   TABLE_STRIDE, G_STRIDE, M, Z, scale, way, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
                   STAGES: gl.constexpr, PACKED: gl.constexpr, HAS_S0: gl.constexpr, BOTH: gl.constexpr):
    """`_scan_kernel`, line by line; qd, kd, vd, wd describe q, k, v, w as [B T, heads, head dim]. BOTH: also y_i = scale S_i w_i, the same
    for S transposed, where k and v change places; for a square tile that is all of K and V."""
    W: gl.constexpr = BV // 16                                   # warps
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BK, 16])              # S^T [BV, BK]
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, C, 16])               # o^T [BV, C], y^T
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, W // 4], [16, 4 * C // W, 16])  # scores [j, i]
    NK: gl.constexpr = (K + BK - 1) // BK
    NV: gl.constexpr = (V + BV - 1) // BV
    reverse, post = way // 2 % 2, way // 4 % 2
    turn = 1 - 2 * reverse
    i_v, _, h, b, r, first, tokens, read, sequence, place, after, slot = _work_gluon(table, 1, NV, H, R, T, L, TABLE_STRIDE, reverse, PACKED,
                                                                                         False)
    if tokens < 0:
        return
    gm = (gl.load(g + b * G_STRIDE + h) * 1.4426950408889634).to(gl.float32)
    start = b * T + first
    row_q, row_k = (b * QT).to(gl.int32) + first, (b * KT).to(gl.int32) + first
    row_v, row_w = (b * VT).to(gl.int32) + first, (b * WT).to(gl.int32) + first
    hq, hk, hv, hw, column_v = h // (H // HQ), h // (H // HK), h // (H // HV), h // (H // HW), i_v * BV
    o += (start * H + h) * V
    if BOTH:
        y += (start * H + h) * K

    s0 += ((b * S_STRIDE + sequence) * H + h) * K * V
    s += ((b * n + sequence) * H + h) * K * V
    z += ((b * Z + slot * M - 1) * H + h) * K * V

    dtype: gl.constexpr = qd.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    for part in range(NK):
        column_k = part * BK
        ck = column_k + gl.arange(0, BK, gl.SliceLayout(0, LS))[None, :]
        cv = column_v + gl.arange(0, BV, gl.SliceLayout(1, LS))[:, None]
        inside = (ck < K) & (cv < V)
        state = ck * V + cv
        # a sequence that reads nothing, tokens that belong to none included, ends with what it starts from, whatever that holds
        enters = gl.where(read > 0, sequence, -1)
        S = _enter_gluon(gl.full([BV, BK], 0.0, gl.float32, LS), z, s0, cv * K + ck, state, inside, place, enters, way // 8 % 2, gm * L,
                         HAS_S0)

        # in the loop, because states pass through the same memory before and after
        qb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BK], qd.layout)
        kb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BK], kd.layout)
        vb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BV], vd.layout)
        ps = gl.allocate_shared_memory(dtype, [C, C], flat)
        os = gl.allocate_shared_memory(dtype, [C, BV], flat)
        wb, sb, pw, ys = vb, ps, ps, os
        if BOTH:
            wb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BV], wd.layout)
            sb = gl.allocate_shared_memory(dtype, [BV, BK], flat)
            pw = gl.allocate_shared_memory(dtype, [C, C], flat)
            ys = gl.allocate_shared_memory(dtype, [C, BK], flat)
        full = hopper.mbarrier.allocate_mbarrier(batch=STAGES)
        for i in gl.static_range(STAGES):
            hopper.mbarrier.init(full.index(i), count=1)
        hopper.fence_async_shared()
        gl.barrier()
        fetched = (read + C - 1) // C
        t = (tokens - C) * reverse                               # offset of the first chunk
        forth = turn * C
        for i in range(gl.minimum(fetched, STAGES)):
            _fetch(qd, kd, vd, wd, full.index(i), qb.index(i), kb.index(i), vb.index(i), wb.index(i), t + i * forth,
                   row_q, row_k, row_v, row_w, hq, hk, hv, hw, column_k, column_v, BOTH)

        scale_q, scale_k = 1.0 if post > 0 else scale * 1.0, scale * 1.0 if post > 0 else 1.0
        far = turn * (gl.arange(0, C, gl.SliceLayout(0, LP))[None, :] - gl.arange(0, C, gl.SliceLayout(1, LP))[:, None])   # [j, i]
        rank_q = (C - 1) * reverse + turn * gl.arange(0, C, gl.SliceLayout(0, LO))
        rank_k = (C - 1) * reverse + turn * gl.arange(0, C, gl.SliceLayout(0, gl.DotOperandLayout(0, LS, 2)))
        D = gl.where(far >= 0, gl.exp2(gm * gl.maximum(far, 0)) * scale, 0.0)
        dq = gl.exp2(gm * (rank_q + 1 - post)) * scale_q
        dk = gl.exp2(gm * (C - 1 - rank_k + post)) * scale_k
        dS = gl.exp2(gm * C)
        c, stage, phase = 0, 0, 0
        while c < (tokens + C - 1) // C:                         # with `for`, Triton's pipeliner would wait for each product
            qs, ks = qb.index(stage).reshape([C, BK]), kb.index(stage).reshape([C, BK])
            vs, ws = vb.index(stage).reshape([C, BV]), wb.index(stage).reshape([C, BV])
            if c < fetched:
                hopper.mbarrier.wait(full.index(stage), phase)
            if (c + 1) * C > read:                               # tokens of other sequences, or of none, count as zeros
                _clear(qs, t, read, W)
                _clear(ks, t, read, W)
                _clear(vs, t, read, W)
                if BOTH:
                    _clear(ws, t, read, W)
                m = gl.minimum(tokens - c * C, C)
                dk = gl.exp2(gm * gl.maximum(m - 1 - rank_k + post, 0)) * scale_k
                dS = gl.exp2(gm * m)
            if BOTH:
                sb.store(S.to(dtype))
            hopper.fence_async_shared()
            gl.barrier()                                         # every warp is past the chunk before
            if (c > 0) & (c - 1 + STAGES < fetched):
                free = (stage + STAGES - 1) % STAGES
                _fetch(qd, kd, vd, wd, full.index(free), qb.index(free), kb.index(free), vb.index(free), wb.index(free),
                       t + (STAGES - 1) * forth, row_q, row_k, row_v, row_w, hq, hk, hv, hw, column_k, column_v, BOTH)
            old = S
            if NK > 1:
                old = _read(o, t, tokens * gl.minimum(part, 1), H * V, column_v, V, C, BV, W)
            O, vt, Y, S, vw = _multiply(qs, ks, vs, ws, sb, ps, pw, S, D, dq, dk, dS, LO, LP, BOTH)
            O, vt = hopper.warpgroup_mma_wait(1 + BOTH, [O, vt])
            _put(o, os, O, old, t, tokens, H * V, column_v, V, W, NK > 1)
            if BOTH:
                Y = hopper.warpgroup_mma_wait(1, [Y])
                _put(y, ys, Y, old, t, tokens, H * K, 0, K, W, False)
            S, vw = hopper.warpgroup_mma_wait(0, [S, vw])
            t += forth
            c += 1
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        if (after == 0) & (way // 16 % 2 > 0):
            if sequence >= 0:
                if HAS_S0:
                    if read <= 0:
                        S = gl.load(s0 + state, mask=inside, other=0.0)
                gl.store(s + state, S, mask=inside)
        if NK > 1:
            gl.barrier()                                         # every warp is past the part: its outputs are read again
            for i in gl.static_range(STAGES):
                hopper.mbarrier.invalidate(full.index(i))


@_kernel
def _step_kernel(q, k, v, g, s0, s, o, H, QT, KT, VT, S_STRIDE, HQ, HK, HV, G_STRIDE, scale, way, K: tl.constexpr, V: tl.constexpr,
                 BK: tl.constexpr, BV: tl.constexpr, HAS_S0: tl.constexpr):
    """`_scan_kernel` for sequences of one token (decoding): no matrix products; the state is read and written once. s may be s0."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0)
    i_v, i = i % NV, i // NV
    h, b = i % H, (i // H).to(tl.int64)
    decay = tl.exp(tl.load(g + b * G_STRIDE + h))
    ck, cv = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    qs = tl.load(q + (b * QT * HQ + h // (H // HQ)) * K + ck, mask=ck < K, other=0.0).to(tl.float32)
    ks = tl.load(k + (b * KT * HK + h // (H // HK)) * K + ck, mask=ck < K, other=0.0).to(tl.float32)
    vs = tl.load(v + (b * VT * HV + h // (H // HV)) * V + cv, mask=cv < V, other=0.0).to(tl.float32)
    at = ck[:, None] * V + cv[None, :]
    inside = (ck < K)[:, None] & (cv < V)[None, :]
    post = way // 4 % 2
    scale_q, scale_k = 1.0 if post > 0 else scale * 1.0, scale * 1.0 if post > 0 else 1.0
    S = ks[:, None] * (vs * scale_k)[None, :]
    if HAS_S0:
        S += tl.load(s0 + (b * S_STRIDE * H + h) * K * V + at, mask=inside, other=0.0) * (1.0 if post > 0 else decay)
    tl.store(o + (b * H + h) * V + cv, (tl.sum(qs[:, None] * S, 0) * scale_q).to(o.dtype.element_ty), mask=cv < V)
    if way // 16 % 2 > 0:
        tl.store(s + (b * H + h) * K * V + at, S * (decay if post > 0 else 1.0), mask=inside)


# Their launch -------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class _Config:
    """How the scan is launched. Chosen by `_config` alone; `bench.py --tune` measures what it should choose."""
    kernel: Any                                                  # `_hopper_kernel` or `_scan_kernel`
    C: int                                                       # tokens per chunk: at least 16, for the matrix units
    BK: int                                                      # columns of queries and keys per program
    BV: int                                                      # columns of values per program
    num_warps: int
    num_stages: int                                              # chunks in flight, the one in use included
    residents: int                                               # resident programs per processor
    states_BK: int                                               # key columns per program of `_states_kernel`, beside 64 value columns
    states_stages: int                                           # chunks of 64 tokens in flight there


SEGMENT = 512                                                    # tokens that a segment has at least: a state must cost less than they do
_SHARED_MEMORY = {"sm_80": 163, "sm_87": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}    # KiB a program


def _config(arch, processors, K, V, dtype, B, H, T, n, dual):
    """The launch configuration on a GPU for B rows of T tokens in n sequences, for H heads of head dims K and V.
    `dual`: of both scans of one state. S^T is at most [128, 128], for the registers."""
    shared, itemsize, length = _SHARED_MEMORY.get(arch, 64 if arch.startswith("gfx") else 99), dtype.itemsize, -(-T // n)
    BK, BV = min(_block(K), 128), min(_block(V), 128)
    wide = 256 // itemsize                                       # whole rows of 256 bytes
    states = wide, min(4, shared * 1024 // (64 * (wide + 96) * itemsize))                   # tiles in flight, and one that is multiplied

    def cut(BV, least, longest):
        """Fewer values per program where T is at most `longest`, and as many programs as that makes can run at once. It costs
        less than the states between segments do, or makes programs of a sequence that is too short for segments."""
        while T <= longest and BV > least and 2 * B * n * H * -(-V // BV) <= processors:
            BV //= 2
        return BV

    # descriptors want rows that are multiples of 16 bytes; sequences of fewer than 32 tokens waste most of a chunk of 64
    if arch == "sm_90" and itemsize == 2 and 64 <= T and 32 <= length and B * T < 2**31 and K % 8 == V % 8 == 0:
        if _HAS_HOPPER:
            BK, BV = max(BK, 64), cut(max(BV, 64), 64, 2 * SEGMENT - 1 if dual else 4 * SEGMENT)
            return _Config(_hopper_kernel, 64, BK, BV, BV // 16, 4, 2 if BK == BV == 64 else 1, *states)
        warnings.warn("lightning_attn: this Hopper GPU runs the Triton kernel, which takes up to 1.5 times "
                      "as long as the one in Gluon, because that cannot run: found triton "
                      f"{triton.__version__}. It needs: pip install 'triton{_HOPPER}'")
    BV = cut(BV, 32, 2 * SEGMENT - 1)

    def need(C, BV, stages):                                     # tiles in flight, and what passes through shared memory
        return (stages * C * (2 * BK + BV) + C * max(C, 2 * BV)) * itemsize / 1024 + 4
    C = 16 if length <= 16 else 32 if length <= 32 or itemsize == 4 else 64
    for C, BV, stages in [(c, b, n) for b in (BV, 64, 32, 16) for c in (64, 32, 16) if b <= BV and c <= C for n in (2, 1)]:
        if need(C, BV, stages) <= shared:
            # for short sequences, two programs of 4 warps at once beat one of 8
            return _Config(_scan_kernel, C, BK, BV, 8 if BK * BV > 64 * 64 and C > 16 else 4, 1 if length <= C else stages, 1, *states)


def _block(d):
    return max(16, 1 << (d - 1).bit_length())


@functools.cache
def _gpu():
    """Architecture and number of processors of the first GPU; None where there is none."""
    try:
        gpu = jax.devices("gpu")[0]
        arch = gpu.compute_capability
        return arch.split(":")[0] if arch.startswith("gfx") else "sm_" + arch.replace(".", ""), gpu.core_count
    except RuntimeError:
        return None


def _launch(kernel, *arrays, out, programs, in_place=None, **arguments):
    """Launches a kernel and returns its outputs, like `out`. `in_place` {input: output} are arrays that XLA may give the same memory."""
    call = functools.partial(jax_triton.triton_call, kernel=kernel, out_type=out, grid=(programs,),
                             backend_options={"enable_fp_fusion": True}, **arguments)
    return _in_place(call, arrays, in_place) if in_place else call(*arrays)


def _in_place(call, arrays, in_place):
    # jax-triton would pass such an array once. That is wrong where XLA gives the output other memory after all: for a call in a loop whose
    # output is stacked, it is a row of the stack. So the call is traced with separate outputs, and only its lowering learns of the sharing.
    jaxpr, out = jax.make_jaxpr(call, return_shape=True)(*arrays)
    eqn, = jaxpr.eqns
    values = dict(zip(jaxpr.jaxpr.invars, arrays))
    aliases = type(eqn.params["input_output_aliases"])(in_place)
    return jax.tree.unflatten(jax.tree.structure(out), eqn.primitive.bind(*map(values.get, eqn.invars),
                                                                          **eqn.params | dict(input_output_aliases=aliases)))


def _arguments(op, B, k, v, g, cu, L, rows, M, pieces=0):
    """The table of work in so many rows of L tokens, which is g where it is not read, and arguments that kernels share."""
    T, H, packed = k.shape[1], g.shape[1], cu is not None
    return _tables(T, cu, L, op.reverse, pieces) if packed else g, dict(
        T=T, L=L, H=H, R=rows, KT=_tokens_apart(k, B), VT=_tokens_apart(v, B), HK=k.shape[2], HV=v.shape[2], K=k.shape[3],
        V=v.shape[3], M=M, scale=op.scale,
        way=2 * op.reverse + 4 * op.post + 16 * op.final_state,
        TABLE_STRIDE=rows * 7 if packed and cu.shape[0] > 1 else 0, G_STRIDE=H if g.shape[0] > 1 else 0, PACKED=packed)


def _tokens_apart(x, B):
    """How many tokens lie between the rows of x [B | 1, T, H, D]: 0 where all rows share it."""
    return x.shape[1] if x.shape[0] == B else 0


def _scan_triton(op, q, k, v, g, s0, cu, w=None, swap=False):
    """`swap` sums the states of segments with k and v exchanged. A scan and its transpose then make the same call, which XLA makes once."""
    K, V, dtype = q.shape[3], v.shape[3], q.dtype
    B, T, HQ, H, n = _batch(q, k, v, g, s0, cu, w), *q.shape[1:3], g.shape[1], 1 if cu is None else cu.shape[1] - 1
    arch, processors = _gpu() or ("sm_90", 132)                  # traced, and never lowered, where there is no GPU
    config = _config(arch, processors, K, V, dtype, B, H, T, n, w is not None)
    if w is not None and not (config.kernel is _hopper_kernel and max(K, V) <= config.BK == config.BV):
        transposed = dataclasses.replace(op, final_state=False)
        g = g if q.shape[0] == w.shape[0] else jnp.broadcast_to(g, (B, H))                  # each of the two has all rows
        return *_scan_triton(op, q, k, v, g, s0, cu)[:2], _scan_triton(transposed, w, v, k, g, _transposed(s0), cu, swap=True)[0]
    states_apart = n if s0 is not None and s0.shape[0] == B else 0
    # a final state that nobody reads is no output: the kernel gets an array that it does not touch
    states = jax.ShapeDtypeStruct((B, n, H, K, V), jnp.float32)
    unread, out = ([], [states]) if op.final_state else ([g], [])
    out = [*out, jax.ShapeDtypeStruct((B, T, H, V), dtype)]

    def results(s, o, y=None):
        return o, s, y

    if T == 1 and cu is None and not op.only_state:
        BK, BV = _block(K), min(_block(V), max(16, 8192 // _block(K)))
        _, arguments = _arguments(op, B, k, v, g, cu, 1, 1, 1)
        in_place = {4: 0} if s0 is not None and op.final_state and s0.shape[0] == B else None
        out = _launch(_step_kernel, q, k, v, g, g if s0 is None else s0, *unread, out=out, in_place=in_place, programs=B * H * -(-V // BV), HQ=HQ,
                      BK=BK, BV=BV, HAS_S0=s0 is not None, num_warps=4, num_stages=1,
                      QT=_tokens_apart(q, B), S_STRIDE=states_apart,
                      **{n: arguments[n] for n in ("H", "KT", "VT", "HK", "HV", "G_STRIDE", "scale", "way", "K", "V")})
        return results(*[None] * len(unread), *out)

    C, BK, BV = config.C, config.BK, config.BV
    programs = B * H * -(-V // BV)
    room = dtype.itemsize * T * (K + V) // (14 * K * V)          # states that fit in a seventh of the memory of q, k, v and o
    # as many segments as fill the GPU
    segments = max(1, min(processors * config.residents // programs, T // SEGMENT, 1 + room))
    x, y = (v, k) if swap else (k, v)                            # the operands that states are summed from
    tile = dict(BK=min(_block(x.shape[3]), config.states_BK), BV=min(_block(y.shape[3]), 64))
    tiles = -(-x.shape[3] // tile["BK"]) * -(-y.shape[3] // tile["BV"])
    # M = 2^i pieces per segment, so that concurrent programs sum the states of a head that never forgets
    M = max(1, min(8, 3 * processors // (B * segments * tiles), 2 * T // (segments * SEGMENT), room // max(1, segments - 1)))
    M = 1 << M.bit_length() - 1
    piece = -(-T // (segments * M * C)) * C
    L = piece * M
    Z = -(-T // piece) if op.only_state else (T - 1) // L * M
    # jax.default_matmul_precision, or None: what is not named here asks for more than one pass of TF32
    fast = "default", "bfloat16", "tensorfloat32", "F16_F16_F16", "F16_F16_F32", "BF16_BF16_BF16", "BF16_BF16_F32", "TF32_TF32_F32"
    precise = op.precision is not None and op.precision not in fast and not op.precision.startswith("ANY_F8")
    precision = dict(PRECISION="ieee" if arch.startswith("gfx") else "tf32x3" if precise else "tf32")

    z = g                                                        # a placeholder, which is not read where no segment follows another
    if Z:
        table, arguments = _arguments(op, B, x, y, g, cu, piece, Z, 1 if op.only_state else M, M)
        z = _launch(_states_kernel, x, y, g, table, out=jax.ShapeDtypeStruct((B, Z, H, y.shape[3], x.shape[3]), jnp.float32), C=64,
                    programs=B * Z * H * tiles, num_warps=4, num_stages=config.states_stages, **precision, **tile, **arguments)
    if op.only_state:
        after = jnp.maximum(T - piece * (1 + jnp.arange(Z)), 0)  # tokens after each piece
        s = jnp.einsum("bzhvk,bhz->bhkv", z, jnp.broadcast_to(jnp.exp(g[..., None] * after), (B, H, Z)), precision="highest")
        return jnp.zeros((B, 0, H, V), dtype), s[:, None], None
    if Z:
        BE, walks = min(512, _block(K * V)), 1 if cu is None else Z // M
        z = _launch(_link_kernel, z, g, table, out=jax.ShapeDtypeStruct(z.shape, z.dtype), in_place={0: 0},
                    programs=B * walks * H * -(-K * V // BE), R=walks, Z=Z, E=K * V, BE=BE, num_warps=4,
                    num_stages=1, **{n: arguments[n] for n in ("L", "H", "M", "TABLE_STRIDE", "G_STRIDE", "PACKED")})

    R = -(-T // L) if cu is None else T // L + n + 2
    table, arguments = _arguments(op, B, k, v, g, cu, L, R, M)
    arrays = q, k, v, g, g if s0 is None else s0, z, table
    if config.kernel is _hopper_kernel:
        # descriptors made in a kernel would need scratch memory, which CUDA graphs do not provide
        view = lambda x, D, BD: jax_triton.TensorDescriptor(x, (x.shape[0] * T, x.shape[2], D), (x.shape[2] * D, D, 1), (C, 1, BD),
                                                            gl.NVMMASharedLayout(128, 16, 3))
        both, w = w is not None, v if w is None else w
        arrays = view(q, K, BK), view(k, K, BK), view(v, V, BV), view(w, V, BV), *arrays[3:]
        out += [jax.ShapeDtypeStruct((B, T, H, K), dtype)] * both
        kind = dict(WT=_tokens_apart(w, B), HW=w.shape[2], STAGES=2 if both else config.num_stages, num_stages=1, BOTH=both, **({} if both else {"y": 0}))
    else:
        kind = dict(num_stages=config.num_stages, **precision)
    out = _launch(config.kernel, *arrays, *unread, out=out, programs=programs * R, B=B, n=n, QT=_tokens_apart(q, B), S_STRIDE=states_apart, HQ=HQ, Z=Z, C=C, BK=BK, BV=BV,
                  HAS_S0=s0 is not None, num_warps=config.num_warps, **kind, **arguments | dict(way=arguments["way"] + 8 * swap))
    return results(*[None] * len(unread), *out)
