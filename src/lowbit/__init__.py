"""lowbit: quantization for PyTorch that is fused or refused."""

from lowbit.tensor import QuantizedTensor

__version__ = "0.1.0"
__all__ = ["QuantizedTensor", "__version__"]
