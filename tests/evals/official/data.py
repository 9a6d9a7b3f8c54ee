"""Hand-made files in each official format, answers to them, and the score that the official rules give.

A `Case` has few questions, each there for a rule: the comment beside it says which.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(color: str = "red") -> bytes:
    out = BytesIO()
    Image.new("RGB", (24, 24), color).save(out, "PNG")
    return out.getvalue()


def put(path: Path, content: Any) -> None:
    """Bytes, text, an object as JSON, or a list of lines as JSONL for a name that ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, "utf-8")
    else:
        lines = content if path.suffix == ".jsonl" or path.name.startswith("coco_pope") else [content]
        path.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        put(folder / name, picture())


@dataclass(frozen=True)
class Case:
    """`write` makes the files; `answers` are those of a model in the order of the questions; `scores` what each is worth. `prompts`
    are the first questions as they are sent; `groups`, `figures` and `files` what a run reports and writes."""

    write: Callable[[Path], None]
    answers: list[str]
    scores: list[float]
    prompts: list[str]
    groups: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    split: str | None = None


# ---- VQAv2 and OK-VQA


def people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number, answer in enumerate(answers, 1)]


VQA = [
    # question, what ten people answered, the model's answer, its accuracy
    ("What is it?", ["dog"] * 10, "A dog.", 1.0),  # article, period, case: LLaVA prepares answers before the server sees them
    ("What is he?", ["man", *["boy"] * 9], "man", 0.3),  # one of ten: 9/10 x 1/3
    ("And she?", ["girl"] * 2 + ["woman"] * 8, "girl", 0.6),  # two of ten: 2/10 x 1/3 + 8/10 x 2/3
    ("And they?", ["kids"] * 3 + ["children"] * 7, "kids", 0.9),  # three of ten: 3/10 x 2/3 + 7/10
    ("How many?", ["2"] * 9 + ["two"], "Two", 1.0),  # numbers as words, on either side
    ("How many birds?", ["none"] * 4 + ["0"] * 4 + ["lots"] * 2, "zero", 1.0),
    ("Is it his?", ["dont know"] * 6 + ["don't know"] * 4, "I don't know", 0.0),  # all words count
    ("Does he know?", ["doesnt"] * 6 + ["no"] * 4, "doesn't", 1.0),  # apostrophes come back
    ("What does it cost?", ["1,000"] * 5 + ["1000 dollars"] * 5, "1,000", 1.0),  # a comma in a number goes
    ("What time is it?", ["10:30"] * 8 + ["10.30"] * 2, "10:30", 1.0),  # a colon stays
    ("What is it made of?", ["t-shirt"] * 5 + ["t shirt"] * 5, "T-shirt", 1.0),  # a hyphen becomes a blank
    ("Whose is it?", ["man's"] * 10, "man's", 0.0),  # LLaVA's preparation splits 's off, the server does not: they differ
    ("What does it say?", ["The Yes!"] * 10, "the yes", 0.0),  # where all people agree, nothing is normalised
]


