"""What this machine can run: versions, devices, and every example config tried on a small layer.

A config counts as running only after it has run: a small layer is quantized, applied to a few inputs, and compared
with exact arithmetic on the same quantized weights. The kernels named for larger layers come from `select`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowbit.calibrate import calibrate
from lowbit.configs import Config
from lowbit.kernels.problem import Problem, UnsupportedError, arch_of
from lowbit.kernels.select import select
from lowbit.quantize import quantize_
from lowbit.specs import EXAMPLES, parse_config
from lowbit.tensor import QuantizedTensor

#: Packages of the extras, and what is missing without them.
OPTIONAL = {
    "triton": "GPU kernels",
    "rich": "the command line's tables",
    "jinja2": "HTML reports and chat templates",
    "matplotlib": "plots in reports",
    "tokenizers": "text in and out of models",
    "gguf": "reading GGUF files",
    "transformers": "models of the transformers library",
}


class Engine(NamedTuple):
    """A serving engine with a plugin of lowbit: the group of its entry points, the variable that names those allowed,
    and the releases in which the plugin's tests have passed."""

    group: str
    variable: str
    tested: tuple[str, ...]


ENGINES = {
    "vllm": Engine("vllm.general_plugins", "VLLM_PLUGINS", ("0.32", "0.33")),
    "sglang": Engine("sglang.srt.plugins", "SGLANG_PLUGINS", ("0.5.23",)),
}
#: The layer that is tried, and the layer that `select` is asked about: small enough to be quick, large as in models.
_TRIED = (64, 192)
_TYPICAL = (4096, 4096)
_TOKENS = (1, 512)


@dataclass(frozen=True)
class ConfigCheck:
    """One config on one device.

    Attributes:
        bits_per_weight: stored bits, scales included.
        runs: whether the small layer ran and was right.
        how: which units multiply, or the reason why it does not run.
        kernels: the kernel for 1 and for 512 tokens of a 4096 x 4096 layer.
        sqnr_db: of the layer's output against fp64 arithmetic on its quantized weights; activation rounding counts.
    """

    config: str
    bits_per_weight: float
    runs: bool
    how: str
    kernels: tuple[str, ...]
    sqnr_db: float | None


@dataclass(frozen=True)
class Diagnosis:
    """The machine, and one entry per example config."""

    machine: dict[str, str]
    device: str
    configs: tuple[ConfigCheck, ...]

    @property
    def healthy(self) -> bool:
        return all(c.runs for c in self.configs)


def diagnose(
    device: str | torch.device | None = None, progress: Callable[[int, int, str], None] | None = None
) -> Diagnosis:
    """Examine the machine and try every config of `lowbit.specs.EXAMPLES`.

    Args:
        device: where to try them; the default is the GPU where there is one, else the CPU.
        progress: called with (configs done, configs in all, name) before each config.

    Raises:
        ValueError: the device is a GPU and there is none.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("doctor: device 'cuda' was asked for, but torch finds no CUDA GPU here; use --device cpu")
    checks = []
    for i, spec in enumerate(EXAMPLES):
        if progress is not None:
            progress(i, len(EXAMPLES), spec)
        checks.append(check(parse_config(spec), device))
    return Diagnosis(machine(), str(device), tuple(checks))


def check(config: Config, device: torch.device) -> ConfigCheck:
    """Try one config: quantize a small layer, run it, and compare."""
    support = config.supported(device)
    kernels = tuple(_kernel(config, m, device) for m in _TOKENS) if support else ()
    bits = config.scheme.weight.bits_per_weight
    if not support:
        return ConfigCheck(config.spec, bits, False, support.how, (), None)
    try:
        sqnr = _try(config, device)
    except Exception as error:  # whatever goes wrong here is what the user wants to be told
        message = str(error).strip().splitlines() or ["no message"]
        return ConfigCheck(config.spec, bits, False, f"{type(error).__name__}: {message[0]}", kernels, None)
    # Rounding activations to 4 bits costs most: about 17 dB remain. Below 10 dB something is broken, not rounded.
    floor = 10.0 if config.scheme.act is not None else 30.0
    how = support.how if sqnr >= floor else f"wrong result: {sqnr:.1f} dB against exact arithmetic, below {floor:.0f}"
    return ConfigCheck(config.spec, bits, sqnr >= floor, how, kernels, sqnr)


def _try(config: Config, device: torch.device) -> float:
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(_TRIED[1], _TRIED[0], dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(_TRIED, generator=random) * 0.05)
    x = torch.randn(7, _TRIED[1], generator=random).to(torch.bfloat16)
    model = nn.Sequential(layer).to(device)
    inputs = x.to(device)
    static = config.scheme.act is not None and config.scheme.act.static
    statistics = calibrate(model, [inputs]) if static else None
    quantize_(model, config, calibration=statistics)
    with torch.inference_mode():
        y = model(inputs)
        weight = layer.weight
        assert isinstance(weight, QuantizedTensor)
        exact = x.double() @ weight.dequantize(torch.float32).cpu().double().T
        exact += layer.bias.detach().cpu().double()
        return sqnr_db(exact, y.cpu())


def sqnr_db(exact: Tensor, got: Tensor) -> float:
    """Signal to noise in dB of a result against fp64. A result that is equal has some 3000 dB, not infinitely many."""
    noise = (got.double() - exact).square().sum().clamp_min(1e-300)
    return float(10 * torch.log10(exact.square().sum() / noise))


def _kernel(config: Config, m: int, device: torch.device) -> str:
    scheme, (n, k) = config.scheme, _TYPICAL
    act = scheme.act.spec if scheme.act else ""
    problem = Problem(m, n, k, scheme.weight.spec, act, torch.bfloat16, device.type, arch_of(device))
    try:
        return select(problem).kernel.name
    except UnsupportedError:
        return "none"


# The machine -------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """Versions and devices, for `doctor` and for reports."""
    from lowbit import __version__

    facts = {
        "lowbit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": _memory(),
        "gpu": _gpus(),
        "compiler": next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "none (torch.compile needs one)"),
    }
    for package, purpose in OPTIONAL.items():
        facts[package] = _version(package) or f"not installed ({purpose})"
    facts |= {package: engine(package) for package in ENGINES}
    return facts


def engine(package: str) -> str:
    """Whether a serving engine is there, and whether it will load lowbit's plugin. It is not imported, which takes
    seconds."""
    if importlib.util.find_spec(package) is None:
        return "not installed (serving)"
    found = ENGINES[package]
    # Builds for other devices are distributed under other names.
    name = importlib.metadata.packages_distributions().get(package, [package])[0]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    allowed = os.environ.get(found.variable)
    if not any(p.name == "lowbit" for p in importlib.metadata.entry_points(group=found.group)):
        return f"{version}, does not find the plugin: lowbit is not installed as a package"
    if allowed is not None and "lowbit" not in allowed.split(","):
        return f"{version}, does not load the plugin: {found.variable} is {allowed!r}"
    if not any(version == v or version.startswith(f"{v}.") for v in found.tested):
        return f"{version}, loads the plugin, which was tested with {', '.join(found.tested)} only"
    return f"{version}, loads the plugin"


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none" if torch.version.cuda is None else f"none (torch is built for CUDA {torch.version.cuda})"
    names = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        names.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return ", ".join(names) + f"; CUDA {torch.version.cuda}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"
