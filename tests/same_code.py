"""One name, one source: a top-level function or class of one name has the same source in every script that has it.

What an algorithm changes is its own (OWN). train is the same in the scripts whose Batch is the same.

python tests/same_code.py               print what differs; exit status 1 if anything does
python tests/same_code.py --write td3   copy what baselines/td3.py shares into every script that has it
"""

import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("td3_*.py"), *ROOT.glob("sac_*.py"), *(ROOT / "baselines").glob("*.py")])
OWN = ("Args", "Actor", "Critic", "Batch", "Agent")


def shared(path: Path) -> dict[str, str]:
    """The sources, decorators included, that must be the same everywhere; train goes by the source of Batch too."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min(part.lineno for part in (node, *node.decorator_list))
            found[node.name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    found["train with this " + found.get("Batch", "")] = found.pop("train")
    return {name: text for name, text in found.items() if name not in OWN}


if __name__ == "__main__":
    write = sys.argv[1:2] == ["--write"]
    parent = sys.argv[2] if write else "td3"
    originals = shared(next(path for path in SCRIPTS if path.stem == parent))
    copied = set(originals)
    differs = False
    for path in SCRIPTS:
        for name, text in shared(path).items():
            original = originals.setdefault(name, text)
            if write and name in copied:
                path.write_text(path.read_text().replace(text, original))
            elif text != original:
                differs = True
                diff = difflib.unified_diff(original.split("\n"), text.split("\n"), "", str(path), n=1, lineterm="")
                print(*diff, sep="\n")
    sys.exit(differs)
