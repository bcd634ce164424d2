"""One file of several, changed as disks, networks and hostile people change files.

    files = mutated({"meta.json": b"...", "train_0000.npy": b"..."}, random.Random(0))

The change is a pure function of the files and the generator: bits, lengths, pieces moved, huge
numbers in digits or bytes, and other JSON (parts missing, exchanged, of another type).
"""
import json
import re
import struct

HUGE = 10**12


def flip(data, rng):
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(data, rng):
    del data[rng.randrange(len(data)):]


def insert(data, rng):
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))


def remove(data, rng):
    at = rng.randrange(len(data))
    del data[at:at + rng.choice((1, 2, 8, 100))]


def repeat(data, rng):
    a, b = sorted(rng.choices(range(len(data) + 1), k=2))
    data[b:b] = data[a:b] * rng.choice((1, 1, 3))


def splice(data, rng):
    a, b = rng.choices(range(len(data)), k=2)
    size = rng.randrange(1, 200)
    data[a:a + size] = data[b:b + size]


def number(data, rng):
    """Another number: spelled in digits, or in 1 to 8 bytes."""
    digits = list(re.finditer(rb"\d+", bytes(data)))
    if digits and rng.random() < 0.5:
        found = rng.choice(digits)
        data[found.start():found.end()] = rng.choice((
            b"0", b"-1", b"1", b"65536", b"2147483648", str(HUGE).encode(), b"9" * 19, b"9" * 30,
            b"1e999", b"1.5", b"9" * 5000, b"NaN", b"null", b"true"))
    else:
        size = min(rng.choice((1, 2, 4, 8)), len(data))
        at = rng.randrange(len(data) - size + 1)
        value = rng.choice((-1, 0, 2**63 - 1, HUGE, 1 << 30))
        data[at:at + size] = struct.pack("<q", value)[:size]


def structure(data, rng):
    """Other JSON: of the whole file, of a line, or of a safetensors header."""
    head, lines = b"", bytes(data).split(b"\n")
    if data[8:9] == b"{" and data[:1] != b"{":
        size = int.from_bytes(data[:8], "little")
        head, body, rest = b"safetensors", bytes(data[8:8 + size]), bytes(data[8 + size:])
    else:
        body, rest = bytes(data), b""
    chosen = 0
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        chosen, head = rng.randrange(len(lines)), b"line"
        try:
            tree = json.loads(lines[chosen])
        except (ValueError, RecursionError):
            return flip(data, rng)
    changed = json.dumps(change_tree(tree, rng), ensure_ascii=rng.random() < 0.5)
    changed = changed.encode("utf-8", "surrogatepass").replace(b'"DEEP"', b"[" * 5000 + b"]" * 5000)
    if head == b"safetensors":
        changed = struct.pack("<Q", len(changed)) + changed + rest
    if head == b"line":
        changed = b"\n".join(lines[:chosen] + [changed] + lines[chosen + 1:])
    data[:] = changed


def change_tree(tree, rng):
    """A JSON value with one of its parts missing, doubled, exchanged or of another type."""
    if isinstance(tree, (dict, list)) and tree and rng.random() < 0.85:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key, action = rng.choice(keys), rng.random()
        if action < 0.15:
            del tree[key]
        elif action < 0.25:
            tree[key], other = tree[rng.choice(keys)], tree[key]
            tree[rng.choice(keys)] = other
        elif action < 0.35 and isinstance(tree, dict):
            tree[rng.choice(("", "x", "model", "../x", "\ud800"))] = tree.pop(key)
        elif action < 0.35:
            tree.insert(key, tree[key])
        else:
            tree[key] = change_tree(tree[key], rng)
        return tree
    return rng.choice((None, True, False, 0, -1, 1, 2, 255, HUGE, 10**25, 10**4000, 1.5, 1e300,
                       float("nan"), float("inf"), "", "x", "\ud800", "a\nb", [], {}, [tree], [1],
                       {"a": tree}, [[]], "DEEP", str(tree)))


def change_state(tree, rng):
    """A checkpoint's content with one of its parts changed: as in `change_tree`, or a tensor that
    has another shape, type, place or value."""
    import torch
    if not isinstance(tree, dict):
        return change_tree(tree, rng)
    inner = [key for key, value in tree.items() if isinstance(value, (dict, torch.Tensor))]
    if not inner or rng.random() < 0.3:
        return change_tree(tree, rng)
    key = rng.choice(inner)
    if isinstance(tree[key], dict):
        tree[key] = change_state(tree[key], rng)
        return tree
    tensor = tree[key]
    tree[key] = rng.choice((
        lambda: tensor.flatten()[:-1], lambda: tensor[None], lambda: tensor.t(), lambda: tensor * 0,
        lambda: tensor * 1e30, lambda: tensor / 0, lambda: tensor.to(torch.bfloat16),
        lambda: tensor.long(), lambda: tensor.to("meta"), lambda: tensor.to_sparse(),
        lambda: tensor.flatten()[:1].expand(10**9), lambda: torch.zeros(0), lambda: tensor > 0,
        lambda: tensor.to(torch.complex64), lambda: torch.nn.Parameter(tensor.float()),
        lambda: tree[rng.choice(inner)], lambda: HUGE, lambda: None))() if tensor.dim() else 1.5
    return tree


MUTATIONS = (flip, flip, truncate, insert, remove, repeat, splice, number, number, structure,
             structure, structure)


def mutated(files, rng):
    """The files with one of them changed, at times twice."""
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 1, 2))):
        if data:
            rng.choice(MUTATIONS)(data, rng)
    return {**files, name: bytes(data)}
