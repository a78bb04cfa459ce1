"""The pocket editions have the published columns, and are the same every time."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pruneval import tasks
from pruneval.harness.errors import UserError
from pruneval.tasks.pocket import editions, world

S, B, I8, I16, I32, I64 = pa.string(), pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64()
F64 = pa.float64()
IMAGE = pa.struct([("bytes", pa.binary()), ("path", S)])
TEXTS = pa.list_(S)
GROUNDING = pa.list_(pa.struct([("objectId", S), ("value", S)]))
STEP = pa.struct([("operation", S), ("argument", S), ("dependencies", pa.list_(I32))])

MMBENCH = {
    "index": I64, "question": S, "hint": S, "answer": S, "A": S, "B": S, "C": S, "D": S, "category": S, "image": IMAGE,
    "source": S, "L2-category": S, "comment": S, "split": S,
}  # fmt: skip
PUBLISHED = {
    ("mme", "test"): {"question_id": S, "image": IMAGE, "question": S, "answer": S, "category": S},
    ("pope", "test"): {
        "id": S, "question_id": S, "question": S, "answer": S, "image_source": S, "image": IMAGE, "category": S,
    },
    ("gqa", "images"): {"id": S, "image": IMAGE},
    ("gqa", "testdev"): {
        "id": S, "imageId": S, "question": S, "answer": S, "fullAnswer": S, "isBalanced": B,
        "groups": pa.struct([("global", S), ("local", S)]), "entailed": S, "equivalent": S,
        "types": pa.struct([("structural", S), ("semantic", S), ("detailed", S)]),
        "annotations": pa.struct([("question", GROUNDING), ("answer", GROUNDING), ("fullAnswer", GROUNDING)]),
        "semantic": pa.list_(STEP), "semanticStr": S,
    },
    ("scienceqa", "test"): {
        "image": IMAGE, "question": S, "choices": TEXTS, "answer": I8, "hint": S, "task": S, "grade": S, "subject": S,
        "topic": S, "category": S, "skill": S, "lecture": S, "solution": S,
    },
    ("textvqa", "validation"): {
        "image_id": S, "question_id": I32, "question": S, "question_tokens": TEXTS, "image": IMAGE, "image_width": I32,
        "image_height": I32, "flickr_original_url": S, "flickr_300k_url": S, "answers": TEXTS, "image_classes": TEXTS,
        "set_name": S, "ocr_tokens": TEXTS,
    },
    ("mmbench_en", "dev"): MMBENCH,
    ("mmbench_cn", "dev"): MMBENCH,
    ("ai2d", "test"): {"question": S, "options": TEXTS, "answer": S, "image": IMAGE},
    ("seedbench", "test"): {
        "answer": S, "choice_a": S, "choice_b": S, "choice_c": S, "choice_d": S, "data_id": S, "data_type": S,
        "question": S, "question_id": S, "question_type_id": I16, "image": pa.list_(IMAGE), "segment": pa.list_(F64),
    },
    ("mmstar", "val"): {
        "index": I64, "question": S, "image": IMAGE, "answer": S, "category": S, "l2_category": S,
        "meta_info": pa.struct([("source", S), ("split", S), ("image_path", S)]),
    },
    ("mmmu", "validation"): {
        "id": S, "question": S, "options": S, "explanation": S, **{f"image_{i}": IMAGE for i in range(1, 8)},
        "img_type": S, "answer": S, "topic_difficulty": S, "question_type": S, "subfield": S,
    },
    ("realworldqa", "test"): {"image": IMAGE, "question": S, "answer": S},
    ("vqav2", "validation"): {
        "question_type": S, "multiple_choice_answer": S,
        "answers": pa.list_(pa.struct([("answer", S), ("answer_confidence", S), ("answer_id", I64)])),
        "image_id": I64, "answer_type": S, "question_id": I64, "question": S, "image": IMAGE,
    },
    ("vizwiz", "val"): {"question_id": S, "image": IMAGE, "question": S, "answers": TEXTS, "category": S},
    ("docvqa", "validation"): {
        "questionId": S, "question": S, "question_types": TEXTS, "image": IMAGE, "docId": I64, "ucsf_document_id": S,
        "ucsf_document_page_no": S, "answers": TEXTS, "data_split": S,
    },
    ("infovqa", "validation"): {
        "questionId": S, "question": S, "answers": TEXTS, "answer_type": TEXTS, "image": IMAGE, "image_url": S,
        "operation/reasoning": TEXTS, "ocr": S, "data_split": S,
    },
    ("chartqa", "test"): {"type": S, "question": S, "answer": S, "image": IMAGE},
    ("hallusionbench", "image"): {
        "category": S, "subcategory": S, "visual_input": S, "set_id": S, "figure_id": S, "sample_note": S,
        "question_id": S, "question": S, "gt_answer_details": S, "gt_answer": S, "filename": S, "image": IMAGE,
    },
    ("mathvista", "testmini"): {
        "pid": S, "question": S, "image": S, "decoded_image": IMAGE, "choices": TEXTS, "unit": S, "precision": F64,
        "answer": S, "question_type": S, "answer_type": S,
        "metadata": pa.struct(
            [("category", S), ("context", S), ("grade", S), ("img_height", I64), ("img_width", I64), ("language", S),
             ("skills", TEXTS), ("source", S), ("split", S), ("task", S)]
        ),
        "query": S,
    },
    ("mmvet", "test"): {"question_id": S, "image": IMAGE, "question": S, "answer": S, "image_source": S,
                        "capability": S},
    ("videomme", "test"): {
        "video_id": S, "duration": S, "domain": S, "sub_category": S, "url": S, "videoID": S, "question_id": S,
        "task_type": S, "question": S, "options": TEXTS, "answer": S,
    },
    ("mvbench", "moving_direction"): {"video": S, "question": S, "candidates": TEXTS, "answer": S},
    ("video_qa", "test"): {"video_name": S, "question_id": S, "question": S, "answer": S},
    ("llava_bench", "train"): {
        "question_id": I64, "image": IMAGE, "question": S, "caption": S, "image_id": S, "gpt_answer": S, "category": S,
    },
}  # fmt: skip
"""Columns and arrow types of the data sets on the hub."""


POCKET = [row for row in tasks.benchmarks().values() if row.edition == "pocket"]


def table(name: str, part: str) -> pa.Table:
    return pq.read_table(editions.ensure(name) / f"{part}.parquet")


@pytest.mark.parametrize(("name", "part"), PUBLISHED)
def test_columns_and_types_are_the_published_ones(name: str, part: str):
    schema = table(name, part).schema
    found = [(field.name, field.type) for field in schema]
    wanted = list(PUBLISHED[name, part].items())
    assert [column for column, _ in found] == [column for column, _ in wanted]
    for (column, kind), (_, expected) in zip(found, wanted, strict=True):
        assert _plain(kind) == _plain(expected), column


def _plain(kind: pa.DataType) -> object:
    """An arrow type without the names of list items and the order of struct fields' metadata."""
    if pa.types.is_list(kind):
        return ("list", _plain(kind.value_type))
    if pa.types.is_struct(kind):
        return ("struct", [(field.name, _plain(field.type)) for field in kind])
    return kind


