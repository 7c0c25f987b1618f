"""What learns and how fast: rates of module groups, and what is refused."""

from __future__ import annotations

import pytest

from nvlm.config.values import ConfigError

VISION = "stage.train_vision=true"


def test_a_group_s_rate_falls_to_the_same_share(configured):
    optim = configured(VISION, "optim.lr=1e-3", "optim.min_lr=1e-4", "optim.lr_of.vision=2e-6").optim
    assert optim.rates("vision") == pytest.approx((2e-6, 2e-7))
    assert optim.rates("llm") == (1e-3, 1e-4)


def test_the_encoder_learns_where_the_stage_says_so(configured):
    assert "vision" not in configured().stage.trainable
    alone = ("stage.train_llm=false", "stage.train_xattn=false", "stage.train_projector=false")
    assert configured(VISION, *alone).stage.trainable == ("vision",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("optim.lr_of.vision=2e-6",),
            "optim.lr_of.vision: got a rate of a group that stage=sft leaves as it is, expected a group that this "
            "stage trains (llm, projector, xattn). Fix: optim.lr_of.vision=null",
        ),
        (
            ("arch=decoder", "optim.lr_of.xattn=2e-6"),  # NVLM-D has none
            "Fix: optim.lr_of.xattn=null",
        ),
        ((VISION, "optim.lr_of.vision=0"), "optim.lr_of.vision: got 0.0, expected above 0. Fix: optim.lr_of.vision="),
        (
            (VISION, "precision=fp8_current", "precision.encoder=true"),
            "precision.encoder: got True, expected false where the encoder learns: it is trained in bf16. "
            "Fix: precision.encoder=false, or stage.train_vision=false",
        ),
    ],
)
def test_what_cannot_be_is_refused(configured, words, message):
    with pytest.raises(ConfigError) as caught:
        configured(*words)
    assert message in str(caught.value)
