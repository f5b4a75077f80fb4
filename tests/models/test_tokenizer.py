"""Tokenizers read from files written here: a byte-level vocabulary small enough to check by hand."""

import json

import pytest
import tokenizers

from lowbit.models.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="GGUF files are written with the package gguf: pip install gguf")

# Every byte, then pieces; "Ġ" stands for a space in GPT-2's printable alphabet.
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["t h", "th e", "Ġ the", "1 2", "Ġ 1"]
SPECIAL = ["<|end|>", "<|start|>"]
TOKENS = [*SPECIAL, *BYTES, *(m.replace(" ", "") for m in MERGES), "<tool>"]
TEMPLATE = (
    "{% for m in messages %}\n{{ '<|start|>' + m['role'] + ' ' + m['content'] + eos_token }}\n    {% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|start|>the' }}{% endif %}"
)
ID = {token: i for i, token in enumerate(TOKENS)}


def write_gguf(path, pre="smollm", kind="gpt2", bos=None, template=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [4])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    if bos is not None:
        writer.add_add_bos_token(bos)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(tokenizer, text):
    return [TOKENS[i] for i in tokenizer.encode(text)]


def test_digits_are_split_where_the_model_wants_it(tmp_path):
    smollm = load_tokenizer(write_gguf(tmp_path / "a.gguf"))
    assert pieces(smollm, "the the 12") == ["the", "Ġthe", "Ġ", "1", "2"]
    gpt2 = load_tokenizer(write_gguf(tmp_path / "b.gguf", "gpt-2"))
    assert pieces(gpt2, "the the 12") == ["the", "Ġthe", "Ġ", "12"]


def test_special_tokens_are_whole_and_hidden(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf"))
    ids = tokenizer.encode("<|start|>the<tool><|end|>")
    assert ids == [ID["<|start|>"], ID["the"], ID["<tool>"], ID["<|end|>"]]
    assert tokenizer.decode(ids) == "the<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>the<tool><|end|>"
    assert tokenizer.eos_ids == (0,)
    assert tokenizer.vocab_size == len(TOKENS)


@pytest.mark.parametrize("text", ["", " ", "naïve 中文 😀\r\n\t end", "a\x00b", "don't 3,000.5 the"])
def test_round_trip(tmp_path, text):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_first_token_is_added_only_where_the_file_says_so(tmp_path):
    with_bos = load_tokenizer(write_gguf(tmp_path / "a.gguf", bos=True))
    assert with_bos.encode("the") == [1, ID["the"]]
    assert with_bos.encode("the", add_special_tokens=False) == [ID["the"]]
    for bos in (False, None):
        assert load_tokenizer(write_gguf(tmp_path / f"{bos}.gguf", bos=bos)).encode("the") == [ID["the"]]


def test_a_conversation_is_written_as_the_template_says(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", template=TEMPLATE))
    ids = tokenizer.encode_chat([{"role": "user", "content": "12"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>user 12<|end|>\n<|start|>the"
    assert ids[0] == 1
    assert 0 in ids
    with pytest.raises(ValueError, match=r"no chat template; use encode\(text\)"):
        load_tokenizer(write_gguf(tmp_path / "b.gguf")).encode_chat([])
    refusing = load_tokenizer(write_gguf(tmp_path / "c.gguf", template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(ValueError, match="chat template: roles must alternate"):
        refusing.encode_chat([])


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    from jinja2.exceptions import SecurityError

    escape = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(SecurityError):
        load_tokenizer(write_gguf(tmp_path / "a.gguf", template=escape)).encode_chat([])


def test_other_gguf_tokenizers_are_refused_with_a_way_out(tmp_path):
    for kind, pre in (("llama", "default"), ("gpt2", "never-heard-of")):
        with pytest.raises(ValueError, match=rf"{kind!r} with pre-tokenizer {pre!r} is not supported.*Hugging Face"):
            load_tokenizer(write_gguf(tmp_path / f"{kind}.gguf", pre, kind))


def test_a_hugging_face_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    same = load_tokenizer(write_gguf(tmp_path / "a.gguf", template=TEMPLATE))
    same.backend.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(tmp_path)
    assert plain.encode("the 12 <|end|>") == same.encode("the 12 <|end|>")
    assert plain.eos_ids == ()
    settings = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|start|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    full = load_tokenizer(tmp_path)
    assert full.eos_ids == (0, 5, 7)
    conversation = [{"role": "user", "content": "12"}]
    assert full.encode_chat(conversation) == same.encode_chat(conversation)
    named = [{"name": "default", "template": "the"}, {"name": "other", "template": "12"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "the"
    (tmp_path / "chat_template.jinja").write_text("12")
    assert load_tokenizer(tmp_path).chat_template == "12"
