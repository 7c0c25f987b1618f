"""An exported folder's text files and its limits for other loaders: tokenizer, template, end tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

from nvlm.config.values import ConfigError
from nvlm.data.messages import Turn, read_turns
from nvlm.data.text import chat
from nvlm.data.text.formats import FORMATS
from nvlm.data.text.tokenizer import load_tokenizer
from nvlm.export.describe import describe
from nvlm.export.readme import RELEASE_FILES, note, other_limits, readme, release_limits
from nvlm.export.text import chat_template, exported_text, training_note
from nvlm.vision.encoders.internvit import description as internvit

# The tokenizer here knows no long words: tags take more tokens than real ones.
LARGE = ("llm=qwen2-72b", "data.seq_length=9000", "data.cross_length=9000")
QWEN2 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # 151643 to 151645


def qwen2_like(folder: Path, words: int = 151643, marks: list[str] = QWEN2) -> Path:
    """A tokenizer with Qwen2's size and added tokens; its words are bytes and fillers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*alphabet, *(f"w{n}" for n in range(words - 256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {str(tokenizer.token_to_id(mark)): {"content": mark, "special": True} for mark in marks}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, "chat_template": "You are"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": "<|im_end|>", "bos_token": None}))
    first, _, last = (tokenizer.token_to_id(mark) for mark in marks[:3])
    generation = {"bos_token_id": first, "eos_token_id": [last, first], "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Path:
    return qwen2_like(tmp_path_factory.mktemp("tokenizers") / "qwen2")


def written(config, folder: Path) -> Path:
    """The files of `exported_text`."""
    folder.mkdir()
    for name, content in exported_text(config).files.items():
        (folder / name).write_text(content if isinstance(content, str) else content.read_text())
    return folder


def test_a_tokenizer_without_vision_pad_is_completed_with_the_release_s_ids(configured, qwen2, tmp_path):
    """Qwen2-72B-Instruct's tokenizer ends with <|im_end|> at 151645; NVLM-D-72B's has <|vision_pad|> at 151654."""
    config = configured("arch=decoder", *LARGE, f"llm.tokenizer={qwen2}")
    assert "adds it as token 151654" in training_note(config)
    folder = written(config, tmp_path / "out")
    for tokenizer in (
        load_tokenizer(str(folder)).tokenizer.token_to_id,
        AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids,
    ):
        assert tokenizer("<|vision_pad|>") == 151654 and tokenizer("<|object_ref_start|>") == 151646
        assert [tokenizer(mark) for mark in QWEN2] == [151643, 151644, 151645]
    assert AutoTokenizer.from_pretrained(folder).encode("<|vision_pad|>" * 2) == [151654] * 2
    again = configured("arch=decoder", *LARGE, f"llm.tokenizer={folder}")
    assert training_note(again) is None
    assert exported_text(again).files["tokenizer.json"] == folder / "tokenizer.json"  # nothing left to add
    assert not other_limits(config, encoder_of(config))


def test_a_vocabulary_without_room_is_said_before_training_and_at_export(configured, qwen2):
    config = configured("arch=decoder", *LARGE, f"llm.tokenizer={qwen2}")
    full = replace(config, llm=replace(config.llm, vocab=151646))
    assert "llm.vocab=151646 no row left" in training_note(full)
    assert any("no <|vision_pad|>" in limit for limit in other_limits(full, encoder_of(full)))
    assert "no <|vision_pad|>" in note(full, encoder_of(full))
    assert "cannot load this folder" in readme(full, encoder_of(full))
    for arch in ("xattn", "hybrid"):  # which no other library loads
        assert training_note(configured(f"arch={arch}", *LARGE, f"llm.tokenizer={qwen2}")) is None


def test_a_model_that_does_not_speak_chatml_is_not_exported(configured):
    config = configured("arch=decoder", "llm.chat=plain", "data.questions=1")
    with pytest.raises(ConfigError, match="llm.chat: got plain in this run, expected chatml or llama3"):
        exported_text(config)
    assert "cannot be exported" in training_note(config)


def test_ends_and_beginnings_are_written(configured, qwen2, tmp_path):
    config = configured("arch=decoder", *LARGE, f"llm.tokenizer={qwen2}")
    folder, text = written(config, tmp_path / "out"), exported_text(config)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.bos_token_id) == ([151645, 151643], 151643)
    assert generation.temperature == 0.7  # the folder's own
    language = describe(config, encoder_of(config), text)["llm_config"]
    assert (language["bos_token_id"], language["eos_token_id"]) == (151643, 151645)
    assert load_tokenizer(str(folder)).ends == {151645, 151643}


