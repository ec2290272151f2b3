#!/usr/bin/env python3
"""Keeps the README's links to lines of code true.

A link [`name`](file#L12) must point at a line of that file in which `name` stands.

    python3 dev/readme_lines.py         check; exits 1 if a link is off
    python3 dev/readme_lines.py --fix   point each link at the definition of its name
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`([^`]+)`\]\(([\w./]+)#L(\d+)\)")


def find(name, lines):
    """Line of the definition: the name at a function's head, else its first appearance."""
    word = re.compile(r"\b" + re.escape(name) + r"\b")
    heads = [i for i, s in enumerate(lines, 1) if word.search(s) and re.match(r"(HOST_DEVICE )?static|void |enum|typedef", s)]
    first = [i for i, s in enumerate(lines, 1) if word.search(s)]
    return (heads or first or [None])[0]


def main():
    if sys.argv[1:] not in ([], ["--fix"]):
        print(__doc__.strip(), file=sys.stdout if "--help" in sys.argv else sys.stderr)
        return 0 if "--help" in sys.argv else 2
    fix, bad = len(sys.argv) > 1, 0
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")

    def check(match):
        nonlocal bad
        name, path, line = match.group(1), match.group(2), int(match.group(3))
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        right = find(name, lines)
        if right is None:
            bad += 1
            print(f"README.md: {name} does not stand in {path}")
        elif line != right:
            bad += not fix
            if not fix:
                print(f"README.md: {name} is at {path}:{right}, not {line}; --fix repairs it")
        return match.group(0) if right is None else f"[`{name}`]({path}#L{right})"

    text = LINK.sub(check, text)
    if fix:
        readme.write_text(text, encoding="utf-8")
    print(f"{len(LINK.findall(text))} links to lines, {bad} off")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
