"""What is measured: each public function, at which sizes, dtypes and directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ppo_kernels

from .. import testing
from ..testing import Inputs
from .baselines import of_rows, of_scans, of_tokens
from .baselines.baseline import Baseline

FORWARD, BACKWARD = "forward", "forward+backward"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Benchmark:
    """One way of calling one public function, at any size.

    Attributes:
        function: Its public name.
        variant: What is particular about this call; may be empty.
        inputs: Makes the arguments from a generator, on its device, and a shape; floating-point
            tensors in float32.
        grads: The arguments that receive a gradient.
        check: The shape at which results are held to float64.
        baselines: What else computes the same, by name.
        again: The arguments that any backward pass must read a second time.
        reads: From the arguments, the bytes that any version must read; None for all of them.
        products: From the arguments and whether the gradient is asked for, the matrix products by
            whose time this is bound. No share of the memory bandwidth is stated then.
    """

    function: str
    variant: str
    inputs: Callable[[torch.Generator, Shape], Inputs]
    grads: tuple[str, ...]
    check: Shape
    baselines: Mapping[str, Baseline] = field(hash=False)
    again: tuple[str, ...] = ()
    reads: Callable[[Inputs], int] | None = None
    products: Callable[[Inputs, bool], Callable[[], object]] | None = None

    @property
    def public(self) -> Callable[..., Any]:
        """What is timed, on whichever backend is in use."""
        result: Callable[..., Any] = getattr(ppo_kernels, self.function)
        return result

    def case(self, backward: bool) -> testing.Case:
        """By which the tests would judge this call, at the shape of `check`."""
        like = (c.scale for c in testing.CASES if c.function == self.function and c.grads)
        return testing.Case(
            self.function,
            self.variant,
            lambda g: testing.arrange(self.inputs(g, self.check), torch.float64),
            forward=(),
            grads=self.grads if backward else (),
            scale=next(like, _no_scale),
        )


def _no_scale(inputs: Inputs) -> Mapping[int | str, Tensor | float]:
    return {}


@dataclass(frozen=True)
class Job:
    """A benchmark at one size, dtype and direction: one group of interleaved measurements."""

    benchmark: Benchmark
    shape: Shape
    dtype: torch.dtype = torch.float32
    direction: str = FORWARD

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def backward(self) -> bool:
        return self.direction == BACKWARD

    def inputs(self, device: torch.device) -> Inputs:
        """The arguments, the same for everyone who computes this."""
        made = self.benchmark.inputs(torch.Generator(device).manual_seed(0), self.shape)
        return testing.arrange(made, self.dtype, device=str(device))

    def traffic(self, inputs: Inputs, outputs: list[Tensor]) -> tuple[int, int]:
        """Bytes that any version must read and write at least.

        Forward: every argument once, every output once. Backward besides: the upstream gradients,
        the arguments in `again`, and every gradient once.
        """
        tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        reads = self.benchmark.reads
        read = reads(inputs) if reads else sum(v.nbytes for v in tensors.values())
        written = sum(t.nbytes for t in outputs)
        if self.backward:
            again = sum(tensors[k].nbytes for k in self.benchmark.again)
            read += read if reads else again
            read += sum(t.nbytes for t in outputs if t.requires_grad)
            written += sum(tensors[k].nbytes for k in self.benchmark.grads)
        return read, written


# ---- inputs -------------------------------------------------------------------------------------


def _normal(g: torch.Generator, shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, generator=g, device=g.device)


def _integers(g: torch.Generator, low: int, high: int, shape: Sequence[int]) -> Tensor:
    """Below `high`."""
    return torch.randint(low, high, shape, generator=g, device=g.device)


def _logits(g: torch.Generator, shape: Shape) -> Inputs:
    rows, vocab = shape
    return {"logits": _normal(g, shape).mul_(3), "tokens": _integers(g, 0, vocab, (rows,))}


def _kept(g: torch.Generator, shape: Shape) -> Inputs:
    """The 50 largest logits of each row, as top-k keeps them."""
    rows, vocab = shape
    made = _logits(g, shape)
    ids = made["logits"].topk(min(50, vocab)).indices
    place = _integers(g, 0, ids.shape[1], (rows, 1))
    offsets = torch.arange(rows + 1, device=g.device) * ids.shape[1]
    made["tokens"] = ids.gather(1, place)[:, 0]
    return made | {"kept": ppo_kernels.KeptSet(offsets, ids.flatten().int())}


def _kept_bytes(inputs: Inputs) -> int:
    offsets, ids = inputs["kept"]
    own = ids.numel() * inputs["logits"].element_size()
    return own + sum(t.nbytes for t in (offsets, ids, inputs["tokens"]))


def _two_logits(g: torch.Generator, shape: Shape) -> Inputs:
    logits = _normal(g, shape).mul_(3)
    return {"logits": logits, "ref_logits": _normal(g, shape).mul_(0.3).add_(logits)}


def _hidden(g: torch.Generator, shape: Shape) -> Inputs:
    rows, width, vocab = shape
    return {
        "hidden": _normal(g, (rows, width)),
        "weight": _normal(g, (vocab, width)).mul_(width**-0.5),
        "tokens": _integers(g, 0, vocab, (rows,)),
    }


def _sampled(g: torch.Generator, made: Inputs) -> Inputs:
    """What a loss needs beside the tokens of each row."""
    rows = (made["tokens"].shape[0],)
    old = _normal(g, rows).mul_(0.3).sub_(8.0)
    return made | {"old_logprobs": old, "advantages": _normal(g, rows)}


def _loss_of_logits(g: torch.Generator, shape: Shape) -> Inputs:
    return _sampled(g, _logits(g, shape))


def _loss_of_hidden(g: torch.Generator, shape: Shape) -> Inputs:
    return _sampled(g, _hidden(g, shape))


def _two_hidden(g: torch.Generator, shape: Shape) -> Inputs:
    made = _hidden(g, shape)
    return {
        "hidden": made["hidden"],
        "weight": made["weight"],
        "ref_hidden": _normal(g, made["hidden"].shape).mul_(0.3).add_(made["hidden"]),
        "ref_weight": made["weight"].clone(),
    }


def _responses(g: torch.Generator, shape: Shape) -> Tensor:
    """A mask of one response per row: it starts with the row and fills half of it or more."""
    rows, steps = shape
    ends = _integers(g, steps // 2, steps + 1, (rows, 1))
    return torch.arange(steps, device=g.device) < ends


def _policy(g: torch.Generator, shape: Shape, other: str) -> Inputs:
    logprobs = _normal(g, shape).abs_().neg_()
    return {
        "logprobs": logprobs,
        other: _normal(g, shape).mul_(0.2).add_(logprobs),
        "mask": _responses(g, shape),
    }


def _clipped_loss(g: torch.Generator, shape: Shape) -> Inputs:
    return _policy(g, shape, "old_logprobs") | {"advantages": _normal(g, shape)}


def _value_loss(g: torch.Generator, shape: Shape) -> Inputs:
    values = _normal(g, shape)
    return {
        "values": values,
        "old_values": _normal(g, shape).mul_(0.2).add_(values),
        "returns": _normal(g, shape).add_(values),
        "mask": _responses(g, shape),
    }


def _importance_weights(g: torch.Generator, shape: Shape, kind: str = "tis") -> Inputs:
    old = _normal(g, shape).abs_().neg_()
    spread = 0.2 if kind == "tis" else 0.2 * shape[-1] ** -0.5
    return {
        "old_logprobs": old,
        "rollout_logprobs": _normal(g, shape).mul_(spread).add_(old),
        "mask": _responses(g, shape),
        "kind": kind,
        "high": 1.2,
    }


def _tis_sequence(g: torch.Generator, shape: Shape) -> Inputs:
    return _importance_weights(g, shape, "tis-sequence")


def _kl_penalty(g: torch.Generator, shape: Shape, estimator: str = "k3") -> Inputs:
    return _policy(g, shape, "ref_logprobs") | {"estimator": estimator}


def _shape_rewards(g: torch.Generator, shape: Shape) -> Inputs:
    scores = _normal(g, shape[:1])
    return {"scores": scores, **_policy(g, shape, "ref_logprobs"), "kl_coef": 0.05}


def _x(g: torch.Generator, shape: Shape) -> Inputs:
    return {"x": _normal(g, shape).add_(0.5), "mask": _responses(g, shape)}


def _returns(g: torch.Generator, shape: Shape) -> Inputs:
    return {
        "rewards": _normal(g, shape),
        "mask": _responses(g, shape),
        "mask_convention": "carry",
        "gamma": 0.99,
    }


def _gae(g: torch.Generator, shape: Shape) -> Inputs:
    values = {"values": _normal(g, shape), "lam": 0.95}
    return _returns(g, shape) | values


def _vtrace(g: torch.Generator, shape: Shape) -> Inputs:
    logprobs = _normal(g, shape).abs_().neg_()
    return {
        "logprobs": logprobs,
        "rollout_logprobs": _normal(g, shape).mul_(0.2).add_(logprobs),
        "values": _normal(g, shape),
        **_returns(g, shape),
    }


def _packed(g: torch.Generator, shape: Shape) -> Inputs:
    """Sequences of 1 to 8192 steps, but no longer than an eighth of all."""
    (total,) = shape
    longest = min(8192, max(total // 8, 1))
    ends = _integers(g, 1, longest + 1, shape).cumsum(0)
    ends = ends[ends < total]
    return {
        "rewards": _normal(g, shape),
        "values": _normal(g, shape),
        "cu_seqlens": torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), total)]).int(),
        "gamma": 0.99,
        "lam": 0.95,
    }


# ---- benchmarks ---------------------------------------------------------------------------------


def _head_products(inputs: Inputs, backward: bool) -> Callable[[], object]:
    """As large as all logits at once: the logits, and the gradients of both factors."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    logits = hidden @ weight.mT

    def products() -> None:
        if "ref_hidden" in inputs:
            torch.mm(inputs["ref_hidden"], inputs["ref_weight"].mT, out=logits)
        torch.mm(hidden, weight.mT, out=logits)
        if backward:
            logits @ weight
            logits.mT @ hidden

    return products