def test_the_tiny_tokenizer_is_exported_with_a_template_and_an_end(configured, tmp_path):
    folder = written(configured("arch=decoder"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == end and GenerationConfig.from_pretrained(folder).eos_token_id == [end]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"


SYSTEM = 'Say "it",\n\\n 漢🙂 {{ x }} {% y %} \'.'


@pytest.mark.parametrize("system", [None, SYSTEM, "You are brief."])
@pytest.mark.parametrize("bos", [None, "<|endoftext|>"])
def test_the_template_is_the_trainer_s(configured, tmp_path, system, bos):
    """Including its default system message, which a copied template must not replace."""
    config = configured("arch=decoder")
    config = replace(config, llm=replace(config.llm, bos=bos), data=replace(config.data, system=system))
    rendered = AutoTokenizer.from_pretrained(written(config, tmp_path / "out"))
    tokenizer = load_tokenizer("tiny", bos)
    user, own = Turn("user", ("What's <b>?\n",)), Turn("system", ("Other.",))
    for turns in ([user], [own, user], [user, Turn("assistant", (" A. ",)), user]):
        messages = [{"role": turn.role, "content": turn.texts[0]} for turn in turns]
        for generate in (True, False):
            runs = chat.runs(turns, tokenizer, system, reply=generate)
            expected = tokenizer.tokenizer.decode([i for run in runs for i in run.ids], skip_special_tokens=False)
            got = rendered.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            assert got == expected


@pytest.mark.parametrize("system", [None, " You are\nbrief. "])
def test_the_template_of_llama_3_is_the_trainer_s(system):
    """Compared as text: what a tokenizer makes of either is the same."""
    from jinja2 import Environment

    form, bos = FORMATS["llama3"], "<|begin_of_text|>"
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template(system, bos, "llama3"))
    user, answer = {"role": "user", "content": " What's <b>?\n"}, {"role": "assistant", "content": "\nA. "}
    for messages in ([user], [user, answer], [{"role": "system", "content": "Other."}, user, answer, user]):
        for reply in {messages[-1]["role"] == "user", False}:
            turns = read_turns(
                messages if not system or len(messages) > 2 else [{"role": "system", "content": system}, *messages]
            )
            layout = form.layout(turns, reply)
            texts = (p.text if p.turn is None else turns[p.turn].texts[0].strip() for p in layout.pieces)
            assert template.render(messages=messages, add_generation_prompt=reply) == bos + "".join(texts)


def test_a_copied_template_does_not_outlive_the_export(configured, qwen2, tmp_path):
    """Qwen's own template adds "You are" if no system message is sent."""
    config = configured("arch=decoder", *LARGE, f"llm.tokenizer={qwen2}", "data.system=Answer.")
    tokenizer = AutoTokenizer.from_pretrained(written(config, tmp_path / "out"))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    stored = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"]
    assert stored == chat_template("Answer.", None) == (tmp_path / "out/chat_template.jinja").read_text()


def encoder_of(config, dummy_heads=7):
    return internvit.exported(config.vision, dummy_heads)


LIMITS = {
    "a hybrid": (("arch=hybrid",), 7, "NVLM-H is known to no other library"),
    "other tags": (("tiling.tag=2d_grid",), 7, "tiling.tag=2d_grid"),
    "no tags": (("tiling.tag=none",), 7, "tiling.tag=none"),
    "ten tiles": (("tiling.max_tiles=10",), 7, "tiling.max_tiles=10"),
    "a small encoder": (("vision=internvit-300m",), 0, "vision=internvit-300m: 16 heads and 0 dummy ones"),
    "Yi's thumbnail": (("llm.thumbnail_tag='<tile_global>'",), 7, "llm.thumbnail_tag=<tile_global>"),
    "Llama": (("llm.qkv_bias=false",), 7, "takes Qwen2 alone"),
    "no tokenizer": (("llm.tokenizer=null",), 7, "the tokenizer has no <|vision_pad|>"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_what_others_cannot_serve_is_said_by_name(configured, qwen2, case):
    overrides, dummies, reason = LIMITS[case]
    base = ("arch=decoder", *LARGE, f"llm.tokenizer={qwen2}")
    assert note(configured(*base), encoder_of(configured(*base))) is None
    config = configured(*base, *overrides)
    encoder = encoder_of(config, dummies)
    assert reason in note(config, encoder) and "modeling_nvlm.py" in note(config, encoder)
    told = readme(config, encoder, RELEASE_FILES)
    assert reason in told and "vllm serve" not in told and "from modeling_nvlm import NVLM" in told


def test_the_folder_says_what_serves_it(configured, qwen2):
    base = ("arch=decoder", *LARGE, f"llm.tokenizer={qwen2}")
    encoder = encoder_of(configured(*base))
    complete, bare = (readme(configured(*base), encoder, files) for files in (RELEASE_FILES, ()))
    for told in (complete, bare):
        assert "vllm serve . --trust-remote-code" in told and "vLLM (0.33)" in told
        assert "transformers 4.39.3" in told and "does not load in transformers 5.x" in told
    assert "First copy configuration_nvlm_d.py" in bare and "First copy" not in complete
    assert release_limits(configured(*base), RELEASE_FILES) == []
    assert "leaves the output layer random" in readme(configured(*base, "llm.tied=true"), encoder, RELEASE_FILES)
    assert "data.tokenize=apart" in complete and "vLLM and the release's class may produce ids" in complete
    joined = readme(configured(*base, "data.tokenize=joined"), encoder, RELEASE_FILES)
    assert "So vLLM may produce ids" in joined and "the release's class produces the same ids" in joined
