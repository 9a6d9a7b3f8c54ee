"""The table of tasks in official formats."""

from __future__ import annotations

from evals.official import choices, judged, short_answers, yes_no
from evals.official.task import Task

TASKS: dict[str, Task] = {
    "scienceqa": choices.SCIENCEQA,
    "vizwiz": short_answers.VIZWIZ,
    "mmvet": judged.MMVET,
    "llava-bench": judged.LLAVA_BENCH,
    "pope": yes_no.POPE,
    "gqa": short_answers.GQA,
    "textvqa": short_answers.TEXTVQA,
    "vqav2": short_answers.VQAV2,
    "mme": yes_no.MME,
    "mmbench": choices.MMBENCH,
    "okvqa": short_answers.OKVQA,
}
