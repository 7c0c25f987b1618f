"""Make nvlm/data/text/tiny_tokenizer/tokenizer.json: a byte-level BPE of a few hundred tokens for the tiny preset.

Any UTF-8 text round-trips. Digits never merge, and a tile tag is always three tokens: <tile_ 3 >.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nvlm.data.sources.page_questions import KINDS, ask

VOCABULARY = 512  # an upper limit: so small a corpus has fewer merges
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
TAGS = [
    *(f"<tile_{k}>" for k in range(1, 10)),
    "<tile_global_thumbnail>",
    "<tile_global>",
    *(f"<tile_x{c}_y{r}>" for c in range(6) for r in range(6)),
    "<box> (0, 0), (999, 999) </box>",
]
# The start of a tag or of <Image>, a word, one digit, other characters, angle brackets, white space.
PIECES = r"</?[A-Za-z]+_?| ?[A-Za-z_]+|[0-9]| ?[^\sA-Za-z0-9_<>]+|[<>]|\s+"
TARGET = Path(__file__).parent.parent / "nvlm" / "data" / "text" / "tiny_tokenizer" / "tokenizer.json"


def corpus() -> list[str]:
    """Text whose words should become tokens: the built-in questions, the roles and the tags."""
    rng = np.random.default_rng(0)
    questions = [ask(kind, rng.integers(10, size=(2, 3)), rng)[0] for kind in KINDS for _ in range(50)]
    return questions + TAGS + ["system\n", "user\n", "assistant\n", "<Image></Image>\n"]


def main() -> None:
    """Train and write the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    TARGET.parent.mkdir(exist_ok=True)
    tokenizer.save(str(TARGET))
    lengths = {len(tokenizer.encode(tag).ids) for tag in TAGS[:11]}
    print(f"{tokenizer.get_vocab_size()} tokens; a 1-D tag is {lengths} tokens")


if __name__ == "__main__":
    main()
