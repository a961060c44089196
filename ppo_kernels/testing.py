"""What tests and benchmarks share: cases, layouts, executors and the rule for allowed errors.

The yardstick is the reference in float64 on upcast inputs, never torch in the input's own dtype,
which would pass every precision bug. Allowed error: twice that of the reference in fp32 on the same
upcast inputs, plus 4 ulps of the condition scale (the sum of the magnitudes of the terms a result
is made of); a half-precision gradient besides has 1 ulp of its own dtype, for the one rounding it
undergoes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_kernels

from . import cpu
from ._op import BACKENDS, OPS, op_counts, refusal, reset_op_counts, use_backend
from .ops._aggregation import AGGREGATIONS

Inputs = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One way of calling one public function.

    Attributes:
        function: Its public name.
        label: What is particular about this call.
        inputs: Makes the arguments from a generator; floating-point tensors in float64.
        forward: The ops a compiled backend runs.
        backward: The ops it runs for the gradient; empty where nothing is differentiated.
        grads: The arguments that receive a gradient.
        scale: From float64 inputs, the condition scale of each output (by position) and gradient
            (by argument name); what it leaves out is judged against the largest magnitude in the
            exact result.
    """

    function: str
    label: str
    inputs: Callable[[torch.Generator], Inputs]
    forward: tuple[str, ...]
    backward: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()
    scale: Callable[[Inputs], Mapping[int | str, Tensor | float]] = lambda inputs: {}

    @property
    def id(self) -> str:
        return f"{self.function}-{self.label}".replace(" ", "_")


# ---- executors and layouts ---------------------------------------------------------------------


def executors(*functions: str, device: str | None = None) -> list[str]:
    """Every executor that can run these public functions here, on tensors of `device` (None: any).

    The backends, `cpu` once per instruction-set level.
    """
    ops = [op for op in OPS.values() if op.function in functions]
    names = []
    for name in BACKENDS:
        runs_on = device_of(name) if device is None else device
        if all(refusal(op, name, runs_on) is None for op in ops) and _present(runs_on):
            names += [f"cpu:{isa}" for isa in cpu.supported_isas()] if name == "cpu" else [name]
    return names


def device_of(name: str) -> str:
    """The type of the device whose tensors this executor is tested with."""
    devices = BACKENDS[name.partition(":")[0]].devices or ("cpu",)
    return next(filter(_present, devices), devices[0])


def _present(device: str) -> bool:
    return device != "cuda" or torch.cuda.is_available()


@contextmanager
def executor(name: str) -> Iterator[str]:
    """Run the block's calls on this executor; gives the backend's name."""
    backend, _, isa = name.partition(":")
    if not isa:
        with use_backend(backend):
            yield backend
        return
    before = cpu.isa()
    cpu.set_isa(isa)
    try:
        with use_backend(backend):
            yield backend
    finally:
        cpu.set_isa(before)


def _embedded(t: Tensor, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> Tensor:
    """The values of `t` inside a larger tensor whose other elements are NaN (or nonsense)."""
    anything = float("nan") if t.is_floating_point() else 77
    whole = torch.full(shape, anything, device=t.device).to(t.dtype)
    inside = view(whole)
    inside.copy_(t)
    return inside


# Same values, other strides. One-dimensional tensors and scalars keep what applies to them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "offset": lambda t: _embedded(t, (t.numel() + 5,), lambda w: w[5:].view(t.shape)),
    "shifted": lambda t: (
        _embedded(t, (*t.shape[:-1], t.shape[-1] + 3), lambda w: w[..., 1:-2]) if t.dim() else t
    ),
    "strided": lambda t: (
        _embedded(t, (*t.shape[:-1], 2 * t.shape[-1]), lambda w: w[..., ::2]) if t.dim() else t
    ),
    "transposed": lambda t: (
        _embedded(t.mT, t.mT.shape, lambda w: w).mT if t.dim() > 1 else t.clone()
    ),
}


