"""`doctor` tries every example config and tells a failure from a success."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch

from lowbit.configs import Config, Scheme, Support
from lowbit.formats.int import IntFormat
from lowbit.granularity import PerRow
from lowbit.kernels.select import KERNELS
from lowbit.specs import EXAMPLES, parse_config
from lowbit.tools import doctor

CPU = torch.device("cpu")


def test_every_example_runs_on_the_cpu():
    steps = []
    found = doctor.diagnose("cpu", progress=lambda *step: steps.append(step))
    assert tuple(c.config for c in found.configs) == EXAMPLES
    assert [c.config for c in found.configs if not c.runs] == []
    assert found.healthy
    assert steps == [(i, len(EXAMPLES), spec) for i, spec in enumerate(EXAMPLES)]
    names = {k.name for k in KERNELS if not k.by_name_only}
    for c in found.configs:
        assert len(c.kernels) == 2
        assert set(c.kernels) <= names
        assert c.bits_per_weight == parse_config(c.config).scheme.weight.bits_per_weight


def test_a_wrong_kernel_is_found(monkeypatch):
    """A layer whose result is off by half is not called running."""
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: real(*a) * 1.5)
    check = doctor.check(parse_config("int8wo"), CPU)
    assert not check.runs
    assert "wrong result" in check.how


def test_a_config_that_fails_says_why():
    class Broken(Config):
        spec = "broken"

        @property
        def scheme(self) -> Scheme:
            return Scheme(IntFormat(8, PerRow()))

        def supported(self, device="cuda") -> Support:
            return Support(False, "for this test")

    check = doctor.check(Broken(), CPU)
    assert (check.runs, check.how, check.kernels) == (False, "for this test", ())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_with_a_way_out():
    with pytest.raises(ValueError, match="--device cpu"):
        doctor.diagnose("cuda")


def test_the_machine_is_described():
    facts = doctor.machine()
    assert facts["torch"] == torch.__version__
    assert all(isinstance(v, str) and v for v in facts.values())
    assert set(doctor.OPTIONAL) <= set(facts)


@pytest.mark.parametrize("package", doctor.ENGINES)
@pytest.mark.parametrize(
    ("version", "plugin", "allowed", "says"),
    [
        ("{tested}", True, None, "{tested}, loads the plugin"),
        ("{tested}.1", True, "other,lowbit", "{tested}.1, loads the plugin"),
        ("{tested}", True, "other", "{tested}, does not load the plugin: {variable} is 'other'"),
        ("{tested}", False, None, "{tested}, does not find the plugin: lowbit is not installed as a package"),
        ("{tested}0.1", True, None, "{tested}0.1, loads the plugin, which was tested with {all} only"),
    ],
)
def test_whether_an_engine_loads_the_plugin(monkeypatch, package, version, plugin, allowed, says):
    """Under the name that a build for the CPU is distributed by."""
    found = doctor.ENGINES[package]
    words = {"tested": found.tested[-1], "all": ", ".join(found.tested), "variable": found.variable}
    entry = importlib.metadata.EntryPoint("lowbit", f"lowbit.integrations.{package}:register", found.group)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == package else None)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {package: ["a-cpu-build"]})
    monkeypatch.setattr(importlib.metadata, "version", {"a-cpu-build": version.format(**words)}.__getitem__)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if plugin else [])
    monkeypatch.delenv(found.variable, raising=False)
    if allowed is not None:
        monkeypatch.setenv(found.variable, allowed)
    assert doctor.engine(package) == says.format(**words)


@pytest.mark.parametrize("package", doctor.ENGINES)
def test_without_an_engine_the_doctor_says_so(monkeypatch, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.machine()[package] == "not installed (serving)"


def test_the_groups_of_entry_points_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    expected = {e.group: {"lowbit": f"lowbit.integrations.{name}:register"} for name, e in doctor.ENGINES.items()}
    assert project["entry-points"] == expected
