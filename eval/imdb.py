"""IMDB: is a film review negative (0) or positive (1)? Asked of a GPT, without training it.

    python -m eval gpt2|FOLDER|RUN --imdb_file=REVIEWS.jsonl [--limit=N]

In: {"text": review, "label": 0 or 1} a line. The model reads

    Review: {text}
    Sentiment:

and its answer is the likelier of " negative" and " positive". A review that does not fit loses its
beginning, as the verdict mostly stands at the end. A classifier, trained on what `python -m
data.imdb --task=classes` made, is for eval.loss.

    result = evaluate(model, tokenizer, load_reviews(file))

n, acc with its count and 95% interval, confusion[label][answer], the number of reviews cut.

Reference: Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis" (ACL).
"""
from typing import Any, Sequence

import torch
import torch.nn as nn

from data.imdb import Review, load_reviews  # noqa: F401 (for users of eval.imdb)
from eval.hellaswag import Question, score_questions
from eval.scoring import accuracy

BEFORE, AFTER = "Review:", "\nSentiment:"
ANSWERS = (" negative", " positive")        # by label


def prompt(review: Review, tokenizer: Any, room: int) -> tuple[list[int], bool]:
    """The question in at most `room` tokens, and whether the review was cut for it."""
    before, after = tokenizer.encode(BEFORE), tokenizer.encode(AFTER)
    text, room = tokenizer.encode(" " + review.text), room - len(before) - len(after)
    if room < 1:
        raise ValueError(f"the model's context leaves no room for a review: the question alone has "
                         f"{len(before) + len(after)} tokens")
    return before + text[-room:] + after, len(text) > room


def evaluate(model: nn.Module, tokenizer: Any, reviews: Sequence[Review], batch_tokens: int = 0,
             dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Which of the two answers is likelier after the question."""
    answers = [tokenizer.encode(answer) for answer in ANSWERS]
    room = model.config.block_size + 1 - max(map(len, answers))     # the last token is no input
    prompts = [prompt(review, tokenizer, room) for review in reviews]
    questions = [Question(tuple(ids), answers, [2 * n, 2 * n + 1])
                 for n, (ids, _) in enumerate(prompts)]
    labels = torch.tensor([review.label for review in reviews])
    found = score_questions(model, questions, batch_tokens, dtype).view(-1, 2).argmax(1)
    return {"n": len(labels), **accuracy(int((labels == found).sum()), len(labels)),
            "confusion": torch.bincount(2 * labels + found, minlength=4).view(2, 2).tolist(),
            "cut": sum(was_cut for _, was_cut in prompts)}
