"""A data set by name: whatever it holds, batches to train on and batches to validate on.

    folder = find_or_make("corpus", world)                          its files, verified
    data = open_data(folder, config, tokenizer, block_size)         config: TrainConfig's settings
    batches = data.loader(config, world, pin=False)
    for batch in batches.batches(step): model(*batch, reduction="sum")
    for batch in data.validation(config, world): ...

It is a TokenSet (token shards), a MixtureSet of some (a:0.7,b:0.3), a ChatSet (conversations) or a
ClassSet (texts with a class each).
Each has: tokenizer (or None), vocab_size, fingerprint, template ("" of texts), unigram_entropy
(nats, or None), prompts, which is what to ask a model that learns from it, classes, how many a
Classifier chooses among (0 where the next token is learned), parts, what tokens consist of that are
new to the model ({} but for the texts of an extended tokenizer), and published ({} of all that are
here).
"""
import dataclasses
import importlib
import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any, Iterator

from bpe import Tokenizer
from data import chat, labels, loader, prepared, samples, shards
from data.shards import GPT2_VOCAB
from formats.files import read_json
from run.load import parts_of_new

EVALUATION_TOKENS = 4096        # at once, at least: small micro-batches would be slow
SMALL_DATA = ("corpus", "shakespeare", "pydocs")    # made within a minute when a run asks for them
# Of data that take hours to make, their tokens, and in bytes what is on disk. FineWeb-Edu's
# sample-10BT: 14 files of 28.5 GB (its page on the hub, revision 87f09149, as of 2026-09); the text
# in them by 4.59 bytes a token, shards of 2 bytes a token (docs/scaling.md).
PUBLISHED = {"fineweb": {"tokens": 10e9, "download": 28.5e9, "unpacked beside it": 45.9e9,
                         "token shards": 20e9}}
PROMPTS = 3                     # of the validation split, with room for an answer


class TokenSet:
    """Token shards, and the tokenizer that made them where that is known."""
    template, prompts, classes, parts, published = "", (), 0, {}, {}

    def __init__(self, folder: Path):
        self.meta, file = shards.read_meta(folder), folder / "tokenizer.json"
        self.tokenizer = Tokenizer.load(file) if file.exists() else None
        if self.tokenizer and self.meta["tokenizer_hash"] not in (None, self.tokenizer.hash):
            raise ValueError(f"{file} is not the tokenizer that made the shards beside it; "
                             f"prepare the data again")
        self.vocab_size = self.meta["vocab_size"]
        if self.tokenizer and self.tokenizer.vocab_size != self.vocab_size:
            raise ValueError(f"{folder}/meta.json says vocab_size={self.vocab_size}, its tokenizer "
                             f"has {self.tokenizer.vocab_size}; prepare the data again")
        self.unigram_entropy = self.meta.get("unigram_entropy")
        self.fingerprint = shards.fingerprint(folder)
        self.train = shards.open_split(folder, "train")
        self.val = shards.open_split(folder, "val")

    def loader(self, config: Any, world: Any, pin: bool = False) -> loader.WindowLoader:
        """Training batches, as the config and the rank ask for them."""
        return loader.WindowLoader(self.train, config.model.block_size, config.batch_tokens,
                                   config.micro_batch, config.seed, world.rank, world.size, pin)

    def validation(self, config: Any, world: Any) -> Iterator[tuple]:
        """This rank's share of the validation split."""
        return loader.evaluation_batches(self.val, config.model.block_size, _at_once(config),
                                         config.eval_tokens, world.rank, world.size)


class PlannedSet(TokenSet):
    """Token shards that are not here, by what is published of them: enough for a dry run."""
    tokenizer = unigram_entropy = None
    fingerprint, vocab_size = "", GPT2_VOCAB

    def __init__(self, published: dict[str, float]):
        self.published, self.train = published, range(int(published["tokens"]))


class MixtureSet:
    """Several sources of tokens, name to set, read in proportion to their weights."""
    template, prompts, classes, unigram_entropy, published = "", (), 0, None, {}

    def __init__(self, sources: dict[str, TokenSet], weights: list[Fraction]):
        (name, one), *others = sources.items()
        for other, source in others:
            if source.meta["tokenizer_hash"] != one.meta["tokenizer_hash"]:
                raise ValueError(f"data={name} and {other} were made with different tokenizers; "
                                 f"prepare one with --tokenizer={name}, the other's")
        self.sources, self.weights = sources, weights
        self.tokenizer, self.vocab_size, self.parts = one.tokenizer, one.vocab_size, one.parts
        self.fingerprint = prepared.hash_facts([[source.fingerprint, str(weight)] for source, weight
                                                in zip(sources.values(), weights)])

    def loader(self, config: Any, world: Any, pin: bool = False) -> loader.MixtureLoader:
        """Training batches: the sources' own, dealt out by weight."""
        return loader.MixtureLoader([source.loader(config, world, pin)
                                     for source in self.sources.values()], self.weights)


class _SampleSet:
    """Samples, `train` and `val`, which are padded or packed into rows."""
    unigram_entropy, parts, published = None, {}, {}

    def loader(self, config: Any, world: Any, pin: bool = False) -> samples.SampleLoader:
        return samples.SampleLoader(self.train, config.model.block_size, config.batch_tokens,
                                    config.micro_batch, config.seed, world.rank, world.size, pin,
                                    packing=config.packing)

    def validation(self, config: Any, world: Any) -> Iterator[tuple]:
        return self.val.evaluation_batches(_at_once(config), config.eval_tokens, world.rank,
                                           world.size)


