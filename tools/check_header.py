#!/usr/bin/env python3
"""check_header.py [FILE]: does coordination.hpp keep what it promises about its own form?

Prints one line for each thing that is wrong, or one line that all is well; and how much of the
interface is explained.
"""
import re
import sys
from pathlib import Path

# What the interface (everything above Part C) may include: headers that compile fast.
INTERFACE_INCLUDES = {
    "cassert", "chrono", "cstddef", "cstdint", "functional", "iterator", "limits", "map", "memory",
    "optional", "stdexcept", "string", "string_view", "type_traits", "utility", "variant",
    "vector",
    "nlohmann/json_fwd.hpp",
}
# Sections that exist only in the implementation.
IMPLEMENTATION_ONLY = {"Wire"}
# Where in Part C each of these may stand: the wire format is known in one place, and so is the
# HTTP library. Registry and Config keep JSON in etcd, and Config hands it out, as Client::call does;
# MemoryEtcd is the other end of the wire.
CONFINED = {
    r"\bhttplib::|<httplib\.h>": {"Transport"},
    r"\bopenssl/|\bSSL_\w+\(": {"Transport"},
    r"\b(nlohmann::json|[Jj]son)::parse\(|\.dump\(|->dump\(": {"Wire"},
    r"\bnlohmann::|\bJson\b": {"Wire", "Client", "Registry", "Config", "Globals", "MemoryEtcd",
                                "Recipes"},
}
# Part C's includes stand at its head, before the first section.
MAX_COLUMNS = 100
MAX_FUNCTION_LINES = 60
# Part B is the manual: in every section there is a line with a comment for so many of code.
MAX_CODE_PER_COMMENT = 2.0

BANNER = re.compile(r"^// == (?:(\d+|[A-Z])\. )?(.+?) =+$")
failures = []


def fail(line, message):
    failures.append(f"{path.name}:{line}: {message}")


def blank_out(text):
    """The text with the contents of comments and literals replaced by spaces."""
    token = re.compile(
        r'//[^\n]*|/\*.*?\*/|R"([^(\s]*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])+\'',
        re.S)
    return token.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def parse_banners(lines):
    """(line number, number or letter, name) of every section."""
    banners = []
    for number, line in enumerate(lines, 1):
        if line.startswith("// =="):
            match = BANNER.match(line)
            if not match or not match.group(1):
                fail(number, "a banner is '// == N. Name ==='")
            else:
                banners.append((number, match.group(1), match.group(2)))
    return banners


def check_sections(parts):
    """The same sections, in the same order, in the map at the top, in B and in C."""
    interface = [(int(n), name) for _, n, name in parts["B"]]
    implementation = [(int(n), name) for _, n, name in parts["C"]]
    for part, sections in (("B", interface), ("C", implementation)):
        if sections != sorted(sections):
            fail(parts[part][0][0], f"the sections of Part {part} are out of order")
    for name in IMPLEMENTATION_ONLY & {name for _, name in interface}:
        fail(parts["B"][0][0], f"section {name} belongs into Part C only")
    shared = [s for s in implementation if s[1] not in IMPLEMENTATION_ONLY]
    if shared != interface:
        fail(parts["C"][0][0] if parts["C"] else 1,
             f"Part B has {differing(interface, shared)}, Part C has {differing(shared, interface)}")
    told = re.search(r"^//   B  Interface(.*?)^//   C  ", "\n".join(lines), re.S | re.M)
    told = re.findall(r"(\d+) ([A-Z]\w+)", told.group(1)) if told else []
    if [(int(n), name) for n, name in told] != interface:
        fail(1, "the map at the top is not the table of contents")


def differing(some, others):
    return ", ".join(f"'{n}. {name}'" for n, name in some if (n, name) not in others) or "no more"


def check_includes(first_line_of_c):
    for number, line in enumerate(lines[:first_line_of_c - 1], 1):
        match = re.match(r'\s*#\s*include\s*[<"](.+?)[>"]', line)
        otherwise = lines[number - 2].strip() == "#else"  # where there is nothing smaller
        if match and match.group(1) not in INTERFACE_INCLUDES and not otherwise:
            fail(number, f"<{match.group(1)}> is not for the interface")