def write_vqa(questions: str, annotations: str, data: Path) -> None:
    asked = [{"question_id": 10 + n, "image_id": n // 2, "question": text} for n, (text, *_) in enumerate(VQA)]
    answered = [
        {"question_id": 10 + n, "image_id": n // 2, "question_type": "one", "answer_type": "other", "answers": people(*answers)}
        for n, (_, answers, *_) in enumerate(VQA)
    ]
    put(data / questions, {"data_type": "mscoco", "data_subtype": "val2014", "questions": asked})
    put(data / annotations, {"annotations": answered[::-1], "question_types": {"one": "Animals"}})
    pictures(data / "val2014", *(f"COCO_val2014_{n:012d}.jpg" for n in range(len(VQA))))


def vqa_case(questions: str, annotations: str) -> Case:
    return Case(
        lambda data: write_vqa(questions, annotations, data),
        answers=[answer for _, _, answer, _ in VQA], scores=[score for *_, score in VQA],
        prompts=["What is it?" + SHORT], groups={"question: Animals": sum(score for *_, score in VQA) / len(VQA)},
        files={"upload.json": [{"question_id": 10, "answer": "dog"}, {"question_id": 11, "answer": "man"}]},
    )  # fmt: skip


# ---- TextVQA: the same accuracy, prepared on both sides

TEXTVQA = [
    ("What brand is it?", ["Canon"] * 5 + ["the canon"] * 5, "Canon.", 1.0),
    ("Whose shop?", ["joe's"] * 10, "Joe's", 1.0),  # unlike on VQA's server, both sides are prepared
    ("What number?", ["four"] * 2 + ["5"] * 8, "4", 0.6),
]


def write_textvqa(data: Path) -> None:
    entries = [
        {"question_id": 90 + n, "image_id": "shop" if n else "camera", "question": text, "answers": answers}
        for n, (text, answers, *_) in enumerate(TEXTVQA)
    ]
    put(data / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": entries})
    ocr = {"question_id": "camera", "image": "camera.jpg", "text": f"What brand is it?\nReference OCR token: CANON{SHORT}"}
    put(data / "llava_textvqa_val_v051_ocr.jsonl", [ocr])
    pictures(data / "train_images", "camera.jpg", "shop.jpg")


# ---- VizWiz: the picture is often no use

VIZWIZ = [
    ("What is this?", ["unanswerable"] * 7 + ["unsuitable image", "can", "can"], "Unanswerable", 1.0, "unanswerable"),
    ("What color?", ["blue"] * 2 + ["unanswerable"] * 8, "Blue", 0.6, "other"),
    ("How many?", ["2"] * 3 + ["two"] * 7, "two", 0.9, "number"),  # people's answers are taken as they are: "two" becomes 2
]


def write_vizwiz(data: Path) -> None:
    entries = [
        {"image": f"VizWiz_val_{n:08d}.jpg", "question": text, "answers": people(*answers), "answer_type": kind, "answerable": 1}
        for n, (text, answers, _, _, kind) in enumerate(VIZWIZ)
    ]
    put(data / "val.json", entries)
    pictures(data / "val", *(entry["image"] for entry in entries))


# ---- GQA: the very words, without a final period


def write_gqa(data: Path) -> None:
    def entry(answer: str, structural: str, balanced: bool = True) -> dict[str, Any]:
        types = {"structural": structural, "semantic": "attr", "detailed": "x"}
        return {"imageId": "n1", "question": "Is it red?", "answer": answer, "isBalanced": balanced, "types": types}

    questions = {"101": entry("yes", "verify"), "102": entry("red", "query"), "103": entry("red", "query")}
    put(data / "testdev_balanced_questions.json", questions | {"104": entry("no", "verify", balanced=False)})
    pictures(data / "images", "n1.jpg")


# ---- ScienceQA


def write_scienceqa(data: Path) -> None:
    def problem(answer: int, choices: str, image: str | None, hint: str, subject: str, grade: int) -> dict[str, Any]:
        return {
            "question": "Which?", "choices": choices.split(), "answer": answer, "hint": hint, "image": image,
            "grade": f"grade{grade}", "subject": subject, "lecture": "", "solution": "", "split": "test",
        }  # fmt: skip

    put(data / "problems.json", {
        "1": problem(1, "red blue", "image.png", "Look at it.", "natural science", 2),
        "2": problem(0, "yes no", None, "", "social science", 7),
        "3": problem(2, "x y z", None, "Read it.", "language science", 8),
        "4": problem(0, "x y", None, "", "social science", 6),
        "5": problem(1, "x y", None, "", "social science", 6),
        "6": problem(0, "x y", None, "", "social science", 6),
    })  # fmt: skip
    put(data / "pid_splits.json", {"train": [], "test": ["1", "2", "3", "4", "5"], "minitest": ["1"]})
    pictures(data / "images/test/1", "image.png")


# ---- MMBench


def write_mmbench(data: Path) -> None:
    seen = base64.b64encode(picture()).decode()
    rows = [
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit",
        f'7\t"Which\nis it?"\tLook.\tred\tblue\tgreen\tgrey\tB\tcolor\t{seen}\tx\tperception\tnan\tdev',  # a line break in a field
        f"8\tWho?\tnan\ta cat\ta dog\tnan\tnan\tA\tanimal\t{seen}\tx\tperception\tnan\tdev",
        f"9\tWhere?\t\tin a house\tat sea\t\t\tB\tplace\t{seen}\tx\treasoning\tnan\tdev",
        # A rotation, whose picture is row 7's.
        "1000007\tWhich is it?\t\tblue\tgreen\tgrey\tred\tA\tcolor\t7\tx\tperception\tnan\tdev",
    ]
    put(data / "mmbench_dev.tsv", "\n".join(rows) + "\n")


# ---- POPE and MME


def write_pope(data: Path) -> None:
    def entry(number: int, label: str) -> dict[str, Any]:
        return {"question_id": number, "image": "COCO_val2014_1.jpg", "text": "Is there a dog in the image?", "label": label}

    put(data / "coco/coco_pope_random.json", [entry(1, "yes"), entry(2, "no"), entry(3, "yes"), entry(4, "no")])
    put(data / "coco/coco_pope_popular.json", [entry(1, "no"), entry(2, "no")])
    pictures(data / "val2014", "COCO_val2014_1.jpg")


def write_mme(data: Path) -> None:
    root = data / "MME_Benchmark_release_version"
    asked = "Is it one? Please answer yes or no.\tYes\nIs it two?  Please answer yes or no.\tNo\n"
    pictures(root / "count", "a.jpg", "b.png")
    put(root / "count/a.txt", asked)
    put(root / "count/b.txt", asked)
    pictures(root / "artwork/images", "c.jpg")
    put(root / "artwork/questions_answers_YN/c.txt", asked)
    pictures(root / "code_reasoning", "d.png")
    put(root / "code_reasoning/d.txt", asked)


# ---- MM-Vet and LLaVA-Bench


def write_mmvet(data: Path) -> None:
    first = {"question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}
    second = {"question": "Who is it?", "answer": "a<OR>b", "capability": ["rec"]}
    put(data / "mm-vet.json", {"v1_0": first | {"imagename": "v1_0.png"}, "v1_1": second | {"imagename": "v1_1.png"}})
    pictures(data / "images", "v1_0.png", "v1_1.png")
    put(data / "mm-vet_evaluator.py", 'import nothing_of_the_kind\n\nprompt = """Give marks.\n"""\n\ndef main():\n    pass\n')


def write_llava_bench(data: Path) -> None:
    def question(number: int, kind: str) -> dict[str, Any]:
        return {"question_id": number, "image": "001.jpg", "category": kind, "text": f"Question {number}?"}

    put(data / "questions.jsonl", [question(0, "conv"), question(1, "detail"), question(2, "conv")])
    put(data / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A hill."}])
    put(data / "answers_gpt4.jsonl", [{"question_id": n, "answer_id": f"g{n}", "text": f"GPT-4's {n}"} for n in range(3)])
    rule = {"role": "Assistant", "prompt": "Compare them."}
    put(data / "rule.json", {"llava_bench_conv": rule, "llava_bench_detail": rule})
    pictures(data / "images", "001.jpg")


CASES = {
    "vqav2": vqa_case("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    "okvqa": vqa_case("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
    "textvqa": Case(
        write_textvqa, [answer for _, _, answer, _ in TEXTVQA], [score for *_, score in TEXTVQA],
        prompts=[f"What brand is it?\nReference OCR token: CANON{SHORT}", f"Whose shop?{SHORT}"],
    ),
    "vizwiz": Case(
        write_vizwiz, [answer for _, _, answer, _, _ in VIZWIZ], [1.0, 0.6, 0.9],
        prompts=[f"What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"],
        groups={"answer: unanswerable": 1.0, "answer: other": 0.6, "answer: number": 0.9},
        files={"upload.json": [{"image": "VizWiz_val_00000000.jpg", "answer": "unanswerable"}]},
    ),
    "gqa": Case(
        write_gqa, ["Yes.", "Red", "a red"], [1, 1, 0], prompts=[f"Is it red?{SHORT}"],
        groups={"binary": 1.0, "open": 0.5, "structural: query": 0.5, "semantic: attr": 2 / 3},
        files={"predictions.json": [{"questionId": "101", "prediction": "yes"}, {"questionId": "102", "prediction": "red"}]},
    ),
    "scienceqa": Case(
        # The letter; the letter with a reason; one "The answer is"; the text, which does not count; an option that is not there.
        write_scienceqa, ["B", "A. because", "So. The answer is C.", "x", "E"], [1, 1, 1, 0, 0],
        prompts=[f"Context: Look at it.\nWhich?\nA. red\nB. blue{LETTER}", f"Which?\nA. yes\nB. no{LETTER}"],
        groups={
            "natural science": 1.0, "social science": 1 / 3, "language science": 1.0, "with a picture": 1.0, "with a text": 1.0,
            "without context": 1 / 3, "grades 1-6": 1 / 3, "grades 7-12": 1.0,
        },
    ),
    "mmbench": Case(
        # By letter; by text; an article, so that nothing is said; by letter in a sentence.
        write_mmbench, ["B", "It is a cat", "A house in a big town", "The answer is (A)."], [1, 1, 0, 1],
        prompts=[f"Look.\nWhich\nis it?\nA. red\nB. blue\nC. green\nD. grey{LETTER}", f"Who?\nA. a cat\nB. a dog{LETTER}"],
        groups={"color": 1.0, "place": 0.0, "perception": 1.0, "reasoning": 0.0}, figures={"circular accuracy": 2 / 3},
    ),
    "pope": Case(
        # Files in the order of their names. Only the first sentence counts; what does not say no says yes.
        write_pope, ["No", "Yes", "Yes, there is.", "There is not.", "No, it is a cat.", "I see one. No dog."], [1, 0, 1, 1, 0, 0],
        prompts=[f"Is there a dog in the image?{SHORT}"], groups={"popular": 0.5, "random": 0.5},
        figures={
            "popular: precision": 0.0, "popular: F1": 0.0, "popular: yes ratio": 0.5, "F1, mean": 0.25,
            "random: precision": 0.5, "random: recall": 0.5, "random: F1": 0.5, "random: yes ratio": 0.5,
        },
    ),
    "mme": Case(
        # Yes or no within four characters; a picture counts whole if both its answers are right.
        write_mme, ["Yes", "No", "yes.", "Not two", "I think yes", "no", "Yes", "no, it is"], [1, 1, 1, 1, 0, 1, 1, 1],
        prompts=[f"Is it one?{SHORT}", f"Is it two?{SHORT}"], groups={"count": 1.0, "artwork": 0.5, "code_reasoning": 1.0},
        figures={"perception": 250.0, "cognition": 200.0, "count": 200.0, "artwork": 50.0, "code_reasoning": 200.0},
        files={"mme/artwork.txt": (
            "c.txt\tIs it one? Please answer yes or no.\tYes\tI think yes\nc.txt\tIs it two?  Please answer yes or no.\tNo\tno\n"
        )},
    ),
    "mmvet": Case(
        write_mmvet, ["x = -1", "a or b"], [], prompts=["What is x?"], files={"mm-vet.json": {"v1_0": "x = -1", "v1_1": "a or b"}},
    ),
    "llava-bench": Case(write_llava_bench, ["One.", "Two.", "Three."], [], prompts=["Question 0?"]),
}  # fmt: skip
