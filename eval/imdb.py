"""IMDB: is a film review negative (0) or positive (1)? Asked of a GPT, or of a classifier.

    python -m eval gpt2|FOLDER|RUN --imdb_file=REVIEWS.jsonl [--limit=N]

In: {"text": review, "label": 0 or 1} a line. Zero-shot: the model reads

    Review: {text}
    Sentiment:

and its answer is the likelier of " negative" and " positive". A classifier (a run on data that
`python -m data.imdb --task=classes` made) reads the review alone, and its head answers. A review
that does not fit loses its beginning, as the verdict mostly stands at the end.

    result = evaluate(model, tokenizer, load_reviews(file))     # a GPT or a Classifier

n, acc with its count and 95% interval, confusion[label][answer], the number of reviews cut; of a
classifier also its loss.

Reference: Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis" (ACL).
"""
from typing import Any, Sequence

import torch
import torch.nn as nn

from data.imdb import Review, load_reviews      # noqa: F401 (for users of eval.imdb)
from data.labels import class_samples
from data.samples import Samples
from eval.hellaswag import Question, score_questions
from eval.scoring import accuracy, evaluating

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
    """Which of the two answers is likelier after the question; or what a classifier answers."""
    if getattr(model, "classes", 0):
        samples = class_samples(reviews, tokenizer, model.config.block_size)
        return evaluate_classifier(model, samples, dtype=dtype) | {
            "cut": samples.counts["truncated"]}
    answers = [tokenizer.encode(answer) for answer in ANSWERS]
    room = model.config.block_size + 1 - max(map(len, answers))     # the last token is no input
    prompts = [prompt(review, tokenizer, room) for review in reviews]
    questions = [Question(tuple(ids), answers, [2 * n, 2 * n + 1])
                 for n, (ids, _) in enumerate(prompts)]
    labels = torch.tensor([review.label for review in reviews])
    found = score_questions(model, questions, batch_tokens, dtype).view(-1, 2).argmax(1)
    return accuracy_and_confusion(labels, found) | {"cut": sum(was_cut for _, was_cut in prompts)}


def evaluate_classifier(model: nn.Module, samples: Samples, batch_size: int = 16,
                        dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What `evaluate` returns (but `cut`), and the loss: of a Classifier on `class_samples`."""
    if model.classes != len(ANSWERS):
        raise ValueError(f"the classifier chooses among {model.classes} classes; reviews are "
                         f"negative or positive")
    labels, found, nats = [], [], 0.0
    with evaluating(model, dtype) as device:
        for x, y in samples.evaluation_batches(batch_size):
            logits, loss = model(x.to(device), y.to(device), reduction="sum")
            labels.append(y[y >= 0])
            found.append(logits.argmax(1).cpu())
            nats += loss.item()
    return accuracy_and_confusion(torch.cat(labels), torch.cat(found)) | {
        "loss": nats / len(samples)}


def accuracy_and_confusion(labels: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """Accuracy of classes `found` for `labels`, both (N,); confusion has a row a true class."""
    confusion = torch.bincount(2 * labels + found, minlength=4).view(2, 2).tolist()
    return {"n": len(labels), **accuracy(int((labels == found).sum()), len(labels)),
            "confusion": confusion}
