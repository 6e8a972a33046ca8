"""What cached_step refuses."""

import pytest
import torch
from cached_encoders import batch, gradients, mlp

from sslfast import ntxent_loss
from sslfast.cached import cached_step

ENCODER, (X, Y) = mlp(), batch(5, 5)
BAD = {
    "encoders: expected a callable or a sequence of them, got int": {"encoders": 3},
    "encoders: expected one for each of 2 inputs, got 3": {"encoders": [ENCODER] * 3},
    "encoders[1]: expected a callable, got int": {"encoders": (ENCODER, 1)},
    "inputs: expected a sequence with one for each argument of the loss, got Tensor": {"inputs": X},
    "inputs: expected a sequence with one for each argument of the loss, got dict": {"inputs": {"x": X}},
    "inputs: expected at least one, got none": {"inputs": ()},
    "inputs[1]: expected a tensor [B, ...] or a sequence or mapping of them, got int": {"inputs": (X, 1)},
    "inputs[0]: expected a tensor [B, ...] in it, got none": {"inputs": (["x"], Y)},
    "inputs[1]['a'][0]: expected a tensor [B, ...], got a 0-d one": {"inputs": (X, {"a": [torch.ones(())]})},
    "inputs[1]['b']: expected 11 rows, as the first tensor of the input, got 3": {
        "inputs": (X, {"a": Y, "b": Y[:3]})
    },
    "inputs[1]: expected at least one row, got none": {"inputs": (X, Y[:0])},
    "loss: expected a callable, got float": {"loss": 1.0},
    "loss: expected it to return a 0-d tensor, got [11]": {"loss": lambda x, y: x[:, 0]},
    "loss: expected it to return a 0-d tensor, got [1]": {"loss": lambda x, y: x.sum()[None]},
    "loss: expected it to return a 0-d tensor, got dict": {"loss": lambda x, y: {}},
    "loss: expected one that depends on something that requires grad, got none": {
        "loss": lambda x, y: x.detach().sum()
    },
    "micro_batch: expected at least 1, got 0": {"micro_batch": 0},
    "micro_batch: expected an integer, got float": {"micro_batch": 2.0},
    "scaler: expected a torch.amp.GradScaler, got float": {"scaler": 2.0},
    "encoders[1]: expected it to return a tensor [b, ...], got tuple": {
        "encoders": (ENCODER, lambda x: (ENCODER(x), 0))
    },
    "encoders[1]: expected it to return a floating-point tensor, got torch.int64": {
        "encoders": (ENCODER, lambda x: ENCODER(x).long())
    },
    "encoders[0]: expected it to return [3, ...] for 3 rows, got [2, 4]": {
        "encoders": (lambda x: ENCODER(x)[1:], ENCODER)
    },
    "encoders[0]: expected it to return [3, ...] for 3 rows, got []": {
        "encoders": (lambda x: ENCODER(x).sum(), ENCODER)
    },
    "encoders[0]: expected it to return rows of (torch.float64, [3]) for each chunk, "
    "got (torch.float64, [2])": {
        "encoders": (lambda x: ENCODER(x)[:, : len(x)], ENCODER),
        "inputs": (X[:7], Y),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    arguments = {"encoders": ENCODER, "inputs": (X, Y), "loss": ntxent_loss, "micro_batch": 3} | BAD[message]
    with pytest.raises((TypeError, ValueError)) as error:
        cached_step(**arguments)
    assert str(error.value) == message
    assert gradients(ENCODER) == [None] * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_disabled(mode):
    with mode(), pytest.raises(RuntimeError, match="expected gradients to be enabled"):
        cached_step(ENCODER, (X, Y), ntxent_loss, 3)