def _entropy(g: torch.Generator, shape: Shape) -> Inputs:
    return _logits(g, shape) | {"entropy": True}


def _k1(g: torch.Generator, shape: Shape) -> Inputs:
    return _kl_penalty(g, shape, "k1")


_RATIOS = ("logprobs", "ref_logprobs", "mask")
_ALL = (
    Benchmark(
        "logprobs_from_logits",
        "",
        _logits,
        ("logits",),
        (8, 50257),
        of_rows.LOGPROBS,
        again=("logits", "tokens"),
    ),
    Benchmark(
        "logprobs_from_logits",
        "entropy",
        _entropy,
        ("logits",),
        (8, 50257),
        of_rows.LOGPROBS_ENTROPY,
        again=("logits", "tokens"),
    ),
    Benchmark(
        "logprobs_from_logits",
        "kept",
        _kept,
        ("logits",),
        (8, 50257),
        of_rows.LOGPROBS_KEPT,
        reads=_kept_bytes,
    ),
    Benchmark(
        "logprobs_from_hidden",
        "",
        _hidden,
        ("hidden", "weight"),
        (8, 64, 5003),
        of_rows.HIDDEN,
        products=_head_products,
    ),
    Benchmark(
        "categorical_kl",
        "",
        _two_logits,
        ("logits",),
        (8, 50257),
        of_rows.CATEGORICAL_KL,
        again=("logits", "ref_logits"),
    ),
    Benchmark(
        "categorical_kl_from_hidden",
        "",
        _two_hidden,
        ("hidden", "weight"),
        (8, 64, 5003),
        of_rows.HIDDEN_KL,
        products=_head_products,
    ),
    Benchmark(
        "ppo_loss_from_logits",
        "",
        _loss_of_logits,
        ("logits",),
        (8, 5003),
        of_rows.LOSS_OF_LOGITS,
    ),
    Benchmark(
        "ppo_loss_from_hidden",
        "",
        _loss_of_hidden,
        ("hidden", "weight"),
        (8, 64, 5003),
        of_rows.LOSS_OF_HIDDEN,
        products=_head_products,
    ),
    Benchmark("clipped_loss", "", _clipped_loss, ("logprobs",), (8, 512), of_tokens.CLIPPED_LOSS),
    Benchmark("value_loss", "", _value_loss, ("values",), (8, 512), of_tokens.VALUE_LOSS),
    Benchmark(
        "importance_weights",
        "tis",
        _importance_weights,
        (),
        (8, 512),
        of_tokens.IMPORTANCE_WEIGHTS,
    ),
    Benchmark(
        "importance_weights",
        "tis-sequence",
        _tis_sequence,
        (),
        (8, 512),
        of_tokens.IMPORTANCE_WEIGHTS,
    ),
    Benchmark(
        "kl_penalty",
        "k3",
        _kl_penalty,
        ("logprobs",),
        (8, 512),
        of_tokens.KL_PENALTY,
        again=_RATIOS,
    ),
    Benchmark(
        "kl_penalty", "k1", _k1, ("logprobs",), (8, 512), of_tokens.KL_PENALTY, again=("mask",)
    ),
    Benchmark(
        "shape_rewards",
        "",
        _shape_rewards,
        ("scores", "logprobs"),
        (8, 512),
        of_tokens.SHAPE_REWARDS,
        again=("mask",),
    ),
    Benchmark("gae", "", _gae, ("rewards", "values"), (8, 256), of_scans.GAE, again=("mask",)),
    Benchmark("gae", "packed", _packed, ("rewards", "values"), (2048,), of_scans.GAE_PACKED),
    Benchmark(
        "discounted_returns",
        "",
        _returns,
        ("rewards",),
        (8, 256),
        of_scans.RETURNS,
        again=("mask",),
    ),
    Benchmark("vtrace", "", _vtrace, (), (8, 256), of_scans.VTRACE),
    Benchmark("whiten", "", _x, ("x",), (8, 512), of_tokens.WHITEN, again=("x", "mask")),
    Benchmark("masked_mean", "", _x, ("x",), (8, 512), of_tokens.MASKED_MEAN, again=("mask",)),
    Benchmark("masked_sum", "", _x, ("x",), (8, 512), of_tokens.MASKED_SUM, again=("mask",)),
)
BENCHMARKS = {(b.function, b.variant): b for b in _ALL if hasattr(ppo_kernels, b.function)}
FUNCTIONS = tuple(dict.fromkeys(function for function, _ in BENCHMARKS))

