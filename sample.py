"""Text from a model: a run, a Hugging Face folder, or GPT-2.

    python sample.py out/demo --prompt="Return the" --samples=3
    python sample.py gpt2 --temperature=0
    python sample.py out/sft-demo --chat                            talk to it
    python sample.py out/sft-demo --prompts=FILE --out=answers.jsonl

    model, tokenizer = load_model("out/demo")
    text = continue_text(model, tokenizer, "Return the", max_new_tokens=50)
    text = chat_reply(model, tokenizer, [{"role": "user", "content": "Hello!"}], "chatml")

A run that was trained on conversations knows its template; other models need --template. In a chat,
/reset forgets what was said, /system TEXT sets the system message, Ctrl-C stops an answer and
Ctrl-D leaves. A FILE of prompts has one a line, or is of any format of data/conversations.py (the
last answer is then kept as the reference).
"""
import codecs
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Literal

import torch

from run import checkpoint
import lora
from bpe import Tokenizer
from run.classifier import Classifier
from run.config import build, parse, run_command
from data import conversations
from data.chat import extend_tokenizer, find_template, grow_embedding, render_prompt
from data.conversations import Message
from run.device import autocast, pick_device, pick_dtype
from model import GPT, GPTConfig, sample_token


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = ""  # the text to continue; empty: the start of a document
    samples: int = 1  # how many continuations
    max_new_tokens: int = 200  # tokens of each, at most; a document's end ends it before
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model predicts
    top_k: int = 50  # choose among so many likeliest tokens; 0: all
    top_p: float = 1.0  # choose among the likeliest tokens with this probability together
    seed: int = 0  # of the sampling
    chat: bool = False  # talk in the terminal
    template: str = ""  # alpaca, plain, chatml, llama3 or none; empty: the run's own
    system: str = ""  # the system message of a chat
    prompts: str = ""  # a file of prompts to answer, a line each or records of chat data
    out: str = ""  # where the answers to --prompts go, as JSON lines; empty: the screen
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision
    compile: bool = False  # compile first: some seconds, then about twice as fast


def load_model(name: str | Path, device: torch.device | str = "cpu", dropout: float = 0.0,
               which: str = "best.pt") -> tuple[GPT | Classifier, Tokenizer | None]:
    """A model, in eval mode, and its tokenizer: from a run, a Hugging Face folder or the hub.

    Of a run, the best checkpoint is taken; the last one where nothing was evaluated yet. A run on
    texts with classes gives a Classifier; who needs a model that writes, calls `load_writer`.
    """
    folder = Path(name)
    if not (folder / "run.json").exists():
        if (folder / "best.pt").exists() or not folder.is_dir() and folder.parent.name == "out":
            raise FileNotFoundError(f"there is no run in {folder}")
        model = GPT.from_pretrained(name, dropout)
        has_tokenizer = folder.is_dir() and any((folder / file).exists() for file in
                                                ("tokenizer.json", "vocab.bpe", "merges.txt"))
        tokenizer = (Tokenizer.load(folder) if has_tokenizer else
                     Tokenizer.gpt2() if model.config.vocab_size == 50257 else None)
        return model.to(device).eval(), tokenizer
    state = (checkpoint.load(folder / which) if (folder / which).exists()
             else checkpoint.load_last(folder))
    if state is None:
        raise FileNotFoundError(f"the run {folder} has no checkpoint yet")
    settings, file = state["config"], folder / "tokenizer.json"
    tokenizer = Tokenizer.load(file) if file.exists() else None
    shape = build(GPTConfig, {**settings["model"], "dropout": dropout})
    if not settings.get("lora"):
        model = with_head(GPT(shape), state)
        model.load_state_dict(state["model"])
        return model.to(device).eval(), tokenizer
    model, _ = load_base(settings["init_from"], dropout, shape.block_size)      # it has the rest
    model = with_head(grow_embedding(model, shape.vocab_size), state)
    lora.add_lora(model, build(lora.LoRAConfig, settings["lora"]), quiet=True)
    if model.lora.base_hash != state["base"]:
        raise ValueError(f"{folder} trained an adapter of {settings['init_from']}, which has "
                         f"changed since; put the old one back")
    lora.load_trainable_state(model, state["model"])
    return model.to(device).eval(), tokenizer


def with_head(model: GPT, state: dict[str, Any]) -> GPT | Classifier:
    """The model as a Classifier, where a checkpoint is one's."""
    head = state["model"].get("head.weight")                        # (K, C)
    return model if head is None else Classifier(model, len(head), state["config"]["pooling"])


def load_writer(name: str | Path, device: torch.device | str = "cpu", dropout: float = 0.0
                ) -> tuple[GPT, Tokenizer | None]:
    """`load_model`, of a model that writes: a classifier is refused."""
    model, tokenizer = load_model(name, device, dropout)
    if isinstance(model, Classifier):
        raise ValueError(f"{name} is a classifier, and this needs a model that writes; python -m "
                         f"eval.loss and eval.imdb evaluate it")
    return model, tokenizer


