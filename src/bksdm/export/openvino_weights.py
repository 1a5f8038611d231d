"""Fewer bits for OpenVINO's networks, by NNCF.

int8 and int4 are of the weights alone, w = scale (q - zero), and products are computed in floating point. w8a8 rounds
what flows through the convolutions and linear layers of the U-Net as well, within ranges that real denoising steps
showed, so that they are computed in integers; text encoder and VAE keep 8-bit weights alone.
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
    """A U-Net whose convolutions, but for the first and the last, and linear layers compute in integers.

    Attention multiplies queries and keys in integers, and what they weigh in floating point. Before linear layers the
    channels of an activation are scaled towards one range, and the weights by the inverse (SmoothQuant, arXiv
    2211.10438, eq. 3).
    """
    nncf = _nncf()
    from nncf.quantization import advanced_parameters as advanced  # noqa: PLC0415

    convolutions = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"]
    return nncf.quantize(
        model,
        nncf.Dataset(list(steps)),
        subset_size=len(steps),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope([convolutions[0], convolutions[-1]]),
        # Processors without 8-bit dot products add pairs in 16 bits, where weights of 8 bits overflow.
        advanced_parameters=advanced.AdvancedQuantizationParameters(overflow_fix=advanced.OverflowFix.ENABLE),
    )


def _nncf() -> Any:
    import nncf  # noqa: PLC0415

    nncf.set_log_level(logging.ERROR)
    return nncf
