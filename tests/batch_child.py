"""A batch in a process of its own, which a test may kill; it is forked from one that has everything imported."""

import os

from product_recs.jobs.batch import Question, open_for_batch, write_batch


def make(kind, models, store, users, out, root):
    os.environ["PRODUCT_RECS_ROOT"] = root  # where the work of a table lies
    more = {"items": [101, 102]} if kind == "audience" else {"diversity": 0.3} if kind == "lists" else {}
    part = 2 if kind == "similar" else 25
    with open_for_batch(models, feedback=store) as recommender:
        write_batch(recommender, Question(kind, n=7, **more), out, users, part=part, progress=False)
