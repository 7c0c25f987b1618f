"""The page: one safe file, the numbers where they belong, and what is refused before a model is read."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.explain.check import check_explains
from nvlm.explain.looks import Looks, Tile, Token, from_mapping, to_mapping
from nvlm.explain.page import MOST_TOKENS, Asked, page
from nvlm.inspect.pictures import Picture

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
PICTURE = Picture("data:image/jpeg;base64,AAAA", (300, 200), 3, 2, (), 0)


def looks_with(tokens: int = 2, thumbnail: bool = False, text: str = "7", images: int = 1) -> Looks:
    """Random numbers: the first token reads mostly tile 5 of the first image."""
    rng = np.random.default_rng(0)
    tiles = [Tile(image, tile, f"<tile_{tile + 1}>") for image in range(images) for tile in range(6 + thumbnail)]
    attention = rng.random((2, tokens, len(tiles)))
    attention[:, 0, 4] = 40
    attention /= attention.sum(-1, keepdims=True)
    return Looks(
        arch="NVLM-H",
        tokens=tuple(Token(text, number, 0.875) for number in range(tokens)),
        grids=((3, 2),) * images,
        tiles=tuple(tiles),
        layers=(4, 8),
        gates=np.array([0.3, -0.1]),
        attention=attention,
        tags=attention / 10,
        strength=attention / 2,
        effect=np.log(np.full((tokens, len(tiles)), 7.0)),
    )


class Read(HTMLParser):
    """What a browser would load or run, and each table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.loaded, self.ids, self.links, self.overlays, self.texts = [], [], set(), [], [], []
        self.in_tile = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.loaded += [values[name] for name in ("src", "data", "action", "poster", "srcset") if name in values]
        self.loaded += [name for name in values if name.startswith("on")]
        self.links += [values["href"]] if "href" in values else []
        self.ids |= {values["id"]} if "id" in values else set()
        if "overlay" in values.get("class", ""):
            self.overlays.append([])
        self.in_tile = tag == "i"

    def handle_data(self, text):
        self.texts.append(text)
        if self.in_tile:
            self.overlays[-1].append(text)
            self.in_tile = False


def shown(looks: Looks, question: str = "?", pictures: int = 1) -> tuple[str, Read]:
    text = page(looks, Asked("runs/x", question, "7", [PICTURE] * pictures), "x.looks.json")
    return text, Read(text)


def test_texts_stay_texts_and_nothing_is_loaded():
    looks = looks_with(text=HOSTILE)
    text, read = shown(replace(looks, tiles=(Tile(0, 0, HOSTILE), *looks.tiles[1:])), HOSTILE)
    assert "script" not in read.tags and "img" not in read.tags and not read.loaded
    assert not re.search(r"@import|https?:|javascript:", text)
    assert re.findall(r"url\(([^)]*)\)", text) == [PICTURE.url]
    assert any(HOSTILE in text for text in read.texts) and {link.removeprefix("#") for link in read.links} <= read.ids


def test_a_tile_s_share_stands_on_the_tile():
    looks = looks_with()
    _, read = shown(looks)
    attention, hidden, *_ = read.overlays
    assert len(attention) == len(hidden) == 6
    assert max(attention, key=lambda text: float(text.strip("%"))) == attention[4] == f"{looks.gated[0, 4]:.1%}"
    assert set(hidden) == {"12.5%"}  # 87.5% / 7


@pytest.mark.parametrize("images", [1, 2])
def test_a_thumbnail_stands_beside_its_picture(images):
    _, read = shown(looks_with(thumbnail=True, images=images), pictures=images)
    assert [len(overlay) for overlay in read.overlays[: 4 * images]] == [6, 1] * 2 * images
    assert "thumbnail" in read.texts


def test_layers_are_averaged_by_the_size_of_their_gates():
    looks = looks_with()
    assert np.allclose(looks.gated, 0.75 * looks.attention[0] + 0.25 * looks.attention[1])
    assert (replace(looks, gates=np.zeros(2)).gated == 0).all()


def test_a_long_answer_has_a_page_of_limited_size():
    text, read = shown(looks_with(tokens=400))
    assert len([name for name in read.ids if re.fullmatch(r"token-\d+", name)]) == MOST_TOKENS
    assert "and 300 more tokens" in text and len(text) < 2_500_000


def test_a_damaged_file_of_values_is_refused():
    values = to_mapping(looks_with())
    with pytest.raises(ValueError, match="version 9"):
        from_mapping(values | {"version": 9})
    with pytest.raises(ValueError):
        from_mapping(values | {"attention": values["attention"][:1]})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["arch=decoder"], "explain: got NVLM-D, expected NVLM-X or NVLM-H: NVLM-D has no cross-attention"),
        (["arch=hybrid", "parallel.pipeline=2"], "Fix: parallel.pipeline=1 parallel.tensor=2"),
    ],
)
def test_what_cannot_be_explained_is_refused(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_explains(compose_config(*words))
    check_explains(compose_config("arch=xattn", "parallel.tensor=2"))
