"""The demo's measurements on a tiny random model."""

import pytest
import torch
from tiny_model_dir import write_model

from lowbit.formats import parse_format
from lowbit.specs import parse_config
from lowbit.tools import demo
from lowbit.tools.demo import DemoPlan, run_demo
from lowbit.tools.sources import find_source

PLAN = DemoPlan(("int8wo", "int2wo-32-asym", "float8sq"), tokens=120, window=60, new_tokens=6)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return find_source(str(write_model(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def ran(source):
    model, tokenizer = source.model(), source.tokenizer()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    seen, steps = [], []
    result = run_demo(model, tokenizer, PLAN, on_row=seen.append, progress=lambda *step: steps.append(step))
    return result, model, before, seen, steps


def test_rows_come_one_by_one_and_in_order(ran):
    result, _, _, seen, steps = ran
    assert [r.config for r in result.rows] == ["bf16", *PLAN.configs]
    assert seen == result.rows
    assert [s[0] for s in steps] == list(range(len(steps)))
    assert steps[-1][:2] == (len(steps) - 1, len(steps) - 1)


def test_the_original_is_not_changed(ran):
    _, model, before, _, _ = ran
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_sizes_are_those_of_the_formats(ran):
    result, model, _, _, _ = ran
    original = result.rows[0]
    assert original.bits_per_weight == 16
    assert original.model_bytes == sum(2 * p.numel() for p in model.parameters())
    assert result.parameters == sum(p.numel() for p in model.parameters())
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert original.layer_bytes == sum(2 * m.weight.numel() for m in layers)
    for row in result.rows[1:]:
        fmt = parse_format(parse_config(row.config).scheme.weight.spec)
        assert row.layer_bytes == sum(fmt.nbytes(*m.weight.shape) for m in layers)
        assert row.model_bytes == original.model_bytes - original.layer_bytes + row.layer_bytes
        assert row.bits_per_weight == 8 * row.layer_bytes / (original.layer_bytes / 2)
        assert len(row.sqnr_db) == len(layers)
        assert row.kernels


def test_quality_falls_with_the_bits(ran):
    rows = {r.config: r for r in ran[0].rows}
    eight, two = rows["int8wo"].quality, rows["int2wo-32-asym"].quality
    assert rows["bf16"].quality.kl_mean == 0
    assert rows["bf16"].quality.tokens == eight.tokens == 118
    assert 0 < eight.kl_mean < 0.1 * two.kl_mean
    assert eight.top1_agreement > two.top1_agreement
    assert min(rows["int8wo"].sqnr_db.values()) > max(rows["int2wo-32-asym"].sqnr_db.values())


def test_the_original_is_measured_like_the_others(source):
    """Its row is made from what the reference keeps; a run of its own gives the same."""
    from lowbit.tools.evaluate import evaluate, held_out_text

    model, tokenizer = source.model(), source.tokenizer()
    row = run_demo(model, tokenizer, DemoPlan((), tokens=120, window=60, new_tokens=2)).rows[0]
    again = evaluate(model, torch.tensor(tokenizer.encode(held_out_text())[:120]), window=60)
    assert row.quality.perplexity == again.perplexity
    assert row.quality.perplexity_stderr == again.perplexity_stderr


def test_the_question_is_asked_as_the_model_wants(tmp_path):
    plain = find_source(str(write_model(tmp_path / "plain"))).tokenizer()
    chat = find_source(str(write_model(tmp_path / "chat", template=True))).tokenizer()
    assert demo._prompt(plain)[0] == demo.OPENING
    text, ids = demo._prompt(chat)
    assert text == demo.QUESTION
    assert ids == chat.encode(demo.QUESTION + "<|end|>")


def test_calibration_text_is_not_the_measured_text():
    ids = torch.arange(100)
    got = demo.calibration_ids(ids[60:], ids[:60], 30, "cpu")
    assert torch.equal(got, ids[60:90].view(1, -1))
    assert torch.equal(demo.calibration_ids(ids[100:], ids, 30, "cpu"), ids[:30].view(1, -1))


@pytest.mark.parametrize(("one", "two", "best"), [(5.0, 9.0, 2), (5.0, 0.4, 1)])
def test_the_faster_number_of_threads_is_taken(monkeypatch, one, two, best):
    class Said:
        @property
        def tokens_per_second(self):
            return one if torch.get_num_threads() == 1 else two

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(demo, "generate", lambda *a, **k: Said())
        assert demo.best_threads(None) == best
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_plans_name_configs_that_exist():
    for plan in (demo.FULL, demo.QUICK):
        assert [parse_config(c).spec for c in plan.configs] == list(plan.configs)
