"""Compile what the public functions launch, for GPUs that are not here, and judge the result.

    python python_tests/compile_ladder.py            # every launch; exit 1 if something is wrong
    python python_tests/compile_ladder.py --quick    # the representative ones, as in `make test`
    python python_tests/compile_ladder.py --record   # every launch; write triton_resources/*.json

The public functions are called with meta tensors, which the ops hand to their Triton kernels as
they do CUDA tensors; a driver that only knows a target's name makes Triton compile every launch and
run none. This changes the process for good, so tests start another one.

Recorded per kernel and target: registers, bytes of local memory (spills), shared memory, 128-bit
loads and stores; and the sources they belong to. Adding a family: its launches, below, and
``--record``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import ppo_kernels as pk
from ppo_kernels import _op
from ppo_kernels import triton as backend
from ppo_kernels._kept import Sets
from ppo_kernels.triton import _launch, logprob_kept

RECORDS = Path(__file__).parent / "triton_resources"
SOURCES = Path(backend.__file__).parent
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Target(NamedTuple):
    gpu: GPUTarget
    shared_limit: int  # bytes one program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10),
}


class Launch(NamedTuple):
    """One call of a public function, forward and backward.

    `wide`: every kernel that works on blocks must have 128-bit loads.
    """

    family: str
    label: str
    call: Callable[[], None]
    quick: bool = False
    wide: bool = False


# ---- what is launched ----------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def backward(*outputs: torch.Tensor) -> None:
    """With a gradient of its own for each output, as a loss gives."""
    torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])


def _logprob() -> Iterator[Launch]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

    def launch(
        dtype: torch.dtype, vocab: int, rows: int, layout: str = "", everything: bool = False
    ) -> Launch:
        def call() -> None:
            logits = meta(8, rows // 8 + (layout == "shifted"), vocab, dtype=dtype, grad=True)
            if layout == "shifted":
                logits = logits[:, :-1]
            elif layout == "strided":
                logits = meta(8, rows // 8, 2 * vocab, dtype=dtype, grad=True)[..., ::2]
            elif layout == "transposed":
                logits = meta(8, vocab, rows // 8, dtype=dtype, grad=True).mT
            tokens = meta(8, rows // 8, dtype=torch.int32 if everything else torch.int64)
            if not everything:
                return backward(pk.logprobs_from_logits(logits, tokens, backend="triton"))
            return backward(
                *pk.logprobs_from_logits(
                    logits,
                    tokens,
                    temperature=meta(8, 1),
                    softcap=30.0,
                    mask=meta(8, rows // 8, dtype=torch.bool),
                    entropy=True,
                    backend="triton",
                )
            )

        words = [str(dtype).removeprefix("torch."), f"V={vocab}", f"rows={rows}", layout]
        label = " ".join(filter(None, [*words, "everything" * everything]))
        quick = (dtype, vocab) in ((dtypes[0], 151936), (dtypes[2], 1000)) and not layout
        # 8 numbers of 2 bytes for each of 64 lanes: blocks of small vocabularies are too few.
        wide = vocab == 151936 and not layout
        return Launch("logprob", label, call, quick, wide)

    for dtype in dtypes:
        for vocab in (200, 1000, 50257, 151936):
            for everything in (False, True):
                yield launch(dtype, vocab, 8192, everything=everything)
        yield launch(dtype, 151936, 8)
        yield launch(dtype, 151936, 8, everything=True)
    for layout in ("shifted", "strided", "transposed"):
        yield launch(torch.bfloat16, 32000, 8192, layout)


def _kept() -> Iterator[Launch]:
    positions, count = 8192, 400_000
    ids = meta(count, dtype=torch.int32)

    def from_logits(dtype: torch.dtype, everything: bool) -> None:
        logits = meta(8, positions // 8, 50257, dtype=dtype, grad=True)
        tokens = meta(8, positions // 8, dtype=torch.int64)
        kept = pk.KeptSet(meta(positions + 1, dtype=torch.int64), ids)
        if not everything:
            return backward(pk.logprobs_from_logits(logits, tokens, kept=kept, backend="triton"))
        return backward(
            *pk.logprobs_from_logits(
                logits,
                tokens,
                kept=kept,
                temperature=meta(8, 1),
                softcap=30.0,
                mask=meta(8, positions // 8, dtype=torch.bool),
                entropy=True,
                backend="triton",
            )
        )

    def from_values(dtype: torch.dtype) -> None:
        """What a part of the hidden states asks for."""
        logits, values = meta(256, 50257, dtype=dtype), meta(count, dtype=dtype)
        tokens = meta(256, dtype=torch.int64)
        sets = Sets(*(meta(256, dtype=torch.int64) for _ in range(2)), ids)
        settings = (1.0, 0.0, 1.0, -100)
        logprobs, entropy, state = logprob_kept.forward_sets(
            logits, tokens, None, None, sets, *settings, True, values
        )
        logprob_kept.backward_sets(
            logits, logprobs, entropy, None, values, tokens, None, None, sets, logprobs, state,
            *settings,
        )  # fmt: skip

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for everything in (False, True):
            label = f"kept {name}{' everything' * everything}"
            quick = (dtype, everything) == (torch.bfloat16, True)
            yield Launch("logprob", label, partial(from_logits, dtype, everything), quick)
    for dtype in (torch.float32, torch.float64):
        label = f"kept {str(dtype).removeprefix('torch.')} from hidden states"
        yield Launch("logprob", label, partial(from_values, dtype))


def _moments() -> Iterator[Launch]:
    def launch(
        function: str, dtype: torch.dtype, rows: int, layout: str = "", **more: Any
    ) -> Launch:
        def call() -> None:
            x = meta(rows, 1024 + (layout == "shifted"), dtype=dtype, grad=True)
            mask = meta(rows, 1024, dtype=more.get("mask", torch.bool))
            if layout == "shifted":
                x = x[:, :-1]
            options = {key: value for key, value in more.items() if key != "mask"}
            backward(getattr(pk, function)(x, mask, **options, backend="triton"))

        words = [function, str(dtype).removeprefix("torch."), f"rows={rows}", layout]
        words += [f"{key}={value}".replace("torch.", "") for key, value in more.items()]
        quick = (dtype, function, layout) == (torch.float32, "whiten", "") and not more
        return Launch("moments", " ".join(filter(None, words)), call, quick and rows > 1)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        yield launch("whiten", dtype, 64)
        for dim in (0, 1, None):
            yield launch("masked_mean", dtype, 64, dim=dim)
    for function in ("whiten", "masked_sum"):
        yield launch(function, torch.float32, 64, "shifted")
        yield launch(function, torch.float32, 64, mask=torch.bfloat16)
    yield launch("whiten", torch.float32, 1)
    yield launch("whiten", torch.float32, 64, shift_mean=False, unbiased=False)
    yield launch("masked_mean", torch.float32, 8192, dim=0)


def _categorical_kl() -> Iterator[Launch]:
    def launch(
        dtype: torch.dtype,
        vocab: int,
        reverse: bool = False,
        layout: str = "",
        mask: bool = False,
        rows: int = 1024,
    ) -> Launch:
        def call() -> None:
            logits = meta(8, rows // 8 + 1, vocab, dtype=dtype)[:, :-1]
            if layout != "shifted":
                logits = meta(8, rows // 8, vocab, dtype=dtype)
            live = meta(8, rows // 8, dtype=torch.bool) if mask else None
            leaf = logits.detach().requires_grad_()
            backward(
                pk.categorical_kl(
                    leaf, torch.empty_like(logits), reverse=reverse, mask=live, backend="triton"
                )
            )

        words = [str(dtype).removeprefix("torch."), f"V={vocab}", f"rows={rows}", layout]
        words += ["reverse" * reverse, "masked" * mask]
        quick = (dtype, vocab, reverse) == (torch.bfloat16, 151936, True)
        # Two rows of 8 halves for each of 256 lanes would take too many registers elsewhere.
        wide = vocab == 151936 and not layout and dtype.itemsize > 2
        return Launch("categorical_kl", " ".join(filter(None, words)), call, quick, wide)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for vocab in (200, 50257, 151936):
            for reverse in (False, True):
                yield launch(dtype, vocab, reverse)
        yield launch(dtype, 151936, rows=8)
    yield launch(torch.bfloat16, 151936, True, rows=8)
    yield launch(torch.bfloat16, 151936, False, "", True, rows=8)
    yield launch(torch.bfloat16, 32000, False, "shifted", True)


def _tokens_of(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> Callable[[], torch.Tensor]:
    """Makes token tensors of one layout."""
    if layout == "shifted":
        return lambda: meta(shape[0], shape[1] + 1, dtype=dtype)[:, :-1]
    return lambda: meta(*shape, dtype=dtype)


def _losses() -> Iterator[Launch]:
    def launch(
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        label: str = "",
        *,
        quick: bool = False,
        per_sequence: bool = False,
        **more: Any,
    ) -> Launch:
        def call() -> None:
            make = _tokens_of(shape, dtype, label)
            inputs = [make().requires_grad_(), make(), make()]
            options = dict(more)
            if len(shape) == 1:
                options["cu_seqlens"] = meta(65, dtype=torch.int32)
            if per_sequence:
                inputs[2] = meta(64 if len(shape) == 1 else shape[0], dtype=dtype)
            if options.pop("masked", False):
                options["mask"] = meta(*shape, dtype=torch.bool)
            if options.pop("denominator_on_device", False):
                options["denominator"] = meta(dtype=torch.int64)
            if options.pop("no_gradient", False):
                inputs[0] = inputs[0].detach()
            loss = getattr(pk, name)(*inputs, backend="triton", **options).loss
            if loss.requires_grad:
                backward(loss)

        words = [name, str(dtype).removeprefix("torch."), f"{list(shape)}", label]
        return Launch("losses", " ".join(filter(None, words)), call, quick)

    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for name in ("clipped_loss", "value_loss"):
        by_sequence = {"aggregation": "seq-mean-token-mean", "masked": True}
        for dtype in (half, torch.float16, single, double):
            quick = dtype == half and name == "clipped_loss"
            yield launch(name, dtype, (8, 1024), masked=True, quick=quick)
            yield launch(name, dtype, (65536,), **by_sequence)
        yield launch(name, single, (8, 1001), "odd", masked=True)
        yield launch(name, single, (1, 1), "one token")
        yield launch(name, single, (8, 1024), "shifted", **by_sequence)
        yield launch(
            name, single, (8, 1024), "no gradient", no_gradient=True, denominator_on_device=True
        )
    for shape in ((8, 1024), (65536,)):
        yield launch("clipped_loss", half, shape, "advantage per sequence", per_sequence=True)
    for variant in ("cispo", "sapo", "gpg", "gspo", "gmpo"):
        for dtype in (half, double):
            yield launch("clipped_loss", dtype, (8, 1024), variant, masked=True, variant=variant)
        yield launch("clipped_loss", single, (65536,), variant, masked=True, variant=variant)


def _kl() -> Iterator[Launch]:
    def launch(
        estimator: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        label: str = "",
        quick: bool = False,
        masked: bool = True,
    ) -> Launch:
        def call() -> None:
            make = _tokens_of(shape, dtype, label)
            logprobs, ref = make().requires_grad_(), make()
            mask = meta(*shape, dtype=torch.bool) if masked else None
            backward(pk.kl_penalty(logprobs, ref, mask, estimator=estimator, backend="triton"))
            packed = len(shape) == 1
            pk.shape_rewards(
                meta(64 if packed else shape[0], dtype=dtype),
                logprobs,
                ref,
                mask,
                kl_coef=meta() if packed else 0.1,
                estimator=estimator,
                cu_seqlens=meta(65, dtype=torch.int32) if packed else None,
                backend="triton",
            )

        words = [estimator, str(dtype).removeprefix("torch."), f"{list(shape)}", label]
        return Launch("kl", " ".join(filter(None, words)), call, quick)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for estimator in ("k1", "k2", "k3", "abs"):
            quick = (estimator, dtype) == ("k3", torch.bfloat16)
            yield launch(estimator, dtype, (8, 1024), quick=quick)
        yield launch("k3", dtype, (65536,))
    yield launch("k3", torch.float32, (8, 1024), "shifted")
    yield launch("k3", torch.float32, (1, 1), "one token")
    yield launch("k3", torch.float32, (8, 1001), "odd", masked=False)


def _scan() -> Iterator[Launch]:
    def plain(dtype: torch.dtype, rows: int, length: int) -> None:
        rewards, values = (meta(rows, length, dtype=dtype, grad=True) for _ in range(2))
        backward(*pk.gae(rewards, values, gamma=0.99, lam=0.95, backend="triton"))

    def returns(dtype: torch.dtype, total: int) -> None:
        rewards = meta(total, dtype=dtype, grad=True)
        offsets = meta(65, dtype=torch.int32)
        backward(
            pk.discounted_returns(rewards, gamma=0.99, cu_seqlens=offsets, backend="triton"),
        )

    def everything(dtype: torch.dtype, convention: str, packed: bool) -> None:
        shape, sequences = ((2**18,), 64) if packed else ((64, 4096), 64)
        extra = {"cu_seqlens": meta(sequences + 1, dtype=torch.int64)} if packed else {}
        longer = shape if packed else (64, 4097)
        tensors = [meta(*s, dtype=dtype, grad=True) for s in (shape, longer, shape)]
        backward(
            *pk.gae(
                tensors[0],
                tensors[1],
                next_values=tensors[2],
                gamma=0.99,
                lam=meta(sequences),
                value_lam=meta(sequences),
                mask=meta(*shape, dtype=torch.bool),
                mask_convention=convention,
                terminated=meta(*shape, dtype=torch.bool),
                truncated=meta(*shape, dtype=torch.bool),
                backend="triton",
                **extra,
            )
        )

    def vtrace(dtype: torch.dtype, convention: str | None, packed: bool) -> None:
        shape, sequences = ((2**18,), 64) if packed else ((64, 4096), 64)
        numbers = [meta(*shape, dtype=dtype) for _ in range(5)]
        extra: dict[str, Any] = {}
        if packed:
            extra |= {"cu_seqlens": meta(sequences + 1, dtype=torch.int64)}
        else:
            numbers[3] = meta(64, 4097, dtype=dtype)
        if convention:
            extra |= {"mask": meta(*shape, dtype=torch.bool), "mask_convention": convention}
            extra |= {k: meta(*shape, dtype=torch.bool) for k in ("terminated", "truncated")}
            extra |= {"next_values": numbers[4], "lam": meta(sequences)}
        pk.vtrace(*numbers[:4], gamma=0.99, backend="triton", **extra)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        yield Launch("scan", f"{name} [64, 4096]", partial(plain, dtype, 64, 4096))
        for convention, packed in (("carry", True), ("truncate", False)):
            label = f"{name} {'packed' if packed else 'padded'} {convention} everything"
            call = partial(everything, dtype, convention, packed)
            yield Launch("scan", label, call, dtype == torch.float32)
        for convention, packed in ((None, False), ("carry", True), ("truncate", False)):
            label = f"vtrace {name} {'packed' if packed else 'padded'} {convention or 'plain'}"
            call = partial(vtrace, dtype, convention, packed)
            yield Launch("scan", label, call, (dtype, packed) == (torch.float32, True))
    yield Launch("scan", "float32 packed returns", partial(returns, torch.float32, 2**16))
    yield Launch("scan", "float32 [1, 2^24]", partial(plain, torch.float32, 1, 2**24))


def _ppo_loss() -> Iterator[Launch]:
    def launch(dtype: torch.dtype, vocab: int, quick: bool = False, **options: Any) -> Launch:
        def call() -> None:
            logits = meta(8, 1024, vocab, dtype=dtype, grad=True)
            tokens = meta(8, 1024, dtype=torch.int64)
            given = dict(options)
            if "kl_coef" in given:
                given["ref_logprobs"] = meta(8, 1024)
                given["loss_scale"] = meta()
            out = pk.ppo_loss_from_logits(
                logits, tokens, meta(8, 1024), meta(8), backend="triton", **given
            )
            backward(out.loss)

        words = [str(dtype).removeprefix("torch."), f"V={vocab}", *map(str, options.values())]
        return Launch("ppo_loss", " ".join(words), call, quick)

    half, single, double = torch.bfloat16, torch.float32, torch.float64
    everything = {"entropy_coef": 0.01, "kl_coef": 0.1, "kl_gradient": "k2", "softcap": 30.0}
    yield launch(half, 151936, quick=True)
    for dtype in (half, single, double):
        for vocab in (200, 151936):
            yield launch(dtype, vocab, **everything)
    yield launch(single, 50257, variant="cispo")
    yield launch(single, 50257, variant="sapo", kl_coef=0.1)
    yield launch(half, 50257, variant="gpg", entropy_coef=0.01)


LAUNCHES: list[Launch] = [
    *_logprob(),
    *_kept(),
    *_moments(),
    *_categorical_kl(),
    *_losses(),
    *_kl(),
    *_scan(),
    *_ppo_loss(),
]


# ---- compiling -----------------------------------------------------------------------------------


class _Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class Compiled(NamedTuple):
    name: str
    kernel: Any  # triton.compiler.CompiledKernel
    constants: dict[str, Any]


_compiled: list[Compiled] = []


def serve_meta_tensors() -> None:
    """Let the `triton` backend serve meta tensors, and compile launches instead of running them."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        _compiled.append(Compiled(self.__name__, kernel, kwargs))
        return kernel

    JITFunction.run = compile_only
    _op.BACKENDS["triton"] = _op.Backend(("cuda", "meta"), None)
    library = torch.library.Library("ppo_kernels", "IMPL")
    for op in _op.OPS.values():
        library.impl(op.name, op._run, "Meta", allow_override=True)
    serve_meta_tensors.library = library  # type: ignore[attr-defined]  # it acts while it lives


