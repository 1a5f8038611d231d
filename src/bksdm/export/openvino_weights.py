"""Fewer bits for OpenVINO's networks, by NNCF.

int8 and int4 are of the weights alone, w = scale (q - zero), and products are computed in floating point. w8a8 rounds
what flows through the convolutions of the U-Net as well, within ranges that real denoising steps showed, so that they
are computed in integers; its matrix products, and the text encoder and the VAE, keep 8-bit weights alone.
"""

import logging
from collections.abc import Sequence
from typing import Any

from bksdm.export.calibration import Step

_GROUP = 32
_LEAST_GROUP = 16


def to_int8(model: Any) -> Any:
    """All weights in 8 bits, with a scale for each output channel."""
    nncf = _nncf()
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def to_int4(model: Any) -> Any:
    """Weights of matrix products in 4 bits, in groups of 32 input channels; of convolutions and the last layer in 8.

    Where 32 does not divide the channels groups are of 16, and where that does not, the layer stays in 8 bits too.
    """
    nncf = _nncf()
    from nncf.quantization.advanced_parameters import (  # noqa: PLC0415
        AdvancedCompressionParameters,
        GroupSizeFallbackMode,
    )

    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=_GROUP,
        ratio=1.0,
        backup_mode=nncf.BackupMode.INT8_SYM,
        advanced_parameters=AdvancedCompressionParameters(
            group_size_fallback_mode=GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=_LEAST_GROUP
        ),
    )


def to_w8a8(model: Any, steps: Sequence[Step]) -> Any:
    """A U-Net whose convolutions compute in integers, but for the first and the last; the rest as `to_int8` has it."""
    nncf = _nncf()
    from nncf.quantization import advanced_parameters as advanced  # noqa: PLC0415

    model = nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=nncf.IgnoredScope(types=["Convolution"])
    )
    convolutions = _named(model, "Convolution")
    spared = [convolutions[0], convolutions[-1], *_named(model, "MatMul")]
    return nncf.quantize(
        model,
        nncf.Dataset(list(steps)),
        subset_size=len(steps),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=spared),
        advanced_parameters=advanced.AdvancedQuantizationParameters(
            # Processors without 8-bit dot products add pairs in 16 bits, where weights of 8 bits overflow.
            overflow_fix=advanced.OverflowFix.ENABLE,
            smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=-1),
        ),
    )


def _nncf() -> Any:
    import nncf  # noqa: PLC0415

    nncf.set_log_level(logging.ERROR)
    return nncf


def _named(model: Any, kind: str) -> list[str]:
    """Names of a model's operations of one kind, in the order of the computation."""
    return [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() == kind]
