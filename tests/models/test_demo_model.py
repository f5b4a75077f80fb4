"""The real model, where it is in the cache: what it must say and how well it must predict."""

import pytest
import torch

from lowbit.models import load_model
from lowbit.models.hub import DEMO_MODEL
from lowbit.models.tokenizer import load_tokenizer
from lowbit.tools.evaluate import evaluate, held_out_text, reference_of
from lowbit.tools.generate import generate


@pytest.fixture(scope="module")
def path():
    if not DEMO_MODEL.is_cached():
        pytest.skip("the demo's model is not in the cache; `lowbit demo` downloads it (93 MB), then this test runs")
    return DEMO_MODEL.path


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def model(path):
    return load_model(path, torch.float32)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The capital of France is Paris.", [504, 3575, 282, 4649, 314, 7042, 30]),
        ("In 1962, 27.5%", [788, 216, 33, 41, 38, 34, 28, 216, 34, 39, 30, 37, 21]),
        ("  two\n\nnaïve 中文 😀", [216, 827, 198, 198, 3546, 46494, 216, 28589, 29184, 40303, 218]),
        ("don't <|im_end|>", [12420, 982, 216, 2]),
    ],
)
def test_known_token_ids(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_prose_survives_the_round_trip(tokenizer):
    text = held_out_text()
    ids = tokenizer.encode(text)
    assert len(ids) == 43197
    assert tokenizer.decode(ids) == text


def test_it_answers(model, tokenizer):
    prompt = torch.tensor([tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])])
    result = generate(model, prompt, 20, eos_ids=tokenizer.eos_ids)
    answer = tokenizer.decode(result.ids[0, result.prompt_tokens :].tolist())
    assert answer == "The capital of France is Paris."
    assert int(result.ids[0, -1]) in tokenizer.eos_ids


def test_it_predicts_prose(model, tokenizer):
    ids = torch.tensor(tokenizer.encode(held_out_text()))[:512]
    result = evaluate(model, ids, window=512)
    assert result.perplexity == pytest.approx(13.63708, rel=1e-4)  # computed in fp64


def test_bf16_is_close_to_fp32(model, tokenizer, path):
    ids = torch.tensor(tokenizer.encode(held_out_text()))[:256]
    result = evaluate(load_model(path, torch.bfloat16), ids, reference_of(model, ids))
    assert 0 < result.kl_mean < 0.003
    assert result.top1_agreement > 0.93
    assert abs(result.perplexity_ratio - 1) < 4 * result.perplexity_ratio_stderr + 0.002