def compile_launch(launch: Launch, target: str) -> list[Compiled]:
    """The kernels of one launch, in order, for one target."""
    driver.set_active(_Driver(TARGETS[target].gpu))
    _launch.NVIDIA = TARGETS[target].gpu.backend == "cuda"
    _compiled.clear()
    launch.call()
    return list(_compiled)


# ---- measuring -----------------------------------------------------------------------------------


def _nvidia(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    wide = re.compile(r"\b(ld|st)\.global\S*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)")
    ways = [match[1] for match in wide.finditer(kernel.asm["ptx"])]
    return {
        "registers": found["REG"],
        "local": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "wide_loads": ways.count("ld"),
        "wide_stores": ways.count("st"),
    }


def _amd(kernel: Any) -> dict[str, int]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    def wide(kind: str) -> int:
        return len(re.findall(rf"(?:global|buffer)_{kind}_dwordx4", text))

    return {
        "registers": field("vgpr_count"),
        "local": field("private_segment_fixed_size"),
        "shared": kernel.metadata.shared,
        "wide_loads": wide("load"),
        "wide_stores": wide("store"),
    }


def measure(launches: list[Launch]) -> dict[str, dict[str, dict[str, int]]]:
    """Resources by family and ``launch | kernel | target``, over all targets."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for launch in launches:
        for target in TARGETS:
            for name, kernel, constants in compile_launch(launch, target):
                use = _amd(kernel) if "amdgcn" in kernel.asm else _nvidia(kernel)
                key = f"{launch.label} | {name} | {target}"
                if launch.wide and "BLOCK" in constants and use["wide_loads"] == 0:
                    use["missing_wide_loads"] = 1
                kernels = found.setdefault(launch.family, {})
                kernels[key] = _worse(kernels[key], use) if key in kernels else use
    return found


def _worse(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Of a kernel that one call launches twice, with other arguments."""
    return {
        name: (min if name.startswith("wide") else max)(a.get(name, 0), b.get(name, 0))
        for name in a | b
    }


def problems(found: dict[str, dict[str, int]], recorded: dict[str, dict[str, int]]) -> list[str]:
    """What is wrong with measured resources: absolutely, and compared with a record (or {})."""
    wrong = []
    for key, use in found.items():
        limit = TARGETS[key.rpartition(" | ")[2]].shared_limit
        if use["local"]:
            wrong.append(f"{key}: spills, {use['local']} bytes of local memory")
        if use["shared"] > limit:
            wrong.append(f"{key}: {use['shared']} bytes of shared memory, the limit is {limit}")
        if "missing_wide_loads" in use:
            wrong.append(f"{key}: no 128-bit loads")
        before = recorded.get(key, use)
        for name in ("registers", "shared"):
            if use[name] > before[name]:
                wrong.append(f"{key}: {name} {use[name]}, recorded {before[name]}")
        for name in ("wide_loads", "wide_stores"):
            if (use[name] > 0) < (before[name] > 0):
                wrong.append(f"{key}: {name} {use[name]}, recorded {before[name]}")
    return wrong


# ---- records -------------------------------------------------------------------------------------


# Families whose kernels are launched with another's, or made of its functions.
USED = {"ppo_loss": ("kl", "logprob", "losses", "moments")}


def sources(family: str) -> dict[str, str]:
    """Hashes of what a family's kernels are made of: modules of its own and shared ones."""
    names = ("_[!_]", family, *USED.get(family, ()))
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name in names
        for path in sorted(SOURCES.glob(f"{name}*.py"))
    }


