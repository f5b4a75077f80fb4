"""lowbit: quantization for PyTorch that is fused or refused.

`quantize_(model, config)` replaces weights in place; `explain(model)` says which kernel runs each layer, and
`warmup(model)` compiles them ahead; `save` and `load` keep the result as safetensors.
"""

from lowbit.calibrate import calibrate
from lowbit.checkpoint import CheckpointError, load, save, verify
from lowbit.configs import (
    CodebookWeightOnlyConfig,
    Config,
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FormatConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    MXWeightOnlyConfig,
    NF4WeightOnlyConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
)
from lowbit.explain import explain
from lowbit.formats import parse_format
from lowbit.granularity import PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken
from lowbit.kernels.problem import UnsupportedError, batch_invariant
from lowbit.kernels.select import use_kernel
from lowbit.qat import convert_qat_, prepare_qat_
from lowbit.quantize import quantize_
from lowbit.report import Report
from lowbit.rules import FqnToConfig
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor
from lowbit.tune import tune_scales_
from lowbit.tune_blocks import tune_blocks_
from lowbit.warmup import warmup

from lowbit import dispatch  # isort: skip  # noqa: F401  (fills the tables of QuantizedTensor)

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CodebookWeightOnlyConfig",
    "Config",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8DynamicActivationInt4WeightConfig",
    "Float8StaticActivationFloat8WeightConfig",
    "Float8WeightOnlyConfig",
    "FormatConfig",
    "FqnToConfig",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
    "MXDynamicActivationMXWeightConfig",
    "MXWeightOnlyConfig",
    "NF4WeightOnlyConfig",
    "NVFP4DynamicActivationNVFP4WeightConfig",
    "NVFP4WeightOnlyConfig",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "QuantizedTensor",
    "Report",
    "UnsupportedError",
    "__version__",
    "batch_invariant",
    "calibrate",
    "convert_qat_",
    "explain",
    "load",
    "parse_config",
    "parse_format",
    "prepare_qat_",
    "quantize_",
    "save",
    "tune_blocks_",
    "tune_scales_",
    "use_kernel",
    "verify",
    "warmup",
]