def test_each_row_says_how_many_questions_there_are():
    for row in POCKET:
        tables = [table(row.dataset, part) for part in row.parts or (row.split,)]
        for column, wanted in row.only.items():
            tables = [each.filter(pc.is_in(each[column], pa.array(wanted))) for each in tables]
        rows = sum(each.num_rows for each in tables)
        assert row.n == rows >= (200 if row.name in tasks.suite("pocket") else 60)


@pytest.mark.parametrize("name", editions.names())
def test_an_edition_is_the_same_every_time(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    folder = editions.ensure(name)
    assert editions.ensure(name) == folder
    manifest = json.loads((folder / "manifest.json").read_text())
    monkeypatch.setenv("PRUNEVAL_DATA", str(tmp_path))
    again = editions.ensure(name)
    assert again != folder
    assert json.loads((again / "manifest.json").read_text()) == manifest
    for part in set(manifest["rows"]) - {"videos"}:
        assert pq.read_table(again / f"{part}.parquet").equals(pq.read_table(folder / f"{part}.parquet"))
    assert sorted(path.name for path in again.parent.iterdir()) == [name], "drafts were left behind"


def test_the_content_is_pinned():
    for row in POCKET:
        manifest = json.loads((editions.ensure(row.dataset) / "manifest.json").read_text())
        assert row.revision == manifest["digest"], f"{row.name}: the world has changed; so must its row's revision"


def test_every_edition_has_a_row_and_every_column_its_task_reads():
    assert {row.dataset for row in POCKET} == set(editions.names())
    for row in POCKET:
        assert set(row.columns) <= set(table(row.dataset, (*row.parts, row.split)[0]).column_names)


def test_every_question_about_a_video_has_its_file():
    for row in POCKET:
        if row.videos:
            folder = editions.ensure(row.dataset)
            rows = [one for part in row.parts or (row.split,) for one in table(row.dataset, part).to_pylist()]
            paths = {folder / row.video_path(one) for one in rows}
            assert all(path.is_file() or path.with_suffix(".mp4").is_file() for path in paths)


def test_the_digest_sees_a_changed_picture_and_not_a_changed_bit():
    drawn = editions.rows("pope")
    before = editions.digest(drawn)
    drawn["test"][7]["image"][0, 0, 0] ^= 1
    assert editions.digest(drawn) == before
    drawn["test"][7]["image"][:32, :32] = 255
    assert editions.digest(drawn) != before


def test_stored_pictures_are_the_drawn_ones():
    drawn = editions.rows("pope")["test"]
    for index, stored in enumerate(table("pope", "test").slice(0, 5).column("image").to_pylist()):
        picture = np.asarray(Image.open(io.BytesIO(stored["bytes"])))
        assert picture.shape == (world.SIZE, world.SIZE, 3)
        assert (picture == drawn[index]["image"]).all()


def test_mme_asks_pairs_and_any_first_part_has_every_category():
    rows = editions.rows("mme")["test"]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["question_id"] == second["question_id"]
        assert (first["answer"], second["answer"]) == ("Yes", "No")
        assert (first["image"] == second["image"]).all()
        assert first["question"] != second["question"]
        assert first["question"].endswith(" Please answer yes or no.")
    assert len({row["question_id"] for row in rows}) == len(rows) // 2
    assert len({row["category"] for row in rows[:12]}) == 6
    assert set(Counter(row["category"] for row in rows).values()) == {40}


def test_pope_is_balanced_in_each_of_its_three_samplings():
    rows = editions.rows("pope")["test"]
    assert Counter((row["category"], row["answer"]) for row in rows) == {
        (category, answer): 40 for category in ("adversarial", "popular", "random") for answer in ("yes", "no")
    }


def test_gqa_questions_point_to_images_that_exist():
    tables = editions.rows("gqa")
    images = [row["id"] for row in tables["images"]]
    assert len(set(images)) == len(images)
    assert {row["imageId"] for row in tables["testdev"]} == set(images)
    assert len({row["id"] for row in tables["testdev"]}) == 240


def test_scienceqa_answers_are_choices_and_every_letter_is_right_at_times():
    rows = editions.rows("scienceqa")["test"]
    for row in rows:
        assert 2 <= len(row["choices"]) <= 4
        assert len(set(row["choices"])) == len(row["choices"])
        assert row["solution"].endswith(f" {row['choices'][row['answer']]}.")
    assert min(Counter(row["answer"] for row in rows).values()) > 10


def test_textvqa_has_ten_people_most_of_whom_agree():
    for row in editions.rows("textvqa")["validation"]:
        assert len(row["answers"]) == 10
        answer, votes = Counter(row["answers"]).most_common(1)[0]
        assert votes >= 7
        assert answer in row["ocr_tokens"]


def test_scenes_are_never_those_of_training(monkeypatch: pytest.MonkeyPatch):
    from pruneval.tasks.pocket import clips, world

    splits = Counter()

    def spy(real):
        def draw(rng, split, *more):
            splits[split] += 1
            return real(rng, split, *more)

        return draw

    real = (world.draw, clips.draw)
    for name, module in list(sys.modules.items()):
        if name.startswith("pruneval.tasks.pocket.") and getattr(module, "draw", None) in real:
            monkeypatch.setattr(module, "draw", spy(module.draw))
    for name in editions.names():
        before = splits.total()
        editions.rows(name)
        assert splits.total() > before or name == "chartqa", name  # charts are no scenes
    assert set(splits) == {"test", "heldout"}


def test_an_unknown_edition_and_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path):
    with pytest.raises(UserError, match="unknown pocket edition 'popes'; did you mean 'pope'"):
        editions.ensure("popes")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNEVAL_DATA", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set PRUNEVAL_DATA"):
        editions.ensure("pope")