def load_base(name: str | Path, dropout: float = 0.0, block_size: int | None = None
              ) -> tuple[GPT, Tokenizer | None]:
    """A model to train on, and its tokenizer; an adapter is merged, a longer context cropped."""
    model, tokenizer = load_writer(name, dropout=dropout)
    if hasattr(model, "lora"):
        lora.merge_lora(model)
        lora.unload_lora(model)
    if block_size and block_size < model.config.block_size:
        model.crop_context(block_size)
    return model.requires_grad_(True).train(), tokenizer


def continue_text(model: GPT, tokenizer: Tokenizer, prompt: str = "", max_new_tokens: int = 200,
                  temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0,
                  seed: int = 0) -> str:
    """The prompt and its continuation; without a prompt, a document from its start."""
    device = model.transformer.wte.weight.device
    ids = tokenizer.encode(prompt)
    if not ids:                         # documents follow the end of the one before them
        ids = [tokenizer.eot if tokenizer.eot is not None else tokenizer.encode("\n")[0]]
    idx = torch.tensor([ids], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    stops = () if tokenizer.eot is None else (tokenizer.eot,)
    out = model.generate(idx, max_new_tokens, temperature, top_k or None, top_p, stops, generator)
    new = [token for token in out[0, len(ids):].tolist() if token not in stops]
    return prompt + tokenizer.decode(new)


def run_template(name: str | Path) -> str:
    """The template that a run was trained with; "" of what is no such run."""
    file = Path(name) / "config.json"
    if not (Path(name) / "run.json").exists() or not file.exists():
        return ""
    return json.loads(file.read_text()).get("template") or ""


class Chat:
    """A conversation with a model. What model and user said stays in a cache of keys and values:
    a turn computes the tokens that are new, and what is forgotten or changed, nothing else.

    messages: what was said so far. temperature, top_k, top_p: see `GPT.generate`.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, template: str, max_new_tokens: int = 200,
                 temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0, seed: int = 0):
        if extend_tokenizer(tokenizer, template) is not tokenizer:
            raise ValueError(f"the model's tokenizer lacks special tokens of template={template}, "
                             f"so it was not trained with that; choose another --template")
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_k, self.top_p = temperature, top_k or None, top_p
        self.device = model.transformer.wte.weight.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.messages: list[Message] = []
        self.cache, self.known = None, []               # `known` are the ids in the cache

    def answer(self, question: str) -> Iterator[str]:
        """The model's answer, piece by piece as it comes; both sides are remembered.

        ValueError when the question does not fit into the context. Stopped half-way, the answer
        counts as far as it came; an empty one is forgotten with its question.
        """
        self.messages.append({"role": "user", "content": question})
        said = []
        try:
            for piece in self.reply(self.messages):
                said.append(piece)
                yield piece
        finally:
            answer = "".join(said)
            if answer.strip():
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def set_system(self, text: str) -> None:
        """Another system message for what was said and will be; "" for none."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}] * bool(text.strip()) + rest

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def reply(self, messages: list[Message]) -> Iterator[str]:
        """What follows these messages, as text: characters come whole, also those of several
        tokens. A token that is no text ends it: the template's end token, or another special one.
        """
        tokens = itertools.islice(self.new_tokens(self.fitting(messages)), self.max_new_tokens)
        spaces = find_template(self.template).answer.partition("{content}")[0]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, shown = "", 0
        for token in itertools.chain(tokens, [self.tokenizer.vocab_size]):      # which is no text
            spelled = b"".join(self.tokenizer.token_bytes[token:token + 1])
            text += decoder.decode(spelled, final=not spelled)
            if len(text) >= len(spaces) or not spelled:
                visible = text.removeprefix(spaces)
                if visible[shown:]:
                    yield visible[shown:]
                shown = len(visible)
            if not spelled:
                return

    def fitting(self, messages: list[Message]) -> list[int]:
        """The prompt's ids. Where they leave too little room for an answer, the oldest turns are
        left out, each whole; the system message stays."""
        block_size = self.model.config.block_size
        room = block_size - min(self.max_new_tokens, block_size // 4)
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system):]
        while True:
            ids = render_prompt([*system, *turns], self.tokenizer, self.template)
            if len(ids) <= room:
                return ids
            if len(turns) == 1:
                raise ValueError(f"the message makes a prompt of {len(ids)} tokens; "
                                 f"block_size={block_size} leaves room for {room}: shorten it")
            turns = turns[2:]                           # a question and its answer

    @torch.no_grad()
    def new_tokens(self, prompt: list[int]) -> Iterator[int]:
        """Tokens that follow the prompt, until the context is full."""
        config = self.model.config
        self.cache = self.cache or self.model.new_cache(1)
        same = next((i for i, (a, b) in enumerate(zip(self.known, prompt)) if a != b),
                    min(len(self.known), len(prompt)))
        same = min(same, len(prompt) - 1)               # the last token's output is needed again
        self.known, unread = self.known[:same], prompt[same:]
        while len(self.known) + len(unread) <= config.block_size:
            self.cache.length = len(self.known)
            idx = torch.tensor([unread], device=self.device)
            logits = self.model.next_logits(idx, self.cache)                    # (1, V)
            self.known = self.known + unread
            unread = sample_token(logits, self.temperature, self.top_k, self.top_p,
                                  self.generator).tolist()
            yield unread[0]


