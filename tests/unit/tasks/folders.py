"""Small folders of benchmarks in the layouts in which they are published, with their real file names and keys."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(width: int = 8, height: int = 6) -> bytes:
    """A black image's file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


def stored(width: int = 8, path: str | None = None) -> dict:
    """An image as in a Parquet file of the hub."""
    return {"bytes": png(width), "path": path}


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


DOCVQA = {
    "questionId": 337, "question": "what is the date?", "question_types": ["handwritten", "form"],
    "image": "documents/xnbl0037_1.png", "docId": 279, "ucsf_document_id": "xnbl0037", "ucsf_document_page_no": "1",
    "answers": ["1/8/93", "8 January 1993"], "data_split": "val",
}  # fmt: skip
TEXTVQA = {
    "question": "what brand is it?", "image_id": "0054c91397f2fe05", "image_classes": ["Phone"], "image_width": 1024,
    "flickr_original_url": "https://farm1.staticflickr.com/x.jpg", "image_height": 730, "question_id": 34602,
    "answers": [*["nokia"] * 9, "nokía"], "question_tokens": ["what", "brand"], "set_name": "val",
}  # fmt: skip
VQAV2 = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
VQAV2_ANSWERS = {
    "question_type": "none of the above", "multiple_choice_answer": "down", "image_id": 262148,
    "answers": [{"answer": word, "answer_confidence": "yes", "answer_id": n}
                for n, word in enumerate(["down"] * 8 + ["at table", "skateboard"], start=1)],
    "answer_type": "other", "question_id": 262148000,
}  # fmt: skip
OCRBENCH = {
    "dataset_name": "HME100k", "type": "Handwritten Mathematical Expression Recognition", "id": 900,
    "question": "Write out the expression of the formula in the image using LaTeX format.",
    "answers": ["x ^ { 2 }"], "image_path": "HME100k/0.jpg",
}  # fmt: skip
MATHVISTA = {
    "question": "How long is x?", "image": "images/1.jpg", "choices": None, "unit": "cm", "precision": 1.0,
    "answer": "1.2", "question_type": "free_form", "answer_type": "float", "pid": "1",
    "metadata": {"split": "testmini", "task": "geometry problem solving", "source": "Geometry3K"},
}  # fmt: skip
MMMU = {
    "id": "validation_Art_Theory_7", "question": "Who painted <image 1>?", "options": "['Bosch', \"Rubens'\", 'Dou']",
    "explanation": "", "img_type": "['Paintings']", "answer": "B", "topic_difficulty": "Easy",
    "question_type": "multiple-choice", "subfield": "Art History", "image_1": stored(11),
    **{f"image_{n}": None for n in range(2, 8)},
}  # fmt: skip
REALWORLDQA = {
    "question": "Which way?\nA. Left.\nB. Right.\nC. Both.\nPlease answer directly with only the letter of the correct "
    "option and nothing else.",
    "answer": "C",
    "image": stored(),
}
GSM8K = {
    "question": "2 + 2, and 1,000 more?",
    "answer": "2 + 2 = <<2+2=4>>4\n4 + 1,000 = <<4+1000=1004>>1,004\n#### 1,004",
}
MMLU = {"question": "Which is even?", "subject": "abstract_algebra", "choices": ["1", "3", "4", "5"], "answer": 2}


def docvqa(folder: Path, place: str = "", images: str = "documents") -> None:
    rows = [DOCVQA | {"questionId": n} for n in (337, 338, 339)]
    content = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": rows}
    write_json(folder / f"{place}val_v1.0_withQT.json", content)
    write_image(folder / images / "xnbl0037_1.png")


def docvqa_parquet(folder: Path) -> None:
    rows = [DOCVQA | {"questionId": str(n), "image": stored()} for n in (337, 338, 339)]
    write_parquet(folder / "DocVQA/validation-00000-of-00002.parquet", rows[:2])
    write_parquet(folder / "DocVQA/validation-00001-of-00002.parquet", rows[2:])
    write_parquet(folder / "InfographicVQA/validation-00000-of-00001.parquet", rows)


def chartqa(folder: Path) -> None:
    base = folder / "ChartQA Dataset" / "test"
    for kind, label in (("human", "14"), ("augmented", "Yes")):
        rows = [{"imgname": f"{kind}.png", "query": "How many?", "label": label}]
        write_json(base / f"test_{kind}.json", rows)
        write_image(base / "png" / f"{kind}.png")


def chartqa_parquet(folder: Path) -> None:
    rows = [{"image": stored(), "query": "How many?", "label": [label], "human_or_machine": kind}
            for kind, label in ((0, "14"), (1, "Yes"))]  # fmt: skip
    write_parquet(folder / "data/test-00000-of-00001-e2cd0b7a0f9eb20d.parquet", rows)


def textvqa(folder: Path) -> None:
    write_json(
        folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [TEXTVQA], "dataset_version": "0.5.1"}
    )
    write_image(folder / "train_images" / "0054c91397f2fe05.jpg")


def textvqa_parquet(folder: Path) -> None:
    write_parquet(folder / "data/validation-00000-of-00001.parquet", [TEXTVQA | {"image": stored()}])