def check_confined(section_of, first_line_of_c):
    for pattern, allowed in CONFINED.items():
        in_wire = False  # one half of it stands with MemoryEtcd
        for number, line in enumerate(code_with_includes, 1):
            if number < first_line_of_c:
                continue
            in_wire = in_wire or line.startswith("namespace detail::wire")
            in_wire = in_wire and not lines[number - 1].startswith("}  // namespace detail::wire")
            section = "Wire" if in_wire else section_of(number)
            match = re.search(pattern, line)
            if match and section is not None and section not in allowed:
                fail(number, f"{match.group()} in section {section}")


def check_functions(first_line_of_c):
    """No function of Part C is too long. A scanner of braces, not a parser."""
    text = "\n".join(code[first_line_of_c - 1:])
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*",
                  lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.M)
    open_braces = []  # (what it opens, where its head begins)
    head = 0
    for match in re.finditer(r"[{};]", text):
        at, kind = match.start(), None
        if match.group() == "{":
            nested = any(opened == "function" for opened, _ in open_braces)
            kind = "block" if nested else kind_of(text[head:at])
            open_braces.append((kind, head))
        elif match.group() == "}" and open_braces:
            kind, start = open_braces.pop()
            if kind == "function":
                check_length(text, start, at, first_line_of_c)
        # What follows `int x{0}` belongs to it still, and inside a function nothing is a head.
        if kind != "value" and not any(opened == "function" for opened, _ in open_braces):
            head = at + 1


def kind_of(head):
    """What the brace after `head` opens. The body of a function stands after a space."""
    if not head[-1:].isspace() or head.rstrip().endswith("=") or head.count("(") != head.count(")"):
        return "value"
    head = re.sub(r"\btemplate\s*<[^{}]*?>\s*(?=\w|\[)", "", head)
    if re.search(r"\bnamespace\b|\bextern\b\s*$", head):
        return "namespace"
    if re.search(r"\b(?:class|struct|union|enum)\b[^()]*$", head):
        return "class"
    return "function" if "(" in head else "value"


def check_length(text, start, end, first_line_of_c):
    start += len(text[start:end]) - len(text[start:end].lstrip())
    length = text.count("\n", start, end) + 1
    if length > MAX_FUNCTION_LINES:
        name = re.search(r"[~\w:]+\s*\(", text[start:end])
        fail(first_line_of_c + text.count("\n", 0, start),
             f"{name.group()[:-1] if name else 'a function'} has {length} lines")


def check_comments(sections, end):
    """Prints how well each section of Part B is explained, without what is in namespace detail."""
    told = []
    inner = False  # in namespace detail
    borders = [line for line, _, _ in sections[1:]] + [end]
    for (first, section, name), last in zip(sections, borders):
        comments = instructions = 0
        for number in range(first, last - 1):
            raw, stripped = lines[number], code[number].strip()
            inner = (inner or raw == "namespace detail {") and not raw.startswith("}  // namespace")
            if not inner:
                comments += "//" in raw and code[number].rstrip() != raw.rstrip()
                instructions += bool(re.search(r"\w", stripped))
        ratio = instructions / max(comments, 1)
        told.append(f"{name} {ratio:.1f}")
        if ratio > MAX_CODE_PER_COMMENT:
            fail(first, f"section {name} has {comments} lines with comments for {instructions} of code")
    print("lines of code for each with a comment: " + ", ".join(told))


path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "coordination.hpp")
source = path.read_text(encoding="utf-8")
lines = source.split("\n")
code = blank_out(source).split("\n")
code_with_includes = [raw if raw.lstrip().startswith("#") else blank
                      for raw, blank in zip(lines, code)]

parts, part = {"A": [], "B": [], "C": []}, None
starts = {}
for banner in parse_banners(lines):
    if banner[1].isdigit():
        parts[part].append(banner)
    else:
        part = banner[1]
        starts[part] = banner[0]
if list(starts) != ["A", "B", "C"]:
    fail(1, f"the parts are {', '.join(starts) or 'missing'}, not A, B, C")

end_of_interface = starts.get("C", len(lines) + 1)
if parts["B"]:
    check_sections(parts)
check_includes(end_of_interface)
check_confined(lambda number: next((name for line, _, name in reversed(parts["C"])
                                    if line <= number), None), end_of_interface)
check_functions(end_of_interface)
check_comments(parts["B"], end_of_interface)
for number, line in enumerate(lines, 1):
    if len(line) > MAX_COLUMNS:
        fail(number, f"{len(line)} columns")

if failures:
    print("\n".join(failures))
    sys.exit(1)
print(f"OK: {path.name}, {len(lines) - 1} lines, {len(parts['C'])} sections")