def arrange(
    inputs: Inputs, dtype: torch.dtype | None, layout: str = "contiguous", device: str = "cpu"
) -> Inputs:
    """Floating-point tensors in `dtype` (None: as they are), every tensor as and where asked."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        return LAYOUTS[layout](value.to(device))

    return {name: convert(value) for name, value in inputs.items()}


# ---- running a case ----------------------------------------------------------------------------


def flatten(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flatten(part)]


def run(
    case: Case, inputs: Inputs, *, grad: bool = True, call: Callable[..., Any] | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a case, for a fixed pseudo-random upstream gradient.

    `call` takes the place of the case's public function.
    """
    inputs = dict(inputs)
    for name in case.grads if grad else ():
        inputs[name] = inputs[name].detach().requires_grad_()
    outputs = flatten((call or getattr(ppo_kernels, case.function))(**inputs))
    live = [t for t in outputs if t.requires_grad]
    if not live or not grad:
        return [t.detach() for t in outputs], {}
    generator = torch.Generator().manual_seed(1)
    upstream = [
        (torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5).to(t) for t in live
    ]
    grads = torch.autograd.grad(live, [inputs[n] for n in case.grads], upstream)
    return [t.detach() for t in outputs], dict(zip(case.grads, grads, strict=True))


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at |x|, as float64."""
    info = torch.finfo(dtype)
    exponent = x.abs().double().clamp(min=info.smallest_normal).log2().floor()
    return torch.exp2(exponent) * info.eps


def allowed_error(exact: Tensor, torch32: Tensor, scale: Tensor | float | None) -> Tensor:
    """See the module's docstring; infinite and NaN results must agree exactly instead."""
    finite = exact.isfinite() & torch32.isfinite()
    error = torch.where(finite, (torch32.double() - exact).abs(), 0.0)
    if scale is None:
        scale = torch.where(finite, exact.abs(), 0.0).max() if exact.numel() else 0.0
    worst = error.max() if error.numel() else 0.0
    return 2 * worst + 4 * torch.finfo(torch.float32).eps * torch.as_tensor(scale) + exact * 0


def mismatch(got: Tensor, exact: Tensor, allowed: Tensor) -> str | None:
    """What is wrong with `got`, or None. NaN and infinities must agree."""
    got = got.double().to(exact.device)
    same = (got == exact) | (got.isnan() & exact.isnan())
    bad = ~(same | ((got - exact).abs() <= allowed))
    if not bad.any():
        return None
    where = tuple(int(i) for i in bad.nonzero()[0])
    return (
        f"{int(bad.sum())} of {bad.numel()} elements differ, first at {where}: "
        f"got {got[where].item()!r}, exact {exact[where].item()!r}, "
        f"allowed error {allowed[where].item():.3g}"
    )


class Exact(NamedTuple):
    """A tensor of the exact result, and the error allowed in each of its elements."""

    value: Tensor
    allowed: Tensor


class Expected(NamedTuple):
    """What a case must give for inputs of one dtype."""

    dtype: torch.dtype
    outputs: list[Exact]
    grads: dict[str, Exact]


def reference(
    case: Case,
    upcast: Inputs,
    dtype: torch.dtype,
    *,
    grad: bool = True,
    call: Callable[..., Any] | None = None,
) -> Expected:
    """The reference in float64 on inputs of `dtype`, upcast."""
    with use_backend("torch"):
        exact, exact_grads = run(case, upcast, grad=grad, call=call)
        inputs32 = arrange(upcast, torch.float32)
        torch32, torch32_grads = run(case, inputs32, grad=grad, call=call)
    scales = case.scale(upcast)

    def allowed(key: int | str, e: Tensor, t: Tensor) -> Tensor:
        if dtype != torch.float64:
            return allowed_error(e, t, scales.get(key))
        # Here the reference is no better than the kernel: both may be off by some ulps.
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return 8 * ratio * allowed_error(e, e, scales.get(key))

    outputs = [
        Exact(e, allowed(i, e, t)) for i, (e, t) in enumerate(zip(exact, torch32, strict=True))
    ]
    grads = {}
    for name, e in exact_grads.items():
        error, once = allowed(name, e, torch32_grads[name]), e
        if dtype in (torch.bfloat16, torch.float16):
            error, once = error + ulp(e, dtype), e.to(dtype).double()
        grads[name] = Exact(once, error)
    return Expected(dtype, outputs, grads)


