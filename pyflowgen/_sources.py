"""A fingerprint of the C++ sources: the build writes it into ``_C``, an editable install compares it at import."""

import hashlib
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def fingerprint() -> str | None:
    """A hash of names and contents of all files under csrc; None where there is no csrc beside the package."""
    if not (CSRC / "module.cpp").exists():
        return None
    total = hashlib.sha256()
    for path in sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
        content = path.read_bytes()
        total.update(f"{path.relative_to(CSRC).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]


if __name__ == "__main__":
    header = Path(sys.argv[1])
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(f'#define PYFLOWGEN_SOURCES "{fingerprint()}"\n')
