#!/usr/bin/env python3
"""extract_readme.py README FOLDER: writes the README's ```cpp snippets into FOLDER, to be compiled.

A snippet with a main() becomes program_<line>.cpp, another one that begins with a preprocessor
line file_<line>.cpp; all others become functions of fragments.cpp, after prelude.hpp. Fails if
there is none.
"""
import pathlib
import re
import sys


def snippets(text):
    """Pairs of the line where a snippet begins and its text."""
    for match in re.finditer(r"^```cpp\n(.*?)^```$", text, re.M | re.S):
        yield text.count("\n", 0, match.start(1)) + 1, match.group(1)


def as_function(line, code, readme):
    # In a block of its own: it may declare what the parameters already name.
    return (f"static Result<void> fragment_{line}(FRAGMENT_PARAMETERS) {{\n  {{\n"
            f'#line {line} "{readme}"\n{code}  }}\n  return {{}};\n}}\n\n')


def main():
    readme, out = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2])
    text = readme.read_text()
    fragments, files = [], 0
    for line, code in snippets(text):
        if re.search(r"^int main\(", code, re.M):
            kind = "program"
        elif code.startswith("#"):
            kind = "file"
        else:
            fragments.append(as_function(line, code, readme))
            continue
        files += 1
        (out / f"{kind}_{line}.cpp").write_text(f'#line {line} "{readme}"\n{code}')
    (out / "fragments.cpp").write_text('#include "prelude.hpp"\n\n' + "".join(fragments))
    print(f"{readme.name}: {files} files, {len(fragments)} fragments")
    if not files or not fragments:
        sys.exit("FAILED: no snippets")


main()
