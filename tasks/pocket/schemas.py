"""The columns of the published data sets, so that an edition can stand in for any of them."""

from __future__ import annotations

import datasets
from datasets import Image, List, Value


def features(edition: str, table: str) -> datasets.Features:
    """Column types of one table of an edition, as on the hub."""
    return _FEATURES[edition, "images" if table == "images" else "questions"]


_TEXT = Value("string")
_GROUNDING = [{"objectId": _TEXT, "value": _TEXT}]

_FEATURES = {
    ("mme", "questions"): datasets.Features(
        {"question_id": _TEXT, "image": Image(), "question": _TEXT, "answer": _TEXT, "category": _TEXT}
    ),
    ("pope", "questions"): datasets.Features(
        {
            "id": _TEXT,
            "question_id": _TEXT,
            "question": _TEXT,
            "answer": _TEXT,
            "image_source": _TEXT,
            "image": Image(),
            "category": _TEXT,
        }
    ),
    ("gqa", "images"): datasets.Features({"id": _TEXT, "image": Image()}),
    ("gqa", "questions"): datasets.Features(
        {
            "id": _TEXT,
            "imageId": _TEXT,
            "question": _TEXT,
            "answer": _TEXT,
            "fullAnswer": _TEXT,
            "isBalanced": Value("bool"),
            "groups": {"global": _TEXT, "local": _TEXT},
            "entailed": _TEXT,
            "equivalent": _TEXT,
            "types": {"structural": _TEXT, "semantic": _TEXT, "detailed": _TEXT},
            "annotations": {"question": _GROUNDING, "answer": _GROUNDING, "fullAnswer": _GROUNDING},
            "semantic": [{"operation": _TEXT, "argument": _TEXT, "dependencies": List(Value("int32"))}],
            "semanticStr": _TEXT,
        }
    ),
    ("scienceqa", "questions"): datasets.Features(
        {
            "image": Image(),
            "question": _TEXT,
            "choices": List(_TEXT),
            "answer": Value("int8"),
            "hint": _TEXT,
            "task": _TEXT,
            "grade": _TEXT,
            "subject": _TEXT,
            "topic": _TEXT,
            "category": _TEXT,
            "skill": _TEXT,
            "lecture": _TEXT,
            "solution": _TEXT,
        }
    ),
    ("textvqa", "questions"): datasets.Features(
        {
            "image_id": _TEXT,
            "question_id": Value("int32"),
            "question": _TEXT,
            "question_tokens": List(_TEXT),
            "image": Image(),
            "image_width": Value("int32"),
            "image_height": Value("int32"),
            "flickr_original_url": _TEXT,
            "flickr_300k_url": _TEXT,
            "answers": List(_TEXT),
            "image_classes": List(_TEXT),
            "set_name": _TEXT,
            "ocr_tokens": List(_TEXT),
        }
    ),
}