def judge(want: Expected, got: Sequence[Tensor], grads: Mapping[str, Tensor]) -> str | None:
    """What is wrong with what `run` gave, or None."""
    for i, (g, exact) in enumerate(zip(got, want.outputs, strict=True)):
        if g.shape != exact.value.shape:
            return f"output {i}: shape {list(g.shape)}, expected {list(exact.value.shape)}"
        if g.dtype not in (torch.float32, torch.float64):
            return f"output {i}: dtype {g.dtype}"
        problem = mismatch(g, *exact)
        if problem:
            return f"output {i}: {problem}"
    if set(grads) != set(want.grads):
        return f"gradients of {sorted(grads)}, expected of {sorted(want.grads)}"
    for name, g in grads.items():
        if g.dtype != want.dtype:
            return f"gradient of {name}: dtype {g.dtype}"
        problem = mismatch(g, *want.grads[name])
        if problem:
            return f"gradient of {name}: {problem}"
    return None


@lru_cache(maxsize=16)  # the executors and layouts of a case and dtype share it
def _expected(case: Case, dtype: torch.dtype, seed: int) -> tuple[Inputs, Expected]:
    inputs = case.inputs(torch.Generator().manual_seed(seed))
    return inputs, reference(case, arrange(arrange(inputs, dtype), torch.float64), dtype)


def check(case: Case, name: str, dtype: torch.dtype, layout: str, seed: int = 0) -> None:
    """Hold one cell of the cube op x executor x dtype x layout to the float64 reference.

    Raises AssertionError naming what differs, or if another kernel than the one asked for ran.
    """
    inputs, want = _expected(case, dtype, seed)
    reset_op_counts()
    with executor(name) as backend:
        got, grads = run(case, arrange(inputs, dtype, layout, device_of(name)))
    ran = op_counts()
    ops = (case.function,) if backend == "torch" else case.forward + case.backward
    assert set(ran) == {(op, backend) for op in ops}, f"asked for {ops}, ran {ran}"
    problem = judge(want, got, grads)
    assert problem is None, problem


# ---- cases -------------------------------------------------------------------------------------


def _uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def _normal(g: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64) * std


def _mask(g: torch.Generator, *shape: int) -> Tensor:
    return _uniform(g, *shape) < 0.7


