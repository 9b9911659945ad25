"""The shared regions: the same bytes in every script that has them.

python tests/regions.py                 print what differs from baselines/td3.py; exit status 1 if anything does
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
    """Unified diffs of every shared region that is not the same as in source, for all scripts."""
    original, diffs = regions(source), []
    for path in scripts():
        for name, text in regions(path).items():
            if name in original and text != original[name]:
                names = str(source.relative_to(ROOT)), str(path.relative_to(ROOT))
                diffs += difflib.unified_diff(original[name].splitlines(True), text.splitlines(True), *names, n=1)
    return diffs


def write(source: Path) -> None:
    original = regions(source)
    for path in scripts():
        path.write_text(REGION.sub(lambda match: original.get(match[1], match[0]), path.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="NAME", choices=[path.stem for path in (ROOT / "baselines").glob("*.py")])
    arguments = parser.parse_args()
    parent = ROOT / "baselines" / f"{arguments.write or 'td3'}.py"
    if arguments.write:
        write(parent)
    sys.stdout.writelines(differences(parent))
    sys.exit(bool(differences(parent)))
