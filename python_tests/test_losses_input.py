"""What clipped_loss and value_loss say about bad input, the same on every executor."""

import pytest
import torch
from device import raises
from loss_oracle import EXECUTORS

import ppo_kernels as pk
from ppo_kernels.testing import executor

X = torch.zeros(2, 3)
N = torch.zeros(4)
POLICY = {"logprobs": X, "old_logprobs": X, "advantages": X}
PACKED = {"logprobs": N, "old_logprobs": N, "advantages": N}
VALUE = {"values": X, "old_values": X, "returns": X}


@pytest.mark.parametrize(
    ("function", "inputs", "error", "message"),
    [
        (pk.clipped_loss, POLICY | {"logprobs": [1.0]}, TypeError, "logprobs: .*tensor, got list"),
        (pk.clipped_loss, POLICY | {"logprobs": X.int()}, TypeError, "logprobs: .*got int32"),
        (
            pk.clipped_loss,
            {k: torch.zeros(2, 3, 4) for k in POLICY},
            ValueError,
            r"logprobs: expected shape \[B, T\] or packed \[N\], got \[2, 3, 4\]",
        ),
        (
            pk.clipped_loss,
            POLICY | {"old_logprobs": X.mT},
            ValueError,
            r"old_logprobs: expected shape \[2, 3\] \(as logprobs\), got \[3, 2\]",
        ),
        (
            pk.clipped_loss,
            POLICY | {"advantages": torch.zeros(3)},
            ValueError,
            r"advantages: expected shape \[2, 3\] \(as logprobs\) or \[2\] \(one per sequence\)",
        ),
        (
            pk.clipped_loss,
            PACKED | {"advantages": torch.zeros(3)},
            ValueError,
            r"advantages: expected shape \[4\] \(as logprobs\), got \[3\]",
        ),
        (
            pk.clipped_loss,
            PACKED | {"advantages": torch.zeros(3), "cu_seqlens": torch.tensor([0, 2, 4])},
            ValueError,
            r"advantages: expected shape \[4\] \(as logprobs\) or \[2\] \(one per sequence\)",
        ),
        (
            pk.clipped_loss,
            POLICY | {"old_logprobs": X.clone().requires_grad_()},
            ValueError,
            r"old_logprobs: .*pass old_logprobs.detach\(\)",
        ),
        (
            pk.clipped_loss,
            POLICY | {"advantages": X.clone().requires_grad_()},
            ValueError,
            r"advantages: .*pass advantages.detach\(\)",
        ),
        (
            pk.clipped_loss,
            POLICY | {"mask": torch.ones(2, 2)},
            ValueError,
            r"mask: expected shape \[2, 3\] \(as logprobs\), got \[2, 2\]",
        ),
        (pk.clipped_loss, POLICY | {"clip_low": -0.1}, ValueError, r"clip_low: .*got -0.1"),
        (pk.clipped_loss, POLICY | {"clip_high": -0.1}, ValueError, r"clip_high: .*got -0.1"),
        (pk.clipped_loss, POLICY | {"clip_low": "a"}, TypeError, "clip_low: .*got str"),
        (pk.clipped_loss, POLICY | {"dual_clip": 1.0}, ValueError, r"dual_clip: .*\(1, .*got 1.0"),
        (pk.clipped_loss, POLICY | {"log_ratio_clamp": 0.0}, ValueError, "log_ratio_clamp: .* 0"),
        (
            pk.clipped_loss,
            POLICY | {"variant": "clop"},
            ValueError,
            "variant: unknown variant 'clop', expected one of clip, cispo, sapo",
        ),
        (
            pk.clipped_loss,
            POLICY | {"variant": "sapo", "dual_clip": 3.0},
            ValueError,
            "dual_clip: expected None, as only clip, gspo, clip-cov use it, got 3.0",
        ),
        *(
            (
                pk.clipped_loss,
                PACKED | {"variant": variant},
                ValueError,
                f"cu_seqlens: .*'{variant}' needs the sequences of packed logprobs, got None",
            )
            for variant in ("gspo", "gmpo")
        ),
        (pk.clipped_loss, POLICY | {"tau_pos": 0.0}, ValueError, r"tau_pos: .*\(0, .*got 0"),
        (pk.clipped_loss, POLICY | {"tau_neg": -1}, ValueError, "tau_neg: .*got -1"),
        *(
            (pk.clipped_loss, POLICY | {"variant": "kl-cov"} | bad, ValueError, message)
            for bad, message in [
                ({"cov_ratio": 0.0}, r"cov_ratio: .*\(0, 1\], got 0"),
                ({"cov_low": 6.0}, r"cov_high: .*\[6.0, .*got 5"),
                ({"kl_coef": -1.0}, "kl_coef: .*got -1"),
            ]
        ),
        (
            pk.clipped_loss,
            POLICY | {"aggregation": "mean"},
            ValueError,
            "aggregation: unknown aggregation 'mean', expected one of token-mean, token-sum, seq-",
        ),
        (
            pk.clipped_loss,
            PACKED | {"aggregation": "seq-mean-token-sum"},
            ValueError,
            "cu_seqlens: .*'seq-mean-token-sum' needs .* got None",
        ),
        (
            pk.clipped_loss,
            POLICY | {"aggregation": "seq-sum-norm"},
            ValueError,
            "norm_length: expected a number",
        ),
        (
            pk.clipped_loss,
            POLICY | {"aggregation": "seq-sum-norm", "norm_length": 0},
            ValueError,
            "norm_length: .*got 0",
        ),
        (pk.clipped_loss, POLICY | {"norm_length": 5}, ValueError, "norm_length: expected None"),
        (pk.clipped_loss, POLICY | {"denominator": -1}, ValueError, "denominator: .*got -1"),
        (pk.clipped_loss, POLICY | {"denominator": "3"}, TypeError, "denominator: .*got str"),
        (
            pk.clipped_loss,
            POLICY | {"denominator": torch.ones(1)},
            ValueError,
            r"denominator: expected shape \[\] \(one number\), got \[1\]",
        ),
        (
            pk.clipped_loss,
            POLICY | {"denominator": torch.tensor(True)},
            TypeError,
            "denominator: .*got bool",
        ),
        (
            pk.clipped_loss,
            POLICY | {"cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            r"cu_seqlens: expected only with packed \[N\] logprobs, got \[2, 3\]",
        ),
        (
            pk.clipped_loss,
            PACKED | {"cu_seqlens": torch.tensor([0.0, 4.0])},
            TypeError,
            "cu_seqlens: expected dtype int32, int64, got float32",
        ),
        (
            pk.clipped_loss,
            PACKED | {"cu_seqlens": torch.tensor([[0, 4]])},
            ValueError,
            r"cu_seqlens: expected shape \[sequences \+ 1\], got \[1, 2\]",
        ),
        (pk.value_loss, VALUE | {"old_values": None}, TypeError, "old_values: .*got NoneType"),
        (
            pk.value_loss,
            VALUE | {"returns": N},
            ValueError,
            r"returns: expected shape \[2, 3\] \(as values\), got \[4\]",
        ),
        (
            pk.value_loss,
            VALUE | {"returns": X.clone().requires_grad_()},
            ValueError,
            r"returns: .*pass returns.detach\(\)",
        ),
        (pk.value_loss, VALUE | {"clip": -1.0}, ValueError, "clip: .*got -1"),
        (pk.value_loss, VALUE | {"huber_delta": 0.0}, ValueError, "huber_delta: .*got 0"),
        *(
            (pk.clipped_loss, PACKED | {"cu_seqlens": torch.tensor(o)}, ValueError, m)
            for o, m in [
                ([1, 4], "cu_seqlens: .*start at 0, got 1 at index 0"),
                ([-1, 4], "cu_seqlens: .*start at 0, got -1 at index 0"),
                ([0, 3], "cu_seqlens: .*end at 4, .* got 3 at index 1"),
                ([0, 5], "cu_seqlens: .*end at 4, .* got 5 at index 1"),
                ([0], "cu_seqlens: .*end at 4, .* got 0 at index 0"),
                ([0, 3, 2, 4], "cu_seqlens: .*not to decrease .* got 2 at index 2"),
                ([0, 5, 4], "cu_seqlens: .*not to decrease .* got 4 at index 2"),
            ]
        ),
    ],
)
@EXECUTORS
def test_bad_input_says_the_same_everywhere(name, function, inputs, error, message):
    with executor("torch"), pytest.raises(error, match=message) as said:
        function(**inputs)
    with executor(name), raises(name, error, message) as caught:
        function(**inputs)
    if "cu_seqlens" not in message:
        assert str(caught.value) == str(said.value)
