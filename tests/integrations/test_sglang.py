"""The plugin in SGLang itself: its layers, its parameters, its loaders and its Llama, none of them imitated.

They run in processes of their own (sglang_ranks.py). SGLang's Python code is enough, on a CPU; what needs its kernels
(positions, attention, its engine) is not here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from proofs import PICKED, WRITTEN

from lowbit import parse_config
from lowbit.specs import EXAMPLES
from lowbit.tools import doctor

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; its Python code is enough for these tests", allow_module_level=True)

from engine_processes import notes

#: K of a row-parallel layer on each of two ranks, in engine_models.py.
HALF = 256
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang")


def test_the_doctor_and_sglang_find_the_plugin(directory: Path) -> None:
    assert doctor.engine("sglang").endswith(", loads the plugin")
    [found] = notes("sglang", 1, directory)
    assert found["plugin"] == {"module": "lowbit.integrations.sglang"}


def assert_equal(world: int, directory: Path, name: str, spec: str) -> None:
    tile = parse_config(spec).scheme.weight.tile[1]
    for found in notes("sglang", world, directory):
        note = found[f"{name} {spec}"]
        if world > 1 and HALF % tile:
            assert "cut-inside-tile" in note["error"], note
            assert "attn.o_proj" in note["error"], note
        else:
            assert len(note) == 21, note  # 8 layers, few and one token; the embedding; the planes of 4 layers
            assert set(note.values()) == {"equal"}, note


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("spec", EXAMPLES)
def test_our_own_convention_in_sglangs_layers(world: int, spec: str, directory: Path) -> None:
    assert_equal(world, directory, "own", spec)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("spec", WRITTEN)
def test_compressed_tensors_in_sglangs_layers(world: int, spec: str, directory: Path) -> None:
    assert_equal(world, directory, "compressed_tensors", spec)


@pytest.mark.parametrize("kind", ["own", "compressed-tensors"])
def test_sglangs_llama_from_a_directory(kind: str, directory: Path) -> None:
    """Every layer of it, the embedding, and the logits of its output projection."""
    [found] = notes("sglang", 1, directory)
    assert len(found[f"whole {kind}"]) == 10, found
    assert set(found[f"whole {kind}"].values()) == {"equal"}, found


@pytest.mark.parametrize("spec", WRITTEN)
def test_sglangs_own_reader_takes_the_scheme(spec: str, directory: Path) -> None:
    """The class that it would run on a Hopper GPU, by its own choice, with every tensor in place; or why not."""
    [found] = notes("sglang", 1, directory)
    assert found["picked"][spec].startswith(PICKED[spec][1])


MESSAGES = {
    "a_missing_tensor": ("CheckpointError", "attn.q_proj, attn.k_proj, attn.v_proj", "weight_scale"),
    "a_missing_tensor_of_our_own": ("CheckpointError", "fc", "weight.scale"),
    "another_dtype": ("CheckpointError", "fc: weight is torch.int32", "torch.int8", "lowbit verify"),
    "parts_that_differ": ("attn.q_proj is int8:row", "attn.k_proj is int4:g32:asym", "[lowbit: format-mismatch]"),
    "a_config_to_quantize_by": ("CheckpointError", "lowbit quantize"),
    "an_unknown_section": ("CheckpointError", "'format_version': 2"),
    "experts_by_name": ("layers.0.experts", "runs no quantized experts", "[lowbit: layer-not-quantizable]"),
    "nothing_where_no_weights_are_asked_for": ("nothing",),
    "a_cut_through_words_of_the_vocabulary": ("lm_head", "500", "tiles of 8", "[lowbit: cut-inside-tile]"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_does_not_fit_is_refused(name: str, directory: Path) -> None:
    [found] = notes("sglang", 1, directory)
    assert found["refused"].keys() == MESSAGES.keys()
    for words in MESSAGES[name]:
        assert words in found["refused"][name]
