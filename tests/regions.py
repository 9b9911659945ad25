"""The shared regions: the same bytes in every script that has them.

python tests/regions.py                 print what differs; exit status 1 if anything does
python tests/regions.py --write td3     copy each region of baselines/td3.py to every script that has it
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REGION = re.compile(r"^# region (\w+)\n.*?^# endregion\n", re.MULTILINE | re.DOTALL)


def scripts() -> list[Path]:
    return sorted([*ROOT.glob("td3_*.py"), *ROOT.glob("sac_*.py"), *(ROOT / "baselines").glob("*.py")])


def regions(path: Path) -> dict[str, str]:
    return {match[1]: match[0] for match in REGION.finditer(path.read_text())}


def differences(source: Path) -> list[str]:
    """Unified diffs of every region that is not the same everywhere: against source, or else the first script that has it."""
    originals = {name: (source, text) for name, text in regions(source).items()}
    diffs = []
    for path in scripts():
        for name, text in regions(path).items():
            where, original = originals.setdefault(name, (path, text))
            names = str(where.relative_to(ROOT)), str(path.relative_to(ROOT))
            diffs += difflib.unified_diff(original.splitlines(True), text.splitlines(True), *names, n=1)
    return diffs


def write(source: Path) -> None:
    originals = regions(source)
    for path in scripts():
        path.write_text(REGION.sub(lambda match: originals.get(match[1], match[0]), path.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="NAME", choices=[path.stem for path in scripts()])
    arguments = parser.parse_args()
    parent = next(path for path in scripts() if path.stem == (arguments.write or "td3"))
    if arguments.write:
        write(parent)
    sys.stdout.writelines(differences(parent))
    sys.exit(bool(differences(parent)))
