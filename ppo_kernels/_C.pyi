"""The compiled module (csrc/bindings.cpp); arguments are the fields in csrc/kernels.h."""

from typing import TypeAlias

# data_ptr, dtype code (enum DType), element strides; None: the tensor is not given.
View: TypeAlias = tuple[int, ...] | None
# kind (enum FaultKind) and flat position of the first live position whose data is bad.
Fault: TypeAlias = tuple[int, int] | None
# The fields of ScanSetting, in order.
ScanSetting: TypeAlias = tuple[View | int | float, ...]

version: str
compiler: str
openmp: bool
cuda_off: str

def isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def advise_huge_pages(begin: int, bytes: int, /) -> None: ...
def logprob_forward(
    logits: View,
    tokens: View,
    mask: View,
    temperatures: View,
    rows: int,
    cols: int,
    vocab: int,
    ignore_index: int,
    temperature: float,
    softcap: float,
    logit_scale: float,
    logprobs: View,
    entropy: View,
    state: View,
    threads: int,
    /,
) -> Fault: ...
def logprob_backward(
    grad_logprobs: View,
    grad_entropy: View,
    logits: View,
    tokens: View,
    mask: View,
    temperatures: View,
    logprobs: View,
    state: View,
    rows: int,
    cols: int,
    vocab: int,
    ignore_index: int,
    temperature: float,
    softcap: float,
    logit_scale: float,
    grad_logits: View,
    threads: int,
    /,
) -> Fault: ...
def scan_forward(
    rewards: View,
    values: View,
    next_values: View,
    bootstrap: View,
    setting: ScanSetting,
    advantages: View,
    returns: View,
    threads: int,
    /,
) -> Fault: ...
def scan_backward(
    grad_advantages: View,
    grad_returns: View,
    setting: ScanSetting,
    grad_rewards: View,
    grad_values: View,
    grad_next_values: View,
    grad_bootstrap: View,
    threads: int,
    /,
) -> Fault: ...
def vtrace(
    logprobs: View,
    rollout_logprobs: View,
    rho_clip: float,
    c_clip: float,
    pg_rho_clip: float,
    rewards: View,
    values: View,
    next_values: View,
    bootstrap: View,
    setting: ScanSetting,
    advantages: View,
    returns: View,
    threads: int,
    /,
) -> Fault: ...
def clipped_loss(
    logprobs: View,
    old_logprobs: View,
    advantages: View,
    advantage_per_sequence: bool,
    variant: int,
    low: float,
    high: float,
    dual: float,
    log_ratio_clamp: float,
    mask: View,
    cu_seqlens: View,
    denominator: View,
    rows: int,
    cols: int,
    sequences: int,
    aggregation: int,
    divisor: float,
    norm_length: float,
    loss: View,
    stats: View,
    gradient: View,
    threads: int,
    /,
) -> Fault: ...
def value_loss(
    values: View,
    old_values: View,
    returns: View,
    clip: float,
    huber_delta: float,
    mask: View,
    cu_seqlens: View,
    denominator: View,
    rows: int,
    cols: int,
    sequences: int,
    aggregation: int,
    divisor: float,
    norm_length: float,
    loss: View,
    stats: View,
    gradient: View,
    threads: int,
    /,
) -> Fault: ...
def scale_gradient(
    gradient: View, upstream: View, count: int, scaled: View, threads: int, /
) -> Fault: ...
def masked_reduce(
    x: View,
    mask: View,
    outer: int,
    reduced: int,
    inner: int,
    all: bool,
    mean: bool,
    out: View,
    count: View,
    threads: int,
    /,
) -> Fault: ...
def moments(
    x: View,
    mask: View,
    rows: int,
    cols: int,
    moments: View,
    threads: int,
    /,
) -> Fault: ...
def whiten(
    x: View,
    mask: View,
    moments: View,
    find_moments: bool,
    rows: int,
    cols: int,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    out: View,
    threads: int,
    /,
) -> Fault: ...
def whiten_backward(
    grad: View,
    x: View,
    mask: View,
    moments: View,
    rows: int,
    cols: int,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    grad_x: View,
    threads: int,
    /,
) -> Fault: ...
def kl_forward(
    logprobs: View,
    ref_logprobs: View,
    mask: View,
    rows: int,
    cols: int,
    estimator: int,
    log_ratio_clamp: float,
    kl: View,
    threads: int,
    /,
) -> Fault: ...
def kl_backward(
    grad_kl: View,
    logprobs: View,
    ref_logprobs: View,
    mask: View,
    rows: int,
    cols: int,
    estimator: int,
    log_ratio_clamp: float,
    grad_logprobs: View,
    threads: int,
    /,
) -> Fault: ...
def categorical_kl_forward(
    first: View,
    second: View,
    mask: View,
    rows: int,
    cols: int,
    vocab: int,
    temperature: float,
    kl: View,
    state: View,
    threads: int,
    /,
) -> Fault: ...
def categorical_kl_backward(
    grad_kl: View,
    first: View,
    second: View,
    mask: View,
    kl: View,
    state: View,
    rows: int,
    cols: int,
    vocab: int,
    of_second: bool,
    temperature: float,
    grad: View,
    threads: int,
    /,
) -> Fault: ...
def shape_rewards(
    scores: View,
    logprobs: View,
    ref_logprobs: View,
    mask: View,
    cu_seqlens: View,
    kl_coefs: View,
    rows: int,
    cols: int,
    sequences: int,
    estimator: int,
    kl_coef: float,
    log_ratio_clamp: float,
    rewards: View,
    kl: View,
    last: View,
    threads: int,
    /,
) -> Fault: ...