def chat_reply(model: GPT, tokenizer: Tokenizer, messages: list[Message], template: str,
               max_new_tokens: int = 200, temperature: float = 0.8, top_k: int = 50,
               top_p: float = 1.0, seed: int = 0) -> str:
    """A model's answer to messages that end with a user's, dropout off."""
    was_training = model.training
    model.eval()
    chat = Chat(model, tokenizer, template, max_new_tokens, temperature, top_k, top_p, seed)
    text = "".join(chat.reply(messages))
    model.train(was_training)
    return text


def talk(chat: Chat) -> None:
    """The terminal's side of a chat."""
    print("/reset forgets, /system TEXT sets the system message, Ctrl-C stops, Ctrl-D leaves")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line == "/reset":
            chat.reset()
        elif line.partition(" ")[0] == "/system":
            chat.set_system(line.removeprefix("/system").strip())
        elif line.startswith("/"):
            print("the commands are /reset and /system TEXT")
        elif line:
            pieces = chat.answer(line)
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pieces.close()
            except ValueError as error:
                print(error, end="")
            print()


def read_prompts(path: Path) -> list[tuple[list[Message], str | None]]:
    """Conversations that end with a user's message, and the answer that the file gives, if any."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    found: list[tuple[list[Message], str | None]] = []
    if path.suffix not in (".json", ".jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [([{"role": "user", "content": line}], None) for line in lines if line.strip()]
    else:
        for line, record in conversations.read_records(path):
            try:
                found.append(_prompt_of(record))
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no prompts")
    return found


def _prompt_of(record: object) -> tuple[list[Message], str | None]:
    if isinstance(record, ValueError):
        raise record
    if isinstance(record, dict) and "prompt" in record:
        record = {"messages": [{"role": "user", "content": record["prompt"]}]}
    if isinstance(record, dict) and "messages" in record:
        messages = record["messages"]
        conversations.check_messages(messages)
    else:
        messages = conversations.convert(record)
    if messages[-1]["role"] == "user":
        return messages, None
    return messages[:-1], messages[-1]["content"]


def answer_prompts(model: GPT, tokenizer: Tokenizer, name: str, config: SampleConfig,
                   template: str) -> None:
    """A line of JSON for each prompt: prompt, answer, the model's name and, if known, reference."""
    prompts = read_prompts(Path(config.prompts))
    file = open(config.out, "w", encoding="utf-8") if config.out else sys.stdout
    settings = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                    top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    for messages, reference in prompts:
        prompt = "\n\n".join(message["content"] for message in messages)
        if template:
            answer = chat_reply(model, tokenizer, messages, template, **settings)
        else:
            answer = continue_text(model, tokenizer, prompt, **settings)[len(prompt):]
        line = {"prompt": prompt, "answer": answer, "model": name}
        print(json.dumps({**line, "reference": reference} if reference else line,
                         ensure_ascii=False), file=file, flush=True)
    if config.out:
        file.close()
        print(f"{config.out}: {len(prompts):,} answers of {name}")


def main(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        words = ["out/demo", *words]
    config = parse(SampleConfig, words[1:], "sample.py RUN|FOLDER|gpt2", about=__doc__)
    template = config.template or run_template(words[0])
    if template:
        find_template(template)
    elif config.chat:
        raise ValueError(f"{words[0]} was not trained on conversations; say how to write them with "
                         f"--template=alpaca, plain, chatml, llama3 or none")
    device = pick_device(config.device)
    model, tokenizer = load_writer(words[0], device)
    if tokenizer is None:
        raise ValueError(f"{words[0]} has no tokenizer.json; put its tokenizer there")
    if config.compile:
        model.compile_generation()
    with autocast(device, pick_dtype(config.dtype, device)):
        if config.chat:
            chat = Chat(model, tokenizer, template, config.max_new_tokens, config.temperature,
                        config.top_k, config.top_p, config.seed)
            chat.set_system(config.system)
            talk(chat)
        elif config.prompts:
            answer_prompts(model, tokenizer, words[0], config, template)
        else:
            for i in range(config.samples):
                print(continue_text(model, tokenizer, config.prompt, config.max_new_tokens,
                                    config.temperature, config.top_k, config.top_p,
                                    config.seed + i))
                print("-" * 80)


if __name__ == "__main__":
    run_command(main)
