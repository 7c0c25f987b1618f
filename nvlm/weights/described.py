"""What a published config.json says of a language model, compared with the run's configuration. Raises ConfigError.

What no tensor shows (heads, rotary base and scaling, epsilons) would change every number without a word.
"""

from __future__ import annotations

from collections.abc import Mapping

from nvlm.config.values import LLMConfig, problem
from nvlm.weights import defaults
from nvlm.weights.defaults import completed
from nvlm.weights.published import check_fixed, check_values

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def check_language(values: Mapping, language: LLMConfig, key: str) -> None:
    """Compare a language model's config.json; `key`: the setting that named the folder."""
    architecture = defaults.architecture_of(values)
    if architecture is None:
        got = values.get("architectures") or values.get("model_type")
        known = f"one of {', '.join(defaults.LANGUAGES)}"
        raise problem(f"{key}: config.json: architectures", got, known, "take one of these")
    llama = architecture == "LlamaForCausalLM"
    check_fixed(values, defaults.FIXED_LLAMA if llama else defaults.FIXED_LANGUAGE, key)
    if any(kind != "full_attention" for kind in values.get("layer_types") or []):
        expected = "full_attention in every layer: no other is built"
        raise problem(f"{key}: config.json: layer_types", values["layer_types"], expected, "take another model")
    whole = completed(values, defaults.LANGUAGES[architecture])
    _check_norms(architecture, language, key)
    if architecture == "MistralForCausalLM":
        _check_window(values.get("sliding_window", defaults.MISTRAL_WINDOW), language, key)
    heads = whole["num_attention_heads"]
    whole["num_key_value_heads"] = whole["num_key_value_heads"] or heads
    whole.setdefault("head_dim", whole["hidden_size"] // heads)
    given = {**values, "rope_theta": _theta(values, key)}
    whole["rope_theta"] = given["rope_theta"] or whole["rope_theta"]
    _check_scaling(values, whole["max_position_embeddings"], language, key)
    expected = {
        "num_hidden_layers": ("llm.layers", language.layers),
        "hidden_size": ("llm.hidden", language.hidden),
        "num_attention_heads": ("llm.heads", language.heads),
        "num_key_value_heads": ("llm.kv_heads", language.kv_heads),
        "head_dim": ("llm.head_dim", language.head_dim),
        "intermediate_size": ("llm.ffn", language.ffn),
        "vocab_size": ("llm.vocab", language.vocab),
        "rms_norm_eps": ("llm.norm_eps", language.norm_eps),
        "rope_theta": ("llm.rope_theta", language.rope_theta),
        "tie_word_embeddings": ("llm.tied", language.tied),
    }
    if architecture == "Qwen3ForCausalLM":
        expected["attention_bias"] = ("llm.qkv_bias", language.qkv_bias)
    check_values(whole, expected, key, given)


def _check_norms(architecture: str, language: LLMConfig, key: str) -> None:
    """Qwen3's class alone has norms of queries and keys."""
    has = architecture == "Qwen3ForCausalLM"
    if has != language.qk_norm:
        setting = f"llm.qk_norm={str(language.qk_norm).lower()}"
        fix = f"llm.qk_norm={str(has).lower()}, or an llm= of this kind"
        raise problem(f"{key}: config.json: architectures", architecture, f"a model with {setting}", fix)


def _check_window(window: int | None, language: LLMConfig, key: str) -> None:
    if window is not None and language.positions > window:  # up to its length, a sliding window changes nothing
        got = f"{window} with llm.max_positions={language.max_positions}"
        expected = "null, or at least as many positions: no sliding window is built"
        raise problem(f"{key}: config.json: sliding_window", got, expected, f"llm.max_positions={window}")


def _rope(values: Mapping, key: str) -> Mapping:
    """What is said of rotary positions: newer files have `rope_parameters`, older ones `rope_scaling`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        known = "one rotary embedding for all layers"
        raise problem(f"{key}: config.json: rope_scaling", rope, known, "take another model")
    return rope


def _theta(values: Mapping, key: str) -> float | None:
    places = (_rope(values, key), values.get("rope_parameters") or {}, values)
    stated = [*dict.fromkeys(place["rope_theta"] for place in places if place.get("rope_theta") is not None)]
    if len(stated) > 1:
        fix = "keep the one that the model was trained with"
        raise problem(f"{key}: config.json: rope_theta", " and ".join(map(str, stated)), "one value", fix)
    return stated[0] if stated else None


def _check_scaling(values: Mapping, positions: int, language: LLMConfig, key: str) -> None:
    rope, what = _rope(values, key), f"{key}: config.json: rope_scaling"
    check_fixed(rope, {"partial_rotary_factor": 1, "mrope_section": None}, key)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "dynamic", "linear", "llama3"):
        raise problem(what, repr(kind), "default, dynamic, linear or llama3", "take another model")
    # A model without interpolation may learn it: the run says so itself.
    if kind == "linear" and (factor := _factor(rope, what)) != language.rope_interpolation:
        setting = f"llm.rope_interpolation={language.rope_interpolation:g}"
        raise problem(what, f"linear by {factor:g}", setting, f"llm.rope_interpolation={factor:g}")
    if kind == "dynamic" and language.max_positions > positions:  # within them it changes nothing
        got = f"dynamic with llm.max_positions={language.max_positions}"
        expected = f"at most {positions} positions, within which it changes nothing"
        raise problem(what, got, expected, f"llm.max_positions={positions}")
    scaling = _llama3(rope, what) if kind == "llama3" else None
    if scaling != language.rope_scaling:
        wanted = "null" if scaling is None else "{" + ",".join(f"{k}:{v}" for k, v in scaling.items()) + "}"
        raise problem(what, scaling, f"llm.rope_scaling={language.rope_scaling}", f"'llm.rope_scaling={wanted}'")


def _factor(rope: Mapping, what: str) -> float:
    try:
        return float(rope["factor"])
    except (KeyError, TypeError, ValueError):
        raise problem(what, dict(rope), "a factor", "download it again") from None


def _llama3(rope: Mapping, what: str) -> dict[str, float]:
    try:
        return {name: float(rope[name]) for name in _LLAMA3}
    except (KeyError, TypeError, ValueError):
        raise problem(what, dict(rope), ", ".join(_LLAMA3), "download it again") from None
