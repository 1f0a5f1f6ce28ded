"""Refuse words that readers stumble over: `python .ci/words.py` names file, line and what to write instead."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTEAD = {
    r"put(s|ting)? out\b": "returns, outputs",
    r"\bsomebod(y|ies)\b|\beverybod|\banybod|\bnobod|\ba stranger\b": "user code, third-party code, all ranks, nothing",
    r"\bforeign (module|callback|code|loader)": "user, third-party",
    r"\bby heart\b": "memorises",
    r"\bin earnest\b": "generalises",
    r"\bwhole numbers?\b": "integers",
    r"\bfirst process\b|\bother processes\b|\ball processes\b|\bof processes\b": "rank 0, ranks, world size",
    r"\b(can|could) ?not be told\b|\b(is|are) told\b|\btells? (of|apart)\b": "cannot infer; reports, warns, raises",
    r"\bbeg(in|ins|an) (afresh|anew)\b|\btak(e|es|en) up\b": "reset, restore, resume",
    r"\bWhat each came to\b|\bcame to\b": "results",
    r"\bis none\.|\bif it is none\b": "is missing, does not exist",
    r'"""(Of|The same of) ': "a verb or a noun phrase",
    r"^\s+\w+: (Of|As of|The same) ": "a noun phrase",
}
"""Patterns, and what to write in their place."""
CHECKED = ("forge_lightning/**/*.py", "benchmarks/*.py", "*.md", "docs/*.md", "notebooks/*.ipynb", "configs/**/*.yaml")
PROCESSES = ("sandbox", "benchmarks/attacks")
"""Where processes are meant, not ranks."""


def faults(text: str, path: str) -> list[str]:
    """One line for each place where a word stands."""
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, instead in INSTEAD.items() if "words: keep" not in line else ():
            if "process" in pattern and any(part in path for part in PROCESSES):
                continue
            if found := re.search(pattern, line):
                lines.append(f"{path}:{number}: {found[0].strip()!r}: write {instead}")
    return lines


def main() -> int:
    """Check the repository. Returns 1 if there is a fault."""
    assert faults("it puts out logits", "x.md") == ["x.md:1: 'puts out': write returns, outputs"]
    paths = sorted({path for pattern in CHECKED for path in ROOT.glob(pattern)})
    found = [fault for path in paths for fault in faults(path.read_text(), str(path.relative_to(ROOT)))]
    print("\n".join(found), file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
