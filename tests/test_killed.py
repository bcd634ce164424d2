"""Preparing data, killed at every moment: what is left is no data set, or a whole one."""
import json

import pytest

import killed
from data.corpus import CorpusConfig, prepare
from ranks import exit_codes


@pytest.mark.parametrize("name,before", [("fineweb", False), ("corpus", False), ("corpus", True)])
def test_killed_preparation_leaves_what_the_same_command_completes(tmp_path, name, before):
    """tests/killed.py says what it holds. Byte-level, some 4 shards of 3,000 tokens."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {i} " * (i % 40)}) + "\n"
                              for i in range(40)))
    if before:
        (tmp_path / "a.txt").write_text("another text\n" * 300)
        prepare(CorpusConfig(from_=str(tmp_path / "a.txt"), tokenizer="bytes", shard_tokens=500,
                             out=str(tmp_path / "before")))
    words = [f"--from={source}", "--tokenizer=bytes", "--shard_tokens=3000"]
    assert exit_codes(killed.kill_everywhere, 1, name, tmp_path, words) == [0]
    # at least a flush and a rename for each of 6 files
    assert int((tmp_path / "kills").read_text()) > 12
