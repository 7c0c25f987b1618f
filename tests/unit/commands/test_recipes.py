"""The paper's recipes: their blends, what a dry run prints of them, and what they continue."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nvlm.commands.compose import CONF, check_overrides, compose_config
from nvlm.commands.dryrun import dry_run
from nvlm.commands.prepare import main as prepare
from nvlm.config.rules import without_path
from nvlm.config.values import ConfigError
from nvlm.data.blend import shares_of
from nvlm.data.sources.registry import build_records
from nvlm.inputs.check import compare_models
from nvlm.inputs.drawn import counts_of, known_counts, parts_of, told

RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("nvlm_*_*_*.yaml"))
PAGES = "source: pages, heldout_records: 5, questions: 2"


def test_there_are_twelve():
    assert len(RECIPES) == 12


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_and_dry_runs_without_paths(configured, name, capsys):
    config = configured(f"+experiment={name}", "dry_run=true")
    blend = config.data.source
    dry_run(config)
    printed = " ".join(capsys.readouterr().out.split())
    samples = config.train.steps * config.train.global_batch
    assert f"= {samples:,} samples of at most {config.data.seq_length:,} tokens" in printed
    lacking = printed.partition("sources without a path, which a run needs: ")[2]
    assert lacking.split(", ") == list(blend.sources) == without_path(blend)
    texts = {source for source, part in blend.sources.items() if part.text_only}
    assert len(blend.sources) == (18 if name.endswith("pretrain") else 97)
    assert len(texts) == (0 if name.endswith("pretrain") else 12)


def test_a_recipe_without_paths_names_all_of_them_in_one_line():
    given = ("data.sources.cc3m.path=x.jsonl", "data.sources.sbu=null")
    with pytest.raises(ConfigError) as refused:
        compose_config("+experiment=nvlm_d_34b_pretrain", *given)
    line = str(refused.value)
    assert line.startswith("data.sources: got no path for coco, laion_115m, vqav2,") and "\n" not in line
    assert "cc3m" not in line and "sbu" not in line and "each of the 17 sources" in line
    assert line.endswith("Fix: data.sources.coco.path=FILE, or data.sources.coco=null, which leaves it out")


def test_a_source_may_be_of_another_kind_or_left_out():
    config = compose_config(
        "+experiment=nvlm_d_34b_sft", "dry_run=true", "data.sources.coco.source=llava", "data.sources.coco.task=null",
        "data.sources.vqav2=null", "+data.sources.mine={source: parquet, path: mine.parquet, epochs: 2}",
    )  # fmt: skip
    sources = config.data.source.sources
    assert sources["coco"].source.source == "llava" and sources["mine"].epochs == 2 and "vqav2" not in sources


def test_a_copy_of_a_template_with_paths_is_a_file_of_sources(tmp_path):
    filled = (CONF / "data" / "nvlm_sft.yaml").read_text().replace("path: null", "path: x.jsonl")
    (tmp_path / "mine.yaml").write_text(filled)
    config = compose_config("+experiment=nvlm_h_72b_sft", f"data.sources={tmp_path}/mine.yaml")
    assert not without_path(config.data.source) and len(config.data.source.sources) == 97


def test_a_key_of_the_base_file_belongs_to_a_recipe_s_data(capsys):
    given = ["data=nvlm_sft", "data.text_share=0.1", "data.records=3", "dry_run=true"]
    (config,) = check_overrides(given)
    assert config.data.source.text_share == 0.1
    assert capsys.readouterr().err == "data.records=3: ignored, data=nvlm_sft does not have it\n"


def test_samples_by_source():
    sources = f"{{a: {{{PAGES}, records: 40, weight: 3}}, b: {{{PAGES}, records: 10, take: all, weight: 1}}}}"
    config = compose_config(
        "data=blend", f"data.sources={sources.replace(', take: all', '')}", "train.steps=60", "train.global_batch=2"
    )
    a, b = parts_of(config, known_counts(config))
    assert (a.share, a.samples, a.epochs) == (0.75, 90, 2.25) and (b.share, b.samples, b.epochs) == (0.25, 30, 3)
    line, table = told(config, known_counts(config))
    assert line == "60 steps x 2 = 120 samples of at most 512 tokens: 61,440 tokens" and table.row_count == 2
    assert all(part.epochs is None and part.samples for part in parts_of(config, {}))


def test_shares_by_size_wait_for_the_counts(tmp_path):
    for name, count in (("a", 30), ("b", 10)):
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * count)
    sources = ", ".join(f"{name}: {{source: jsonl, path: {tmp_path}/{name}.jsonl, epochs: 1}}" for name in "ab")
    config = compose_config("data=blend", f"data.sources={{{sources}}}", "train.steps=60", "train.global_batch=2")
    assert all(part.share is None for part in parts_of(config, known_counts(config)))
    assert "counted when the run starts" in list(told(config, {}))[1]
    counts = counts_of(build_records(config.data, config.seed), config)
    parts = parts_of(config, counts)
    assert {part.name: part.share for part in parts} == shares_of(config.data.source, counts) == {"a": 0.75, "b": 0.25}
    assert [part.epochs for part in parts] == [3, 3]

    assert prepare([f"data.index={tmp_path}/index", "data=blend", f"data.sources={{{sources}}}", "workers=1"]) == 0
    indexed = compose_config("data=blend", f"data.sources={{{sources}}}", f"data.index={tmp_path}/index")
    assert known_counts(indexed) == counts


def test_one_source_says_its_epochs(configured):
    (line,) = told(configured("train.steps=100", "train.global_batch=32"), {"pages": 8000})
    assert line.endswith("tokens; 0.40 epochs of pages")


@pytest.mark.parametrize(
    ("parent", "reason"),
    [
        ("nvlm_x_34b_pretrain", "parent: arch.name: got xattn, expected hybrid, as in this run. Fix: arch=xattn"),
        ("nvlm_h_72b_pretrain", "parent: llm.layers: got 80, expected 60"),
        ("nvlm_h_34b_pretrain", None),
    ],
)
def test_a_stage_continues_its_own_architecture_and_language_model(configured, parent, reason):
    before, now = (configured(f"+experiment={name}", "dry_run=true") for name in (parent, "nvlm_h_34b_sft"))
    if reason is None:
        return compare_models(now, before, "parent")
    with pytest.raises(ConfigError, match=reason):
        compare_models(now, before, "parent")


def test_a_stage_may_stretch_positions_but_not_shrink_them(configured):
    plain, stretched = configured("arch=decoder"), configured("arch=decoder", "llm.rope_interpolation=2")
    compare_models(stretched, plain, "parent")
    with pytest.raises(ConfigError, match="llm.rope_interpolation: got 2, expected at most this run's 1. Fix: .*=2"):
        compare_models(plain, stretched, "parent")
    with pytest.raises(ConfigError, match="parent: llm.qk_norm: got False, expected True"):
        compare_models(configured("arch=decoder", "llm.qk_norm=true"), plain, "parent")


def test_cross_attention_is_not_dropped_but_may_be_new(configured):
    decoder, hybrid = configured("arch=decoder"), configured("arch=hybrid")
    compare_models(hybrid, decoder, "parent")
    with pytest.raises(ConfigError, match="arch.name: got hybrid, expected decoder"):
        compare_models(decoder, hybrid, "parent")
    with pytest.raises(ConfigError, match="llm.hidden: got 64"):
        compare_models(hybrid, replace(hybrid, llm=replace(hybrid.llm, hidden=64)), "parent")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_every_source_has_all_of_its_keys(name):
    """Each file in conf/data is the configuration of a schema in nvlm/config/data.py."""
    words = [f"data={name}", "dry_run=true"]
    if name == "blend":
        words.append("data.sources={a: {source: jsonl, weight: 1}}")
    assert compose_config(*words).data.source.source == ("blend" if "_" in name else name)
