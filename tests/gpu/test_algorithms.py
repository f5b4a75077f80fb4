"""Algorithms with the model on the GPU: folding keeps the output, training and converting keep every bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_llama import CONFIG, tiny_ids, tiny_llama

from lowbit import QuantizedTensor, convert_qat_, prepare_qat_, quantize_
from lowbit.fold import rotate_, scale_
from lowbit.graph import decoder_graph

pytestmark = pytest.mark.gpu
WIDE = replace(CONFIG, hidden_size=96, intermediate_size=160)


def test_folding_keeps_the_output() -> None:
    model, ids = tiny_llama(WIDE).cuda(), tiny_ids().cuda()
    wanted = model(ids)
    for edge in (graph := decoder_graph(model)).edges():
        scale_(model, edge, torch.rand(model.get_submodule(edge.source).weight.shape[0], device="cuda") + 0.5)
    rotate_(model, graph)
    assert (model(ids) - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "smoothquant", "rotation+awq+align+gptq"])
def test_every_step_runs_there(algorithm: str) -> None:
    batches = [tiny_ids(4, 60, seed=s).cuda() for s in range(6)]
    model = tiny_llama(WIDE, torch.bfloat16).cuda()
    report = quantize_(model, {"re:model.layers.*": "int4wo-32"}, algorithm=algorithm, batches=batches)
    assert len(report.quantized) == 14
    assert all(layer.note is None or "no inputs" not in layer.note for layer in report.quantized)
    assert bool(model(batches[0]).isfinite().all())


@pytest.mark.parametrize("config", ["int4wo-32", "int8dq", "float8dq-row"])
def test_converting_keeps_every_bit_of_training(config: str) -> None:
    model, ids = tiny_llama(WIDE, torch.bfloat16).cuda(), tiny_ids().cuda()
    for p in model.parameters():
        p.requires_grad_()
    names = prepare_qat_(model, {"re:model.layers.*": config})
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    model(ids).float().square().mean().backward()
    optimizer.step()
    seen = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    convert_qat_(model)
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, QuantizedTensor)
        assert torch.equal(weight.dequantize(), seen[name])
