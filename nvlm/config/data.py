"""Sources of records, and how records are packed into rows.

Each source has a schema here, a module in nvlm/data that reads its records, and conf/data/NAME.yaml. By convention,
`path` is the location of its training records: it may change when a run is resumed, but the content may not. Keys that
start with heldout_ do not affect training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nvlm.config.fields import Choice, Count, FilePath, Location, Natural, Positive, Range, Tag, Take, Text

IMAGE_MARK = "<image>"  # marks the place of an image in a message
TASKS = ("caption", "vqa", "choice", "ocr", "grounded_ocr", "referring", "transcription", "math")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """The built-in task: pages of handwritten digits, as a picture, as text, or each digit on one of several pictures,
    with questions or in a document. `about`: what is asked: tiles by their tags, or positions, in words that no tag
    contains (nvlm.data.sources.page_questions)."""

    source: Annotated[str, Choice("pages")]
    form: Annotated[str, Choice("picture", "text", "pictures", "document")] = "picture"
    about: Annotated[str, Choice("tags", "positions")] = "tags"
    records: Count
    heldout_records: Count
    questions: Annotated[int, Range(1, 12)]  # per page

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out records."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Colours:
    """The built-in task of learning in context: so many `pictures` of so many `colours`, each followed by the word that
    the record gives to its colour; in the form "text", a letter stands in for each picture. Held-out records ask for
    the last word, after `shots` pictures with words."""

    source: Annotated[str, Choice("colours")]
    form: Annotated[str, Choice("picture", "text")] = "picture"
    records: Count
    heldout_records: Count
    pictures: Count = 6
    colours: Annotated[int, Range(1, 7)] = 2
    shots: Natural = 4

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out records."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Files of records. `path`, `heldout_path`: a file, a folder or a glob; `root`: the folder of the images, None: the
    files' own; `take`: which of the records are used (nvlm.data.order.taken)."""

    path: Annotated[str, FilePath(needed="a file, a folder or a glob", example="FILE")] | None = None
    heldout_path: Location | None = None
    root: Location | None = None
    take: Annotated[str, Take()] = "all"

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out records."""
        return self.heldout_path is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFiles(Files):
    """Files of rows that are conversations, or with `task` plain columns of which questions are made."""

    task: Annotated[str, Choice(*TASKS)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Jsonl(TaskFiles):
    """JSON objects, one per line or in one list."""

    source: Annotated[str, Choice("jsonl")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Llava(Files):
    """LLaVA's files: JSON objects with conversations, one per line or in one list, read as by `Jsonl`."""

    source: Annotated[str, Choice("llava")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(Files):
    """Texts without roles or images, in JSON, Parquet or plain text files."""

    source: Annotated[str, Choice("text")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents(Files):
    """Documents of texts and images in order, in JSON or Parquet files. `most_images`: of each, the first ones."""

    most_images: Count = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Obelics(Documents):
    """Documents in OBELICS' form."""

    source: Annotated[str, Choice("obelics")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mmc4(Documents):
    """Documents in MMC4's form."""

    source: Annotated[str, Choice("mmc4")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parquet(TaskFiles):
    """Parquet files, a row per record."""

    source: Annotated[str, Choice("parquet")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasets(TaskFiles):
    """Folders that `save_to_disk` of the library datasets wrote, a row per record."""

    source: Annotated[str, Choice("datasets")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Webdataset(TaskFiles):
    """Tar files in WebDataset's layout, a sample per record."""

    source: Annotated[str, Choice("webdataset")]


Generated = Pages | Colours
FileSource = Jsonl | Llava | Texts | Obelics | Mmc4 | Parquet | Datasets | Webdataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One source of a blend, and how often its records are drawn: by `weight`, relative to the other sources', or
    `epochs` times in one pass of the blend. `text_only`: a record with an image is refused."""

    source: Annotated[Generated | FileSource, Tag("source")]
    weight: Positive | None = None
    epochs: Positive | None = None
    text_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """Several sources by name. `text_share`: the share of draws from those that are text_only; None: by their weights.
    `mixing`: records of all sources in every step, or one source per step."""

    source: Annotated[str, Choice("blend")]
    sources: dict[str, Part] | None = field(hash=False)
    text_share: Annotated[float, Range(above=0, below=1, example=0.2)] | None
    mixing: Annotated[str, Choice("records", "steps")]

    @property
    def has_heldout(self) -> bool:
        """Whether any source has held-out records."""
        return any(part.source.has_heldout for part in (self.sources or {}).values())


Source = Annotated[Generated | FileSource | Blend, Tag("source")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """A source of records, whose keys are at the same level as these, and limits on packed rows."""

    source: Source
    seq_length: Count  # tokens: maximum length of a sample
    cross_length: Natural  # maximum number of cross-attended tokens per row
    row_length: Count  # tokens: rows are filled up to this length; a longer sample gets a row of its own
    system: Annotated[str, Text(without=IMAGE_MARK)] | None
    image_marks: bool = True  # `<Image>` and `</Image>` around each image, as in NVLM; LLaVA and VILA have none
    tokenize: Annotated[str, Choice("apart", "joined", "vllm")]  # how text and tags become tokens: nvlm.data.text.chat
    # The share of records with several images that all go in front, words standing in at their places:
    images_first: Annotated[float, Range(0, 1)] = 0.0
    workers: Natural
    max_skipped: Annotated[float, Range(0, 1)]
    max_pixels: Annotated[int, Range(1, example=50_000_000)]
    window: Count  # number of steps whose records are packed together
    index: Location | None = None  # a folder that launch/prepare.py wrote for these records