def _logits(g: torch.Generator, shape: tuple[int, ...], std: float = 3.0, edit: str = "") -> Inputs:
    logits = _normal(g, *shape, std=std)
    tokens = torch.randint(shape[-1], shape[:-1], generator=g)
    index = tokens[..., None]
    if edit == "target wins":
        logits = logits.scatter(-1, index, 40.0)
    elif edit == "target loses":
        logits = logits.scatter(-1, index, -60.0)
    elif edit == "constant":
        logits = torch.full(shape, -7.25, dtype=torch.float64)
    elif edit == "far below 0":
        logits = logits - 9000.0
    elif edit == "forbidden":
        # A whole leading block, scattered others, and one row whose target is forbidden.
        logits[..., : shape[-1] // 2] = -torch.inf
        logits[_uniform(g, *shape) < 0.3] = -torch.inf
        logits = logits.scatter(-1, index, 1.0)
        logits[..., -1] = 0.5
        logits.view(-1, shape[-1])[0, tokens.flatten()[0]] = -torch.inf
    elif edit == "not finite":
        rows = logits.view(-1, shape[-1])
        rows[0] = -torch.inf
        rows[1, 3], rows[2, -1], rows[3] = torch.inf, torch.nan, torch.nan
        rows[4, int(tokens.flatten()[4])] = torch.inf
    return {"logits": logits, "tokens": tokens}


def _logprob_scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    logits = inputs["logits"]
    if not logits.numel():
        return {}
    top = logits.where(logits.isfinite(), 0.0).abs().max() * inputs.get("logit_scale", 1.0)
    if "softcap" in inputs:
        top = top.clamp(max=inputs["softcap"])
    temperature = torch.as_tensor(inputs.get("temperature", 1.0), dtype=torch.float64)
    gain = 1 / temperature[temperature.isfinite()].min()
    terms = 2 * top * gain + torch.tensor(float(logits.shape[-1])).log()
    scale: dict[int | str, Tensor | float] = {0: terms, "logits": 2 * gain * (1 + terms / 4)}
    if inputs.get("entropy"):
        scale[1] = terms
        scale["logits"] = 2 * gain * (1 + terms) * (1 + terms / 4)
    return scale


def _logprob_cases() -> Iterator[Case]:
    def case(label: str, shape: tuple[int, ...], edit: str = "", **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            made = _logits(g, shape, edit=edit)
            extra = {k: v(g, made) if callable(v) else v for k, v in more.items()}
            return made | extra

        return Case(
            "logprobs_from_logits",
            label,
            inputs,
            ("logprob_forward",),
            ("logprob_backward",),
            ("logits",),
            _logprob_scale,
        )

    def ignored(g: torch.Generator, made: Inputs) -> Tensor:
        tokens: Tensor = made["tokens"]
        return torch.where(_uniform(g, *tokens.shape) < 0.4, -100, tokens).int()

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        mask = _mask(g, *made["tokens"].shape)
        made["logits"][~mask] = torch.nan
        made["tokens"][~mask] = 10**6
        return mask

    def temperatures(g: torch.Generator, made: Inputs) -> Tensor:
        return _uniform(g, *made["tokens"].shape) + 0.5

    yield case("prime V", (2, 5, 1009))
    yield case("one token", (1,), entropy=True)
    yield case("V=1", (3, 1), entropy=True)
    yield case("V below a vector", (2, 3, 7), entropy=True)
    for v in (4095, 4096, 4097, 9001):
        yield case(f"V={v}", (1, 3, v), entropy=True)
    yield case("packed", (6, 300), entropy=True)
    yield case("four dimensions", (2, 2, 3, 50), entropy=True)
    yield case("temperature", (2, 3, 300), temperature=0.6, entropy=True)
    yield case("temperature per token", (2, 3, 300), temperature=temperatures, entropy=True)
    yield case("softcap", (2, 3, 301), softcap=5.0, entropy=True)
    yield case(
        "all transforms",
        (2, 3, 301),
        softcap=8.0,
        logit_scale=0.3,
        temperature=1.7,
        entropy=True,
    )
    yield case("ignored labels", (3, 6, 33), tokens=ignored, entropy=True)
    yield case("masked NaN", (3, 6, 33), mask=masked, entropy=True)
    yield case(
        "fully masked",
        (2, 3, 33),
        mask=lambda g, made: torch.zeros_like(made["tokens"]),
        entropy=True,
    )
    for edit in (
        "target wins",
        "target loses",
        "constant",
        "far below 0",
        "forbidden",
        "not finite",
    ):
        yield case(edit, (2, 4, 517), edit, entropy=True)
    yield case("no rows", (0, 4, 17), entropy=True)


def _categorical_kl_cases() -> Iterator[Case]:
    def case(label: str, shape: tuple[int, ...], edit: str = "", **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            logits = _normal(g, *shape, std=3.0)
            ref = logits + _normal(g, *shape, std=0.5)
            rows, ref_rows = logits.view(-1, shape[-1]), ref.view(-1, shape[-1])
            if edit == "same winner":
                rows[:, 3], ref_rows[:, 3] = 40.0, 41.0
            elif edit == "other winner":
                rows[:, 3], ref_rows[:, 5] = 40.0, 45.0
            elif edit == "far below 0":
                logits, ref = logits - 9000.0, ref - 7000.0
            elif edit == "forbidden":  # a whole leading block, and tokens that one side forbids
                rows[:, : shape[-1] // 2] = ref_rows[:, : shape[-1] // 2] = -torch.inf
                (ref_rows if more.get("reverse") else rows)[:, ::3] = -torch.inf
            elif edit == "infinite":
                (rows if more.get("reverse") else ref_rows)[::2, ::5] = -torch.inf
            elif edit == "not finite":
                for r in (rows, ref_rows):
                    r[0], r[1, 2], r[2, -1] = -torch.inf, torch.inf, torch.nan
                    rows, ref_rows = ref_rows[3:], rows[3:]
            made: Inputs = {"logits": logits, "ref_logits": ref}
            extra = {k: v(g, made) if callable(v) else v for k, v in more.items()}
            return made | extra

        forward, backward = ("categorical_kl_forward",), ("categorical_kl_backward",)
        scale = _categorical_kl_scale
        return Case("categorical_kl", label, inputs, forward, backward, ("logits",), scale)

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        mask = _mask(g, *made["logits"].shape[:-1])
        made["logits"][~mask], made["ref_logits"][~mask] = torch.nan, torch.inf
        return mask

    for reverse in (False, True):
        word = "reverse " if reverse else ""
        yield case(f"{word}prime V", (2, 5, 1009), reverse=reverse)
        yield case(f"{word}V=1", (3, 1), reverse=reverse)
        yield case(f"{word}one row", (7,), reverse=reverse)
        yield case(f"{word}several blocks", (1, 3, 2100), reverse=reverse)
        yield case(f"{word}four dimensions", (2, 2, 3, 50), reverse=reverse, temperature=0.6)
        yield case(f"{word}masked NaN", (3, 6, 33), reverse=reverse, mask=masked)
        for edit in (
            "same winner",
            "other winner",
            "far below 0",
            "forbidden",
            "infinite",
            "not finite",
        ):
            yield case(f"{word}{edit}", (7, 517), edit, reverse=reverse)
    yield case("no rows", (0, 4, 17))


def _categorical_kl_scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    """Differences of logits, each distribution's against its own maximum, and log V."""
    gain = 1 / inputs.get("temperature", 1.0)
    logits = [inputs[name] for name in ("logits", "ref_logits")]
    if not logits[0].numel():
        return {}
    top = max(float(x.where(x.isfinite(), 0.0).abs().max()) for x in logits)
    terms = 2 * gain * top + torch.tensor(float(logits[0].shape[-1])).log()
    return {0: terms, "logits": 2 * gain * (1 + terms) * (1 + terms / 4)}


def _garbage_under(mask: Tensor, made: Inputs, *names: str) -> Tensor:
    for name in names:
        if made[name].shape == mask.shape:
            made[name][mask == 0] = torch.nan
            made[name].view(-1)[: int((mask.view(-1)[:1] == 0).sum())] = torch.inf
    return mask


def _loss_cases() -> Iterator[Case]:
    def case(function: str, label: str, shape: tuple[int, ...], **more: Any) -> Case:
        live, constant, target = (
            ("logprobs", "old_logprobs", "advantages")
            if function == "clipped_loss"
            else ("values", "old_values", "returns")
        )

        def inputs(g: torch.Generator) -> Inputs:
            first = -_normal(g, *shape).abs()
            made: Inputs = {
                live: first,
                constant: first + _normal(g, *shape, std=0.3),
                target: _normal(g, *shape),
            }
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        def scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
            return _loss_scale(function, inputs, target)

        return Case(function, label, inputs, (function,), ("scale_gradient",), (live,), scale)

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        first, *others = made
        mask = _mask(g, *made[first].shape).double()
        mask[-1:] = 0
        return _garbage_under(mask, made, first, *others)

    def nothing(g: torch.Generator, made: Inputs) -> Tensor:
        return torch.zeros_like(next(iter(made.values())), dtype=torch.int64)

    def offsets(*ends: int) -> Callable[..., Tensor]:
        return lambda g, made: torch.tensor([0, *ends])

    def not_finite(g: torch.Generator, made: Inputs) -> Tensor:
        tensors = list(made.values())
        for i, (tensor, value) in enumerate(
            (t, v) for t in tensors for v in (torch.nan, torch.inf, -torch.inf)
        ):
            tensor[i, 3] = value
        return torch.ones_like(tensors[0])

    for function in ("clipped_loss", "value_loss"):
        yield case(function, "unmasked", (3, 301))
        yield case(function, "one token", (1,))
        yield case(function, "columns of one", (7, 1), mask=masked)
        yield case(function, "several blocks", (3, 5557), mask=masked)
        yield case(
            function,
            "several packed blocks",
            (20000,),
            mask=masked,
            aggregation="seq-mean-token-mean",
            cu_seqlens=offsets(1500, 1500, 9000, 9001, 20000),
        )
        yield case(function, "packed", (1000,), mask=masked, denominator=1234)
        yield case(function, "no rows", (0, 4))
        yield case(function, "no columns", (4, 0), aggregation="seq-mean-token-mean")
        yield case(function, "fully masked", (3, 5), mask=nothing)
        yield case(function, "not finite", (9, 5), mask=not_finite, aggregation="token-sum")
        for aggregation in AGGREGATIONS:
            extra: Inputs = {"aggregation": aggregation, "mask": masked}
            if aggregation == "seq-sum-norm":
                extra["norm_length"] = 77.0
            yield case(function, aggregation, (5, 130), **extra)
            yield case(
                function,
                f"{aggregation} packed",
                (130,),
                cu_seqlens=offsets(40, 40, 41, 129, 130),
                denominator=lambda g, made: torch.tensor(3.5, dtype=torch.float64),
                **extra,
            )
    per_sequence = {"advantages": lambda g, made: _normal(g, 5)}
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        extra = {"aggregation": aggregation, "mask": masked} | per_sequence
        yield case("clipped_loss", f"{aggregation} per sequence", (5, 130), **extra)
        extra["cu_seqlens"] = offsets(40, 40, 41, 129, 130)
        yield case("clipped_loss", f"{aggregation} per packed sequence", (130,), **extra)
    yield case(
        "clipped_loss",
        "all bounds",
        (4, 300),
        mask=masked,
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=1.5,
        log_ratio_clamp=0.55,
    )
    yield case("value_loss", "not clipped", (4, 300), mask=masked, clip=None, old_values=None)
    yield case("value_loss", "huber", (4, 300), mask=masked, huber_delta=0.7)
    yield case("value_loss", "huber, not clipped", (4, 300), huber_delta=0.7, clip=None)


def _loss_scale(function: str, inputs: Inputs, target_name: str) -> dict[int | str, Tensor | float]:
    """Sums of the magnitudes of the terms of the loss and of each entry of the metrics."""
    mask = inputs.get("mask")
    tensors = [t for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point()]
    live, constant = tensors[:2]
    target = inputs[target_name]
    if target.shape != live.shape or live.numel() == 0:
        return {}
    used = torch.ones_like(live, dtype=torch.bool) if mask is None else mask != 0

    def magnitude(x: Tensor) -> float:
        return float(x[used & x.isfinite()].abs().sum())

    if function == "clipped_loss":
        x = live - constant
        r = x.exp()
        loss = magnitude(target * r)
        k3 = magnitude(torch.expm1(x) - x) + magnitude(x * torch.expm1(x))
        sums = [loss, loss, 0, 0, 0, magnitude(x), k3, magnitude(r), magnitude(r * r), 0, 0]
    else:
        error = (live - target).abs() + 0.2
        loss = magnitude(error.square())
        sums = [loss, 0, magnitude(live), magnitude(target), magnitude(error), loss]
        sums.append(magnitude(target.square()))
    return {1: torch.tensor([0, 0, *sums], dtype=torch.float64)}


def _poisoned(g: torch.Generator, *tensors: Tensor) -> Tensor:
    """A mask; what lies under it is NaN or infinite."""
    mask = _mask(g, *tensors[0].shape)
    for t, bad in zip(tensors, (torch.nan, torch.inf, -torch.inf), strict=False):
        t[~mask] = bad
    return mask


def _whiten_scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    """The gradient's terms, upstream / std, cancel where there is next to no variance."""
    live = inputs["x"][inputs.get("mask", torch.ones_like(inputs["x"])) != 0]
    if not live.numel() or not live.isfinite().all():
        return {}
    std = (live.var(correction=0) + inputs.get("eps", 1e-8)).sqrt()
    return {"x": 3 / std}


def _moments_cases() -> Iterator[Case]:
    def case(function: str, label: str, make: Callable[[torch.Generator], Inputs]) -> Case:
        ops = ("whiten_forward", "whiten_backward") if function == "whiten" else (function,)
        scale = _whiten_scale if function == "whiten" else lambda inputs: {}
        return Case(function, label, make, ops[:1], ops[1:], ("x",), scale)

    def plain(shape: tuple[int, ...], **more: Any) -> Callable[[torch.Generator], Inputs]:
        return lambda g: {"x": _normal(g, *shape) + 0.5, **more}

    def masked(shape: tuple[int, ...], **more: Any) -> Callable[[torch.Generator], Inputs]:
        def make(g: torch.Generator) -> Inputs:
            x = _normal(g, *shape) + 0.5
            return {"x": x, "mask": _poisoned(g, x), **more}

        return make

    def live(x: list[float], mask: list[int], **more: Any) -> Callable[[torch.Generator], Inputs]:
        return lambda g: {
            "x": torch.tensor(x, dtype=torch.float64),
            "mask": torch.tensor(mask, dtype=torch.float64),
            **more,
        }

    yield case("whiten", "plain", plain((3, 37)))
    yield case("whiten", "several blocks", masked((5, 1003)))
    yield case("whiten", "scalar", plain(()))
    yield case("whiten", "packed", masked((131,)))
    yield case("whiten", "three dimensions", masked((2, 3, 17)))
    yield case("whiten", "keeps the mean", masked((3, 37), shift_mean=False))
    yield case("whiten", "biased", masked((3, 37), unbiased=False, eps=1e-3))
    yield case("whiten", "mean above spread", lambda g: {"x": _normal(g, 4, 300) + 300.0})
    yield case("whiten", "constant", lambda g: {"x": _normal(g, 1, 1).expand(3, 37).clone()})
    yield case("whiten", "one live", live([3.0, 7.0, 1.0], [0, 1, 0], shift_mean=False))
    yield case("whiten", "fully masked", live([torch.nan, 7.0, 1.0], [0, 0, 0]))
    yield case("whiten", "not finite", live([1.0, torch.inf, 2.0, 3.0], [1, 1, 0, 1]))
    yield case("whiten", "empty", plain((0, 5)))
    for function in ("masked_sum", "masked_mean"):
        yield case(function, "plain", plain((3, 37)))
        yield case(function, "several blocks", masked((5, 1003)))
        yield case(function, "scalar", plain(()))
        yield case(function, "rows", masked((5, 41), dim=1))
        yield case(function, "columns", masked((5, 41), dim=0))
        yield case(function, "few columns", masked((41, 5), dim=-2))
        yield case(function, "middle of three", masked((4, 7, 19), dim=1))
        yield case(function, "long rows", masked((2, 5000), dim=-1))
        yield case(function, "fully masked", live([torch.nan, 7.0], [0, 0]))
        yield case(function, "not finite", live([torch.inf, 7.0, torch.nan], [1, 1, 0]))
        yield case(function, "nothing to sum", plain((3, 0), dim=1))


def _kl_cases() -> Iterator[Case]:
    def logprobs(g: torch.Generator, shape: tuple[int, ...], std: float) -> Inputs:
        policy = -2 * _normal(g, *shape).abs()
        return {"logprobs": policy, "ref_logprobs": policy + _normal(g, *shape, std=std)}

    def case(
        label: str, shape: tuple[int, ...], std: float = 1.0, masked: bool = False, **more: Any
    ) -> Case:
        def make(g: torch.Generator) -> Inputs:
            made = logprobs(g, shape, std)
            if masked:
                made["mask"] = _poisoned(g, *made.values())
            return made | more

        backward = () if more.get("gradient") == "none" else ("kl_backward",)
        return Case(
            "kl_penalty",
            label,
            make,
            ("kl_forward",),
            backward,
            ("logprobs",) if backward else (),
        )

    def shaped(
        label: str, shape: tuple[int, ...], offsets: list[int] | None = None, **more: Any
    ) -> Case:
        def make(g: torch.Generator) -> Inputs:
            made = logprobs(g, shape, 0.5)
            extra = {k: v(g, made) if callable(v) else v for k, v in more.items()}
            if offsets is not None:
                extra["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
            sequences = shape[0] if offsets is None else len(offsets) - 1
            return {"scores": _normal(g, sequences), **made, "kl_coef": 0.3, **extra}

        return Case(
            "shape_rewards",
            label,
            make,
            ("shape_rewards",),
            ("kl_backward",),
            ("scores", "logprobs"),
        )

    def poisoned(g: torch.Generator, made: Inputs) -> Tensor:
        return _poisoned(g, *made.values())

    def nothing(g: torch.Generator, made: Inputs) -> Tensor:
        return torch.zeros_like(made["logprobs"], dtype=torch.int64)

    for estimator in ("k1", "k2", "k3", "abs"):
        yield case(estimator, (3, 37), masked=True, estimator=estimator)
        yield case(f"{estimator} clamped", (131,), 3.0, estimator=estimator, log_ratio_clamp=2.5)
        yield shaped(estimator, (4, 37), mask=poisoned, estimator=estimator, log_ratio_clamp=1.0)
    yield case("several blocks", (5, 1003), masked=True, estimator="k3")
    yield case("near 0", (3, 37), 1e-3, estimator="k3")
    yield case("far from 0", (3, 37), 30.0, estimator="k3", log_ratio_clamp=80.0)
    yield case("k3 with the gradient of k2", (3, 37), estimator="k3", gradient="k2")
    yield case("k1 with the gradient of k3", (3, 37), estimator="k1", gradient="k3")
    yield case("no gradient", (3, 37), masked=True, gradient="none")
    yield case("four dimensions", (2, 1, 3, 5), masked=True, estimator="k3")
    yield case("empty", (0, 5))
    yield shaped("no mask", (3, 7))
    yield shaped("several blocks", (3, 2100), mask=poisoned, estimator="k3")
    yield shaped("packed", (60,), [0, 10, 10, 31, 60, 60], mask=poisoned)
    yield shaped("packed without mask", (9,), [0, 0, 4, 9])
    yield shaped("fully masked", (3, 7), mask=nothing)
    yield shaped("coefficient in a tensor", (3, 7), kl_coef=torch.tensor(0.25).double())
    yield shaped("no tokens", (3, 0))


def _scan_cases() -> Iterator[Case]:
    def case(label: str, shape: tuple[int, ...], *, longer: bool = False, **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            values = (*shape[:-1], shape[-1] + longer)
            made: Inputs = {"rewards": _normal(g, *shape), "values": _normal(g, *values)}
            made |= {"gamma": 0.97, "lam": 0.9}
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        grads = ("rewards", "values") + (("next_values",) if "next_values" in more else ())
        ops = ("gae_forward",), ("gae_backward",)
        return Case("gae", label, inputs, *ops, grads)

    def sums(label: str, shape: tuple[int, ...], **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            made: Inputs = {"rewards": _normal(g, *shape), "gamma": 0.97}
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        grads = ("rewards",) + (("bootstrap",) if "bootstrap" in more else ())
        ops = ("returns_forward",), ("returns_backward",)
        return Case("discounted_returns", label, inputs, *ops, grads)

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        mask = _mask(g, *made["rewards"].shape)
        made["rewards"][~mask] = torch.nan
        if "values" in made:
            made["values"][..., : mask.shape[-1]][~mask] = torch.nan
        return mask

    def sometimes(g: torch.Generator, made: Inputs) -> Tensor:
        return _uniform(g, *made["rewards"].shape) < 0.2

    def per_step(g: torch.Generator, made: Inputs) -> Tensor:
        return _normal(g, *made["rewards"].shape)

    def per_row(g: torch.Generator, made: Inputs) -> Tensor:
        return _uniform(g, made["rewards"].shape[0])

    offsets = torch.tensor([0, 5, 5, 6, 20, 33])
    yield case("padded", (3, 17))
    yield case("bootstrapped", (3, 17), longer=True)
    yield case("one step", (2, 1), longer=True)
    yield case("no discount", (2, 40), longer=True, gamma=1.0, lam=1.0)
    yield case("gamma 0", (2, 9), longer=True, gamma=0.0)
    yield case("lambda 0", (2, 9), longer=True, lam=0.0)
    yield case("lambda per row", (3, 17), longer=True, lam=per_row, value_lam=1.0)
    yield case(
        "flags",
        (3, 30),
        longer=True,
        terminated=sometimes,
        truncated=sometimes,
        next_values=per_step,
        value_lam=0.5,
    )
    for convention in ("carry", "zero", "truncate"):
        yield case(
            f"masked {convention}",
            (3, 30),
            longer=True,
            mask=masked,
            mask_convention=convention,
            terminated=sometimes,
        )
        yield case(
            f"packed {convention}",
            (33,),
            cu_seqlens=offsets.int(),
            mask=masked,
            mask_convention=convention,
            truncated=sometimes,
            next_values=per_step,
        )
    yield case("packed", (33,), cu_seqlens=offsets, lam=lambda g, made: _uniform(g, 5))
    yield case(
        "fully masked",
        (2, 9),
        mask=lambda g, made: torch.zeros(2, 9),
        mask_convention="carry",
    )
    yield case("no rows", (0, 4), longer=True)
    yield case("no steps", (3, 0), longer=True)
    yield sums("padded", (3, 17), bootstrap=lambda g, made: _normal(g, 3))
    yield sums("terminated", (3, 17), terminated=sometimes)
    yield sums("masked", (3, 30), mask=masked, mask_convention="zero")
    yield sums("packed", (33,), cu_seqlens=offsets, bootstrap=lambda g, made: _normal(g, 5))


CASES: list[Case] = [
    *_logprob_cases(),
    *_categorical_kl_cases(),
    *_loss_cases(),
    *_scan_cases(),
    *_moments_cases(),
    *_kl_cases(),
]