OF_HIDDEN = ("logprobs_from_hidden", "categorical_kl_from_hidden", "ppo_loss_from_hidden")
# Under PPO these make targets and rewards, and nothing flows back through them.
CONSTANTS = ("gae", "discounted_returns", "importance_weights", "shape_rewards", "vtrace")


# ---- sizes --------------------------------------------------------------------------------------

_FP32 = (torch.float32,)
_HALF = (torch.bfloat16,)


def _jobs(
    function: str,
    variant: str,
    shapes: list[Shape],
    dtypes: tuple[torch.dtype, ...] = _FP32,
    directions: tuple[str, ...] | None = None,
) -> list[Job]:
    benchmark = BENCHMARKS.get((function, variant))
    if benchmark is None:
        return []
    if directions is None:
        directions = (FORWARD,) if function in CONSTANTS else (FORWARD, BACKWARD)
    return [Job(benchmark, s, t, d) for s in shapes for t in dtypes for d in directions]


def _per_token(shapes: list[Shape], dtypes: tuple[torch.dtype, ...] = _FP32) -> list[Job]:
    """Everything that takes [B, T]."""
    others = ("logprobs_from_logits", "ppo_loss_from_logits", "categorical_kl", *OF_HIDDEN)
    names = [key for key in BENCHMARKS if key[0] not in others and key[1] != "packed"]
    return [job for name in names for job in _jobs(*name, shapes, dtypes)]


