#!/usr/bin/env python3
"""check_readme.py README FOLDER: is what the README names there?

Links to files and headings; test cases (the text of a link to a .cpp under tests/ is the name of a
case in it); files, macros and functions in code type; the error codes; "more than N test cases";
the commands and options of coordctl. Each shell snippet must parse, and the pictures must be XML.
The ```cmake snippets go into FOLDER/CMakeLists.txt, as the end of a project of their own.
"""
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as xml

readme = pathlib.Path(sys.argv[1]).resolve()
root = readme.parent
text = readme.read_text()
prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
wrong = []


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def source(*names):
    paths = [p for name in names for p in sorted(root.glob(name)) if p.is_file()]
    return "\n".join(p.read_text(errors="replace") for p in paths)


def test_cases(path):
    """The names in a file, without their tags."""
    case = r'\b(?:TEST_CASE|TEST_CASE_FIXTURE|CONFORMANCE)\(\s*(?:\w+,\s*)?((?:"(?:\\.|[^"])*"\s*)+)'
    for literals in re.findall(case, path.read_text()):
        name = "".join(re.findall(r'"((?:\\.|[^"])*)"', literals))
        yield re.sub(r" \[\w+\]$", "", name.replace('\\"', '"'))


def check_links():
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
               for heading in re.findall(r"^#+ (.*)$", prose, re.M)}
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose):
        path = root / target
        if target.startswith("#"):
            if target[1:] not in anchors:
                yield f"no heading: {target}"
        elif "://" in target:
            continue
        elif not path.exists():
            yield f"no file: {target}"
        elif path.suffix == ".svg":
            xml.parse(path)
        elif re.match(r"tests/.*\.cpp$", target) and label not in test_cases(path):
            yield f"no test case in {target}: {label}"


def check_files():
    for name in re.findall(r"(?<![\w./-])(?:examples|tests|tools)/[\w./-]*\w", text):
        if not (root / name).exists():
            yield f"no file: {name}"


def check_names():
    header = source("coordination.hpp")
    everything = header + source("CMakeLists.txt", "tools/**/*", "tests/**/*.cpp", "tests/**/*.hpp")
    for name in sorted(set(re.findall(r"\b(?:COORDINATION|ETCDCTL)_\w+", text))):
        if not re.search(rf"\b{name}\b", everything):
            yield f"no such macro or variable: {name}"
    for span in re.findall(r"`([^`]+)`", prose):
        if match := re.fullmatch(r"[\w.]*?(?:(\w+)::)?(\w+)(\([^']*\))?", span):
            scope, name, call = match.groups()
            if (scope or call) and not re.search(rf"\b{name}\b", header):
                yield f"not in the header: {span}"
    codes = re.search(r"enum class ErrorCode \{(.*?)\};", header, re.S).group(1)
    for code in re.findall(r"^  (\w+)", codes, re.M):
        if f"| `{code}` |" not in prose:
            yield f"no such row in the table of errors: {code}"


def check_counts():
    cases = sum(len(list(test_cases(path))) for path in root.glob("tests/**/*.cpp"))
    for number in re.findall(r"more than ([\d,]+) test cases", text):
        if not 0.75 * cases < int(number.replace(",", "")) < cases:
            yield f"more than {number} test cases: there are {cases}"


def check_shell():
    man = re.sub(r"\\f[A-Z]", " ", source("tools/coordctl/coordctl.1").replace("\\-", "-"))
    tests = source("tests/coordctl/*.cpp")
    for snippet in snippets("sh"):
        parsed = subprocess.run(["bash", "-n"], input=snippet, text=True, stderr=subprocess.PIPE)
        if parsed.returncode:
            yield parsed.stderr
        for line in re.findall(r"^coordctl ([^#\n]*)", snippet, re.M):
            own = line.split(" -- ")[0]
            for word in [own.split()[0], *re.findall(r"--[\w-]+", own)]:
                if not re.search(rf"(?<![\w-]){word}\b", man):
                    yield f"not in coordctl's man page: {word}"
        for body in re.findall(r"^curl .*?-d '(.*?)'", snippet, re.M):
            if body not in tests:
                yield f"sent by no test of coordctl: {body}"


def write_cmake(folder):
    begin = "cmake_minimum_required(VERSION 3.16)\nproject(app CXX)\nadd_executable(app app.cpp)\n"
    (folder / "CMakeLists.txt").write_text(begin + "".join(snippets("cmake")))
    (folder / "app.cpp").write_text("int main() {}\n")
    (folder / "coordination").symlink_to(root)


for check in (check_links, check_files, check_names, check_counts, check_shell):
    wrong += sorted(set(check()))
write_cmake(pathlib.Path(sys.argv[2]))
print(f"{readme.name}: {len(wrong)} things that are not there")
if wrong:
    sys.exit("FAILED:\n" + "\n".join(wrong))
