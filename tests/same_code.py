"""One name, one source: top-level functions and classes of one name are the same in every script, but for the algorithm's own.

python tests/same_code.py               print what differs; exit status 1 if anything does
python tests/same_code.py --write td3   copy what baselines/td3.py shares into every script that has it
"""

import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("td3_*.py"), *ROOT.glob("sac_*.py"), *(ROOT / "baselines").glob("*.py")])
OWN = {"Args", "Actor", "Critic", "train"}  # what an algorithm changes


def definitions(path: Path) -> dict[str, str]:
    """The source of each top-level function and class that should be the same everywhere, decorators included."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
            first = min(part.lineno for part in (node, *node.decorator_list))
            found[node.name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


if __name__ == "__main__":
    write = sys.argv[1:2] == ["--write"]
    parent = definitions(next(path for path in SCRIPTS if path.stem == (sys.argv[2] if write else "td3")))
    originals, differs = dict(parent), False
    for path in SCRIPTS:
        for name, text in definitions(path).items():
            original = originals.setdefault(name, text)
            if text != original and write and name in parent:
                path.write_text(path.read_text().replace(text, original))
            elif text != original:
                differs = True
                print(*difflib.unified_diff(original.split("\n"), text.split("\n"), "", str(path), n=1, lineterm=""), sep="\n")
    sys.exit(differs)