def record(family: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{family}.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the representative launches")
    parser.add_argument("--record", action="store_true", help="write triton_resources/*.json")
    parser.add_argument("--family", help="only this family")
    arguments = parser.parse_args()
    chosen = [
        launch
        for launch in LAUNCHES
        if arguments.family in (None, launch.family) and (launch.quick or not arguments.quick)
    ]
    serve_meta_tensors()
    wrong: list[str] = []
    count = 0
    for family, found in measure(chosen).items():
        count += len(found)
        if arguments.record:
            wrong += problems(found, {})
            RECORDS.mkdir(exist_ok=True)
            content = {
                "triton": triton.__version__,
                "sources": sources(family),
                "kernels": {key: found[key] for key in sorted(found)},
            }
            text = json.dumps(content, indent=1)
            # One kernel a line.
            text = re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", _one_line, text)
            (RECORDS / f"{family}.json").write_text(text + "\n")
        else:
            recorded = record(family)
            same = recorded["triton"] == triton.__version__
            wrong += problems(found, recorded["kernels"] if same else {})
    print("\n".join(wrong), file=sys.stderr)
    print(f"{count} kernels compiled, {len(wrong)} problems")
    return 1 if wrong else 0


def _one_line(match: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", match[1]) + "}"


if __name__ == "__main__":
    sys.exit(main())