def vqav2(folder: Path, numbers: tuple[int, ...] = (0, 1, 2), answers: tuple[int, ...] = (0, 1, 2)) -> None:
    questions = [VQAV2 | {"question_id": 262148000 + n} for n in numbers]
    given = [VQAV2_ANSWERS | {"question_id": 262148000 + n} for n in answers]
    info = {"info": {"year": 2017, "tags": ["[", '"questions": [']}, "license": {}, "data_subtype": "val2014"}
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", info | {"questions": questions, "task_type": "x"})
    write_json(folder / "v2_mscoco_val2014_annotations.json", info | {"annotations": given})
    write_image(folder / "val2014" / "COCO_val2014_000000262148.jpg")


def vqav2_parquet(folder: Path) -> None:
    rows = [{**VQAV2, **VQAV2_ANSWERS, "image": stored()}]
    write_parquet(folder / "data/validation-00000-of-00001.parquet", rows)


def ai2d(folder: Path) -> None:
    base = folder / "ai2d"
    for number, label in ((3, False), (4, True), (5, False)):
        question = {
            "abcLabel": label,
            "answerTexts": ["ears", "nose"],
            "correctAnswer": 1,
            "questionId": f"{number}.png-0",
        }
        asked = {"imageName": f"{number}.png", "questions": {"What is A?": question}}
        write_json(base / "questions" / f"{number}.png.json", asked)
        write_image(base / "images" / f"{number}.png")
    write_image(base / "abc_images" / "4.png")
    (base / "ai2d_test_ids.csv").write_text("3\n4\n")


def ai2d_parquet(folder: Path) -> None:
    row = {"question": "What is A?", "options": ["ears", "nose"], "answer": "1", "image": stored()}
    write_parquet(folder / "data/test-00000-of-00001.parquet", [row])


def mmmu(folder: Path) -> None:
    write_parquet(folder / "Art_Theory/validation-00000-of-00001.parquet", [MMMU])
    write_parquet(folder / "Art_Theory/dev-00000-of-00001.parquet", [MMMU | {"id": "dev_Art_Theory_1"}])
    other = MMMU | {
        "id": "validation_Math_2", "question": "Find x.", "options": "[]", "question_type": "open",
        "answer": "['0.5', '1/2']",
    }  # fmt: skip
    write_parquet(folder / "Math/validation-00000-of-00001.parquet", [other])


def ocrbench(folder: Path) -> None:
    write_json(folder / "OCRBench/OCRBench.json", [OCRBENCH])
    write_image(folder / "OCRBench_Images/HME100k/0.jpg")


def ocrbench_parquet(folder: Path) -> None:
    row = {"dataset": "HME100k", "question": OCRBENCH["question"], "question_type": OCRBENCH["type"],
           "answer": OCRBENCH["answers"], "image": stored()}  # fmt: skip
    write_parquet(folder / "data/test-00000-of-00001.parquet", [row])


def mathvista(folder: Path) -> None:
    write_json(folder / "data/testmini.json", {"1": MATHVISTA})
    write_json(folder / "data/query.json", {"1": "Hint: give one decimal place.\nQuestion: How long is x? (Unit: cm)"})
    write_image(folder / "data/images/1.jpg")


def mathvista_parquet(folder: Path) -> None:
    row = MATHVISTA | {"decoded_image": stored(), "query": "Hint: choose.\nQuestion: How long?\nChoices:\n(A) 1\n(B) 2",
                       "choices": ["1", "2"], "question_type": "multi_choice", "answer": "2",
                       "answer_type": "text"}  # fmt: skip
    write_parquet(folder / "data/testmini-00000-of-00001-725687bf7a18d64b.parquet", [row])


def realworldqa(folder: Path) -> None:
    rows = [REALWORLDQA, REALWORLDQA | {"question": "How many?\nPlease answer with a number.", "answer": "0"}]
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows)


def mmlu(folder: Path) -> None:
    for split, count in (("test", 2), ("dev", 5)):
        for subject in ("abstract_algebra", "anatomy"):
            (folder / "data" / split).mkdir(parents=True, exist_ok=True)
            lines = [f'"{subject} {split} {n}, which?",1,3,4,5,{"ABCD"[n % 4]}' for n in range(count)]
            (folder / "data" / split / f"{subject}_{split}.csv").write_text("\n".join(lines) + "\n")


def mmlu_parquet(folder: Path) -> None:
    write_parquet(folder / "all/test-00000-of-00001.parquet", [MMLU])
    write_parquet(folder / "all/dev-00000-of-00001.parquet", [MMLU])
    write_parquet(folder / "anatomy/test-00000-of-00001.parquet", [MMLU])


def gsm8k(folder: Path) -> None:
    base = folder / "grade_school_math/data"
    base.mkdir(parents=True)
    for split in ("train", "test"):
        (base / f"{split}.jsonl").write_text(json.dumps(GSM8K) + "\n")


def gsm8k_parquet(folder: Path) -> None:
    write_parquet(folder / "main/test-00000-of-00001.parquet", [GSM8K])
    write_parquet(folder / "socratic/test-00000-of-00001.parquet", [GSM8K])


FOLDERS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "docvqa": (docvqa, docvqa_parquet),
    "chartqa": (chartqa, chartqa_parquet),
    "textvqa": (textvqa, textvqa_parquet),
    "vqav2": (vqav2, vqav2_parquet),
    "ai2d": (ai2d, ai2d_parquet),
    "mmmu": (mmmu,),
    "ocrbench": (ocrbench, ocrbench_parquet),
    "mathvista": (mathvista, mathvista_parquet),
    "realworldqa": (realworldqa,),
    "mmlu": (mmlu, mmlu_parquet),
    "gsm8k": (gsm8k, gsm8k_parquet),
}
"""By task: functions that write a small folder of it, one for each release."""