def _of_hidden(shapes: list[Shape], dtypes: tuple[torch.dtype, ...] = _FP32) -> list[Job]:
    return [job for name in OF_HIDDEN for job in _jobs(name, "", shapes, dtypes)]


def _small() -> list[Job]:
    return [
        *_jobs("logprobs_from_logits", "", [(8, 1009)]),
        *_jobs("logprobs_from_logits", "entropy", [(8, 1009)], _HALF),
        *_jobs("logprobs_from_logits", "kept", [(8, 1009)]),
        *_of_hidden([(8, 8, 8), (8, 16, 1009)]),
        *_jobs("ppo_loss_from_logits", "", [(8, 8), (8, 1009)]),
        *_jobs("categorical_kl", "", [(8, 1009)]),
        *_per_token([(1, 8), (8, 256)]),
        *_jobs("gae", "packed", [(4096,)]),
    ]


def _default() -> list[Job]:
    logits: list[Shape] = [(8, 50257), (256, 50257), (2048, 50257)]
    steps: list[Shape] = [(1024, 1024), (64, 8192), (8, 32768), (8, 131072), (1, 1048576)]
    return [
        *_jobs("logprobs_from_logits", "", [(8, 8), *logits]),
        *_jobs("logprobs_from_logits", "", logits[1:], _HALF),
        *_jobs("logprobs_from_logits", "", logits[1:2], (torch.float16,)),
        *_jobs("logprobs_from_logits", "", [(256, v) for v in (8192, 32000, 128256)]),
        *_jobs("logprobs_from_logits", "entropy", logits[2:], (*_FP32, *_HALF)),
        *_jobs("logprobs_from_logits", "kept", logits[2:], (*_FP32, *_HALF)),
        *_of_hidden([(8, 8, 8), (512, 768, 50257), (2048, 768, 50257)]),
        *_of_hidden([(2048, 768, 50257)], _HALF),
        *_jobs("ppo_loss_from_logits", "", [(8, 8), *logits[2:]]),
        *_jobs("ppo_loss_from_logits", "", logits[2:], _HALF),
        *_jobs("categorical_kl", "", [(8, 8)]),
        *_jobs("categorical_kl", "", logits[1:2], (*_FP32, *_HALF)),
        *_per_token([(1, 8), (64, 1024), (64, 16384)]),
        *_per_token([(64, 1024)], (torch.bfloat16, torch.float16)),
        *_jobs("gae", "", steps),
        *_jobs("gae", "", [(64, 1024)], directions=(BACKWARD,)),
        *_jobs("gae", "packed", [(65536,), (1048576,)]),
    ]