class ChatSet(_SampleSet):
    """Conversations, rendered for a model of block_size positions with its tokenizer."""
    classes = 0

    def __init__(self, folder: Path, tokenizer: Tokenizer, template: str, block_size: int,
                 labels: str = "all"):
        self.tokenizer, self.template = tokenizer, template
        self.vocab_size = tokenizer.vocab_size
        pattern = dataclasses.asdict(chat.find_template(template))
        self.fingerprint = prepared.fingerprint(folder, "chat", tokenizer.hash, pattern, labels)
        self.train, self.val = (chat.load_samples(folder, split, tokenizer, template, block_size,
                                                  labels) for split in ("train", "val"))
        questions = (list(itertools.takewhile(      # up to the first answer
            lambda message: message["role"] != "assistant", record["messages"]))
            for record in prepared.read_split(folder, "chat", "val"))
        self.prompts = tuple(itertools.islice((
            messages for messages in questions
            if 2 * len(chat.render_prompt(messages, tokenizer, template)) < block_size), PROMPTS))


class ClassSet(_SampleSet):
    """Texts with a class each, for a Classifier of block_size positions that reads this tokenizer.

    names: of the classes, by number.
    """
    template, prompts = "", ()

    def __init__(self, folder: Path, tokenizer: Tokenizer, block_size: int):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self.names = tuple(prepared.read_meta(folder, "classes")["labels"])
        self.classes = len(self.names)
        self.fingerprint = prepared.fingerprint(folder, "classes", self.names, tokenizer.hash)
        self.train, self.val = (labels.load_samples(folder, split, tokenizer, block_size)
                                for split in ("train", "val"))


def mixture_of(name: str) -> dict[str, Fraction]:
    """{"a": 7/10, "b": 3/10} of "a:0.7,b:0.3"; nothing of the name of one data set."""
    if "," not in name or Path(name).is_dir():
        return {}
    weights: dict[str, Fraction] = {}
    for part in name.split(","):
        source, _, text = part.strip().rpartition(":")
        try:
            weight = Fraction(text)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if not source or source in weights or not 0 < weight <= 10**6:
            raise ValueError(f"data={name}: {part!r} is not NAME:WEIGHT with a weight above 0 and "
                             f"a name of its own; write --data=fineweb:0.7,mine:0.3")
        weights[source] = weight
    return weights


def find_or_make(name: str, world: Any, dry_run: bool = False) -> Path | list[Path] | None:
    """The folder of a data set, its files verified; a small one is made if it is not there yet.
    Those of a mixture. None of one that is not there, where a dry run can do with what is published
    of it."""
    if mixture := mixture_of(name):
        return [find_or_make(source, world) for source in mixture]
    try:
        folder = shards.find(name)
    except FileNotFoundError:
        if dry_run and name in PUBLISHED:
            return None
        if name not in SMALL_DATA:
            raise
        if world.rank == 0:
            importlib.import_module(f"data.{name}").prepare()
    world.wait()
    folder = shards.find(name)
    if world.rank == 0 and kind(folder) == "tokens":
        shards.verify(folder, cached=True)
    world.wait()
    return folder


def open_data(folder: Path | list[Path] | None, config: Any, tokenizer: Tokenizer | None,
              block_size: int) -> TokenSet | MixtureSet | ChatSet | ClassSet:
    """What a prepared folder holds, as a model reads it that has this tokenizer and context.

    tokenizer: None of a model that is new and takes the data's, or of one that has none. A
    conversation's template may add tokens to it; data.tokenizer is the whole one.
    """
    if folder is None:
        return PlannedSet(PUBLISHED[config.data])
    if isinstance(folder, list):
        mixture = mixture_of(config.data)
        sources = {name: open_data(one, dataclasses.replace(config, data=name), tokenizer,
                                   block_size) for name, one in zip(mixture, folder)}
        for name, source in sources.items():
            if not isinstance(source, TokenSet):
                raise ValueError(f"data={config.data}: {name} holds no token shards, and only such "
                                 f"can be mixed; train on it alone")
        return MixtureSet(sources, list(mixture.values()))
    what = kind(folder)
    if what != "tokens" and config.init_from == "scratch":
        raise ValueError(f"data={config.data} holds {prepared.KINDS[what][0]}, and "
                         f"init_from=scratch has no words yet; name a model that writes, "
                         f"--init_from=RUN or gpt2")
    if what != "tokens" and tokenizer is None:
        raise ValueError(f"{config.init_from} has no tokenizer to read {config.data} with; put its "
                         f"tokenizer.json there")
    if what == "classes":
        return ClassSet(folder, tokenizer, block_size)
    if what == "chat":
        return ChatSet(folder, chat.extend_tokenizer(tokenizer, config.template), config.template,
                       block_size, config.labels)
    data = TokenSet(folder)
    data.parts = parts_of_new(data.tokenizer, tokenizer) if tokenizer and data.tokenizer else {}
    if data.parts is None:
        raise ValueError(f"{config.data} was made with another tokenizer than that of "
                         f"{config.init_from}; prepare it with --tokenizer={config.init_from}, or "
                         f"with one that extends it")
    return data


def kind(folder: Path) -> str:
    """What a prepared folder holds: "tokens", "chat" or "classes"."""
    meta = folder / "meta.json"
    found = read_json(meta, prepared.AGAIN).get("kind", "tokens") if meta.exists() else "tokens"
    if not isinstance(found, str) or found not in prepared.KINDS:
        raise ValueError(f"{meta} says kind={found!r:.40}, which is none of "
                         f"{', '.join(prepared.KINDS)}; {prepared.AGAIN}")
    return found


def _at_once(config: Any) -> int:
    return max(config.micro_batch, EVALUATION_TOKENS // config.model.block_size)
