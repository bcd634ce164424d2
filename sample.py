"""Text from a model: a run, a Hugging Face folder, or GPT-2.

    python sample.py out/demo --prompt="Return the" --samples=3
    python sample.py gpt2 --temperature=0
    python sample.py out/sft-demo --chat                            talk to it
    python sample.py out/sft-demo --prompts=FILE --out=answers.jsonl
    python sample.py out/demo --prompt="Return the" --explain=page.html     see how it reads that

    model, tokenizer = load_model("out/demo")
    text = continue_text(model, tokenizer, "Return the", max_new_tokens=50)
    text = chat_reply(model, tokenizer, [{"role": "user", "content": "Hello!"}], "chatml")

A run that was trained on conversations knows its template; other models need --template. In a chat,
/reset forgets what was said, /system TEXT sets the system message, Ctrl-C stops an answer and
Ctrl-D leaves. A FILE of prompts has one a line, or is of any format of data/conversations.py (the
last answer is then kept as the reference).
"""
if __name__ == "__main__":
    from run.config import interruptible
    interruptible()
import codecs
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Literal

import torch

from bpe import Tokenizer
from data import conversations
from data.chat import extend_tokenizer, find_template, render_prompt
from data.conversations import Message
from data.texts import RECORDS, read_text
from fast.decoding import compile_blocks, record_steps
from fast.linear import pack_weights
from model import GPT, sample_token
from run.config import parse, run_command
from run.device import autocast, pick_device, pick_dtype
from run.load import load_model  # noqa: F401 (for users of sample)
from run.load import load_writer, needs_tokenizer, run_template
from run.log import printable


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
    system: str = ""  # the system message of a chat, or of --prompts that have none
    prompts: str = ""  # a file of prompts to answer, a line each or records of chat data
    explain: str = ""  # write a page on how the model reads the prompt, in float32, to this file
    out: str = ""  # where the answers to --prompts go, as JSON lines; empty: the screen
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision
    compile: bool = False  # compile first: some seconds, then up to twice as fast; not needed on a
        # CPU in bfloat16

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.explain and (not self.prompt or self.prompts):
            raise ValueError(f"explain={self.explain} is a page on one prompt; add --prompt=TEXT"
                             + ", without --prompts" * bool(self.prompts))
        tasks = [f"--{name}" for name in ("prompt", "chat", "prompts") if getattr(self, name)]
        if len(tasks) > 1:
            raise ValueError(f"{' and '.join(tasks)} are different things to do; give one of them")
        if self.samples != 1 and (self.chat or self.prompts or self.explain):
            raise ValueError(f"samples={self.samples} is of a --prompt that is continued; leave it "
                             f"out")
        if self.out and not self.prompts:
            raise ValueError(f"out={self.out} is for the answers to --prompts=FILE; leave it out")
        for name in ("system", "template"):
            if getattr(self, name) and not (self.chat or self.prompts or self.explain):
                raise ValueError(f"{name}={getattr(self, name)} is of conversations: --chat, "
                                 f"--prompts or --explain; a --prompt is continued as it stands")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 1 takes all tokens")
        if self.temperature != 0 and self.temperature < 1e-5:
            raise ValueError(f"temperature={self.temperature} must be 0, the likeliest token, or "
                             f"at least 1e-5")


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


def preview(model: GPT, data: Any, config: Any) -> str:
    """What a model in training writes: answers to the prompts of its data (data/sets.py), or a
    text. config: settings of train.py."""
    if not data.prompts:
        text = continue_text(model, data.tokenizer, config.sample_prompt, config.sample_tokens,
                             seed=config.seed)
        return text if not data.template else (
            f"(no question of the validation split leaves half of "
            f"block_size={config.model.block_size} for its answer; a text instead:)\n{text}")
    return "\n".join(
        f"> {prompt[-1]['content']}\n" + chat_reply(model, data.tokenizer, prompt, data.template,
                                                    config.sample_tokens, temperature=0)
        for prompt in data.prompts)


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
                    print(printable(piece), end="", flush=True)
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
    if path.suffix.lower() not in RECORDS:
        lines = read_text(path).split("\n")
        found = [([{"role": "user", "content": line}], None) for line in lines if line.strip()]
    else:
        for place, record in conversations.read_records(path):
            try:
                found.append(_prompt_of(record))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no prompts")
    return found


def _prompt_of(record: object) -> tuple[list[Message], str | None]:
    if isinstance(record, ValueError):
        raise record
    if isinstance(record, dict) and "prompt" in record:
        record = {**record, "messages": [{"role": "user", "content": record["prompt"]}]}
    if isinstance(record, dict) and "messages" in record:
        messages = conversations.from_messages(record)
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
    cut = 0
    for messages, reference in prompts:
        if config.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system}, *messages]
        prompt = "\n\n".join(message["content"] for message in messages)
        if template:
            chat = Chat(model, tokenizer, template, **settings)
            cut += chat.fitting(messages) != render_prompt(messages, tokenizer, template)
            answer = "".join(chat.reply(messages))
        else:
            cut += len(tokenizer.encode(prompt)) > model.config.block_size
            answer = continue_text(model, tokenizer, prompt, **settings)[len(prompt):]
        line = {"prompt": prompt, "answer": answer, "model": name}
        print(json.dumps({**line, "reference": reference} if reference else line,
                         ensure_ascii=False), file=file, flush=True)
    if cut:
        print(f"{cut:,} of {len(prompts):,} prompts do not fit into block_size="
              f"{model.config.block_size} and lost their beginning", file=sys.stderr)
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
    tokenizer = needs_tokenizer(tokenizer, words[0])
    if config.explain:
        from eval.explain import write_page
        return write_page(model, tokenizer, words[0], template, config)
    dtype = pick_dtype(config.dtype, device)
    if config.compile:
        compile_blocks(model)
    elif device.type == "cpu" and dtype == torch.bfloat16:
        pack_weights(model)                             # at once as fast as compiled
    if device.type == "cuda":
        record_steps(model, dtype)
    with autocast(device, dtype):
        if config.chat:
            chat = Chat(model, tokenizer, template, config.max_new_tokens, config.temperature,
                        config.top_k, config.top_p, config.seed)
            chat.set_system(config.system)
            talk(chat)
        elif config.prompts:
            answer_prompts(model, tokenizer, words[0], config, template)
        else:
            for i in range(config.samples):
                print(printable(continue_text(
                    model, tokenizer, config.prompt, config.max_new_tokens, config.temperature,
                    config.top_k, config.top_p, config.seed + i)))
                print("-" * 80)


if __name__ == "__main__":
    run_command(main)