def _large() -> list[Job]:
    return [
        *_jobs("logprobs_from_logits", "", [(4096, 152064)], _HALF),
        *_jobs("logprobs_from_logits", "entropy", [(4096, 152064)], _HALF),
        *_jobs("logprobs_from_logits", "kept", [(4096, 152064)], _HALF),
        *_jobs("logprobs_from_logits", "", [(1, 262144), (4, 262144)]),
        *_of_hidden([(2048, 2048, 50257)]),
        *_jobs("ppo_loss_from_logits", "", [(4096, 152064)], _HALF),
        *_jobs("categorical_kl", "", [(2048, 152064)], _HALF),
        *_per_token([(1024, 16384)]),
        *_jobs("gae", "", [(16, 1048576), (1, 16777216)]),
        *_jobs("gae", "packed", [(16777216,)]),
    ]


def _gpu() -> list[Job]:
    """The most telling first: there may be no time for all."""
    logits: list[Shape] = [(8192, 151936)]
    return [
        *_jobs("logprobs_from_logits", "", logits, _HALF),
        *_jobs("logprobs_from_logits", "entropy", logits, _HALF),
        *_jobs("ppo_loss_from_logits", "", logits, _HALF),
        *_per_token([(4096, 16384)]),
        *_jobs("gae", "", [(4096, 16384)], directions=(BACKWARD,)),
        *_jobs("gae", "", [(8, 131072), (1, 1048576)]),
        *_jobs("gae", "packed", [(67108864,), (1048576,)]),
        *_jobs("categorical_kl", "", [(4096, 151936)], _HALF),
        *_jobs("logprobs_from_logits", "", [(8192, 50257), (8, 151936)]),
        *_jobs("logprobs_from_logits", "kept", logits, _HALF),
        *_of_hidden([(4096, 4096, 151936)], _HALF),
        *_per_token([(1, 8), (64, 16384)]),
        *_jobs("logprobs_from_logits", "", [(8, 8)]),
        *_jobs("ppo_loss_from_logits", "", [(8, 8)]),
        *_jobs("categorical_kl", "", [(8, 8)]),
        *_of_hidden([(8, 8, 8)]),
        *_per_token([(64, 16384)], _HALF),
        *_jobs("logprobs_from_logits", "", [(8192, v) for v in (8192, 32000, 128256)]),
    ]


def _memory() -> list[Job]:
    """Peak memory from hidden states, against the vocabulary and against the tokens."""
    vocabularies: list[Shape] = [(512, 64, 1 << k) for k in (15, 16, 17, 18)]
    tokens: list[Shape] = [(1 << k, 64, 16384) for k in (9, 10, 11, 12, 13)]
    jobs = _of_hidden([*vocabularies, *tokens])
    return [job for job in jobs if job.direction == BACKWARD]


SIZES: dict[str, Callable[[], list[Job]]] = {
    "small": _small,
    "default": _default,
    "large": _large,
    "gpu": _gpu,
    "memory": _memory,
}
