"""Owns the number of floating-point operations of a model.

Input: a model and one batch. torch has the formulas; they are summed over what really runs.
"""

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ensemblekit.batches import Batch, forward
from ensemblekit.build import plain_attention

_OPAQUE = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "mkldnn_rnn_layer")


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Sums torch's own formulas over the operators that run; `opaque` are those without one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.opaque = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # true, the default, imports the compiler: a second for nothing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        self.opaque |= str(func).split(".")[1] in _OPAQUE
        return found


def flops(model: nn.Module, example: Batch, device: torch.device) -> int | None:
    """Floating-point operations of one sample (a multiply-add is two), None where torch cannot count.

    Counted with gradients on: torch then takes the path of plain operators, which have formulas,
    and not one fused operator for a whole layer, which has none.
    """
    batch = example.sized(1).to(device)
    rnn = torch.backends.mkldnn.flags(enabled=False)  # the same for recurrent layers
    try:
        with (
            warnings.catch_warnings(),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            plain_attention(),
        ):
            warnings.simplefilter("ignore")  # about the other switches of `flags`
            with rnn, _Counter() as counter:
                forward(model, batch)
    except Exception:  # noqa: BLE001  # a figure that is nice to have; the model runs elsewhere
        return None
    return None if counter.opaque else counter.total
