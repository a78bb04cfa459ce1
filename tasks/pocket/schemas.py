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
    ("ai2d", "questions"): datasets.Features(
        {"question": _TEXT, "options": List(_TEXT), "answer": _TEXT, "image": Image()}
    ),
    ("seedbench", "questions"): datasets.Features(
        {
            "answer": _TEXT,
            **dict.fromkeys(("choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type"), _TEXT),
            "question": _TEXT,
            "question_id": _TEXT,
            "question_type_id": Value("int16"),
            "image": List(Image()),
            "segment": List(Value("float64")),
        }
    ),
    ("mmstar", "questions"): datasets.Features(
        {
            "index": Value("int64"),
            "question": _TEXT,
            "image": Image(),
            "answer": _TEXT,
            "category": _TEXT,
            "l2_category": _TEXT,
            "meta_info": {"source": _TEXT, "split": _TEXT, "image_path": _TEXT},
        }
    ),
    ("mmmu", "questions"): datasets.Features(
        {
            **dict.fromkeys(("id", "question", "options", "explanation"), _TEXT),
            **{f"image_{i}": Image() for i in range(1, 8)},
            **dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type", "subfield"), _TEXT),
        }
    ),
    ("realworldqa", "questions"): datasets.Features({"image": Image(), "question": _TEXT, "answer": _TEXT}),
    ("vqav2", "questions"): datasets.Features(
        {
            "question_type": _TEXT,
            "multiple_choice_answer": _TEXT,
            "answers": [{"answer": _TEXT, "answer_confidence": _TEXT, "answer_id": Value("int64")}],
            "image_id": Value("int64"),
            "answer_type": _TEXT,
            "question_id": Value("int64"),
            "question": _TEXT,
            "image": Image(),
        }
    ),
    ("vizwiz", "questions"): datasets.Features(
        {"question_id": _TEXT, "image": Image(), "question": _TEXT, "answers": List(_TEXT), "category": _TEXT}
    ),
    ("docvqa", "questions"): datasets.Features(
        {
            "questionId": _TEXT,
            "question": _TEXT,
            "question_types": List(_TEXT),
            "image": Image(),
            "docId": Value("int64"),
            "ucsf_document_id": _TEXT,
            "ucsf_document_page_no": _TEXT,
            "answers": List(_TEXT),
            "data_split": _TEXT,
        }
    ),
    ("infovqa", "questions"): datasets.Features(
        {
            "questionId": _TEXT,
            "question": _TEXT,
            "answers": List(_TEXT),
            "answer_type": List(_TEXT),
            "image": Image(),
            "image_url": _TEXT,
            "operation/reasoning": List(_TEXT),
            "ocr": _TEXT,
            "data_split": _TEXT,
        }
    ),
    ("chartqa", "questions"): datasets.Features({"type": _TEXT, "question": _TEXT, "answer": _TEXT, "image": Image()}),
    ("hallusionbench", "questions"): datasets.Features(
        {
            **dict.fromkeys(("category", "subcategory", "visual_input", "set_id", "figure_id", "sample_note"), _TEXT),
            **dict.fromkeys(("question_id", "question", "gt_answer_details", "gt_answer", "filename"), _TEXT),
            "image": Image(),
        }
    ),
    ("mathvista", "questions"): datasets.Features(
        {
            "pid": _TEXT,
            "question": _TEXT,
            "image": _TEXT,
            "decoded_image": Image(),
            "choices": List(_TEXT),
            "unit": _TEXT,
            "precision": Value("float64"),
            **dict.fromkeys(("answer", "question_type", "answer_type"), _TEXT),
            "metadata": {
                **dict.fromkeys(("category", "context", "grade"), _TEXT),
                **dict.fromkeys(("img_height", "img_width"), Value("int64")),
                "language": _TEXT,
                "skills": List(_TEXT),
                **dict.fromkeys(("source", "split", "task"), _TEXT),
            },
            "query": _TEXT,
        }
    ),
    ("mmvet", "questions"): datasets.Features(
        {
            "question_id": _TEXT,
            "image": Image(),
            **dict.fromkeys(("question", "answer", "image_source", "capability"), _TEXT),
        }
    ),
    ("llava_bench", "questions"): datasets.Features(
        {
            "question_id": Value("int64"),
            "image": Image(),
            **dict.fromkeys(("question", "caption", "image_id", "gpt_answer", "category"), _TEXT),
        }
    ),
}

_FEATURES |= {
    ("videomme", "questions"): datasets.Features(
        {
            **dict.fromkeys(("video_id", "duration", "domain", "sub_category", "url", "videoID", "question_id"), _TEXT),
            **dict.fromkeys(("task_type", "question"), _TEXT),
            "options": List(_TEXT),
            "answer": _TEXT,
        }
    ),
    ("mvbench", "questions"): datasets.Features(
        {"video": _TEXT, "question": _TEXT, "candidates": List(_TEXT), "answer": _TEXT}
    ),
    ("video_qa", "questions"): datasets.Features(
        dict.fromkeys(("video_name", "question_id", "question", "answer"), _TEXT)
    ),
}
_MMBENCH = datasets.Features(
    {
        "index": Value("int64"),
        **dict.fromkeys(("question", "hint", "answer", "A", "B", "C", "D", "category"), _TEXT),
        "image": Image(),
        **dict.fromkeys(("source", "L2-category", "comment", "split"), _TEXT),
    }
)
_FEATURES["mmbench_en", "questions"] = _FEATURES["mmbench_cn", "questions"] = _MMBENCH
