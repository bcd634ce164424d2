"""Imports point down only: the map of the house, held by reading the imports."""
import ast
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
ALLOWED = {         # module or folder -> what of ours it may import when it is loaded
    "config": set(), "device": set(), "checkpoint": set(), "presets": set(),
    "bpe": {"bpe_train", "bpe_files"}, "bpe_train": set(),
    "download": set(), "bpe_files": {"download"},
    "linear": set(), "cross_entropy": {"linear"}, "model": {"config", "cross_entropy", "linear"},
    "optim": {"config"},
    "launch": {"device"},
    "model_files": {"config", "model"}, "faults": {"launch"}, "parallel": {"device", "launch"},
    "report": {"cross_entropy", "device", "faults", "launch", "optim"},
    "sample": {"bpe", "checkpoint", "classifier", "config", "data", "device", "lora", "model"},
    "quant": set(), "lora_targets": {"quant"}, "lora_layer": {"config", "lora_targets", "quant"},
    "lora_adapters": {"lora_layer", "lora_targets", "quant"},
    "lora_files": {"lora_adapters", "lora_layer", "lora_targets"},
    "lora": {"config", "lora_adapters", "lora_files", "lora_layer", "lora_targets", "quant"},
    "classifier": {"config", "model"},
    "data/shards": set(), "data/texts": set(), "data/loader": {"data"},
    "data": {"bpe", "config", "data", "download"},
    "eval": {"data", "config", "device", "download", "eval"},
    "train": {"bpe", "checkpoint", "classifier", "config", "data", "device", "eval", "faults",
              "launch", "lora", "model", "optim", "parallel", "presets", "report", "sample"},
}
OURS = {path.stem for path in REPOSITORY.glob("*.py")} | {"data", "eval", "experiments", "bench"}


def imports(tree, everywhere=False):
    """Names of ours that a module imports at its top, or anywhere in it."""
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def modules():
    files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("data/*.py"), *REPOSITORY.glob("eval/*.py")]
    for path in files:
        if path.name != "__init__.py":
            name = path.relative_to(REPOSITORY).with_suffix("").as_posix()
            yield name, ast.parse(path.read_text())


def test_imports_point_down_only():
    for name, tree in modules():
        allowed = ALLOWED.get(name, ALLOWED.get(name.split("/")[0]))
        assert allowed is not None, f"say in ALLOWED what {name} may import"
        found = set(imports(tree)) & OURS
        assert found <= allowed, f"{name} imports {sorted(found - allowed)}"


def test_only_command_lines_of_eval_look_up():
    """eval is handed the model; its `main`s load one by name, through sample.py."""
    for name, tree in modules():
        if name.startswith("eval/"):
            assert set(imports(tree, everywhere=True)) & OURS <= ALLOWED["eval"] | {"sample"}, name


def test_the_tokenizer_needs_no_torch():
    for name in ("bpe", "bpe_train", "bpe_files"):
        tree = ast.parse((REPOSITORY / f"{name}.py").read_text())
        assert "torch" not in set(imports(tree, everywhere=True)), name


def test_the_model_knows_nothing_of_lora_and_the_loop_nothing_of_tasks():
    assert "lora" not in (REPOSITORY / "model.py").read_text().lower()
    assert "if task" not in (REPOSITORY / "train.py").read_text()
